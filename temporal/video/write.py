"""Writing frames to a video or animation file, with the workflow in its metadata.

Frames are streamed. The file has a temporary name until it is complete.
"""

import errno
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import imageio.v3 as iio
import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ..atomic import StrPath, replace_on_success
from ..errors import VideoLDMError
from .pictures import Encodable, declare_colours
from .sound import Sound, SoundWriter, held_sound
from .timing import as_rate

# Widget value -> file extension.
FORMATS = {"mp4": ".mp4", "webm": ".webm", "webp": ".webp", "gif": ".gif"}
CODECS = {"mp4": ("libx264", "aac"), "webm": ("libvpx-vp9", "libopus")}
GIF_HIGHEST_RATE = 50           # GIF's unit is 1/100 s, and browsers slow down frames shorter than 2/100 s
Audio = Sound | tuple[np.ndarray, int]      # sound, or its samples (channels, samples) and samples per second
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
                on_frame: Callable[[int], None] | None = None) -> Written:
    """Write a video or an animation, completely or not at all.

    Args:
        path: of the file.
        frames: uint8 (h, w, 3), all of one size.
        rate: frames per second.
        format: a key of FORMATS.
        crf: constant rate factor of H.264 (0-51) and VP9 (0-63); lower is better. WebP's quality is 100 - crf, and 0
            is lossless. GIF ignores it.
        metadata: {"prompt": ..., "workflow": ...}, stored as ComfyUI's own nodes store it. GIF holds none.
        audio: a Sound, or samples float32 (channels, samples) and their rate. MP4 and WebM only. It ends with the
            pictures.
        on_frame: called with the number of frames written so far; it may raise.

    Raises VideoLDMError for frames or settings that cannot be saved, and for a full disk.
    """
    if format not in FORMATS:
        raise VideoLDMError(f"Unknown video format '{format}'. Choose one of {', '.join(FORMATS)}.")
    with _room_for(path), replace_on_success(path) as temporary:
        if format in CODECS:
            return _write_video(temporary, frames, as_rate(rate), format, crf, metadata or {}, audio, on_frame)
        return _write_animation(temporary, frames, as_rate(rate), format, crf, metadata or {}, on_frame)


@contextmanager
def _room_for(file: StrPath) -> Iterator[None]:
    """Turn the errors of a full disk, an exhausted quota and a name that is too long into VideoLDMError."""
    path = Path(file)
    try:
        yield
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise VideoLDMError(f"The video cannot be saved: its name is too long "
                                f"({len(os.fsencode(path.name))} bytes). Shorten filename_prefix.") from error
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise VideoLDMError(f"There is no room for {path.name} in '{path.parent}' ({error.strerror}), so nothing of it "
                            "was kept. Free some space, or lower the quality, and run again.") from error


def metadata_text(metadata: Mapping[str, Any]) -> dict[str, str]:
    """Each value as JSON text, as ComfyUI stores it.

    NaN becomes null. It is not JSON, and with it the browser could not read the workflow. Nodes that always run again
    leave NaN in a prompt.
    """
    def text(value: Any) -> str:
        if isinstance(value, str):
            return value
        return json.dumps(json.loads(json.dumps(value), parse_constant=lambda name: None))
    return {key: text(value) for key, value in metadata.items()}


def png_text(metadata: Mapping[str, Any]) -> PngInfo:
    """The metadata as PNG text chunks, for contact sheets."""
    info = PngInfo()
    for key, text in metadata_text(metadata).items():
        info.add_text(key, text)
    return info


