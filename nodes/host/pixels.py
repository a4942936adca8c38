"""Frames of an IMAGE as bytes, for files."""

import numpy as np
import torch

CHANNELS = (1, 3, 4)        # grey, colour, colour with transparency


def frame_bytes(image: torch.Tensor, number: int = 0, broken: list[int] | None = None) -> np.ndarray:
    """One frame (h w c) in 0..1 as uint8 RGB (h w 3), rounded to the nearest value.

    NaN and infinity become black.

    Args:
        image: the frame.
        number: its number in the video.
        broken: a list to which `number` is added if the frame has NaN or infinity.
    """
    colour = image[..., :3] if image.shape[-1] >= 3 else image[..., :1].expand(*image.shape[:2], 3)
    colour = colour.float()
    finite = torch.isfinite(colour)
    if not finite.all():
        colour = torch.where(finite, colour, 0.0)
        if broken is not None:
            broken.append(number)
    return colour.clamp(0, 1).mul(255).round().to("cpu", torch.uint8).numpy()


def broken_frames(numbers: list[int]) -> str:
    """A remark about frames with NaN or infinity. Empty if there are none."""
    if not numbers:
        return ""
    places = ", ".join(map(str, numbers[:5])) + (f" and {len(numbers) - 5} more" if len(numbers) > 5 else "")
    which = f"frame {places} holds" if len(numbers) == 1 else f"frames {places} hold"
    return f"{which} values that are no numbers (NaN), which were written as black"
