"""Contact sheets: evenly spaced frames of a clip in one picture, which show its motion at a glance."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image

from ..atomic import StrPath, replace_on_success
from .pictures import as_shown
from .texts import png_text

GAP, GROUND = 4, 24             # pixels between frames, and the grey behind them
LONGEST_SIDE = 512              # of one frame on the sheet, pixels


class Sheet:
    """Collects frames of a clip of unknown length. It keeps fewer than twice the frames of the sheet.

    At first every frame is kept. When 2 `most` are kept, every second one is dropped and the stride doubles.
    """

    def __init__(self, most: int) -> None:
        """most: the largest number of frames on the sheet."""
        self.most, self.stride, self.seen = most, 1, 0
        self.kept: list[tuple[int, np.ndarray]] = []        # (number of the frame, its thumbnail)

    def add(self, frame: np.ndarray) -> None:
        """Add the clip's next frame, uint8 or uint16 (h, w, 3 or 4)."""
        if self.seen % self.stride == 0:
            self.kept.append((self.seen, thumbnail(frame)))
        self.seen += 1
        if len(self.kept) >= 2 * self.most:
            self.kept, self.stride = self.kept[::2], self.stride * 2

    def numbers(self) -> list[int]:
        """The numbers of the frames on the sheet: the first, the last one kept, and evenly spaced ones in between."""
        return [self.kept[k][0] for k in self._chosen()]

    def picture(self) -> np.ndarray:
        """The sheet, uint8 (H, W, 3): rows of frames in reading order."""
        return grid([self.kept[k][1] for k in self._chosen()])

    def _chosen(self) -> list[int]:
        count = min(self.most, len(self.kept))
        return np.linspace(0, len(self.kept) - 1, count).round().astype(int).tolist()


def thumbnail(frame: np.ndarray) -> np.ndarray:
    """A copy of the frame as uint8 (h, w, 3), reduced if its longest side is above LONGEST_SIDE.

    Transparent parts show a chequered ground.
    """
    frame = as_shown(frame)
    scale = LONGEST_SIDE / max(frame.shape[:2])
    if scale >= 1:
        return np.array(frame)
    width, height = (max(1, round(side * scale)) for side in (frame.shape[1], frame.shape[0]))
    return np.asarray(Image.fromarray(frame).resize((width, height), Image.Resampling.LANCZOS))


def columns(count: int, width: int, height: int) -> int:
    """The number of columns for `count` frames. It keeps empty cells few and the sheet nearly square."""
    def cost(across: int) -> float:
        down = math.ceil(count / across)
        shape = math.log(across * width / (down * height))
        return (across * down - count) / count * 2 + abs(shape)
    return min(range(1, count + 1), key=cost)


def grid(frames: list[np.ndarray]) -> np.ndarray:
    """A picture of frames of one size in rows, in reading order, with a gap around each."""
    height, width = frames[0].shape[:2]
    across = columns(len(frames), width, height)
    down = math.ceil(len(frames) / across)
    sheet = np.full((down * (height + GAP) + GAP, across * (width + GAP) + GAP, 3), GROUND, np.uint8)
    for k, frame in enumerate(frames):
        top, left = GAP + k // across * (height + GAP), GAP + k % across * (width + GAP)
        sheet[top:top + height, left:left + width] = frame
    return sheet


def write_sheet(path: StrPath, picture: np.ndarray, metadata: Mapping[str, Any] | None = None) -> None:
    """Write a sheet as PNG, completely or not at all. metadata: as in `write_video`."""
    with replace_on_success(path) as temporary:
        Image.fromarray(picture).save(temporary, format="PNG", pnginfo=png_text(metadata or {}), compress_level=4)
