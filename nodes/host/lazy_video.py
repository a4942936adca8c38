"""A VIDEO whose frames are made while they are written: core's Save Video and the pack's own hold one window of it.

Core's interface of VIDEO, plus `iterate_frames()` for nodes that know it. Whoever asks for components gets them all.
"""

import math
import shutil
import tempfile
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch

from ...temporal.errors import VideoLDMError
from ...temporal.video import as_rate, write_video
from . import files
from .api import Input, Types

CRF = 18                # of H.264, where the saving node has no such widget
ENDINGS = {".mp4": "mp4", ".webm": "webm"}
CODECS = {"mp4": ("auto", "h264"), "webm": ("auto", "vp9")}


class LazyVideo(Input.Video):
    """make(first, last): the frames of that range in order, some at a time, each IMAGE-like (n h w 3) in 0..1. It may
    be called more than once and gives the same frames each time."""

    def __init__(self, make: Callable[[int, int], Iterator[torch.Tensor]], count: int, width: int, height: int, rate,
                 first: int = 0):
        self._make, self._count, self._size = make, count, (width, height)
        self._rate, self._first = as_rate(rate), first

    def pieces(self) -> Iterator[torch.Tensor]:
        return self._make(self._first, self._first + self._count)

    def iterate_frames(self) -> Iterator[np.ndarray]:
        """Frames as uint8 (h w 3), rounded as a file's own frames come back."""
        for piece in self.pieces():
            for frame in piece:
                yield frame.float().clamp(0, 1).mul(255).round().to("cpu", torch.uint8).numpy()

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

    def get_components(self):
        """All frames in memory, for nodes that want them so."""
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
        return Types.VideoComponents(images=images, audio=None, frame_rate=self._rate)

    def as_trimmed(self, start_time: float | None = None, duration: float | None = None, strict_duration: bool = False):
        """The same video from start_time (seconds, from the end where negative), for `duration` (0: to the end)."""
        start = start_time or 0.0
        start = max(start + self.get_duration(), 0.0) if start < 0 else start
        first = math.floor(start * self._rate + 1e-6)
        left = self._count - first
        count = min(left, round(duration * self._rate)) if duration else left
        if count < 1 or (strict_duration and duration and count < round(duration * self._rate)):
            return None
        return LazyVideo(self._make, count, *self._size, self._rate, self._first + first)

    def save_to(self, path, format="auto", codec="auto", metadata=None, bit_depth=None, crf=None, color_space=None,
                **options):
        """Write to a file or a binary stream, whole or not at all, with progress and cancel of the running node."""
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

    def _write(self, path: Path, kind: str, crf, metadata):
        write_video(path, self.iterate_frames(), self._rate, kind, CRF if crf is None else round(crf), metadata,
                    on_frame=files.progress(self._count))


def plain(choice) -> str:
    """Core's choices are enums in one host and text in another."""
    return str(getattr(choice, "value", choice)).lower()


def file_kind(path, format: str, codec: str) -> str:
    """mp4 or webm, or a sentence about what this pack does not write."""
    ending = ENDINGS.get(Path(path).suffix.lower(), "mp4") if isinstance(path, (str, Path)) else "mp4"
    kind = ending if format == "auto" else format
    if kind not in CODECS or codec not in CODECS[kind]:
        raise VideoLDMError(f"This video streams to mp4 with h264 and to webm with vp9, not to {format} with {codec}. "
                            "Choose mp4 and auto in Save Video, or use Save Video File.")
    return kind
