"""The temporal decoder: an image decoder with temporal residual blocks (Video LDM, section 3.1.1; SVD).

Only the decoder gets temporal layers. The encoder still encodes frame by frame. So the decoder works on the latents of
the image model.

Names and mixing follow the public SVD decoder:
    after every ResBlock            x + sigmoid(mix_factor) * (time_stack(x) - x)
    after the last convolution      a convolution over time, without mixing
Here sigmoid(mix_factor) weights the TEMPORAL branch.

The image decoder is an instance of LDM's class, which the host provides. Its modules become modules of this one.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from .errors import VideoLDMError

SVD_KERNEL, PAPER_KERNEL = (3, 1, 1), (3, 3, 3)     # over time (public SVD); over time and space (Video LDM, Table 8)
KERNELS = (SVD_KERNEL, PAPER_KERNEL)
GROUPS = 32             # of the GroupNorms
PARTS = ("conv_in", "mid", "up", "norm_out", "conv_out")        # the modules of LDM's decoder


@dataclass(frozen=True)
class DecoderParams:
    """The params of an LDM decoder with temporal layers."""

    latent_channels: int
    channels: int                       # base number of channels
    channel_mult: tuple[int, ...]       # each level has `channels` times this many channels. Finest level first
    num_res_blocks: int                 # a level has one more ResBlock than this
    kernel: tuple[int, int, int]        # of the convolutions over time: t, h, w

    @property
    def factor(self) -> int:
        """Pixels per latent, along each side."""
        return 2 ** (len(self.channel_mult) - 1)

    def config(self) -> dict[str, Any]:
        """The arguments of LDM's decoder."""
        return {"double_z": True, "z_channels": self.latent_channels, "resolution": 256, "in_channels": 3, "out_ch": 3,
                "ch": self.channels, "ch_mult": list(self.channel_mult), "num_res_blocks": self.num_res_blocks,
                "attn_resolutions": [], "dropout": 0.0}


