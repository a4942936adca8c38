"""The kinds of files that the pack loads. It identifies a file and loads it.

    identify(path) -> Identified            load_temporal(path) -> TemporalFile
    load_motion_lora(path) -> MotionLora    load_svd_initialisation(path, params) -> Initialisation
    load_decoder(path) -> DecoderFile       load_layout(path) -> LayoutFile
    load_video_model(path) -> UpscalerFile | VideoNetwork    load_pvdm(path, kind) -> PvdmFile
    load_sparse_control(path) -> SparseControlFile    load_camera(path) -> CameraFile

To add a family of temporal layers, write one file here and add one entry to FAMILIES. Node texts, refusals and the
sentence for unknown files are made from that list. refused.py names all other files.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..atomic import StrPath
from ..errors import VideoLDMError
from ..formats import decoder, motion_lora, pixel_upscaler, scene_layout_file
from ..formats.decoder import DecoderFile
from ..formats.files import TensorFile, open_file
from ..formats.motion_lora import MotionLora
from ..formats.pixel_upscaler import UpscalerFile
from ..formats.safetensors_files import ENDINGS
from ..formats.scene_layout_file import LayoutFile
from ..formats.temporal_file import Identified, TemporalFile
from ..formats.tensor_names import Keys
from ..formats.video_network import VideoNetwork
from ..params import StackParams
from ..pvdm.files import AUTOENCODER, DIFFUSION, PvdmFile
from ..pvdm.files import TITLES as PVDM_TITLES
from . import (
    animatediff,
    animatelcm_i2v,
    cameractrl,
    hotshot_xl,
    lavie,
    makeavid_sd,
    modelscope,
    motion_adapter,
    musev,
    own_network,
    pia,
    pvdm,
    refused,
    sparsectrl,
    svd,
    video_ldm,
    video_super_resolution,
    videocrafter,
)
from .cameractrl import CameraFile
from .family import LOADERS, Family
from .sparsectrl import SparseControlFile
from .svd import Initialisation

# In the order of detection: the first family that recognises a file loads it.
FAMILIES: tuple[Family, ...] = (
    video_ldm.FAMILY,
    Family("scene layout files written by this pack", "layout", scene_layout_file.detect,
           scene_layout_file.load),
    Family("video upscalers in pixel space, written by this pack", "video_model", pixel_upscaler.detect,
           pixel_upscaler.load),
    own_network.FAMILY,
    Family("Motion LoRA for AnimateDiff, in AnimateDiff's names or diffusers'", "motion_lora", motion_lora.detect,
           motion_lora.load),
    sparsectrl.FAMILY,
    cameractrl.FAMILY,
    hotshot_xl.FAMILY,
    animatediff.FAMILY,
    animatelcm_i2v.FAMILY,
    pia.FAMILY,
    motion_adapter.FAMILY,
    lavie.FAMILY,
    musev.FAMILY,
    makeavid_sd.FAMILY,
    modelscope.FAMILY,
    videocrafter.FAMILY,
    video_super_resolution.FAMILY,
    svd.FAMILY,
    pvdm.FAMILY,
    Family("temporal decoders: Stable Video Diffusion's (svd.safetensors, svd_xt.safetensors, or their VAE) and those "
           "written by this pack", "decoder", decoder.detect, decoder.load),
)


def listing(takes: str) -> str:
    """The kinds of files that a node loads, as text: "A; B; C". takes: a key of LOADERS."""
    return "; ".join(family.listed for family in FAMILIES if family.takes == takes)


def identify_keys(shapes: Mapping[str, tuple], metadata: Mapping[str, str] | None = None) -> Identified:
    """Identify a file from the names and shapes of its tensors and its safetensors metadata."""
    return find(Keys(shapes), metadata or {})[1]


def identify(path: StrPath) -> Identified:
    """Identify a file. Raises VideoLDMError if it cannot be opened as a model file."""
    file = open_file(path)
    return identify_keys(file.raw_shapes, file.metadata)


def taken_by(path: StrPath) -> frozenset[str] | None:
    """The nodes that load a file, as in `Identified.takes`. See `known_as`."""
    known = known_as(path)
    return None if known is None else known & set(LOADERS)


def known_as(path: StrPath) -> frozenset[str] | None:
    """The nodes that load a file, as in `Identified.takes`, and its kinds. Only the header of the file is read.

    Returns None for torch files, which have no header. Raises VideoLDMError if the file cannot be opened.
    """
    if Path(path).suffix.lower() not in ENDINGS:
        return None
    file = open_file(path)
    keys = Keys(file.raw_shapes)
    # A checkpoint of one family can hold a temporal decoder as well.
    found = [find(keys, file.metadata)[1], decoder.detect(keys, file.metadata)]
    return frozenset(node for one in found if one for node in (one.takes, one.also, one.kind) if node)


def find(keys: Keys, metadata: Mapping[str, str]) -> tuple[Family | None, Identified]:
    """The family of a file and what the file is. The family is None for a file that no family recognises."""
    for family in FAMILIES:
        found = family.detect(keys, metadata)
        if found is not None:
            return family, found
    return None, refused.identify(keys, metadata)


def load(path: StrPath, takes: str, wanted: str) -> Any:
    """Load a file for a node. Raises VideoLDMError for a file that this node does not load.

    takes: the node, a key of LOADERS. wanted: what the node loads, with an article.
    """
    file = open_file(path)
    family, found = find(Keys(file.raw_shapes), file.metadata)
    if family is None or family.load is None or takes not in (found.takes, found.also):
        raise refusal(file, found, takes, wanted)
    return family.load(file, found)


def load_supported(file: TensorFile) -> tuple[Identified, Any]:
    """What an open file is, and what its loader makes of it. Raises VideoLDMError for a file that no node loads.

    A checkpoint with an image network and a temporal decoder counts as the decoder.
    """
    keys = Keys(file.raw_shapes)
    family, found = find(keys, file.metadata)
    if family is not None and family.load is not None and found.takes is not None:
        return found, family.load(file, found)
    temporal_decoder = decoder.detect(keys, file.metadata)
    if temporal_decoder is not None:
        return temporal_decoder, decoder.load(file, temporal_decoder)
    advice = found.advice or f"It takes {'; '.join(family.listed for family in FAMILIES if family.takes)}."
    raise VideoLDMError(f"{file.name} is {found.title}, not a file that this pack takes. {advice}")


def refusal(file: TensorFile, found: Identified, takes: str, wanted: str) -> VideoLDMError:
    """The error for a file of another kind: what it is, and where it belongs or what the node loads."""
    advice = found.advice or f"{LOADERS[takes]} takes {listing(takes)}."
    if takes == "temporal" and found.not_alone:
        advice = f"{found.not_alone} {advice}"
    return VideoLDMError(f"{file.name} is {found.title}, not {wanted}. {advice}")


def load_temporal(path: StrPath) -> TemporalFile:
    """Load temporal layers for an image model. Of a whole video network, only its temporal layers are read."""
    loaded = load(path, "temporal", "a file of temporal layers that this pack takes")
    return loaded.layers_alone() if isinstance(loaded, VideoNetwork) else loaded


def load_motion_lora(path: StrPath) -> MotionLora:
    """Load a Motion LoRA."""
    return load(path, "motion_lora", "a Motion LoRA")


def load_layout(path: StrPath) -> LayoutFile:
    """Load the network of a scene layout."""
    return load(path, "layout", scene_layout_file.TITLE)


def layout_limits(path: StrPath) -> tuple[tuple[str, ...], int]:
    """(colours, largest number of boxes) that a scene layout file knows. Only the header of the file is read."""
    params, _, _, most = scene_layout_file.parse_metadata(open_file(path))
    return params.colours, most


def load_video_model(path: StrPath) -> UpscalerFile | VideoNetwork:
    """Load a whole network: an upscaler in pixel space, or a video network in the latent space of an image model."""
    return load(path, "video_model", "a whole video model that this pack takes")


def load_sparse_control(path: StrPath) -> SparseControlFile:
    """Load a SparseCtrl network."""
    return load(path, "sparse_control", "a SparseCtrl file")


def load_camera(path: StrPath) -> CameraFile:
    """Load CameraCtrl's network."""
    return load(path, "camera", "a CameraCtrl file for AnimateDiff v3")


