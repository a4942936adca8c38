"""The temporal decoder (Video LDM, section 3.1.1; SVD's `VideoDecoder`): temporal residual blocks in an image decoder.

Only the decoder learns time; the encoder stays as it is, frame by frame, so that temporal decoding works on the latents
of the image model. Names and the sign of the mix are those of the public SVD decoder: behind every ResBlock
`x + sigmoid(mix_factor) * (time_stack(x) - x)`, here the TEMPORAL branch, and behind the last convolution one over time
that is mixed with nothing. The image decoder is LDM's, the host's own class; its modules become this one's.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from .errors import VideoLDMError

SVD_KERNEL, PAPER_KERNEL = (3, 1, 1), (3, 3, 3)     # time alone (public SVD); time and space (Video LDM, Table 8)
KERNELS = (SVD_KERNEL, PAPER_KERNEL)
GROUPS = 32
PARTS = ("conv_in", "mid", "up", "norm_out", "conv_out")


@dataclass(frozen=True)
class DecoderParams:
    """An LDM decoder with temporal layers. Channels per level, finest first, are `channels * channel_mult`."""

    latent_channels: int
    channels: int
    channel_mult: tuple[int, ...]
    num_res_blocks: int
    kernel: tuple[int, int, int]

    @property
    def factor(self) -> int:
        """Pixels per latent, along each side."""
        return 2 ** (len(self.channel_mult) - 1)

    def config(self) -> dict:
        """What LDM's decoder is called with."""
        return {"double_z": True, "z_channels": self.latent_channels, "resolution": 256, "in_channels": 3, "out_ch": 3,
                "ch": self.channels, "ch_mult": list(self.channel_mult), "num_res_blocks": self.num_res_blocks,
                "attn_resolutions": [], "dropout": 0.0}


