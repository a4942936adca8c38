"""A clip that goes forth and back."""

from collections.abc import Iterable, Iterator

import numpy as np


def forth_and_back(frames: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """Yield the frames in order, then in reverse without the first and the last. So no frame is held when it repeats.

    0 1 2 3 becomes 0 1 2 3 2 1. The frames in between are kept in memory.
    """
    kept: list[np.ndarray] = []
    last: np.ndarray | None = None
    for number, frame in enumerate(frames):
        if number > 1 and last is not None:
            kept.append(last)
        yield frame
        last = frame
    while kept:
        yield kept.pop()


def number_of_frames(count: int) -> int:
    """How many frames `forth_and_back` yields for `count` frames."""
    return count + max(count - 2, 0)
