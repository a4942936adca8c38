"""Loading files of motion modules: AnimateDiff's, Hotshot-XL's and diffusers' (docs/formats.md#animatediff)."""

import re
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import VideoLDMError
from ..formats.files import TensorFile
from ..formats.temporal_file import TemporalFile, require_distinct
from ..formats.tensor_names import Keys
from ..layers import MotionParams, interleaved_sinusoid
from ..slots import Site, run_order
from ..unet_names import BLOCK, UNetNames, resblocks_per_level
from .family import Facts

HEADS = 8
TRANSFORMER = "temporal_transformer."
PE = ".pos_encoder.pe"
NORM = "temporal_transformer.norm.weight"
SDXL_CHANNELS = {320, 640, 1280}


class Layout(NamedTuple):
    """The names of a published kind of file."""

    pattern: re.Pattern             # for all keys
    modules: str                    # how a module is called
    title: str                      # what the file is, with an article
    renamed: Mapping[str, str]      # {part of a suffix: AnimateDiff's name for it}


ANIMATEDIFF = Layout(
    re.compile(BLOCK + r"motion_modules\.(?P<module>\d+)\.temporal_transformer\.(?P<rest>.+)"), "motion_modules",
    "an AnimateDiff motion module", {})
HOTSHOT = Layout(
    re.compile(BLOCK + r"temporal_attentions\.(?P<module>\d+)\.(?P<rest>.+)"), "temporal_attentions",
    "a Hotshot-XL file", {".positional_encoding": ".pe"})
# One table of positions serves both attentions of a block.
DIFFUSERS = Layout(
    re.compile(BLOCK + r"motion_modules\.(?P<module>\d+)\.(?P<rest>(?:norm|proj_in|proj_out|transformer_blocks)\..+)"),
    "motion_modules", "a motion adapter in diffusers' naming",
    {"attn1.": "attention_blocks.0.", "attn2.": "attention_blocks.1.", "norm1.": "norms.0.", "norm2.": "norms.1.",
     "norm3.": "ff_norm.", "pos_embed.": "pos_encoder."})


class ModuleKey:
    """The parts of one key: side, level and number of its module, and the suffix in AnimateDiff's names."""

    def __init__(self, key: str, layout: Layout) -> None:
        match = layout.pattern.fullmatch(key)
        if match is None:
            raise ValueError(f"{key} is no key of this layout")
        self.side, self.level, self.module = match["side"], int(match["level"] or 0), int(match["module"])
        rest = match["rest"]
        for theirs, ours in layout.renamed.items():
            rest = rest.replace(theirs, ours)
        self.suffix = TRANSFORMER + rest

    def site(self, names: UNetNames) -> Site:
        """The site of the module."""
        return Site(*names.block(self.side, self.level, self.module), "post_attn")


# Detection

def is_layout(keys: Keys, layout: Layout) -> bool:
    """Whether a file holds modules of this layout only, for both sides of the network."""
    return keys.all(layout.pattern.pattern) and keys.has(r"down_blocks\.") and keys.has(r"up_blocks\.")


def is_with(keys: Keys, others: str, layout: Layout = ANIMATEDIFF) -> bool:
    """Whether a file holds modules of this layout and, beside them, tensors under these other names alone."""
    own = layout.pattern.pattern
    return keys.all(rf"{others}|{own}") and keys.has(own) and keys.has(others)


def is_sdxl(keys: Keys) -> bool:
    """Whether the modules have three levels with SDXL's channels, in any layout."""
    norm = re.compile(r"down_blocks\.\d+\.(?:motion_modules\.\d+(?:\.temporal_transformer)?|temporal_attentions\.\d+)\."
                      r"norm\.weight")
    channels = {sum(shape[:1]) for key, shape in keys.shapes.items() if norm.fullmatch(key)}
    return channels == SDXL_CHANNELS and len(keys.found(r"down_blocks\.(\d+)\.")) == 3


def table_length(keys: Keys) -> int:
    """The length of the position tables. 0: the file has none."""
    return (*keys.shape(r".*\.pos_(?:encoder|embed)\.(?:pe|positional_encoding)$"), 0, 0)[1]


# Reading

