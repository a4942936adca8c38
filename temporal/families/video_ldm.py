"""Video LDM layers: reading and writing the file format of this pack (docs/formats.md#video-ldm-layers).

Keys are those of the public SVD checkpoints, without prefix. A key begins with the spatial module that the layer
follows. Then comes `time_stack`, `time_pos_embed` or `time_mixer`. The metadata holds what shapes do not tell:

    format, version             other versions than VERSIONS are refused
    family, layers              the name of the layers, and how many there are
    base_family, base_context_dim, frames, fps, licence
    beta_schedule, linear_start, linear_end, prediction         the noise schedule, in ComfyUI's names
    position_encoding, positions, heads {module: heads}, mix_length, pool_spatial_norms
    context_positions           version 2: the sets of context frames that the layers were trained for. A list of lists
                                of frame numbers. Negative numbers count from the end. An empty list: no context frames
    small_frames                version 3: channels of the small frames that an upscaler's layers see
    shared_noise                version 4: "true" for an upscaler's layers that use one noise for all frames

The version depends on what the layers need:
    1       none of the following
    2       context frames. Adds `context_downsampler.steps.N`, and `fps_token.embed` if the layers get the frame rate
    3       small frames. Adds `context_downsampler.steps.N`
    4       shared noise, with or without small frames

Other entries of the metadata are kept unchanged.
"""

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor, nn

from ..atomic import StrPath, write_atomically
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
from ..layers import BrickParams, ResBlockParams, TransformerParams
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
LARGEST = 1_000_000     # the largest number that metadata may hold
EXTRAS = ("context_downsampler.", "fps_token.")     # modules that belong to the whole set and not to a site
KEY = re.compile(r"(?:(?P<part>input|output)_blocks\.(?P<index>\d+)\.(?P<sub>[01])|middle_block\.(?P<mid>[012]))"
                 r"(?:\.transformer_blocks\.(?P<block>\d+))?\.(?P<suffix>time_(?:stack|pos_embed|mixer)\..+)")


def detect(keys: Keys, metadata: Mapping[str, str]) -> Identified | None:
    """Recognise a file by its metadata."""
    if metadata.get("format") == FORMAT:
        return Identified("video_ldm", TITLE, "Load it with Load Temporal Layers.", takes="temporal")
    return None


# Sites and names

def module_name(site: Site) -> str:
    """The name of the spatial module that a layer follows, as in the file."""
    middle = site.part == "middle"
    block = "middle_block" if middle else f"{site.part}_blocks.{site.index}"
    if site.slot == "post_res":
        return f"{block}.{2 * site.n if middle else 0}"
    return f"{block}.1" + (f".transformer_blocks.{site.n}" if site.n else "")


def parse(key: str) -> tuple[Site, str] | None:
    """(site, suffix) of a temporal key. None for other keys."""
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


def stack_keys(keys: Iterable[str]) -> dict[str, str]:
    """{stack key: file key} of the temporal tensors in a file."""
    keys = list(keys)
    parsed = {key: parse(key) for key in keys}
    names = {f"layers.{parts[0].name}.{parts[1]}": key for key, parts in parsed.items() if parts}
    return names | {key: key for key in keys if key.startswith(EXTRAS)}


def bricks_of(shapes: Mapping[str, tuple], heads: Mapping[str, int]) -> tuple[tuple[Site, BrickParams], ...]:
    """The params of the layers, from the shapes of their tensors.

    heads: {module name: heads} of the transformers. Raises KeyError with the entry that a layer lacks.
    """
    layers: defaultdict[Site, dict[str, tuple]] = defaultdict(dict)
    for key, shape in shapes.items():
        if parts := parse(key):
            layers[parts[0]][parts[1]] = shape
    bricks: list[tuple[Site, BrickParams]] = []
    for site in sorted(layers, key=run_order):
        layer = layers[site]
        mix_length = layer["time_mixer.mix_factor"][0]
        if site.slot == "post_res":
            channels, emb_dim = layer["time_stack.emb_layers.1.weight"]
            context_channels = layer["time_stack.in_layers.2.weight"][1] - channels
            bricks.append((site, ResBlockParams(channels, emb_dim, mix_length, context_channels)))
        else:
            channels, context_dim = layer["time_stack.0.attn2.to_k.weight"]
            module = module_name(site)
            if module not in heads:
                raise KeyError(f"number of heads of {module}")
            bricks.append((site, TransformerParams(channels, heads[module], context_dim, mix_length)))
    return tuple(bricks)


