"""Layers for the Stable Diffusion x4 upscaler: LaVie's video super-resolution and Upscale-A-Video (formats.md, h).

Both files are whole UNets of one structure under two sets of names. Only the temporal layers are read.

LaVie froze the spatial layers ("everything without `temporal` in its name"), so that its temporal layers on the x4
upscaler are the published model. Its noise schedule is stated by its code: the upscaler's with betas evenly spaced.
Of Upscale-A-Video neither is known: its code reads a scheduler configuration that comes with the weights and was not
seen, and says nothing of what was trained. Taken here is the schedule of the x4 upscaler that it was made from.
"""

import re
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import VideoLDMError
from ..layers import LevelParams, ResidualConvParams, RotaryParams
from ..layers.position import rotation_angles
from ..sites import Site
from ..stack import StackParams
from .animatediff import most_resblocks
from .files import TensorFile
from .keys import Keys
from .record import (
    X4_UPSCALER,
    Base,
    Identified,
    NoiseLevels,
    Schedule,
    TemporalFile,
    require_complete,
    require_one_dtype,
)
from .video_ldm import run_order

BASE = Base(X4_UPSCALER, 1024)
FRAMES = 8
INSIDE = re.compile(r"(?:(down|up)_blocks\.(\d+)|mid_block)\.attentions\.(\d+)\."
                    r"(?:(resblock_temporal\..+)|transformer_blocks\.(\d+)\.((?:norm|attn)_temporal\..+))")
LEVEL = re.compile(r"(?:(down|up)_temp(?:oral)?_blocks\.(\d+)|mid_temp(?:oral)?_block)\.(.+)")
TRANSFORMER = re.compile(r"(?:(down|up)_blocks\.(\d+)|mid_block)\.attentions\.(\d+)\.")
ROTATION = re.compile(r"(?:.*\.attn_temporal\.rotary_emb|temporal_rotary_emb)\.(.+)")
TEMPORAL = re.compile(r".*(?:temporal|_temp_)")
RENAMED = {"resblocks_3d_temporal": "resblocks_3d_t", "resblocks_3d_spatial": "resblocks_3d_s"}


@dataclass(frozen=True)
class Version:
    title: str
    family: str
    pattern: str
    schedule: Schedule
    noise: NoiseLevels
    licence: str
    notes: tuple[str, ...]


VERSIONS = {
    "lavie_vsr": Version(
        "LaVie's video super-resolution UNet", "LaVie VSR", r"down_temporal_blocks\.\d+\.resblocks_3d_t\.",
        Schedule("sqrt_linear", 0.0001, 0.02, "v"), NoiseLevels("LaVie", 350, 50),
        "open for academic research, commercial use on application to LaVie's authors",
        ("The spatial layers in the file are not used: LaVie left them as the x4 upscaler has them.",
         "LaVie sampled with ddim, 50 steps, cfg 5, noise level 50 and the negative prompt \"blur, worst quality\".")),
    "upscale_a_video": Version(
        "the UNet of Upscale-A-Video", "Upscale-A-Video", r"down_temp_blocks\.\d+\.resblocks_3d_temporal\.",
        Schedule("linear", 0.0001, 0.02, "v"), NoiseLevels("Upscale-A-Video", 350, 120),
        "S-Lab License 1.0, non-commercial",
        ("The spatial layers in the file are not used. Whether they were trained is not known: if they were, this is "
         "not the published model.",
         "The noise schedule it was trained with was not seen: the x4 upscaler's own is taken.",
         "Its authors sample with 30 steps, cfg 6, noise level 120 (0 to 200), \"best quality, extremely detailed\" "
         "behind the prompt and the negative prompt \"blur, worst quality\".")),
}


def detect(keys: Keys) -> Identified | None:
    kind = next((kind for kind, version in VERSIONS.items() if keys.has(version.pattern)), None)
    return kind and Identified(kind, VERSIONS[kind].title, "Load it with Load Temporal Layers.", takes="temporal")


# Names and sites

class Place(NamedTuple):
    """Where a tensor belongs, in the file's words: side (None is the middle), level, module there and block in it."""

    side: str | None
    level: int
    slot: str
    module: int = 0
    block: int = 0

    def __str__(self) -> str:
        where = f"{self.side}_blocks.{self.level}" if self.side else "mid_block"
        if self.slot == "post_level":
            return f"the temporal module after {where}"
        kind = "convolution" if self.slot == "post_res" else "attention"
        return f"the temporal {kind} of {where}.attentions.{self.module}"


def parse(key: str) -> tuple[Place, str] | None:
    """(place, suffix) of a temporal key in either naming, None for any other."""
    if match := INSIDE.fullmatch(key):
        side, level, module, conv, block, attention = match.groups()
        slot = "post_res" if conv else "in_attn_pre_ff"
        return Place(side, int(level or 0), slot, int(module), int(block or 0)), conv or attention
    if match := LEVEL.fullmatch(key):
        block, _, rest = match[3].partition(".")
        return Place(match[1], int(match[2] or 0), "post_level"), f"{RENAMED.get(block, block)}.{rest}"
    return None


