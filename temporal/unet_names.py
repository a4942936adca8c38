"""From diffusers' names of a UNet's blocks to LDM's numbers. All families use these rules.

With r ResBlocks in each level of the input side:
    down_blocks.i.*.j       input block 1 + (r + 1) i + j
    mid_block               the middle block
    up_blocks.i.*.j         output block (r + 1) i + j
"""

from collections.abc import Iterable
from typing import NamedTuple

BLOCK = r"(?:(?P<side>down|up)_blocks\.(?P<level>\d+)|mid_block)\."     # the middle block has side None


class UNetNames(NamedTuple):
    """The numbering of one UNet."""

    resblocks: int      # ResBlocks in a level of the input side. The output side has one more
    levels: int = 1     # number of resolutions. Only `after_level` needs it

    def block(self, side: str | None, level: int, module: int = 0) -> tuple[str, int]:
        """(part, index) of the LDM block with module number `module` of a level."""
        first = (self.resblocks + 1) * level + module
        if side == "down":
            return "input", 1 + first
        return ("output", first) if side == "up" else ("middle", 0)

    def after_level(self, side: str | None, level: int) -> tuple[str, int]:
        """(part, index) of the last LDM block of a level: its Downsample, its Upsample, or its last ResBlock."""
        if side == "down":
            return self.block(side, level, self.resblocks - (level + 1 == self.levels))
        return self.block(side, level, self.resblocks)

    def module(self, side: str | None, level: int, kind: str, number: int) -> str:
        """LDM's name of `{side}_blocks.{level}.{kind}.{number}`. kind: "resnets" or "attentions"."""
        part, index = self.block(side, level, number)
        if part == "middle":
            return f"middle_block.{2 * number if kind == 'resnets' else 1}"
        return f"{part}_blocks.{index}.{0 if kind == 'resnets' else 1}"


def resblocks_per_level(modules: Iterable[tuple[str | None, int]]) -> int:
    """The ResBlocks in a level of the input side. modules: (side, number in its level) of all modules of a network."""
    return max((number + (side == "down") for side, number in modules if side in ("down", "up")), default=1)