# Reading

def load(file: TensorFile, found: Identified | None = None) -> TemporalFile:
    """Load a file with this format's metadata. Raises VideoLDMError if it is damaged."""
    metadata = file.metadata
    check_metadata(file)
    surplus = [key for key in file.shapes if parse(key) is None and not key.startswith(EXTRAS)]
    if surplus:
        raise contradiction(file.name, f"{surplus[0]} is no temporal layer's")
    params = rebuild(file)
    names = stack_keys(file.shapes)
    if len(names) < len(file.shapes):
        lost = next(key for key in file.shapes if key not in names.values())
        raise contradiction(file.name, f"{lost} is the same tensor as another")
    stored = file.read(names.values())
    tensors = {key: stored[name] for key, name in names.items()}
    require_complete(file.name, TITLE, params, tensors)
    require_one_dtype(file.name, tensors)
    return TemporalFile(
        file.name, "video_ldm", TITLE, params, tensors, schedule_of(metadata),
        Base(metadata["base_family"], optional_whole(metadata, "base_context_dim")), fps=fps_of(metadata),
        licence=metadata.get("licence", ""), metadata=dict(metadata),
        notes=notes_of(params))


def check_metadata(file: TensorFile) -> None:
    """Raise VideoLDMError for another version, a missing entry or an unknown position encoding."""
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
    """The params, from shapes and metadata. Raises VideoLDMError if the two contradict each other."""
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
        channels, due = getattr(brick, "context_channels", 0), context.channels if context else 0
        if isinstance(brick, ResBlockParams) and channels != due:
            raise contradiction(name, f"{site.name} has {channels} channels of context, and the file's own input for "
                                      f"it gives {due}")
        length = getattr(brick, "mix_length", 1)
        if length != mix_length:
            raise contradiction(name, f"it says a mix of length {mix_length}, and {site.name} has {length}")
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
    """Whether the layers use one noise for all frames. Raises VideoLDMError if the version contradicts the entry."""
    version, stated = file.metadata["version"], file.metadata.get("shared_noise")
    if stated not in (None, "true") or (stated == "true") != (version == str(SHARED_NOISE_VERSION)):
        raise contradiction(file.name, f"it is version {version} and says shared noise {shown(repr(stated))}, and in "
                                       f"version {SHARED_NOISE_VERSION} alone that is 'true'")
    return stated == "true"


def context_of(file: TensorFile) -> tuple[ContextParams | SmallFramesParams | None, int]:
    """The input for context frames or small frames (None: no such input), and the width of the frame-rate token."""
    steps = {key: shape for key, shape in file.shapes.items()
             if re.fullmatch(r"context_downsampler\.steps\.\d+\.weight", key)}
    width = file.shapes.get("fps_token.embed.0.weight", (0,))[0]
    stated, small = file.metadata.get("context_positions"), file.metadata.get("small_frames")
    if not steps and stated is None and small is None:
        return None, width
    if not steps or (stated is None) == (small is None):
        raise contradiction(file.name, "its context frames lack " + ("their positions" if steps else "the downsampler"))
    first = steps.get("context_downsampler.steps.0.weight", ())
    if small is not None:
        if first[1:2] != (3,) or small != "3":
            raise contradiction(file.name, f"it says small frames of {shown(small)} channels, and its downsampler "
                                           f"takes {list(first)[1:2]}; both are 3")
        return SmallFramesParams(first[0], len(steps)), width
    try:
        frames = whole(file.metadata["frames"], "frames", 1, MOST_FRAMES, text=True)
        sets = list_of(parsed_json(stated or "", "context_positions"), "context_positions", LARGEST)
        positions = tuple(tuple(whole(number, "a known frame", -frames, frames - 1)
                                for number in list_of(numbers, "a set", frames)) for numbers in sets)
        channels, inputs = first[:2]
    except ValueError:
        raise contradiction(file.name, f"its context positions '{shown(stated)}' are no list of lists of the frame "
                                       "numbers of a clip, or the downsampler is incomplete") from None
    if not positions:
        raise contradiction(file.name, "it was trained for no set of context frames at all")
    return ContextParams(channels, inputs - 1, len(steps), positions), width


def contradiction(name: str, what: str) -> VideoLDMError:
    """The error for metadata and tensors that contradict each other. what: how they do."""
    return VideoLDMError(f"{name} is {TITLE} whose metadata and tensors contradict each other: {what}. The file was "
                         "changed after it was written: use the original.")


