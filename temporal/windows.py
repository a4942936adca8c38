"""Decoding in windows of frames and in spatial tiles with cross-fades. Memory stays that of one window.

Windows have one length, are evenly spaced and overlap by at least the requested number of frames. The first quarter of
an overlap comes from the earlier window alone and the last quarter from the later one. The outermost frames of a window
are left out because the network saw padding beside them. In between, the weight changes linearly. Where two windows
agree, the result equals them exactly.

So the last window is never pushed back onto the one before it: what a clip's length leaves over makes all overlaps
longer. Windows over frames that do not see each other share none, and no frame is computed twice.
"""

import math
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

MARGIN = 4      # the cross-fade leaves out 1/MARGIN of an overlap at each end


def window_starts(length: int, window: int, overlap: int) -> list[int]:
    """The starts of the fewest evenly spaced windows that cover 0..length-1 and overlap by `overlap` or more."""
    if window >= length:
        return [0]
    if not 0 <= overlap < window:
        raise ValueError(f"windows of {window} cannot overlap by {overlap}")
    count = math.ceil((length - overlap) / (window - overlap))
    return [round(number * (length - window) / (count - 1)) for number in range(count)]


def window_slices(length: int, window: int, overlap: int | None) -> list[slice]:
    """The places of each window: the fewest evenly spaced windows of one length that overlap by `overlap` or more.

    overlap None: places do not see each other, so windows share none. Their lengths then differ by one at most, and the
    longer ones come first.
    """
    window = min(window, length)
    if overlap is not None:
        return [slice(start, start + window) for start in window_starts(length, window, overlap)]
    count = math.ceil(length / window)
    shortest, longer = divmod(length, count)
    starts = [number * shortest + min(number, longer) for number in range(count + 1)]
    return [slice(start, stop) for start, stop in zip(starts, starts[1:])]


def ramp(overlap: int) -> Tensor:
    """Weights (overlap,) of the later window: 0 in the first quarter, 1 in the last, linear in between."""
    margin = overlap // MARGIN
    steps = overlap - 2 * margin
    inner = torch.arange(1, steps + 1, dtype=torch.float32) / (steps + 1)
    return torch.cat([torch.zeros(margin), inner, torch.ones(margin)])


def crossfade(before: Tensor, after: Tensor, dim: int) -> Tensor:
    """Fade from `before` to `after` along `dim`. Both have the same shape."""
    weights = ramp(before.shape[dim]).to(before)
    return torch.lerp(before, after, weights.view(-1, *[1] * (before.ndim - 1 - dim % before.ndim)))


def join_overlapping(before: Tensor, after: Tensor, overlap: int, dim: int) -> Tensor:
    """Concatenate along `dim`. The last `overlap` entries of `before` fade into the first ones of `after`."""
    if not overlap:
        return torch.cat([before, after], dim)
    kept = before.shape[dim] - overlap
    faded = crossfade(before.narrow(dim, kept, overlap), after.narrow(dim, 0, overlap), dim)
    return torch.cat([before.narrow(dim, 0, kept), faded, after.narrow(dim, overlap, after.shape[dim] - overlap)], dim)


def decode_in_windows(decode: Callable[[Tensor], Tensor], z: Tensor, window: int, overlap: int | None, first: int = 0,
                      last: int | None = None) -> Iterator[Tensor]:
    """Decode a clip window by window. Yields the pictures in order, a few at a time.

    The windows do not depend on the requested range. So a part of a video equals that part of the whole decoded video.
    Windows outside the range are not decoded.

    Args:
        decode: decodes the latents of one window (w c h w) to w pictures.
        z: the latents of the whole clip (t c h w).
        window: frames of a window.
        overlap: frames that neighbouring windows share at least. None: frames do not see each other.
        first, last: the range of frames to yield; `last` is not included. None: to the end.
    """
    length, last = len(z), len(z) if last is None else last
    spans = window_slices(length, window, overlap)
    tail = None                     # the pictures of the last window that this window is blended into
    for number, span in enumerate(spans):
        following = spans[number + 1].start if number + 1 < len(spans) else length
        # Skip windows outside the range.
        if span.stop <= first or span.start >= last:
            tail = None
            continue
        pictures = decode(z[span])
        if tail is not None and len(tail):
            pictures = join_overlapping(tail, pictures, len(tail), 0)
        ready, tail = pictures[:following - span.start], pictures[following - span.start:]
        lower, upper = max(first - span.start, 0), min(last - span.start, len(ready))
        if lower < upper:
            yield ready[lower:upper]


def decode_in_tiles(decode: Callable[[Tensor], Tensor], z: Tensor, tile: int, overlap: int) -> Tensor:
    """Decode z (t c h w) in tiles of `tile` latents that overlap by `overlap`. Each tile holds all t frames."""
    height, width = z.shape[2:]
    rows, columns = window_starts(height, tile, overlap), window_starts(width, tile, overlap)
    if len(rows) == len(columns) == 1:
        return decode(z)

    def strip(top: int) -> Tensor:
        pieces = (decode(z[:, :, top:top + tile, left:left + tile]) for left in columns)
        return join_tiles(pieces, columns, tile, width, 3)
    return join_tiles(map(strip, rows), rows, tile, height, 2)


def join_tiles(pieces: Iterable[Tensor], starts: list[int], tile: int, length: int, dim: int) -> Tensor:
    """Join the pictures of neighbouring tiles.

    Args:
        pieces: the decoded tiles, in order; at least one.
        starts: the start of each tile, in latents.
        tile: the size of a tile, in latents.
        length: the size of the whole along `dim`, in latents.
        dim: the dimension of the tensors to join along.
    """
    joined: Tensor | None = None
    end = 0
    for piece, start in zip(pieces, starts, strict=True):
        factor = piece.shape[dim] // min(tile, length)      # pixels per latent
        joined = piece if joined is None else join_overlapping(joined, piece, (end - start) * factor, dim)
        end = start + min(tile, length)
    assert joined is not None
    return joined


def tile_count(height: int, width: int, tile: int, overlap: int) -> int:
    """How many tiles `decode_in_tiles` decodes for latents of this size."""
    return len(window_starts(height, tile, overlap)) * len(window_starts(width, tile, overlap))
