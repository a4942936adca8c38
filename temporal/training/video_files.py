"""Videos of an artist's own as frames for training.

Each file is decoded once, at one size and one frame rate, into a uint8 .npy file (t, h, w, 3). Training reads windows
of it from the disk, so that the length of the videos does not matter to the memory.
"""

import hashlib
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..atomic import write_atomically
from ..errors import VideoLDMError
from ..video import VideoFile, as_rate, open_video
from .clips import Clips, as_frames, open_videos
from .moving_pictures import below
from .planes import BLACK, WeightedClips

ENDINGS = (".mp4", ".mov", ".m4v", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".mts", ".wmv", ".flv", ".ogv",
           ".mxf", ".gif", ".webp")
NEAR = Fraction(1, 100)         # a rate that is so near to a multiple of the wanted one counts as it: 29.97 as 30


@dataclass(frozen=True)
class FrameSettings:
    """What the frames of all videos become."""

    height: int
    width: int
    fps: float
    least: int          # frames that a video needs: those of a clip

    def __post_init__(self) -> None:
        as_rate(self.fps)
        if min(self.height, self.width, self.least) < 1:
            raise VideoLDMError(f"Frames are 1x1 or larger, and a clip has 1 or more. These are {self.width}x"
                                f"{self.height}, {self.least} to a clip.")


def find_videos(path: Path | str) -> list[Path]:
    """The video files of a folder and its subfolders in the order of their names, or the one file that is given."""
    path = Path(path)
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise VideoLDMError(f"There is no video or folder '{path}'.")
    files = sorted(file for file in path.rglob("*") if file.suffix.lower() in ENDINGS and file.is_file()
                   and not any(part.startswith(".") for part in file.relative_to(path).parts))
    if not files:
        raise VideoLDMError(f"There is no video in the folder '{path}'. Put MP4 files there; {', '.join(ENDINGS)} are "
                            "read.")
    return files


def decoded_videos(files: Sequence[Path], cache: Path, settings: FrameSettings, decode: bool = True,
                   report: Callable[[str], None] | None = None) -> list[np.ndarray]:
    """The frames of the files, each uint8 (t, h, w, 3), read from the disk as they are needed.

    A file that was decoded before with the same settings is not decoded again. Bad files are refused before any is
    decoded.

    Args:
        files: videos.
        cache: the folder of the decoded frames.
        settings: size and frame rate.
        decode: False waits for another process that decodes.
        report: called with a line of text for each file that is decoded.
    """
    targets = [cache / cached_name(file, settings) for file in files]
    if decode:
        missing = [(file, target) for file, target in zip(files, targets, strict=True) if not target.exists()]
        videos = [checked(open_video(file), settings) for file, _ in missing]
        for number, (video, (_, target)) in enumerate(zip(videos, missing, strict=True), 1):
            if report is not None:
                report(f"Decoding {number} of {len(missing)}: {video.name}")
            write_frames(video, target, settings)
    while not all(target.exists() for target in targets):
        time.sleep(1)
    found = [open_videos(target) for target in targets]
    for file, frames in zip(files, found, strict=True):
        refuse_short(file.name, len(frames), settings)
    return found


def cached_name(file: Path, settings: FrameSettings) -> str:
    """The name of a file's decoded frames. It changes with the file and with the settings."""
    status = file.stat()
    key = (str(file.resolve()), status.st_size, status.st_mtime_ns, settings.height, settings.width,
           str(as_rate(settings.fps)))
    return f"{file.stem[:40]}.{hashlib.blake2b(repr(key).encode(), digest_size=8).hexdigest()}.npy"


def checked(video: VideoFile, settings: FrameSettings) -> VideoFile:
    """The video, refused where it cannot be learned from."""
    if video.cut_off:
        raise VideoLDMError(f"{video.name} is cut off: it is longer by what it says, and {video.frames} frames of it "
                            "are there. Get it again, or take it out of the folder.")
    if ratio_of(video, settings) < 1:
        raise VideoLDMError(f"{video.name} has {float(video.rate):.4g} frames a second, and {settings.fps:.4g} are to "
                            "be learned. Repeated frames would be learned as jerks. Lower the frame rate of the "
                            "training, or take the video out of the folder.")
    refuse_short(video.name, len(steps_of(video, settings)), settings)
    return video


