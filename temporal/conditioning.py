"""Known frames: masks, the input c_S, and the sets of layers that take it (Video LDM, sections 3.2 and 3.3)."""

from dataclasses import replace

import torch
from torch import Tensor

from .errors import VideoLDMError
from .layers import ResBlockParams
from .params import ContextParams, SmallFramesParams, StackParams
from .stack import TemporalStack

CHANNELS = 128          # of context per resolution (Video LDM, Table 6)


def resolve_positions(positions, frames: int) -> tuple[int, ...]:
    """Frame numbers 0..frames-1 of positions, which count from the end where negative.

    Raises VideoLDMError for a position outside the clip, one given twice, or a clip of which all frames are known.
    """
    outside = [p for p in positions if not -frames <= p < frames]
    if outside:
        raise VideoLDMError(f"Context frame {outside[0]} lies outside the clip, whose frames are 0 to {frames - 1}. Choose "
                            "positions inside it, or make the clip longer.")
    resolved = tuple(p % frames for p in positions)
    if len(set(resolved)) < len(resolved):
        raise VideoLDMError(f"In a clip of {frames} frames the context positions {list(positions)} name the same frame "
                            "twice. Give each frame once.")
    if len(resolved) >= frames:
        raise VideoLDMError(f"All {frames} frames of the clip are context frames, so there is none left to make. Make the "
                            "clip longer, or give fewer context frames.")
    return resolved


def context_mask(positions, frames: int) -> Tensor:
    """m_S `t`: 1 at known frames."""
    mask = torch.zeros(frames)
    mask[list(resolve_positions(positions, frames))] = 1
    return mask


def context_input(z: Tensor, mask: Tensor) -> Tensor:
    """c_S = (m * z, m): clips z `b t c h w`, mask `b t` -> `(b t) c+1 h w`."""
    m = mask[:, :, None, None, None].to(z)
    # where, not a product: what stands in unknown frames must not matter, be it NaN
    known = torch.where(m > 0, z, torch.zeros((), dtype=z.dtype, device=z.device))
    return torch.cat([known, m.expand(-1, -1, 1, *z.shape[3:])], dim=2).flatten(0, 1)


def context_input_from_latents(latents: Tensor, positions, frames: int, clips: int) -> Tensor:
    """c_S of clips from the known frames alone: latents `(k n) c h w`, n positions, k clips or one for all of them."""
    positions = resolve_positions(positions, frames)
    given = latents.unflatten(0, (-1, len(positions)))
    if len(given) not in (1, clips):
        raise VideoLDMError(f"Context frames were given for {len(given)} clips, and {clips} clips are sampled. Give one "
                            "set for all clips, or one for each.")
    z = latents.new_zeros(clips, frames, *latents.shape[1:])
    z[:, list(positions)] = given
    return context_input(z, context_mask(positions, frames).to(z).expand(clips, -1))


# Layers with an input for known frames

def add_context_input(params: StackParams, levels: int, positions, latent_channels: int = 4, channels: int = CHANNELS,
                 fps_width: int = 0) -> StackParams:
    """Params of the same layers with an input for known frames, and a frame-rate token where fps_width is not 0."""
    context = ContextParams(channels, latent_channels, levels, tuple(tuple(p) for p in positions))
    return replace(widen_convolutions(params, context), fps_width=fps_width)


def add_small_frames_input(params: StackParams, levels: int, channels: int = CHANNELS) -> StackParams:
    """Params of the same layers with an upscaler's input for small frames (docs/papers.md#upscalers)."""
    return widen_convolutions(params, SmallFramesParams(channels, levels))


def widen_convolutions(params: StackParams, context: ContextParams | SmallFramesParams) -> StackParams:
    """Convolutions that take more channels, and where these come from."""
    bricks = tuple((site, replace(brick, context_channels=context.channels) if isinstance(brick, ResBlockParams) else brick)
                   for site, brick in params.bricks)
    if bricks == params.bricks:
        raise VideoLDMError(f"These {params.family} layers have no temporal convolutions, or already take context frames: "
                            "known frames enter through the convolutions.")
    return replace(params, bricks=bricks, context=context)


@torch.no_grad()
def initialise_stack(stack: TemporalStack, tensors: dict[str, Tensor]):
    """Give a stack the weights of one without an input for known frames: it then does what that one does.

    The new columns of the convolutions are zero; the downsampler, through which they learn, and the frame-rate token,
    which is one more thing to attend to from the start, keep their own initial values.
    """
    wanted = stack.state_dict()
    surplus = [key for key in tensors if key not in wanted]
    if surplus:
        raise VideoLDMError(f"The layers to begin with hold {surplus[0]}, which the layers to train do not have.")
    for key, value in wanted.items():
        given = tensors.get(key)
        if given is None and key.startswith("layers."):
            raise VideoLDMError(f"The layers to begin with lack {key}.")
        if given is not None:
            value.zero_()
            value[tuple(slice(size) for size in given.shape)] = given.to(value)
