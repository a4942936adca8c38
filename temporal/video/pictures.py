"""Decoded frames as upright RGB in square pixels, and RGB as the frames that encoders take.

Rounding is swscale's accurate one with full chroma both ways. Its fast paths round down: each loading and saving would
darken a video by more than 1 of 255.
"""

from dataclasses import dataclass
from fractions import Fraction

import av
import numpy as np
from av.sidedata.sidedata import Type as SideData
from av.video.reformatter import VideoReformatter

from ..errors import VideoLDMError
from .containers import refuse_huge

# swscale's numbers, which PyAV names since version 17: bicubic, accurate rounding, full chroma out and in.
EXACT = 4 | 0x40000 | 0x2000 | 0x4000
SWS_BT601 = 5                           # swscale's number of the colours
BT709, BT601 = 1, 6                     # FFmpeg's numbers; 6 is SMPTE 170M, BT.601 for 525 lines
LIMITED_RANGE, FULL_RANGE = 1, 2
MOST_STRETCHED = 4                      # the widest or narrowest pixel that is believed


@dataclass(frozen=True)
class Orientation:
    """How a stored picture has to be turned: first transposed, then mirrored left to right and top to bottom."""

    transposed: bool = False
    mirrored: bool = False
    flipped: bool = False

    def turn(self, array: np.ndarray) -> np.ndarray:
        """The upright picture of a stored one, (h, w, 3)."""
        if self == Orientation():
            return array
        array = array.transpose(1, 0, 2) if self.transposed else array
        array = array[:, ::-1] if self.mirrored else array
        return np.ascontiguousarray(array[::-1] if self.flipped else array)


def orientation(frame: av.VideoFrame) -> Orientation:
    """From the display matrix that phones write beside a picture instead of turning it."""
    found = [data for data in frame.side_data if data.type == SideData.DISPLAYMATRIX]
    if not found:
        return Orientation()
    # A stored point (x, y) is shown at (a x + c y, b x + d y).
    a, b, _, c, d = np.frombuffer(bytes(found[0]), np.int32)[:5].tolist()
    if abs(b) > abs(a):
        return Orientation(True, c < 0, b < 0)
    return Orientation(False, a < 0, d < 0)


class Pictures:
    """Makes uint8 RGB (height, width, 3) of the decoded frames of one file, all of the size of the first."""

    def __init__(self, name: str, first: av.VideoFrame, aspect: Fraction | None):
        """aspect: the width of a stored pixel divided by its height, None if the file does not say."""
        self.name, self.stored = name, (first.width, first.height)
        self.orientation = orientation(first)
        self.square_width = square_width(name, first.width, aspect)
        width, height = self.square_width, first.height
        self.width, self.height = (height, width) if self.orientation.transposed else (width, height)
        refuse_huge(name, self.width, self.height)
        self._reformatter = VideoReformatter()

    @property
    def stretched(self) -> bool:
        """The file's pixels are not square."""
        return self.square_width != self.stored[0]

    @property
    def as_stored(self) -> bool:
        """The file's own pictures are what is given out."""
        return not self.stretched and self.orientation == Orientation()

    def rgb(self, frame: av.VideoFrame, number: int) -> np.ndarray:
        """The picture of a frame; `number` is its place among the frames that are read, for the sentence."""
        if (frame.width, frame.height) != self.stored:
            advice = (f"Set frame_count to at most {number}" if number else "Choose a later start_frame")
            raise VideoLDMError(f"{self.name} changes its picture size from {self.stored[0]}x{self.stored[1]} to "
                                f"{frame.width}x{frame.height}, and the frames of a clip have one size. {advice}, or "
                                "scale the video in another program first.")
        # The colours are named one by one because older PyAV otherwise takes every picture for BT.601.
        picture = self._reformatter.reformat(
            frame, width=self.square_width, format="rgb24", src_colorspace=frame.colorspace, dst_colorspace=SWS_BT601,
            src_color_range=frame.color_range, dst_color_range=FULL_RANGE, interpolation=EXACT)
        return self.orientation.turn(picture.to_ndarray())


def square_width(name: str, width: int, aspect: Fraction | None) -> int:
    """The width in square pixels. Even, so that a saved video needs no padding."""
    if not aspect or aspect == 1:
        return width
    if not Fraction(1, MOST_STRETCHED) <= aspect <= MOST_STRETCHED:
        raise VideoLDMError(f"{name} says that its pixels are {float(aspect):g} times as wide as high, which cannot be "
                            "right. Set its pixel aspect ratio in another program, or convert it to MP4.")
    square = 2 * round(width * aspect / 2)
    return width if abs(square - width) <= 1 else square


class Encodable:
    """Makes the frames that encoders take: yuv420p in the colours that the stream declares."""

    def __init__(self):
        self._reformatter = VideoReformatter()

    def frame(self, rgb: np.ndarray) -> av.VideoFrame:
        """uint8 RGB (h, w, 3) as a frame to encode."""
        picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(rgb), format="rgb24")
        picture = self._reformatter.reformat(picture, format="yuv420p", dst_colorspace=SWS_BT601,
                                             src_color_range=FULL_RANGE, dst_color_range=LIMITED_RANGE,
                                             interpolation=EXACT)
        picture.colorspace, picture.color_range = BT601, LIMITED_RANGE
        return picture


def declare_colours(context: av.VideoCodecContext) -> None:
    """Say in a written file what `Encodable` makes, so that no player has to guess it from the picture's size.

    BT.601 because readers that do not look, older PyAV and so ComfyUI's Load Video among them, assume it.
    """
    context.colorspace, context.color_range = BT601, LIMITED_RANGE
    context.color_primaries = context.color_trc = BT709
