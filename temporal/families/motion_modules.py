"""Reading files of motion modules: what AnimateDiff's family and Hotshot-XL have in common (docs/formats.md#animatediff)."""

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from ..errors import VideoLDMError
from ..formats.files import TensorFile
from ..formats.temporal_file import TemporalFile
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

# The published layouts: {how a module is called: (a pattern of its keys, other suffixes than AnimateDiff's)}.
Layout = tuple[re.Pattern, Mapping[str, str]]
ANIMATEDIFF: Layout = (re.compile(BLOCK + r"motion_modules\.(?P<module>\d+)\.temporal_transformer\.(?P<rest>.+)"), {})
HOTSHOT: Layout = (re.compile(BLOCK + r"temporal_attentions\.(?P<module>\d+)\.(?P<rest>.+)"),
                   {".positional_encoding": ".pe"})


class ModuleKey:
    """The parts of one key: side, level and number of its module, and the suffix in AnimateDiff's words."""

    def __init__(self, key: str, layout: Layout):
        pattern, renamed = layout
        match = pattern.fullmatch(key)
        if match is None:
            raise ValueError(f"{key} is no key of this layout")
        self.side, self.level, self.module = match["side"], int(match["level"] or 0), int(match["module"])
        rest = match["rest"]
        for theirs, ours in renamed.items():
            rest = rest.replace(theirs, ours)
        self.suffix = TRANSFORMER + rest

    def site(self, names: UNetNames) -> Site:
        return Site(*names.block(self.side, self.level, self.module), "post_attn")


# Detection

def is_layout(keys: Keys, layout: Layout) -> bool:
    """A file of such modules and nothing else, with both sides of the network."""
    return keys.all(layout[0].pattern) and keys.has(r"down_blocks\.") and keys.has(r"up_blocks\.")


def is_sdxl(keys: Keys) -> bool:
    """Three levels of SDXL's channels, in either layout."""
    norm = re.compile(r"down_blocks\.\d+\.(?:motion_modules\.\d+\.temporal_transformer|temporal_attentions\.\d+)\."
                      r"norm\.weight")
    channels = {sum(shape[:1]) for key, shape in keys.shapes.items() if norm.fullmatch(key)}
    return channels == SDXL_CHANNELS and len(keys.found(r"down_blocks\.(\d+)\.")) == 3


def table_length(keys: Keys) -> int:
    """Frames of the position tables, 0 without one."""
    return (*keys.shape(r".*\.pos_encoder\.(?:pe|positional_encoding)$"), 0, 0)[1]


# Reading

def load_modules(file: TensorFile, kind: str, facts: Facts, layout: Layout = ANIMATEDIFF,
                 norm_pooled: bool = False) -> TemporalFile:
    """The content of a file of motion modules; refused where it is incomplete or damaged."""
    modules = {key: ModuleKey(key, layout) for key in file.shapes}
    names = UNetNames(resblocks_per_level((module.side, module.module) for module in modules.values()))
    check_levels(file.name, modules.values(), names.resblocks, layout)
    tensors = {f"layers.{modules[key].site(names).name}.{modules[key].suffix}": tensor
               for key, tensor in file.read(file.shapes).items()}
    tables = {key: tensors.pop(key) for key in list(tensors) if key.endswith(PE)}
    length = length_of(file.name, facts.title, tables)
    learned = bool(tables) and not all(map(is_sinusoid, tables.values()))
    notes: tuple[str, ...] = ()
    if learned:
        tensors.update(tables)
        notes = (f"Its table of frame positions is not the sinusoid that AnimateDiff computes, so it is kept: "
                 f"clips of at most {length} frames.",)
    shapes: dict[Site, dict[str, tuple]] = {}
    for key, module in modules.items():
        shapes.setdefault(module.site(names), {})[module.suffix] = file.shapes[key]
    bricks = tuple((site, brick_of(file.name, facts.title, site, shapes[site], length if learned else 0, norm_pooled))
                   for site in sorted(shapes, key=run_order))
    params = facts.stack_params(bricks, length or facts.positions)
    return facts.temporal_file(file, kind, params, tensors, notes)


def check_levels(name: str, modules: Iterable[ModuleKey], resblocks: int, layout: Layout):
    """Every level has all its modules: a file that lacks one would put the others at the wrong sites."""
    present = {(module.side, module.level, module.module) for module in modules if module.side}
    levels = max(len({level for side, level, _ in present if side == wanted}) for wanted in ("down", "up"))
    kind = "motion_modules" if layout is ANIMATEDIFF else "temporal_attentions"
    # Not a list of all that are missing: a name with a large number in it would make one without end.
    missing = next((f"{side}_blocks.{level}.{kind}.{number}"
                    for side, count in (("down", resblocks), ("up", resblocks + 1))
                    for level in range(levels) for number in range(count) if (side, level, number) not in present), None)
    if missing:
        what = "an AnimateDiff motion module" if layout is ANIMATEDIFF else "a Hotshot-XL file"
        raise VideoLDMError(f"{name} looks like {what}, but lacks {missing}. The file is incomplete: download it "
                            "again.")


def length_of(name: str, title: str, tables: Mapping[str, Tensor]) -> int:
    lengths = {table.shape[1] if table.ndim == 3 and len(table) == 1 else 0 for table in tables.values()}
    if len(lengths) > 1 or 0 in lengths:
        raise VideoLDMError(f"{name} looks like {title}, but its tables of frame positions have lengths "
                            f"{sorted(lengths)}. The file is damaged: download it again.")
    return lengths.pop() if lengths else 0


def is_sinusoid(table: Tensor) -> bool:
    """Whether a table `1 l c` is the computed one within its rounding (at least half precision's)."""
    if not table.dtype.is_floating_point or table.shape[2] % 2:
        return False
    rounding = max(torch.finfo(table.dtype).eps, torch.finfo(torch.float16).eps)
    computed = interleaved_sinusoid(table.shape[1], table.shape[2])
    return bool((table[0].float() - computed).abs().max() <= rounding)


def brick_of(name: str, title: str, site: Site, shapes: Mapping[str, tuple], table: int,
             norm_pooled: bool) -> MotionParams:
    """The layer at a site, from its tensors' shapes. table: length of its learned positions, 0: computed."""
    channels = sum(shapes.get(NORM, ())[:1])
    if not channels or channels % HEADS:
        raise VideoLDMError(f"{name} looks like {title}, but its module at {site.name} has no norm of a multiple of "
                            f"{HEADS} channels. The file is damaged: download it again.")
    blocks = count(shapes, r"temporal_transformer\.transformer_blocks\.(\d+)\.")
    attentions = count(shapes, r"temporal_transformer\.transformer_blocks\.0\.attention_blocks\.(\d+)\.")
    return MotionParams(channels, HEADS, blocks, attentions, table, norm_pooled)


def count(suffixes: Iterable[str], pattern: str) -> int:
    """One more than the largest number that the pattern's group finds."""
    return max((int(match[1]) + 1 for match in (re.match(pattern, suffix) for suffix in suffixes) if match), default=0)
