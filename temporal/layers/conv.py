"""The temporal residual block of 3-D convolutions (Video LDM, section 3.1; SVD's `VideoResBlock.time_stack`)."""

from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn

from .brick import BrickCall
from .factory import TORCH, Factory
from .mix import Mix

KERNEL = (3, 1, 1)      # over time only: a pixel sees the same pixel of neighbouring frames (Video LDM, Table 6)


@dataclass(frozen=True)
class ResBlockParams:
    """Params of Video LDM's temporal ResBlock, slot `post_res`."""

    channels: int
    emb_dim: int                    # width of the timestep embedding
    mix_length: int                 # length of the mix vector. Above 1, the layer runs clips of this length only
    context_channels: int = 0       # channels of the context maps. 0: the layer takes no context frames

    def build(self, make: Factory) -> nn.Module:
        return TemporalResBlock(self, make)


class TimeStack(nn.Module):
    """`x + conv2(SiLU(GN(conv1(SiLU(GN(x)), context) + emb)))` on `b c t h w`. The norms pool over t, h and w.

    The context channels are concatenated to the input of the first convolution (docs/papers.md#prediction). They come
    after norm and SiLU. So the norm and the skip connection keep the width of layers without context.
    """

    def __init__(self, params: ResBlockParams, make: Factory = TORCH) -> None:
        super().__init__()
        channels = params.channels
        self.in_layers = nn.Sequential(
            make.group_norm(channels),
            nn.SiLU(),
            make.conv3d(channels + params.context_channels, channels, KERNEL, padding=(1, 0, 0)),
        )
        self.emb_layers = nn.Sequential(nn.SiLU(), make.linear(params.emb_dim, channels))
        self.out_layers = nn.Sequential(
            make.group_norm(channels),
            nn.SiLU(),
            nn.Dropout(0.0),
            make.conv3d(channels, channels, KERNEL, padding=(1, 0, 0)),
        )
        nn.init.zeros_(self.out_layers[3].weight)       # a fresh block is the identity
        nn.init.zeros_(self.out_layers[3].bias)

    def forward(self, x: Tensor, emb: Tensor, context: Tensor | None = None) -> Tensor:
        """x `b c t h w`, timestep embedding `b t e`, context channels `b k t h w`."""
        norm, act, conv = self.in_layers
        h = act(norm(x))
        h = conv(h if context is None else torch.cat([h, context.to(h.dtype)], dim=1))
        h = h + rearrange(self.emb_layers(emb).to(h.dtype), "b t c -> b c t 1 1")
        return x + self.out_layers(h)


class TemporalResBlock(nn.Module):
    """Slot `post_res`: runs on the output of the spatial ResBlock, then mixes with it."""

    def __init__(self, params: ResBlockParams, make: Factory = TORCH) -> None:
        super().__init__()
        self.time_stack = TimeStack(params, make)
        self.time_mixer = Mix(params.mix_length, make)

    def forward(self, x: Tensor, call: BrickCall) -> Tensor:
        """x `(b t) c h w`."""
        frames, context = call.frames, call.context_maps
        clip = rearrange(x, "(b t) c h w -> b c t h w", t=frames)
        if context is not None:
            context = rearrange(context, "(b t) k h w -> b k t h w", t=frames)
        temporal = self.time_stack(clip, rearrange(call.emb, "(b t) e -> b t e", t=frames), context)
        return self.time_mixer(x, rearrange(temporal, "b c t h w -> (b t) c h w"), frames, call.strength)
