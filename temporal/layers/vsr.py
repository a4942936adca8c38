"""Layers of LaVie's video super-resolution and of Upscale-A-Video, for the x4 upscaler
(docs/papers.md#lavie-super-resolution; docs/formats.md#x4-upscaler-layers).

There are three kinds:
    ResidualConv            a residual block of 3-D convolutions before each spatial transformer
    RotaryTransformer       attention over t inside each spatial transformer
    LevelModule             after each resolution level, one residual block over t and one over h and w

The names of modules are those of LaVie's file.
"""

from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn

from .attention import Projections
from .brick import BrickCall
from .factory import TORCH, Factory
from .position import BUCKETS, ROTATED, distance_buckets, rotate, rotation_angles

EPS = 1e-6
SHORT, LONG = (3, 1, 1), (5, 1, 1)      # kernels over t
SQUARE = (3, 3)                         # kernel over h and w


@dataclass(frozen=True)
class ResidualConvParams:
    """Params of a residual block of convolutions over t, slot `post_res`."""

    channels: int

    def build(self, make: Factory) -> nn.Module:
        return ResidualConv(self, make)


@dataclass(frozen=True)
class RotaryParams:
    """Params of an attention over t with relative positions, slot `in_attn_pre_ff`."""

    channels: int
    heads: int

    def build(self, make: Factory) -> nn.Module:
        return RotaryTransformer(self, make)


@dataclass(frozen=True)
class LevelParams:
    """Params of convolutions over t and over h and w, slot `post_level`."""

    channels: int
    emb_dim: int        # width of the timestep embedding

    def build(self, make: Factory) -> nn.Module:
        return LevelModule(self, make)


class ConvBlock(nn.Module):
    """The residual `conv2(SiLU(GN(conv1(SiLU(GN(x))) + emb)))` on `b c t h w`. The norms pool over t, h and w.

    kernels: of the two convolutions. One of three sizes is over t, h and w; one of two sizes runs on each frame.
    emb_dim: width of the timestep embedding. 0: the block takes none.
    """

    def __init__(self, channels: int, kernels: tuple[tuple[int, ...], tuple[int, ...]], emb_dim: int = 0,
                 make: Factory = TORCH) -> None:
        super().__init__()
        self.norm1 = make.group_norm(channels, eps=EPS)
        self.conv1 = make_conv(channels, kernels[0], make)
        if emb_dim:
            self.time_emb_proj = make.linear(emb_dim, channels)
        self.norm2 = make.group_norm(channels, eps=EPS)
        self.conv2 = make_conv(channels, kernels[1], make)
        self.act = nn.SiLU()

    def forward(self, x: Tensor, emb: Tensor | None = None) -> Tensor:
        """x `b c t h w`, emb `b t e`."""
        h = run_conv(self.conv1, self.act(self.norm1(x)))
        if emb is not None:
            h = h + rearrange(self.time_emb_proj(self.act(emb)).to(h.dtype), "b t c -> b c t 1 1")
        return run_conv(self.conv2, self.act(self.norm2(h)))


