"""Layers of LaVie's video super-resolution and of Upscale-A-Video, for the x4 upscaler (papers.md B.5; formats.md, h).

Three kinds: a residual block of 3-D convolutions before each spatial transformer, attention over t inside it, and after
each resolution level a residual block over t and one over h and w. Their names are those of LaVie's file.
"""

from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn

from .attention import Attention, attend
from .position import BUCKETS, ROTATED, distance_band, distance_buckets, rotate, rotation_angles

EPS = 1e-6
SHORT, LONG = (3, 1, 1), (5, 1, 1)      # kernels over t alone
SQUARE = (3, 3)                         # over h and w


@dataclass(frozen=True)
class ResidualConvParams:
    """Residual block of convolutions over t, slot `post_res`."""

    channels: int


@dataclass(frozen=True)
class RotaryParams:
    """Attention over t with relative positions, slot `in_attn_pre_ff`."""

    channels: int
    heads: int


@dataclass(frozen=True)
class LevelParams:
    """Convolutions over t and over the picture, slot `post_level`."""

    channels: int
    emb_dim: int


class ConvBlock(nn.Module):
    """`conv2(SiLU(GN(conv1(SiLU(GN(x))) + emb)))` on `b c t h w`: the residual. Its norms pool over t, h and w.

    A kernel of two sizes acts on each frame. emb_dim 0: a block that does not hear the timestep.
    """

    def __init__(self, channels: int, kernels: tuple, emb_dim: int = 0, operations=nn, dtype=None, device=None):
        super().__init__()
        place = {"dtype": dtype, "device": device}
        self.norm1 = operations.GroupNorm(32, channels, eps=EPS, **place)
        self.conv1 = conv(channels, kernels[0], operations, **place)
        if emb_dim:
            self.time_emb_proj = operations.Linear(emb_dim, channels, **place)
        self.norm2 = operations.GroupNorm(32, channels, eps=EPS, **place)
        self.conv2 = conv(channels, kernels[1], operations, **place)
        self.act = nn.SiLU()

    def forward(self, x: Tensor, emb: Tensor | None = None) -> Tensor:
        """x `b c t h w`, emb `b t e`."""
        h = convolved(self.conv1, self.act(self.norm1(x)))
        if emb is not None:
            h = h + rearrange(self.time_emb_proj(self.act(emb)).to(h.dtype), "b t c -> b c t 1 1")
        return convolved(self.conv2, self.act(self.norm2(h)))


