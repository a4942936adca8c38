"""ComfyUI's AUDIO of videos: read from files, cut with the frames, taken from other nodes' videos."""

from fractions import Fraction
from typing import Any

import torch

from ...temporal.video import Sound, file_sound, open_video, samples_of
from . import files
from .file_video import FileVideo
from .sockets import Audio, Video
from .video_sources import sound_of, whole_file

CANCEL_CHECK = 2**20        # samples that are read between two looks at Cancel


def as_audio(sound: Sound | None) -> Audio | None:
    """A sound as AUDIO, all of it in memory. None, as core's nodes give it, if there is none."""
    if sound is None:
        return None
    looked = 0

    def look(done: int) -> None:
        nonlocal looked
        if done - looked >= CANCEL_CHECK:
            looked = done
            files.check_cancelled()
    return {"waveform": torch.from_numpy(samples_of(sound, look))[None], "sample_rate": sound.rate}


def part_of(audio: Audio | None, start: Fraction, end: Fraction) -> Audio | None:
    """The sound from `start` to `end`, in seconds. It is shorter where the sound ends early."""
    if audio is None:
        return None
    rate = audio["sample_rate"]
    return {"waveform": audio["waveform"][..., round(start * rate):round(end * rate)], "sample_rate": rate}


def audio_of(video: Video, components: Any) -> Audio | None:
    """The AUDIO of a VIDEO whose `get_components()` gave `components`. Raises if it cannot be saved.

    A file is read here, because core's class gives the samples of some files as whole numbers or in one channel.
    """
    file = None if isinstance(video, FileVideo) else whole_file(video)
    if file is not None:
        return as_audio(file_sound(open_video(file, files.check_cancelled)))
    sound_of(components.audio)
    return components.audio
