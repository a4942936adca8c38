"""GIF and WebP: imageio reads their frames, Pillow reads their times."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import imageio.v3 as iio
import numpy as np
from PIL import Image, ImageSequence

from ..errors import VideoLDMError
from .containers import refuse_huge

ENDINGS = (".gif", ".webp")
# The errors that Pillow raises for damaged files
DAMAGE = (OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, OverflowError, MemoryError,
          Image.DecompressionBombError)


@dataclass(frozen=True)
class Animation:
    """What is known of a GIF or WebP before its frames are read."""

    width: int              # pixels
    height: int
    lengths: np.ndarray     # seconds that each frame stays
    quantum: float          # the file's unit of time in seconds
    promised: int           # frames that the file promises. A file that was cut off promises one more than it has
    transparent: bool       # whether something shines through a frame


def look_into(path: Path) -> Animation:
    """The size and times of an animation. Raises VideoLDMError if Pillow cannot read the file."""
    refuse_huge(path.name, *_canvas(path))
    try:
        with Image.open(path) as image:
            refuse_huge(path.name, *image.size)
            # imageio does not tell how long each frame stays, so Pillow reads the times.
            milliseconds, transparent = [], False
            for frame in ImageSequence.Iterator(image):
                milliseconds.append(_length(frame))
                transparent = transparent or _is_transparent(frame)
            width, height = image.size
            quantum = 0.01 if image.format == "GIF" else 0.001
    except Image.DecompressionBombError as error:
        raise VideoLDMError(f"{path.name} has pictures that are too large to read. It is damaged, or has to be scaled "
                            f"down in another program first. (Pillow says: {error})") from error
    except DAMAGE as error:
        raise unreadable(path, error) from error
    lengths = np.array(milliseconds, float) / 1000
    # Browsers show GIF frames of 10 ms or less for 100 ms, and authors of GIFs rely on it.
    lengths[lengths <= 0.01] = 0.1
    promised = len(lengths) + 1 if _lacks_gif_end(path) else len(lengths)
    return Animation(width, height, lengths, quantum, promised, transparent)


def frames(path: Path) -> Iterator[tuple[int, np.ndarray]]:
    """Yield (index, uint8 RGB (h, w, 3)) of every frame. Raises VideoLDMError if the file is damaged."""
    try:
        yield from enumerate(iio.imiter(path, plugin="pillow", mode="RGB", writeable_output=False))
    except DAMAGE as error:
        raise unreadable(path, error) from error


def unreadable(path: Path, error: Exception) -> VideoLDMError:
    """The error for an animation that Pillow cannot read."""
    said = str(error).splitlines()[0] if str(error) else type(error).__name__
    return VideoLDMError(f"{path.name} cannot be read as an animation: it is damaged, cut off or another kind of file. "
                         f"Get it again. (Pillow says: {said})")


def _canvas(path: Path) -> tuple[int, int]:
    """Width and height from the header, read before Pillow allocates memory. 1x1 if the header is not known."""
    with open(path, "rb") as file:
        head = file.read(30)
    if head.startswith(b"GIF") and len(head) >= 10:
        width, height = (int.from_bytes(head[at:at + 2], "little") for at in (6, 8))
        return max(width, 1), max(height, 1)        # 0 is allowed: browsers then use the first frame's size
    if head[:4] == b"RIFF" and head[12:16] == b"VP8X" and len(head) == 30:
        width, height = (int.from_bytes(head[at:at + 3], "little") + 1 for at in (24, 27))
        return width, height
    return 1, 1


def _lacks_gif_end(path: Path) -> bool:
    """Whether a GIF was cut off. A whole GIF ends with a semicolon. Some programs write zeros after it."""
    data = path.read_bytes()
    return data.startswith(b"GIF") and not data.rstrip(b"\0").endswith(b";")


def _is_transparent(frame: Image.Image) -> bool:
    """Whether a pixel of a decoded frame is transparent, or a little so."""
    if frame.mode not in ("RGBA", "LA", "PA") and "transparency" not in frame.info:
        return False
    return bool(np.asarray(frame.convert("RGBA").getchannel("A")).min() < 255)


def _length(frame: Image.Image) -> float:
    """The milliseconds that a frame stays. In WebP they are known only after the frame is decoded."""
    frame.load()
    length = frame.info.get("duration", 0)
    return length if isinstance(length, (int, float)) else 0
