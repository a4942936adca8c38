"""The AnimateDiff motion module: temporal self-attention after a spatial transformer (docs/formats.md#animatediff)."""

from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn

from .attention import FeedForward, Projections
from .brick import BrickCall
from .factory import Factory
from .position import interleaved_sinusoid

CACHED = 1024 * 320     # numbers per thread that the blocks take in at a time; 8 times as many, at their widest, fit L3


@dataclass(frozen=True)
class MotionParams:
    """AnimateDiff motion module, slot `post_attn`."""

    channels: int
    heads: int
    blocks: int = 1
    attentions: int = 2             # in each block
    table_length: int = 0           # of a learned table of frame positions; 0: they are the sinusoid, computed
    norm_pooled: bool = False       # the module's norm sees all frames of a clip together

    def build(self, make: Factory) -> nn.Module:
        return MotionModule(self, make)


class MotionAttention(Projections):
    """Self-attention over t whose frame positions feed q, k and v, after the norm."""

    def __init__(self, params: MotionParams, make: Factory = Factory()):
        super().__init__(params.channels, params.heads, None, make)
        length = params.table_length
        self.pos_encoder = PositionTable(length, params.channels, make) if length else None

    def positions(self, frames: int, like: Tensor) -> Tensor:
        if self.pos_encoder is not None:
            return self.pos_encoder(frames).to(like)
        return interleaved_sinusoid(frames, like.shape[-1], like.device).to(like.dtype)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = x + self.positions(x.shape[1], x)
        return self.attend(x, x, mask)


class PositionTable(nn.Module):
    """Learned positions: a file whose table is not the sinusoid keeps its own, and ends where it ends."""

    def __init__(self, length: int, dim: int, make: Factory = Factory()):
        super().__init__()
        self.pe = nn.Parameter(torch.zeros(1, length, dim, **make.weights))

    def forward(self, frames: int) -> Tensor:
        return self.pe[0, :frames]


class MotionBlock(nn.Module):
    """Two temporal self-attentions and a GEGLU, each residual, on `(b s) t c`."""

    def __init__(self, params: MotionParams, make: Factory = Factory()):
        super().__init__()
        self.attention_blocks = nn.ModuleList(MotionAttention(params, make) for _ in range(params.attentions))
        self.norms = nn.ModuleList(make.layer_norm(params.channels) for _ in range(params.attentions))
        self.ff = FeedForward(params.channels, make)
        self.ff_norm = make.layer_norm(params.channels)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        for norm, attention in zip(self.norms, self.attention_blocks):
            x = x + attention(norm(x), mask)
        return x + self.ff(self.ff_norm(x))


class TemporalTransformer3D(nn.Module):
    """Norm, in, blocks over t, out: the residual that is added to `(b t) c h w`.

    Its norm is per frame in AnimateDiff's own code, pooled over the frames in diffusers and in the SDXL beta.
    """

    def __init__(self, params: MotionParams, make: Factory = Factory()):
        super().__init__()
        channels = params.channels
        self.norm_pooled = params.norm_pooled
        self.norm = make.group_norm(channels, eps=1e-6)
        self.proj_in = make.linear(channels, channels)
        self.transformer_blocks = nn.ModuleList(MotionBlock(params, make) for _ in range(params.blocks))
        self.proj_out = make.linear(channels, channels)
        nn.init.zeros_(self.proj_out.weight)
        nn.init.zeros_(self.proj_out.bias)

    def normed(self, x: Tensor, frames: int) -> Tensor:
        if not self.norm_pooled:
            return self.norm(x)
        pooled = self.norm(rearrange(x, "(b t) c h w -> b c t h w", t=frames))
        return rearrange(pooled, "b c t h w -> (b t) c h w")

    def forward(self, x: Tensor, call: BrickCall) -> Tensor:
        _, _, height, _ = x.shape
        frames, band = call.frames, call.band(x.device)
        h = rearrange(self.normed(x, frames), "(b t) c h w -> (b h w) t c", t=frames)
        slices = [self.over_time(places, band) for places in h.split(slice_length(h))]
        h = torch.cat([rearrange(places, "s t c -> t s c") for places in slices], dim=1)   # frames whole again in memory
        return rearrange(h, "t (b h w) c -> (b t) c h w", b=len(x) // frames, h=height)

    def over_time(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """x `s t c`: some places of the clips, each for itself."""
        h = self.proj_in(x.contiguous())        # one copy here, or every linear layer makes its own
        for block in self.transformer_blocks:
            h = block(h, mask)
        return self.proj_out(h)


def slice_length(x: Tensor) -> int:
    """How many places of `s t c` run at a time: on a CPU as many as its caches hold, elsewhere all."""
    if x.device.type != "cpu":
        return len(x)
    return max(1, CACHED * torch.get_num_threads() // x[0].numel())


class MotionModule(nn.Module):
    """Slot `post_attn`: `x + strength * temporal_transformer(x)`."""

    def __init__(self, params: MotionParams, make: Factory = Factory()):
        super().__init__()
        self.temporal_transformer = TemporalTransformer3D(params, make)

    def forward(self, x: Tensor, call: BrickCall) -> Tensor:
        """x `(b t) c h w`."""
        return torch.add(x, self.temporal_transformer(x, call), alpha=call.strength)
