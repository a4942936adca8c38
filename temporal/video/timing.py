"""Which frame of a file is on screen at each step of an even clock.

ComfyUI's IMAGE has no timestamps: a clip is T frames at one rate. Files need not be like that. Phones vary the time
between frames, screen recorders and GIF encoders store a held frame once, containers round times to milliseconds.
"""

from dataclasses import dataclass
from fractions import Fraction
from math import isfinite
from numbers import Rational, Real

import numpy as np

from ..errors import VideoLDMError

DEFAULT_RATE = Fraction(8)      # frames per second where nothing says otherwise
JITTER = 0.25                   # share of a frame's time by which an even file may deviate
LARGEST_GROWTH = 4              # a file may become at most this many times longer by repeating held frames
HIGHEST_RATE = 240


def as_rate(value):
    """Frames per second as a fraction that containers store exactly: 23.976023976 becomes 24000/1001."""
    rate = 0
    if isinstance(value, Real) and isfinite(value):
        rate = Fraction(value if isinstance(value, Rational) else float(value)).limit_denominator(1001)
    if rate <= 0:
        raise VideoLDMError(f"The frame rate is {value} frames per second; it must be a number above 0 (at least "
                            "one frame in 1000 seconds).")
    return rate


@dataclass(frozen=True)
class Clock:
    """`shown[k]` is the file's frame on screen during step k; `rate` is steps per second."""

    shown: np.ndarray
    rate: Fraction
    change: str = ""            # what was done to an uneven file, for the report


def even_clock(starts, last, declared=None, quantum=0.001):
    """The even clock of a file whose frames appear at `starts` (seconds, ascending); the last one stays for `last`.

    declared: the rate in the file's header, preferred where it agrees with the times within 1 %.
    quantum: the unit in which the container rounds times, in seconds.
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


def _measured(count, total, quantum):
    """The simplest rate at which `count` frames last `total` seconds, give or take a rounding: 12, not 5000/417."""
    for denominator in range(1, 1001):
        rate = Fraction(max(1, round(count / total * denominator)), denominator)
        if abs(count / rate - total) <= quantum:
            return rate
    return as_rate(count / total)


def _held(durations, quantum):
    """Frames whose times are multiples of the shortest one were held: repeat them. None if that does not fit."""
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


def _resampled(starts, durations, quantum):
    """As many steps as frames, each showing what the file shows at the middle of the step."""
    count, total = len(starts), durations.sum()
    middles = (np.arange(count) + 0.5) * total / count
    shown = np.searchsorted(starts, middles, side="right") - 1
    lost = count - len(np.unique(shown))
    return Clock(shown, _measured(count, total, quantum),
                 f"its frame rate varies: frames were taken at the average, repeating {lost} and dropping {lost}")
