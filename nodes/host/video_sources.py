"""The sources of frames and sound for Save Video File: an IMAGE batch, or one of the kinds of VIDEO.

Every source has `count`, `width`, `height`, `rate`, `sound`, `broken` and `frames()`.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from ...temporal.errors import VideoLDMError
from ...temporal.video import LAYOUTS, LONGEST_SIDE, Sound, file_sound, held_sound, open_video
from . import files
from .api import InputImpl
from .pictures import check_sides
from .pixels import CHANNELS, frame_bytes
from .sockets import Video


class ImageSource:
    """Frames from an IMAGE batch."""

    def __init__(self, images: torch.Tensor, rate: Any = None, audio: dict | None = None) -> None:
        """images: (t h w c) in 0..1. rate: frames per second, None if unknown. audio: ComfyUI's AUDIO."""
        _refuse_images(images)
        self.images, self.rate, self.sound = images, rate, sound_of(audio)
        self.count, self.height, self.width = images.shape[:3]
        self.broken: list[int] = []     # numbers of frames with NaN; filled while `frames` runs

    def frames(self) -> Iterator[np.ndarray]:
        """uint8 (h w 3), one at a time."""
        return (frame_bytes(image, number, self.broken) for number, image in enumerate(self.images))


class FileSource:
    """Frames and sound from a VIDEO that is a file, decoded piece by piece."""

    def __init__(self, file: Any) -> None:
        self.file = open_video(file, files.check_cancelled)
        self.count, self.rate = self.file.frames, self.file.rate
        self.broken: list[int] = []
        self.width, self.height = self.file.width, self.file.height
        self.sound = file_sound(self.file) if self.file.has_audio else None

    def frames(self) -> Iterator[np.ndarray]:
        """uint8 (h w 3), one at a time."""
        return self.file.iterate()


class StreamSource:
    """Frames from a VIDEO with `iterate_frames()`, which gives uint8 (h w 3) one at a time."""

    def __init__(self, video: Video) -> None:
        self.video, self.rate, self.count = video, video.get_frame_rate(), video.get_frame_count()
        self.width, self.height = video.get_dimensions()
        self.sound: Sound | None = None
        self.broken: list[int] = []

    def frames(self) -> Iterator[np.ndarray]:
        """uint8 (h w 3), one at a time."""
        return self.video.iterate_frames()


class LazySource(StreamSource):
    """The same for the pack's own videos. They may have sound, and they report frames with NaN."""

    def __init__(self, video: Video) -> None:
        super().__init__(video)
        self.sound = sound_of(video.get_audio())

    def frames(self) -> Iterator[np.ndarray]:
        """uint8 (h w 3), one at a time."""
        return self.video.iterate_frames(self.broken)


def video_source(video: Video) -> ImageSource | FileSource | StreamSource:
    """The source for a VIDEO."""
    if hasattr(video, "get_audio"):
        return LazySource(video)
    if hasattr(video, "iterate_frames"):
        return StreamSource(video)
    trimmed = getattr(video, "get_active_trim_window", lambda: (0, 0))()
    if isinstance(video, InputImpl.VideoFromFile) and not any(trimmed):
        return FileSource(video.get_stream_source())
    components = video.get_components()
    return ImageSource(components.images, components.frame_rate, components.audio)


def sound_of(audio: dict | None) -> Sound | None:
    """ComfyUI's AUDIO as sound to write. None if there is none."""
    if audio is None:
        return None
    wave, rate = audio["waveform"], audio["sample_rate"]
    if wave.ndim != 3 or wave.shape[0] < 1 or wave.shape[1] not in LAYOUTS:
        raise VideoLDMError(f"The sound is a tensor of shape {tuple(wave.shape)}; one sound of 1 to {max(LAYOUTS)} "
                            "channels (1, channels, samples) can be saved. Mix it down first.")
    return held_sound(wave[0].float().cpu().numpy(), int(rate)) if wave.shape[2] else None


def _refuse_images(images: torch.Tensor) -> None:
    shape = tuple(images.shape)
    if len(shape) != 4 or shape[-1] not in CHANNELS:
        raise VideoLDMError(f"The images are a tensor of shape {shape}; Save Video File takes (frames, height, width, "
                            "channels) with 1 (grey), 3 (colour) or 4 channels (the fourth, transparency, is dropped).")
    if not shape[0]:
        raise VideoLDMError("There are no frames to save. Connect at least one image.")
    check_sides(images, "The images", LONGEST_SIDE, 1)
