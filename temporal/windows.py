"""Decoding in windows of frames and in spatial tiles, cross-faded: what a long clip costs is what one window costs.

Windows are spread evenly, all of one length, and overlap by at least what was asked for. Within an overlap the first
and the last quarter belong to one side alone, since the outermost frames of a window saw padding in place of a
neighbour; between them the weight moves evenly. Where two windows agree, the result is exactly what they agree on.
"""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

MARGIN = 4      # one part in so many of an overlap is left out at either end


def window_starts(length: int, window: int, overlap: int) -> list[int]:
    """Starts of the fewest windows that cover 0..length-1 and overlap by `overlap` or more; one if it holds all."""
    if window >= length:
        return [0]
    if not 0 <= overlap < window:
        raise ValueError(f"windows of {window} cannot overlap by {overlap}")
    count = math.ceil((length - overlap) / (window - overlap))
    return [round(number * (length - window) / (count - 1)) for number in range(count)]


def ramp(overlap: int) -> Tensor:
    """Weights (overlap,) of the later window: 0 in the first quarter, 1 in the last, even steps between."""
    margin = overlap // MARGIN
    steps = overlap - 2 * margin
    inner = torch.arange(1, steps + 1, dtype=torch.float32) / (steps + 1)
    return torch.cat([torch.zeros(margin), inner, torch.ones(margin)])


def crossfade(before: Tensor, after: Tensor, dim: int) -> Tensor:
    """Two overlapping pieces of one size, faded from one to the other along `dim`."""
    weights = ramp(before.shape[dim]).to(before)
    return torch.lerp(before, after, weights.view(-1, *[1] * (before.ndim - 1 - dim % before.ndim)))


def join_overlapping(before: Tensor, after: Tensor, overlap: int, dim: int) -> Tensor:
    """`before` continued by `after`, whose first `overlap` places are the last of `before`."""
    if not overlap:
        return torch.cat([before, after], dim)
    kept = before.shape[dim] - overlap
    faded = crossfade(before.narrow(dim, kept, overlap), after.narrow(dim, 0, overlap), dim)
    return torch.cat([before.narrow(dim, 0, kept), faded, after.narrow(dim, overlap, after.shape[dim] - overlap)], dim)


def decode_in_windows(decode: Callable[[Tensor], Tensor], z: Tensor, window: int, overlap: int, first: int = 0,
               last: int | None = None) -> Iterator[Tensor]:
    """Frames `first` to `last` (exclusive) of the decoded clip z (t c h w), in order, a few at a time.

    decode: z of one window (w c h w) -> w pictures. The windows are those of the whole clip whatever range is asked
    for, so that a part of a video is that part of the video; those that the range does not touch are not decoded.
    """
    length, last = len(z), len(z) if last is None else last
    starts, window = window_starts(length, window, overlap), min(window, length)
    tail = None                     # decoded frames from the start of this window on that the next one may still change
    for number, start in enumerate(starts):
        following = starts[number + 1] if number + 1 < len(starts) else length
        # A window counts up to the end of what any later one blends into it.
        if start + window <= first or start >= last:
            tail = None
            continue
        pictures = decode(z[start:start + window])
        if tail is not None and len(tail):
            pictures = join_overlapping(tail, pictures, len(tail), 0)
        ready, tail = pictures[:following - start], pictures[following - start:]
        lower, upper = max(first - start, 0), min(last - start, len(ready))
        if lower < upper:
            yield ready[lower:upper]


def decode_in_tiles(decode: Callable[[Tensor], Tensor], z: Tensor, tile: int, overlap: int) -> Tensor:
    """Decode z (t c h w) in tiles of `tile` latents that overlap by `overlap`, each over all t frames."""
    height, width = z.shape[2:]
    rows, columns = window_starts(height, tile, overlap), window_starts(width, tile, overlap)
    if len(rows) == len(columns) == 1:
        return decode(z)

    def strip(top: int) -> Tensor:
        return join_tiles((decode(z[:, :, top:top + tile, left:left + tile]) for left in columns), columns, tile, width, 3)
    return join_tiles(map(strip, rows), rows, tile, height, 2)


def join_tiles(pieces, starts: list[int], tile: int, length: int, dim: int) -> Tensor:
    """Pictures of neighbouring tiles along `dim`, joined one after the other; starts and sizes in latents."""
    whole, end = None, 0
    for piece, start in zip(pieces, starts, strict=True):
        factor = piece.shape[dim] // min(tile, length)
        whole = piece if whole is None else join_overlapping(whole, piece, (end - start) * factor, dim)
        end = start + min(tile, length)
    return whole


def tile_count(height: int, width: int, tile: int, overlap: int) -> int:
    return len(window_starts(height, tile, overlap)) * len(window_starts(width, tile, overlap))
