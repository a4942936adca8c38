"""Video LDM layers: the file format of this pack, read and written.

Keys are those of the public SVD checkpoints, without prefix (docs/formats.md#video-ldm-layers): the spatial module that
a layer follows, then `time_stack`, `time_pos_embed`, `time_mixer`. The metadata rebuilds everything that shapes do not
tell:

    format, version             what this is; another version than VERSION is refused
    family, layers              the layers' name, and their number, which tells a cut set from a whole one
    base_family, base_context_dim, frames, fps, licence
    beta_schedule, linear_start, linear_end, prediction         the noise schedule, in ComfyUI's names
    position_encoding, positions, heads {module: heads}, mix_length, pool_spatial_norms
    context_positions           version 2: the sets of known frames the layers were trained for, a list of lists of frame
                                numbers, from the end where negative; the empty list is a clip from noise alone
    small_frames                version 3: channels of the small frames that an upscaler's layers see
    shared_noise                version 4: "true" for an upscaler's layers that are run with one noise for all frames

Layers with an input for known frames are version 2, with `context_downsampler.steps.N` for c_S and, where they hear the
frame rate, `fps_token.embed`; those with one for small frames are version 3, with the same downsampler;
those trained on shared noise are version 4, with small frames or without, and all others are version 1. Other entries
of the metadata are kept as they are.
"""

import json
import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor, nn

from ..atomic import write_atomically
from ..errors import VideoLDMError
from ..formats.contents import first_line
from ..formats.files import TensorFile
from ..formats.metadata import MOST_FRAMES, betas_of, entries_of, fps_of, list_of, parsed_json, shown, text_of, whole
from ..formats.temporal_file import (
    PREDICTIONS,
    Base,
    Identified,
    Schedule,
    TemporalFile,
    require_complete,
    require_one_dtype,
)
from ..formats.tensor_names import Keys
from ..layers import ResBlockParams, TransformerParams
from ..params import ContextParams, SmallFramesParams, StackParams
from ..slots import Site, run_order
from ..spatial_changes import POOLED_NORMS
from .family import Family

FORMAT = "video_ldm_temporal_layers"
VERSION, CONTEXT_VERSION, SMALL_FRAMES_VERSION, SHARED_NOISE_VERSION = 1, 2, 3, 4
VERSIONS = tuple(map(str, (VERSION, CONTEXT_VERSION, SMALL_FRAMES_VERSION, SHARED_NOISE_VERSION)))
TITLE = "a file of Video LDM temporal layers"
POSITION_ENCODING = "timestep sinusoid through an MLP"
RESERVED = ("format", "version", "family", "layers", "base_family", "base_context_dim", "frames", "fps", "licence",
            "beta_schedule", "linear_start", "linear_end", "prediction", "position_encoding", "positions", "heads",
            "mix_length", "pool_spatial_norms", "context_positions", "small_frames", "shared_noise")
REQUIRED = ("version", "family", "layers", "base_family", "frames", "beta_schedule", "linear_start", "linear_end",
            "position_encoding", "heads", "mix_length", "pool_spatial_norms")
LARGEST = 1_000_000     # of any number beside the tensors
EXTRAS = ("context_downsampler.", "fps_token.")     # modules of the whole set, not of a site
KEY = re.compile(r"(?:(?P<part>input|output)_blocks\.(?P<index>\d+)\.(?P<sub>[01])|middle_block\.(?P<mid>[012]))"
                 r"(?:\.transformer_blocks\.(?P<block>\d+))?\.(?P<suffix>time_(?:stack|pos_embed|mixer)\..+)")


def detect(keys: Keys, metadata: Mapping[str, str]) -> Identified | None:
    if metadata.get("format") == FORMAT:
        return Identified("video_ldm", TITLE, "Load it with Load Temporal Layers.", takes="temporal")
    return None


# Sites and names

def module_name(site: Site) -> str:
    """Name of the spatial module that a layer follows, as the file has it."""
    middle = site.part == "middle"
    block = "middle_block" if middle else f"{site.part}_blocks.{site.index}"
    if site.slot == "post_res":
        return f"{block}.{2 * site.n if middle else 0}"
    return f"{block}.1" + (f".transformer_blocks.{site.n}" if site.n else "")


def parse(key: str) -> tuple[Site, str] | None:
    """(site, suffix) of a temporal key, None for any other."""
    match = KEY.fullmatch(key)
    if match is None:
        return None
    if match["part"]:
        part, index, sub, ordinal = match["part"], int(match["index"]), int(match["sub"]), 0
    else:
        part, index, sub = "middle", 0, int(match["mid"])
        sub, ordinal = sub % 2, sub // 2
    if sub == 1:
        return Site(part, index, "in_attn_post_ff", int(match["block"] or 0)), match["suffix"]
    return Site(part, index, "post_res", ordinal), match["suffix"]


