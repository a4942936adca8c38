"""Context frames: masks, the input c_S, further channels of a network's input, and params of layers that take c_S.

Video LDM, sections 3.2 and 3.3, and appendix H.2 (docs/papers.md#interpolation); docs/papers.md#seine;
docs/papers.md#lavie-interpolation.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from .errors import VideoLDMError
from .layers import ResBlockParams
from .params import GREY, MASK_FIRST, ContextParams, InputFramesParams, SmallFramesParams, StackParams
from .rollout import copied_key
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


def masked_frames(z: Tensor, mask: Tensor, filler: Tensor | None = None) -> Tensor:
    """Clips `b t c h w` whose unknown frames hold the filler `c h w`, or zeros. mask `b t`: 1 at known frames."""
    # torch.where and not a product: the other frames may hold NaN.
    known = mask[:, :, None, None, None].to(z.device) > 0
    return torch.where(known, z, z.new_zeros(()) if filler is None else filler.to(z))


def context_input(z: Tensor, mask: Tensor) -> Tensor:
    """The context input c_S = (m * z, m): clips z `b t c h w`, mask `b t` -> `(b t) c+1 h w`."""
    return torch.cat([masked_frames(z, mask), mask_channel(z, mask)], dim=2).flatten(0, 1)


def mask_channel(z: Tensor, values: Tensor) -> Tensor:
    """A channel `b t 1 h w` for clips z `b t c h w`, with one value `b t` in each frame."""
    return values[:, :, None, None, None].to(z).expand(-1, -1, 1, *z.shape[3:])


def context_input_from_latents(latents: Tensor, positions: Sequence[int], frames: int, clips: int) -> Tensor:
    """The context input c_S of clips, made from their context frames: `(clips frames) c+1 h w`.

    Args: as in clips_from_latents.
    """
    return context_input(*clips_from_latents(latents, positions, frames, clips))


def clips_from_latents(latents: Tensor, positions: Sequence[int], frames: int, clips: int) -> tuple[Tensor, Tensor]:
    """Clips `clips frames c h w` with known frames at their places, and the mask `clips frames`.

    Args:
        latents: the known frames, `(k n) c h w` for n positions. k is the number of clips, or 1 for all clips.
        positions: the frame number of each known frame. Negative numbers count from the end.
        frames: length of a clip.
        clips: number of clips.

    Raises VideoLDMError where the latents do not fit the clips.
    """
    positions = resolve_positions(positions, frames)
    z = latents.new_zeros(clips, frames, *latents.shape[1:])
    mask = z.new_zeros(clips, frames)
    if positions:
        known = latents.unflatten(0, (-1, len(positions)))
        if len(known) not in (1, clips):
            raise VideoLDMError(f"Context frames were given for {len(known)} clips, and {clips} clips are sampled. "
                                "Give one set for all clips, or one for each.")
        z[:, list(positions)] = known
        mask[:, list(positions)] = 1
    return z, mask


# Further channels of a network's own input

def masked_input(params: InputFramesParams, z: Tensor, mask: Tensor, grey: Tensor | None = None) -> Tensor:
    """The further channels `(b t) c+1 h w` in the forms with a mask.

    Args:
        params: the network's input for known frames.
        z: clips `b t c h w`. What stands in their unknown frames does not matter.
        mask: `b t`, 1 at known frames.
        grey: the encoding of mid-grey `c h w`, for networks with this filler.
    """
    filler = grey if params.filler == GREY else None
    if params.filler == GREY and grey is None:
        raise VideoLDMError("This network sees the encoding of mid-grey where frames are unknown, and none was given. "
                            "Connect the VAE.")
    frames = masked_frames(z, mask, filler)
    values = mask_channel(z, torch.where(mask > 0, params.given, 1 - params.given))
    parts = (values, frames) if params.form == MASK_FIRST else (frames, values)
    return torch.cat(parts, dim=2).flatten(0, 1)


def copies_input(keys: Tensor, frames: Sequence[int]) -> Tensor:
    """The further channels `(b f) c h w` in the form COPIES.

    Args:
        keys: all key frames of clips, `b k c h w`.
        frames: numbers of the f frames of each interpolated clip that the call has.
    """
    return keys[:, [copied_key(frame) for frame in frames]].flatten(0, 1)


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
