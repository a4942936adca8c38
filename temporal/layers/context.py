"""Further inputs of prediction and interpolation layers: context frames and the frame rate."""

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from .factory import TORCH, Factory
from .position import timestep_sinusoid


class ContextDownsampler(nn.Module):
    """The learned downsampling of c_S = (m * z, m) to every resolution of the network (Video LDM, section 3.2).

    The paper states 5 input and 128 output channels. Depth and kernels are our choice. A 3x3 convolution makes the maps
    of the first resolution. A SiLU and a 3x3 convolution of stride 2 make each further one. Odd sizes round as in the
    UNet's own Downsample.
    """

    def __init__(self, in_channels: int, channels: int, levels: int, make: Factory = TORCH) -> None:
        super().__init__()
        steps = [make.conv2d(in_channels, channels, 3, padding=1)]
        steps += [make.conv2d(channels, channels, 3, stride=2, padding=1) for _ in range(levels - 1)]
        self.steps = nn.ModuleList(steps)

    def forward(self, context_input: Tensor) -> list[Tensor]:
        """c_S `(b t) c+1 h w` -> maps `(b t) channels h w` for each resolution, the latents' own first."""
        maps = [self.steps[0](context_input)]
        for step in self.steps[1:]:
            maps.append(step(silu(maps[-1])))
        return maps


class FpsToken(nn.Module):
    """The frame rate as one more token of the temporal layers' text (docs/papers.md#interpolation).

    100 log2(fps) is embedded like a diffusion timestep, so equal ratios of rates are equal distances. The paper only
    says "cross attention to a corresponding embedding"; this form is ours.
    """

    def __init__(self, width: int, make: Factory = TORCH) -> None:
        super().__init__()
        self.width = width
        self.embed = nn.Sequential(make.linear(width, width), nn.SiLU(), make.linear(width, width))

    def forward(self, fps: Tensor, like: Tensor) -> Tensor:
        """fps `b`, frames per second -> `b 1 width` in the dtype and on the device of `like`."""
        scaled = 100.0 * torch.log2(fps.to(like.device, torch.float32))
        return self.embed(timestep_sinusoid(scaled, self.width).to(like.dtype))[:, None]
