"""Long video, clip after clip: which frames come from which call (Video LDM, section 3.2; docs/papers.md#prediction).

The first call is given one frame, each later one the last two of what is there, which show the direction of motion.
"""

from typing import NamedTuple

from .errors import VideoLDMError

OVERLAP = 2     # known frames of every call but the first


class Step(NamedTuple):
    """One call: its clip begins at frame `start` of the video, and its first `known` frames are there already."""

    start: int
    known: int


def plan_calls(length: int, clip: int, given: int, overlap: int = OVERLAP) -> list[Step]:
    """The calls that make a video of `length` frames out of clips of `clip` frames, `given` frames being there.

    No frame is made twice. The last clip may reach beyond the length: what is over is not kept. Raises VideoLDMError
    where there is nothing to make, or a clip would be made of known frames alone.
    """
    if length <= given:
        raise VideoLDMError(f"The video is to have {length} frames, and {given} are given already. Set a length above "
                            f"{given}.")
    if clip <= overlap:
        raise VideoLDMError(f"A clip of {clip} frames that begins with {overlap} known ones makes nothing new. Use clips of "
                            f"more than {overlap} frames.")
    steps, done = [], given
    while done < length:
        known = min(done, overlap)
        steps.append(Step(done - known, known))
        done = steps[-1].start + clip
    return steps


def interpolated_length(frames: int) -> int:
    """Length of a video of key frames after one interpolation: 4 (T - 1) + 1 (docs/papers.md#interpolation)."""
    return 4 * (frames - 1) + 1
