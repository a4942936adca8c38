"""Attention over frames without positions: LaVie's interpolation (docs/papers.md#lavie-interpolation) and makeavid-sd
(docs/formats.md#makeavid-sd)."""

from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn

from .attention import Attention
from .brick import BrickCall
from .factory import TORCH, Factory


@dataclass(frozen=True)
class FrameAttentionParams:
    """Params of an attention over t without positions, slot `in_attn_post_ff`."""

    channels: int
    heads: int

    def build(self, make: Factory) -> nn.Module:
        return FrameAttention(self, make)


class FrameAttention(nn.Module):
    """Slot `in_attn_post_ff`: `x + attention(norm(x))` over the frames of each pixel."""

    def __init__(self, params: FrameAttentionParams, make: Factory = TORCH) -> None:
        super().__init__()
        self.norm_temporal = make.layer_norm(params.channels)
        self.attn_temporal = Attention(params.channels, params.heads, None, make)
        nn.init.zeros_(self.attn_temporal.to_out[0].weight)     # the published code does not zero the bias

    def forward(self, x: Tensor, call: BrickCall) -> Tensor:
        """x `(b t) s c`."""
        return torch.add(x, self.residual(x, call), alpha=call.strength)

    def residual(self, x: Tensor, call: BrickCall) -> Tensor:
        """What the attention makes of x `(b t) s c`."""
        pixels = rearrange(x, "(b t) s c -> (b s) t c", t=call.frames)
        residual = self.attn_temporal(self.norm_temporal(pixels), mask=call.band(x.device))
        return rearrange(residual, "(b s) t c -> (b t) s c", s=x.shape[1])


@dataclass(frozen=True)
class FrameResidualParams:
    """Params of the same attention in the slot `in_attn_pre_ff`."""

    channels: int
    heads: int

    def build(self, make: Factory) -> nn.Module:
        return FrameResidual(self, make)


class FrameResidual(FrameAttention):
    """Slot `in_attn_pre_ff`: the residual `attention(norm(x))` over the frames of each pixel."""

    def __init__(self, params: FrameResidualParams, make: Factory = TORCH) -> None:
        super().__init__(FrameAttentionParams(params.channels, params.heads), make)

    def forward(self, x: Tensor, call: BrickCall) -> Tensor:
        """x `(b t) s c`."""
        return call.strength * self.residual(x, call)
