"""Read frames of a video or animation file: any range and stride, evenly timed, upright, one frame in memory at a time.

MP4, MOV, MKV, WebM and whatever else PyAV opens; GIF and WebP through imageio.
"""

import io
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import av
import imageio.v3 as iio
import numpy as np
from PIL import Image, ImageSequence

from ..errors import VideoLDMError
from .timing import Clock, even_clock

ANIMATIONS = (".gif", ".webp")
SEEK_BEYOND = 120               # frames; skipping fewer by decoding them is fast enough
BT601, FULL_RANGE = 5, 2        # FFmpeg's numbers
# Formats in which FFmpeg shows still images or even plain text as a "video".
NOT_VIDEOS = ("image2", "_pipe", "tty", "lavfi")


@dataclass(frozen=True)
class VideoFile:
    """A file that can be read. `source` is a path or a BytesIO; sizes are of the upright picture, in pixels."""

    source: object
    name: str
    width: int
    height: int
    clock: Clock
    times: tuple                # seconds at which the file's own frames appear, in order
    declared: int               # frames that the header promises, 0 if it does not say
    has_audio: bool
    animation: bool
    rotated: bool = False       # the file stores the picture turned

    @property
    def frames(self):
        return len(self.clock.shown)

    @property
    def rate(self):
        """Frames per second, a Fraction."""
        return self.clock.rate

    def select(self, start=0, count=0, stride=1):
        """Steps of the even clock: `count` of them (0: to the end), `stride` apart, from `start`."""
        if start >= self.frames:
            raise VideoLDMError(f"{self.name} has {self.frames} frames, so start_frame can be at most "
                                f"{self.frames - 1}; it is {start}.")
        steps = np.arange(start, self.frames, stride)
        if count > len(steps):
            raise VideoLDMError(f"{self.name} has {self.frames} frames: from frame {start} with stride {stride} there "
                                f"are {len(steps)}, and {count} were asked for. Lower frame_count, or 0 for all.")
        if not count and self.declared > len(self.times):
            raise VideoLDMError(f"{self.name} is cut off: it promises {self.declared} frames and holds "
                                f"{len(self.times)}. Get it again, or set frame_count to at most {len(steps)}.")
        return steps[:count] if count else steps

    def iterate(self, steps=None, on_frame=None):
        """Frames at `steps` (ascending, from `select`), each uint8 (h, w, 3); `on_frame(done)` after each."""
        steps = self.select() if steps is None else steps
        shown = self.clock.shown[steps]
        decoded = (_decode_animation if self.animation else _decode)(self, int(shown[0]))
        index, picture = -1, None
        for done, wanted in enumerate(shown, 1):
            while index < wanted:
                index, frame = next(decoded, (None, None))
                if index is None:
                    raise VideoLDMError(f"{self.name} is cut off or damaged: its frame {wanted} of {len(self.times)} "
                                        "cannot be read. Get the file again, or choose a range that ends before it.")
                picture = _upright(frame) if index == wanted else None
            yield picture
            if on_frame is not None:
                on_frame(done)

    def read(self, steps=None, on_frame=None):
        """Frames at `steps` as one float32 array (t, h, w, 3) in 0..1, ComfyUI's IMAGE."""
        steps = self.select() if steps is None else steps
        images = np.empty((len(steps), self.height, self.width, 3), np.float32)
        for k, frame in enumerate(self.iterate(steps, on_frame)):
            np.divide(frame, np.float32(255), out=images[k])
        return images


def open_video(source, on_packet=None):
    """Look at a file (path or BytesIO) without decoding more than its first frame; a sentence if it is no video.

    The whole file is gone through once for its frames' times; `on_packet()` is called along the way, and may raise.
    """
    name = "The video" if isinstance(source, io.BytesIO) else Path(source).name
    if not isinstance(source, io.BytesIO):
        source = Path(source)
        _refuse_unreadable(source, name)
        if source.suffix.lower() in ANIMATIONS:
            return _open_animation(source, name)
    with _container(source, name) as container:
        stream = _picture_stream(container, name)
        times, last, declared = _scan(container, stream, on_packet)
    with _container(source, name) as container:
        stream = _picture_stream(container, name)
        frame = next(container.decode(stream), None)
        if frame is None:
            raise VideoLDMError(f"{name} has no frame that can be decoded: it is empty or cut off. Get it again.")
        height, width = _upright(frame).shape[:2]
        clock = even_clock(np.array(times), last, stream.average_rate)
        return VideoFile(source, name, width, height, clock, tuple(times), declared,
                         bool(container.streams.audio), animation=False, rotated=bool(frame.rotation))


