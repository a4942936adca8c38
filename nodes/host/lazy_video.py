"""A VIDEO whose frames are made while it is written, so that one window of it is in memory.

It has core's interface of a VIDEO, so core's Save Video streams it too. `iterate_frames()` is the pack's own addition.
A node that calls `get_components()` gets all frames at once.
"""

import logging
import math
import shutil
import tempfile
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...temporal.errors import VideoLDMError
from ...temporal.video import as_rate, write_video
from . import files
from .api import Types
from .pixels import broken_frames, frame_bytes
from .sockets import Audio
from .sounds import part_of
from .streamed_video import StreamedVideo
from .video_sources import sound_of

CRF = 18                # constant rate factor, for saving nodes without a widget for it
ENDINGS = {".mp4": "mp4", ".webm": "webm"}
CODECS = {"mp4": ("auto", "h264"), "webm": ("auto", "vp9")}


class LazyVideo(StreamedVideo):
    """A VIDEO that makes its frames when they are asked for."""

    def __init__(self, make: Callable[[int, int], Iterator[torch.Tensor]], count: int, width: int, height: int,
                 rate: Any, first: int = 0, audio: Audio | None = None) -> None:
        """
        Args:
            make: make(first, last) gives the frames of that range in order, some at a time, as IMAGE (n h w 3) in
                0..1. It may be called more than once, and gives the same frames each time.
            count: frames.
            width, height: pixels.
            rate: frames per second.
            first: number of the first frame, as `make` counts.
            audio: the sound, which begins with the first frame.
        """
        self._audio = audio
        self._make, self._count, self._size = make, count, (width, height)
        self._rate, self._first = as_rate(rate), first

    def pieces(self) -> Iterator[torch.Tensor]:
        return self._make(self._first, self._first + self._count)

    def iterate_frames(self, broken: list[int] | None = None, bits: int = 8) -> Iterator[np.ndarray]:
        """Frames as uint8 or uint16 (h w 3), rounded to the nearest value.

        broken: a list to which the numbers of frames with NaN are added. NaN becomes black. bits: 8 or 16.
        """
        number = 0
        for piece in self.pieces():
            for frame in piece:
                yield frame_bytes(frame, number, broken, bits)
                number += 1

    def get_audio(self) -> Audio | None:
        """ComfyUI's AUDIO. None if there is no sound."""
        return self._audio

    def get_dimensions(self) -> tuple[int, int]:
        return self._size

    def get_frame_count(self) -> int:
        return self._count

    def get_frame_rate(self) -> Fraction:
        return self._rate

    def get_duration(self) -> float:
        return float(self._count / self._rate)

    def get_container_format(self) -> str:
        return "mp4"

    def get_components(self) -> Any:
        """All frames at once, in memory."""
        width, height = self._size
        files.refuse_beyond_memory(self._count * width * height * 12,
                                   f"{self._count} frames of {width}x{height} at once",
                                   "Save the VIDEO with Save Video or Save Video File, which take it piece by piece.")
        images = torch.empty(self._count, height, width, 3)
        step, done = files.progress(self._count), 0
        for piece in self.pieces():
            images[done:done + len(piece)] = piece
            done += len(piece)
            step(done)
        return Types.VideoComponents(images=images, audio=self._audio, frame_rate=self._rate)

    def as_trimmed(self, start_time: float | None = None, duration: float | None = None,
                   strict_duration: bool = False) -> "LazyVideo | None":
        """A part of this video, None if no frame is in it.

        Args:
            start_time: seconds from the start, or from the end if negative.
            duration: seconds; 0 goes to the end.
            strict_duration: None also if the part is shorter than `duration`.
        """
        part = self._trim(start_time, duration, strict_duration)
        return part and LazyVideo(self._make, part[1], *self._size, self._rate, self._first + part[0],
                                  self._audio_of(part))

    def _audio_of(self, part: tuple[int, int]) -> Audio | None:
        """The sound of a part from `_trim`."""
        return part_of(self._audio, part[0] / self._rate, sum(part) / self._rate)

    def _trim(self, start_time: float | None, duration: float | None,
              strict_duration: bool) -> tuple[int, int] | None:
        """(first frame, count) of a part. None if no frame is in it."""
        start, length = as_seconds("start_time", start_time), as_seconds("duration", duration)
        if length < 0:
            raise VideoLDMError(f"duration is {length:g} seconds; it must be 0 (to the end) or more.")
        start = max(start + self.get_duration(), 0.0) if start < 0 else start
        first = math.floor(start * self._rate + 1e-6)
        left = self._count - first
        asked = round(length * self._rate) if length else left
        count = min(left, asked)
        return None if count < 1 or (strict_duration and count < asked) else (first, count)

    def save_to(self, path: Any, format: Any = "auto", codec: Any = "auto", metadata: dict | None = None,
                bit_depth: int | None = None, crf: Any = None, color_space: Any = None, **options: Any) -> None:
        """Write to a file or a binary stream: all of the video or nothing. Progress and Cancel are the running node's.

        Args:
            path: a file's path or a binary stream.
            format, codec: core's choices; "auto" goes by the file's name.
            metadata: the workflow, to store in the file.
            bit_depth: 8 or None; the pack writes nothing else.
            crf: constant rate factor; None takes the default.
            color_space: sRGB, "auto" or None; the pack writes nothing else.
            options: what newer versions of ComfyUI pass, unused.
        """
        kind = file_kind(path, plain(format), plain(codec))
        if color_space not in (None, "auto", "sRGB") or (bit_depth or 8) != 8:
            raise VideoLDMError("This video has 8 bits per colour in sRGB and nothing else. Set the colour space of "
                                "Save Video to sRGB.")
        if isinstance(path, (str, Path)):
            return self._write(Path(path), kind, crf, metadata)
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / f"video.{kind}"
            self._write(file, kind, crf, metadata)
            with open(file, "rb") as source:
                shutil.copyfileobj(source, path)

    def _write(self, path: Path, kind: str, crf: Any, metadata: dict | None) -> None:
        broken: list[int] = []
        write_video(path, self.iterate_frames(broken), self._rate, kind, _quality(crf, kind), metadata,
                    sound_of(self.get_audio()), files.progress(self._count))
        if broken:
            logging.warning("%s: %s.", path.name, broken_frames(broken))


