"""A contact sheet: evenly spaced frames of a clip in one picture, so that motion can be judged at a glance."""

import math

import numpy as np
from PIL import Image

from ..atomic import replace_on_success
from .write import png_text

GAP, GROUND = 4, 24             # pixels between frames, and the grey behind them
LONGEST_SIDE = 512              # of one frame on the sheet, pixels


class Sheet:
    """Collects frames of a clip whose length is not known beforehand, in at most twice the memory of the sheet.

    Every frame is kept until there are 2 `most`; then every other one goes, and only every second comes in, and so on.
    """

    def __init__(self, most):
        self.most, self.stride, self.seen, self.kept = most, 1, 0, []

    def add(self, frame):
        """Offer the clip's next frame, uint8 (h, w, 3)."""
        if self.seen % self.stride == 0:
            self.kept.append((self.seen, thumbnail(frame)))
        self.seen += 1
        if len(self.kept) >= 2 * self.most:
            self.kept, self.stride = self.kept[::2], self.stride * 2

    def numbers(self):
        """Which frames of the clip are on the sheet: the first, the last one kept, and even steps between."""
        return [self.kept[k][0] for k in self._chosen()]

    def picture(self):
        """The sheet, uint8 (H, W, 3): rows of frames in reading order."""
        return grid([self.kept[k][1] for k in self._chosen()])

    def _chosen(self):
        count = min(self.most, len(self.kept))
        return np.linspace(0, len(self.kept) - 1, count).round().astype(int).tolist()


def thumbnail(frame):
    """The frame itself if its longest side fits, else a reduced one."""
    scale = LONGEST_SIDE / max(frame.shape[:2])
    if scale >= 1:
        return np.array(frame)
    size = [max(1, round(side * scale)) for side in (frame.shape[1], frame.shape[0])]
    return np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.LANCZOS))


def columns(count, width, height):
    """The number of columns that wastes fewest cells and then makes the sheet squarest."""
    def cost(across):
        down = math.ceil(count / across)
        shape = math.log(across * width / (down * height))
        return (across * down - count) / count * 2 + abs(shape)
    return min(range(1, count + 1), key=cost)


def grid(frames):
    """Lay frames of one size out in rows, reading order, with a gap around each."""
    height, width = frames[0].shape[:2]
    across = columns(len(frames), width, height)
    down = math.ceil(len(frames) / across)
    sheet = np.full((down * (height + GAP) + GAP, across * (width + GAP) + GAP, 3), GROUND, np.uint8)
    for k, frame in enumerate(frames):
        top, left = GAP + k // across * (height + GAP), GAP + k % across * (width + GAP)
        sheet[top:top + height, left:left + width] = frame
    return sheet


def write_sheet(path, picture, metadata=None):
    """Write the sheet as PNG with the workflow in it, complete or not at all."""
    with replace_on_success(path) as temporary:
        Image.fromarray(picture).save(temporary, format="PNG", pnginfo=png_text(metadata or {}), compress_level=4)
