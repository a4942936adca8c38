"""Layers for the Stable Diffusion x4 upscaler: LaVie's video super-resolution and Upscale-A-Video
(docs/formats.md#x4-upscaler-layers).

Both files are whole UNets with the same structure and different names. Only the temporal layers are loaded.

LaVie: it froze the spatial layers ("everything without `temporal` in its name"). So its temporal layers on the x4
upscaler are the published model. Its code states the noise schedule: the upscaler's first and last beta, evenly spaced
betas.

Upscale-A-Video: its code does not say which layers were trained. It reads the noise schedule from a file that comes
with the weights, which we have not seen. The schedule of the x4 upscaler is used, from which the model was made.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import VideoLDMError
from ..formats.files import TensorFile
from ..formats.temporal_file import (
    X4_UPSCALER,
    Base,
    Identified,
    NoiseLevels,
    Schedule,
    TemporalFile,
    require_distinct,
)
from ..formats.tensor_names import Keys
from ..layers import BrickParams, LevelParams, ResidualConvParams, RotaryParams
from ..layers.position import rotation_angles
from ..slots import Site, run_order
from ..spatial_changes import POOLED_NORMS
from ..unet_names import UNetNames, resblocks_per_level
from .family import Facts, Family

BASE = Base(X4_UPSCALER, 1024)
FRAMES = 8
MOST_PARTS = 64         # bound for the levels of a UNet and the ResBlocks of a level; real ones have far fewer
INSIDE = re.compile(r"(?:(down|up)_blocks\.(\d+)|mid_block)\.attentions\.(\d+)\."
                    r"(?:(resblock_temporal\..+)|transformer_blocks\.(\d+)\.((?:norm|attn)_temporal\..+))")
LEVEL = re.compile(r"(?:(down|up)_temp(?:oral)?_blocks\.(\d+)|mid_temp(?:oral)?_block)\.(.+)")
TRANSFORMER = re.compile(r"(?:(down|up)_blocks\.(\d+)|mid_block)\.attentions\.(\d+)\.")
ROTATION = re.compile(r"(?:.*\.attn_temporal\.rotary_emb|temporal_rotary_emb)\.(.+)")
TEMPORAL = re.compile(r".*(?:temporal|_temp_)")
RENAMED = {"resblocks_3d_temporal": "resblocks_3d_t", "resblocks_3d_spatial": "resblocks_3d_s"}


@dataclass(frozen=True)
class Version:
    """One of the two published files."""

    facts: Facts
    pattern: str        # matches a key that only this file has


VERSIONS = {
    "lavie_vsr": Version(Facts(
        "LaVie VSR", "LaVie's video super-resolution UNet", BASE, Schedule("sqrt_linear", 0.0001, 0.02, "v"), FRAMES,
        "open for academic research, commercial use on application to LaVie's authors", spatial=(POOLED_NORMS,),
        notes=("The spatial layers in the file are not used: LaVie left them as the x4 upscaler has them.",
               "LaVie sampled with ddim, 50 steps, cfg 5, noise level 50 and the negative prompt \"blur, worst "
               "quality\"."),
        noise=NoiseLevels("LaVie", 350, 50)), r"down_temporal_blocks\.\d+\.resblocks_3d_t\."),
    "upscale_a_video": Version(Facts(
        "Upscale-A-Video", "the UNet of Upscale-A-Video", BASE, Schedule("linear", 0.0001, 0.02, "v"), FRAMES,
        "S-Lab License 1.0, non-commercial", spatial=(POOLED_NORMS,),
        notes=("The spatial layers in the file are not used. Whether they were trained is not known: if they were, "
               "this is not the published model.",
               "The noise schedule it was trained with was not seen: the x4 upscaler's own is taken.",
               "Its authors sample with 30 steps, cfg 6, noise level 120 (0 to 200), \"best quality, extremely "
               "detailed\" behind the prompt and the negative prompt \"blur, worst quality\"."),
        noise=NoiseLevels("Upscale-A-Video", 350, 120)), r"down_temp_blocks\.\d+\.resblocks_3d_temporal\."),
}


def detect(keys: Keys, metadata: Mapping[str, str]) -> Identified | None:
    """Recognise either file by a key of its own."""
    kind = next((kind for kind, version in VERSIONS.items() if keys.has(version.pattern)), None)
    return VERSIONS[kind].facts.identified(kind) if kind else None


# Names and sites

class LayerName(NamedTuple):
    """A layer as the file numbers it."""

    side: str | None    # down, up, or None for the middle
    level: int
    slot: str
    module: int = 0     # the number of the module in its level
    block: int = 0      # the number of the transformer block in its module

    def site(self, names: UNetNames) -> Site:
        """The site of the layer."""
        if self.slot == "post_level":
            return Site(*names.after_level(self.side, self.level), self.slot)
        return Site(*names.block(self.side, self.level, self.module), self.slot, self.block)

    def __str__(self) -> str:
        where = f"{self.side}_blocks.{self.level}" if self.side else "mid_block"
        if self.slot == "post_level":
            return f"the temporal module after {where}"
        kind = "convolution" if self.slot == "post_res" else "attention"
        return f"the temporal {kind} of {where}.attentions.{self.module}"


def parse(key: str) -> tuple[LayerName, str] | None:
    """(layer, suffix) of a temporal key in either naming. None for other keys."""
    if match := INSIDE.fullmatch(key):
        side, level, module, conv, block, attention = match.groups()
        slot = "post_res" if conv else "in_attn_pre_ff"
        return LayerName(side, int(level or 0), slot, int(module), int(block or 0)), conv or attention
    if match := LEVEL.fullmatch(key):
        block, _, rest = match[3].partition(".")
        return LayerName(match[1], int(match[2] or 0), "post_level"), f"{RENAMED.get(block, block)}.{rest}"
    return None


def names_of(file: TensorFile, title: str, layers: set[LayerName]) -> UNetNames:
    """The numbering of the UNet.

    Raises VideoLDMError if a layer is missing, because the sites of the others would be wrong.
    """
    found = [match for match in map(TRANSFORMER.match, file.shapes) if match]
    transformers = {(match[1], int(match[2] or 0), int(match[3])) for match in found} | {(None, 0, 0)}
    resblocks = resblocks_per_level((side, module) for side, _, module in transformers)
    levels = 1 + max((layer.level for layer in layers), default=0)
    if max(resblocks, levels) > MOST_PARTS:     # a key with a large number would make lists without end
        raise VideoLDMError(f"{file.name} looks like {title}, but its names number more than {MOST_PARTS} modules. The "
                            "file is damaged or from an unknown variant.")
    due = [LayerName(None, 0, "post_level")]
    due += [LayerName(side, level, "post_level") for side in ("down", "up") for level in range(levels)]
    for level in {level if side == "down" else levels - 1 - level for side, level, _ in transformers if side}:
        transformers |= {("down", level, module) for module in range(resblocks)}
        transformers |= {("up", levels - 1 - level, module) for module in range(resblocks + 1)}
    due += [LayerName(side, level, slot, module) for slot in ("post_res", "in_attn_pre_ff")
            for side, level, module in sorted(transformers, key=str)]
    missing = [layer for layer in due if layer not in layers]
    if missing:
        raise VideoLDMError(f"{file.name} looks like {title}, but lacks {missing[0]}. The file is incomplete: download "
                            "it again.")
    return UNetNames(resblocks, levels)


# Reading

def load(file: TensorFile, found: Identified) -> TemporalFile:
    """Load a file that `detect` has recognised. Raises VideoLDMError if it is damaged."""
    facts = VERSIONS[found.kind].facts
    parsed = {key: parse(key) for key in file.shapes if TEMPORAL.match(key) and not ROTATION.fullmatch(key)}
    unet = names_of(file, facts.title, {layer[0] for layer in parsed.values() if layer})
    names: dict[str, str] = {}
    shapes: dict[Site, dict[str, tuple]] = {}
    for key, layer in parsed.items():
        if not layer:
            names[key] = key        # a temporal tensor of an unknown layer, which is refused below by its name
            continue
        site, suffix = layer[0].site(unet), layer[1]
        names[key] = f"layers.{site.name}.{suffix}"
        shapes.setdefault(site, {})[suffix] = file.shapes[key]
    bricks = tuple((site, brick_of(file.name, facts.title, site, shapes[site]))
                   for site in sorted(shapes, key=run_order))
    require_distinct(file.name, facts.title, ((own, key) for key, own in names.items()))
    tensors = {names[key]: tensor for key, tensor in file.read(names).items()}
    content = facts.temporal_file(file, found.kind, facts.stack_params(bricks, None), tensors)
    check_rotation(file, facts.title)
    return content


def brick_of(name: str, title: str, site: Site, shapes: dict[str, tuple]) -> BrickParams:
    """The params of the layer at a site, from its tensors' shapes. Raises VideoLDMError if a tensor is missing."""
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


def check_rotation(file: TensorFile, title: str, pattern: re.Pattern = ROTATION) -> None:
    """Raise VideoLDMError for rotation frequencies that differ from those computed here.

    Some files hold the frequencies and some do not, depending on the library that wrote them.
    """
    stored = file.read(key for key in file.shapes if pattern.match(key) and key.endswith(".freqs"))
    computed = rotation_angles(torch.ones(1))[0]
    for key, frequencies in stored.items():
        if not same(frequencies, computed):
            raise VideoLDMError(f"{file.name} looks like {title}, but {key} does not hold the frequencies of frame "
                                "positions that it is published with. It comes from a variant that this pack does not "
                                "know.")


def same(stored: Tensor, computed: Tensor) -> bool:
    """Whether two tensors agree, up to the rounding of the stored dtype or of half precision."""
    if stored.shape != computed.shape or not stored.dtype.is_floating_point:
        return False
    rounding = max(torch.finfo(stored.dtype).eps, torch.finfo(torch.float16).eps)
    return bool(((stored.float() - computed).abs() <= rounding * computed).all())


FAMILY = Family("LaVie's video super-resolution and Upscale-A-Video's UNet for the Stable Diffusion x4 upscaler",
                "temporal", detect, load)
