"""Whole video networks that were trained with this pack: their files (docs/formats.md#video-networks-of-this-pack).

A safetensors file holds the UNet under LDM's names after `model.diffusion_model.`, and the temporal layers under the
keys of TemporalStack after `temporal.`. The sizes of the UNet follow from its weights. The metadata rebuilds the rest:

    format, version         other versions than VERSION are refused
    title, family, licence  texts; the family is the layers' name in sentences
    base                    the image model it began as: a key of TEXTS. Its text encoder and its VAE belong to the file
    heads                   of the spatial transformers: {"count": 8} or {"width": 64}
    latents                 LatentParams. Missing for those of Stable Diffusion
    bricks                  the layers: [{"site": [part, index, slot, n], "kind": a key of BRICKS, its fields...}, ...]
    spatial                 changes of the spatial network, keys of SPATIAL
    input_frames            InputFramesParams. Missing where the network's input has no further channels
    frames, positions, fps, fps_width       as in StackParams and TemporalFile
    beta_schedule, linear_start, linear_end, prediction     the noise schedule
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

from safetensors.torch import save_file
from torch import Tensor

from ..atomic import StrPath, write_atomically
from ..errors import VideoLDMError
from ..formats.contents import first_line
from ..formats.files import TensorFile
from ..formats.latents import LatentParams, read_latents
from ..formats.metadata import (
    MOST_FRAMES,
    MetadataError,
    entries_of,
    fps_of,
    list_of,
    number,
    parsed_json,
    shown,
    text_of,
    whole,
)
from ..formats.temporal_file import (
    DEMO,
    Base,
    Identified,
    Schedule,
    TemporalFile,
    require_complete,
    require_one_dtype,
    require_version,
)
from ..formats.tensor_names import Keys
from ..formats.video_network import CLIP_L, OPENCLIP_H, Heads, TextEncoder, VideoNetwork
from ..layers import (
    BrickParams,
    ClipTransformerParams,
    FrameAttentionParams,
    MotionParams,
    ResBlockParams,
    RotaryParams,
    StagedConvParams,
    TransformerParams,
)
from ..params import COPIES, GREY, MASK_FIRST, MASK_LAST, ZEROS, InputFramesParams, StackParams
from ..slots import SLOTS, Site
from ..spatial_changes import POOLED_NORMS, SPARSE_CAUSAL, SpatialChange
from ..unet import PARTS
from .family import LOADERS, Family
from .video_ldm import schedule_of

FORMAT = "video_ldm_network"
VERSION = 1
TITLE = "a video network trained with this pack"
UNET, LAYERS = "model.diffusion_model.", "temporal."
LARGEST = 1 << 20
PREDICTIONS = ("eps", "v")
BRICKS: dict[str, Any] = {kind.__name__: kind for kind in (
    ResBlockParams, TransformerParams, RotaryParams, FrameAttentionParams, MotionParams, StagedConvParams,
    ClipTransformerParams)}
SPATIAL: dict[str, SpatialChange] = {"pooled norms": POOLED_NORMS, "sparse-causal attention": SPARSE_CAUSAL}
TEXTS = {DEMO: TextEncoder("the demo's", "the CLIP of Load Demo Models", 128), "Stable Diffusion 1.x": CLIP_L,
         "Stable Diffusion 2.x": OPENCLIP_H}
DUE = ("format", "version", "title", "family", "base", "heads", "bricks", "spatial", "frames", "beta_schedule",
       "linear_start", "linear_end", "prediction")


@dataclass(frozen=True)
class NetworkParams:
    """Everything that rebuilds a network except its weights."""

    layers: StackParams
    schedule: Schedule                      # with its prediction
    base: str                               # a key of TEXTS
    heads: Heads
    title: str
    latents: LatentParams | None = None     # None: those of Stable Diffusion
    fps: float | None = None                # frames per second of its clips. None: not stated
    licence: str = ""


class Parts(NamedTuple):
    """The names of a file's tensors."""
    layers: dict[str, str]      # {stack key: file key}
    unet: dict[str, str]        # {LDM's name: file key}


# Reading

def detect(keys: Keys, metadata: Mapping[str, str]) -> Identified | None:
    """Recognise a file by its metadata."""
    if metadata.get("format") == FORMAT:
        return Identified("own_network", TITLE, f"Load it with {LOADERS['video_model']}.", "video_model",
                          not_alone="Its temporal layers were trained together with its spatial layers.")
    return None


