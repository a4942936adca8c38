"""Video upscalers in pixel space (docs/formats.md#upscaler-in-pixel-space), a whole UNet: read and written.

No such file was ever published; these are trained with this pack, on details, folded (temporal/upscaler.py). A safetensors file with the UNet's LDM keys behind
`model.diffusion_model.`, and metadata that rebuilds everything:

    format, version             what this is; another version than VERSION is refused
    unet                        the network's sizes as JSON, in the words of nodes/host/models.py: UNetParams
    linear_start, linear_end, prediction                the noise schedule, even in sqrt(beta)
    augmentation_start, augmentation_end, most_noise    the same of the small frames, and the highest level
    usual_noise                 the noise level to upscale with
    details                     what the details are multiplied with before they are noised
    title, licence
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from ..atomic import write_atomically
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
    """What the metadata says; unet: the arguments of UNetParams."""

    unet: dict
    linear_start: float
    linear_end: float
    prediction: str
    augmentation_start: float
    augmentation_end: float
    most_noise: int
    usual_noise: int
    details: float
    title: str
    licence: str = ""


@dataclass
class UpscalerFile:
    """tensors: the UNet's, by its own names."""

    name: str
    params: UpscalerParams
    tensors: dict[str, Tensor]
    metadata: dict[str, str] = field(default_factory=dict)


def detect(keys: Keys, metadata: Mapping[str, str]) -> Identified | None:
    if metadata.get("format") == FORMAT:
        return Identified("pixel_upscaler", TITLE, "Load it with Load Video Model.", takes="video_model")
    return None


def load(file: TensorFile, found: Identified | None = None) -> UpscalerFile:
    """The content of an open file; raises VideoLDMError where its metadata cannot be read."""
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
    return VideoLDMError(f"{name} is {TITLE}, but damaged ({what}). Write or download it again.")


def parse_params(metadata: Mapping[str, str]) -> UpscalerParams:
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


def write(path, tensors: Mapping[str, Tensor], params: UpscalerParams, metadata: Mapping[str, str] = {}):
    """Write a file that `load` gives back to the bit; whole or not at all. tensors: the UNet's, by its own names."""
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
