"""AnimateDiff motion modules for Stable Diffusion 1.x (formats.md, a): v1, v2, v3, AnimateLCM, LongAnimateDiff."""

import re
from dataclasses import dataclass
from typing import Mapping

import torch
from torch import Tensor

from ..errors import VideoLDMError
from ..layers import interleaved_sinusoid
from ..sites import Site
from ..stack import MotionParams, StackParams
from .files import TensorFile
from .keys import Keys
from .record import Base, Identified, SamplerHint, Schedule, TemporalFile, require_complete, require_one_dtype

KEY = re.compile(r"(?:(down|up)_blocks\.(\d+)|mid_block)\.motion_modules\.(\d+)\.(temporal_transformer\..+)")
PE = ".pos_encoder.pe"
HEADS = 8
SDXL_CHANNELS = {320, 640, 1280}
BASE = Base("Stable Diffusion 1.x", 768)
SCHEDULE = Schedule("sqrt_linear", 0.00085, 0.012, "eps")
FPS = 8.0       # the rate at which the authors save their clips
UNSTATED = "not stated by its authors"


@dataclass(frozen=True)
class Version:
    """What a published version of the module brings besides its weights."""

    title: str
    frames: int
    licence: str
    positions: int = 32                 # where the file has no table
    pool_spatial_norms: bool = False
    notes: tuple[str, ...] = ()
    hint: SamplerHint | None = None


VERSIONS = {
    "animatediff_v1": Version(
        "an AnimateDiff v1 motion module", 16, "Apache-2.0", pool_spatial_norms=True,
        notes=("Version 1: the image model's norms see all frames of a clip together.",)),
    "animatediff_v2": Version(
        "an AnimateDiff v2 motion module", 16, "Apache-2.0",
        notes=("LongAnimateDiff's 32-frame file has the same tensors and runs the same way.",)),
    "animatediff_v3": Version("an AnimateDiff v3 motion module", 16, "Apache-2.0"),
    "longanimatediff": Version(
        "a LongAnimateDiff motion module", 64, UNSTATED,
        notes=("Its authors run it on 16 to 64 frames with a strength of 1.15.",)),
    "animatelcm": Version(
        "an AnimateLCM motion module", 16, UNSTATED, positions=64,
        hint=SamplerHint("lcm", "lcm", cfg=(1.0, 2.0), steps=(4, 8)),
        notes=("A distilled module: those few steps need AnimateLCM's own LoRA on the image model too.",)),
}


def detect(keys: Keys) -> Identified | None:
    """A file of motion modules and nothing else; look-alikes with tensors of other kinds are left to others.py."""
    if not keys.all(KEY.pattern) or not (keys.has(r"down_blocks\.") and keys.has(r"up_blocks\.")):
        return None
    if levels(keys) == SDXL_CHANNELS and len(keys.found(r"down_blocks\.(\d+)\.")) == 3:
        return None
    kind = version_of(keys)
    return Identified(kind, VERSIONS[kind].title, "Load it with Load Temporal Layers.", takes="temporal")


def levels(keys: Keys) -> set[int]:
    return {sum(shape[:1]) for key, shape in keys.shapes.items()
            if key.startswith("down_blocks.") and key.endswith("temporal_transformer.norm.weight")}


def version_of(keys: Keys) -> str:
    length = sum(keys.shape(r".*\.pos_encoder\.pe$")[1:2])
    if keys.has(r"mid_block\."):
        if not length:
            return "animatelcm"
        return "longanimatediff" if length > 32 else "animatediff_v2"
    return "animatediff_v1" if 0 < length <= 24 else "animatediff_v3"


# Sites and names

def resblocks_per_level(keys) -> int:
    """ResBlocks per level of the input side, from the modules' ordinals there (the output side has one more)."""
    found = [match for match in map(KEY.match, keys) if match]
    return most_resblocks((match[1], int(match[3])) for match in found)


def most_resblocks(modules) -> int:
    """The same from (side, ordinal) of each module."""
    return max((ordinal + (side == "down") for side, ordinal in modules if side in ("down", "up")), default=1)


