"""Frames of an IMAGE as bytes, for files."""

import numpy as np
import torch

CHANNELS = (1, 3, 4)        # grey, colour, colour with transparency


def frame_bytes(image: torch.Tensor, number: int = 0, broken: list[int] | None = None, bits: int = 8,
                alpha: bool = False) -> np.ndarray:
    """One frame (h w c) in 0..1 as whole numbers, RGB (h w 3) or RGBA (h w 4), rounded to the nearest value.

    NaN and infinity become black, in alpha opaque.

    Args:
        image: the frame.
        number: its number in the video.
        broken: a list to which `number` is added if the frame has NaN or infinity.
        bits: 8 for uint8, 16 for uint16.
        alpha: keep the fourth channel. The frame has one.
    """
    channels = 4 if alpha else 3
    colour = image[..., :channels] if image.shape[-1] >= 3 else image[..., :1].expand(*image.shape[:2], 3)
    colour = colour.float()
    finite = torch.isfinite(colour)
    if not finite.all():
        colour = torch.where(finite, colour, colour.new_tensor([0.0, 0.0, 0.0, 1.0])[:channels])
        if broken is not None:
            broken.append(number)
    whole = colour.clamp(0, 1).mul(2**bits - 1).round()
    if bits == 8:
        return whole.to("cpu", torch.uint8).numpy()
    return whole.to("cpu", torch.int32).numpy().astype(np.uint16)


def broken_frames(numbers: list[int]) -> str:
    """A remark about frames with NaN or infinity. Empty if there are none."""
    if not numbers:
        return ""
    places = ", ".join(map(str, numbers[:5])) + (f" and {len(numbers) - 5} more" if len(numbers) > 5 else "")
    which = f"frame {places} holds" if len(numbers) == 1 else f"frames {places} hold"
    return f"{which} values that are no numbers (NaN), which were written as black"
