"""A convolution over frames in the place of a spatial convolution's result (docs/formats.md#makeavid-sd)."""

from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn

from .brick import BrickCall
from .factory import TORCH, Factory

KERNEL = (3, 1)     # over t and over places


@dataclass(frozen=True)
class FrameConvParams:
    """Params of one convolution over t, slots behind the 2-D convolutions of the network."""

    channels: int

    def build(self, make: Factory) -> nn.Module:
        return FrameConv(self, make)


class FrameConv(nn.Module):
    """`conv(x)` over the frames of each place. A fresh one is the identity.

    The published convolution has the kernel 3 on `s c t`. Here it runs on `b c t (h w)`, which needs no copy of s rows.
    """

    def __init__(self, params: FrameConvParams, make: Factory = TORCH) -> None:
        super().__init__()
        self.temporal_conv = make.conv2d(params.channels, params.channels, KERNEL, padding=(1, 0))
        nn.init.dirac_(self.temporal_conv.weight)
        nn.init.zeros_(self.temporal_conv.bias)

    def forward(self, x: Tensor, call: BrickCall) -> Tensor:
        """x `(b t) c h w`. Strength s moves from x to the convolution's result, which is exact at 1."""
        clip = rearrange(x, "(b t) c h w -> b c t (h w)", t=call.frames)
        result = rearrange(self.temporal_conv(clip), "b c t (h w) -> (b t) c h w", h=x.shape[2])
        return result if call.strength == 1 else torch.lerp(x, result, call.strength)