def schedule_of(metadata: Mapping[str, str]) -> Schedule:
    """The noise schedule in the metadata. Raises ValueError if it is not a known one."""
    kind, prediction = metadata["beta_schedule"], metadata.get("prediction") or None
    if kind not in ("linear", "sqrt_linear") or prediction not in (None, *PREDICTIONS):
        raise ValueError(f"noise schedule '{shown(kind)}' with prediction '{shown(prediction)}'")
    return Schedule(kind, *betas_of(metadata), prediction)


def optional_whole(metadata: Mapping[str, str], entry: str) -> int | None:
    """A whole number above 0 in the metadata. None: the entry is missing or empty."""
    return whole(metadata[entry], entry, 1, LARGEST, text=True) if metadata.get(entry) else None


def notes_of(params: StackParams) -> list[str]:
    """Sentences for the report."""
    notes = []
    if params.mix_length > 1:
        notes.append(f"The mix is a vector over time: these layers run clips of exactly {params.mix_length} frames.")
    if params.takes_small_frames:
        notes.append("Made for an upscaler, whose small frames they see: run them with Video Upscale.")
    if params.shared_noise:
        notes.append("Trained on one noise for all frames of a clip, which Video Upscale gives them.")
    if params.known_positions is not None:
        sets = [("none" if not positions else ", ".join(map(str, positions))) for positions in params.known_positions]
        notes.append(f"Takes context frames: {' | '.join(sets)} (numbers from 0, from the end where negative).")
    return notes + [change.note for change in params.spatial]


# Writing

def write(path: StrPath, layers: nn.Module | Mapping[str, Tensor], params: StackParams, *, schedule: Schedule,
          base: Base, fps: float | None = None, licence: str = "", metadata: Mapping[str, str] | None = None) -> None:
    """Write Video LDM layers to `path`, completely or not at all.

    Args:
        path: of the file.
        layers: a stack or its state dict.
        params: of the layers.
        schedule: the noise schedule that they were trained with.
        base: the image model that they were trained on.
        fps: frames per second of the clips that they make.
        licence: of the weights.
        metadata: further entries, text to text.

    Raises ValueError for layers that the format cannot hold, and for a further entry with one of the format's names.
    """
    tensors = layers.state_dict() if isinstance(layers, nn.Module) else layers
    require_complete(Path(path).name, TITLE, params, tensors)
    header = header_of(params, schedule, base, fps, licence)
    for entry, value in (metadata or {}).items():
        if entry in RESERVED:
            raise ValueError(f"metadata entry '{entry}' is the format's own: give it by its argument")
        header[entry] = str(value)
    # Each tensor is copied to memory of its own on the CPU. safetensors refuses shared or strided memory.
    named = {file_key(params, key): tensor.detach().to("cpu", copy=True).contiguous()
             for key, tensor in tensors.items()}
    write_atomically(path, lambda temporary: save_file(named, temporary, metadata=header))


def version_of(params: StackParams) -> int:
    """The version of the format that these layers need."""
    if params.shared_noise:
        return SHARED_NOISE_VERSION
    if params.takes_small_frames:
        return SMALL_FRAMES_VERSION
    return VERSION if params.context is None and not params.fps_width else CONTEXT_VERSION


def file_key(params: StackParams, key: str) -> str:
    """The file's key for a stack key."""
    if key.startswith(EXTRAS):
        return key
    _, name, suffix = key.split(".", 2)
    site = next(site for site, _ in params.bricks if site.name == name)
    return f"{module_name(site)}.{suffix}"


def header_of(params: StackParams, schedule: Schedule, base: Base, fps: float | None, licence: str) -> dict[str, str]:
    """The metadata of a file. Raises ValueError for layers that the format cannot hold. Args: as in `write`."""
    heads: dict[str, int] = {}
    mixes: set[int] = set()
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
        "format": FORMAT, "version": str(version_of(params)), "family": params.family,
        "layers": str(len(params.bricks)),
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
    if isinstance(params.context, SmallFramesParams):
        optional["small_frames"] = params.context.in_channels
    if params.shared_noise:
        optional["shared_noise"] = "true"
    header.update({entry: str(value) for entry, value in optional.items() if value is not None})
    return header


FAMILY = Family("Video LDM layers", "temporal", detect, load)
