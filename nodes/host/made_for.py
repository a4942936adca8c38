"""A CONDITIONING of Prompt Travel says for how many frames it was made.

Core repeats items, or leaves some out, where their number is not that of the images. A CONDITIONING whose prompts
change along a clip would then have the wrong prompts, without a word. So the pack's samplers check the number, and so
does every sampler of a MODEL with temporal layers.
"""

from collections.abc import Sequence
from typing import Any

from ...temporal.errors import VideoLDMError
from .sockets import Conditioning

MADE_FOR = "video_ldm_frames"       # key in the options of a CONDITIONING: frames that it has an item for


def check_made_for(text: Any, options: dict, takes: Sequence[int], what: str = "the video") -> None:
    """Refuse items of Prompt Travel that were made for another number of frames.

    Args:
        text: the text of the CONDITIONING.
        options: its options.
        takes: the numbers of items that are right.
        what: has so many frames, as an error sentence names it.
    """
    made = options.get(MADE_FOR)
    if made is None or made == 1 or made in takes or text is None or len(text) != made:
        return
    or_keys = f", made from {takes[1]} key frames" if len(takes) > 1 else ""
    advice = " or ".join(map(str, takes))
    raise VideoLDMError(f"Prompt Travel made a text for each of {made} frames, and {what} has {takes[0]} frames"
                        f"{or_keys}. Set frames of Prompt Travel to {advice}.")


def checked_for_video(conditioning: Conditioning, frames: int) -> Conditioning:
    """A CONDITIONING for a node that samples a whole video in pieces. Raises if it was made for another length."""
    for text, options in conditioning:
        check_made_for(text, options, [frames])
    return [[text, without_length(options)] for text, options in conditioning]


def without_length(options: dict) -> dict:
    """Options of a CONDITIONING whose number of items was checked."""
    return {name: value for name, value in options.items() if name != MADE_FOR}