def read_audio(source, start=0.0, seconds=None):
    """Sound of a file as float32 (channels, samples) and its sample rate, or None; from `start`, for `seconds`."""
    with _container(source, str(source)) as container:
        if not container.streams.audio:
            return None
        stream = container.streams.audio[0]
        resampler = av.AudioResampler(format="fltp", layout=stream.layout, rate=stream.rate)
        chunks, offset = [], None
        for frame in container.decode(stream):
            offset = frame.time if offset is None else offset
            chunks += [piece.to_ndarray() for piece in resampler.resample(frame)]
        chunks += [piece.to_ndarray() for piece in resampler.resample(None)]
        if not chunks:
            return None
        # Sound need not begin with the picture; silence in front keeps the two together.
        sound, late = np.concatenate(chunks, 1), round((offset or 0) * stream.rate)
        sound = np.pad(sound, ((0, 0), (late, 0))) if late > 0 else sound[:, -late:]
        first = round(start * stream.rate)
        end = None if seconds is None else first + round(seconds * stream.rate)
        return sound[:, first:end], stream.rate


def _refuse_unreadable(path, name):
    if not path.is_file():
        raise VideoLDMError(f"There is no file {name} in {path.parent}.")
    if path.stat().st_size == 0:
        raise VideoLDMError(f"{name} is empty (0 bytes): its upload or download failed. Get it again.")


@contextmanager
def _container(source, name):
    """An open PyAV container; every FFmpeg failure inside becomes a sentence."""
    if isinstance(source, io.BytesIO):
        source.seek(0)
    try:
        with av.open(source if isinstance(source, io.BytesIO) else str(source), mode="r") as container:
            if any(mark in container.format.name for mark in NOT_VIDEOS):
                raise VideoLDMError(f"{name} is not a video ({container.format.long_name}). "
                                    "Pictures are read by the node Load Image.")
            yield container
    except av.FFmpegError as error:
        raise VideoLDMError(f"{name} cannot be read as a video: {_reason(source)}. Get the file again, or convert it "
                            f"to MP4. (FFmpeg says: {error.strerror})") from error


def _reason(source):
    if isinstance(source, io.BytesIO):
        return "it is damaged, cut off or not a video"
    with open(source, "rb") as file:
        head = file.read(512)
    if head[4:8] == b"ftyp":
        return "it is damaged or was cut off, as a video whose upload or download did not finish"
    if head.lstrip()[:1] == b"<":
        return "it is a web page or an XML document saved under this name"
    return "it is damaged or not a video"


def _picture_stream(container, name):
    """The first video stream that is not a sound file's cover picture."""
    for stream in container.streams.video:
        if not stream.disposition & av.stream.Disposition.attached_pic:
            stream.thread_type = "AUTO"
            return stream
    kind = "sound" if container.streams.audio else "neither pictures nor sound"
    raise VideoLDMError(f"{name} has {kind} but no video in it. Choose a file with pictures.")


def _scan(container, stream, on_packet):
    """When each frame appears (seconds), how long the last stays, and how many the header promises (0: unsaid)."""
    usual = float(1 / stream.average_rate) if stream.average_rate else 0.0
    lengths, untimed, hidden = {}, 0, 0
    for packet in container.demux(stream):
        if on_packet is not None:
            on_packet()
        if not packet.size or packet.is_corrupt:
            continue
        if packet.is_discard:       # frames before the start of a trimmed MP4: in the file, not in the video
            hidden += 1
        elif packet.pts is None:
            untimed += 1
        else:
            lengths[packet.pts] = packet.duration
    if untimed or not lengths:
        return [k * usual for k in range(untimed + len(lengths))], usual, max(0, stream.frames - hidden)
    times = [float(time * stream.time_base) for time in sorted(lengths)]
    last = float((lengths[max(lengths)] or 0) * stream.time_base) or usual
    if stream.frames:
        return times, last, stream.frames - hidden
    return times, last, len(times) + _missing(container, stream, times[-1] + last)