def load_modules(file: TensorFile, kind: str, facts: Facts, layout: Layout = ANIMATEDIFF,
                 norm_pooled: bool = False, changes: Mapping[str, Tensor] = MappingProxyType({})) -> TemporalFile:
    """Load the motion modules of a file.

    Args:
        file: the open file.
        kind: as in Identified.
        facts: of the version.
        layout: of the file's keys.
        norm_pooled: the modules' own norms pool over the frames of a clip.
        changes: {stack key: tensor} of the weights of changes of the spatial network. With them the file may hold
            tensors under other names than those of its modules; the caller has read these.

    Raises VideoLDMError for an incomplete or damaged file.
    """
    modules = {key: ModuleKey(key, layout) for key in file.shapes if not changes or layout.pattern.fullmatch(key)}
    names = UNetNames(resblocks_per_level((module.side, module.module) for module in modules.values()))
    check_levels(file.name, modules.values(), names.resblocks, layout)
    own = {key: f"layers.{module.site(names).name}.{module.suffix}" for key, module in modules.items()}
    require_distinct(file.name, facts.title, ((name, key) for key, name in own.items()))
    tensors = {own[key]: tensor for key, tensor in file.read(modules).items()}
    tables = {key: tensors.pop(key) for key in list(tensors) if key.endswith(PE)}
    length = length_of(file.name, facts.title, tables)
    learned = bool(tables) and not all(map(is_sinusoid, tables.values()))
    notes: tuple[str, ...] = ()
    if learned:
        tensors.update(table_of_each_attention(tables))
        notes = ("Its table of frame positions is not the sinusoid that AnimateDiff computes, so it is kept: "
                 f"clips of at most {length} frames.",)
    shapes: dict[Site, dict[str, tuple]] = {}
    for key, module in modules.items():
        shapes.setdefault(module.site(names), {})[module.suffix] = file.shapes[key]
    bricks = tuple((site, brick_of(file.name, facts.title, site, shapes[site], length if learned else 0, norm_pooled))
                   for site in sorted(shapes, key=run_order))
    params = facts.stack_params(bricks, length or facts.positions)
    return facts.temporal_file(file, kind, params, tensors | dict(changes), notes)


def check_levels(name: str, modules: Iterable[ModuleKey], resblocks: int, layout: Layout) -> None:
    """Raise VideoLDMError if a module is missing. The sites of the others are computed from the complete numbering."""
    present = {(module.side, module.level, module.module) for module in modules if module.side}
    levels = max(len({level for side, level, _ in present if side == wanted}) for wanted in ("down", "up"))
    # Only the first missing module is looked for. A key with a large number would make a list without end.
    missing = next((f"{side}_blocks.{level}.{layout.modules}.{number}"
                    for side, modules_of_level in (("down", resblocks), ("up", resblocks + 1))
                    for level in range(levels) for number in range(modules_of_level)
                    if (side, level, number) not in present), None)
    if missing:
        raise VideoLDMError(f"{name} looks like {layout.title}, but lacks {missing}. The file is incomplete: "
                            "download it again.")


def length_of(name: str, title: str, tables: Mapping[str, Tensor]) -> int:
    """The length of all position tables. 0: there are none. Raises VideoLDMError if they differ."""
    lengths = {table.shape[1] if table.ndim == 3 and len(table) == 1 else 0 for table in tables.values()}
    if len(lengths) > 1 or 0 in lengths:
        raise VideoLDMError(f"{name} looks like {title}, but its tables of frame positions have lengths "
                            f"{sorted(lengths)}. The file is damaged: download it again.")
    return lengths.pop() if lengths else 0


def table_of_each_attention(tables: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tables by the names of attentions. A table that a whole block has in common becomes two."""
    found = {}
    for key, table in tables.items():
        block, _, attention = key.removesuffix(PE).partition(".attention_blocks.")
        for number in [attention] if attention else "01":
            found[f"{block}.attention_blocks.{number}{PE}"] = table if attention else table.clone()
    return found


def is_sinusoid(table: Tensor) -> bool:
    """Whether a table `1 l c` equals the computed sinusoid, up to the rounding of its dtype or of half precision."""
    if not table.dtype.is_floating_point or table.shape[2] % 2:
        return False
    rounding = max(torch.finfo(table.dtype).eps, torch.finfo(torch.float16).eps)
    computed = interleaved_sinusoid(table.shape[1], table.shape[2])
    return bool((table[0].float() - computed).abs().max() <= rounding)


def check_tables(file: TensorFile, title: str, tables: list[str]) -> None:
    """Raise VideoLDMError for tables of frame positions that are not the computed ones. Those are left out."""
    for key, table in file.read(tables).items():
        if table.ndim != 3 or len(table) != 1 or not is_sinusoid(table):
            raise VideoLDMError(f"{file.name} looks like {title}, but its table of frame positions {key} is not the "
                                "one that AnimateDiff computes. It comes from a variant that this pack does not know.")


def brick_of(name: str, title: str, site: Site, shapes: Mapping[str, tuple], table: int,
             norm_pooled: bool) -> MotionParams:
    """The params of the layer at a site.

    Args:
        name: the file's name.
        title: what the file is, with an article.
        site: of the layer.
        shapes: {suffix: shape} of the layer's tensors.
        table: the length of a learned position table. 0: positions are computed.
        norm_pooled: as in MotionParams.
    """
    channels = sum(shapes.get(NORM, ())[:1])
    if not channels or channels % HEADS:
        raise VideoLDMError(f"{name} looks like {title}, but its module at {site.name} has no norm of a multiple of "
                            f"{HEADS} channels. The file is damaged: download it again.")
    blocks = count_numbers(shapes, r"temporal_transformer\.transformer_blocks\.(\d+)\.")
    attentions = count_numbers(shapes, r"temporal_transformer\.transformer_blocks\.0\.attention_blocks\.(\d+)\.")
    return MotionParams(channels, HEADS, blocks, attentions, table, norm_pooled)


def count_numbers(suffixes: Iterable[str], pattern: str) -> int:
    """1 + the largest number that the pattern's group matches. 0: nothing matches."""
    return max((int(match[1]) + 1 for match in (re.match(pattern, suffix) for suffix in suffixes) if match), default=0)
