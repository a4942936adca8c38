"""Writing frames to a video, an animation or a folder of pictures, with the workflow in its metadata.

Frames are streamed: they are encoded in a thread of their own while the next ones are made (beside.py). The file has a
temporary name until it is complete.
"""

import errno
import os
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import av
import imageio.v3 as iio
import numpy as np
from PIL import Image

from ..atomic import StrPath, folder_on_success, replace_on_success
from ..errors import VideoLDMError
from .beside import beside
from .encode import Audio, VideoWriter, open_output
from .kinds import ANIMATIONS, FORMATS, KINDS, SEQUENCES, with_alpha
from .sequence import write_frames
from .texts import metadata_text
from .timing import as_rate

GIF_HIGHEST_RATE = 50           # GIF's unit is 1/100 s, and browsers slow down frames shorter than 2/100 s
LONGEST_SIDE = 16383            # pixels; the limit of H.264 and WebP


@dataclass(frozen=True)
class Written:
    """The content of a finished file."""

    frames: int
    width: int          # pixels
    height: int
    padded: bool        # True: the last column or row was repeated to make the size even


def write_video(path: StrPath, frames: Iterable[np.ndarray], rate: object, format: str = "mp4", crf: int = 18,
                metadata: Mapping[str, Any] | None = None, audio: Audio | None = None,
                on_frame: Callable[[int], None] | None = None, plays: int = 0,
                watch: Callable[[np.ndarray], None] | None = None) -> Written:
    """Write a video, an animation or a folder of pictures, completely or not at all.

    Args:
        path: of the file, or of the folder for a format of SEQUENCES.
        frames: (h, w, 3), all of one size. With a fourth channel for transparency, where the format keeps it. uint8,
            or uint16 for a format with more than 8 bits per colour. They are made in this thread, and up to 64 MB of
            them wait to be encoded in another. A generator is closed at the end.
        rate: frames per second.
        format: a key of KINDS.
        crf: constant rate factor of H.264 (0-51), VP9 and AV1 (0-63); lower is better. WebP's quality is 100 - crf,
            and 0 is lossless. GIF, ProRes and PNG ignore it.
        metadata: {"prompt": ..., "workflow": ...}, stored as ComfyUI's own nodes store it. GIF holds none.
        audio: a Sound, or samples float32 (channels, samples) and their rate. Only in formats with sound. It ends with
            the pictures.
        on_frame: called with the number of frames written so far; it may raise.
        plays: how often an animation plays. 0: for ever.
        watch: called with each frame in the encoder's thread, before it is encoded; it may raise.

    Raises VideoLDMError for frames or settings that cannot be saved, and for a full disk.
    """
    if format not in KINDS:
        raise VideoLDMError(f"Unknown video format '{format}'. Choose one of {', '.join(FORMATS)}.")
    said = metadata or {}

    def encode(temporary: Path, given: Iterator[np.ndarray]) -> Written:
        if watch is not None:
            given = _seen_by(watch, given)
        if format in SEQUENCES:
            return Written(*write_frames(temporary, given, said), padded=False)
        if format in ANIMATIONS:
            return _write_animation(temporary, given, as_rate(rate), format, crf, said, plays)
        return _write_video(temporary, given, as_rate(rate), format, crf, said, audio)
    whole = folder_on_success if format in SEQUENCES else replace_on_success
    with _room_for(path, format), whole(path) as temporary:
        return beside(_checked(frames, format), partial(encode, temporary), on_frame)


