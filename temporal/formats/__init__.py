"""Files of temporal layers: what a file is, told by its keys and shapes, and what is in it.

    identify(path) -> Identified            load_temporal(path) -> TemporalFile
    load_motion_lora(path) -> MotionLora    load_svd_initialisation(path, params) -> Initialisation
    load_decoder(path) -> DecoderFile       load_layout(path) -> LayoutFile
    load_upscaler(path) -> UpscalerFile
    video_ldm.write(path, layers, params, ...)          decoder.write(path, tensors, params, ...)

One file per family; others.py names everything that is refused.
"""

from pathlib import Path
from typing import Mapping

from ..errors import VideoLDMError
from ..stack import StackParams
from . import animatediff, decoder, layout, motion_lora, others, svd, upscaler, video_ldm, vsr
from .decoder import DecoderFile
from .files import SAFETENSORS, TensorFile, open_file
from .keys import Keys
from .layout import LayoutFile
from .motion_lora import MotionLora
from .record import Base, Identified, NoiseLevels, SamplerHint, Schedule, TemporalFile
from .svd import Initialisation
from .upscaler import UpscalerFile

__all__ = [
    "Base", "DecoderFile", "Identified", "Initialisation", "LayoutFile", "MotionLora", "NoiseLevels", "SamplerHint",
    "Schedule", "TemporalFile", "UpscalerFile", "decoder", "identify", "identify_keys", "layout", "load_decoder",
    "load_layout", "load_motion_lora", "load_svd_initialisation", "load_temporal", "load_upscaler", "taken_by",
    "upscaler", "video_ldm",
]

# What each loader takes: its answer to a file of a kind that is not known.
LAYERS_TAKEN = ("Load Temporal Layers takes Video LDM layers, AnimateDiff v1, v2, v3, AnimateLCM and LongAnimateDiff "
                "motion modules for Stable Diffusion 1.x, and LaVie's video super-resolution and Upscale-A-Video's "
                "UNet for the Stable Diffusion x4 upscaler.")
LORAS_TAKEN = ("The Motion LoRA node takes LoRA files for AnimateDiff motion modules, as AnimateDiff publishes them or "
               "in diffusers' naming.")
DECODERS_TAKEN = ("Load Temporal Decoder takes svd.safetensors or svd_xt.safetensors, the VAE of one of them, or a "
                  "decoder trained with this pack.")
MODELS_TAKEN = ("Load Video Model takes upscalers in pixel space that were trained with this pack, such as the bundled "
                "video_ldm_driving_upscaler.safetensors.")
LAYOUTS_TAKEN = ("Scene Layout takes layout files that were trained with this pack, such as the bundled "
                 "video_ldm_driving_layout.safetensors.")


def identify_keys(shapes: Mapping[str, tuple], metadata: Mapping[str, str] | None = None) -> Identified:
    """What a file is, from the names and shapes of its tensors and its safetensors metadata."""
    keys, metadata = Keys(shapes), metadata or {}
    return (video_ldm.detect(keys, metadata) or layout.detect(keys, metadata) or upscaler.detect(keys, metadata)
            or motion_lora.detect(keys) or animatediff.detect(keys) or vsr.detect(keys) or svd.detect(keys)
            or decoder.detect(keys, metadata)
            or others.identify(keys, metadata))


def identify_file(file: TensorFile) -> Identified:
    return identify_keys(file.raw_shapes, file.metadata)


def identify(path) -> Identified:
    """What a file is; raises VideoLDMError where it cannot be opened as a model file at all."""
    return identify_file(open_file(path))


def taken_by(path) -> frozenset[str] | None:
    """What the loaders of this pack find in a file, in the words of `Identified.takes`; None where only reading all of
    it would tell, as with torch files. Looks at the file's header alone; raises VideoLDMError where it has none."""
    if Path(path).suffix.lower() not in SAFETENSORS:
        return None
    file = open_file(path)
    found = [identify_file(file), decoder.detect(Keys(file.raw_shapes), file.metadata)]
    return frozenset(one.takes for one in found if one and one.takes)


def load_temporal(path) -> TemporalFile:
    """Temporal layers for an image model; raises VideoLDMError, naming the file and its place, for anything else."""
    file = open_file(path)
    found = identify_file(file)
    if found.takes != "temporal":
        raise found.refusal(file.name, taken=LAYERS_TAKEN)
    if found.kind == "video_ldm":
        return video_ldm.load(file)
    return vsr.load(file, found.kind) if found.kind in vsr.VERSIONS else animatediff.load(file, found.kind)


def load_motion_lora(path) -> MotionLora:
    """A Motion LoRA; raises VideoLDMError, naming the file and its place, for anything else."""
    file = open_file(path)
    found = identify_file(file)
    if found.takes != "motion_lora":
        raise found.refusal(file.name, wanted="a Motion LoRA", taken=LORAS_TAKEN)
    return motion_lora.load(file)


def load_decoder(path) -> DecoderFile:
    """A temporal decoder, alone or within a whole checkpoint; raises VideoLDMError, naming the file, for anything else."""
    file = open_file(path)
    found = decoder.detect(Keys(file.raw_shapes), file.metadata)
    if found is not None:
        return decoder.load(file, found)
    other = identify_file(file)
    if decoder.prefix_of(file.shapes) is not None and other.kind in ("svd_unet", "sv3d", "vae", "diffusers_vae"):
        raise VideoLDMError(f"{file.name} is {other.title} with an image decoder: it has no temporal layers. Choose "
                            "svd.safetensors or svd_xt.safetensors, the VAE of one of them, or a decoder trained with "
                            "this pack.")
    raise other.refusal(file.name, wanted="a temporal decoder", taken=DECODERS_TAKEN)


def load_layout(path) -> LayoutFile:
    """A scene layout's conditioner; raises VideoLDMError, naming the file, for anything else."""
    file = open_file(path)
    found = layout.detect(Keys(file.raw_shapes), file.metadata)
    if found is None:
        raise identify_file(file).refusal(file.name, wanted=layout.TITLE, taken=LAYOUTS_TAKEN)
    return layout.load(file)


def load_upscaler(path) -> UpscalerFile:
    """An upscaler in pixel space; raises VideoLDMError, naming the file and its place, for anything else."""
    file = open_file(path)
    found = identify_file(file)
    if found.kind != "pixel_upscaler":
        raise found.refusal(file.name, wanted="a whole video model that this pack takes", taken=MODELS_TAKEN)
    return upscaler.load(file)


def load_svd_initialisation(path, params: StackParams) -> Initialisation:
    """Initial values from a Stable Video Diffusion checkpoint for layers that are to be trained; never for use as they
    are: `load_temporal` refuses such a file."""
    return svd.load_initialisation(open_file(path), params)
