"""Windows of frames for sampling more frames than one call takes: which frames each holds, and how they are joined.

Every schedule gives windows of one full length, of different frames each, that together hold every frame of the clip.
"""

import math

import torch
from torch import Tensor

from .windows import window_starts


def static_windows(frames: int, length: int, overlap: int, step: int = 0) -> list[list[int]]:
    """The same windows in every step, spread evenly: the fewest that overlap by `overlap` or more."""
    return [list(range(start, start + length)) for start in window_starts(frames, length, overlap)]


def shifting_windows(frames: int, length: int, overlap: int, step: int = 0) -> list[list[int]]:
    """Windows that lie elsewhere in every step, so that no frame is always at a seam."""
    hop, last = length - overlap, frames - length
    offset = int(van_der_corput(step) * hop)
    starts = sorted({min(max(start, 0), last) for start in range(offset - hop, last + hop, hop)})
    return [list(range(start, start + length)) for start in starts]


def looped_windows(frames: int, length: int, overlap: int, step: int = 0) -> list[list[int]]:
    """Shifting windows round a circle: the first frame follows the last, so that the clip loops."""
    count = math.ceil(frames / (length - overlap))
    offset = int(van_der_corput(step) * (length - overlap))
    starts = [offset + number * frames // count for number in range(count)]
    return [[(start + place) % frames for place in range(length)] for start in starts]


def van_der_corput(step: int) -> float:
    """0, 1/2, 1/4, 3/4, 1/8, ...: the van der Corput sequence, which fills 0..1 evenly however many steps there are."""
    fraction, part = 0.0, 0.5
    while step:
        fraction, step, part = fraction + part * (step & 1), step >> 1, part / 2
    return fraction


def pyramid_weights(window: list[int], frames: int, overlap: int) -> list[float]:
    """Frames count by their distance from the window's edge."""
    return [float(min(place + 1, len(window) - place)) for place in range(len(window))]


def ramp_weights(window: list[int], frames: int, overlap: int) -> list[float]:
    """Windows fade within their overlap alone, and not at the clip's own ends."""
    in_order = window[-1] - window[0] == len(window) - 1
    starts, ends = in_order and window[0] == 0, in_order and window[-1] == frames - 1
    weights = [1.0] * len(window)
    for place in range(overlap):
        fade = (place + 1) / (overlap + 1)
        if not starts:
            weights[place] = min(weights[place], fade)
        if not ends:
            weights[-1 - place] = min(weights[-1 - place], fade)
    return weights


def flat_weights(window: list[int], frames: int, overlap: int) -> list[float]:
    """The plain average of all windows that hold a frame."""
    return [1.0] * len(window)


SCHEDULES = {"static": static_windows, "shifting": shifting_windows, "looped": looped_windows}
FUSES = {"pyramid": pyramid_weights, "ramp": ramp_weights, "flat": flat_weights}


class Fusion:
    """The weighted mean of windows over the frames of clips `(b t) ...`, taken up one after the other.

    A running mean by `lerp`: a frame of one window is that window's to the bit, and where windows agree so is the mean.
    """

    def __init__(self, like: Tensor, frames: int):
        self.mean = torch.zeros_like(like)
        self.total = torch.zeros(frames, dtype=torch.float64)

    def add(self, part: Tensor, window: list[int], images: list[int], weights: list[float]):
        """part `(b w) ...`: what one window of w frames says of the images of all clips."""
        weights = torch.tensor(weights, dtype=torch.float64)
        self.total[window] += weights
        share = (weights / self.total[window]).repeat(len(images) // len(window))
        share = share.to(part).view(-1, *[1] * (part.ndim - 1))
        self.mean[images] = torch.lerp(self.mean[images], part, share)
