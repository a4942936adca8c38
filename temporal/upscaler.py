"""Video upscaling with a diffusion model that sees the small frames (Video LDM, section 3.4; docs/papers.md#upscalers).

    g(x_tau; c_gamma, gamma, tau)        c_gamma = alpha_gamma * x_low + sigma_gamma * eps

The small frames x_low get a little noise and are concatenated with x_tau, frame by frame. The network also receives
their noise level gamma (noise augmentation).

Large videos are predicted in pieces: windows of frames, and tiles over all frames of a window. The pieces are blended
in every step, and their initial noise is cut from one noise tensor. So no seams show.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, conv2d, interpolate, pad

from .diffusion import Diffusion
from .errors import VideoLDMError
from .windows import ramp, window_slices

TRAINED_LEVEL = 250     # the highest noise level in training of temporal layers (docs/papers.md#upscalers)
USUAL_LEVEL = 30        # the default noise level of sampling. Published layers of other authors have their own
FACTOR = 4              # large pixels per small pixel, along each side
TILE_OVERLAP = 4        # neighbouring tiles share 1/TILE_OVERLAP of a tile


def check_level(level: int, most: int, usual: int = USUAL_LEVEL) -> None:
    """Raise VideoLDMError for a noise level outside 0..most, which the upscaler was not trained on."""
    if not 0 <= level <= most:
        raise VideoLDMError(f"noise_level is {level}, and this upscaler was trained with levels from 0 to {most}. Set "
                            f"it within that; {usual} is usual.")


def augment_small_frames(x_low: Tensor, level: int, eps: Tensor, schedule: Diffusion) -> Tensor:
    """c_gamma: the small frames with noise of one level.

    Args:
        x_low: the small frames `t c h w`.
        level: the noise level. 0: the frames stay unchanged.
        eps: the noise, `t c h w`, or `1 c h w` for all frames.
        schedule: the noise schedule of the augmentation.
    """
    return augment_per_frame(x_low, torch.full((len(x_low),), level), eps, schedule)


def augment_per_frame(x_low: Tensor, levels: Tensor, eps: Tensor, schedule: Diffusion) -> Tensor:
    """Like `augment_small_frames`, with a noise level for each frame, `levels` (t,)."""
    c_low = schedule.add_noise(x_low, levels, eps)
    return torch.where(levels.view(-1, *[1] * (x_low.ndim - 1)) == 0, x_low, c_low)


# An upscaler in pixel space predicts details: large frames minus small ones, scaled to about unit variance. So the
# network need not know absolute colours, which its norms would remove in a small network. The details are folded: the
# 4x4 large pixels of one small pixel become its channels. So details and small frames have the same height and width,
# as the latents of a latent upscaler do. Both are our choice; the paper only says "pixel space".

PIXEL_CHANNELS = 3 * FACTOR ** 2        # channels of folded RGB pixels


def unscale_augmented(c_low: Tensor, levels: Tensor, schedule: Diffusion) -> Tensor:
    """c_gamma / alpha_gamma: augmented small frames `t 3 h w` at their original scale. Their noise stays.

    levels (t,): the noise level of each frame. Level 0 is not scaled.
    """
    alpha = torch.where(levels == 0, 1.0, schedule.tables(levels.device)[0][levels]).to(c_low)
    return c_low / alpha.view(-1, *[1] * (c_low.ndim - 1))


def repeat_small_pixels(x_low: Tensor) -> Tensor:
    """`t 3 h w` -> `t 48 h w`: the small frames enlarged by repeating pixels, folded."""
    return x_low.repeat_interleave(FACTOR ** 2, dim=1)


def fold_pixels(pixels: Tensor) -> Tensor:
    """`... 3 4h 4w` -> `... 48 h w`: the pixels of each 4x4 block become channels."""
    return torch.nn.functional.pixel_unshuffle(pixels, FACTOR)


def unfold_pixels(x: Tensor) -> Tensor:
    """`... 48 h w` -> `... 3 4h 4w`: the inverse of `fold_pixels`."""
    return torch.nn.functional.pixel_shuffle(x, FACTOR)


# Colours. The upscaler sees the small frames with noise, so it can shift the colours of whole areas. `match_colours`
# takes these shifts back.

COLOUR_SIGMA = 3.0      # small pixels; the standard deviation of the blur under which colours are compared


def match_colours(small: Tensor, large: Tensor) -> Tensor:
    """Give one large frame `1 3 4h 4w` the colours of the small frame `1 3 h w` that it was made from.

    The blurred difference of the two is added. Details finer than the blur stay. Each frame is treated alone, so the
    result does not depend on windows or on how a video is streamed.
    """
    shift = gaussian_blur(small.to(large) - avg_pool2d(large, FACTOR))
    return large + interpolate(shift, scale_factor=FACTOR, mode="bilinear")


def gaussian_blur(x: Tensor) -> Tensor:
    """Blur `1 c h w` with a Gaussian of COLOUR_SIGMA. The edge pixels are repeated beyond the edges."""
    reach = round(2 * COLOUR_SIGMA)
    weights = torch.exp(-torch.arange(-reach, reach + 1).to(x).square() / (2 * COLOUR_SIGMA ** 2))
    weights = (weights / weights.sum()).expand(x.shape[1], 1, 1, -1)
    x = conv2d(pad(x, (reach, reach, 0, 0), "replicate"), weights, groups=x.shape[1])
    return conv2d(pad(x, (0, 0, reach, reach), "replicate"), weights.transpose(2, 3), groups=x.shape[1])


# Windows and tiles

@dataclass(frozen=True)
class PiecePlan:
    """How a video `t h w` is cut into pieces. Without an overlap in time, later ones may be a frame shorter."""

    frames: list[slice]     # the frames of each window
    rows: list[slice]       # the rows of each tile
    columns: list[slice]    # the columns of each tile

    @property
    def pieces(self) -> int:
        """The number of pieces."""
        return len(self.frames) * len(self.rows) * len(self.columns)

    @property
    def largest(self) -> tuple[int, int, int]:
        """Frames, height and width of the first piece. No other is larger."""
        frames, rows, columns = (spans[0].stop - spans[0].start for spans in (self.frames, self.rows, self.columns))
        return frames, rows, columns

    @property
    def whole(self) -> tuple[int, int, int]:
        """Frames, height and width of the video."""
        return self.frames[-1].stop, self.rows[-1].stop, self.columns[-1].stop


def plan_pieces(frames: int, height: int, width: int, window: int, overlap: int | None, tile: int) -> PiecePlan:
    """Cut a video `frames height width` into windows and tiles. Sizes beyond the video's are clipped to it.

    Args:
        frames, height, width: the size of the video in latents.
        window: frames of a window.
        overlap: frames that neighbouring windows share at least. None: frames do not see each other, so none is in
            two windows.
        tile: side of a tile in latents. Neighbouring tiles share a quarter or more. 0: no tiles.

    Raises VideoLDMError for an overlap as long as the window.
    """
    if overlap is not None and overlap >= window:
        raise VideoLDMError(f"overlap is {overlap} frames and window is {window}: windows must be longer than what "
                            "they share. Lower overlap, or raise window.")
    shared = tile // TILE_OVERLAP
    return PiecePlan(window_slices(frames, window, overlap), window_slices(height, tile or height, shared),
                     window_slices(width, tile or width, shared))


def predict_in_pieces(predict: Callable[[slice, slice, slice], Tensor], plan: PiecePlan, channels: int) -> Tensor:
    """Predict a video `t channels h w` piece by piece. `predict(frames, rows, columns)` returns one piece.

    Tiles are blended into rows, rows into windows, and windows into the video. At every point of the video the weights
    of the pieces sum to 1. Where pieces agree, the result equals them to the bit.
    """
    frames, height, width = plan.whole
    tile_height = plan.largest[1]

    def strip(span: slice, rows: slice) -> Tensor:
        pieces = (predict(span, rows, columns) for columns in plan.columns)
        whole = torch.zeros(span.stop - span.start, channels, tile_height, width)
        return blend_pieces(pieces, plan.columns, whole, 3)

    def window(span: slice) -> Tensor:
        strips = (strip(span, rows) for rows in plan.rows)
        return blend_pieces(strips, plan.rows, torch.zeros(span.stop - span.start, channels, height, width), 2)
    return blend_pieces(map(window, plan.frames), plan.frames, torch.zeros(frames, channels, height, width), 0)


def blend_pieces(pieces: Iterable[Tensor], spans: list[slice], whole: Tensor, dim: int) -> Tensor:
    """Blend pieces along `dim` into `whole`, in order. Each piece fades in where it overlaps the earlier ones.

    The fade is the one of windows.py. A lerp with weight w scales all earlier weights by 1 - w. So the weights sum to 1
    for any number of overlapping pieces.

    Args:
        pieces: the pieces, in order.
        spans: the part of `whole` along `dim` that each piece covers.
        whole: the tensor to fill in place. It is also returned.
        dim: the dimension to blend along.
    """
    filled = 0
    for piece, span in zip(pieces, spans, strict=True):
        length = span.stop - span.start
        weights = torch.cat([ramp(filled - span.start), torch.ones(span.stop - filled)])
        target = whole.narrow(dim, span.start, length)
        target.lerp_(piece.to(whole), weights.view(-1, *[1] * (whole.ndim - 1 - dim)))
        filled = span.stop
    return whole