def even_size(frame: np.ndarray) -> np.ndarray:
    """The frame with even sides, as H.264 and VP9 with 4:2:0 colour need them. The last column or row is repeated."""
    height, width = frame.shape[:2]
    return np.pad(frame, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge") if height % 2 or width % 2 else frame


def _one_size(frames: Iterable[np.ndarray], on_frame: Callable[[int], None] | None) -> Iterator[np.ndarray]:
    """Yield the frames. `on_frame(done)` is called after each. Raises VideoLDMError for a change of size."""
    shape: tuple[int, ...] | None = None
    for done, frame in enumerate(frames, 1):
        if shape is None:
            shape = frame.shape
            _refuse_size(shape[1], shape[0])
        if frame.shape != shape:
            raise VideoLDMError(f"All frames of a video have one size: frame {done} is {frame.shape[1]}x"
                                f"{frame.shape[0]}, the first {shape[1]}x{shape[0]}. Resize them before saving.")
        yield frame
        if on_frame is not None:
            on_frame(done)
    if shape is None:
        raise VideoLDMError("There are no frames to save. Connect at least one image.")


def _refuse_size(width: int, height: int) -> None:
    if not (1 <= width <= LONGEST_SIDE and 1 <= height <= LONGEST_SIDE):
        raise VideoLDMError(f"The frames are {width}x{height} pixels; a side of a video has 1 to {LONGEST_SIDE}. "
                            "Resize them before saving.")


def _write_video(path: Path, frames: Iterable[np.ndarray], rate: Fraction, format: str, crf: int,
                 metadata: Mapping[str, Any], audio: Audio | None, on_frame: Callable[[int], None] | None) -> Written:
    # faststart writes the index of an MP4 to its front, so browsers start to play at once. ComfyUI's page reads only
    # the beginning of a dropped file, and finds the workflow there.
    options = {"movflags": "use_metadata_tags+faststart"} if format == "mp4" else {}
    written, encodable = 0, Encodable()
    with av.open(str(path), mode="w", format=format, options=options) as container:
        for key, text in metadata_text(metadata).items():
            container.metadata[key] = _plain_braces(text) if format == "webm" else text
        for frame in _one_size(frames, on_frame):
            height, width = frame.shape[:2]
            frame = even_size(frame)
            if not written:
                stream = _picture_stream(container, format, rate, crf, frame)
                sound = _sound_writer(container, format, audio, rate) if audio is not None else None
            container.mux(stream.encode(encodable.frame(frame)))
            written += 1
            if sound is not None:
                sound.until(written)
        container.mux(stream.encode(None))
        if sound is not None:
            sound.finish()
    return Written(written, frame.shape[1], frame.shape[0], frame.shape[:2] != (height, width))


def _picture_stream(container: av.container.OutputContainer, format: str, rate: Fraction, crf: int,
                    frame: np.ndarray) -> av.VideoStream:
    stream = container.add_stream(CODECS[format][0], rate=rate)
    stream.height, stream.width = frame.shape[:2]
    stream.pix_fmt = "yuv420p"
    stream.bit_rate = 0
    if format == "mp4":
        # With crf 0 x264 uses a lossless profile that browsers do not play, so crf is at least 1. The default
        # look-ahead of 40 frames takes much memory. With 10 frames files are no larger.
        stream.options = {"crf": str(min(max(crf, 1), 51)), "preset": "medium", "rc-lookahead": "10"}
    else:
        stream.options = {"crf": str(crf), "deadline": "good", "cpu-used": "2", "row-mt": "1"}
    declare_colours(stream.codec_context)
    return stream


def _sound_writer(container: av.container.OutputContainer, format: str, audio: Audio, rate: Fraction) -> SoundWriter:
    sound = audio if isinstance(audio, Sound) else held_sound(*audio)
    return SoundWriter(container, CODECS[format][1], sound, rate)


def _plain_braces(text: str) -> str:
    """JSON with escaped braces inside its strings.

    ComfyUI's page finds the end of WebM metadata by counting braces. A brace in a prompt's text would end it early.
    """
    pieces = json.JSONEncoder().iterencode(json.loads(text)) if text[:1] in "{[" else [text]
    return "".join(piece.replace("{", "\\u007b").replace("}", "\\u007d") if piece.startswith('"') else piece
                   for piece in pieces)


def _write_animation(path: Path, frames: Iterable[np.ndarray], rate: Fraction, format: str, crf: int,
                     metadata: Mapping[str, Any], on_frame: Callable[[int], None] | None) -> Written:
    if format == "gif" and rate > GIF_HIGHEST_RATE:
        raise VideoLDMError(f"GIF cannot play {float(rate):g} frames per second; {GIF_HIGHEST_RATE} is the most. "
                            "Choose mp4, webm or webp, or a lower fps.")
    # Pillow needs all frames at once. As bytes they take a quarter of the memory of the IMAGE.
    pictures = [np.array(frame) for frame in _one_size(frames, on_frame)]
    height, width = pictures[0].shape[:2]
    settings: dict[str, Any] = {"loop": 0, "duration": _milliseconds(len(pictures), rate, 10 if format == "gif" else 1)}
    if format == "webp":
        lossless = {"lossless": True, "quality": 75} if crf == 0 else {"lossless": False, "quality": 100 - crf}
        settings |= {**lossless, "exact": True, "method": 4, "exif": _webp_exif(metadata)}
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
