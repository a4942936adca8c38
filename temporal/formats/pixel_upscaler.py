"""Video upscalers in pixel space: reading and writing their files (docs/formats.md#upscaler-in-pixel-space).

No such file has been published. These are trained with this pack, on folded details (temporal/upscaler.py). A file is a
safetensors file of a whole UNet, with LDM's keys after `model.diffusion_model.`. The metadata rebuilds the rest:

    format, version             other versions than VERSION are refused
    unet                        the arguments of UNetParams (nodes/host/network_params.py) as JSON
    linear_start, linear_end    the noise schedule, evenly spaced in sqrt(beta)
    prediction                  what the network predicts: eps, v or x0
    augmentation_start, augmentation_end        the noise schedule of the small frames
    most_noise                  the highest noise level of the small frames
    usual_noise                 the noise level to upscale with
    details                     the factor that scales the details to unit variance
    title, licence
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from ..atomic import StrPath, write_atomically
from ..errors import VideoLDMError
from .contents import first_line
from .files import TensorFile
from .metadata import betas_of, entries_of, number, parsed_json, shown, text_of, whole
from .temporal_file import PREDICTIONS, Identified, require_one_dtype, require_version
from .tensor_names import Keys

FORMAT = "video_ldm_upscaler"
VERSION = 1
TITLE = "a video upscaler in pixel space"
PREFIX = "model.diffusion_model."
NUMBERS = ("linear_start", "linear_end", "augmentation_start", "augmentation_end", "most_noise", "usual_noise",
           "details")
RESERVED = ("format", "version", "unet", "prediction", "title", "licence", *NUMBERS)


@dataclass(frozen=True)
class UpscalerParams:
    """The metadata of a file."""

    unet: dict[str, Any]            # the arguments of UNetParams
    linear_start: float             # the first and the last beta of the noise schedule
    linear_end: float
    prediction: str                 # eps, v or x0
    augmentation_start: float       # the same of the small frames
    augmentation_end: float
    most_noise: int                 # the highest noise level of the small frames
    usual_noise: int                # the noise level to upscale with
    details: float                  # the factor of the details
    title: str
    licence: str = ""


@dataclass
class UpscalerFile:
    """The content of a file."""

    name: str                                                   # the file's name
    params: UpscalerParams
    tensors: dict[str, Tensor]                                  # by the UNet's own names
    metadata: dict[str, str] = field(default_factory=dict)      # entries that are not the format's


def detect(keys: Keys, metadata: Mapping[str, str]) -> Identified | None:
    """Recognise a file by its metadata."""
    if metadata.get("format") == FORMAT:
        return Identified("pixel_upscaler", TITLE, "Load it with Load Video Model.", takes="video_model")
    return None


def load(file: TensorFile, found: Identified | None = None) -> UpscalerFile:
    """Load a file. Raises VideoLDMError if it is damaged."""
    require_version(file.name, TITLE, file.metadata, VERSION)
    try:
        params = parse_params(file.metadata)
    except (KeyError, ValueError) as error:
        raise damaged(file.name, f"its metadata cannot be read: {first_line(error)}") from None
    foreign = [key for key in file.raw_shapes if not key.startswith(PREFIX)]
    if foreign or not file.shapes:
        raise damaged(file.name, f"{foreign[0] if foreign else 'nothing'} is in it, where a UNet is due")
    tensors = file.read(file.shapes)
    require_one_dtype(file.name, tensors)
    notes = {key: value for key, value in file.metadata.items() if key not in RESERVED}
    return UpscalerFile(file.name, params, tensors, notes)


def damaged(name: str, what: str) -> VideoLDMError:
    """The error for a damaged file. what: what is wrong."""
    return VideoLDMError(f"{name} is {TITLE}, but damaged ({what}). Write or download it again.")


def parse_params(metadata: Mapping[str, str]) -> UpscalerParams:
    """The params in the metadata. Raises KeyError or ValueError if an entry is missing or wrong."""
    unet = {key: tuple(value) if isinstance(value, list) else value
            for key, value in entries_of(parsed_json(metadata["unet"], "unet"), "unet").items()}
    if metadata["prediction"] not in PREDICTIONS:
        raise ValueError(f"prediction '{shown(metadata['prediction'])}'")
    most, usual = (whole(metadata[entry], entry, 0, 10 ** 6, text=True) for entry in ("most_noise", "usual_noise"))
    if not usual <= most < 1000:
        raise ValueError(f"noise levels {usual} and {most}")
    return UpscalerParams(unet, *betas_of(metadata), metadata["prediction"],
                          *betas_of(metadata, "augmentation_start", "augmentation_end"), most, usual,
                          number(metadata["details"], "details", 0, 1e6, text=True),
                          text_of(metadata["title"], "title"), text_of(metadata.get("licence", ""), "licence"))


def write(path: StrPath, tensors: Mapping[str, Tensor], params: UpscalerParams,
          metadata: Mapping[str, str] | None = None) -> None:
    """Write a file, completely or not at all. `load` returns the same content, to the bit.

    Args:
        path: of the file.
        tensors: the UNet's, by its own names.
        params: of the upscaler.
        metadata: further entries, text to text.

    Raises ValueError for a further entry with one of the format's names.
    """
    metadata = metadata or {}
    clash = sorted(set(metadata) & set(RESERVED))
    if clash:
        raise ValueError(f"the metadata entry {clash[0]} belongs to the format")
    header = {"format": FORMAT, "version": str(VERSION), "unet": json.dumps(params.unet),
              "prediction": params.prediction, "title": params.title, "licence": params.licence,
              **{entry: repr(getattr(params, entry)) for entry in NUMBERS},
              **{key: str(value) for key, value in metadata.items()}}
    parse_params(header)
    stored = {PREFIX + key: tensor.detach().to("cpu", copy=True).contiguous() for key, tensor in tensors.items()}
    write_atomically(Path(path), lambda temporary: save_file(stored, temporary, metadata=header))
