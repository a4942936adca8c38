"""Reading frames of a video or animation file, in any range and stride, with one frame in memory at a time.

Frames are evenly timed, upright, and have square pixels. PyAV reads MP4, MOV, MKV, WebM and others. imageio reads GIF
and WebP.
"""

import io
import itertools
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np

from ..errors import VideoLDMError
from . import animations
from .containers import Source, display_name, open_container, picture_stream, refuse_unreadable, sound_stream
from .deinterlace import deinterlaced
from .pictures import Pictures
from .remarks import TRANSPARENCY, picture_remarks
from .scan import scan
from .timing import Clock, even_clock

SEEK_BEYOND = 120               # frames; fewer frames are skipped by decoding them
_NO_FRAME = -1                  # an index: there is no further frame
SOUND_APART = 0.02              # seconds; sound and pictures that start closer together count as simultaneous


@dataclass(frozen=True)
class VideoFile:
    """A file that can be read. Time 0 is its first picture, for pictures and for sound."""

    source: Source
    name: str                   # the file's name in messages
    width: int                  # of the upright picture, in square pixels
    height: int
    clock: Clock                # the file's own frame that is shown at each step of an even clock
    times: tuple[float, ...]    # seconds at which the file's own frames appear, in order
    cut_off: bool               # True: the file is shorter than it states. `times` end before the first gap
    has_audio: bool
    animation: bool             # True: GIF or WebP
    as_stored: bool             # True: frames and sound are those of the file, unchanged
    change: str = ""            # the changes of pictures and times, for a report

    @property
    def frames(self) -> int:
        """The number of steps of the even clock."""
        return len(self.clock.shown)

    @property
    def rate(self) -> Fraction:
        """Frames per second."""
        return self.clock.rate

    def select(self, start: int = 0, count: int = 0, stride: int = 1) -> np.ndarray:
        """Choose steps of the even clock. Raises VideoLDMError if the file has fewer.

        start: the first step. count: how many steps; 0: to the end. stride: the distance of neighbouring steps.
        """
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

    def iterate(self, steps: np.ndarray | None = None, on_frame: Callable[[int], None] | None = None,
                interlaced: list[int] | None = None, deinterlace: bool = False) -> Iterator[np.ndarray]:
        """Yield the frames at `steps`, each uint8 (h, w, 3).

        Args:
            steps: ascending, from `select`.
            on_frame: called with the number of frames yielded so far; it may raise.
            interlaced: a list to which the numbers of interlaced frames are added, counted from the first of `steps`.
            deinterlace: deinterlace these frames.

        Raises VideoLDMError if a frame cannot be decoded.
        """
        steps = self.select() if steps is None else steps
        shown = self.clock.shown[steps]
        pictures = _AnimationPictures(self) if self.animation else _FilePictures(self, int(shown[0]), deinterlace)
        index: int = -1
        frame: Any = None       # of PyAV or of an animation
        picture: Any = None     # the frame as shown; frames before the wanted one are decoded and left out
        # Closed at once. Otherwise decoders and their threads live until the garbage is collected.
        with closing(pictures.decoded) as decoded:
            for done, wanted in enumerate(shown, 1):
                while index < wanted:
                    index, frame = next(decoded, (_NO_FRAME, None))
                    if index == _NO_FRAME:
                        raise VideoLDMError(f"{self.name} is cut off or damaged: its frame {wanted} of "
                                            f"{len(self.times)} cannot be read. Get the file again, or choose a range "
                                            "that ends before it.")
                    picture = pictures.rgb(frame, done - 1) if index == wanted else None
                if interlaced is not None and index in pictures.interlaced:
                    interlaced.append(done - 1)
                yield picture
                if on_frame is not None:
                    on_frame(done)

    def read(self, steps: np.ndarray | None = None, on_frame: Callable[[int], None] | None = None,
             interlaced: list[int] | None = None, deinterlace: bool = False) -> np.ndarray:
        """The frames at `steps` as one float32 array (t, h, w, 3) in 0..1, like ComfyUI's IMAGE. See `iterate`."""
        steps = self.select() if steps is None else steps
        images = np.empty((len(steps), self.height, self.width, 3), np.float32)
        for k, frame in enumerate(self.iterate(steps, on_frame, interlaced, deinterlace)):
            np.divide(frame, np.float32(255), out=images[k])
        return images


