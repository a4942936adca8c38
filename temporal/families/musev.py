"""MuseV: convolutions and attention over time on a frozen Stable Diffusion 1.5 (docs/formats.md#musev).

A file is a whole UNet in diffusers' naming, with Stable Diffusion's own weights. Its authors put an artist's checkpoint
in their place. So the temporal layers alone are read.
"""

import re
from collections.abc import Mapping
from dataclasses import replace

from ..errors import VideoLDMError
from ..formats.files import TensorFile
from ..formats.temporal_file import Base, Identified, Schedule, TemporalFile
from ..formats.tensor_names import Keys
from ..formats.video_network import CLIP_L, Heads
from ..layers import BrickParams, WeightedConvParams, WeightedTransformerParams
from ..params import IN_PLACE, PlacedFramesParams
from ..reference_attention import KNOWN_ATTENTION
from ..slots import Site, run_order
from .family import Facts, Family, NetworkFacts
from .modelscope import diffusers_names, with_flat_weights
from .motion_modules import count_numbers

HEADS = 8
REFERENCE = r".*(?:refer_emb_attns|to_[kv]_ip)\."
EMBEDDING = re.compile(r"frame_embedding\.linear_[12]\.(?:weight|bias)")
NETWORK = NetworkFacts(Facts(
    "MuseV", "a MuseV UNet (temporal convolutions and attention on Stable Diffusion 1.5)",
    Base("Stable Diffusion 1.x", 768), Schedule("linear", 0.00085, 0.012), 12,
    "the weights are for non-commercial research only; the code is MIT", 4.0, spatial=(KNOWN_ATTENTION,),
    placed_frames=PlacedFramesParams(IN_PLACE),
    notes=("Only its temporal layers are used, on your checkpoint. Its authors exchange the checkpoint in the same "
           "way.",
           "It was trained to go on from a first frame: give it one with Context Frames, frames 0, and sample 13 "
           "frames. Its authors never sample it without one.",
           "Its authors sample in 10 steps with cfg 3.5, from noise that the frames share in part (Frame Noise).")),
    CLIP_L, Heads(count=HEADS), slots=("post_conv_in", "post_res", "post_attn"))


def detect(keys: Keys, metadata: Mapping[str, str]) -> Identified | None:
    """Recognise the weight of each temporal convolution. Files for its ReferenceNet have further layers."""
    if not keys.has(r".*\.temp_convs\.\d+\.temporal_weight$") or keys.has(REFERENCE):
        return None
    return NETWORK.facts.identified("musev")


def load(file: TensorFile, found: Identified) -> TemporalFile:
    """The temporal layers of a file that `detect` has recognised. Raises VideoLDMError if it is damaged."""
    file = with_flat_weights(file)
    names = diffusers_names(file.shapes)
    shapes: dict[Site, dict[str, tuple]] = {}
    for key, (site, suffix) in names.layers.items():
        shapes.setdefault(site, {})[suffix] = file.shapes[key]
    width = (*file.shapes.get("frame_embedding.linear_2.weight", ()), 0)[0]
    bricks = tuple((site, brick_of(file.name, site, shapes[site], width)) for site in sorted(shapes, key=run_order))
    params = replace(NETWORK.facts.stack_params(bricks, None), frame_width=width)
    stack_names = {key: f"layers.{site.name}.{suffix}" for key, (site, suffix) in names.layers.items()}
    stack_names |= {key: key for key in file.shapes if EMBEDDING.fullmatch(key)}
    return NETWORK.network(file, found.kind, params, stack_names, names.spatial).layers


def brick_of(name: str, site: Site, shapes: Mapping[str, tuple], width: int) -> BrickParams:
    """The params of the layer at a site. width: of the embedding of frame numbers.

    Raises VideoLDMError if a tensor is missing that shows a size.
    """
    weight = "conv1.0.weight" if site.slot == "post_res" else "proj_in.weight"
    size = shapes.get(weight, ())
    if not size or (site.slot != "post_res" and (size[0] % HEADS or not width)):
        shown = f"{weight} of its temporal layer {site.name} is {list(size) or 'missing'}" if width else \
            "frame_embedding.linear_2.weight is missing"
        raise VideoLDMError(f"{name} looks like {NETWORK.facts.title}, but the tensor {shown}. The file is incomplete "
                            "or damaged: download it again.")
    if site.slot == "post_res":
        return WeightedConvParams(size[0])
    return WeightedTransformerParams(size[0], HEADS, width, count_numbers(shapes, r"transformer_blocks\.(\d+)\."))


FAMILY = Family("MuseV, temporal convolutions for SD 1.5 checkpoints", "temporal", detect, load)