def load(file: TensorFile, found: Identified | None = None) -> VideoNetwork:
    """Load a file. Raises VideoLDMError if it is damaged."""
    require_version(file.name, TITLE, file.metadata, VERSION)
    parts = Parts({key.removeprefix(LAYERS): key for key in file.shapes if key.startswith(LAYERS)},
                  {key: key for key in file.shapes if not key.startswith(LAYERS)})
    try:
        params = read_params(file.metadata)
    except (MetadataError, ValueError) as error:
        raise VideoLDMError(f"{file.name} is {TITLE} whose metadata cannot be read ({first_line(error)}). Write it "
                            "again with this pack.") from None
    stored = file.read(parts.layers.values())
    tensors = {key: stored[name] for key, name in parts.layers.items()}
    require_complete(file.name, TITLE, params.layers, tensors)
    require_one_dtype(file.name, tensors)
    text = TEXTS[params.base]
    layers = TemporalFile(file.name, "own_network", TITLE, params.layers, tensors, params.schedule,
                          Base(params.base, text.width), params.fps, params.licence, dict(file.metadata),
                          [f"Title: {params.title}.", *(change.note for change in params.layers.spatial)])
    return VideoNetwork(layers, file, parts.unet, params.heads, text, params.latents)


def read_params(metadata: Mapping[str, str]) -> NetworkParams:
    """The params in the metadata. Raises MetadataError or ValueError if an entry is missing or wrong."""
    entries_of({entry: metadata[entry] for entry in DUE if entry in metadata}, "its metadata", DUE)
    title, family, licence = (text_of(metadata.get(entry, ""), entry) for entry in ("title", "family", "licence"))
    base, schedule = metadata["base"], schedule_of(metadata)
    if base not in TEXTS:
        raise MetadataError(f"base is {shown(base)}, where one of {', '.join(TEXTS)} is due")
    if schedule.prediction not in PREDICTIONS:
        raise MetadataError(f"prediction is {shown(schedule.prediction)}, where {' or '.join(PREDICTIONS)} is due")
    frames = whole(metadata["frames"], "frames", 1, MOST_FRAMES, text=True)
    positions, fps_width = (whole(metadata.get(entry, "0"), entry, 0, LARGEST, text=True)
                            for entry in ("positions", "fps_width"))
    bricks = read_bricks(parsed_json(metadata["bricks"], "bricks"))
    names = list_of(parsed_json(metadata["spatial"], "spatial"), "spatial", len(SPATIAL))
    spatial = tuple(SPATIAL[one_of(name, "spatial", tuple(SPATIAL))] for name in names)
    input_frames = read_input_frames(parsed_json(metadata["input_frames"], "input_frames"), frames) \
        if "input_frames" in metadata else None
    layers = StackParams(family, bricks, frames, positions or None, spatial, None, fps_width, input_frames=input_frames)
    heads = entries_of(parsed_json(metadata["heads"], "heads"), "heads", allowed=("count", "width"))
    if len(heads) != 1 or not set(heads) <= {"count", "width"}:
        raise MetadataError(f"heads is {shown(heads)}, where a count or a width is due")
    sizes = {entry: whole(value, f"heads' {entry}", 1, LARGEST) for entry, value in heads.items()}
    latents = read_latents(parsed_json(metadata["latents"], "latents"), 4) if "latents" in metadata else None
    return NetworkParams(layers, schedule, base, Heads(**sizes), title, latents, fps_of(metadata), licence)


def read_bricks(stored: Any) -> tuple[tuple[Site, BrickParams], ...]:
    """The layers. Only the classes in BRICKS can be named, and only their fields, which are whole numbers or flags."""
    found: dict[Site, BrickParams] = {}
    for entry in list_of(stored, "bricks", LARGEST, 1):
        entry = entries_of(entry, "a layer")
        kind = BRICKS[one_of(entry.get("kind"), "a layer's kind", tuple(BRICKS))]
        entries_of(entry, "a layer", ("site", "kind", *(field.name for field in fields(kind))))
        part, index, slot, n = list_of(entry["site"], "a site", 4, 4)
        site = Site(one_of(part, "a site's part", PARTS), whole(index, "a site's number", 0, LARGEST),
                    one_of(slot, "a site's slot", tuple(SLOTS)), whole(n, "a site's last number", 0, LARGEST))
        if site in found:
            raise MetadataError(f"bricks has two layers at {site.name}")
        found[site] = kind(**{field.name: size_of(entry[field.name], field.name, field.type) for field in fields(kind)})
    return tuple(found.items())


