"""Conversion of decoded frames to upright RGB with square pixels, and of RGB to frames for encoders.

swscale converts with accurate rounding and full chroma in both directions. Its fast paths round down. With them, each
loading and saving would darken a video by more than 1 of 255.
"""

from dataclasses import dataclass
from fractions import Fraction

import av
import numpy as np
from av.sidedata.sidedata import Type as SideData
from av.video.reformatter import VideoReformatter

from ..errors import VideoLDMError
from .containers import refuse_huge
from .kinds import BT601, BT709

# swscale's flags, which PyAV names since version 17: bicubic, accurate rounding, full chroma out, full chroma in
EXACT = 4 | 0x40000 | 0x2000 | 0x4000
SWS_BT601 = 5                           # swscale's number for BT.601
LIMITED_RANGE, FULL_RANGE = 1, 2
RGB_FORMATS = {(1, 3): "rgb24", (1, 4): "rgba", (2, 3): "rgb48le", (2, 4): "rgba64le"}     # (bytes, channels) -> name
SQUARE, GROUND = 8, (102, 153)          # pixels of a chequered ground's squares, and its two greys
MOST_STRETCHED = 4                      # pixels wider than 4:1 or narrower than 1:4 are refused as errors


@dataclass(frozen=True)
class Orientation:
    """How a stored picture becomes upright. The steps are applied in this order."""

    transposed: bool = False    # swap rows and columns
    mirrored: bool = False      # swap left and right
    flipped: bool = False       # swap top and bottom

    def words(self) -> str:
        """What is done, for a report. Empty if nothing is."""
        if not self.transposed:
            names = {(True, True): "turned upside down", (True, False): "mirrored",
                     (False, True): "mirrored from top to bottom"}
            return names.get((self.mirrored, self.flipped), "")
        quarter = {(True, False): "to the right", (False, True): "to the left"}
        side = quarter.get((self.mirrored, self.flipped))
        return f"turned by a quarter {side}" if side else "turned by a quarter and mirrored"

    def turn(self, array: np.ndarray) -> np.ndarray:
        """The upright picture (h, w, 3) of a stored one."""
        if self == Orientation():
            return array
        array = array.transpose(1, 0, 2) if self.transposed else array
        array = array[:, ::-1] if self.mirrored else array
        return np.ascontiguousarray(array[::-1] if self.flipped else array)


def orientation(frame: av.VideoFrame) -> Orientation:
    """The orientation of a frame, from its display matrix. Phones write one instead of turning the picture."""
    found = [data for data in frame.side_data if data.type == SideData.DISPLAYMATRIX]
    if not found:
        return Orientation()
    # A stored point (x, y) is shown at (a x + c y, b x + d y).
    a, b, _, c, d = np.frombuffer(bytes(found[0]), np.int32)[:5].tolist()
    if abs(b) > abs(a):
        return Orientation(True, c < 0, b < 0)
    return Orientation(False, a < 0, d < 0)


