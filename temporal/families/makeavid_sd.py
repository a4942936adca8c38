"""makeavid-sd: convolutions and attention over time on Stable Diffusion 1.5's inpainting model
(docs/formats.md#makeavid-sd).

A file is a whole UNet in diffusers' naming, where every 2-D convolution has a convolution over time behind it. Its
authors' trainer trains the temporal layers alone. So these are read, and act on the artist's own checkpoint.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace

from torch import Tensor

from ..errors import VideoLDMError
from ..formats.files import TensorFile
from ..formats.temporal_file import Base, Identified, Schedule, TemporalFile
from ..formats.tensor_names import Keys
from ..formats.video_network import CLIP_L, Heads
from ..layers import BrickParams, FrameConvParams, FrameResidualParams
from ..params import HINT, PlacedFramesParams
from ..reference_attention import TRANSFORMER_EPS
from ..slots import Site, run_order
from ..spatial_changes import POOLED_NORMS
from ..spatial_names import ldm_names, names_of_unet
from ..unet_names import BLOCK, UNetNames
from .family import Facts, Family, NetworkFacts

HEADS = 8
CONVOLUTION_SLOTS = ("post_conv_in", "post_conv1", "post_conv2", "post_shortcut", "post_resampler", "post_conv_out")
NETWORK = NetworkFacts(Facts(
    "makeavid-sd", "a makeavid-sd UNet (temporal convolutions on Stable Diffusion 1.5's inpainting model)",
    Base("Stable Diffusion 1.x", 768), Schedule("linear", 0.00085, 0.012), 24,
    "AGPL-3.0, which its page calls pending", spatial=(POOLED_NORMS, TRANSFORMER_EPS),
    placed_frames=PlacedFramesParams(HINT), image_alone=True,
    notes=("Only its temporal layers are used, on your checkpoint.",
           "It was trained on the inpainting model of Stable Diffusion 1.5, which sees the first frame in every frame. "
           "Use an inpainting checkpoint, and give it the first frame with Context Frames, frames 0.",
           "An inpainting checkpoint of your own: subtract Stable Diffusion 1.5 from its inpainting checkpoint with "
           "core's ModelMergeSubtract, and add your checkpoint with ModelMergeAdd, with the inpainting one as "
           "model1.")), CLIP_L, Heads(count=HEADS), slots=(*CONVOLUTION_SLOTS, "in_attn_pre_ff"))
SPATIAL_CONV = ".spatial_conv."

END = re.compile(r"(?P<end>conv_in|conv_out)\.(?P<rest>temporal_conv\..+)")
RESBLOCK = re.compile(BLOCK + r"resnets\.(?P<number>\d+)\.(?:conv(?P<conv>[12])|conv_(?P<shortcut>shortcut))\."
                      r"(?P<rest>temporal_conv\..+)")
RESAMPLER = re.compile(r"(?P<side>down|up)_blocks\.(?P<level>\d+)\.(?:down|up)samplers\.0\.conv\."
                       r"(?P<rest>temporal_conv\..+)")
ATTENTION = re.compile(BLOCK + r"attentions\.(?P<number>\d+)\.transformer_blocks\.(?P<block>\d+)\."
                       r"(?P<rest>(?:norm|attn)_temporal\..+)")


def detect(keys: Keys, metadata: Mapping[str, str]) -> Identified | None:
    """Recognise the convolutions over time behind spatial ones."""
    if keys.has(r"conv_in\.spatial_conv\.") and keys.has(r".*\.temporal_conv\."):
        return NETWORK.facts.identified("makeavid_sd")
    return None


def load(file: TensorFile, found: Identified) -> TemporalFile:
    """The temporal layers of a file that `detect` has recognised. Raises VideoLDMError if it is damaged."""
    file = with_places(file)
    unet = names_of_unet(file.shapes)
    names = {key: named for key in file.shapes if (named := site_of(key, unet))}
    shapes: dict[Site, dict[str, tuple]] = {}
    for key, (site, suffix) in names.items():
        shapes.setdefault(site, {})[suffix] = file.shapes[key]
    facts = NETWORK.facts
    bricks = tuple((site, brick_of(file.name, site, shapes[site])) for site in sorted(shapes, key=run_order))
    params = facts.stack_params(bricks, None)
    spatial = {key.replace(SPATIAL_CONV, "."): key for key in file.shapes if key not in names}
    spatial = {name: spatial[key] for name, key in ldm_names(spatial).items()}
    stack_names = {key: f"layers.{site.name}.{suffix}" for key, (site, suffix) in names.items()}
    return NETWORK.network(file, found.kind, params, stack_names, spatial).layers


def with_places(file: TensorFile) -> TensorFile:
    """The file with a size of 1 behind its kernels `o i 3`, as this pack's convolutions over t and places have it."""
    def shaped(shape: tuple) -> tuple:
        return (*shape, 1) if len(shape) == 3 else shape

    def read(keys: Iterable[str]) -> dict[str, Tensor]:
        return {key: tensor.reshape(shaped(tuple(tensor.shape))) for key, tensor in file.read(keys).items()}
    return replace(file, shapes={key: shaped(shape) for key, shape in file.shapes.items()}, read=read)


def site_of(key: str, unet: UNetNames) -> tuple[Site, str] | None:
    """(site, suffix) of a tensor of a temporal layer. None for a spatial one."""
    if match := END.fullmatch(key):
        if match["end"] == "conv_in":
            return Site("input", 0, "post_conv_in"), match["rest"]
        last = unet.block("up", unet.levels - 1, unet.resblocks)
        return Site(*last, "post_conv_out"), match["rest"]
    if match := RESAMPLER.fullmatch(key):
        return Site(*unet.block(match["side"], int(match["level"]), unet.resblocks), "post_resampler"), match["rest"]
    if match := RESBLOCK.fullmatch(key):
        number = int(match["number"])
        part, index = unet.block(match["side"], int(match["level"] or 0), number)
        slot = "post_shortcut" if match["shortcut"] else f"post_conv{match['conv']}"
        return Site(part, index, slot, number if part == "middle" else 0), match["rest"]
    if match := ATTENTION.fullmatch(key):
        part, index = unet.block(match["side"], int(match["level"] or 0), int(match["number"]))
        return Site(part, index, "in_attn_pre_ff", int(match["block"])), match["rest"]
    return None


def brick_of(name: str, site: Site, shapes: Mapping[str, tuple]) -> BrickParams:
    """The params of the layer at a site. Raises VideoLDMError if the tensor is missing that shows its size."""
    attention = site.slot == "in_attn_pre_ff"
    weight = "norm_temporal.weight" if attention else "temporal_conv.weight"
    size = shapes.get(weight, ())
    if not size or (attention and size[0] % HEADS):
        raise VideoLDMError(f"{name} looks like {NETWORK.facts.title}, but the tensor {weight} of its temporal layer "
                            f"{site.name} is {list(size) or 'missing'}. The file is incomplete or damaged: download it "
                            "again.")
    return FrameResidualParams(size[0], HEADS) if attention else FrameConvParams(size[0])


FAMILY = Family("makeavid-sd, temporal convolutions for SD 1.5 inpainting checkpoints", "temporal", detect, load)