def read_input_frames(stored: Any, frames: int) -> InputFramesParams:
    """The network's input for known frames. frames: of a clip."""
    entries = entries_of(stored, "input_frames", tuple(field.name for field in fields(InputFramesParams)))
    sets = entries["positions"]
    if sets is not None:
        sets = tuple(tuple(whole(position, "a known frame", -frames, frames - 1)
                           for position in list_of(known, "a set of known frames", frames))
                     for known in list_of(sets, "positions of known frames", LARGEST, 1))
    return InputFramesParams(one_of(entries["form"], "form", (MASK_FIRST, MASK_LAST, COPIES)),
                             number(entries["given"], "given", -1e6, 1e6),
                             one_of(entries["filler"], "filler", (GREY, ZEROS)),
                             whole(entries["latent_channels"], "latent_channels", 4, 4), sets)


def one_of(value: Any, what: str, due: tuple[str, ...]) -> str:
    """Check that a value is one of some texts, and return it."""
    if not isinstance(value, str) or value not in due:
        raise MetadataError(f"{what} is {shown(value)}, where one of {', '.join(due)} is due")
    return value


def size_of(value: Any, what: str, kind: Any) -> int | bool | None:
    """Check the value of a layer's field, and return it. kind: the field's type."""
    if kind is bool:
        if not isinstance(value, bool):
            raise MetadataError(f"{what} is {shown(value)}, where true or false is due")
        return value
    return None if value is None and kind == (int | None) else whole(value, what, 0, LARGEST)


# Writing

def write(path: StrPath, unet: Mapping[str, Tensor], layers: Mapping[str, Tensor], params: NetworkParams) -> None:
    """Write a network, completely or not at all.

    Args:
        path: of the file.
        unet: the UNet's weights, by LDM's names.
        layers: the temporal layers' weights, by the keys of TemporalStack.
        params: everything else.

    Raises ValueError for a network that the format cannot hold, and VideoLDMError for layers that do not fit it.
    """
    require_complete(Path(path).name, TITLE, params.layers, layers)
    header = header_of(params)
    if read_params(header) != params:
        raise ValueError("the format cannot hold this network: what is read back from its metadata differs")
    tensors = {UNET + key: tensor for key, tensor in unet.items()} | {LAYERS + key: t for key, t in layers.items()}
    named = {key: tensor.detach().to("cpu", copy=True).contiguous() for key, tensor in tensors.items()}
    write_atomically(path, lambda temporary: save_file(named, temporary, metadata=header))


def header_of(params: NetworkParams) -> dict[str, str]:
    """The metadata of a file. Raises ValueError for layers that the format cannot hold."""
    stack, schedule = params.layers, params.schedule
    foreign = [type(brick).__name__ for _, brick in stack.bricks if BRICKS.get(type(brick).__name__) is not type(brick)]
    changes = {change: name for name, change in SPATIAL.items()}
    if foreign or stack.context is not None or stack.shared_noise or set(stack.spatial) - set(changes):
        raise ValueError(f"the format holds {', '.join(BRICKS)} and known frames through the network's input, and "
                         "these layers have something else")
    bricks = [{"site": list(site), "kind": type(brick).__name__, **vars(brick)} for site, brick in stack.bricks]
    header = {
        "format": FORMAT, "version": str(VERSION), "title": params.title, "family": stack.family, "base": params.base,
        "heads": json.dumps({key: value for key, value in asdict(params.heads).items() if value is not None}),
        "bricks": json.dumps(bricks), "spatial": json.dumps([changes[change] for change in stack.spatial]),
        "frames": str(stack.frames), "beta_schedule": schedule.beta_schedule, "licence": params.licence,
        "linear_start": repr(float(schedule.linear_start)), "linear_end": repr(float(schedule.linear_end)),
        "prediction": schedule.prediction or "", "fps_width": str(stack.fps_width)}
    optional = {"positions": stack.positions, "fps": params.fps,
                "input_frames": stack.input_frames and json.dumps(asdict(stack.input_frames)),
                "latents": params.latents and json.dumps(asdict(params.latents))}
    return header | {entry: str(value) for entry, value in optional.items() if value is not None}


FAMILY = Family("video networks trained with this pack", "video_model", detect, load)