class Pictures:
    """Converts the decoded frames of one file to uint8 RGB (height, width, 3). They have the size of the first."""

    def __init__(self, name: str, first: av.VideoFrame, aspect: Fraction | None) -> None:
        """Prepare for a file.

        Args:
            name: of the file, for messages.
            first: its first decoded frame.
            aspect: width / height of a stored pixel. None: the file does not state it.
        """
        self.name, self.stored = name, (first.width, first.height)
        self.orientation = orientation(first)
        self.square_width = square_width(name, first.width, aspect)
        width: int = self.square_width
        height: int = first.height
        self.width, self.height = (height, width) if self.orientation.transposed else (width, height)
        refuse_huge(name, self.width, self.height)
        self._reformatter = VideoReformatter()

    @property
    def stretched(self) -> bool:
        """Whether the file's pixels are not square."""
        return self.square_width != self.stored[0]

    @property
    def as_stored(self) -> bool:
        """Whether the pictures are neither stretched nor turned."""
        return not self.stretched and self.orientation == Orientation()

    def rgb(self, frame: av.VideoFrame, number: int) -> np.ndarray:
        """The picture of a frame. number: how many frames were read before it, for the message.

        Raises VideoLDMError for a frame of another size than the first.
        """
        if (frame.width, frame.height) != self.stored:
            advice = (f"Set frame_count to at most {number}" if number else "Choose a later start_frame")
            raise VideoLDMError(f"{self.name} changes its picture size from {self.stored[0]}x{self.stored[1]} to "
                                f"{frame.width}x{frame.height}, and the frames of a clip have one size. {advice}, or "
                                "scale the video in another program first.")
        # All colour settings are passed, because older PyAV versions otherwise assume BT.601 for every picture.
        picture = self._reformatter.reformat(
            frame, width=self.square_width, format="rgb24", src_colorspace=frame.colorspace, dst_colorspace=SWS_BT601,
            src_color_range=frame.color_range, dst_color_range=FULL_RANGE, interpolation=EXACT)
        return self.orientation.turn(picture.to_ndarray())


def square_width(name: str, width: int, aspect: Fraction | None) -> int:
    """The width of a picture in square pixels. It is even, so that a saved video needs no padding."""
    if not aspect or aspect == 1:
        return width
    if not Fraction(1, MOST_STRETCHED) <= aspect <= MOST_STRETCHED:
        raise VideoLDMError(f"{name} says that its pixels are {float(aspect):g} times as wide as high, which cannot be "
                            "right. Set its pixel aspect ratio in another program, or convert it to MP4.")
    square = 2 * round(width * aspect / 2)
    return width if abs(square - width) <= 1 else square


class Encodable:
    """Converts RGB to frames for encoders, in the colours that `declare_colours` states."""

    def __init__(self, pixels: str = "yuv420p", matrix: int = BT601) -> None:
        """pixels: FFmpeg's name of the format to encode. matrix: BT601 or BT709."""
        self.pixels, self.matrix = pixels, matrix
        self._reformatter = VideoReformatter()

    def frame(self, rgb: np.ndarray) -> av.VideoFrame:
        """The frame to encode for a picture, uint8 or uint16 RGB (h, w, 3), with alpha (h, w, 4)."""
        given = RGB_FORMATS[rgb.dtype.itemsize, rgb.shape[2]]
        picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(rgb), format=given)
        picture = self._reformatter.reformat(picture, format=self.pixels,
                                             dst_colorspace=SWS_BT601 if self.matrix == BT601 else self.matrix,
                                             src_color_range=FULL_RANGE, dst_color_range=LIMITED_RANGE,
                                             interpolation=EXACT)
        picture.colorspace, picture.color_range = self.matrix, LIMITED_RANGE
        return picture


def declare_colours(context: av.VideoCodecContext, matrix: int = BT601) -> None:
    """State the colours of `Encodable`'s frames in the file. Otherwise players guess them from the picture's size.

    They are BT.601 for files with 8 bits, because some readers assume it for every file. Older PyAV does, and so does
    ComfyUI's Load Video.
    """
    context.colorspace, context.color_range = matrix, LIMITED_RANGE
    context.color_primaries = context.color_trc = BT709


def as_shown(frame: np.ndarray) -> np.ndarray:
    """A frame as uint8 RGB (h, w, 3) for looking at. Transparent parts show a chequered ground."""
    if frame.dtype == np.uint16:
        frame = ((frame.astype(np.uint32) + 128) // 257).astype(np.uint8)
    if frame.shape[2] == 3:
        return frame
    rows, columns = (np.arange(side)[:, None] // SQUARE for side in frame.shape[:2])
    ground = np.where((rows + columns.T) % 2, *GROUND)[..., None]
    alpha = frame[..., 3:].astype(np.float32) / 255
    return np.round(frame[..., :3] * alpha + ground * (1 - alpha)).astype(np.uint8)
