"""The planes of a clip: three pictures that stand for a video.

    xy      (h, w)      what stays over time
    yt      (t, w)      what happens along each column
    xt      (t, h)      what happens along each row

Flattened, a clip is one row of `length` positions, in the order xy, yt, xt: `b c l`. The names are those of the
published code. There xy is reached by attention over t, yt over h and xt over w (PVDM, section 3.1).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import VideoLDMError


@dataclass(frozen=True)
class PlaneShape:
    """The grid that three planes stand for."""

    t: int      # frames
    h: int      # rows of patches
    w: int      # columns of patches

    @property
    def sides(self) -> tuple[tuple[int, int], ...]:
        """Height and width of xy, yt and xt."""
        return (self.h, self.w), (self.t, self.w), (self.t, self.h)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Positions of xy, yt and xt."""
        return tuple(high * wide for high, wide in self.sides)

    @property
    def length(self) -> int:
        """Positions of a row."""
        return sum(self.lengths)

    def split(self, row: Tensor) -> list[Tensor]:
        """A row `b c l` as the pictures xy `b c h w`, yt `b c t w` and xt `b c t h`."""
        if row.ndim != 3 or row.shape[2] != self.length:
            raise VideoLDMError(f"Planes of {self} have {self.length} positions, and these have "
                                f"{' x '.join(map(str, row.shape))} numbers.")
        parts = row.split(self.lengths, dim=2)
        return [part.unflatten(2, sides) for part, sides in zip(parts, self.sides, strict=True)]

    def __str__(self) -> str:
        return f"{self.t} frames of {self.h} x {self.w} patches"


def join(planes: list[Tensor]) -> Tensor:
    """Three pictures as a row `b c l`."""
    return torch.cat([plane.flatten(2) for plane in planes], dim=2)


def broadcast(planes: list[Tensor]) -> Tensor:
    """The sum of the planes xy, yt, xt, each repeated along the axis that it lacks: `b c t h w`."""
    xy, yt, xt = planes
    return xy.unsqueeze(2) + yt.unsqueeze(3) + xt.unsqueeze(4)
