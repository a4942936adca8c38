"""How many frames a clip may have for a set of temporal layers. All checks of clip lengths use this module."""

from dataclasses import dataclass

from .errors import VideoLDMError
from .params import StackParams


@dataclass(frozen=True)
class ClipLimit:
    """The clip lengths that a set of layers can run."""

    most: int           # the largest number of frames
    exactly: bool       # True: `most` is the only possible length
    reason: str         # the reason, as the beginning of a sentence

    def allows(self, frames: int) -> bool:
        """Whether the layers can run clips of this length."""
        return frames == self.most if self.exactly else frames <= self.most


def clip_limit(params: StackParams) -> ClipLimit | None:
    """The limit of a set of layers. None if they run clips of any length."""
    if params.mix_length > 1:
        reason = f"These {params.family} layers mix over time with a vector of {params.mix_length} frames"
        return ClipLimit(params.mix_length, True, reason)
    if params.table_length:
        reason = f"These {params.family} layers have a learned table of {params.table_length} frame positions"
        return ClipLimit(params.table_length, False, reason)
    return None


def check_clip_length(params: StackParams, frames: int, what: str, advice: str) -> None:
    """Raise VideoLDMError for a clip length that the layers cannot run.

    Args:
        params: of the layers.
        frames: the clip length.
        what: the part of the sentence in front of the number, as in "the clip has".
        advice: what to do. {limit} is replaced by the number, as in "Set length to {limit}."
    """
    limit = clip_limit(params)
    if limit is None or limit.allows(frames):
        return
    if limit.exactly:
        takes, number = f"exactly {limit.most}", str(limit.most)
    else:
        takes, number = f"up to {limit.most}", f"{limit.most} or fewer"
    raise VideoLDMError(f"{limit.reason}, so they take clips of {takes} frames, and {what} {frames}. "
                        f"{advice.format(limit=number)}")
