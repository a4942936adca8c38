"""The sources of frames and sound for Save Video File: an IMAGE batch, or one of the kinds of VIDEO.

Every source has `count`, `width`, `height`, `rate`, `has_sound`, `sound`, `broken`, `alpha`, `bits`, `change` and
`frames()`.
"""

from collections.abc import Iterator
from math import isfinite
from typing import Any

import numpy as np
import torch

from ...temporal.errors import VideoLDMError
from ...temporal.video import LAYOUTS, LONGEST_SIDE, Sound, check_sound_rate, file_sound, held_sound, open_video
from . import files
from .api import InputImpl
from .pictures import check_sides
from .pixels import CHANNELS, frame_bytes
from .sockets import Video
from .streamed_video import StreamedVideo


class Source:
    """What all sources have in common."""

    count: int                  # frames
    width: int                  # pixels
    height: int
    rate: Any                   # frames per second, None if unknown
    has_sound = False           # whether there is sound, which may be one that cannot be written
    alpha = False               # whether the frames have transparency
    bits = 8                    # bits per colour that the frames have. Frames of numbers between 0 and 1 count as 16
    change = ""                 # what reading the video's file changed or left out, for a report

    def __init__(self) -> None:
        self.broken: list[int] = []     # numbers of frames with NaN; filled while `frames` runs

    @property
    def sound(self) -> Sound | None:
        """The sound to write. It is checked here, so ask only where it is written. None if there is none."""
        return None

    def frames(self, bits: int = 8, alpha: bool = False) -> Iterator[np.ndarray]:
        """Yield the frames, (h w 3) or with alpha (h w 4).

        bits: 8 for uint8, 16 for uint16. alpha: keep transparency, for a source that has it.
        """
        return self._bytes() if bits == 8 else (frame.astype(np.uint16) * 257 for frame in self._bytes())

    def _bytes(self) -> Iterator[np.ndarray]:
        """uint8 (h w 3), one at a time."""
        raise NotImplementedError


class ImageSource(Source):
    """Frames from an IMAGE batch."""

    bits = 16

    def __init__(self, images: torch.Tensor, rate: Any = None, audio: dict | None = None) -> None:
        """images: (t h w c) in 0..1. rate: frames per second, None if unknown. audio: ComfyUI's AUDIO."""
        super().__init__()
        _refuse_images(images)
        self.images, self.rate, self.audio, self.has_sound = images, rate, audio, audio is not None
        self.count, self.height, self.width = images.shape[:3]
        self.alpha = images.shape[3] == 4

    @property
    def sound(self) -> Sound | None:
        return sound_of(self.audio)

    def frames(self, bits: int = 8, alpha: bool = False) -> Iterator[np.ndarray]:
        return (frame_bytes(image, number, self.broken, bits, alpha) for number, image in enumerate(self.images))


class FileSource(Source):
    """Frames and sound from a VIDEO that is a file, decoded piece by piece."""

    def __init__(self, file: Any) -> None:
        super().__init__()
        self.file = open_video(file, files.check_cancelled)
        self.count, self.rate = self.file.frames, self.file.rate
        self.width, self.height, self.change = self.file.width, self.file.height, self.file.change
        self.has_sound = self.file.has_audio

    @property
    def sound(self) -> Sound | None:
        return file_sound(self.file) if self.has_sound else None

    def _bytes(self) -> Iterator[np.ndarray]:
        return self.file.iterate()


class StreamSource(Source):
    """Frames and sound of one of the pack's own videos. It reports frames with NaN."""

    bits = 16

    def __init__(self, video: StreamedVideo) -> None:
        super().__init__()
        self.video, self.rate, self.count = video, video.get_frame_rate(), video.get_frame_count()
        self.width, self.height = video.get_dimensions()
        self.has_sound = video.get_audio() is not None

    @property
    def sound(self) -> Sound | None:
        return sound_of(self.video.get_audio())

    def frames(self, bits: int = 8, alpha: bool = False) -> Iterator[np.ndarray]:
        return self.video.iterate_frames(self.broken, bits)


def video_source(video: Video) -> Source:
    """The source for a VIDEO."""
    if isinstance(video, StreamedVideo):
        return StreamSource(video)
    file = whole_file(video)
    if file is not None:
        return FileSource(file)
    components = video.get_components()
    return ImageSource(components.images, components.frame_rate, components.audio)


def whole_file(video: Video) -> Any:
    """The path or the BytesIO of a VIDEO that is a file and not a part of one. None for other videos."""
    trimmed = getattr(video, "get_active_trim_window", lambda: (0, 0))()
    return video.get_stream_source() if isinstance(video, InputImpl.VideoFromFile) and not any(trimmed) else None


def sound_of(audio: dict | None) -> Sound | None:
    """ComfyUI's AUDIO as sound to write. None if there is none."""
    if audio is None:
        return None
    try:
        wave, rate = audio["waveform"], audio["sample_rate"]
    except (TypeError, KeyError, IndexError) as error:
        raise VideoLDMError(f"The sound is a {type(audio).__name__} without a waveform and a sample rate. Connect the "
                            "AUDIO of a node that loads or makes sound.") from error
    if not isinstance(wave, torch.Tensor) or not wave.is_floating_point():
        kind = f"a tensor of {wave.dtype}" if isinstance(wave, torch.Tensor) else f"a {type(wave).__name__}"
        raise VideoLDMError(f"The waveform of the sound is {kind}; it must be a tensor of numbers in -1..1. Connect "
                            "the AUDIO of a node that loads or makes sound.")
    if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not isfinite(rate) or rate < 1:
        raise VideoLDMError(f"The sound has {rate!r} samples a second; it must be a number such as 44100.")
    check_sound_rate(rate)
    if wave.ndim != 3 or wave.shape[0] != 1 or wave.shape[1] not in LAYOUTS:
        raise VideoLDMError(f"The sound is a tensor of shape {tuple(wave.shape)}; one sound of 1 to {max(LAYOUTS)} "
                            "channels (1, channels, samples) can be saved. Choose one of several, or mix it "
                            "down first.")
    if not torch.isfinite(wave).all():
        raise VideoLDMError("The sound holds values that are no numbers (NaN or infinity). Whatever made it has "
                            "failed: make it again.")
    return held_sound(wave[0].float().cpu().numpy(), int(rate)) if wave.shape[2] else None


def _refuse_images(images: torch.Tensor) -> None:
    shape = tuple(images.shape)
    if len(shape) != 4 or shape[-1] not in CHANNELS:
        raise VideoLDMError(f"The images are a tensor of shape {shape}; Save Video File takes (frames, height, width, "
                            "channels) with 1 (grey), 3 (colour) or 4 channels (the fourth is transparency).")
    if not shape[0]:
        raise VideoLDMError("There are no frames to save. Connect at least one image.")
    check_sides(images, "The images", LONGEST_SIDE, 1)