class DecoderTimeStack(nn.Module):
    """`x + conv2(SiLU(GN(conv1(SiLU(GN(x))))))` on `b c t h w`, without timestep; its norms pool over t, h and w."""

    def __init__(self, channels: int, kernel: tuple, operations=nn, dtype=None, device=None):
        super().__init__()
        place, padding = {"dtype": dtype, "device": device}, tuple(size // 2 for size in kernel)
        self.in_layers = nn.Sequential(
            operations.GroupNorm(GROUPS, channels, **place),
            nn.SiLU(),
            operations.Conv3d(channels, channels, kernel, padding=padding, **place),
        )
        self.out_layers = nn.Sequential(
            operations.GroupNorm(GROUPS, channels, **place),
            nn.SiLU(),
            nn.Dropout(0.0),
            operations.Conv3d(channels, channels, kernel, padding=padding, **place),
        )
        # By torch's own methods: a host's layers leave weights as memory happens to be. The block is the identity.
        nn.GroupNorm.reset_parameters(self.in_layers[0])
        nn.Conv3d.reset_parameters(self.in_layers[2])
        nn.GroupNorm.reset_parameters(self.out_layers[0])
        nn.init.zeros_(self.out_layers[3].weight)
        nn.init.zeros_(self.out_layers[3].bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.out_layers(self.in_layers(x))


class TemporalDecoder(nn.Module):
    """An image decoder made temporal. Fresh layers change nothing: their blocks are identities, and so is the last
    convolution over time.

    decoder: LDM's image decoder; it is taken over, module by module, so that keys are `mid.block_1.conv1.weight` and
    `mid.block_1.time_stack.in_layers.2.weight` as in SVD's files. Raises VideoLDMError for a decoder of another kind.
    """

    def __init__(self, decoder: nn.Module, kernel: tuple = SVD_KERNEL, operations=nn, dtype=None, device=None):
        super().__init__()
        check_image_decoder(decoder)
        if tuple(kernel) not in KERNELS:
            raise ValueError(f"the temporal kernel is one of {KERNELS}, not {tuple(kernel)}")
        for part in PARTS:
            setattr(self, part, getattr(decoder, part))
        place = {"dtype": dtype, "device": device}
        for block in self.blocks():
            block.time_stack = DecoderTimeStack(block.out_channels, kernel, operations, **place)
            block.mix_factor = nn.Parameter(torch.zeros(1, **place))
        colours = self.conv_out.out_channels
        self.conv_out.time_mix_conv = operations.Conv3d(colours, colours, kernel,
                                                        padding=tuple(size // 2 for size in kernel), **place)
        nn.init.dirac_(self.conv_out.time_mix_conv.weight)
        nn.init.zeros_(self.conv_out.time_mix_conv.bias)

    def blocks(self):
        """The ResBlocks, in the order they run."""
        yield from (self.mid.block_1, self.mid.block_2)
        for level in reversed(self.up):
            yield from level.block

    @property
    def last_weight(self) -> nn.Parameter:
        """Weight of the last layer, at which adversarial training balances its losses."""
        return self.conv_out.time_mix_conv.weight

    def temporal_names(self) -> list[str]:
        """Names of the parameters that the image decoder does not have."""
        marks = ".time_stack.", ".mix_factor", ".time_mix_conv."
        return [name for name, _ in self.named_parameters() if any(mark in name for mark in marks)]

    def forward(self, z: Tensor, frames: int | None = None, skip_video: bool = False) -> Tensor:
        """z `(b t) c h w` -> pictures `(b t) 3 H W`. frames: t; by default the whole batch is one clip. skip_video:
        the image decoder alone, every frame for itself."""
        frames = 0 if skip_video else frames or len(z)
        if frames and len(z) % frames:
            raise VideoLDMError(f"A batch of {len(z)} latents does not divide into clips of {frames} frames.")
        h = self.conv_in(z)
        h = over_time(self.mid.block_1, h, frames)
        h = self.mid.attn_1(h)
        h = over_time(self.mid.block_2, h, frames)
        for number in reversed(range(len(self.up))):
            level = self.up[number]
            for place, block in enumerate(level.block):
                h = over_time(block, h, frames)
                if len(level.attn) > 0:
                    h = level.attn[place](h)
            if number:
                h = level.upsample(h)
        h = F.silu(self.norm_out(h))
        return self.colours(h, frames)

    def colours(self, h: Tensor, frames: int) -> Tensor:
        """The last convolution, then, un-blended, the one over time."""
        conv = self.conv_out
        # Under low VRAM the host leaves weights of modules that have children where they are.
        x = F.conv2d(h, beside(conv.weight, h), beside(conv.bias, h), conv.stride, conv.padding)
        if not frames:
            return x
        x = conv.time_mix_conv(rearrange(x, "(b t) c h w -> b c t h w", t=frames))
        return rearrange(x, "b c t h w -> (b t) c h w")


def over_time(block: nn.Module, h: Tensor, frames: int) -> Tensor:
    """A ResBlock and, on clips of `frames`, its temporal one, mixed with a = sigmoid(mix_factor) as
    a * temporal + (1 - a) * spatial: the other way round than in the U-Net (docs/formats.md#mix). frames 0: the image
    model."""
    x = block(h, None)
    if not frames:
        return x
    clip = rearrange(x, "(b t) c h w -> b c t h w", t=frames)
    temporal = rearrange(block.time_stack(clip), "b c t h w -> (b t) c h w")
    share = torch.sigmoid(block.mix_factor.to(x.device, torch.float32)).to(x.dtype)
    return torch.lerp(x, temporal, share)


def beside(weight: Tensor, x: Tensor) -> Tensor:
    return weight.to(x.device, x.dtype)


def check_image_decoder(decoder: nn.Module):
    """Refuse what is not LDM's decoder of 2-D convolutions."""
    missing = [part for part in PARTS if not hasattr(decoder, part)]
    if missing or not isinstance(decoder.conv_out, nn.Conv2d) or hasattr(decoder.conv_out, "time_mix_conv"):
        raise VideoLDMError(f"This decoder ({type(decoder).__name__}) is not the image decoder of a Stable Diffusion "
                            "VAE, and temporal layers attach to nothing else.")
