"""Positions of frames in time."""

import math

import torch
from torch import Tensor


def timestep_sinusoid(positions: Tensor, dim: int, max_period: float = 10000.0) -> Tensor:
    """[cos | sin] embedding of frame indices, as for diffusion timesteps (Video LDM, appendix D): `t -> t dim`.

    An odd `dim` is padded with one zero column.
    """
    half = dim // 2
    frequencies = torch.exp(-math.log(max_period) * torch.arange(half, dtype=torch.float32, device=positions.device) / half)
    angles = positions.float()[:, None] * frequencies[None]
    embedding = torch.cat([angles.cos(), angles.sin()], dim=-1)
    return torch.nn.functional.pad(embedding, (0, dim % 2))


def interleaved_sinusoid(length: int, dim: int, device=None) -> Tensor:
    """Interleaved sin, cos table of AnimateDiff, base 10000: `length dim`, float32."""
    positions = torch.arange(length, dtype=torch.float32, device=device)[:, None]
    frequencies = torch.exp(torch.arange(0, dim, 2, dtype=torch.float32, device=device) * (-math.log(10000.0) / dim))
    table = torch.zeros(length, dim, device=device)
    table[:, 0::2] = torch.sin(positions * frequencies)
    table[:, 1::2] = torch.cos(positions * frequencies)
    return table


def distance_band(frames: int, max_distance: int | None, device=None) -> Tensor | None:
    """Attention mask for convolution in time: true where |i - j| <= max_distance (docs/papers.md#convolution-in-time);
    none if all are."""
    if max_distance is None or frames - 1 <= max_distance:
        return None
    index = torch.arange(frames, device=device)
    return (index[:, None] - index[None]).abs() <= max_distance


# Relative positions: LaVie's super-resolution and Upscale-A-Video (docs/papers.md#lavie-attention)

ROTATED = 32            # channels at the front of each head that are turned
BUCKETS, REACH = 32, 32         # of the table of distances: its rows, and the distance from which they are one


def rotation_angles(positions: Tensor) -> Tensor:
    """Angles of RoPE: `t -> t 16`, frequencies 10000^(-2i/32)."""
    frequencies = 10000.0 ** (-torch.arange(0, ROTATED, 2, dtype=torch.float32, device=positions.device) / ROTATED)
    return positions.float()[:, None] * frequencies


def rotate(x: Tensor, heads: int, angles: Tensor) -> Tensor:
    """RoPE on `s t (heads d)`: adjacent pairs of the first 32 channels of each head, the others as they are."""
    front, rest = x.unflatten(-1, (heads, -1)).split([ROTATED, x.shape[-1] // heads - ROTATED], dim=-1)
    cos, sin = (wave[:, None].to(x.dtype) for wave in (angles.cos(), angles.sin()))
    even, odd = front[..., 0::2], front[..., 1::2]
    turned = torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1).flatten(-2)
    return torch.cat([turned, rest], dim=-1).flatten(-2)


def distance_buckets(frames: int, device=None) -> Tensor:
    """Row of the table of distances for query i and key j, `t t`, as T5 counts them in both directions.

    Distances under 8 have a row each, those up to REACH share rows of equal logarithmic width, and all beyond have the
    last. The past takes rows 0 to 15, the future 16 to 31.
    """
    index = torch.arange(frames, device=device)
    ahead = index[None] - index[:, None]
    half, exact = BUCKETS // 2, BUCKETS // 4
    distance = ahead.abs()
    wide = exact + (torch.log(distance.clamp(min=1).float() / exact) / math.log(REACH / exact) * (half - exact)).long()
    return torch.where(distance < exact, distance, wide.clamp(max=half - 1)) + half * (ahead > 0)