class DecoderTimeStack(nn.Module):
    """`x + conv2(SiLU(GN(conv1(SiLU(GN(x))))))` on `b c t h w`, without timestep. The norms pool over t, h and w."""

    def __init__(self, channels: int, kernel: tuple[int, int, int], operations: Any = nn,
                 dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> None:
        super().__init__()
        weights, padding = {"dtype": dtype, "device": device}, tuple(size // 2 for size in kernel)
        self.in_layers = nn.Sequential(
            operations.GroupNorm(GROUPS, channels, **weights),
            nn.SiLU(),
            operations.Conv3d(channels, channels, kernel, padding=padding, **weights),
        )
        self.out_layers = nn.Sequential(
            operations.GroupNorm(GROUPS, channels, **weights),
            nn.SiLU(),
            nn.Dropout(0.0),
            operations.Conv3d(channels, channels, kernel, padding=padding, **weights),
        )
        # torch's own methods, because a host's layers leave their weights uninitialised. A fresh block is the identity.
        nn.GroupNorm.reset_parameters(self.in_layers[0])
        nn.Conv3d.reset_parameters(self.in_layers[2])
        nn.GroupNorm.reset_parameters(self.out_layers[0])
        nn.init.zeros_(self.out_layers[3].weight)
        nn.init.zeros_(self.out_layers[3].bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.out_layers(self.in_layers(x))


class TemporalDecoder(nn.Module):
    """An image decoder with temporal layers. Fresh temporal layers do not change its pictures.

    It takes over the modules of LDM's image decoder. So its state-dict keys are those of SVD's files, such as
    `mid.block_1.conv1.weight` and `mid.block_1.time_stack.in_layers.2.weight`.
    """

    def __init__(self, decoder: nn.Module, kernel: tuple[int, int, int] = SVD_KERNEL, operations: Any = nn,
                 dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> None:
        """Add fresh temporal layers.

        Args:
            decoder: LDM's image decoder.
            kernel: of the convolutions over time, one of KERNELS.
            operations: the module with the layer classes: torch.nn, or the host's.
            dtype, device: of the temporal layers.

        Raises VideoLDMError for a decoder of another kind.
        """
        super().__init__()
        check_image_decoder(decoder)
        if tuple(kernel) not in KERNELS:
            raise ValueError(f"the temporal kernel is one of {KERNELS}, not {tuple(kernel)}")
        for part in PARTS:
            setattr(self, part, getattr(decoder, part))
        weights = {"dtype": dtype, "device": device}
        for block in self.blocks():
            block.time_stack = DecoderTimeStack(block.out_channels, kernel, operations, **weights)
            block.mix_factor = nn.Parameter(torch.zeros(1, **weights))
        colours = self.conv_out.out_channels
        self.conv_out.time_mix_conv = operations.Conv3d(colours, colours, kernel,
                                                        padding=tuple(size // 2 for size in kernel), **weights)
        nn.init.dirac_(self.conv_out.time_mix_conv.weight)
        nn.init.zeros_(self.conv_out.time_mix_conv.bias)

    def blocks(self) -> Iterator[nn.Module]:
        """The ResBlocks, in the order they run."""
        yield from (self.mid.block_1, self.mid.block_2)
        for level in reversed(self.up):
            yield from level.block

    @property
    def last_weight(self) -> nn.Parameter:
        """The weight of the last layer. Adversarial training balances its losses by their gradients there."""
        return self.conv_out.time_mix_conv.weight

    def temporal_names(self) -> list[str]:
        """The names of the temporal parameters, which the image decoder does not have."""
        marks = ".time_stack.", ".mix_factor", ".time_mix_conv."
        return [name for name, _ in self.named_parameters() if any(mark in name for mark in marks)]

    def forward(self, z: Tensor, frames: int | None = None, skip_video: bool = False) -> Tensor:
        """Decode latents z `(b t) c h w` to pictures `(b t) 3 H W`.

        frames: t. By default the batch is one clip. skip_video: leave the temporal layers out.
        Raises VideoLDMError where the batch does not divide into clips.
        """
        frames = 0 if skip_video else frames or len(z)
        if frames and len(z) % frames:
            raise VideoLDMError(f"A batch of {len(z)} latents does not divide into clips of {frames} frames.")
        h = self.conv_in(z)
        h = over_time(self.mid.block_1, h, frames)
        h = self.mid.attn_1(h)
        h = over_time(self.mid.block_2, h, frames)
        for number in reversed(range(len(self.up))):
            level = self.up[number]
            for index, block in enumerate(level.block):
                h = over_time(block, h, frames)
                if len(level.attn) > 0:
                    h = level.attn[index](h)
            if number:
                h = level.upsample(h)
        h = F.silu(self.norm_out(h))
        return self.colours(h, frames)

    def colours(self, h: Tensor, frames: int) -> Tensor:
        """The last convolution, then the convolution over time. frames 0: without the latter."""
        conv = self.conv_out
        # With low VRAM, the host does not move the weights of a module that has children. So they are moved here.
        x = F.conv2d(h, like_input(conv.weight, h), like_input(conv.bias, h), conv.stride, conv.padding)
        if not frames:
            return x
        x = conv.time_mix_conv(rearrange(x, "(b t) c h w -> b c t h w", t=frames))
        return rearrange(x, "b c t h w -> (b t) c h w")


def over_time(block: nn.Module, h: Tensor, frames: int) -> Tensor:
    """A ResBlock, then its temporal block on clips of `frames`. frames 0: the ResBlock alone.

    The two are mixed with a = sigmoid(mix_factor) as a * temporal + (1 - a) * spatial. In the U-Net the roles of the
    branches are swapped (docs/formats.md#mix).
    """
    x = block(h, None)
    if not frames:
        return x
    clip = rearrange(x, "(b t) c h w -> b c t h w", t=frames)
    temporal = rearrange(block.time_stack(clip), "b c t h w -> (b t) c h w")
    share = torch.sigmoid(block.mix_factor.to(x.device, torch.float32)).to(x.dtype)
    return torch.lerp(x, temporal, share)


def like_input(weight: Tensor, x: Tensor) -> Tensor:
    """The weight on the device and in the dtype of x."""
    return weight.to(x.device, x.dtype)


def check_image_decoder(decoder: nn.Module) -> None:
    """Raise VideoLDMError for anything but LDM's image decoder without temporal layers."""
    missing = [part for part in PARTS if not hasattr(decoder, part)]
    if missing or not isinstance(decoder.conv_out, nn.Conv2d) or hasattr(decoder.conv_out, "time_mix_conv"):
        raise VideoLDMError(f"This decoder ({type(decoder).__name__}) is not the image decoder of a Stable Diffusion "
                            "VAE, and temporal layers attach to nothing else.")