def conv(channels: int, kernel: tuple, operations, dtype, device) -> nn.Module:
    kind = operations.Conv3d if len(kernel) == 3 else operations.Conv2d
    return kind(channels, channels, kernel, padding=tuple(size // 2 for size in kernel), dtype=dtype, device=device)


def convolved(conv: nn.Module, x: Tensor) -> Tensor:
    """A convolution on `b c t h w`, frame by frame where it is one of pictures."""
    if len(conv.kernel_size) == 3:
        return conv(x)
    return rearrange(conv(rearrange(x, "b c t h w -> (b t) c h w")), "(b t) c h w -> b c t h w", t=x.shape[2])


class ResidualConv(nn.Module):
    """Slot `post_res`: acts on what the spatial ResBlock before a spatial transformer gave out."""

    def __init__(self, params: ResidualConvParams, operations=nn, dtype=None, device=None):
        super().__init__()
        self.resblock_temporal = ConvBlock(params.channels, (SHORT, SHORT), 0, operations, dtype, device)

    def forward(self, x: Tensor, frames: int, strength: float = 1.0) -> Tensor:
        """x `(b t) c h w`, frames t."""
        residual = self.resblock_temporal(rearrange(x, "(b t) c h w -> b c t h w", t=frames))
        return torch.add(x, rearrange(residual, "b c t h w -> (b t) c h w"), alpha=strength)


class DistanceBias(nn.Module):
    """What each head adds to its scores for the distance between two frames; fresh, nothing."""

    def __init__(self, heads: int, dtype=None, device=None):
        super().__init__()
        # Not an Embedding: drawing its weight on the meta device has torch import its compiler, for seconds.
        self.relative_attention_bias = nn.ParameterDict(
            {"weight": torch.zeros(BUCKETS, heads, dtype=dtype, device=device)})

    def forward(self, frames: int, like: Tensor) -> Tensor:
        """`1 heads t t`, one table for every place."""
        table = self.relative_attention_bias["weight"].to(like)
        return rearrange(table[distance_buckets(frames, like.device)], "i j h -> 1 h i j")


class RotaryAttention(Attention):
    """Self-attention over t: q and k are turned by their frames' positions, and the scores biased by distance."""

    def __init__(self, dim: int, heads: int, attention=attend, operations=nn, dtype=None, device=None):
        super().__init__(dim, heads, None, attention, operations, dtype, device)
        if dim // heads < ROTATED:
            raise ValueError(f"{dim} channels in {heads} heads are fewer than the {ROTATED} of a head that are turned")
        self.time_rel_pos_bias = DistanceBias(heads, dtype, device)

    def forward(self, x: Tensor, band: Tensor | None = None) -> Tensor:
        """x `s t c`; band `t t`, true where frames see each other."""
        frames = x.shape[1]
        angles = rotation_angles(torch.arange(frames, device=x.device))
        # Scaling q by d^-0.5 is left to the attention: turning is linear, so before it and after are the same.
        q, k = (rotate(to(x), self.heads, angles) for to in (self.to_q, self.to_k))
        bias = self.time_rel_pos_bias(frames, q)
        if band is not None:
            bias = bias.masked_fill(~band, float("-inf"))
        return self.to_out(self.attention(q, k, self.to_v(x), self.heads, mask=bias))


class RotaryTransformer(nn.Module):
    """Slot `in_attn_pre_ff`: gives the residual that joins between text attention and feed-forward."""

    def __init__(self, params: RotaryParams, attention=attend, operations=nn, dtype=None, device=None):
        super().__init__()
        self.norm_temporal = operations.LayerNorm(params.channels, dtype=dtype, device=device)
        self.attn_temporal = RotaryAttention(params.channels, params.heads, attention, operations, dtype, device)
        nn.init.zeros_(self.attn_temporal.to_out[0].weight)     # its bias is not zeroed, as published

    def forward(self, x: Tensor, frames: int, strength: float = 1.0, max_distance: int | None = None) -> Tensor:
        """x `(b t) s c`, frames t -> the residual, of the same shape."""
        band = distance_band(frames, max_distance, x.device)
        places = rearrange(x, "(b t) s c -> (b s) t c", t=frames)
        residual = self.attn_temporal(self.norm_temporal(places), band)
        return strength * rearrange(residual, "(b s) t c -> (b t) s c", s=x.shape[1])


class LevelModule(nn.Module):
    """Slot `post_level`: `x + shift_conv(s(t(x)))`, the published TemporalModule3D; fresh it is the identity."""

    def __init__(self, params: LevelParams, operations=nn, dtype=None, device=None):
        super().__init__()
        place = {"operations": operations, "dtype": dtype, "device": device}
        self.resblocks_3d_t = ConvBlock(params.channels, (LONG, SHORT), params.emb_dim, **place)
        self.resblocks_3d_s = ConvBlock(params.channels, (SQUARE, SQUARE), params.emb_dim, **place)
        self.shift_conv = operations.Conv2d(params.channels, params.channels, 1, dtype=dtype, device=device)
        nn.init.zeros_(self.shift_conv.weight)
        nn.init.zeros_(self.shift_conv.bias)

    def forward(self, x: Tensor, emb: Tensor, frames: int, strength: float = 1.0) -> Tensor:
        """x `(b t) c h w`, emb `(b t) e` (the network's timestep embedding), frames t."""
        h = rearrange(x, "(b t) c h w -> b c t h w", t=frames)
        emb = rearrange(emb, "(b t) e -> b t e", t=frames)
        for block in (self.resblocks_3d_t, self.resblocks_3d_s):
            h = h + block(h, emb)
        shift = self.shift_conv(rearrange(h, "b c t h w -> (b t) c h w"))
        return torch.add(x, shift, alpha=strength)