class Shape(NamedTuple):
    """Of the UNet: ResBlocks in a level of the input side (the output side has one more), and levels."""

    resblocks: int
    levels: int

    def site(self, place: Place) -> Site:
        """`down_blocks.i.attentions.j` is input block 1 + (r + 1) i + j, `up_blocks.i.attentions.j` output block
        (r + 1) i + j; a level of the input side ends with its Downsample, the last one with its last ResBlock."""
        side, level, slot, module, block = place
        if side is None:
            return Site("middle", 0, slot, block)
        first = (self.resblocks + 1) * level
        if side == "up":
            return Site("output", first + (self.resblocks if slot == "post_level" else module), slot, block)
        if slot == "post_level":
            return Site("input", first + self.resblocks + (level + 1 < self.levels), slot)
        return Site("input", 1 + first + module, slot, block)


def unet_shape(file: TensorFile, title: str, places: set[Place]) -> Shape:
    """What the names say of the UNet; refused where a layer is missing, which would put the others at wrong sites."""
    found = [match for match in map(TRANSFORMER.match, file.shapes) if match]
    transformers = {(match[1], int(match[2] or 0), int(match[3])) for match in found} | {(None, 0, 0)}
    resblocks = most_resblocks((side, module) for side, _, module in transformers)
    levels = 1 + max(place.level for place in places)
    due = [Place(None, 0, "post_level")]
    due += [Place(side, level, "post_level") for side in ("down", "up") for level in range(levels)]
    for level in {level if side == "down" else levels - 1 - level for side, level, _ in transformers if side}:
        transformers |= {("down", level, module) for module in range(resblocks)}
        transformers |= {("up", levels - 1 - level, module) for module in range(resblocks + 1)}
    due += [Place(side, level, slot, module) for slot in ("post_res", "in_attn_pre_ff")
            for side, level, module in sorted(transformers, key=str)]
    missing = [place for place in due if place not in places]
    if missing:
        raise VideoLDMError(f"{file.name} looks like {title}, but lacks {missing[0]}. The file is incomplete: download "
                            "it again.")
    return Shape(resblocks, levels)


# Reading

def load(file: TensorFile, kind: str) -> TemporalFile:
    version = VERSIONS[kind]
    parsed = {key: parse(key) for key in file.shapes if TEMPORAL.match(key) and not ROTATION.fullmatch(key)}
    shape = unet_shape(file, version.title, {found[0] for found in parsed.values() if found})
    names, layers = {}, {}
    for key, found in parsed.items():
        if not found:
            names[key] = key        # a temporal tensor of no known layer: refused below, by its name
            continue
        site, suffix = shape.site(found[0]), found[1]
        names[key] = f"layers.{site.name}.{suffix}"
        layers.setdefault(site, {})[suffix] = file.shapes[key]
    bricks = tuple((site, brick_of(file.name, version.title, site, layers[site]))
                   for site in sorted(layers, key=run_order))
    params = StackParams(version.family, bricks, FRAMES, None, pool_spatial_norms=True)
    tensors = {names[key]: tensor for key, tensor in file.read(names).items()}
    require_complete(file.name, version.title, params, tensors)
    require_one_dtype(file.name, tensors)
    check_rotation(file, version.title)
    return TemporalFile(file.name, kind, version.title, params, tensors, version.schedule, BASE, None, version.licence,
                        dict(file.metadata), list(version.notes), noise=version.noise)


def brick_of(name: str, title: str, site: Site, shapes: dict[str, tuple]):
    """The layer at a site, from its tensors' shapes."""
    def size(suffix: str, dim: int) -> int:
        found = shapes.get(suffix, ())
        if len(found) <= dim:
            raise VideoLDMError(f"{name} looks like {title}, but its layer at {site.name} lacks {suffix}. The file is "
                                "incomplete: download it again.")
        return found[dim]
    if site.slot == "post_res":
        return ResidualConvParams(size("resblock_temporal.norm1.weight", 0))
    if site.slot == "post_level":
        return LevelParams(*(size("resblocks_3d_t.time_emb_proj.weight", dim) for dim in (0, 1)))
    return RotaryParams(size("norm_temporal.weight", 0),
                        size("attn_temporal.time_rel_pos_bias.relative_attention_bias.weight", 1))


def check_rotation(file: TensorFile, title: str):
    """Frequencies of the rotation are computed here. Files have them, none, or more beside them, by the version of the
    library that wrote them; other ones than those would be another model."""
    stored = file.read(key for key in file.shapes if (match := ROTATION.fullmatch(key)) and match[1] == "freqs")
    computed = rotation_angles(torch.ones(1))[0]
    for key, frequencies in stored.items():
        if not same(frequencies, computed):
            raise VideoLDMError(f"{file.name} looks like {title}, but {key} does not hold the frequencies of frame "
                                "positions that it is published with. It comes from a variant that this pack does not "
                                "know.")


def same(stored: Tensor, computed: Tensor) -> bool:
    """Within the rounding of the stored type, half precision's at least."""
    if stored.shape != computed.shape or not stored.dtype.is_floating_point:
        return False
    rounding = max(torch.finfo(stored.dtype).eps, torch.finfo(torch.float16).eps)
    return bool(((stored.float() - computed).abs() <= rounding * computed).all())
