"""Motion: the mean absolute difference of neighbouring frames of a clip."""

import numpy as np
from numpy.typing import ArrayLike

from ..errors import VideoLDMError


def motion(clips: ArrayLike) -> float:
    """The mean absolute difference of neighbouring frames of uint8 clips (..., t h w 3), in levels of 0..255.

    Raises VideoLDMError for clips of a single frame.
    """
    clips = np.asarray(clips)
    if clips.ndim < 4 or clips.shape[-4] < 2:
        raise VideoLDMError(f"Motion is measured on clips (..., t, h, w, 3) of 2 frames or more, not on {clips.shape}.")
    frames = np.moveaxis(clips, -4, 0)
    steps = [np.abs(later.astype(np.float32) - earlier).mean(dtype=np.float64)
             for earlier, later in zip(frames[:-1], frames[1:])]
    return float(np.mean(steps))


def motion_ratio(clips: ArrayLike, real: ArrayLike) -> float:
    """The motion of clips divided by the motion of real clips. 1 is best."""
    measured = motion(real)
    if measured == 0:
        raise VideoLDMError("The real clips do not move, so there is nothing to compare motion with.")
    return motion(clips) / measured
