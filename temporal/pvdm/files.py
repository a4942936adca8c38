"""Files of PVDM's two networks: reading those of its authors and of this pack, and writing (docs/formats.md#pvdm).

The sizes of a network are read off the shapes of its tensors. What no shape says stands in the metadata of own files:

    format, version         FORMATS, VERSION
    heads                   of the diffusion network's attentions
    plane_heads             of the autoencoder's transformers of the planes
    grid                    of the planes that a diffusion network was trained on: JSON [frames, rows, columns]
    prediction              what a diffusion network predicts: "eps" or "v". Missing: eps
    fps, title, licence     optional

Published files have none of these: they predict eps, their heads are known, their grid is that of the autoencoder,
their frame rate is not stated.
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, TypeVar

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ..atomic import StrPath, write_atomically
from ..errors import VideoLDMError
from ..formats.contents import first_line
from ..formats.files import TensorFile
from ..formats.metadata import fps_of, list_of, parsed_json, shown, text_of, whole
from ..formats.temporal_file import dtype_name, require_one_dtype, require_version
from ..layers.factory import Factory
from .autoencoder import Autoencoder, AutoencoderParams
from .planes import PlaneShape
from .sizes import LARGEST, autoencoder_params, unet_params
from .unet import PlaneUNet, UNetParams

AUTOENCODER, DIFFUSION = "pvdm_autoencoder", "pvdm_diffusion"       # the two kinds, as in Identified
TITLES = {AUTOENCODER: "a PVDM autoencoder", DIFFUSION: "a PVDM diffusion model"}
FORMATS = {AUTOENCODER: "video_ldm_pvdm_autoencoder", DIFFUSION: "video_ldm_pvdm_diffusion"}
VERSION = 1
PREFIX = "diffusion_model."     # in front of the names of a diffusion network
# A name that every network of the kind has. What stands in front of it stands in front of all its names.
ANCHORS = {AUTOENCODER: "xy_token", DIFFUSION: "time_embed.0.weight"}
TYPES = (torch.float32, torch.float16, torch.bfloat16)
# Numbers that every network of one size has. They are computed, and those of a file are compared.
COMPUTED = re.compile(r"(?:.*\.)?(?:inv_freqs|scales|coords|zeros)")
RESERVED = ("format", "version", "heads", "plane_heads", "grid", "prediction", "fps", "title", "licence")
PUBLISHED_LICENCE = "MIT, as the code of its authors says"

Params = TypeVar("Params", AutoencoderParams, UNetParams)


@dataclass(frozen=True)
class About:
    """What a file says about itself."""

    fps: float | None = None                # frames per second of its clips. None: not stated
    title: str = ""
    licence: str = ""
    grid: PlaneShape | None = None          # of a diffusion network's planes. None: that of its autoencoder


@dataclass
class PvdmFile(Generic[Params]):
    """The content of a file, ready for `network(params)` with these weights."""

    name: str                       # the file's name
    kind: str                       # AUTOENCODER or DIFFUSION
    params: Params
    tensors: dict[str, Tensor]      # weights by the network's own names, without what is computed
    about: About
    notes: list[str] = field(default_factory=list)      # sentences for the node's report

    @property
    def title(self) -> str:
        return TITLES[self.kind]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights."""
        return next(iter(self.tensors.values())).dtype

    @property
    def fps(self) -> float | None:
        return self.about.fps

    @property
    def licence(self) -> str:
        return self.about.licence

    def network(self, make: Factory) -> nn.Module:
        """The network with these weights. They are taken out of `tensors`, so that memory holds no second copy.

        make: makes its layers, on the device "meta".
        """
        network = built(self.kind, self.params, make)
        weights = {name: self.tensors.pop(name).to(make.dtype or torch.float32) for name in list(self.tensors)}
        missing, surplus = network.load_state_dict(weights, strict=False, assign=True)
        if surplus or not all(map(COMPUTED.fullmatch, missing)):
            raise ValueError(f"{self.name} was used up, or does not fit its network: {missing + surplus}")
        return network.requires_grad_(False).eval()


