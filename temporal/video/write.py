"""Write frames to a video or animation file: streamed, under a temporary name until it is complete, workflow inside."""

import errno
import json
import os
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import av
import imageio.v3 as iio
import numpy as np
from PIL import Image

from ..atomic import replace_on_success
from ..errors import VideoLDMError
from .pictures import Encodable, declare_colours
from .sound import Sound, SoundWriter, held_sound
from .timing import as_rate

# Widget value -> file extension.
FORMATS = {"mp4": ".mp4", "webm": ".webm", "webp": ".webp", "gif": ".gif"}
CODECS = {"mp4": ("libx264", "aac"), "webm": ("libvpx-vp9", "libopus")}
GIF_HIGHEST_RATE = 50           # GIF counts in 1/100 s, and browsers slow down anything under 2/100
LONGEST_SIDE = 16383            # pixels; what H.264 and WebP can hold


@dataclass(frozen=True)
class Written:
    """What a finished file holds; sizes in pixels, `padded` says that an edge was repeated to make them even."""

    frames: int
    width: int
    height: int
    padded: bool


def write_video(path, frames, rate, format="mp4", crf=18, metadata=None, audio=None, on_frame=None):
    """Write `frames`, an iterable of uint8 (h, w, 3) of one size, and return `Written`.

    rate: frames per second. format: a key of FORMATS. crf: constant rate factor of H.264 (0-51) and VP9 (0-63), lower
    is better; WebP takes 100 - crf as its quality and is lossless at 0; GIF has 256 colours a frame and ignores it.
    metadata: {"prompt": ..., "workflow": ...}, stored as ComfyUI's own nodes do; GIF has no place for it.
    audio: a Sound, or float32 (channels, samples) and its rate; MP4 and WebM only. It ends with the pictures.
    on_frame(done) follows each frame and may raise.
    """
    if format not in FORMATS:
        raise VideoLDMError(f"Unknown video format '{format}'. Choose one of {', '.join(FORMATS)}.")
    with _room_for(path), replace_on_success(path) as temporary:
        if format in CODECS:
            return _write_video(temporary, frames, as_rate(rate), format, crf, metadata or {}, audio, on_frame)
        return _write_animation(temporary, frames, as_rate(rate), format, crf, metadata or {}, on_frame)


@contextmanager
def _room_for(path):
    """A disk that is full, a quota that is used up, or a name that is too long becomes a sentence."""
    path = Path(path)
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


def metadata_text(metadata):
    """Each value as the JSON text that ComfyUI stores. NaN, which is not JSON and which nodes that always run again
    leave in a prompt, becomes null: with it the browser could not read the workflow back."""
    def text(value):
        if isinstance(value, str):
            return value
        return json.dumps(json.loads(json.dumps(value), parse_constant=lambda name: None))
    return {key: text(value) for key, value in metadata.items()}


def png_text(metadata):
    """The same as PNG text chunks, for contact sheets."""
    from PIL.PngImagePlugin import PngInfo
    info = PngInfo()
    for key, text in metadata_text(metadata).items():
        info.add_text(key, text)
    return info


def even_size(frame):
    """H.264 and VP9 with 4:2:0 colour need even sides: repeat the last column and row where a side is odd."""
    height, width = frame.shape[:2]
    return np.pad(frame, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge") if height % 2 or width % 2 else frame


def _one_size(frames, on_frame):
    """Pass frames on, refusing a change of size; `on_frame(done)` once each has been used."""
    shape = None
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


def _refuse_size(width, height):
    if not (1 <= width <= LONGEST_SIDE and 1 <= height <= LONGEST_SIDE):
        raise VideoLDMError(f"The frames are {width}x{height} pixels; a side of a video has 1 to {LONGEST_SIDE}. "
                            "Resize them before saving.")


def _write_video(path, frames, rate, format, crf, metadata, audio, on_frame):
    # The index goes to the front of an MP4 (faststart): browsers start to play at once, and ComfyUI's page, which reads
    # only the beginning of a dropped file, finds the workflow there however long the video is.
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


def _picture_stream(container, format, rate, crf, frame):
    stream = container.add_stream(CODECS[format][0], rate=rate)
    stream.height, stream.width = frame.shape[:2]
    stream.pix_fmt = "yuv420p"
    stream.bit_rate = 0
    if format == "mp4":
        # At 0 x264 changes to a lossless profile that browsers do not play. Its 40 frames of look-ahead would be most of
        # what a streamed video takes in memory; with 10 files are no larger.
        stream.options = {"crf": str(min(max(crf, 1), 51)), "preset": "medium", "rc-lookahead": "10"}
    else:
        stream.options = {"crf": str(crf), "deadline": "good", "cpu-used": "2", "row-mt": "1"}
    declare_colours(stream.codec_context)
    return stream


def _sound_writer(container, format, audio, rate):
    sound = audio if isinstance(audio, Sound) else held_sound(*audio)
    return SoundWriter(container, CODECS[format][1], sound, rate)


def _plain_braces(text):
    """JSON with the braces inside its strings escaped: ComfyUI's page finds the end of WebM metadata by counting braces
    and takes one in a prompt's text for the end."""
    pieces = json.JSONEncoder().iterencode(json.loads(text)) if text[:1] in "{[" else [text]
    return "".join(piece.replace("{", "\\u007b").replace("}", "\\u007d") if piece.startswith('"') else piece
                   for piece in pieces)


def _write_animation(path, frames, rate, format, crf, metadata, on_frame):
    if format == "gif" and rate > GIF_HIGHEST_RATE:
        raise VideoLDMError(f"GIF cannot play {float(rate):g} frames per second; {GIF_HIGHEST_RATE} is the most. "
                            "Choose mp4, webm or webp, or a lower fps.")
    # Pillow wants all of an animation at once; as bytes it is a quarter of the IMAGE it came from.
    pictures = [np.array(frame) for frame in _one_size(frames, on_frame)]
    height, width = pictures[0].shape[:2]
    settings = {"loop": 0, "duration": _milliseconds(len(pictures), rate, 10 if format == "gif" else 1)}
    if format == "webp":
        lossless = {"lossless": True, "quality": 75} if crf == 0 else {"lossless": False, "quality": 100 - crf}
        settings |= {**lossless, "exact": True, "method": 4, "exif": _webp_exif(metadata)}
    count = len(pictures)
    with iio.imopen(path, "w", plugin="pillow") as file:
        while pictures:
            file.write(pictures.pop(0), **settings)
    return Written(count, width, height, False)


def _milliseconds(count, rate, unit):
    """How long each frame stays, in whole units whose rounding does not add up: 8 fps in GIF is 120, 130, 120, ..."""
    ends = [round(float(k / rate) * 1000 / unit) * unit for k in range(count + 1)]
    return [after - before for before, after in zip(ends, ends[1:])]


def _webp_exif(metadata):
    """EXIF as ComfyUI's Save Animated WEBP writes it: the prompt under Model, the rest from Make downwards."""
    exif, tag = Image.Exif(), 0x010F
    for key, text in metadata_text(metadata).items():
        if key == "prompt":
            exif[0x0110] = f"prompt:{text}"
        else:
            exif[tag], tag = f"{key}:{text}", tag - 1
    return exif