def stack_keys(shapes) -> dict[str, str]:
    """{stack key: file key} of the temporal tensors among a file's keys."""
    found = {key: parse(key) for key in shapes}
    names = {f"layers.{place[0].name}.{place[1]}": key for key, place in found.items() if place}
    return names | {key: key for key in shapes if key.startswith(EXTRAS)}


def bricks_of(shapes: Mapping[str, tuple], heads: Mapping[str, int]) -> tuple:
    """The layers that a set of temporal tensors makes; heads: of each transformer, by its module's name.

    Raises KeyError naming the entry that a layer lacks.
    """
    layers = defaultdict(dict)
    for key, shape in shapes.items():
        if place := parse(key):
            layers[place[0]][place[1]] = shape
    bricks = []
    for site in sorted(layers, key=run_order):
        layer = layers[site]
        mix_length = layer["time_mixer.mix_factor"][0]
        if site.slot == "post_res":
            channels, emb_dim = layer["time_stack.emb_layers.1.weight"]
            known = layer["time_stack.in_layers.2.weight"][1] - channels
            bricks.append((site, ResBlockParams(channels, emb_dim, mix_length, known)))
        else:
            channels, context_dim = layer["time_stack.0.attn2.to_k.weight"]
            module = module_name(site)
            if module not in heads:
                raise KeyError(f"number of heads of {module}")
            bricks.append((site, TransformerParams(channels, heads[module], context_dim, mix_length)))
    return tuple(bricks)


# Reading

def load(file: TensorFile, found: Identified | None = None) -> TemporalFile:
    """The layers of a file that carries this format's metadata."""
    metadata = file.metadata
    check_metadata(file)
    surplus = [key for key in file.shapes if parse(key) is None and not key.startswith(EXTRAS)]
    if surplus:
        raise contradiction(file.name, f"{surplus[0]} is no temporal layer's")
    params = rebuild(file)
    names = stack_keys(file.shapes)
    stored = file.read(names.values())
    tensors = {key: stored[name] for key, name in names.items()}
    require_complete(file.name, TITLE, params, tensors)
    require_one_dtype(file.name, tensors)
    return TemporalFile(
        file.name, "video_ldm", TITLE, params, tensors, schedule_of(metadata),
        Base(metadata["base_family"], optional_whole(metadata, "base_context_dim")), fps=fps_of(metadata),
        licence=metadata.get("licence", ""), metadata=dict(metadata),
        notes=notes_of(params))


def check_metadata(file: TensorFile):
    version = file.metadata.get("version", str(VERSION))
    if version not in VERSIONS:
        raise VideoLDMError(f"{file.name} is written in version {shown(version)} of the Video LDM layers format; this "
                            f"pack reads versions {', '.join(VERSIONS)}. Update the pack.")
    missing = [entry for entry in REQUIRED if entry not in file.metadata]
    if missing:
        raise VideoLDMError(f"{file.name} is {TITLE} whose metadata lacks {', '.join(missing)}, without which the "
                            "layers cannot be rebuilt. Write it again with this pack.")
    if file.metadata["position_encoding"] != POSITION_ENCODING:
        raise VideoLDMError(f"{file.name} encodes frame positions as '{shown(file.metadata['position_encoding'])}', "
                            f"which this pack does not know; it knows '{POSITION_ENCODING}'. Update the pack.")


