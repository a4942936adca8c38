"""The diffusion network of PVDM: one 2-D U-Net for three planes (docs/papers.md#pvdm-diffusion).

Each plane goes through the same blocks by itself. After every block the planes are one row, over which an attention
looks. It is the only place where they meet. The names of the weights are those of the published files.
"""

import math
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, interpolate

from ..layers.factory import TORCH, Factory
from .planes import PlaneShape, join

HEADS = 8           # of every attention


@dataclass(frozen=True)
class UNetParams:
    """The sizes of a U-Net."""

    channels: int                       # of the planes
    model_channels: int
    channel_mult: tuple[int, ...]       # width of each level, in model_channels
    num_res_blocks: int                 # ResBlocks of a level
    attention_levels: tuple[int, ...]   # levels with attention within each plane
    heads: int = HEADS
    conditional: bool = True            # whether it has an input for the planes of the clip before
    row: int = 2048                     # positions of a row it was trained on
    prediction: str = "eps"             # what it predicts: eps, as published, or v


PVDM_L = UNetParams(channels=4, model_channels=256, channel_mult=(1, 2, 4, 4), num_res_blocks=2,
                    attention_levels=(0, 1, 2))
PVDM_S = UNetParams(channels=4, model_channels=128, channel_mult=(1, 2, 4, 4), num_res_blocks=2,
                    attention_levels=(0, 1, 2))


def time_embedding(tau: Tensor, width: int) -> Tensor:
    """Sinusoids of the diffusion steps, `b width`: cosines, then sines."""
    half = width // 2
    frequencies = torch.exp(-math.log(10_000) * torch.arange(half, dtype=torch.float32, device=tau.device) / half)
    angles = tau[:, None].float() * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)


