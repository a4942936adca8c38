"""Strength of temporal layers by frame and by region.

A curve gives each frame a number. A mask gives each place a number: white is 1, black is 0. Where both are given, they
multiply. The result is a map `n h w`, or `n 1 1` without a mask, for n images.

A layer turns features x into y. With a map s the features become `x + s (y - x)`. Where s is 0 they are exactly x, and
where s is 1 exactly y.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from .errors import VideoLDMError

LINEAR, HOLD = "linear", "hold"
MOST = 2.0                          # the largest strength in a curve, as on Load Temporal Layers
EXAMPLE = "Write one number for each frame, such as 0 0.5 1, or frames with their strengths, such as 0: 0.2, 15: 1."
NUMBER = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)")
LONGEST_QUOTE = 40                  # characters of a wrong text that a sentence quotes


@dataclass(frozen=True)
class Curve:
    """A strength for every frame of a video."""

    points: tuple[tuple[int, float], ...]   # (frame number, strength), by frame number; at least one
    interpolation: str = LINEAR             # LINEAR: a straight line from point to point. HOLD: steps

    @property
    def last(self) -> int:
        """The highest frame number that it names."""
        return self.points[-1][0]

    def values(self, frames: Sequence[int]) -> Tensor:
        """The strengths of some frames. Before the first point that point's strength holds, after the last the last."""
        return torch.tensor([self.value(frame) for frame in frames], dtype=torch.float32)

    def value(self, frame: int) -> float:
        if frame <= self.points[0][0]:
            return self.points[0][1]
        for (start, first), (end, second) in pairwise(self.points):
            if start <= frame < end:
                share = 0 if self.interpolation == HOLD else (frame - start) / (end - start)
                return first + share * (second - first)
        return self.points[-1][1]


def read_curve(text: str, interpolation: str = LINEAR, none: str = "the image model alone") -> Curve | None:
    """The curve in a widget's text: a list, or pairs `frame: strength`. None for an empty text.

    The n-th number of a list is the strength of frame n. none: what a strength of 0 is, for a message. Raises
    VideoLDMError for any other text.
    """
    entries = [part for part in re.split(r"[,;\s]+", re.sub(r"\s*:\s*", ":", text.strip())) if part]
    if not entries:
        return None
    pairs = [entry.split(":") if ":" in entry else [str(n), entry] for n, entry in enumerate(entries)]
    if len({":" in entry for entry in entries}) > 1:
        raise VideoLDMError(f"The curve {quoted(text)} has frame numbers in some places and none in others. {EXAMPLE}")
    points: dict[int, float] = {}
    for entry, pair in zip(entries, pairs, strict=True):
        if len(pair) != 2 or not re.fullmatch(r"\d{1,6}", pair[0]) or not NUMBER.fullmatch(pair[1]):
            raise VideoLDMError(f"{quoted(entry)} in the curve is no strength. {EXAMPLE}")
        frame, strength = int(pair[0]), float(pair[1])
        if not 0 <= strength <= MOST:
            raise VideoLDMError(f"The curve gives frame {frame} the strength {strength:g}, and strengths go from 0, "
                                f"{none}, to {MOST:g}. 1 is as trained.")
        if frame in points:
            raise VideoLDMError(f"The curve names frame {frame} twice. Keep one of the two.")
        points[frame] = strength
    return Curve(tuple(sorted(points.items())), interpolation)


def quoted(text: str) -> str:
    return f"'{text[:LONGEST_QUOTE]}'" + ("..." if len(text) > LONGEST_QUOTE else "")


@dataclass(frozen=True, eq=False)
class FrameStrength:
    """A curve, a mask or both."""

    curve: Curve | None             # None: 1 in all frames
    mask: Tensor | None             # `1 h w` for all frames, or `t h w`, one for each frame of the video. None: 1

    def check(self, length: int, size: tuple[int, ...]) -> None:
        """Raise VideoLDMError if the mask fits neither the number of frames nor the proportions of the picture.

        length: frames of the video. size: height and width of its latents.
        """
        if self.mask is None:
            return
        count, height, width = self.mask.shape
        if count not in (1, length):
            raise VideoLDMError(f"Layer Strength has {count} masks, and the video has {length} frames. Give one mask "
                                "for all frames, or one for each.")
        # A side may be rounded to whole latents.
        if abs(size[0] * width - size[1] * height) >= max(width, height):
            raise VideoLDMError(f"The mask of Layer Strength is {width}x{height} pixels, and the frames have other "
                                f"proportions ({size[1]}x{size[0]} latents). Resize or crop the mask to the frames.")

    def of(self, frames: Sequence[int], size: tuple[int, ...]) -> Tensor:
        """The map `n h w` of some frames at a size; `n 1 1` without a mask.

        frames: their numbers in the video. size: height and width of its latents.
        """
        values = torch.ones(len(frames)) if self.curve is None else self.curve.values(frames)
        if self.mask is None:
            return values[:, None, None]
        rows = self.mask if len(self.mask) == 1 else self.mask[list(frames)]
        return values[:, None, None] * resized(rows, size)


def resized(strengths: Tensor, size: tuple[int, ...]) -> Tensor:
    """A map at the height and width of some features: each place gets the mean over its area.

    So a place is 0 only where all of its area is 0, and 1 only where all of it is 1. A map `n 1 1` stays as it is.
    """
    if strengths.shape[1:] == (1, 1) or strengths.shape[1:] == tuple(size):
        return strengths
    return adaptive_avg_pool2d(strengths, tuple(size))


def acting_images(strengths: Tensor) -> Tensor:
    """Which images of a map `n h w` have strength somewhere."""
    return strengths.flatten(1).any(dim=1)


def blended(without: Tensor, changed: Tensor, strengths: Tensor) -> Tensor:
    """`without + strengths (changed - without)`, exact where the strength is 0 or 1, also beside NaN and infinity."""
    changed, strengths = changed.to(without.dtype), strengths.to(without.dtype)
    mixed = torch.lerp(without, changed, strengths)
    return torch.where(strengths == 0, without, torch.where(strengths == 1, changed, mixed))