def rebuild(file: TensorFile) -> StackParams:
    """Params from shapes and metadata; refuses the two where they contradict each other."""
    metadata, name = file.metadata, file.name
    try:
        heads = {module: whole(count, f"heads of {shown(module)}", 1, LARGEST)
                 for module, count in entries_of(parsed_json(metadata["heads"], "heads"), "heads").items()}
        frames, mix_length = (whole(metadata[entry], entry, 0, MOST_FRAMES, text=True)
                              for entry in ("frames", "mix_length"))
        layers = whole(metadata["layers"], "layers", 0, LARGEST, text=True)
        positions = optional_whole(metadata, "positions")
        context_dim = optional_whole(metadata, "base_context_dim")
        for entry in ("family", "base_family", "licence"):
            text_of(metadata.get(entry, ""), entry)
        schedule_of(metadata)
        fps_of(metadata)
    except ValueError as error:
        raise VideoLDMError(f"{name} is {TITLE} whose metadata cannot be read ({error}). Write it again with this "
                            "pack.") from None
    try:
        bricks = bricks_of(file.shapes, heads)
    except (KeyError, ValueError, IndexError) as error:
        raise contradiction(name, f"a layer lacks {first_line(error)}") from None
    context, fps_width = context_of(file)
    if len(bricks) != layers:
        raise contradiction(name, f"it says {layers} layers and holds {len(bricks)}")
    for site, brick in bricks:
        known = getattr(brick, "context_channels", 0)
        if isinstance(brick, ResBlockParams) and known != (context.channels if context else 0):
            raise contradiction(name, f"{site.name} has {known} channels of context, and the file's own input for it "
                                      f"gives {context.channels if context else 0}")
        if brick.mix_length != mix_length:
            raise contradiction(name, f"it says a mix of length {mix_length}, and {site.name} has {brick.mix_length}")
        if isinstance(brick, TransformerParams):
            if brick.heads < 1 or brick.channels % brick.heads:
                raise contradiction(name, f"{brick.channels} channels of {site.name} do not divide into "
                                          f"{brick.heads} heads")
            if context_dim not in (None, brick.context_dim):
                raise contradiction(name, f"it says text of width {context_dim}, and {site.name} takes "
                                          f"{brick.context_dim}")
    if frames < 1 or (mix_length > 1 and frames != mix_length):
        raise contradiction(name, f"it says clips of {frames} frames and a mix over {mix_length}")
    spatial = (POOLED_NORMS,) if metadata["pool_spatial_norms"] == "true" else ()
    return StackParams(metadata["family"], bricks, frames, positions, spatial, context, fps_width,
                       shared_noise_of(file))


def shared_noise_of(file: TensorFile) -> bool:
    """Whether the layers were trained on one noise for all frames; refused where version and entry differ on it."""
    version, told = file.metadata["version"], file.metadata.get("shared_noise")
    if told not in (None, "true") or (told == "true") != (version == str(SHARED_NOISE_VERSION)):
        raise contradiction(file.name, f"it is version {version} and says shared noise {shown(repr(told))}, and in "
                                       f"version {SHARED_NOISE_VERSION} alone that is 'true'")
    return told == "true"


def context_of(file: TensorFile) -> tuple[ContextParams | SmallFramesParams | None, int]:
    """The input for known or small frames, and the width of the frame-rate token, of a file that has them."""
    steps = {key: shape for key, shape in file.shapes.items() if re.fullmatch(r"context_downsampler\.steps\.\d+\.weight", key)}
    width = file.shapes.get("fps_token.embed.0.weight", (0,))[0]
    told, small = file.metadata.get("context_positions"), file.metadata.get("small_frames")
    if not steps and told is None and small is None:
        return None, width
    if not steps or (told is None) == (small is None):
        raise contradiction(file.name, "its context frames lack " + ("their positions" if steps else "the downsampler"))
    first = steps.get("context_downsampler.steps.0.weight", ())
    if small is not None:
        if first[1:2] != (3,) or small != "3":
            raise contradiction(file.name, f"it says small frames of {shown(small)} channels, and its downsampler "
                                           f"takes {list(first)[1:2]}; both are 3")
        return SmallFramesParams(first[0], len(steps)), width
    try:
        frames = whole(file.metadata["frames"], "frames", 1, MOST_FRAMES, text=True)
        positions = tuple(tuple(whole(p, "a known frame", -frames, frames - 1) for p in list_of(known, "a set", frames))
                          for known in list_of(parsed_json(told, "context_positions"), "context_positions", LARGEST))
        channels, inputs = first[:2]
    except ValueError:
        raise contradiction(file.name, f"its context positions '{shown(told)}' are no list of lists of the frame "
                                       "numbers of a clip, or the downsampler is incomplete") from None
    if not positions:
        raise contradiction(file.name, "it was trained for no set of context frames at all")
    return ContextParams(channels, inputs - 1, len(steps), positions), width


def contradiction(name: str, what: str) -> VideoLDMError:
    return VideoLDMError(f"{name} is {TITLE} whose metadata and tensors contradict each other: {what}. The file was "
                         "changed after it was written: use the original.")


def schedule_of(metadata: Mapping[str, str]) -> Schedule:
    kind, prediction = metadata["beta_schedule"], metadata.get("prediction") or None
    if kind not in ("linear", "sqrt_linear") or prediction not in (None, *PREDICTIONS):
        raise ValueError(f"noise schedule '{shown(kind)}' with prediction '{shown(prediction)}'")
    return Schedule(kind, *betas_of(metadata), prediction)


