"""Read frames of a video or animation file: any range and stride, evenly timed, upright, in square pixels, one frame in
memory at a time.

MP4, MOV, MKV, WebM and other files that PyAV opens; GIF and WebP through imageio.
"""

import io
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from ..errors import VideoLDMError
from . import animations
from .containers import display_name, open_container, picture_stream, refuse_unreadable, sound_stream
from .pictures import Pictures
from .scan import scan
from .timing import Clock, even_clock

SEEK_BEYOND = 120               # frames; skipping fewer by decoding them is fast enough
SOUND_APART = 0.02              # seconds by which sound may begin before or after the pictures and count as together


@dataclass(frozen=True)
class VideoFile:
    """A file that can be read. Its time begins with its first picture, for pictures and for sound."""

    source: object              # a path or a BytesIO
    name: str                   # for sentences
    width: int                  # of the upright picture in square pixels
    height: int
    clock: Clock                # which of the file's own frames is shown at each step
    times: tuple                # seconds at which the file's own frames appear, in order
    cut_off: bool               # the file is shorter than it says; `times` end before what is missing
    has_audio: bool
    animation: bool             # GIF or WebP
    as_stored: bool             # frames and sound are those of the file, unchanged
    change: str = ""            # what is done to pictures and times, for a report

    @property
    def frames(self) -> int:
        return len(self.clock.shown)

    @property
    def rate(self) -> Fraction:
        """Frames per second."""
        return self.clock.rate

    def select(self, start: int = 0, count: int = 0, stride: int = 1) -> np.ndarray:
        """Steps of the even clock: `count` of them (0: to the end), `stride` apart, from `start`."""
        if start >= self.frames:
            raise VideoLDMError(f"{self.name} has {self.frames} frames, so start_frame can be at most "
                                f"{self.frames - 1}; it is {start}.")
        steps = np.arange(start, self.frames, min(stride, self.frames))
        if count > len(steps):
            raise VideoLDMError(f"{self.name} has {self.frames} frames: from frame {start} with stride {stride} there "
                                f"are {len(steps)}, and {count} were asked for. Lower frame_count, or 0 for all.")
        if not count and self.cut_off:
            raise VideoLDMError(f"{self.name} is cut off: it is longer by what it says, and {self.frames} frames of it "
                                f"are there. Get it again, or set frame_count to at most {len(steps)}.")
        return steps[:count] if count else steps

    def iterate(self, steps: np.ndarray | None = None,
                on_frame: Callable[[int], None] | None = None) -> Iterator[np.ndarray]:
        """Frames at `steps` (ascending, from `select`), each uint8 (h, w, 3); `on_frame(done)` after each."""
        steps = self.select() if steps is None else steps
        shown = self.clock.shown[steps]
        pictures = _AnimationPictures(self) if self.animation else _FilePictures(self, int(shown[0]))
        index, picture = -1, None
        # Closed as soon as it is not needed, or decoders and their threads live until the garbage is collected.
        with closing(pictures.decoded) as decoded:
            for done, wanted in enumerate(shown, 1):
                while index < wanted:
                    index, frame = next(decoded, (None, None))
                    if index is None:
                        raise VideoLDMError(f"{self.name} is cut off or damaged: its frame {wanted} of "
                                            f"{len(self.times)} cannot be read. Get the file again, or choose a range "
                                            "that ends before it.")
                    picture = pictures.rgb(frame, done - 1) if index == wanted else None
                yield picture
                if on_frame is not None:
                    on_frame(done)

    def read(self, steps: np.ndarray | None = None, on_frame: Callable[[int], None] | None = None) -> np.ndarray:
        """Frames at `steps` as one float32 array (t, h, w, 3) in 0..1, ComfyUI's IMAGE."""
        steps = self.select() if steps is None else steps
        images = np.empty((len(steps), self.height, self.width, 3), np.float32)
        for k, frame in enumerate(self.iterate(steps, on_frame)):
            np.divide(frame, np.float32(255), out=images[k])
        return images


