"""Every kind of file that the pack takes, and what a file is.

    identify(path) -> Identified            load_temporal(path) -> TemporalFile
    load_motion_lora(path) -> MotionLora    load_svd_initialisation(path, params) -> Initialisation
    load_decoder(path) -> DecoderFile       load_layout(path) -> LayoutFile
    load_upscaler(path) -> UpscalerFile

A new family of temporal layers is one file here and one entry in FAMILIES. Node texts, refusals and the sentence for
unknown files are made from that list. refused.py names every other file.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import VideoLDMError
from ..formats import decoder, motion_lora, pixel_upscaler, scene_layout
from ..formats.decoder import DecoderFile
from ..formats.files import TensorFile, open_file
from ..formats.motion_lora import MotionLora
from ..formats.pixel_upscaler import UpscalerFile
from ..formats.safetensors_files import ENDINGS
from ..formats.scene_layout import LayoutFile
from ..formats.temporal_file import Identified, TemporalFile
from ..formats.tensor_names import Keys
from ..params import StackParams
from . import animatediff, hotshot_xl, refused, svd, video_ldm, video_super_resolution
from .family import LOADERS, Family
from .svd import Initialisation

# In the order of detection: the first that knows a file takes it.
FAMILIES: tuple[Family, ...] = (
    video_ldm.FAMILY,
    Family("scene layout files written by this pack", "layout", scene_layout.detect, scene_layout.load),
    Family("video upscalers in pixel space, written by this pack", "video_model", pixel_upscaler.detect,
           pixel_upscaler.load),
    Family("Motion LoRA for AnimateDiff, in AnimateDiff's names or diffusers'", "motion_lora", motion_lora.detect,
           motion_lora.load),
    hotshot_xl.FAMILY,
    animatediff.FAMILY,
    video_super_resolution.FAMILY,
    svd.FAMILY,
    Family("temporal decoders: Stable Video Diffusion's (svd.safetensors, svd_xt.safetensors, or their VAE) and those "
           "written by this pack", "decoder", decoder.detect, decoder.load),
)


def listing(takes: str) -> str:
    """What a node that loads files takes, in words: "A; B; C"."""
    return "; ".join(family.listed for family in FAMILIES if family.takes == takes)


def identify_keys(shapes: Mapping[str, tuple], metadata: Mapping[str, str] | None = None) -> Identified:
    """What a file is, from the names and shapes of its tensors and its safetensors metadata."""
    return find(Keys(shapes), metadata or {})[1]


def identify(path) -> Identified:
    """What a file is; raises VideoLDMError where it cannot be opened as a model file at all."""
    file = open_file(path)
    return identify_keys(file.raw_shapes, file.metadata)


def taken_by(path) -> frozenset[str] | None:
    """Which nodes load a file, as `Identified.takes` has them. Looks at the file's header alone.

    None where only reading all of it would tell, as with torch files. Raises VideoLDMError where it cannot be opened.
    """
    if Path(path).suffix.lower() not in ENDINGS:
        return None
    file = open_file(path)
    keys = Keys(file.raw_shapes)
    found = [find(keys, file.metadata)[1], decoder.detect(keys, file.metadata)]     # a checkpoint may hold a decoder too
    return frozenset(one.takes for one in found if one and one.takes)


def find(keys: Keys, metadata: Mapping[str, str]) -> tuple[Family | None, Identified]:
    """The family of a file and what it is; the family is None for a file that no node takes."""
    for family in FAMILIES:
        found = family.detect(keys, metadata)
        if found is not None:
            return family, found
    return None, refused.identify(keys, metadata)


def load(path, takes: str, wanted: str) -> Any:
    """The content of a file that the node `takes` loads (a key of LOADERS); raises VideoLDMError for any other file.

    wanted: what the node loads, with an article.
    """
    file = open_file(path)
    family, found = find(Keys(file.raw_shapes), file.metadata)
    if family is None or family.load is None or found.takes != takes:
        raise refusal(file, found, takes, wanted)
    return family.load(file, found)


def refusal(file: TensorFile, found: Identified, takes: str, wanted: str) -> VideoLDMError:
    """The sentence for a file of another kind: what it is, and where it belongs or what the node takes."""
    place = found.place or f"{LOADERS[takes]} takes {listing(takes)}."
    return VideoLDMError(f"{file.name} is {found.title}, not {wanted}. {place}")


def load_temporal(path) -> TemporalFile:
    """Temporal layers for an image model."""
    return load(path, "temporal", "a file of temporal layers that this pack takes")


def load_motion_lora(path) -> MotionLora:
    return load(path, "motion_lora", "a Motion LoRA")


def load_layout(path) -> LayoutFile:
    """A scene layout's conditioner."""
    return load(path, "layout", scene_layout.TITLE)


def load_upscaler(path) -> UpscalerFile:
    """An upscaler in pixel space."""
    return load(path, "video_model", "a whole video model that this pack takes")


def load_decoder(path) -> DecoderFile:
    """A temporal decoder, alone or within a whole checkpoint."""
    file = open_file(path)
    found = decoder.detect(Keys(file.raw_shapes), file.metadata)
    if found is not None:
        return decoder.load(file, found)
    other = find(Keys(file.raw_shapes), file.metadata)[1]
    if decoder.prefix_of(file.shapes) is not None and other.kind in ("svd_unet", "sv3d", "vae", "diffusers_vae"):
        raise VideoLDMError(f"{file.name} is {other.title} with an image decoder: it has no temporal layers. Choose "
                            "svd.safetensors or svd_xt.safetensors, the VAE of one of them, or a decoder trained with "
                            "this pack.")
    raise refusal(file, other, "decoder", "a temporal decoder")


def load_svd_initialisation(path, params: StackParams) -> Initialisation:
    """Initial values from a Stable Video Diffusion checkpoint for layers that are to be trained; never for use as they
    are: `load_temporal` refuses such a file."""
    return svd.load_initialisation(open_file(path), params)