def refuse_short(name: str, frames: int, settings: FrameSettings) -> None:
    if frames < settings.least:
        raise VideoLDMError(f"{name} is too short: it has {frames} frames at {settings.fps:.4g} a second, and a clip "
                            f"has {settings.least}. Take it out of the folder, or train with a higher frame rate or "
                            "shorter clips.")


def steps_of(video: VideoFile, settings: FrameSettings) -> np.ndarray:
    """The steps of the video's own clock that are shown at the wanted frame rate."""
    ratio = ratio_of(video, settings)
    count = math.ceil(video.frames / ratio)
    return np.arange(count) * ratio.numerator // ratio.denominator


def ratio_of(video: VideoFile, settings: FrameSettings) -> Fraction:
    """How many frames of the video come for one of the training."""
    ratio = video.rate / as_rate(settings.fps)
    whole = max(round(ratio), 1)
    return Fraction(whole) if abs(ratio / whole - 1) <= NEAR else ratio


def write_frames(video: VideoFile, target: Path, settings: FrameSettings) -> None:
    """Write the frames of a video, one in memory at a time, completely or not at all."""
    steps = steps_of(video, settings)
    header = {"descr": "|u1", "fortran_order": False, "shape": (len(steps), settings.height, settings.width, 3)}

    def write(temporary: Path) -> None:
        with open(temporary, "wb") as file:
            np.lib.format.write_array_header_1_0(file, header)
            for frame in video.iterate(steps):
                file.write(cropped(frame, settings.height, settings.width).tobytes())
    try:
        write_atomically(target, write)
    except OSError as error:
        raise VideoLDMError(f"The frames of {video.name} cannot be written to '{target.parent}': {error.strerror}. "
                            f"They take {len(steps) * settings.height * settings.width * 3 / 1e6:,.0f} MB.") from error


def cropped(frame: np.ndarray, height: int, width: int) -> np.ndarray:
    """A frame (h, w, 3) as the largest part of its middle that has the wanted shape, in the wanted size."""
    rows, columns = frame.shape[:2]
    scale = min(rows / height, columns / width)
    left, top = (columns - width * scale) / 2, (rows - height * scale) / 2
    box = (max(left, 0), max(top, 0), min(left + width * scale, columns), min(top + height * scale, rows))
    return np.asarray(Image.fromarray(frame).resize((width, height), Image.Resampling.BICUBIC, box=box))


# Windows of them

class VideoClips:
    """`clips(step)` of a PlaneAutoencoderLoss: windows of `frames` frames of decoded videos.

    Each video is drawn equally often, as in the published training.
    """

    def __init__(self, videos: Sequence[Any], frames: int, batch: int) -> None:
        self.clips = Clips(videos, frames, batch)

    def __call__(self, step: Any) -> WeightedClips:
        return WeightedClips(self.clips(step).latents)


class TwoClips:
    """`videos(step)` of EncodedVideos: windows of two clips, (b 2t 3 H W) in -1..1.

    Of a video that is shorter than two clips it gives one, with a black clip before it.
    """

    def __init__(self, videos: Sequence[Any], frames: int, batch: int) -> None:
        Clips(videos, frames, batch)            # refuses what is shorter than a clip
        self.videos, self.frames, self.batch = videos, frames, batch

    def __call__(self, step: Any) -> Tensor:
        drawn = [self.draw(step.generator) for _ in range(step.share(self.batch))]
        return torch.stack(drawn).to(step.device)

    def draw(self, generator: torch.Generator) -> Tensor:
        video = self.videos[below(len(self.videos), generator)]
        clips = min(len(video) // self.frames, 2)
        start = below(len(video) - clips * self.frames + 1, generator)
        window = as_frames(video[start:start + clips * self.frames])
        return window if clips == 2 else torch.cat([torch.full_like(window, BLACK), window])