def open_video(source: object, on_packet: Callable[[], None] | None = None) -> VideoFile:
    """Look at a file (path or BytesIO) without decoding more than its first frame; a sentence if it is no video.

    The whole file is gone through once for its frames' times; `on_packet()` is called along the way, and may raise.
    """
    name = display_name(source)
    if not isinstance(source, io.BytesIO):
        source = Path(source)
        refuse_unreadable(source)
        if source.suffix.lower() in animations.ENDINGS:
            return _open_animation(source)
    found = scan(source, on_packet)
    with open_container(source) as container:
        stream = picture_stream(container, name)
        with closing(_decodable(container, stream)) as frames:
            frame = next(frames, None)
        if frame is None or not found.times:
            raise VideoLDMError(f"{name} has no frame that can be decoded: it is empty or cut off. Get it again.")
        pictures = Pictures(name, frame, stream.sample_aspect_ratio)
        clock = even_clock(np.array(found.times), found.last, stream.average_rate)
        sound, silenced = sound_stream(container), bool(container.streams.audio)
    together = sound is None or abs(_first_sound(source) - found.times[0]) <= SOUND_APART
    change = [clock.change] if clock.change else []
    if silenced and sound is None:
        change.append("its sound cannot be decoded and was left out")
    if pictures.stretched:
        change.append(f"its pixels are not square: {frame.width}x{frame.height} became {pictures.square_width}x"
                      f"{frame.height}")
    return VideoFile(source, name, pictures.width, pictures.height, clock, found.times, found.cut_off,
                     sound is not None, animation=False,
                     as_stored=pictures.as_stored and not clock.change and together and not found.cut_off,
                     change="; ".join(change))


def _open_animation(path):
    width, height, lengths, quantum, promised = animations.frame_times(path)
    times = np.concatenate([[0.0], np.cumsum(lengths)[:-1]])
    clock = even_clock(times, lengths[-1], quantum=quantum)
    return VideoFile(path, path.name, width, height, clock, tuple(times), promised > len(times), False,
                     animation=True, as_stored=False, change=clock.change)


def _first_sound(source):
    """Seconds at which the sound begins; endless if there is none."""
    with open_container(source) as container:
        for packet in container.demux(sound_stream(container)):
            if packet.size and packet.pts is not None:
                return float(packet.pts * packet.time_base)
    return float("inf")


class _AnimationPictures:
    def __init__(self, video):
        self.video, self.decoded = video, animations.frames(video.source)

    def rgb(self, frame, number):
        """Frames of one size, as they are."""
        expected = (self.video.height, self.video.width, 3)
        if frame.shape != expected:
            raise VideoLDMError(f"{self.video.name} is damaged: a frame of it is {frame.shape[1]}x{frame.shape[0]}, "
                                f"the others are {expected[1]}x{expected[0]}. Get the file again.")
        return frame


class _FilePictures:
    """Decoded frames of a file, from frame `first` or somewhere before it, and how they become pictures."""

    def __init__(self, video, first):
        self.video, self._pictures = video, None
        self.decoded = self._decode(first)

    def rgb(self, frame, number):
        return self._pictures.rgb(frame, number)

    def _decode(self, first):
        """(index, frame) of the file's own frames, up to the end or to damage."""
        if first > SEEK_BEYOND:
            sought = self._decode_from(first)
            found = next(sought, None)
            if found is not None and found[0] <= first:
                yield found
                yield from sought
                return
        with open_container(self.video.source) as container:
            for index, frame in enumerate(_decodable(container, self._open(container))):
                self._look_at(frame)
                yield index, frame

    def _decode_from(self, first):
        """(index, frame) from the key frame at or before `first`. Nothing if the frame found there has a time that the
        scan did not see: then counting from the beginning is the exact way (VP8's hidden frames, broken time stamps)."""
        with open_container(self.video.source) as container:
            stream = self._open(container)
            if stream.codec_context.name == "vp8":
                return
            container.seek(int(self.video.times[first] / stream.time_base), stream=stream)
            frames = _decodable(container, stream)
            frame = next(frames, None)
            if frame is None or frame.time is None:
                return
            index = int(np.argmin(np.abs(np.array(self.video.times) - frame.time)))
            if abs(self.video.times[index] - frame.time) < 1e-6:
                self._look_at(frame)
                yield index, frame
                yield from enumerate(frames, index + 1)

    def _open(self, container):
        stream = picture_stream(container, self.video.name)
        self._aspect = stream.sample_aspect_ratio
        return stream

    def _look_at(self, frame):
        if self._pictures is None:
            self._pictures = Pictures(self.video.name, frame, self._aspect)


def _decodable(container, stream):
    """Decoded frames up to the end or the first packet that cannot be decoded; the caller misses what it needs."""
    try:
        for packet in container.demux(stream):
            yield from packet.decode()
    except (av.error.InvalidDataError, av.error.EOFError):
        try:
            yield from stream.codec_context.decode(None)    # what was decoded before it and not yet given out
        except (av.error.InvalidDataError, av.error.EOFError):
            return
