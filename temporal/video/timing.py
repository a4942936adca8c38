"""Even clocks: which frame of a file is on screen at each evenly spaced step.

ComfyUI's IMAGE has no time stamps, so a clip is T frames at one rate. In files the rate can vary. Phones vary the time
between frames. Screen recorders and GIF encoders store a held frame once. Containers round times to milliseconds.
"""

from dataclasses import dataclass
from fractions import Fraction
from math import isfinite
from numbers import Rational, Real

import numpy as np

from ..errors import VideoLDMError

DEFAULT_RATE = Fraction(8)      # frames per second, for files that state none
JITTER = 0.25                   # frames of an even file may be off by this share of a frame's time
LARGEST_GROWTH = 4              # repeating held frames may multiply the number of frames by this at most
HIGHEST_RATE = 240              # frames per second that repeating held frames may reach


def as_rate(value: object) -> Fraction:
    """Frames per second as a fraction that containers store exactly: 23.976023976 becomes 24000/1001.

    Raises VideoLDMError for anything but a number above 0.
    """
    rate = Fraction(0)
    if isinstance(value, Real) and isfinite(value):
        rate = Fraction(value if isinstance(value, Rational) else float(value)).limit_denominator(1001)
    if rate <= 0:
        raise VideoLDMError(f"The frame rate is {value} frames per second; it must be a number above 0 (at least "
                            "one frame in 1000 seconds).")
    return rate


def is_same_rate(rate: object, own: object) -> bool:
    """Whether sound that belongs to frames at the rate `own` fits frames at `rate`: they differ by 0.1 % at most."""
    return abs(float(as_rate(rate) / as_rate(own)) - 1) <= 0.001


@dataclass(frozen=True)
class Clock:
    """An even clock of a file."""

    shown: np.ndarray           # shown[k] is the number of the file's frame on screen during step k
    rate: Fraction              # steps per second
    change: str = ""            # how an uneven file was changed, for the report


def even_clock(starts: np.ndarray, last: float, declared: Fraction | None = None, quantum: float = 0.001) -> Clock:
    """The even clock of a file.

    Args:
        starts: the seconds at which the frames appear, ascending.
        last: the seconds that the last frame stays.
        declared: the rate in the file's header. It is used if it agrees with the times within 1 %.
        quantum: the unit in seconds to which the container rounds times.
    """
    count = len(starts)
    durations = np.append(np.diff(starts), last)
    if count == 1 or not durations.sum() > 0:
        rate = declared or (Fraction(1 / last) if last > 0 else DEFAULT_RATE)
        return Clock(np.arange(count), as_rate(rate))
    step = np.median(durations)
    slack = max(JITTER * step, 1.01 * quantum)
    if np.all(np.abs(durations - step) <= slack):
        if declared and abs(float(declared) * durations.sum() / count - 1) < 0.01:
            return Clock(np.arange(count), as_rate(declared))
        return Clock(np.arange(count), _measured(count, durations.sum(), quantum))
    return _held(durations, quantum) or _resampled(starts - starts[0], durations, quantum)


def _measured(count: int, total: float, quantum: float) -> Fraction:
    """The simplest rate at which `count` frames last `total` seconds within the rounding: 12 and not 5000/417."""
    for denominator in range(1, 1001):
        rate = Fraction(max(1, round(count / total * denominator)), denominator)
        if abs(count / rate - total) <= quantum:
            return rate
    return as_rate(count / total)


def _held(durations: np.ndarray, quantum: float) -> Clock | None:
    """The clock of a file with held frames, which are repeated. None if the durations are no multiples of one."""
    base = np.median(durations[durations <= 1.4 * durations.min()])
    if base <= 0:
        return None
    times = np.maximum(np.round(durations / base), 1).astype(int)
    fits = np.abs(durations - times * base) <= np.maximum(JITTER * base, 1.01 * quantum)
    rate = times.sum() / durations.sum()
    if not fits.all() or rate > HIGHEST_RATE or times.sum() > LARGEST_GROWTH * len(times):
        return None
    shown = np.repeat(np.arange(len(times)), times)
    return Clock(shown, _measured(len(shown), durations.sum(), quantum),
                 f"{len(shown) - len(times)} held frames were repeated to make its timing even")


def _resampled(starts: np.ndarray, durations: np.ndarray, quantum: float) -> Clock:
    """A clock with as many steps as the file has frames. Each shows the file's frame at the middle of the step."""
    count, total = len(starts), durations.sum()
    middles = (np.arange(count) + 0.5) * total / count
    shown = np.searchsorted(starts, middles, side="right") - 1
    lost = count - len(np.unique(shown))
    return Clock(shown, _measured(count, total, quantum),
                 f"its frame rate varies: frames were taken at the average, repeating {lost} and dropping {lost}")
