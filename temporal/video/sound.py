"""The sound of a file: read for a range of frames, in the file's own channels, in pieces; and written."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import av
import numpy as np

from ..errors import VideoLDMError
from .containers import open_container, sound_stream, unnamed
from .read import VideoFile

# {number of channels: FFmpeg's name of their loudspeakers}, as Opus defines them
LAYOUTS = {1: "mono", 2: "stereo", 3: "3.0", 4: "quad", 5: "5.0", 6: "5.1", 7: "6.1", 8: "7.1"}
# The layouts to write. FFmpeg writes 5.0 and 6.1 in Opus with a wrong order of channels, and 6.1 in AAC without the
# names of the loudspeakers. So both are written with one more loudspeaker.
WRITTEN = {**LAYOUTS, 5: "5.1", 7: "7.1"}
AAC_RATES = (96000, 88200, 64000, 48000, 44100, 32000, 24000, 22050, 16000, 12000, 11025, 8000)
OPUS_RATE = 48000
LOWEST_RATE, HIGHEST_RATE = 1000, 768000        # samples per second that can be saved
GAP = 0.05                  # seconds; smaller errors of time stamps make no pause and no repetition
SEEK_BEYOND = 10.0          # seconds; shorter parts are skipped by decoding them
RUN_IN = 1.0                # seconds that are decoded in front of a range, because decoders need a start


@dataclass(frozen=True)
class Sound:
    """Sound that is read while it is written."""

    rate: int                                       # samples per second
    channels: int
    pieces: Callable[[], Iterator[np.ndarray]]      # yields float32 (channels, n) in order; it may end early
    length: int                                     # samples, with those that are missing at the end


def held_sound(wave: np.ndarray, rate: int) -> Sound:
    """The Sound of samples in memory, float32 (channels, samples)."""
    return Sound(rate, wave.shape[0], lambda: iter([wave]), wave.shape[1])


def file_sound(video: VideoFile, start: float | Fraction = 0, seconds: float | Fraction | None = None) -> Sound | None:
    """The sound of a range of a file. None if the file has none.

    It begins with sample round(start * rate) and ends before sample round((start + seconds) * rate), counted from the
    first picture. So ranges that follow each other share no sample and leave none out.
    More than eight channels are mixed to two by FFmpeg's rules.

    Args:
        video: the file.
        start: seconds after the first picture.
        seconds: length of the sound. None: until the pictures end.
    """
    with open_container(video.source) as container:
        stream = sound_stream(container)
        if stream is None:
            return None
        channels, rate = stream.codec_context.layout.nb_channels, stream.rate
    channels = channels if channels in LAYOUTS else 2
    end = video.frames / video.rate if seconds is None else start + seconds
    first = round(start * rate)
    length = max(0, round(end * rate) - first)
    return Sound(rate, channels, lambda: _pieces(video, first, length, channels, rate), length)


def samples_of(sound: Sound, on_samples: Callable[[int], None] | None = None) -> np.ndarray:
    """Every sample of a sound, float32 (channels, length). Samples that are missing at the end are silent.

    on_samples: called after every piece with the samples read so far. It may raise.
    """
    wave, done = np.zeros((sound.channels, sound.length), np.float32), 0
    for piece in sound.pieces():
        wave[:, done:done + piece.shape[1]] = piece
        done += piece.shape[1]
        if on_samples is not None:
            on_samples(done)
    return wave


def read_audio(video: VideoFile, start: float | Fraction = 0, seconds: float | Fraction | None = None,
               on_samples: Callable[[int], None] | None = None) -> tuple[np.ndarray, int] | None:
    """Read sound into memory: float32 (channels, samples), and samples per second. None if the range has no sound.

    It ends with the file's sound, so it may be shorter than the range.

    Args:
        video: the file.
        start: seconds after the first picture.
        seconds: length of the sound. None: until the pictures end.
        on_samples: called after every piece with the samples read so far. It may raise.
    """
    sound = file_sound(video, start, seconds)
    if sound is None:
        return None
    pieces, total = [], 0
    for piece in sound.pieces():
        pieces.append(piece)
        total += piece.shape[1]
        if on_samples is not None:
            on_samples(total)
    return (np.concatenate(pieces, 1), sound.rate) if total else None


def _pieces(video: VideoFile, first: int, length: int, channels: int, rate: int) -> Iterator[np.ndarray]:
    """Yield `length` samples from sample `first` on, at the times that the file states. Gaps become silence."""
    done = 0
    for place, piece in _positioned(_decoded(video, first / rate, channels, rate), video.times[0], rate):
        if done >= length:
            return
        position = place - first
        # A sound that begins very late does not make endless silence, because the range ends before it.
        while done < min(position, length):
            silence = min(position, length, done + rate) - done
            yield np.zeros((channels, silence), np.float32)
            done += silence
        piece = piece[:, max(done - position, 0):length - position] if length > position else piece[:, :0]
        if piece.shape[1]:
            yield piece
            done += piece.shape[1]


def _positioned(decoded: Iterator[tuple[float | None, np.ndarray]], origin: float,
                rate: int) -> Iterator[tuple[int, np.ndarray]]:
    """Yield (position in samples after `origin`, samples).

    A piece follows the one before it, unless the file's time stamp differs by more than GAP.
    """
    following: int | None = None
    for time, piece in decoded:
        position = following
        if time is not None and (following is None or abs((time - origin) * rate - following) > GAP * rate):
            position = round((time - origin) * rate)
        position = 0 if position is None else position      # no time stamp at all
        yield position, piece
        following = position + piece.shape[1]


def _decoded(video: VideoFile, start: float, channels: int,
             rate: int) -> Iterator[tuple[float | None, np.ndarray]]:
    """Yield (seconds, float32 (channels, n)) of the decoded sound. None: no time stamp.

    It begins at `start` seconds after the first picture, or before.
    """
    begin = video.times[0] + start
    if start > SEEK_BEYOND:
        sought = _decoded_once(video, channels, rate, begin - RUN_IN)
        first = next(sought, None)
        if first is not None and first[0] is not None and first[0] <= begin - RUN_IN / 2:
            yield first
            yield from sought
            return
    yield from _decoded_once(video, channels, rate, None)


def _decoded_once(video: VideoFile, channels: int, rate: int,
                  seek: float | None) -> Iterator[tuple[float | None, np.ndarray]]:
    """The same from `seek` seconds on. None: from the beginning of the file."""
    with open_container(video.source) as container:
        stream = sound_stream(container)
        assert stream is not None       # file_sound has found it
        if seek is not None:
            container.seek(int(seek / stream.time_base), stream=stream)
        convert = _Converter(channels, rate)
        for packet in container.demux(stream):
            try:
                frames = packet.decode()
            except (av.error.InvalidDataError, av.error.EOFError):
                continue        # a damaged packet becomes silence, and later ones keep their times
            for frame in frames:
                yield from convert(frame)


class _Converter:
    """Converts decoded frames to float32 of one layout and rate. Format, layout and rate may change within a file."""

    def __init__(self, channels: int, rate: int) -> None:
        self.channels, self.rate = channels, rate
        self.settings: tuple[str, str, int] | None = None
        self.resampler: Any = None

    def __call__(self, frame: av.AudioFrame) -> Iterator[tuple[float | None, np.ndarray]]:
        if not frame.samples or not frame.sample_rate:
            return
        settings = frame.format.name, frame.layout.name, frame.sample_rate
        if settings != self.settings:
            self.settings = settings
            named = not (unnamed(frame.layout) and frame.layout.nb_channels == self.channels)
            self.resampler = av.AudioResampler(format="flt", layout=LAYOUTS[self.channels] if named else frame.layout,
                                               rate=self.rate)
        time, frame.pts = frame.time, None
        for piece in self.resampler.resample(frame):
            # The samples are packed, because PyAV fails on frames with eight planes.
            yield time, np.nan_to_num(piece.to_ndarray().reshape(-1, self.channels).T)
            time = None


def check_sound_rate(rate: float) -> None:
    """Raise VideoLDMError for samples per second that cannot be saved."""
    if not LOWEST_RATE <= rate <= HIGHEST_RATE:
        raise VideoLDMError(f"The sound has {rate} samples a second; {LOWEST_RATE} to {HIGHEST_RATE} can be saved.")


class SoundWriter:
    """Writes sound in step with the pictures, so that neither has to wait in memory for the other."""

    def __init__(self, container: av.container.OutputContainer, codec: str, sound: Sound,
                 picture_rate: Fraction) -> None:
        """Add a sound stream to a container. Raises VideoLDMError for sound that cannot be saved."""
        if sound.channels not in LAYOUTS:
            raise VideoLDMError(f"The sound has {sound.channels} channels; 1 to {max(LAYOUTS)} can be saved. "
                                "Mix it down first.")
        check_sound_rate(sound.rate)
        self.sound, self.layout = sound, LAYOUTS[sound.channels]
        self.picture_rate, self.container, self.done = picture_rate, container, 0
        self._pieces, self._rest = sound.pieces(), np.zeros((sound.channels, 0), np.float32)
        rate = OPUS_RATE if codec == "libopus" else sound.rate if sound.rate in AAC_RATES else OPUS_RATE
        self.stream = container.add_stream(codec, rate=rate, layout=WRITTEN[sound.channels])
        self.stream.bit_rate = 64000 * max(sound.channels, 2)

    def until(self, frames: int) -> None:
        """Write the sound up to the end of the first `frames` frames."""
        end = round(frames / self.picture_rate * self.sound.rate)
        while self.done < end:
            if not self._rest.shape[1]:
                piece = next(self._pieces, None)
                if piece is None:
                    return
                self._rest = piece
            piece, self._rest = self._rest[:, :end - self.done], self._rest[:, end - self.done:]
            self._encode(piece)

    def finish(self) -> None:
        """Write the samples that the encoder still holds."""
        self.container.mux(self.stream.encode(None))

    def _encode(self, piece: np.ndarray) -> None:
        if not piece.shape[1]:
            return
        samples = np.ascontiguousarray(np.nan_to_num(piece).T, np.float32).reshape(1, -1)
        frame = av.AudioFrame.from_ndarray(samples, format="flt", layout=self.layout)
        frame.sample_rate, frame.pts = self.sound.rate, self.done
        self.done += piece.shape[1]
        self.container.mux(self.stream.encode(frame))
