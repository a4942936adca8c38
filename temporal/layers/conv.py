"""The temporal residual block of 3-D convolutions (Video LDM, section 3.1; SVD's `VideoResBlock.time_stack`)."""

from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn

from .brick import BrickCall
from .factory import Factory
from .mix import Mix

KERNEL = (3, 1, 1)      # over time alone: a pixel sees only its own place in neighbouring frames (Video LDM, Table 6)


@dataclass(frozen=True)
class ResBlockParams:
    """Temporal ResBlock of Video LDM, slot `post_res`."""

    channels: int
    emb_dim: int                    # width of the timestep embedding
    mix_length: int                 # 1, or the only clip length that the mix can run
    context_channels: int = 0       # received beside x, of layers that take context frames

    def build(self, make: Factory) -> nn.Module:
        return TemporalResBlock(self, make)


class TimeStack(nn.Module):
    """`x + conv2(SiLU(GN(conv1(SiLU(GN(x)), known) + emb)))` on `b c t h w`; its norms pool over t, h and w.

    known: context channels, concatenated to the input of the first convolution (docs/papers.md#prediction) behind norm
    and SiLU, so that norm and skip keep the width of layers without them.
    """

    def __init__(self, params: ResBlockParams, make: Factory = Factory()):
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

    def forward(self, x: Tensor, emb: Tensor, known: Tensor | None = None) -> Tensor:
        """x `b c t h w`, emb `b t e` (the spatial block's timestep embedding), known `b k t h w`."""
        norm, act, conv = self.in_layers
        h = act(norm(x))
        h = conv(h if known is None else torch.cat([h, known.to(h.dtype)], dim=1))
        h = h + rearrange(self.emb_layers(emb).to(h.dtype), "b t c -> b c t 1 1")
        return x + self.out_layers(h)


class TemporalResBlock(nn.Module):
    """Slot `post_res`: acts on what the spatial ResBlock gave out, then mixes."""

    def __init__(self, params: ResBlockParams, make: Factory = Factory()):
        super().__init__()
        self.time_stack = TimeStack(params, make)
        self.time_mixer = Mix(params.mix_length, make)

    def forward(self, x: Tensor, call: BrickCall) -> Tensor:
        """x `(b t) c h w`."""
        frames, known = call.frames, call.context_maps
        clip = rearrange(x, "(b t) c h w -> b c t h w", t=frames)
        if known is not None:
            known = rearrange(known, "(b t) k h w -> b k t h w", t=frames)
        temporal = self.time_stack(clip, rearrange(call.emb, "(b t) e -> b t e", t=frames), known)
        return self.time_mixer(x, rearrange(temporal, "b c t h w -> (b t) c h w"), frames, call.strength)
