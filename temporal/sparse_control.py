"""SparseCtrl: known frames through a second network (docs/papers.md#sparsectrl).

It is the encoder of Stable Diffusion's UNet with motion modules, as a ControlNet is one. It sees the known frames,
which of them are given, the diffusion step and the text. It never sees the noisy latents. What it returns is added to
the skips of the UNet, and to the features after the middle.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from .layers import TORCH, Factory, GivenCall, MotionParams
from .layers.position import timestep_sinusoid

LATENTS, PICTURES = "latents", "pictures"       # what a SparseCtrl network sees
LATENT_PIXELS = 8       # pixels along each side of a latent


@dataclass(frozen=True)
class SparseControlParams:
    """Everything that rebuilds a network except the weights. The encoder is built from its own weights' shapes."""

    sees: str                                       # LATENTS or PICTURES
    latent_channels: int                            # of the noisy latents that its first convolution would take
    frame_channels: int                             # of a known frame: latents', or 3 colours
    channels: tuple[int, ...]                       # of each input block's features; there is a residual for each
    middle_channels: int                            # of the middle block's features
    motion: tuple[tuple[int, MotionParams], ...]    # (number of an input block, the motion module after it)
    widths: tuple[int, ...] = ()                    # channels inside the embedding of pictures. Empty: none
    frames: int = 16                                # length of the clips that it was trained on

    @property
    def per_latent(self) -> int:
        """Places of a known frame along each side of a latent."""
        return LATENT_PIXELS if self.sees == PICTURES else 1


class PictureEmbedding(nn.Module):
    """Pictures `n 4 8h 8w` (colours, then the mask) to features `n c h w`."""

    def __init__(self, params: SparseControlParams, make: Factory) -> None:
        super().__init__()
        widths = params.widths
        self.conv_in = make.conv2d(params.frame_channels + 1, widths[0], 3, padding=1)
        self.blocks = nn.ModuleList()
        for inputs, outputs in zip(widths, widths[1:]):
            self.blocks.append(make.conv2d(inputs, inputs, 3, padding=1))
            self.blocks.append(make.conv2d(inputs, outputs, 3, padding=1, stride=2))
        self.conv_out = make.conv2d(widths[-1], params.channels[0], 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = silu(self.conv_in(x))
        for block in self.blocks:
            x = silu(block(x))
        return self.conv_out(x)


class SparseControlParts(nn.Module):
    """The layers that a network has beside the encoder."""

    def __init__(self, params: SparseControlParams, make: Factory = TORCH) -> None:
        super().__init__()
        if params.sees == PICTURES:
            self.embedding: nn.Module = PictureEmbedding(params, make)
        else:
            self.embedding = make.conv2d(params.frame_channels + 1, params.channels[0], 3, padding=1)
        self.motion = nn.ModuleDict({str(block): module.build(make) for block, module in params.motion})
        self.zero_convs = nn.ModuleList(make.conv2d(channels, channels, 1) for channels in params.channels)
        self.middle_zero_conv = make.conv2d(params.middle_channels, params.middle_channels, 1)


class SparseControl(nn.Module):
    """The whole network."""

    def __init__(self, params: SparseControlParams, encoder: nn.Module, parts: SparseControlParts) -> None:
        """encoder: has `time_embed`, `input_blocks` and `middle_block` of an LDM UNet."""
        super().__init__()
        self.params, self.encoder, self.parts = params, encoder, parts

    def forward(self, known: Tensor, timesteps: Tensor, text: Tensor, frames: int,
                max_distance: int | None = None) -> tuple[list[Tensor], Tensor]:
        """The residuals `(b t) c h w` for the skips of the UNet, in the order of its input blocks, and for its middle.

        Args:
            known: the known frames with their mask as the last channel, `(b t) c+1 h w`. The mask is 1 in frames that
                are given. Other frames are zeros.
            timesteps: the diffusion step of each image, `(b t)`.
            text: of each image, `(b t) l d`.
            frames: t, of a clip.
            max_distance: attention over time reaches this many frames. None: all frames.
        """
        parts, call = self.parts, GivenCall(frames, max_distance=max_distance)
        h = parts.embedding(known)
        emb = self.encoder.time_embed(timestep_sinusoid(timesteps, h.shape[1]).to(h.dtype))
        # Where a ControlNet sees the noisy latents, this network sees zeros. The convolution's bias is left of them.
        zeros = h.new_zeros(1, self.params.latent_channels, 1, 1)       # the bias is the same at every place
        h = h + self.encoder.input_blocks[0](zeros, emb, text)
        residuals = [parts.zero_convs[0](h)]
        for number, block in enumerate(self.encoder.input_blocks[1:], 1):
            h = block(h, emb, text)
            if str(number) in parts.motion:
                h = parts.motion[str(number)](h, call)
            residuals.append(parts.zero_convs[number](h))
        return residuals, parts.middle_zero_conv(self.encoder.middle_block(h, emb, text))


def scaled(residual: Tensor, strengths: Tensor) -> Tensor:
    """A residual `n c h w` times the strength of each image, `n`. It is linear, and exactly zero where that is 0."""
    strengths = strengths.to(residual)[:, None, None, None]
    return torch.where(strengths == 0, torch.zeros_like(residual), residual * strengths)


def added(before: Sequence[Tensor | None], residuals: Sequence[Tensor]) -> list[Tensor | None]:
    """A new list with the sum of two lists of residuals. Both end at the same place of the network, as core has it."""
    longest = max(len(before), len(residuals))
    pairs = zip(*([None] * (longest - len(part)) + list(part) for part in (before, residuals)))
    return [second if first is None else first if second is None else first + second for first, second in pairs]
