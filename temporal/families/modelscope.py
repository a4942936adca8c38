"""ModelScope's text-to-video network and ZeroScope (docs/formats.md#modelscope-and-zeroscope).

A file is a whole UNet of Stable Diffusion 2.x, trained together with a convolution over time after each ResBlock and a
transformer over time after each spatial transformer. There are two layouts: the authors' own, which numbers the
modules of a block anew where temporal ones stand between them, and diffusers' `UNet3DConditionModel`.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import NamedTuple

from torch import Tensor

from ..errors import VideoLDMError
from ..formats.files import TensorFile
from ..formats.temporal_file import Base, Identified, Schedule
from ..formats.tensor_names import Keys
from ..formats.video_network import OPENCLIP_H, Heads, VideoNetwork
from ..layers import BrickParams, ClipTransformerParams, StagedConvParams
from ..slots import Site, run_order
from ..spatial_names import ldm_names, names_of_unet
from ..unet_names import BLOCK
from .family import Facts, Family, NetworkFacts
from .motion_modules import count_numbers

HEAD_WIDTH = 64
SLOTS = ("post_conv_in", "post_res", "post_attn")
NETWORK = NetworkFacts(Facts(
    "ModelScope", "a ModelScope or ZeroScope text-to-video network", Base("Stable Diffusion 2.x", 1024),
    Schedule("linear", 0.00085, 0.012, "eps"), 16, "CC-BY-NC-4.0 (no commercial use)", 8.0,
    notes=("ModelScope and ZeroScope have the same tensors, so the file does not tell them apart. ModelScope was "
           "trained on 16 frames of 256x256, ZeroScope v2 on 24 frames: 576w of 576x320, XL of 1024x576.",)),
    OPENCLIP_H, Heads(width=HEAD_WIDTH), slots=SLOTS)


class Names(NamedTuple):
    """Which tensor of a file is which."""

    layers: dict[str, tuple[Site, str]]     # {file key: (site, suffix)} of the temporal layers
    spatial: dict[str, str]                 # {name in LDM's UNet: file key} of the spatial weights


def detect(keys: Keys, metadata: Mapping[str, str]) -> Identified | None:
    """Recognise a network of 4 input channels.

    VideoCrafter and I2VGen-XL have the same layers and further modules, and MuseV's layers have a weight each.
    """
    if keys.shape(r"(?:input_blocks\.0\.0|conv_in)\.weight")[1:2] != (4,):
        return None
    own = keys.has(r".*\.temopral_conv\.conv4\.") and not keys.has(r"init_attn\.")
    diffusers = keys.has(r".*\.temp_convs\.\d+\.conv4\.") and not keys.has(r"image_latents_|.*\.temporal_weight$")
    return NETWORK.identified("modelscope") if own or diffusers else None


def load(file: TensorFile, found: Identified) -> VideoNetwork:
    """Load a file that `detect` has recognised. Raises VideoLDMError if it is damaged."""
    file = with_flat_weights(file)
    names = diffusers_names(file.shapes) if "conv_in.weight" in file.shapes else own_names(file.shapes)
    bricks = bricks_of(file, NETWORK.facts.title, names)
    layer_names = {key: f"layers.{site.name}.{suffix}" for key, (site, suffix) in names.layers.items()}
    return NETWORK.network(file, found.kind, NETWORK.facts.stack_params(bricks, None), layer_names, names.spatial)


def with_flat_weights(file: TensorFile) -> TensorFile:
    """The file without sizes of 1 behind its weights, as this pack's layers have them.

    In the authors' layout a projection over one frame is a convolution `o i 1`; it is the linear layer `o i`. The
    convolutions over t are `o i 3 1 1`. Here they are `o i 3 1`, because these layers see h and w as one dimension.
    """
    def flat(shape: tuple) -> tuple:
        return shape[:-1] if len(shape) in (3, 5) and shape[-1] == 1 else shape

    def read(keys: Iterable[str]) -> dict[str, Tensor]:
        return {key: tensor.reshape(flat(tuple(tensor.shape))) for key, tensor in file.read(keys).items()}
    return replace(file, shapes={key: flat(shape) for key, shape in file.shapes.items()}, read=read)


# The authors' layout. A block is ResBlock 0, spatial transformer 1, temporal transformer 2, Upsample 3.
OWN_LAYER = re.compile(r"(?:(?P<part>input|output)_blocks\.(?P<index>\d+)|middle_block)\.(?:"
                       r"(?P<resblock>[03])\.temopral_conv\.(?P<conv>.+)|2\.(?P<attention>.+))")
FIRST_TRANSFORMER = "input_blocks.0.1."
OWN_SPATIAL = re.compile(r"(?:input_blocks|middle_block|output_blocks|time_embed|out)\.")
# Spatial modules whose numbers differ: (pattern, LDM's name)
OWN_MODULES = ((re.compile(r"(input_blocks\.\d+)\.op\."), r"\1.0.op."),
               (re.compile(r"(output_blocks\.\d+)\.3\.conv\."), r"\1.2.conv."),
               (re.compile(r"middle_block\.3\."), "middle_block.2."))


def own_names(shapes: Iterable[str], first: str = FIRST_TRANSFORMER) -> Names:
    """The names of a file in the authors' layout. first: the prefix of the transformer behind the first convolution."""
    names = Names({}, {})
    for key in shapes:
        match = OWN_LAYER.fullmatch(key)
        if key.startswith(first):
            names.layers[key] = Site("input", 0, "post_conv_in"), key.removeprefix(first)
        elif match:
            slot, n = ("post_attn", 0) if match["attention"] else ("post_res", int(match["resblock"]) // 3)
            site = Site(match["part"] or "middle", int(match["index"] or 0), slot, n)
            names.layers[key] = site, match["attention"] or match["conv"]
        elif OWN_SPATIAL.match(key):
            names.spatial[own_spatial_name(key)] = key
    return names


def own_spatial_name(key: str) -> str:
    """LDM's name of a spatial weight in the authors' layout."""
    for pattern, name in OWN_MODULES:
        if pattern.match(key):
            return pattern.sub(name, key, count=1)
    return key


# diffusers' layout
DIFFUSERS_LAYER = re.compile(r"transformer_in\.(?P<first>.+)|" + BLOCK
                             + r"(?P<kind>temp_convs|temp_attentions)\.(?P<number>\d+)\.(?P<rest>.+)")


def diffusers_names(shapes: Iterable[str]) -> Names:
    """The names of a file in diffusers' layout."""
    unet = names_of_unet(shapes)
    layers = {}
    for key in shapes:
        match = DIFFUSERS_LAYER.fullmatch(key)
        if match is None:
            continue
        if match["first"]:
            layers[key] = Site("input", 0, "post_conv_in"), match["first"]
            continue
        number = int(match["number"])
        part, index = unet.block(match["side"], int(match["level"] or 0), number)
        slot = "post_res" if match["kind"] == "temp_convs" else "post_attn"
        n = number if part == "middle" else 0
        layers[key] = Site(part, index, slot, n), match["rest"]
    return Names(layers, ldm_names(key for key in shapes if key not in layers))


# Layers

def bricks_of(file: TensorFile, title: str, names: Names) -> tuple[tuple[Site, BrickParams], ...]:
    """The params of all layers. Raises VideoLDMError if a tensor is missing that shows their sizes."""
    shapes: dict[Site, dict[str, tuple]] = {}
    for key, (site, suffix) in names.layers.items():
        shapes.setdefault(site, {})[suffix] = file.shapes[key]
    return tuple((site, brick_of(file.name, title, site, shapes[site])) for site in sorted(shapes, key=run_order))


def brick_of(name: str, title: str, site: Site, shapes: Mapping[str, tuple]) -> BrickParams:
    """The params of the layer at a site."""
    weight = "conv1.0.weight" if site.slot == "post_res" else "proj_in.weight"
    size = shapes.get(weight, ())
    if not size or (site.slot != "post_res" and (len(size) != 2 or size[0] % HEAD_WIDTH)):
        raise VideoLDMError(f"{name} looks like {title}, but the tensor {weight} of its temporal layer {site.name} is "
                            f"{list(size) or 'missing'}. The file is incomplete or damaged: download it again.")
    if site.slot == "post_res":
        return StagedConvParams(size[0])
    table = shapes.get("transformer_blocks.0.attn1.relative_position_k.embeddings_table", ())
    return ClipTransformerParams(size[1], size[0] // HEAD_WIDTH, size[0],
                                 count_numbers(shapes, r"transformer_blocks\.(\d+)\."),
                                 (table[0] - 1) // 2 if table else None)


FAMILY = Family("ModelScope text-to-video and ZeroScope, in their authors' layout or diffusers'", "video_model", detect,
                load)
