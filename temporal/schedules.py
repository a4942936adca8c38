"""Frame windows for sampling clips that are longer than one model call: their frames, and how they are averaged.

A window schedule returns the windows of one sampling step, each a list of frame numbers. All windows have the same
length, no frame occurs twice in a window, and together they hold every frame of the clip.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .rollout import PER_KEY
from .windows import window_starts


def static_windows(frames: int, length: int, overlap: int, step: int = 0) -> list[list[int]]:
    """The same windows in every step: the fewest evenly spaced windows that overlap by `overlap` frames or more."""
    return [list(range(start, start + length)) for start in window_starts(frames, length, overlap)]


def shifting_windows(frames: int, length: int, overlap: int, step: int = 0) -> list[list[int]]:
    """Windows that move from step to step, so that no frame is at a seam in every step."""
    hop, last = length - overlap, frames - length
    offset = int(van_der_corput(step) * hop)
    starts = sorted({min(max(start, 0), last) for start in range(offset - hop, last + hop, hop)})
    return [list(range(start, start + length)) for start in starts]


def looped_windows(frames: int, length: int, overlap: int, step: int = 0) -> list[list[int]]:
    """Shifting windows on a circle: the first frame follows the last one, so the clip loops."""
    count = math.ceil(frames / (length - overlap))
    offset = int(van_der_corput(step) * (length - overlap))
    starts = [offset + number * frames // count for number in range(count)]
    return [[(start + index) % frames for index in range(length)] for start in starts]


def windows_between_keys(schedule: Callable, frames: int, length: int, overlap: int, step: int = 0) -> list[list[int]]:
    """Windows of an interpolated clip. Each begins and ends with a key frame, as the clips of training do.

    Args:
        schedule: a schedule for the key frames; no looped one.
        frames: of the interpolated clip: 4 (T - 1) + 1 for T key frames.
        length: the most frames of a window.
        overlap: the least number of frames that neighbouring windows share. They share one key frame at least.
        step: of the sampling.
    """
    keys = keys_within(length)
    shared = min(math.ceil(max(overlap - 1, 0) / PER_KEY) + 1, keys - 1)
    return [list(range(window[0] * PER_KEY, window[-1] * PER_KEY + 1))
            for window in schedule(keys_within(frames), keys, shared, step)]


def keys_within(frames: int) -> int:
    """How many key frames a window of an interpolated clip has, if it begins with one."""
    return (frames - 1) // PER_KEY + 1


def van_der_corput(step: int) -> float:
    """Element `step` of the van der Corput sequence 0, 1/2, 1/4, 3/4, 1/8, ...

    Its first elements cover 0..1 evenly for any number of steps.
    """
    fraction, part = 0.0, 0.5
    while step:
        fraction, step, part = fraction + part * (step & 1), step >> 1, part / 2
    return fraction


def pyramid_weights(window: list[int], frames: int, overlap: int) -> list[float]:
    """Weights of a window's frames that grow with the distance from the window's edge."""
    return [float(min(index + 1, len(window) - index)) for index in range(len(window))]


def ramp_weights(window: list[int], frames: int, overlap: int) -> list[float]:
    """Weights that fade within the overlap. They do not fade at the first and the last frame of the clip."""
    in_order = window[-1] - window[0] == len(window) - 1
    starts, ends = in_order and window[0] == 0, in_order and window[-1] == frames - 1
    weights = [1.0] * len(window)
    for index in range(overlap):
        fade = (index + 1) / (overlap + 1)
        if not starts:
            weights[index] = min(weights[index], fade)
        if not ends:
            weights[-1 - index] = min(weights[-1 - index], fade)
    return weights


def flat_weights(window: list[int], frames: int, overlap: int) -> list[float]:
    """Equal weights: each frame becomes the plain average of the windows that hold it."""
    return [1.0] * len(window)


SCHEDULES = {"static": static_windows, "shifting": shifting_windows, "looped": looped_windows}
FUSES = {"pyramid": pyramid_weights, "ramp": ramp_weights, "flat": flat_weights}


class Fusion:
    """The weighted mean of the windows of clips `(b t) ...`. Windows are added one after the other.

    The mean is updated with `lerp`. So a frame of a single window equals that window to the bit, and where windows
    agree, the mean equals them to the bit.
    """

    def __init__(self, like: Tensor, frames: int) -> None:
        """like: a tensor `(b t) ...` with the shape and dtype of the result. frames: t."""
        self.mean = torch.zeros_like(like)
        self.total = torch.zeros(frames, dtype=torch.float64)

    def add(self, part: Tensor, window: list[int], images: list[int], weights: list[float]) -> None:
        """Add one window.

        Args:
            part: the prediction for this window in all clips, `(b w) ...`.
            window: the w frame numbers of the window.
            images: the index of each image of `part` in the batch `(b t)`.
            weights: the weight of each frame of the window.
        """
        weight = torch.tensor(weights, dtype=torch.float64)
        self.total[window] += weight
        share = (weight / self.total[window]).repeat(len(images) // len(window))
        share = share.to(part).view(-1, *[1] * (part.ndim - 1))
        self.mean[images] = torch.lerp(self.mean[images], part, share)
