"""Positions of frames in time."""

import math

import torch
from torch import Tensor


def timestep_sinusoid(positions: Tensor, dim: int, max_period: float = 10000.0) -> Tensor:
    """The [cos | sin] embedding of diffusion timesteps, used for frame positions (Video LDM, appendix D): `t -> t dim`.

    An odd `dim` is padded with one zero column.
    """
    half = dim // 2
    index = torch.arange(half, dtype=torch.float32, device=positions.device)
    frequencies = torch.exp(-math.log(max_period) * index / half)
    angles = positions.float()[:, None] * frequencies[None]
    embedding = torch.cat([angles.cos(), angles.sin()], dim=-1)
    return torch.nn.functional.pad(embedding, (0, dim % 2))


def interleaved_sinusoid(length: int, dim: int, device: torch.device | None = None) -> Tensor:
    """AnimateDiff's position table: interleaved sin and cos, base 10000, `length dim`, float32."""
    positions = torch.arange(length, dtype=torch.float32, device=device)[:, None]
    frequencies = torch.exp(torch.arange(0, dim, 2, dtype=torch.float32, device=device) * (-math.log(10000.0) / dim))
    table = torch.zeros(length, dim, device=device)
    table[:, 0::2] = torch.sin(positions * frequencies)
    table[:, 1::2] = torch.cos(positions * frequencies)
    return table


def distance_band(frames: int, max_distance: int | None, device: torch.device | None = None) -> Tensor | None:
    """The attention mask `t t` of convolution in time (docs/papers.md#convolution-in-time).

    It is True where |i - j| <= max_distance. None is returned where all frames attend to each other.
    """
    if max_distance is None or frames - 1 <= max_distance:
        return None
    index = torch.arange(frames, device=device)
    return (index[:, None] - index[None]).abs() <= max_distance


# Relative positions: LaVie's super-resolution and Upscale-A-Video (docs/papers.md#lavie-attention)

ROTATED = 32            # RoPE rotates this many channels at the front of each head
BUCKETS = 32            # rows of the table of distance biases
REACH = 32              # all distances from this one on share a row


def rotation_angles(positions: Tensor) -> Tensor:
    """The angles of RoPE: `t -> t 16`, with frequencies 10000^(-2i/32)."""
    frequencies = 10000.0 ** (-torch.arange(0, ROTATED, 2, dtype=torch.float32, device=positions.device) / ROTATED)
    return positions.float()[:, None] * frequencies


def rotate(x: Tensor, heads: int, angles: Tensor) -> Tensor:
    """RoPE on x `s t (heads d)`. It rotates adjacent pairs of the first 32 channels of each head."""
    front, rest = x.unflatten(-1, (heads, -1)).split([ROTATED, x.shape[-1] // heads - ROTATED], dim=-1)
    cos, sin = (wave[:, None].to(x.dtype) for wave in (angles.cos(), angles.sin()))
    even, odd = front[..., 0::2], front[..., 1::2]
    rotated = torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1).flatten(-2)
    return torch.cat([rotated, rest], dim=-1).flatten(-2)


def distance_buckets(frames: int, device: torch.device | None = None) -> Tensor:
    """The row of the bias table for each query i and key j, `t t`. These are T5's bidirectional buckets.

    Each distance below 8 has its own row. Distances from 8 to REACH share rows of equal logarithmic width. All larger
    distances use the last row. Rows 0 to 15 are for the past, rows 16 to 31 for the future.
    """
    index = torch.arange(frames, device=device)
    ahead = index[None] - index[:, None]
    half, exact = BUCKETS // 2, BUCKETS // 4
    distance = ahead.abs()
    wide = exact + (torch.log(distance.clamp(min=1).float() / exact) / math.log(REACH / exact) * (half - exact)).long()
    return torch.where(distance < exact, distance, wide.clamp(max=half - 1)) + half * (ahead > 0)
