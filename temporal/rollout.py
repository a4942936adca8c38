"""Long video, clip after clip: which frames each call makes (Video LDM, section 3.2; docs/papers.md#prediction).

The first call starts from one context frame. Each later call starts from the last two frames made so far, because two
frames show the direction of motion.
"""

from typing import NamedTuple

from .errors import VideoLDMError

OVERLAP = 2     # context frames of every call but the first
PER_KEY = 4     # frames from one key frame to the next, once a clip is interpolated


class Step(NamedTuple):
    """One call of a rollout."""

    start: int      # the frame of the video at which its clip begins
    known: int      # the number of context frames: the clip's first frames, made before


def plan_calls(length: int, clip: int, existing: int, overlap: int = OVERLAP) -> list[Step]:
    """Plan the calls that make a video. No frame is made twice.

    The last clip may reach beyond the video's length. The caller drops those frames.

    Args:
        length: frames of the video.
        clip: frames of one call.
        existing: frames of the video that exist already.
        overlap: context frames of every call but the first.

    Raises VideoLDMError if there is nothing to make, or if a clip holds context frames only.
    """
    if length <= existing:
        raise VideoLDMError(f"The video is to have {length} frames, and {existing} are given already. Set a length "
                            f"above {existing}.")
    if clip <= overlap:
        raise VideoLDMError(f"A clip of {clip} frames that begins with {overlap} known ones makes nothing new. Use "
                            f"clips of more than {overlap} frames.")
    steps: list[Step] = []
    done = existing
    while done < length:
        context_frames = min(done, overlap)
        steps.append(Step(done - context_frames, context_frames))
        done = steps[-1].start + clip
    return steps


def interpolated_length(frames: int) -> int:
    """The length of a video of T key frames after one interpolation: 4 (T - 1) + 1 (docs/papers.md#interpolation)."""
    return PER_KEY * (frames - 1) + 1


def copied_key(frame: int) -> int:
    """The number of the key frame that frame k of an interpolated clip gets a copy of: (k + 1) // 4.

    So it is for LaVie's interpolation (docs/papers.md#lavie-interpolation). Its authors repeat each key frame four
    times, and cut one frame at the beginning and two at the end.
    """
    return (frame + 1) // PER_KEY
