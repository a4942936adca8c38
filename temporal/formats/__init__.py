"""Files of temporal layers: what a file is, told by its keys and shapes, and what is in it.

    identify(path) -> Identified            load_temporal(path) -> TemporalFile
    load_motion_lora(path) -> MotionLora    load_svd_initialisation(path, params) -> Initialisation
    video_ldm.write(path, layers, params, ...)

One file per family; others.py names everything that is refused.
"""

from typing import Mapping

from ..stack import StackParams
from . import animatediff, motion_lora, others, svd, video_ldm
from .files import TensorFile, open_file
from .keys import Keys
from .motion_lora import MotionLora
from .record import Base, Identified, SamplerHint, Schedule, TemporalFile
from .svd import Initialisation

__all__ = [
    "Base", "Identified", "Initialisation", "MotionLora", "SamplerHint", "Schedule", "TemporalFile", "identify",
    "identify_keys", "load_motion_lora", "load_svd_initialisation", "load_temporal", "video_ldm",
]


def identify_keys(shapes: Mapping[str, tuple], metadata: Mapping[str, str] | None = None) -> Identified:
    """What a file is, from the names and shapes of its tensors and its safetensors metadata."""
    keys, metadata = Keys(shapes), metadata or {}
    return (video_ldm.detect(keys, metadata) or motion_lora.detect(keys) or animatediff.detect(keys) or svd.detect(keys)
            or others.identify(keys, metadata))


def identify_file(file: TensorFile) -> Identified:
    return identify_keys(file.raw_shapes, file.metadata)


def identify(path) -> Identified:
    """What a file is; raises VideoLDMError where it cannot be opened as a model file at all."""
    return identify_file(open_file(path))


def load_temporal(path) -> TemporalFile:
    """Temporal layers for an image model; raises VideoLDMError, naming the file and its place, for anything else."""
    file = open_file(path)
    found = identify_file(file)
    if found.takes != "temporal":
        raise found.refusal(file.name)
    return video_ldm.load(file) if found.kind == "video_ldm" else animatediff.load(file, found.kind)


def load_motion_lora(path) -> MotionLora:
    """A Motion LoRA; raises VideoLDMError, naming the file and its place, for anything else."""
    file = open_file(path)
    found = identify_file(file)
    if found.takes != "motion_lora":
        raise found.refusal(file.name, wanted="a Motion LoRA")
    return motion_lora.load(file)


def load_svd_initialisation(path, params: StackParams) -> Initialisation:
    """Initial values from a Stable Video Diffusion checkpoint for layers that are to be trained; never for use as they
    are: `load_temporal` refuses such a file."""
    return svd.load_initialisation(open_file(path), params)