def _missing(container, stream, end):
    """How many frames a Matroska or WebM file lacks: it states a duration, which a cut file does not reach."""
    stated = _stated_duration(container, stream)
    if not stated or not stream.average_rate:
        return 0
    tolerance = max(3 / float(stream.average_rate), 0.05 * stated)
    return round((stated - end) * float(stream.average_rate)) if end < stated - tolerance else 0


def _stated_duration(container, stream):
    text = stream.metadata.get("DURATION")
    if text:
        hours, minutes, seconds = text.split(":")
        return int(hours) * 3600 + int(minutes) * 60 + float(seconds)
    alone = len(container.streams) == 1     # otherwise the longest of the streams
    return container.duration / av.time_base if alone and container.duration else None


def _upright(frame):
    """uint8 (h, w, 3), turned by the rotation that phones write beside the picture instead of turning it."""
    if isinstance(frame, np.ndarray):
        return frame
    # Named one by one because older PyAV otherwise takes every picture for BT.601.
    array = frame.reformat(format="rgb24", src_colorspace=frame.colorspace, dst_colorspace=BT601,
                           src_color_range=frame.color_range, dst_color_range=FULL_RANGE).to_ndarray()
    turns = round(frame.rotation / 90)
    return np.ascontiguousarray(np.rot90(array, turns)) if turns % 4 else array


def _decode(video, first):
    """(index, frame) of the file's own frames, from `first` or somewhere before it, up to the end or to damage."""
    if first > SEEK_BEYOND:
        sought = _decode_from(video, first)
        found = next(sought, None)
        if found is not None and found[0] <= first:
            yield found
            yield from sought
            return
    with _container(video.source, video.name) as container:
        yield from enumerate(_decodable(container, _picture_stream(container, video.name)))


def _decode_from(video, first):
    """(index, frame) from the key frame at or before `first`. Nothing if the frame found there has a time that the
    scan did not see: then counting from the beginning is the exact way (VP8's hidden frames, broken time stamps)."""
    with _container(video.source, video.name) as container:
        stream = _picture_stream(container, video.name)
        if stream.codec_context.name == "vp8":
            return
        container.seek(int(video.times[first] / stream.time_base), stream=stream)
        frames = _decodable(container, stream)
        frame = next(frames, None)
        if frame is None or frame.time is None:
            return
        index = int(np.argmin(np.abs(np.array(video.times) - frame.time)))
        if abs(video.times[index] - frame.time) < 1e-6:
            yield index, frame
            yield from enumerate(frames, index + 1)


def _decodable(container, stream):
    """Decoded frames up to the end or the first packet that cannot be decoded; the caller misses what it needs."""
    try:
        yield from container.decode(stream)
    except av.error.InvalidDataError:
        return


def _open_animation(path, name):
    try:
        with Image.open(path) as image:
            # imageio does not say how long each frame stays, so Pillow is asked.
            lengths = np.array([_length(frame) for frame in ImageSequence.Iterator(image)], float) / 1000
            width, height = image.size
            quantum = 0.01 if image.format == "GIF" else 0.001
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        raise VideoLDMError(f"{name} cannot be read as an animation: it is damaged, cut off or another kind of file. "
                            f"Get it again. (Pillow says: {error})") from error
    # Browsers show GIF frames of 10 ms and less for 100 ms, and so everyone authors them.
    lengths[lengths <= 0.01] = 0.1
    times = np.concatenate([[0.0], np.cumsum(lengths)[:-1]])
    clock = even_clock(times, lengths[-1], quantum=quantum)
    promised = len(times) + 1 if _lacks_gif_end(path) else len(times)
    return VideoFile(path, name, width, height, clock, tuple(times), promised, False, animation=True)


def _lacks_gif_end(path):
    """GIF does not say how many frames it has, but it ends with a semicolon, after which some programs write zeros."""
    data = path.read_bytes()
    return data.startswith(b"GIF") and not data.rstrip(b"\0").endswith(b";")


def _length(frame):
    """Milliseconds that a frame stays; WebP's are known only once the frame is decoded."""
    frame.load()
    return frame.info.get("duration", 0)


def _decode_animation(video, first):
    return enumerate(iio.imiter(video.source, plugin="pillow", mode="RGB", writeable_output=False))
