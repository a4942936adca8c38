"""LaVie's video networks (docs/formats.md#lavie; docs/papers.md#lavie-base).

A file is a whole UNet in diffusers' naming. It is Stable Diffusion 1.4, trained together with one attention over time
in each transformer block.
"""

import re
from collections.abc import Mapping

from ..errors import VideoLDMError
from ..formats.files import TensorFile
from ..formats.temporal_file import Base, Identified, Schedule
from ..formats.tensor_names import Keys
from ..formats.video_network import CLIP_L, Heads, VideoNetwork
from ..layers import BrickParams, RotaryParams
from ..slots import Site, run_order
from ..spatial_changes import POOLED_NORMS
from ..spatial_names import ldm_names, names_of_unet
from ..unet_names import BLOCK, UNetNames
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
}
TEMPORAL = re.compile(BLOCK + r"attentions\.(?P<number>\d+)\.transformer_blocks\.(?P<block>\d+)\."
                      r"(?P<layer>attn_temp|norm_temp)\.(?P<rest>.+)")
ROTATION = re.compile(r".*\.attn_temp\.rotary_emb\.")
OWN_NAMES = {"attn_temp": "attn_temporal", "norm_temp": "norm_temporal"}
BIAS = "attn_temporal.time_rel_pos_bias.relative_attention_bias.weight"


def detect(keys: Keys, metadata: Mapping[str, str]) -> Identified | None:
    """Recognise LaVie's base by its attention over time with relative positions and its 4 input channels."""
    if not keys.has(r".*\.attn_temp\.to_q\.") or not keys.has(r".*\.attn_temp\.time_rel_pos_bias"):
        return None
    kind = {4: "lavie_base"}.get((*keys.shape(r"conv_in\.weight"), 0, 0)[1])
    return VERSIONS[kind].identified(kind) if kind else None


def load(file: TensorFile, found: Identified) -> VideoNetwork:
    """Load a file that `detect` has recognised. Raises VideoLDMError if it is damaged."""
    version = VERSIONS[found.kind]
    unet = names_of_unet(file.shapes)
    names, shapes = layer_names(file, unet)
    bricks = tuple((site, brick_of(file.name, version.facts.title, site, shapes[site]))
                   for site in sorted(shapes, key=run_order))
    temporal = {key for key in file.shapes if TEMPORAL.fullmatch(key)}
    spatial = ldm_names(key for key in file.shapes if key not in temporal)
    network = version.network(file, found.kind, version.facts.stack_params(bricks, None), names, spatial,
                              filter(ROTATION.match, temporal))
    check_rotation(file, version.facts.title, ROTATION)
    return network


def layer_names(file: TensorFile, unet: UNetNames) -> tuple[dict[str, str], dict[Site, dict[str, tuple]]]:
    """{file key: stack key} of the temporal layers, and the shapes of each layer by suffix."""
    names: dict[str, str] = {}
    shapes: dict[Site, dict[str, tuple]] = {}
    for key, shape in file.shapes.items():
        match = TEMPORAL.fullmatch(key)
        if match is None or ROTATION.match(key):
            continue
        part, index = unet.block(match["side"], int(match["level"] or 0), int(match["number"]))
        site = Site(part, index, "in_attn_pre_ff", int(match["block"]))
        suffix = f"{OWN_NAMES[match['layer']]}.{match['rest']}"
        names[key] = f"layers.{site.name}.{suffix}"
        shapes.setdefault(site, {})[suffix] = shape
    return names, shapes


def brick_of(name: str, title: str, site: Site, shapes: Mapping[str, tuple]) -> BrickParams:
    """The params of the layer at a site. Raises VideoLDMError if a tensor is missing."""
    norm, bias = shapes.get("norm_temporal.weight", ()), shapes.get(BIAS, ())
    if not norm or len(bias) != 2:
        raise VideoLDMError(f"{name} looks like {title}, but its layer at {site.name} is incomplete. Download the file "
                            "again.")
    return RotaryParams(norm[0], bias[1])


FAMILY = Family("LaVie's base network", "video_model", detect, load)
