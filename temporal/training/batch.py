"""A batch of clips or images with its text, and what every loss does to one before the network sees it."""

from typing import NamedTuple, overload

import torch
from torch import Tensor

from ..errors import VideoLDMError


class Batch(NamedTuple):
    """What a loss gets for one step."""

    latents: Tensor                     # clips (b t c h w) or images (n c h w), float32
    context: Tensor | None = None       # a text per clip or image (n l d)
    fps: Tensor | None = None           # the frame rate of each clip (n), for layers that have an input for it
    weights: Tensor | None = None       # how much each pixel counts in the loss (b t 1 h w); None: all alike


def as_clips(latents: Tensor, frames: int | None = None) -> Tensor:
    """Clips (b t c h w) as they are. A flat batch ((b t) c h w) is cut into clips of `frames`."""
    if latents.ndim == 5 and frames in (None, latents.shape[1]):
        return latents
    if latents.ndim == 5:
        raise VideoLDMError(f"The clips have {latents.shape[1]} frames, and the loss was set to {frames}.")
    if latents.ndim != 4 or frames is None:
        raise VideoLDMError(f"Clips are 'b t c h w', or '(b t) c h w' with the number of frames given; these are "
                            f"{tuple(latents.shape)}.")
    if latents.shape[0] % frames:
        raise VideoLDMError(f"A batch of {latents.shape[0]} frames does not divide into clips of {frames}. Use a "
                            f"multiple of {frames}.")
    return latents.unflatten(0, (-1, frames))


def frames_as_images(batch: Batch) -> Batch:
    """Every frame of a batch of clips as an image with the text of its clip. A batch of images as it is."""
    if batch.latents.ndim == 4:
        return batch
    return Batch(batch.latents.flatten(0, 1), per_frame(batch.context, batch.latents.shape[1]))


@overload
def per_frame(values: Tensor, frames: int) -> Tensor: ...


@overload
def per_frame(values: None, frames: int) -> None: ...


def per_frame(values, frames):
    """Repeat one value per clip (b ...) for each of its frames: ((b t) ...)."""
    return None if values is None else values.repeat_interleave(frames, dim=0)


def check_null_context(null_context: Tensor | None, dropout: float) -> None:
    """Refuse conditioning dropout without the null context, which replaces a dropped text."""
    if not 0 <= dropout <= 1:
        raise VideoLDMError(f"Conditioning dropout is a probability from 0 to 1, not {dropout}.")
    if dropout and null_context is None:
        raise VideoLDMError("Conditioning dropout needs the null context, the text embedding of an empty prompt.")


@overload
def drop_context(context: Tensor, null_context: Tensor | None, dropout: float,
                 generator: torch.Generator) -> Tensor: ...


@overload
def drop_context(context: None, null_context: Tensor | None, dropout: float, generator: torch.Generator) -> None: ...


def drop_context(context, null_context, dropout, generator):
    """Replace each text of (n l d) by the null context (l d) with probability `dropout`: classifier-free guidance."""
    if context is None or null_context is None or not dropout:
        return context
    if null_context.shape != context.shape[1:]:
        raise VideoLDMError(f"The null context is {tuple(null_context.shape)}, the texts are "
                            f"{tuple(context.shape[1:])} each. Encode both with the same text encoder.")
    dropped = torch.rand(len(context), generator=generator).to(context.device) < dropout
    return torch.where(dropped[:, None, None], null_context.to(context.device, context.dtype), context)