def optional_whole(metadata: Mapping[str, str], entry: str) -> int | None:
    return whole(metadata[entry], entry, 1, LARGEST, text=True) if metadata.get(entry) else None


def notes_of(params: StackParams) -> list[str]:
    notes = []
    if params.mix_length > 1:
        notes.append(f"The mix is a vector over time: these layers run clips of exactly {params.mix_length} frames.")
    if params.takes_small_frames:
        notes.append("Made for an upscaler, whose small frames they see: run them with Video Upscale.")
    if params.shared_noise:
        notes.append("Trained on one noise for all frames of a clip, which Video Upscale gives them.")
    if params.known_positions is not None:
        sets = [("none" if not known else ", ".join(map(str, known))) for known in params.known_positions]
        notes.append(f"Takes context frames: {' | '.join(sets)} (numbers from 0, from the end where negative).")
    return notes + [change.note for change in params.spatial]


# Writing

def write(path, layers: nn.Module | Mapping[str, Tensor], params: StackParams, *, schedule: Schedule, base: Base,
          fps: float | None = None, licence: str = "", metadata: Mapping[str, str] | None = None):
    """Write a stack (or its state dict) of Video LDM layers to `path`, whole or not at all.

    metadata: further entries, text to text. Raises ValueError for layers of another family, an incomplete set, or an
    entry of the format's own name.
    """
    tensors = layers.state_dict() if isinstance(layers, nn.Module) else layers
    require_complete(Path(path).name, TITLE, params, tensors)
    header = header_of(params, schedule, base, fps, licence)
    for entry, value in (metadata or {}).items():
        if entry in RESERVED:
            raise ValueError(f"metadata entry '{entry}' is the format's own: give it by its argument")
        header[entry] = str(value)
    # A copy on the CPU, each tensor with storage of its own: safetensors refuses shared or strided memory.
    named = {file_key(params, key): tensor.detach().to("cpu", copy=True).contiguous()
             for key, tensor in tensors.items()}
    write_atomically(path, lambda temporary: save_file(named, temporary, metadata=header))


def version_of(params: StackParams) -> int:
    if params.shared_noise:
        return SHARED_NOISE_VERSION
    if params.takes_small_frames:
        return SMALL_FRAMES_VERSION
    return VERSION if params.context is None and not params.fps_width else CONTEXT_VERSION


def file_key(params: StackParams, key: str) -> str:
    if key.startswith(EXTRAS):
        return key
    _, name, suffix = key.split(".", 2)
    site = next(site for site, _ in params.bricks if site.name == name)
    return f"{module_name(site)}.{suffix}"


def header_of(params: StackParams, schedule: Schedule, base: Base, fps: float | None, licence: str) -> dict[str, str]:
    heads, mixes = {}, set()
    if set(params.spatial) - {POOLED_NORMS}:
        raise ValueError("the Video LDM layers format knows pooled norms and no other change of the spatial network")
    for site, brick in params.bricks:
        if not isinstance(brick, (ResBlockParams, TransformerParams)) or parse(f"{module_name(site)}.time_stack.x") != (
                site, "time_stack.x"):
            raise ValueError(f"a {type(brick).__name__} at {site.name} has no name in the Video LDM layers format")
        mixes.add(brick.mix_length)
        if isinstance(brick, TransformerParams):
            heads[module_name(site)] = brick.heads
    if len(mixes) != 1:
        raise ValueError(f"one set of layers has mixes of one length, not {sorted(mixes)}")
    header = {
        "format": FORMAT, "version": str(version_of(params)), "family": params.family, "layers": str(len(params.bricks)),
        "base_family": base.family, "frames": str(params.frames), "licence": licence,
        "beta_schedule": schedule.beta_schedule, "linear_start": repr(float(schedule.linear_start)),
        "linear_end": repr(float(schedule.linear_end)), "position_encoding": POSITION_ENCODING,
        "heads": json.dumps(heads), "mix_length": str(mixes.pop()),
        "pool_spatial_norms": str(params.pool_spatial_norms).lower(),
    }
    optional = {"base_context_dim": base.context_dim, "fps": fps, "prediction": schedule.prediction,
                "positions": params.positions}
    if params.known_positions is not None:
        optional["context_positions"] = json.dumps(params.known_positions)
    if params.takes_small_frames:
        optional["small_frames"] = params.context.in_channels
    if params.shared_noise:
        optional["shared_noise"] = "true"
    header.update({entry: str(value) for entry, value in optional.items() if value is not None})
    return header


FAMILY = Family("Video LDM layers", "temporal", detect, load)