AutoencoderFile = PvdmFile[AutoencoderParams]
DiffusionFile = PvdmFile[UNetParams]


def built(kind: str, params: AutoencoderParams | UNetParams, make: Factory) -> nn.Module:
    """A network without its weights."""
    return Autoencoder(params, make) if isinstance(params, AutoencoderParams) else PlaneUNet(params, make)


# Reading

def load(file: TensorFile, kind: str) -> PvdmFile:
    """Load a file of this kind. Raises VideoLDMError if it is not exactly one network of it."""
    names, notes = names_of(file, kind)
    shapes = {name: file.shapes[key] for name, key in names.items()}
    own = file.metadata if file.metadata.get("format") == FORMATS[kind] else {}
    try:
        about = about_of(file, kind, own)
        params = autoencoder_params(shapes, own) if kind == AUTOENCODER else unet_params(shapes, own)
        wanted = shapes_of(kind, params)
    except KeyError as error:
        raise incomplete(file.name, kind, str(error.args[0])) from None
    except (ValueError, IndexError, RuntimeError, TypeError, ArithmeticError) as error:
        if isinstance(error, VideoLDMError):
            raise
        raise VideoLDMError(f"{file.name} looks like {TITLES[kind]}, but no such network has its sizes "
                            f"({first_line(error)}). The file is damaged or from a variant that this pack does not "
                            "know.") from None
    require_exact(file.name, kind, shapes, wanted)
    found = file.read(names.values())
    tensors = {name: found.pop(key) for name, key in names.items()}
    require_one_type(file.name, tensors)
    require_computed(file.name, kind, params, tensors)
    return PvdmFile(file.name, kind, params, tensors, about, [*notes, *notes_beside(file)])


def names_of(file: TensorFile, kind: str) -> tuple[dict[str, str], list[str]]:
    """{the network's name: the file's key}, and sentences for the report.

    Of a file with averaged weights (EMA) beside the plain ones, the averaged are taken.
    """
    anchor = ANCHORS[kind]
    prefixes = [key[:-len(anchor)] for key in file.shapes if key == anchor or key.endswith(f".{anchor}")]
    if not prefixes:
        raise incomplete(file.name, kind, anchor)
    averaged = [prefix for prefix in prefixes if "ema" in re.split(r"[._]", prefix.lower())]
    if len(prefixes) > 1 and len(averaged) != 1:
        raise VideoLDMError(f"{file.name} looks like {TITLES[kind]}, but holds {len(prefixes)} of them (behind "
                            f"{' and '.join(shown(prefix or 'no prefix') for prefix in prefixes[:2])}). Use a file "
                            "with one.")
    chosen = averaged[0] if averaged else prefixes[0]
    others = tuple(prefix for prefix in prefixes if prefix != chosen)
    names = {key[len(chosen):]: key for key in file.shapes
             if key.startswith(chosen) and not (chosen == "" and others and key.startswith(others))}
    foreign = next((key for key in file.shapes if not key.startswith((chosen, *others))), None)
    if foreign is not None:
        raise surplus_tensor(file.name, kind, foreign)
    notes = ["The file holds averaged weights (EMA) beside the plain ones. The averaged are used."] if others else []
    return names, notes


def notes_beside(file: TensorFile) -> list[str]:
    """A sentence if the averaged weights lie beside a file of the plain ones, as the authors' training writes them."""
    other = file.path.with_name(f"ema_{file.path.name}")
    if file.path.name.startswith("model_") and other.is_file():
        return [f"{other.name} lies beside it. It holds the averaged weights (EMA), which make better videos: choose "
                "that file."]
    return []


def about_of(file: TensorFile, kind: str, metadata: Mapping[str, str]) -> About:
    """What the metadata of an own file say. A published file has none. Raises ValueError for wrong entries."""
    if not metadata:
        return About(licence=PUBLISHED_LICENCE)
    require_version(file.name, f"{TITLES[kind]} written by this pack", metadata, VERSION)
    grid = None
    if kind == DIFFUSION:
        if "grid" not in metadata:
            raise ValueError("its metadata lack the grid of its planes")
        sides = list_of(parsed_json(metadata["grid"], "grid"), "grid", 3, 3)
        grid = PlaneShape(*(whole(side, "grid", 1, LARGEST) for side in sides))
    return About(fps_of(metadata), text_of(metadata.get("title", ""), "title"),
                 text_of(metadata.get("licence", ""), "licence"), grid)