def make_conv(channels: int, kernel: tuple[int, ...], make: Factory) -> nn.Module:
    """A 3-D convolution for a kernel of three sizes, a 2-D one for two. It keeps the size of its input."""
    kind = make.conv3d if len(kernel) == 3 else make.conv2d
    return kind(channels, channels, kernel, padding=tuple(size // 2 for size in kernel))


def run_conv(conv: nn.Module, x: Tensor) -> Tensor:
    """Run a convolution on `b c t h w`. A 2-D convolution runs on each frame."""
    if len(conv.kernel_size) == 3:
        return conv(x)
    return rearrange(conv(rearrange(x, "b c t h w -> (b t) c h w")), "(b t) c h w -> b c t h w", t=x.shape[2])


class ResidualConv(nn.Module):
    """Slot `post_res`: runs on the output of the ResBlock in front of a spatial transformer."""

    def __init__(self, params: ResidualConvParams, make: Factory = TORCH) -> None:
        super().__init__()
        self.resblock_temporal = ConvBlock(params.channels, (SHORT, SHORT), 0, make)

    def forward(self, x: Tensor, call: BrickCall) -> Tensor:
        """x `(b t) c h w`."""
        residual = self.resblock_temporal(rearrange(x, "(b t) c h w -> b c t h w", t=call.frames))
        return torch.add(x, rearrange(residual, "b c t h w -> (b t) c h w"), alpha=call.strength)


class DistanceBias(nn.Module):
    """A bias that each head adds to its attention scores, by the distance of two frames. It starts at zero."""

    def __init__(self, heads: int, make: Factory = TORCH) -> None:
        super().__init__()
        # Not an Embedding: initialising one on the meta device makes torch import its compiler, which takes seconds.
        self.relative_attention_bias = nn.ParameterDict({"weight": torch.zeros(BUCKETS, heads, **make.weights)})

    def forward(self, frames: int, like: Tensor) -> Tensor:
        """The biases `1 heads t t`, in the dtype and on the device of `like`."""
        table = self.relative_attention_bias["weight"].to(like)
        return rearrange(table[distance_buckets(frames, like.device)], "i j h -> 1 h i j")


class RotaryAttention(Projections):
    """Self-attention over t with rotary positions and a bias by distance."""

    def __init__(self, dim: int, heads: int, make: Factory = TORCH) -> None:
        super().__init__(dim, heads, None, make)
        if dim // heads < ROTATED:
            raise ValueError(f"{dim} channels in {heads} heads are fewer than the {ROTATED} of a head that are turned")
        self.time_rel_pos_bias = DistanceBias(heads, make)

    def forward(self, x: Tensor, band: Tensor | None = None) -> Tensor:
        """x `s t c`. The band `t t` is True where frames attend to each other."""
        frames = x.shape[1]
        angles = rotation_angles(torch.arange(frames, device=x.device))
        # The attention scales q by d^-0.5. The published code scales before the rotation, which gives the same.
        q, k = (rotate(to(x), self.heads, angles) for to in (self.to_q, self.to_k))
        bias = self.time_rel_pos_bias(frames, q)
        if band is not None:
            bias = bias.masked_fill(~band, float("-inf"))
        return self.to_out(self.attention(q, k, self.to_v(x), self.heads, mask=bias))


class RotaryTransformer(nn.Module):
    """Slot `in_attn_pre_ff`: returns the residual that is added between text attention and feed-forward."""

    def __init__(self, params: RotaryParams, make: Factory = TORCH) -> None:
        super().__init__()
        self.norm_temporal = make.layer_norm(params.channels)
        self.attn_temporal = RotaryAttention(params.channels, params.heads, make)
        nn.init.zeros_(self.attn_temporal.to_out[0].weight)     # the published code does not zero the bias

    def forward(self, x: Tensor, call: BrickCall) -> Tensor:
        """x `(b t) s c` -> the residual, of the same shape."""
        pixels = rearrange(x, "(b t) s c -> (b s) t c", t=call.frames)
        residual = self.attn_temporal(self.norm_temporal(pixels), call.band(x.device))
        return call.strength * rearrange(residual, "(b s) t c -> (b t) s c", s=x.shape[1])


class LevelModule(nn.Module):
    """Slot `post_level`: `x + shift_conv(s(t(x)))`, published as TemporalModule3D. A fresh one is the identity."""

    def __init__(self, params: LevelParams, make: Factory = TORCH) -> None:
        super().__init__()
        self.resblocks_3d_t = ConvBlock(params.channels, (LONG, SHORT), params.emb_dim, make)
        self.resblocks_3d_s = ConvBlock(params.channels, (SQUARE, SQUARE), params.emb_dim, make)
        self.shift_conv = make.conv2d(params.channels, params.channels, 1)
        nn.init.zeros_(self.shift_conv.weight)
        nn.init.zeros_(self.shift_conv.bias)

    def forward(self, x: Tensor, call: BrickCall) -> Tensor:
        """x `(b t) c h w`."""
        h = rearrange(x, "(b t) c h w -> b c t h w", t=call.frames)
        emb = rearrange(call.emb, "(b t) e -> b t e", t=call.frames)
        for block in (self.resblocks_3d_t, self.resblocks_3d_s):
            h = h + block(h, emb)
        shift = self.shift_conv(rearrange(h, "b c t h w -> (b t) c h w"))
        return torch.add(x, shift, alpha=call.strength)
