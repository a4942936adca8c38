"""Checks of the pictures that a node takes."""

import torch
from torch import Tensor

from ...temporal.errors import VideoLDMError

SMALLEST = 8        # pixels of a side: those of one latent


def check_pictures(images: Tensor, what: str, largest: int, smallest: int = SMALLEST) -> Tensor:
    """The colours `t h w 3` of an IMAGE `t h w c`. Raises if the pictures cannot be used.

    Args:
        images: the IMAGE.
        what: the pictures' name in an error sentence, such as "The small frames".
        largest: the largest side in pixels.
        smallest: the smallest side in pixels.
    """
    channels = images.shape[3]
    if channels not in (3, 4):
        plural = "s" * (channels != 1)
        raise VideoLDMError(f"{what} have {channels} channel{plural}, and colour pictures have 3. Convert them to RGB.")
    check_sides(images, what, largest, smallest)
    if not all(torch.isfinite(frame).all() for frame in images):
        raise VideoLDMError(f"{what} hold values that are no numbers (NaN or infinity). Whatever made them has failed: "
                            "make them again.")
    return images[..., :3]


def check_sides(images: Tensor, what: str, largest: int, smallest: int) -> None:
    """Refuse pictures `t h w c` with a side below `smallest` or above `largest` pixels. what: as in check_pictures."""
    height, width = images.shape[1:3]
    if max(height, width) > largest:
        raise VideoLDMError(f"{what} have {width}x{height} pixels, and a side may have up to {largest}. Scale them "
                            "down first.")
    if min(height, width) < smallest:
        raise VideoLDMError(f"{what} have {width}x{height} pixels, and a side must have at least {smallest}. Scale "
                            "them up first.")