def _seen_by(watch: Callable[[np.ndarray], None], frames: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
    for frame in frames:
        watch(frame)
        yield frame


@contextmanager
def _room_for(file: StrPath, format: str) -> Iterator[None]:
    """Turn errors into VideoLDMError: a full disk, an exhausted quota, a name that is too long, a failing encoder."""
    path = Path(file)
    try:
        yield
    except (OSError, av.FFmpegError) as error:
        if error.errno == errno.ENAMETOOLONG:
            raise VideoLDMError(f"The video cannot be saved: its name is too long "
                                f"({len(os.fsencode(path.name))} bytes). Shorten filename_prefix.") from error
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise VideoLDMError(f"There is no room for {path.name} in '{path.parent}' ({error.strerror}), so nothing "
                                "of it was kept. Free some space, or lower the quality, and run again.") from error
        if not isinstance(error, av.FFmpegError):
            raise
        raise VideoLDMError(f"These frames cannot be saved as '{format}': the encoder takes no frames of this size or "
                            f"at this rate. Choose another format. (FFmpeg says: {error.strerror})") from error


def _checked(frames: Iterable[np.ndarray], format: str) -> Iterator[np.ndarray]:
    """Yield the frames. A generator of them is closed with this one.

    Raises VideoLDMError for a change of size, and for frames that hold more than the format keeps.
    """
    shape: tuple[int, ...] | None = None
    try:
        for done, frame in enumerate(frames, 1):
            if shape is None:
                shape = frame.shape
                _refuse_size(shape[1], shape[0])
                _refuse_what_is_lost(frame, format)
            if frame.shape != shape:
                raise VideoLDMError(f"All frames of a video have one size: frame {done} is {frame.shape[1]}x"
                                    f"{frame.shape[0]}, the first {shape[1]}x{shape[0]}. Resize them before saving.")
            yield frame
    finally:
        if isinstance(frames, Generator):
            frames.close()
    if shape is None:
        raise VideoLDMError("There are no frames to save. Connect at least one image.")


def _refuse_what_is_lost(frame: np.ndarray, format: str) -> None:
    """Refuse frames with alpha or with 16 bits for a format that keeps neither. Callers convert them."""
    if frame.shape[2] == 4 and not KINDS[format].alpha:
        raise VideoLDMError(f"'{format}' keeps no transparency. Choose one of {with_alpha()}, or drop the alpha "
                            "channel.")
    if frame.dtype == np.uint16 and KINDS[format].frame_bits == 8:
        raise VideoLDMError(f"'{format}' keeps 8 bits per colour, and the frames have 16. Round them to 8 bits.")


def _refuse_size(width: int, height: int) -> None:
    if not (1 <= width <= LONGEST_SIDE and 1 <= height <= LONGEST_SIDE):
        raise VideoLDMError(f"The frames are {width}x{height} pixels; a side of a video has 1 to {LONGEST_SIDE}. "
                            "Resize them before saving.")


def _write_video(path: Path, frames: Iterable[np.ndarray], rate: Fraction, format: str, crf: int,
                 metadata: Mapping[str, Any], audio: Audio | None) -> Written:
    with open_output(path, format, metadata) as container:
        writer = VideoWriter(container, format, rate, crf, audio)
        for frame in frames:
            writer.add(frame)
        writer.finish()
    return Written(writer.written, writer.width, writer.height, writer.padded)


def _write_animation(path: Path, frames: Iterable[np.ndarray], rate: Fraction, format: str, crf: int,
                     metadata: Mapping[str, Any], plays: int) -> Written:
    if format == "gif" and rate > GIF_HIGHEST_RATE:
        raise VideoLDMError(f"GIF cannot play {float(rate):g} frames per second; {GIF_HIGHEST_RATE} is the most. "
                            "Choose mp4, webm or webp, or a lower fps.")
    # Pillow needs all frames at once. As bytes they take a quarter of the memory of the IMAGE.
    pictures = [np.array(frame) for frame in frames]
    height, width = pictures[0].shape[:2]
    durations = _milliseconds(len(pictures), rate, 10 if format == "gif" else 1)
    # Pillow refuses a list for a single frame of GIF.
    settings: dict[str, Any] = {"duration": durations if len(durations) > 1 else durations[0]}
    if format == "webp":
        lossless = {"lossless": True, "quality": 75} if crf == 0 else {"lossless": False, "quality": 100 - crf}
        settings |= {**lossless, "loop": plays, "exact": True, "method": 4, "exif": _webp_exif(metadata)}
    elif plays != 1:
        # GIF counts the times that it plays again. One that plays once has no count.
        settings["loop"] = max(plays - 1, 0)
    count = len(pictures)
    with iio.imopen(path, "w", plugin="pillow") as file:
        while pictures:
            file.write(pictures.pop(0), **settings)
    return Written(count, width, height, False)


def _milliseconds(count: int, rate: Fraction, unit: int) -> list[int]:
    """The milliseconds that each frame stays, in whole units. 8 fps in GIF: 120, 130, 120, ...

    The ends of frames are rounded and not their lengths, so rounding errors do not add up.
    """
    ends = [round(float(k / rate) * 1000 / unit) * unit for k in range(count + 1)]
    return [after - before for before, after in zip(ends, ends[1:])]


def _webp_exif(metadata: Mapping[str, Any]) -> Image.Exif:
    """EXIF as ComfyUI's Save Animated WEBP writes it: the prompt as Model, other entries from Make downwards."""
    exif, tag = Image.Exif(), 0x010F
    for key, text in metadata_text(metadata).items():
        if key == "prompt":
            exif[0x0110] = f"prompt:{text}"
        else:
            exif[tag], tag = f"{key}:{text}", tag - 1
    return exif
