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
    """Attention mask for convolution in time: true where |i - j| <= max_distance (appendix D); none if all are."""
    if max_distance is None or frames - 1 <= max_distance:
        return None
    index = torch.arange(frames, device=device)
    return (index[:, None] - index[None]).abs() <= max_distance