def site_of(part: str | None, level: int, ordinal: int, resblocks: int) -> Site:
    """`down_blocks.i.*.j` is input block 1 + (r + 1) i + j, `up_blocks.i.*.j` output block (r + 1) i + j."""
    first = (resblocks + 1) * level + ordinal
    if part == "down":
        return Site("input", 1 + first, "post_attn")
    return Site("output", first, "post_attn") if part == "up" else Site("middle", 0, "post_attn")


def parse(key: str, resblocks: int) -> tuple[Site, str]:
    """(site, suffix) of a motion module's key."""
    match = KEY.fullmatch(key)
    return site_of(match[1], int(match[2] or 0), int(match[3]), resblocks), match[4]


# Reading

def load(file: TensorFile, kind: str) -> TemporalFile:
    version = VERSIONS[kind]
    resblocks = resblocks_per_level(file.shapes)
    found = file.read(file.shapes)
    tensors = {}
    for key, tensor in found.items():
        site, suffix = parse(key, resblocks)
        tensors[f"layers.{site.name}.{suffix}"] = tensor
    check_levels(file, resblocks)
    tables = {key: tensors.pop(key) for key in list(tensors) if key.endswith(PE)}
    length = table_length(file.name, version.title, tables)
    learned = bool(tables) and not all(map(is_sinusoid, tables.values()))
    if learned:
        tensors.update(tables)
    params = params_of(file, resblocks, version, length, learned)
    require_complete(file.name, version.title, params, tensors)
    require_one_dtype(file.name, tensors)
    notes = list(version.notes)
    if learned:
        notes.append(f"Its table of frame positions is not the sinusoid that AnimateDiff computes, so it is kept: "
                     f"clips of at most {length} frames.")
    return TemporalFile(file.name, kind, version.title, params, tensors, SCHEDULE, BASE, FPS, version.licence,
                        dict(file.metadata), notes, version.hint)


def check_levels(file: TensorFile, resblocks: int):
    """Every level has all its modules: a file that lacks one would put the others at the wrong places."""
    present = {match.group(1, 2, 3) for match in map(KEY.match, file.shapes) if match[1]}
    sides = {side: {int(level) for s, level, _ in present if s == side} for side in ("down", "up")}
    count = max(map(len, sides.values()))
    # Not a list of all that are missing: a name with a large number in it would make one without end.
    missing = next((f"{side}_blocks.{level}.motion_modules.{ordinal}"
                    for side, modules in (("down", resblocks), ("up", resblocks + 1))
                    for level in range(count) for ordinal in range(modules)
                    if (side, str(level), str(ordinal)) not in present), None)
    if missing:
        raise VideoLDMError(f"{file.name} looks like an AnimateDiff motion module, but lacks {missing}. The file is "
                            "incomplete: download it again.")


def table_length(name: str, title: str, tables: Mapping[str, Tensor]) -> int:
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


def params_of(file: TensorFile, resblocks: int, version: Version, length: int, learned: bool) -> StackParams:
    modules: dict[Site, dict[str, tuple]] = {}
    for key, shape in file.shapes.items():
        site, suffix = parse(key, resblocks)
        modules.setdefault(site, {})[suffix] = shape
    order = {"input": 0, "middle": 1, "output": 2}
    bricks = []
    for site in sorted(modules, key=lambda site: (order[site.part], site.index)):
        channels = sum(modules[site].get("temporal_transformer.norm.weight", ())[:1])
        if not channels or channels % HEADS:
            raise VideoLDMError(f"{file.name} looks like {version.title}, but its module at {site.name} has no norm "
                                f"of a multiple of {HEADS} channels. The file is damaged: download it again.")
        blocks = count(modules[site], r"temporal_transformer\.transformer_blocks\.(\d+)\.")
        attentions = count(modules[site], r"temporal_transformer\.transformer_blocks\.0\.attention_blocks\.(\d+)\.")
        kept = length if learned else 0
        bricks.append((site, MotionParams(channels, HEADS, blocks, attentions, kept, norm_pooled=False)))
    return StackParams(version.title.split(" ", 1)[1].removesuffix(" motion module"), tuple(bricks), version.frames,
                       length or version.positions, version.pool_spatial_norms)


def count(suffixes, pattern: str) -> int:
    """One more than the largest ordinal that the pattern's group finds."""
    return max((int(match[1]) + 1 for match in (re.match(pattern, suffix) for suffix in suffixes) if match), default=0)
