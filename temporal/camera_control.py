"""CameraCtrl: a camera's rays steer AnimateDiff's motion modules (docs/papers.md#cameractrl).

An encoder turns the rays into features for each level of the network. In the first attention of a motion module the
input h of queries, keys and values becomes `h + strength * merge(h + features)`.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn.functional import interpolate, pixel_unshuffle

from .camera import Cameras, rays
from .layers import TORCH, Factory, MotionParams
from .layers.motion import MotionBlock, slice_length
from .picture_changes import EncoderBlock
from .slots import Site

PIXELS = 8              # pixels along each side of a latent
COORDINATES = 6         # of a ray
HEADS = 8
MOST_KEPT = 4           # windows of a sampling whose features are kept; those of others are computed in every step


@dataclass(frozen=True)
class CameraParams:
    """Everything that rebuilds a network except the weights."""

    channels: tuple[int, ...]                   # of the features of each level
    blocks: int                                 # of the encoder in each level
    merges: tuple[tuple[Site, int], ...]        # (motion module, the level whose features it gets)
    frames: int = 16                            # the most frames of a clip: the encoder's frame positions


class CameraControl(nn.Module):
    """The encoder, and the layer that merges its features into each motion module."""

    def __init__(self, params: CameraParams, make: Factory = TORCH) -> None:
        super().__init__()
        self.params = params
        channels = params.channels
        self.conv_in = make.conv2d(COORDINATES * PIXELS ** 2, channels[0], 3, padding=1)
        before = (channels[0], *channels)
        self.blocks = nn.ModuleList(nn.ModuleList(
            EncoderBlock(before[level] if block == 0 else width, width, level > 0 and block == 0, make)
            for block in range(params.blocks)) for level, width in enumerate(channels))
        self.attentions = nn.ModuleList(nn.ModuleList(
            MotionBlock(MotionParams(width, HEADS, attentions=1), make) for _ in range(params.blocks))
            for width in channels)
        self.merges = nn.ModuleDict({site.name: make.linear(channels[level], channels[level])
                                     for site, level in params.merges})

    def forward(self, seen: Tensor) -> list[Tensor]:
        """The features `t c h w` of each level. seen: the rays of one clip, `t 6 8h 8w`."""
        x = self.conv_in(pixel_unshuffle(seen, PIXELS))
        features = []
        for blocks, attentions in zip(self.blocks, self.attentions, strict=True):
            for block, attention in zip(blocks, attentions, strict=True):
                x = over_frames(attention, block(x))
            features.append(x)
        return features


def over_frames(block: nn.Module, x: Tensor) -> Tensor:
    """Run a block for attention over time on one clip `t c h w`."""
    height = x.shape[2]
    pixels = rearrange(x, "t c h w -> (h w) t c").contiguous()
    found = torch.cat([block(part) for part in pixels.split(slice_length(pixels))])
    return rearrange(found, "(h w) t c -> t c h w", h=height)


@dataclass(frozen=True)
class CameraInCall:
    """The camera of one call of the network."""

    control: CameraControl
    strength: float
    # Of each clip in a condition, or of one that all clips share. What names a clip's cameras, and the cameras
    clips: tuple[tuple[Hashable, Callable[[], Cameras]], ...]
    size: tuple[int, ...]               # height and width of the latents
    kept: dict[Hashable, list[Tensor]]  # features of this sampling, by what they belong to

    def at(self, site: Site, x: Tensor, frames: int) -> "PoseMerge | None":
        """How the motion module at a site merges the features into its input. None: it does not.

        Args:
            site: of the motion module.
            x: its features `(b t) c h w`.
            frames: t.
        """
        level = dict(self.control.params.merges).get(site)
        if level is None:
            return None
        found = [resized(self.features(name, cameras, x)[level], x.shape[2:]) for name, cameras in self.clips]
        pixels = torch.cat([rearrange(part, "t c h w -> (h w) t c") for part in found])
        clips = len(x) // frames
        return PoseMerge(self.control.merges[site.name], pixels.repeat(clips // len(found), 1, 1), self.strength)

    def features(self, name: Hashable, cameras: Callable[[], Cameras], like: Tensor) -> list[Tensor]:
        """The features of one clip, computed once for a sampling where few windows take turns."""
        key = (name, self.size, like.dtype, like.device)
        if key not in self.kept:
            height, width = (side * PIXELS for side in self.size)
            made = self.control(rays(cameras(), height, width).to(like))
            while len(self.kept) >= MOST_KEPT:
                self.kept.pop(next(iter(self.kept)))
            self.kept[key] = made
        return self.kept[key]


def resized(features: Tensor, size: Sequence[int]) -> Tensor:
    """Features at another size: nodes such as deep shrink change that of some blocks."""
    if features.shape[2:] == size:
        return features
    return interpolate(features.float(), tuple(size), mode="bilinear", antialias=True).to(features)


@dataclass(frozen=True)
class PoseMerge:
    """The merge of the camera's features into the first attention of one motion module."""

    merge: Any              # the linear layer
    features: Tensor        # `s t c`, for all pixels of all clips
    strength: float

    def part(self, start: int, length: int) -> "PoseMerge":
        """The same for some of the pixels."""
        return PoseMerge(self.merge, self.features[start:start + length], self.strength)

    def __call__(self, h: Tensor) -> Tensor:
        """h `s t c`: the input of queries, keys and values."""
        return torch.add(h, self.merge(h + self.features), alpha=self.strength)
