"""One given picture that the layers move: how a set of layers takes it, and how far it moves in each frame.

PIA and AnimateLCM's image-to-video layers see the picture through a change of the spatial network (picture_changes.py).
All frames of the clip are made anew, the picture's own frame too (docs/papers.md#moving-a-picture).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import VideoLDMError

LOOP_FRAMES = 16        # frames of a clip that a loop's list is made for

# PIA's affinities: how alike a frame and the picture are, by the distance between the two frames. The last value holds
# for all larger distances. A loop's list comes back to 1 in the last frame of its clip.
AFFINITIES: dict[str, tuple[float, ...]] = {
    "small": (1.0, 0.9, 0.85, 0.85, 0.85, 0.8),
    "moderate": (1.0, 0.8, 0.8, 0.8, 0.79, 0.78, 0.75),
    "large": (1.0, 0.8, *[0.7] * 8, 0.6, 0.5),
    "loop, small": (1.0, 0.9, *[0.85] * 3, *[0.8] * 7, 0.85, 0.85, 0.9, 1.0),
    "loop, moderate": (1.0, *[0.8] * 3, 0.79, 0.78, *[0.75] * 5, 0.78, 0.79, 0.8, 0.8, 1.0),
    "loop, large": (1.0, 0.8, *[0.7] * 4, 0.6, 0.5, 0.5, 0.6, *[0.7] * 4, 0.8, 1.0),
    "new style, small": (0.5, *[0.4] * 3, 0.35, 0.3),
    "new style, moderate": (0.5, *[0.4] * 3, 0.35, 0.35, 0.3, 0.25, 0.2),
    "new style, large": (0.5, 0.2),
}
SMALL = "small"


@dataclass(frozen=True)
class PictureMotion:
    """How far a given picture moves: the settings of Picture Motion."""

    amount: str = SMALL             # a key of AFFINITIES, for layers that take affinities
    motion_scale: float = 0.8       # the factor of the embedding of frame numbers, for layers that have one


@dataclass(frozen=True)
class PictureParams:
    """The input for one given picture, of layers that move it."""

    way: str                    # how the layers see it, as the end of a sentence that begins with the picture
    anywhere: bool              # True: it may be any frame of the clip. False: it is frame 0
    affinities: bool            # True: `PictureMotion.amount` acts. False: `PictureMotion.motion_scale` does
    from_noise: bool            # whether the layers were trained to make clips without a picture too
    latent_channels: int = 4    # channels of the latents

    @property
    def positions(self) -> tuple[tuple[int, ...], ...]:
        """The set of known frames that all such layers take, as in ContextParams."""
        return ((0,),)

    @property
    def listed(self) -> str:
        """What they take, as the middle of a sentence."""
        return "one picture, as any frame of the clip" if self.anywhere else "one picture, as frame 0"

    def fits(self, positions: Sequence[int]) -> bool:
        """Whether known frames at these places are one picture at a place that the layers take."""
        return len(positions) == 1 and (self.anywhere or positions[0] == 0)

    def check_motion(self, motion: PictureMotion, frame: int, length: int) -> None:
        """Raise VideoLDMError for a loop in a clip that its list is not made for. Arguments as in GivenPicture."""
        if self.affinities:
            check_loop(motion.amount, frame, length)


@dataclass(frozen=True, eq=False)
class GivenPicture:
    """The picture in one call of the network."""

    latents: Tensor             # `b c h w`, one for each clip of the call, scaled as the model has them
    frame: int                  # which frame of the clip it is
    numbers: tuple[int, ...]    # which frames of the whole clip the frames of the call are. A window has some of them
    length: int                 # frames of the whole clip
    motion: PictureMotion = PictureMotion()


def check_loop(amount: str, frame: int, length: int) -> None:
    """Raise VideoLDMError for a loop whose clip has another length, or whose picture is not the first frame."""
    if not amount.startswith("loop"):
        return
    if length != LOOP_FRAMES:
        raise VideoLDMError(f"Picture Motion is set to '{amount}', whose list is made for clips of {LOOP_FRAMES} "
                            f"frames, and the clip has {length}. Make clips of {LOOP_FRAMES} frames, or choose an "
                            "amount without loop.")
    if frame != 0:
        raise VideoLDMError(f"Picture Motion is set to '{amount}', which leads from the first frame of the clip back "
                            f"to it, and the picture is frame {frame}. Set frames to 0 on Context Frames, or choose an "
                            "amount without loop.")


def affinities(amount: str, frame: int, numbers: Sequence[int], length: int) -> Tensor:
    """The affinity of each frame to the picture, `t`. Arguments as in GivenPicture.

    Raises VideoLDMError for a loop in a clip that its list is not made for.
    """
    check_loop(amount, frame, length)
    values = AFFINITIES[amount]
    return torch.tensor([values[min(abs(number - frame), len(values) - 1)] for number in numbers])
