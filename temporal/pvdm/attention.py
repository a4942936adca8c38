"""Attention of the autoencoder: over time, over a frame, and over one axis for a plane (PVDM, Appendix).

The names of the weights are those of the published files.
"""

import math

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn.functional import gelu

from ..layers.factory import Factory

MAX_FREQUENCY = 10      # of the rotation over a frame
BASE = 10_000           # of the rotation over time
Rotation = tuple[Tensor, Tensor]


class FrameRotation(nn.Module):
    """Rotary positions over time. Feature i turns with frequency i modulo d/2, as published."""

    inv_freqs: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("inv_freqs", BASE ** -(torch.arange(0, width, 2).float() / width))

    def forward(self, count: int, like: Tensor) -> Rotation:
        angles = torch.arange(count, device=like.device)[:, None] * self.inv_freqs.to(like.device, torch.float32)
        return sines(torch.cat([angles, angles], dim=1), like)


class PictureRotation(nn.Module):
    """Rotary positions over a frame: half of the features turn with the row, half with the column."""

    scales: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("scales", torch.logspace(0, math.log2(MAX_FREQUENCY / 2), width // 4, base=2))

    def forward(self, height: int, width: int, like: Tensor) -> Rotation:
        scales = self.scales.to(like.device, torch.float32) * math.pi
        rows, columns = (torch.linspace(-1, 1, count, device=like.device)[:, None] * scales
                         for count in (height, width))
        angles = torch.cat([rows[:, None].expand(-1, width, -1), columns.expand(height, -1, -1)], dim=2)
        return sines(angles.flatten(0, 1).repeat_interleave(2, dim=1), like)


def sines(angles: Tensor, like: Tensor) -> Rotation:
    """What `rotate` needs for angles `n d`: sines and cosines `n 1 d`. The sines of even features are negative."""
    signs = torch.tensor([-1.0, 1.0], device=angles.device).repeat(angles.shape[1] // 2)
    return (angles.sin() * signs)[:, None].to(like.dtype), angles.cos()[:, None].to(like.dtype)


def rotate(x: Tensor, sin: Tensor, cos: Tensor) -> Tensor:
    """Turn neighbouring pairs of features of x `b n h d`."""
    neighbours = x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    return torch.addcmul(x * cos, neighbours, sin)


class Attention(nn.Module):
    """Self-attention within each row of `b n c`."""

    def __init__(self, channels: int, heads: int, width: int, make: Factory) -> None:
        super().__init__()
        self.heads, self.attention = heads, make.attention
        self.to_qkv = make.linear(channels, 3 * heads * width, bias=False)
        self.to_out = nn.Sequential(make.linear(heads * width, channels))

    def forward(self, x: Tensor, rotation: Rotation | None = None, first: int | None = None) -> Tensor:
        """x `b n c`. With `first`, only that many first rows are returned."""
        q, k, v = self.to_qkv(x).chunk(3, dim=-1)
        q = q[:, :first]
        if rotation is not None:
            q, k = (rotate(part.unflatten(-1, (self.heads, -1)), *rotation).flatten(-2) for part in (q, k))
        return self.to_out(self.attention(q, k, v, self.heads))


class GEGLU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        x, gate = x.chunk(2, dim=-1)
        return x * gelu(gate)


class FeedForward(nn.Module):
    """Two linear layers. The activation has no weights."""

    def __init__(self, channels: int, hidden: int, gated: bool, make: Factory) -> None:
        super().__init__()
        wide, activation = (2 * hidden, GEGLU()) if gated else (hidden, nn.GELU())
        self.net = nn.Sequential(make.linear(channels, wide), activation, nn.Identity(), make.linear(hidden, channels))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class PreNorm(nn.Module):
    """A layer on the normalised input."""

    def __init__(self, channels: int, layer: nn.Module, make: Factory) -> None:
        super().__init__()
        self.norm, self.fn = make.layer_norm(channels), layer

    def forward(self, x: Tensor, *inputs) -> Tensor:
        return self.fn(self.norm(x), *inputs)


class TimeSformer(nn.Module):
    """Attention over time, over each frame, and a feed-forward, `depth` times, on `b t n c`."""

    def __init__(self, channels: int, depth: int, heads: int, width: int, make: Factory) -> None:
        super().__init__()
        self.frame_rot_emb, self.image_rot_emb = FrameRotation(width), PictureRotation(width)

        def layer() -> nn.ModuleList:
            over_time, over_frame = (Attention(channels, heads, width, make) for _ in range(2))
            parts = over_time, over_frame, FeedForward(channels, 4 * channels, True, make)
            return nn.ModuleList(PreNorm(channels, part, make) for part in parts)
        self.layers = nn.ModuleList(layer() for _ in range(depth))

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        """x `b t (h w) c`, and so is what is returned."""
        over_time = self.frame_rot_emb(x.shape[1], x)
        over_frame = self.image_rot_emb(height, width, x)
        b, t, n, _ = x.shape
        for time, space, feed_forward in self.layers:
            x = x + rearrange(time(rearrange(x, "b t n c -> (b n) t c"), over_time), "(b n) t c -> b t n c", b=b)
            x = x + space(x.flatten(0, 1), over_frame).unflatten(0, (b, t))
            x = x + feed_forward(x)
        return x


class AxisTransformer(nn.Module):
    """Attention along the axis that a plane lacks. Of `b n c` it gives the first of the n tokens, `b c`."""

    def __init__(self, channels: int, depth: int, heads: int, width: int, hidden: int, make: Factory) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleList([PreNorm(channels, Attention(channels, heads, width, make), make),
                           PreNorm(channels, FeedForward(channels, hidden, False, make), make)])
            for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        for number, (attention, feed_forward) in enumerate(self.layers, 1):
            kept = 1 if number == len(self.layers) else None    # nothing reads the others behind the last layer
            x = x[:, :kept] + attention(x, None, kept)
            x = x + feed_forward(x)
        return x[:, 0]
