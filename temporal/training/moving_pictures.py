"""Clips made of single pictures: a window moves over each picture (docs/papers.md#lavie-super-resolution).

LaVie's upscaler learns from pictures too, which come larger and sharper than videos. A random translation turns each
into a clip. So temporal layers see motion that changes no pixel.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from ..errors import VideoLDMError
from ..upscaler import FACTOR
from .batch import Batch
from .clips import as_frames
from .upscaler import Patches


class MovingPictures:
    """Draws batches of such clips. Call it with a StepContext.

    The window goes along a straight line from one random place to another, in whole pixels, and never leaves the
    picture.

    Args:
        pictures: a sequence of uint8 pictures (h, w, 3) of any sizes, or of tensors (c, h, w).
        frames: of a clip.
        height, width: of the window.
        batch: clips per step, over all processes.
        fastest: pixels that the window moves from frame to frame along each side, at most.
        embeddings: texts (k, l, d).
        captions: the row of each picture in `embeddings`; by default its own number.
    """

    def __init__(self, pictures: Sequence, frames: int, height: int, width: int, batch: int, fastest: int,
                 embeddings: Any = None, captions: Sequence[int] | None = None) -> None:
        self.pictures, self.frames, self.size, self.batch = pictures, frames, (height, width), batch
        self.fastest, self.embeddings, self.captions = fastest, embeddings, captions
        if min(frames, height, width, batch) < 1 or fastest < 0:
            raise VideoLDMError(f"Frames, height, width and batch must be 1 or more and the speed 0 or more, not "
                                f"{frames}, {height}, {width}, {batch} and {fastest}.")
        if len(pictures) == 0:
            raise VideoLDMError("There are no pictures to make clips from.")
        for number in range(len(pictures)):
            found = self.size_of(number)
            if found[0] < height or found[1] < width:
                raise VideoLDMError(f"Windows of {width}x{height} need pictures of that size or larger, and picture "
                                    f"{number} has {found[1]}x{found[0]}. Use a smaller window, or leave it out.")
        texts = None if embeddings is None else len(embeddings if captions is None else captions)
        if texts not in (None, len(pictures)):
            raise VideoLDMError(f"{len(pictures)} pictures came with {texts} captions; each picture needs one.")

    def size_of(self, number: int) -> tuple[int, int]:
        """Height and width of a picture."""
        shape, channels_last = self.pictures[number].shape, is_bytes(self.pictures[number])
        return (shape[0], shape[1]) if channels_last else (shape[1], shape[2])

    def __call__(self, step: Any) -> Batch:
        """Batch of clips (b t c h w) on the step's device, b being this process's share."""
        clips, chosen = [], []
        for _ in range(step.share(self.batch)):
            number = below(len(self.pictures), step.generator)
            clips.append(self.clip(number, step.generator))
            chosen.append(number if self.captions is None else int(self.captions[number]))
        text = None
        if self.embeddings is not None:
            text = torch.stack([torch.as_tensor(self.embeddings[row]) for row in chosen]).to(step.device, torch.float32)
        return Batch(torch.stack(clips).to(step.device), text)

    def clip(self, number: int, generator: torch.Generator) -> Tensor:
        """A clip (t c h w) of one picture."""
        picture, channels_last = self.pictures[number], is_bytes(self.pictures[number])
        rows, columns = (self.path(whole - window, generator)
                         for whole, window in zip(self.size_of(number), self.size, strict=True))
        height, width = self.size
        frames = []
        for top, left in zip(rows, columns, strict=True):
            window = (slice(top, top + height), slice(left, left + width))
            frame = picture[window] if channels_last else picture[(slice(None),) + window]
            frames.append(as_frames(frame[None])[0])
        return torch.stack(frames)

    def path(self, room: int, generator: torch.Generator) -> list[int]:
        """Where the window begins in each frame, along one side, from 0 to `room`."""
        first, reach = below(room + 1, generator), self.fastest * (self.frames - 1)
        low, high = max(first - reach, 0), min(first + reach, room)
        last = low + below(high - low + 1, generator)
        return [first + round((last - first) * number / max(self.frames - 1, 1)) for number in range(self.frames)]


def is_bytes(picture: Any) -> bool:
    """Whether a picture is uint8 (h, w, 3)."""
    return str(picture.dtype).endswith("uint8")


def below(count: int, generator: torch.Generator) -> int:
    return int(torch.randint(0, count, (), generator=generator))


def patches_of(clips: Callable[..., Batch], encode: Callable[[Tensor], Tensor]) -> Callable[..., Patches]:
    """`patches(step)` for an UpscalerLoss, from clips of large pixels in -1..1. Small frames are averages of 4x4.

    encode: turns large frames (n 3 4h 4w) into what the upscaler makes (n c h w): a VAE's latents, or `fold_pixels`.
    """
    def draw(step: Any) -> Patches:
        large, context, *_ = clips(step)
        flat = large.flatten(0, 1)
        x, small = encode(flat), avg_pool2d(flat, FACTOR)
        return Patches(x.unflatten(0, large.shape[:2]), small.unflatten(0, large.shape[:2]), context)
    return draw