class RowAttention(nn.Module):
    """Attention within a row `b c l`, and its residual."""

    def __init__(self, channels: int, heads: int, make: Factory) -> None:
        super().__init__()
        self.heads, self.attention = heads, make.attention
        self.norm = make.group_norm(channels)
        self.qkv = make.conv1d(channels, 3 * channels, 1)
        self.proj_out = zeroed(make.conv1d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = rearrange(self.qkv(self.norm(x)), "b (h three d) l -> three b l (h d)", h=self.heads, three=3)
        return x + self.proj_out(self.attention(q, k, v, self.heads).transpose(1, 2))


class PlaneAttention(RowAttention):
    """The same within a plane `b c i j`."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flatten(2)).unflatten(2, x.shape[2:])


class ResBlock(nn.Module):
    """Two convolutions; the diffusion step scales and shifts between them. It can halve or double a plane first."""

    def __init__(self, before: int, after: int, width: int, make: Factory, resize: str = "") -> None:
        super().__init__()
        self.resize = resize        # "", "down" or "up"
        self.channels = after
        self.in_layers = nn.Sequential(make.group_norm(before), nn.SiLU(), make.conv2d(before, after, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), make.linear(width, 2 * after))
        self.out_layers = nn.Sequential(make.group_norm(after), nn.SiLU(), nn.Identity(),
                                        zeroed(make.conv2d(after, after, 3, padding=1)))
        self.skip_connection = nn.Identity() if before == after else make.conv2d(before, after, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        norm, activation, conv = self.in_layers
        h = conv(self.resized(activation(norm(x))))
        scale, shift = self.emb_layers(emb)[..., None, None].chunk(2, dim=1)
        norm, *rest = self.out_layers
        h = norm(h) * (1 + scale) + shift
        for layer in rest:
            h = layer(h)
        return self.skip_connection(self.resized(x)) + h

    def resized(self, x: Tensor) -> Tensor:
        if self.resize == "down":
            return avg_pool2d(x, 2)
        return interpolate(x, scale_factor=2, mode="nearest") if self.resize else x


class Block(nn.Sequential):
    """A block that all planes share."""

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        for layer in self:
            x = layer(x, emb) if isinstance(layer, ResBlock) else layer(x)
        return x


class PlaneUNet(nn.Module):
    """eps of noisy planes."""

    def __init__(self, params: UNetParams, make: Factory = TORCH) -> None:
        super().__init__()
        self.params, self.make = params, make
        self.emb_width = 4 * params.model_channels
        self.time_embed = nn.Sequential(make.linear(params.model_channels, self.emb_width), nn.SiLU(),
                                        make.linear(self.emb_width, self.emb_width))
        self.input_blocks, self.input_attns = nn.ModuleList(), nn.ModuleList()
        self.output_blocks, self.output_attns = nn.ModuleList(), nn.ModuleList()
        if params.conditional:
            self.register_buffer("zeros", torch.zeros(1, params.channels, params.row))      # unused; files have it
        skips = self.add_input_blocks()
        channels = skips[-1]
        self.middle_block = Block(self.resblock(channels, channels), PlaneAttention(channels, params.heads, make),
                                  self.resblock(channels, channels))
        self.mid_attn = RowAttention(channels, params.heads, make)
        channels = self.add_output_blocks(skips)
        self.out = nn.Sequential(make.group_norm(channels), nn.SiLU(),
                                 zeroed(make.conv2d(channels, params.channels, 3, padding=1)))

    def add_input_blocks(self) -> list[int]:
        """Add the blocks down to the coarsest level. Returns the width that each block gives."""
        params = self.params
        inputs = params.channels * (2 if params.conditional else 1)
        self.input_blocks.append(Block(self.make.conv2d(inputs, params.model_channels, 3, padding=1)))
        self.input_attns.append(nn.Identity())
        skips = [params.model_channels]
        for level, mult in enumerate(params.channel_mult):
            for _ in range(params.num_res_blocks):
                self.add_input(level, self.resblock(skips[-1], mult * params.model_channels), skips)
            if level < len(params.channel_mult) - 1:
                self.add_input(None, self.resblock(skips[-1], skips[-1], "down"), skips)
        return skips

    def add_input(self, level: int | None, block: ResBlock, skips: list[int]) -> None:
        """Add a block, with the attention that its level has. level: None if it lies between two levels."""
        channels = block.channels
        self.input_blocks.append(Block(block, *self.attentions(level, channels)))
        self.input_attns.append(RowAttention(channels, self.params.heads, self.make))
        skips.append(channels)

    def add_output_blocks(self, skips: list[int]) -> int:
        """Add the blocks back to the finest level. Returns the width of the last one."""
        params, channels = self.params, skips[-1]
        for level, mult in reversed(list(enumerate(params.channel_mult))):
            for number in range(params.num_res_blocks + 1):
                block = self.resblock(channels + skips.pop(), mult * params.model_channels)
                channels = block.channels
                parts = [block, *self.attentions(level, channels)]
                if level and number == params.num_res_blocks:
                    parts.append(self.resblock(channels, channels, "up"))
                self.output_blocks.append(Block(*parts))
                self.output_attns.append(RowAttention(channels, params.heads, self.make))
        return channels

    def resblock(self, before: int, after: int, resize: str = "") -> ResBlock:
        return ResBlock(before, after, self.emb_width, self.make, resize)

    def attentions(self, level: int | None, channels: int) -> list[nn.Module]:
        """The attention within a plane, where a level has one."""
        has = level in self.params.attention_levels
        return [PlaneAttention(channels, self.params.heads, self.make)] if has else []

    def forward(self, x: Tensor, tau: Tensor, shape: PlaneShape, cond: Tensor | None = None) -> Tensor:
        """eps `b c l` of noisy planes x `b c l`.

        Args:
            tau: the diffusion step of each row, `b`.
            shape: the grid of the planes.
            cond: the planes of the clip before, like x. None, for a first clip, is the same as zeros.
        """
        if self.params.conditional:
            x = torch.cat([x, torch.zeros_like(x) if cond is None else cond], dim=1)
        emb = self.time_embed(time_embedding(tau, self.params.model_channels).to(x.dtype))
        planes = shape.split(x)
        skips = []
        for block, attention in zip(self.input_blocks, self.input_attns, strict=True):
            planes = step(planes, block, attention, emb)
            skips.append(planes)
        planes = step(planes, self.middle_block, self.mid_attn, emb)
        for block, attention in zip(self.output_blocks, self.output_attns, strict=True):
            planes = [torch.cat(pair, dim=1) for pair in zip(planes, skips.pop(), strict=True)]
            planes = step(planes, block, attention, emb)
        return join([self.out(plane) for plane in planes])


def step(planes: list[Tensor], block: nn.Module, attention: nn.Module, emb: Tensor) -> list[Tensor]:
    """Each plane through the block, then all three through the attention."""
    planes = [block(plane, emb) for plane in planes]
    row = attention(join(planes))
    parts = row.split([plane[0, 0].numel() for plane in planes], dim=2)
    return [part.unflatten(2, plane.shape[2:]) for part, plane in zip(parts, planes, strict=True)]


def zeroed(layer: nn.Module) -> nn.Module:
    """The layer with weights of zero, so that what it ends begins as nothing."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer
