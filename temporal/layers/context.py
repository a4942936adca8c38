"""What prediction and interpolation layers are told beside the noisy frames: known frames, and the frame rate."""

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from .factory import Factory
from .position import timestep_sinusoid


class ContextDownsampler(nn.Module):
    """The learned downsampling of c_S = (m * z, m) (Video LDM, section 3.2), one set of channels per resolution.

    The paper gives the input (5 channels) and the output (128 channels), and neither depth nor kernels: here a 3x3
    convolution lifts c_S, and each further resolution is one SiLU and one 3x3 convolution of stride 2 away, whose
    rounding is that of the UNet's own downsampling.
    """

    def __init__(self, in_channels: int, channels: int, levels: int, make: Factory = Factory()):
        super().__init__()
        steps = [make.conv2d(in_channels, channels, 3, padding=1)]
        steps += [make.conv2d(channels, channels, 3, stride=2, padding=1) for _ in range(levels - 1)]
        self.steps = nn.ModuleList(steps)

    def forward(self, known: Tensor) -> list[Tensor]:
        """known `(b t) c+1 h w` -> for each resolution `(b t) channels h w`, the latents' own first."""
        maps = [self.steps[0](known)]
        for step in self.steps[1:]:
            maps.append(step(silu(maps[-1])))
        return maps


class FpsToken(nn.Module):
    """The frame rate to make, as one more token of the temporal layers' text (docs/papers.md#interpolation).

    Embedded as a timestep is, on 100 log2(fps): rates are told apart by their ratio. That form is ours; the paper says
    "cross attention to a corresponding embedding".
    """

    def __init__(self, width: int, make: Factory = Factory()):
        super().__init__()
        self.width = width
        self.embed = nn.Sequential(make.linear(width, width), nn.SiLU(), make.linear(width, width))

    def forward(self, fps: Tensor, like: Tensor) -> Tensor:
        """fps `b`, frames per second -> `b 1 width` in the dtype and on the device of `like`."""
        scaled = 100.0 * torch.log2(fps.to(like.device, torch.float32))
        return self.embed(timestep_sinusoid(scaled, self.width).to(like.dtype))[:, None]
