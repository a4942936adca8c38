"""LaVie's video networks: base, interpolation and SEINE (docs/formats.md#lavie; docs/formats.md#seine;
docs/papers.md#lavie-base; docs/papers.md#lavie-interpolation; docs/papers.md#seine).

A file is a whole UNet in diffusers' naming. It is Stable Diffusion 1.4, trained together with one attention over time
in each transformer block. Base and SEINE have it before the feed-forward, with relative positions. Interpolation has it
after the feed-forward, without positions.
"""

import re
from collections.abc import Mapping

from ..errors import VideoLDMError
from ..formats.files import TensorFile
from ..formats.temporal_file import Base, Identified, Schedule
from ..formats.tensor_names import Keys
from ..formats.video_network import CLIP_L, Heads, VideoNetwork
from ..layers import BrickParams, FrameAttentionParams, RotaryParams
from ..params import COPIES, GREY, MASK_FIRST, InputFramesParams
from ..slots import Site, run_order
from ..spatial_changes import POOLED_NORMS, SPARSE_CAUSAL
from ..spatial_names import ldm_names, names_of_unet
from ..unet_names import BLOCK
from .family import Facts, Family, NetworkFacts
from .video_super_resolution import check_rotation

LICENCE = "code Apache-2.0; weights open for academic research, commercial use free on application to the authors"
SD14 = Base("Stable Diffusion 1.x", 768)
SCHEDULE = Schedule("sqrt_linear", 0.0001, 0.02, "eps")
HEADS = 8
VERSIONS = {
    "lavie_base": NetworkFacts(Facts(
        "LaVie", "LaVie's base text-to-video network", SD14, SCHEDULE, 16, LICENCE, 8.0, spatial=(POOLED_NORMS,),
        notes=("Its authors sample 16 frames of 512x320 with 50 steps and cfg 7 to 7.5.",)), CLIP_L, Heads(HEADS)),
    "lavie_interpolation": NetworkFacts(Facts(
        "LaVie interpolation", "LaVie's frame interpolation network", SD14, SCHEDULE, 61, LICENCE, 24.0,
        spatial=(POOLED_NORMS, SPARSE_CAUSAL), input_frames=InputFramesParams(COPIES),
        notes=("It makes 61 frames from 16 key frames. Its authors sample with DDIM, 50 steps and cfg 4.",
               "Its authors save its clips at 24 frames per second. 4 times the 8 of the key frames would be 32.")),
        CLIP_L, Heads(HEADS),
        "Its temporal layers were trained for a network whose input takes the key frames and whose self-attention sees "
        "other frames. On an image model they would give noise."),
    "seine": NetworkFacts(Facts(
        "SEINE", "SEINE's network for image to video and transitions", SD14, SCHEDULE, 16, LICENCE, 8.0,
        spatial=(POOLED_NORMS,),
        input_frames=InputFramesParams(MASK_FIRST, given=0.0, filler=GREY),
        notes=("Its authors sample 16 frames of 560x240 or 512x512 with ancestral DDPM, 250 steps and cfg 8.",
               "Its authors end prompts for image to video with \"slow motion.\" and write \"smooth transition\" for "
               "transitions.")),
        CLIP_L, Heads(HEADS),
        "Its temporal layers were trained for a network whose input takes known frames. On an image model they would "
        "give noise."),
}
POSITIONS, PLAIN = {4: "lavie_base", 9: "seine"}, {8: "lavie_interpolation"}    # {input channels: kind}
TEMPORAL = re.compile(BLOCK + r"attentions\.(?P<number>\d+)\.transformer_blocks\.(?P<block>\d+)\."
                      r"(?P<layer>attn_temp|norm_temp)\.(?P<rest>.+)")
ROTATION = re.compile(r".*\.attn_temp\.rotary_emb\.")
OWN_NAMES = {"attn_temp": "attn_temporal", "norm_temp": "norm_temporal"}
BIAS = "attn_temporal.time_rel_pos_bias.relative_attention_bias.weight"


def detect(keys: Keys, metadata: Mapping[str, str]) -> Identified | None:
    """Recognise the attention over time. Its relative positions and the network's input channels tell the kind."""
    if not keys.has(r".*\.attn_temp\.to_q\."):
        return None
    kinds = POSITIONS if keys.has(r".*\.attn_temp\.time_rel_pos_bias") else PLAIN
    channels = (*keys.shape(r"conv_in\.weight"), 0, 0)[1]
    kind = kinds.get(channels) if channels else next(iter(kinds.values()))     # an incomplete file is refused by name
    return VERSIONS[kind].identified(kind) if kind else None


def load(file: TensorFile, found: Identified) -> VideoNetwork:
    """Load a file that `detect` has recognised. Raises VideoLDMError if it is damaged."""
    version = VERSIONS[found.kind]
    names, shapes = layer_names(file, found.kind)
    bricks = tuple((site, brick_of(file.name, version.facts.title, site, shapes[site]))
                   for site in sorted(shapes, key=run_order))
    temporal = {key for key in file.shapes if TEMPORAL.fullmatch(key)}
    spatial = ldm_names(key for key in file.shapes if key not in temporal)
    network = version.network(file, found.kind, version.facts.stack_params(bricks, None), names, spatial,
                              filter(ROTATION.match, temporal))
    check_rotation(file, version.facts.title, ROTATION)
    return network


def layer_names(file: TensorFile, kind: str) -> tuple[dict[str, str], dict[Site, dict[str, tuple]]]:
    """{file key: stack key} of the temporal layers, and the shapes of each layer by suffix."""
    unet = names_of_unet(file.shapes)
    slot = "in_attn_post_ff" if kind == "lavie_interpolation" else "in_attn_pre_ff"
    names: dict[str, str] = {}
    shapes: dict[Site, dict[str, tuple]] = {}
    for key, shape in file.shapes.items():
        match = TEMPORAL.fullmatch(key)
        if match is None or ROTATION.match(key):
            continue
        part, index = unet.block(match["side"], int(match["level"] or 0), int(match["number"]))
        site = Site(part, index, slot, int(match["block"]))
        suffix = f"{OWN_NAMES[match['layer']]}.{match['rest']}"
        names[key] = f"layers.{site.name}.{suffix}"
        shapes.setdefault(site, {})[suffix] = shape
    return names, shapes


def brick_of(name: str, title: str, site: Site, shapes: Mapping[str, tuple]) -> BrickParams:
    """The params of the layer at a site. Raises VideoLDMError if a tensor is missing."""
    norm, bias = shapes.get("norm_temporal.weight", ()), shapes.get(BIAS, ())
    with_positions = site.slot == "in_attn_pre_ff"
    if not norm or (with_positions and len(bias) != 2):
        raise VideoLDMError(f"{name} looks like {title}, but its layer at {site.name} is incomplete. Download the file "
                            "again.")
    return RotaryParams(norm[0], bias[1]) if with_positions else FrameAttentionParams(norm[0], HEADS)


FAMILY = Family("LaVie's base and interpolation networks and SEINE", "video_model", detect, load)