def shapes_of(kind: str, params: AutoencoderParams | UNetParams) -> dict[str, tuple]:
    """{name: shape} of all tensors of a network."""
    with torch.device("meta"):
        network = built(kind, params, Factory(device="meta"))
    return {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}


# What is refused

def incomplete(name: str, kind: str, missing: str) -> VideoLDMError:
    return VideoLDMError(f"{name} looks like {TITLES[kind]}, but lacks {shown(missing, 120)}. The file is incomplete: "
                         "download or write it again.")


def surplus_tensor(name: str, kind: str, key: str) -> VideoLDMError:
    return VideoLDMError(f"{name} looks like {TITLES[kind]}, but holds {shown(key, 120)}, which such a network does "
                         "not have. It comes from a variant that this pack does not know.")


def require_exact(name: str, kind: str, shapes: Mapping[str, tuple], wanted: Mapping[str, tuple]) -> None:
    """Raise VideoLDMError unless the tensors are exactly those of the network, in name and shape."""
    missing = next((key for key in wanted if key not in shapes), None)
    if missing is not None:
        raise incomplete(name, kind, missing)
    surplus = next((key for key in shapes if key not in wanted), None)
    if surplus is not None:
        raise surplus_tensor(name, kind, surplus)
    for key, shape in wanted.items():
        if tuple(shapes[key]) != shape:
            raise VideoLDMError(f"{name} looks like {TITLES[kind]}, but {key} has shape {list(shapes[key])} where "
                                f"{list(shape)} is due. The file is damaged or from a variant that this pack does not "
                                "know.")


def require_one_type(name: str, tensors: Mapping[str, Tensor]) -> None:
    """Raise VideoLDMError for weights of two dtypes, and for a dtype that is none of TYPES."""
    for key, tensor in tensors.items():
        if tensor.dtype not in TYPES:
            raise VideoLDMError(f"{name} holds {key} as {dtype_name(tensor.dtype)}, and weights of PVDM are float32, "
                                "float16 or bfloat16. Convert the file from its original, or download it again.")
    weights = {key: tensor for key, tensor in tensors.items() if not COMPUTED.fullmatch(key)}
    require_one_dtype(name, weights, kind=lambda key: "weight")


def require_computed(name: str, kind: str, params: AutoencoderParams | UNetParams, tensors: dict[str, Tensor]) -> None:
    """Take the numbers out that are computed. Raises VideoLDMError where the file has others."""
    network = built(kind, params, Factory(device="meta"))       # on the CPU are only the computed ones
    for key, due in network.state_dict().items():
        if not COMPUTED.fullmatch(key):
            continue
        stored = tensors.pop(key)
        rounding = torch.finfo(stored.dtype).eps if stored.dtype != torch.float32 else 1e-6
        if not torch.allclose(stored.float(), due.float(), rtol=2 * rounding, atol=1e-6):
            raise VideoLDMError(f"{name} looks like {TITLES[kind]}, but {key} does not hold the numbers that every "
                                "such network has. It is damaged or from a variant that this pack does not know.")


# Two files that belong together

def check_pair(autoencoder: AutoencoderFile, diffusion: DiffusionFile) -> None:
    """Raise VideoLDMError for a diffusion network that was trained on the planes of another autoencoder."""
    planes, grid, network = autoencoder.params.plane_channels, autoencoder.params.shape, diffusion.params
    trained = diffusion.about.grid
    if network.channels != planes:
        wrong = f"planes of {network.channels} channels, and those of {autoencoder.name} have {planes}"
    elif trained is not None and trained != grid:
        wrong = f"planes of {trained}, and those of {autoencoder.name} have {grid}"
    elif network.conditional and network.row != grid.length:
        wrong = f"planes of {network.row} positions, and those of {autoencoder.name} have {grid.length}"
    elif any(side % 2 ** (len(network.channel_mult) - 1) for side in (grid.t, grid.h, grid.w)):
        wrong = (f"planes that it can halve {len(network.channel_mult) - 1} times, and those of {autoencoder.name} "
                 f"have {grid}")
    else:
        return
    raise VideoLDMError(f"{diffusion.name} diffuses {wrong}. The two files belong to different models: choose the "
                        "autoencoder that the diffusion model was trained with.")