class HeldVideo(LazyVideo):
    """A VIDEO of frames that are in memory, with their sound.

    Core's VideoFromComponents keeps two channels of sound, and darkens the frames because it rounds them down.
    """

    def __init__(self, images: torch.Tensor, rate: Any, audio: Audio | None = None) -> None:
        """images: IMAGE (t h w c). audio: the AUDIO that belongs to these frames."""
        self.images = images
        super().__init__(lambda first, last: iter([images[first:last]]), len(images), images.shape[2], images.shape[1],
                         rate, audio=audio)

    def get_components(self) -> Any:
        return Types.VideoComponents(images=self.images, audio=self._audio, frame_rate=self._rate)

    def as_trimmed(self, start_time: float | None = None, duration: float | None = None,
                   strict_duration: bool = False) -> "LazyVideo | None":
        part = self._trim(start_time, duration, strict_duration)
        return part and HeldVideo(self.images[part[0]:sum(part)], self._rate, self._audio_of(part))


def as_seconds(name: str, value: Any) -> float:
    """A time in seconds that another node asks for. None is 0."""
    if value is None:
        return 0.0
    if not isinstance(value, (int, float)) or not math.isfinite(value):
        raise VideoLDMError(f"{name} is {value} seconds; it must be a number.")
    return float(value)


def _quality(crf: Any, kind: str) -> int:
    """The constant rate factor to encode with. Raises if the codec has no such factor."""
    if crf is None:
        return CRF
    highest = 51 if kind == "mp4" else 63
    if not isinstance(crf, (int, float)) or not 0 <= crf <= highest:
        raise VideoLDMError(f"crf is {crf}; for {kind} it must be a number from 0 to {highest}.")
    return round(crf)


def plain(choice: Any) -> str:
    """The text of a choice. Core passes an enum in some versions of ComfyUI and text in others."""
    return str(getattr(choice, "value", choice)).lower()


def file_kind(path: Any, format: str, codec: str) -> str:
    """The kind of file to write, mp4 or webm. Raises for formats and codecs that the pack does not write."""
    ending = ENDINGS.get(Path(path).suffix.lower(), "mp4") if isinstance(path, (str, Path)) else "mp4"
    kind = ending if format == "auto" else format
    if kind not in CODECS or codec not in CODECS[kind]:
        raise VideoLDMError(f"This video streams to mp4 with h264 and to webm with vp9, not to {format} with {codec}. "
                            "Choose mp4 and auto in Save Video, or use Save Video File.")
    return kind