def open_video(source: Source, on_packet: Callable[[], None] | None = None) -> VideoFile:
    """Open a video or animation. Raises VideoLDMError if it is neither.

    The whole file is read once for the times of its frames. Only its first frame is decoded. `on_packet()` is called
    for every packet and may raise.
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
        remarks = picture_remarks(pictures, frame, stream)
        clock = even_clock(np.array(found.times), found.last, stream.average_rate)
        sound, silenced = sound_stream(container), bool(container.streams.audio)
    together = sound is None or abs(_first_sound(source) - found.times[0]) <= SOUND_APART
    change = [clock.change] if clock.change else []
    if silenced and sound is None:
        change.append("its sound cannot be decoded and was left out")
    return VideoFile(source, name, pictures.width, pictures.height, clock, found.times, found.cut_off,
                     sound is not None, animation=False,
                     as_stored=pictures.as_stored and not clock.change and together and not found.cut_off,
                     change="; ".join([*change, *remarks]))


def _open_animation(path: Path) -> VideoFile:
    found = animations.look_into(path)
    times = np.concatenate([[0.0], np.cumsum(found.lengths)[:-1]])
    clock = even_clock(times, found.lengths[-1], quantum=found.quantum)
    change = [clock.change] if clock.change else []
    if found.transparent:
        change.append(TRANSPARENCY)
    return VideoFile(path, path.name, found.width, found.height, clock, tuple(times), found.promised > len(times),
                     False, animation=True, as_stored=False, change="; ".join(change))


def _first_sound(source: Source) -> float:
    """The seconds at which the sound begins. Infinite if there is none."""
    with open_container(source) as container:
        for packet in container.demux(sound_stream(container)):
            if packet.size and packet.pts is not None:
                return float(packet.pts * packet.time_base)
    return float("inf")


class _AnimationPictures:
    """The frames of a GIF or WebP as pictures."""

    def __init__(self, video: VideoFile) -> None:
        assert isinstance(video.source, Path)
        self.video = video
        self.interlaced: set[int] = set()
        self.decoded: Any = animations.frames(video.source)

    def rgb(self, frame: np.ndarray, number: int) -> np.ndarray:
        """The frame itself. Raises VideoLDMError if it has another size than the first."""
        expected = (self.video.height, self.video.width, 3)
        if frame.shape != expected:
            raise VideoLDMError(f"{self.video.name} is damaged: a frame of it is {frame.shape[1]}x{frame.shape[0]}, "
                                f"the others are {expected[1]}x{expected[0]}. Get the file again.")
        return frame


class _FilePictures:
    """The frames of a video file as pictures. `decoded` begins at frame `first` or before it."""

    def __init__(self, video: VideoFile, first: int, deinterlace: bool) -> None:
        self.video = video
        self.interlaced: set[int] = set()       # numbers of the interlaced frames among those decoded so far
        self._pictures: Pictures | None = None
        # The filter looks at the frame before the first one too.
        self.decoded: Any = deinterlaced(self._decode(max(first - 1, 0)), video.name) if deinterlace else \
            self._decode(first)

    def rgb(self, frame: av.VideoFrame, number: int) -> np.ndarray:
        assert self._pictures is not None       # made when the first frame was decoded
        return self._pictures.rgb(frame, number)

    def _decode(self, first: int) -> Iterator[tuple[int, av.VideoFrame]]:
        """Yield (index, frame) of the file's own frames, up to the end or to the first damage."""
        if first > SEEK_BEYOND:
            sought = self._decode_from(first)
            found = next(sought, None)
            if found is not None and found[0] <= first:
                yield found
                yield from sought
                return
        with open_container(self.video.source) as container:
            for index, frame in enumerate(_decodable(container, self._open(container))):
                self._look_at(index, frame)
                yield index, frame

    def _decode_from(self, first: int) -> Iterator[tuple[int, av.VideoFrame]]:
        """Yield (index, frame) from the key frame at or before `first`.

        Yields nothing if the scan did not see the time of the frame found there. This happens with VP8's hidden frames
        and broken time stamps. Then the frames have to be counted from the beginning.
        """
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
                for number, found in enumerate(itertools.chain([frame], frames), index):
                    self._look_at(number, found)
                    yield number, found

    def _open(self, container: av.container.InputContainer) -> av.VideoStream:
        stream = picture_stream(container, self.video.name)
        self._aspect = stream.sample_aspect_ratio
        return stream

    def _look_at(self, index: int, frame: av.VideoFrame) -> None:
        if frame.interlaced_frame:
            self.interlaced.add(index)
        if self._pictures is None:
            self._pictures = Pictures(self.video.name, frame, self._aspect)


def _decodable(container: av.container.InputContainer,
               stream: av.VideoStream) -> Generator[av.VideoFrame, None, None]:
    """Yield decoded frames up to the end or to the first packet that cannot be decoded."""
    try:
        for packet in container.demux(stream):
            yield from packet.decode()
    except (av.error.InvalidDataError, av.error.EOFError):
        try:
            yield from stream.codec_context.decode(None)    # frames that the decoder still holds
        except (av.error.InvalidDataError, av.error.EOFError):
            return