# Writing

def write_autoencoder(path: StrPath, tensors: Mapping[str, Tensor], params: AutoencoderParams, about: About,
                      metadata: Mapping[str, str] | None = None) -> None:
    """Write an autoencoder, completely or not at all. `load` returns the same content, to the bit.

    Args:
        path: of the file.
        tensors: the state dict of an Autoencoder.
        params: of the Autoencoder.
        about: what the file says about itself.
        metadata: further entries, text to text.

    Raises ValueError for tensors that do not fit, and for a further entry with one of the format's names.
    """
    write(path, AUTOENCODER, tensors, params, about, {"plane_heads": str(params.plane_heads)}, metadata or {})


def write_diffusion(path: StrPath, tensors: Mapping[str, Tensor], params: UNetParams, about: About,
                    metadata: Mapping[str, str] | None = None) -> None:
    """Write a diffusion network, likewise. `about` must hold the grid of the planes that it was trained on."""
    if about.grid is None:
        raise ValueError("a diffusion network's file needs the grid of its planes")
    if params.conditional and about.grid.length != params.row:
        raise ValueError(f"the network has rows of {params.row} positions, and the grid {about.grid.length}")
    sizes = {"heads": str(params.heads), "grid": json.dumps([about.grid.t, about.grid.h, about.grid.w]),
             "prediction": params.prediction}
    write(path, DIFFUSION, tensors, params, about, sizes, metadata or {})


def write(path: StrPath, kind: str, tensors: Mapping[str, Tensor], params: AutoencoderParams | UNetParams,
          about: About, sizes: Mapping[str, str], metadata: Mapping[str, str]) -> None:
    """Write either kind.

    Args:
        path: of the file.
        kind: AUTOENCODER or DIFFUSION.
        tensors: the network's state dict.
        params: of the network.
        about: what the file says about itself.
        sizes: the entries of the metadata that hold sizes.
        metadata: further entries.
    """
    clash = sorted(set(metadata) & set(RESERVED))
    if clash:
        raise ValueError(f"the metadata entry {clash[0]} belongs to the format")
    shapes, wanted = {name: tuple(tensor.shape) for name, tensor in tensors.items()}, shapes_of(kind, params)
    if shapes != wanted:
        raise ValueError(f"tensors and params disagree, first at {sorted(shapes.items() ^ wanted.items())[0][0]}")
    facts = {"fps": f"{about.fps:.10g}" if about.fps else "", "title": about.title, "licence": about.licence}
    header = {"format": FORMATS[kind], "version": str(VERSION), **sizes,
              **{entry: text for entry, text in facts.items() if text},
              **{key: str(value) for key, value in metadata.items()}}
    prefix = PREFIX if kind == DIFFUSION else ""
    stored = {prefix + name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
    write_atomically(Path(path), lambda temporary: save_file(stored, temporary, metadata=header))


# Detection

def kind_of(has: Callable[[str], bool], metadata: Mapping[str, str]) -> str | None:
    """The kind of a file, by its metadata or by names that no other network has. None: it is neither.

    has: whether a pattern matches one of the file's names.
    """
    own = metadata.get("format", "")
    if own.startswith("video_ldm"):
        return next((kind for kind, form in FORMATS.items() if form == own), None)
    if has(r"(?:.*\.)?input_attns\.\d+\.qkv\.weight"):
        return DIFFUSION
    return AUTOENCODER if has(r"(?:.*\.)?(?:xy|yt|xt)_quant_attn\.") else None
