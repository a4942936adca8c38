"""Temporal layers of MuseV (docs/formats.md#musev): ModelScope's, each with a weight and with the number of the frame.

    WeightedConv            four convolutions over t after each ResBlock
    WeightedTransformer     self-attention over t after the first convolution and after each spatial transformer
    FrameEmbedding          the embedding of frame numbers that all transformers share

The names of modules are those of the files.
"""

from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn.functional import silu

from .brick import BrickCall
from .factory import TORCH, Factory
from .modelscope import ClipTransformer, ClipTransformerParams, StagedConv, StagedConvParams
from .motion import over_frames
from .position import timestep_sinusoid

FIRST_WEIGHT = 1e-5     # the published initial value of `temporal_weight`


@dataclass(frozen=True)
class WeightedConvParams:
    """Params of four convolutions over t with a weight, slot `post_res`."""

    channels: int

    def build(self, make: Factory) -> nn.Module:
        return WeightedConv(self, make)


@dataclass(frozen=True)
class WeightedTransformerParams:
    """Params of a transformer over t with a weight, slots `post_conv_in` and `post_attn`."""

    channels: int
    heads: int
    embedding: int      # width of the embedding of frame numbers
    blocks: int = 1     # transformer blocks

    def build(self, make: Factory) -> nn.Module:
        return WeightedTransformer(self, make)


class FrameEmbedding(nn.Module):
    """Embeds frame numbers as diffusion timesteps are embedded."""

    def __init__(self, width: int, make: Factory = TORCH) -> None:
        super().__init__()
        self.sinusoid = width // 4
        self.linear_1 = make.linear(self.sinusoid, width)
        self.linear_2 = make.linear(width, width)

    def forward(self, frames: int, like: Tensor) -> Tensor:
        """The embedding of frames 0 to `frames - 1`, `t e`, in the dtype and on the device of `like`."""
        numbers = torch.arange(frames, device=like.device)
        return self.linear_2(silu(self.linear_1(timestep_sinusoid(numbers, self.sinusoid).to(like.dtype))))


def weight_of(layer: nn.Module, like: Tensor) -> Tensor:
    """The size of a layer's weight: its sign is dropped."""
    return layer.temporal_weight.abs().to(like)


class WeightedConv(StagedConv):
    """Slot `post_res`: `x + |temporal_weight| * conv4(conv3(conv2(conv1(x))))`."""

    def __init__(self, params: WeightedConvParams, make: Factory = TORCH) -> None:
        super().__init__(StagedConvParams(params.channels), make)
        self.temporal_weight = nn.Parameter(torch.full((1,), FIRST_WEIGHT, **make.weights))

    def forward(self, x: Tensor, call: BrickCall) -> Tensor:
        """x `(b t) c h w`."""
        return torch.add(x, weight_of(self, x) * self.residual(x, call), alpha=call.strength)


class WeightedTransformer(ClipTransformer):
    """Slots `post_conv_in` and `post_attn`: ModelScope's transformer, which is told the numbers of the frames.

    They are added to its features once, before the blocks.
    """

    def __init__(self, params: WeightedTransformerParams, make: Factory = TORCH) -> None:
        channels = params.channels
        super().__init__(ClipTransformerParams(channels, params.heads, channels, params.blocks), make)
        self.frame_emb_proj = make.linear(params.embedding, channels)
        self.temporal_weight = nn.Parameter(torch.full((1,), FIRST_WEIGHT, **make.weights))

    def forward(self, x: Tensor, call: BrickCall) -> Tensor:
        """x `(b t) c h w`."""
        h = self.norm(rearrange(x, "(b t) c h w -> b c t h w", t=call.frames))
        numbers = self.frame_emb_proj(silu(call.frame_embedding))
        return torch.add(x, weight_of(self, x) * over_frames(self, h, call.band(x.device), numbers),
                         alpha=call.strength)
