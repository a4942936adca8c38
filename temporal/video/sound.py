"""Sound of a file: that of chosen frames alone, in its channels, piece by piece."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import av
import numpy as np

from ..errors import VideoLDMError
from .containers import open_container, sound_stream, unnamed
from .read import VideoFile

# The loudspeakers that sound of so many channels is for, in the order of the channels. Those that Opus has.
LAYOUTS = {1: "mono", 2: "stereo", 3: "3.0", 4: "quad", 5: "5.0", 6: "5.1", 7: "6.1", 8: "7.1"}
# FFmpeg writes Opus of 5.0 and 6.1 with its channels in a wrong order, and AAC of 6.1 without naming them. Both are
# written with one more loudspeaker.
WRITTEN = {**LAYOUTS, 5: "5.1", 7: "7.1"}
AAC_RATES = (96000, 88200, 64000, 48000, 44100, 32000, 24000, 22050, 16000, 12000, 11025, 8000)
OPUS_RATE = 48000
GAP = 0.05                  # seconds by which times may be off without a pause in the sound, or a repetition
SEEK_BEYOND = 10.0          # seconds; skipping less by decoding it is fast enough
RUN_IN = 1.0                # seconds that are decoded before the first that is wanted, for decoders need a start


@dataclass(frozen=True)
class Sound:
    """Sound that is made while it is written. `pieces()` gives float32 (channels, n) in order; it may end early."""

    rate: int               # samples per second
    channels: int
    pieces: Callable[[], Iterator[np.ndarray]]


def held_sound(wave: np.ndarray, rate: int) -> Sound:
    """Sound that is in memory, float32 (channels, samples)."""
    return Sound(rate, wave.shape[0], lambda: iter([wave]))


def file_sound(video: VideoFile, start: float = 0.0, seconds: float | None = None) -> Sound | None:
    """Sound of a file from `start` (seconds after its first picture) for `seconds`, else while its pictures last.

    None if the file has no sound. More than eight channels are mixed to two by FFmpeg's rules.
    """
    with open_container(video.source) as container:
        stream = sound_stream(container)
        if stream is None:
            return None
        channels, rate = stream.codec_context.layout.nb_channels, stream.rate
    channels = channels if channels in LAYOUTS else 2
    seconds = float(video.frames / video.rate) - start if seconds is None else seconds
    length = max(0, round(seconds * rate))
    return Sound(rate, channels, lambda: _pieces(video, start, length, channels, rate))


def read_audio(video: VideoFile, start: float = 0.0, seconds: float | None = None,
               on_samples: Callable[[int], None] | None = None) -> tuple[np.ndarray, int] | None:
    """The same in memory: float32 (channels, samples) and samples per second, None if nothing is heard in this range.

    on_samples(total) is told of all that was read so far, at every piece, and may raise.
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


def _pieces(video, start, length, channels, rate):
    """Samples of the range by the times that the file gives them: silence where there is none, in front too."""
    begin, done = video.times[0] + start, 0
    for position, piece in _placed(_decoded(video, begin, channels, rate), begin, rate):
        if done >= length:
            return
        # A sound that begins years later is not silence for years: the range ends before.
        while done < min(position, length):
            silence = min(position, length, done + rate) - done
            yield np.zeros((channels, silence), np.float32)
            done += silence
        piece = piece[:, max(done - position, 0):length - position] if length > position else piece[:, :0]
        if piece.shape[1]:
            yield piece
            done += piece.shape[1]


def _placed(decoded, begin, rate):
    """(place in samples after `begin`, samples): one after the other unless the file's times say otherwise."""
    following = None
    for time, piece in decoded:
        position = following
        if time is not None and (following is None or abs((time - begin) * rate - following) > GAP * rate):
            position = round((time - begin) * rate)
        position = 0 if position is None else position
        yield position, piece
        following = position + piece.shape[1]


def _decoded(video, begin, channels, rate):
    """(seconds, float32 (channels, n)) of the decoded sound, from `begin` or before it."""
    if begin - video.times[0] > SEEK_BEYOND:
        sought = _decoded_once(video, channels, rate, begin - RUN_IN)
        first = next(sought, None)
        if first is not None and first[0] is not None and first[0] <= begin - RUN_IN / 2:
            yield first
            yield from sought
            return
    yield from _decoded_once(video, channels, rate, None)


def _decoded_once(video, channels, rate, seek):
    with open_container(video.source) as container:
        stream = sound_stream(container)
        if seek is not None:
            container.seek(int(seek / stream.time_base), stream=stream)
        convert = _Converter(channels, rate)
        for packet in container.demux(stream):
            try:
                frames = packet.decode()
            except (av.error.InvalidDataError, av.error.EOFError):
                continue        # a damaged packet is silent; what follows stays in its place
            for frame in frames:
                yield from convert(frame)


class _Converter:
    """Decoded frames as float32 of one layout and rate, whatever changes on the way."""

    def __init__(self, channels, rate):
        self.channels, self.rate, self.settings, self.resampler = channels, rate, None, None

    def __call__(self, frame):
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
            # Packed, for PyAV loses its way where a frame has eight planes.
            yield time, np.nan_to_num(piece.to_ndarray().reshape(-1, self.channels).T)
            time = None


class SoundWriter:
    """Writes sound alongside the pictures, so that neither has to wait in memory for the other."""

    def __init__(self, container: av.container.OutputContainer, codec: str, sound: Sound, picture_rate):
        if sound.channels not in LAYOUTS:
            raise VideoLDMError(f"The sound has {sound.channels} channels; 1 to {max(LAYOUTS)} can be saved. "
                                "Mix it down first.")
        if not 1000 <= sound.rate <= 768000:
            raise VideoLDMError(f"The sound has {sound.rate} samples a second; 1000 to 768000 can be saved.")
        self.sound, self.layout = sound, LAYOUTS[sound.channels]
        self.picture_rate, self.container, self.done = picture_rate, container, 0
        self._pieces, self._rest = sound.pieces(), np.zeros((sound.channels, 0), np.float32)
        rate = OPUS_RATE if codec == "libopus" else sound.rate if sound.rate in AAC_RATES else OPUS_RATE
        self.stream = container.add_stream(codec, rate=rate, layout=WRITTEN[sound.channels])
        self.stream.bit_rate = 64000 * max(sound.channels, 2)

    def until(self, frames: int) -> None:
        """Write the sound of the first `frames` frames."""
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
        """Write what the encoder still holds."""
        self.container.mux(self.stream.encode(None))

    def _encode(self, piece):
        if not piece.shape[1]:
            return
        samples = np.ascontiguousarray(np.nan_to_num(piece).T, np.float32).reshape(1, -1)
        frame = av.AudioFrame.from_ndarray(samples, format="flt", layout=self.layout)
        frame.sample_rate, frame.pts = self.sound.rate, self.done
        self.done += piece.shape[1]
        self.container.mux(self.stream.encode(frame))
