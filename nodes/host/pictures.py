"""The pictures that nodes are given to work on."""

import torch
from torch import Tensor

from ...temporal.errors import VideoLDMError

SMALLEST = 8        # pixels of a side: a latent is at least one


def check_pictures(images: Tensor, what: str, largest: int, smallest: int = SMALLEST) -> Tensor:
    """The colours `t h w 3` of an IMAGE `t h w c`, refused where nothing can be made of them.

    Args:
        what: how a sentence names them, "The small frames".
        largest, smallest: pixels of a side.
    """
    count, height, width, channels = images.shape
    if channels not in (3, 4):
        raise VideoLDMError(f"{what} have {channels} channels, and colour pictures have 3. Convert them to RGB.")
    if max(height, width) > largest:
        raise VideoLDMError(f"{what} have {width}x{height} pixels, and a side may have up to {largest}. Scale them down "
                            "first.")
    if min(height, width) < smallest:
        raise VideoLDMError(f"{what} have {width}x{height} pixels, and a side must have at least {smallest}. Scale them "
                            "up first.")
    if not all(torch.isfinite(frame).all() for frame in images):
        raise VideoLDMError(f"{what} hold values that are no numbers (NaN or infinity). Whatever made them has failed: "
                            "make them again.")
    return images[..., :3]
