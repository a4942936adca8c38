"""Upscaling video with a diffusion model that sees the small frames (Video LDM, section 3.4; docs/papers.md#upscalers).

    g(x_tau; c_gamma, gamma, tau)        c_gamma = alpha_gamma * x_low + sigma_gamma * eps

The small frames x_low are noised a little, concatenated with x_tau frame by frame, and the network is told the noise
level gamma. A video of any size is predicted in windows of frames and in tiles over all frames of a window, blended in
every step; the noise they begin with is cut from one field, so that neither has a reason to show.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, conv2d, interpolate, pad

from .diffusion import Diffusion
from .errors import VideoLDMError
from .windows import ramp, window_starts

TRAINED_LEVEL = 250     # temporal layers are trained with levels drawn from 0 to this (docs/papers.md#upscalers)
USUAL_LEVEL = 30        # and sampled with this one; published layers of other authors bring their own
FACTOR = 4              # large pixels for each small one, along each side
TILE_OVERLAP = 4        # neighbouring tiles share one part in so many of a tile


def check_level(level: int, most: int, usual: int = USUAL_LEVEL):
    """Refuse a noise level that the upscaler has never seen."""
    if not 0 <= level <= most:
        raise VideoLDMError(f"noise_level is {level}, and this upscaler was trained with levels from 0 to {most}. Set "
                            f"it within that; {usual} is usual.")


def augment_small_frames(x_low: Tensor, level: int, eps: Tensor, schedule: Diffusion) -> Tensor:
    """c_gamma for the small frames x_low `t c h w`; eps of one frame serves all. Level 0 leaves them as they are."""
    return augment_per_frame(x_low, torch.full((len(x_low),), level), eps, schedule)


def augment_per_frame(x_low: Tensor, levels: Tensor, eps: Tensor, schedule: Diffusion) -> Tensor:
    """The same where each frame has a level of its own (t,)."""
    c_low = schedule.add_noise(x_low, levels, eps)
    return torch.where(levels.view(-1, *[1] * (x_low.ndim - 1)) == 0, x_low, c_low)


# An upscaler in pixel space makes the details: large frames less the noised small ones, in units in which they have about
# unit variance. A network whose norms see few channels of few places cannot tell absolute colours, and need not. The
# pixels that one small pixel becomes are the channels of its place, so that details stand beside the small frames as a
# latent upscaler's latents do. Neither is in the paper, which says "pixel space" and no more.

PIXEL_CHANNELS = 3 * FACTOR ** 2


def unscale_augmented(c_low: Tensor, levels: Tensor, schedule: Diffusion) -> Tensor:
    """The small frames `t 3 h w` that c_gamma stands for, levels (t,), but for their noise."""
    alpha = torch.where(levels == 0, 1.0, schedule.tables(levels.device)[0][levels]).to(c_low)
    return c_low / alpha.view(-1, *[1] * (c_low.ndim - 1))


def repeat_small_pixels(x_low: Tensor) -> Tensor:
    """`t 3 h w` -> `t 48 h w`: every small pixel in place of all that it becomes, folded."""
    return x_low.repeat_interleave(FACTOR ** 2, dim=1)


def fold_pixels(pixels: Tensor) -> Tensor:
    """`... 3 4h 4w` -> `... 48 h w`."""
    return torch.nn.functional.pixel_unshuffle(pixels, FACTOR)


def unfold_pixels(x: Tensor) -> Tensor:
    """`... 48 h w` -> `... 3 4h 4w`."""
    return torch.nn.functional.pixel_shuffle(x, FACTOR)


# Colours. The upscaler makes details beside small frames that were noised, and is free to move the colours of whole
# areas.

COLOUR_SIGMA = 3.0      # of the Gaussian, in small pixels: colours are compared over areas of about this radius


def match_colours(small: Tensor, large: Tensor) -> Tensor:
    """One large frame `1 3 4h 4w` with the colours of the small one `1 3 h w` that it was made from: what differs
    between the two after a blur is taken back, and details finer than the blur stay. A frame alone, so that
    neither windows nor how a video is streamed matter."""
    shift = gaussian_blur(small.to(large) - avg_pool2d(large, FACTOR))
    return large + interpolate(shift, scale_factor=FACTOR, mode="bilinear")


def gaussian_blur(x: Tensor) -> Tensor:
    """`1 c h w` under a Gaussian; beyond the edges stand the pixels of the edge."""
    reach = round(2 * COLOUR_SIGMA)
    weights = torch.exp(-torch.arange(-reach, reach + 1).to(x).square() / (2 * COLOUR_SIGMA ** 2))
    weights = (weights / weights.sum()).expand(x.shape[1], 1, 1, -1)
    x = conv2d(pad(x, (reach, reach, 0, 0), "replicate"), weights, groups=x.shape[1])
    return conv2d(pad(x, (0, 0, reach, reach), "replicate"), weights.transpose(2, 3), groups=x.shape[1])


# Windows and tiles

@dataclass(frozen=True)
class PiecePlan:
    """How a video `t h w` is cut: the frames of each window, the rows and the columns of its tiles."""

    frames: list[slice]
    rows: list[slice]
    columns: list[slice]

    @property
    def pieces(self) -> int:
        return len(self.frames) * len(self.rows) * len(self.columns)

    @property
    def largest(self) -> tuple[int, int, int]:
        """Frames, height and width of one piece; they are all of one size."""
        return tuple(spans[0].stop - spans[0].start for spans in (self.frames, self.rows, self.columns))

    @property
    def whole(self) -> tuple[int, int, int]:
        return self.frames[-1].stop, self.rows[-1].stop, self.columns[-1].stop


def plan_pieces(frames: int, height: int, width: int, window: int, overlap: int, tile: int) -> PiecePlan:
    """Windows of `window` frames that share `overlap` or more, and tiles of `tile` latents, 0 for none, that share a
    quarter. What is longer than the video is clipped to it. Raises VideoLDMError for windows that do not advance."""
    if overlap >= window:
        raise VideoLDMError(f"overlap is {overlap} frames and window is {window}: windows must be longer than what "
                            "they share. Lower overlap, or raise window.")
    shared = tile // TILE_OVERLAP
    return PiecePlan(window_slices(frames, window, overlap), window_slices(height, tile or height, shared),
                window_slices(width, tile or width, shared))


def window_slices(length: int, size: int, overlap: int) -> list[slice]:
    size = min(size, length)
    return [slice(start, start + size) for start in window_starts(length, size, overlap)]


def predict_in_pieces(predict: Callable[[slice, slice, slice], Tensor], cuts: PiecePlan, channels: int) -> Tensor:
    """The video `t channels h w` of which `predict(frames, rows, columns)` gives one piece.

    Tiles are blended into rows, these into windows, and windows into the video. In every place the weights are those of
    a partition of unity; where pieces agree, the result is what they agree on, to the bit.
    """
    frames, height, width = cuts.whole
    window_length, tile_height, _ = cuts.largest

    def strip(span: slice, rows: slice) -> Tensor:
        pieces = (predict(span, rows, columns) for columns in cuts.columns)
        return blend_pieces(pieces, cuts.columns, torch.zeros(window_length, channels, tile_height, width), 3)

    def window(span: slice) -> Tensor:
        strips = (strip(span, rows) for rows in cuts.rows)
        return blend_pieces(strips, cuts.rows, torch.zeros(window_length, channels, height, width), 2)
    return blend_pieces(map(window, cuts.frames), cuts.frames, torch.zeros(frames, channels, height, width), 0)


def blend_pieces(pieces: Iterable[Tensor], spans: list[slice], whole: Tensor, dim: int) -> Tensor:
    """Pieces along `dim`, in order, put into `whole`; each fades in over the places that those before it have filled.

    The fade is that of windows.py. lerp towards the later piece: weights before w and of the new one are (1 - w, w), so
    that they go on summing to 1 however many pieces share a place.
    """
    filled = 0
    for piece, span in zip(pieces, spans, strict=True):
        length = span.stop - span.start
        weights = torch.cat([ramp(filled - span.start), torch.ones(span.stop - filled)])
        target = whole.narrow(dim, span.start, length)
        target.lerp_(piece.to(whole), weights.view(-1, *[1] * (whole.ndim - 1 - dim)))
        filled = span.stop
    return whole
