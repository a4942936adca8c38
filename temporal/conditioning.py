"""Context frames: masks, the input c_S, and params of layers that take it (Video LDM, sections 3.2 and 3.3)."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from .errors import VideoLDMError
from .layers import ResBlockParams
from .params import ContextParams, SmallFramesParams, StackParams
from .stack import TemporalStack

CHANNELS = 128          # channels of context per resolution (Video LDM, Table 6)


def resolve_positions(positions: Sequence[int], frames: int) -> tuple[int, ...]:
    """Turn positions into frame numbers 0..frames-1. Negative positions count from the end of the clip.

    Raises VideoLDMError for a position outside the clip, for two positions that name one frame, and for a clip with no
    frame left to make.
    """
    outside = [p for p in positions if not -frames <= p < frames]
    if outside:
        raise VideoLDMError(f"Context frame {outside[0]} lies outside the clip, whose frames are 0 to {frames - 1}. "
                            "Choose positions inside it, or make the clip longer.")
    resolved = tuple(p % frames for p in positions)
    if len(set(resolved)) < len(resolved):
        raise VideoLDMError(f"In a clip of {frames} frames the context positions {list(positions)} name the same frame "
                            "twice. Give each frame once.")
    if len(resolved) >= frames:
        raise VideoLDMError(f"All {frames} frames of the clip are context frames, so there is none left to make. Make "
                            "the clip longer, or give fewer context frames.")
    return resolved


def context_mask(positions: Sequence[int], frames: int) -> Tensor:
    """The mask m_S `t`: 1 at context frames, 0 elsewhere."""
    mask = torch.zeros(frames)
    mask[list(resolve_positions(positions, frames))] = 1
    return mask


def context_input(z: Tensor, mask: Tensor) -> Tensor:
    """The context input c_S = (m * z, m): clips z `b t c h w`, mask `b t` -> `(b t) c+1 h w`."""
    m = mask[:, :, None, None, None].to(z)
    # torch.where and not a product: the other frames may hold NaN.
    masked = torch.where(m > 0, z, torch.zeros((), dtype=z.dtype, device=z.device))
    return torch.cat([masked, m.expand(-1, -1, 1, *z.shape[3:])], dim=2).flatten(0, 1)


def context_input_from_latents(latents: Tensor, positions: Sequence[int], frames: int, clips: int) -> Tensor:
    """The context input c_S of clips, made from their context frames: `(clips frames) c+1 h w`.

    Args:
        latents: the context frames, `(k n) c h w` for n positions. k is the number of clips, or 1 for all clips.
        positions: the frame number of each context frame. Negative numbers count from the end.
        frames: length of a clip.
        clips: number of clips.

    Raises VideoLDMError where the latents do not fit the clips.
    """
    positions = resolve_positions(positions, frames)
    context_frames = latents.unflatten(0, (-1, len(positions)))
    if len(context_frames) not in (1, clips):
        raise VideoLDMError(f"Context frames were given for {len(context_frames)} clips, and {clips} clips are "
                            "sampled. Give one set for all clips, or one for each.")
    z = latents.new_zeros(clips, frames, *latents.shape[1:])
    z[:, list(positions)] = context_frames
    return context_input(z, context_mask(positions, frames).to(z).expand(clips, -1))


# Params of layers with an input for context frames

def add_context_input(params: StackParams, levels: int, positions: Sequence[Sequence[int]], latent_channels: int = 4,
                      channels: int = CHANNELS, fps_width: int = 0) -> StackParams:
    """Params of the same layers with an input for context frames.

    Args:
        params: layers without such an input.
        levels: number of resolutions of the network.
        positions: the sets of context frames to train for, as in ContextParams.
        latent_channels: channels of the latents.
        channels: channels of context that each temporal ResBlock receives.
        fps_width: width of the frame-rate token. 0: no token.
    """
    context = ContextParams(channels, latent_channels, levels, tuple(tuple(p) for p in positions))
    return replace(widen_convolutions(params, context), fps_width=fps_width)


def add_small_frames_input(params: StackParams, levels: int, channels: int = CHANNELS) -> StackParams:
    """Params of the same layers with an upscaler's input for small frames (docs/papers.md#upscalers)."""
    return widen_convolutions(params, SmallFramesParams(channels, levels))


def widen_convolutions(params: StackParams, context: ContextParams | SmallFramesParams) -> StackParams:
    """Params whose temporal convolutions take the channels of this context as well.

    Raises VideoLDMError for layers without convolutions, or with such an input already.
    """
    bricks = tuple((site, replace(brick, context_channels=context.channels)
                    if isinstance(brick, ResBlockParams) else brick) for site, brick in params.bricks)
    if bricks == params.bricks:
        raise VideoLDMError(f"These {params.family} layers have no temporal convolutions, or already take context "
                            "frames: known frames enter through the convolutions.")
    return replace(params, bricks=bricks, context=context)


@torch.no_grad()
def initialise_stack(stack: TemporalStack, tensors: dict[str, Tensor]) -> None:
    """Give a stack the weights of one without an input for context frames.

    The new input columns of the convolutions become zero, so the stack computes what the other one does. The context
    downsampler and the frame-rate token keep their initial values. With zeros there too, the columns could not learn.

    Raises VideoLDMError where the tensors do not fit the stack.
    """
    own = stack.state_dict()
    surplus = [key for key in tensors if key not in own]
    if surplus:
        raise VideoLDMError(f"The layers to begin with hold {surplus[0]}, which the layers to train do not have.")
    for key, value in own.items():
        start = tensors.get(key)
        if start is None and key.startswith("layers."):
            raise VideoLDMError(f"The layers to begin with lack {key}.")
        if start is not None:
            value.zero_()
            value[tuple(slice(size) for size in start.shape)] = start.to(value)
