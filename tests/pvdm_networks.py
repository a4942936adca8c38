"""Small networks of PVDM, random weights, and a network of one formula in place of the U-Net."""

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from video_ldm.temporal.pvdm import PVDM_S, RELEASED, Autoencoder, AutoencoderParams, PlaneShape, PlaneUNet, UNetParams

# The sizes at which the published code was recorded. It can do no other grids than these two.
RECORDED_AUTOENCODER = replace(RELEASED, height=32, width=32, channels=32, plane_head_width=4)
RECORDED_UNET = replace(PVDM_S, model_channels=32, channel_mult=(1, 2), num_res_blocks=1, attention_levels=(0,),
                        heads=2)
RECORDED_GRID = PlaneShape(16, 32, 32)
# Sizes at which no two sides are alike.
AUTOENCODER = AutoencoderParams(frames=4, height=6, width=10, patch=2, channels=16, plane_channels=3, depth=2, heads=2,
                                head_width=8, plane_depth=2, plane_heads=2, plane_head_width=4, plane_hidden=24)
UNET = UNetParams(channels=3, model_channels=32, channel_mult=(1, 2), num_res_blocks=2, attention_levels=(0,), heads=4,
                  row=104)
GRID = PlaneShape(4, 8, 6)


def randomised(network: nn.Module, seed: int) -> nn.Module:
    """Random weights that keep activations near 1: matrices by their fan-in, norms near 1. Buffers stay.

    NumPy's old generator draws the same numbers on every machine and in every version.
    """
    source = np.random.RandomState(seed)
    norms = {f"{name}.weight" for name, part in network.named_modules()
             if isinstance(part, nn.GroupNorm | nn.LayerNorm)}
    with torch.no_grad():
        for key, weight in sorted(network.named_parameters()):
            spread = weight[0].numel() ** -0.5 if weight.ndim > 1 else 0.1
            if key.endswith(("token", "pos_embedding")):
                spread = 0.5
            if key.startswith("pre_"):
                spread *= 0.3       # planes stay where tanh is not flat
            weight.copy_(uniform(weight.shape, source) * spread + (key in norms))
    return network.eval().requires_grad_(False)


def uniform(shape: tuple, source: np.random.RandomState) -> Tensor:
    """Numbers of variance 1."""
    return torch.from_numpy((source.random_sample(tuple(shape)) * 2 - 1) * 3 ** 0.5).float()


def autoencoder(params: AutoencoderParams = AUTOENCODER, seed: int = 1) -> Autoencoder:
    return randomised(Autoencoder(params), seed)


def unet(params: UNetParams = UNET, seed: int = 2) -> PlaneUNet:
    return randomised(PlaneUNet(params), seed)


def clips(params: AutoencoderParams = AUTOENCODER, count: int = 1, seed: int = 3) -> Tensor:
    """Random clips `b 3 t H W` in -1..1."""
    return uniform((count, 3, params.frames, params.height, params.width), np.random.RandomState(seed)) / 3 ** 0.5


def rows(params: UNetParams = UNET, grid: PlaneShape = GRID, count: int = 1, seed: int = 4) -> Tensor:
    """Random planes `b c l` of variance 1."""
    return uniform((count, params.channels, grid.length), np.random.RandomState(seed))


def formula(x: Tensor, tau: Tensor, cond: Tensor | None) -> Tensor:
    """In place of the U-Net: eps of planes. The clean planes that follow from it leave -1..1 at times."""
    eps = 0.7 * x + 0.4 * torch.sin(4 * x + tau[:, None, None] / 150)
    return eps if cond is None else eps + 0.3 * cond