def load_pvdm(path: StrPath, kind: str) -> PvdmFile:
    """Load one of PVDM's two networks. kind: AUTOENCODER or DIFFUSION. Raises VideoLDMError for the other one."""
    wanted = PVDM_TITLES[kind]
    file = open_file(path)
    found = find(Keys(file.raw_shapes), file.metadata)[1]
    if found.kind in (AUTOENCODER, DIFFUSION) and found.kind != kind:
        raise VideoLDMError(f"{file.name} is {found.title}, not {wanted}. The two files of {LOADERS['pvdm']} are "
                            "swapped, or one is chosen twice: choose this one for the other input.")
    return load(path, "pvdm", wanted)


def load_upscaler(path: StrPath) -> UpscalerFile:
    """Load an upscaler in pixel space. Raises VideoLDMError for another network."""
    found = load_video_model(path)
    if isinstance(found, VideoNetwork):
        raise VideoLDMError(f"{found.layers.name} is {found.layers.title}, not an upscaler. Load it with Load Video "
                            "Model.")
    return found


def load_decoder(path: StrPath) -> DecoderFile:
    """Load a temporal decoder from a file of its own or from a whole checkpoint."""
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


def load_svd_initialisation(path: StrPath, params: StackParams) -> Initialisation:
    """Load initial values for training temporal layers from a Stable Video Diffusion checkpoint.

    They do not work untrained, so `load_temporal` refuses such a file.
    """
    return svd.load_initialisation(open_file(path), params)
