"""The memory of a GPU, counted without one: networks at their real size run on torch's "meta" device.

Tensors on that device have shapes and no contents. A piece of work runs as it does for an artist. In place of its
network, one of Stable Diffusion's size in 16 bits runs on shapes, and what comes back is empty. Every tensor is
counted (memory.py). Attention is one operation that keeps no matrix of scores, as on a GPU.
"""

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from ..nodes.host import for_benchmarks
from ..nodes.host.decoding import Decoding
from ..nodes.host.temporal_vae import build_decoder
from ..temporal.decoder import SVD_KERNEL, DecoderParams
from ..temporal.layers import Factory
from ..temporal.new_layers import video_ldm_params
from ..temporal.stack import TemporalStack
from .memory import Tally

CARD, MAIN = "meta", "cpu"          # the devices of a Tally
DTYPE = torch.float16
X4_TEXT, X4_CHANNELS, X4_HEADS, FRAMES = 1024, 256, 8, 8
# x4-upscaler-ema.safetensors: 473 million parameters.
X4 = dict(image_size=128, in_channels=7, out_channels=4, model_channels=X4_CHANNELS, num_res_blocks=[2] * 4,
          channel_mult=(1, 2, 2, 4), transformer_depth=[0, 0, 1, 1, 1, 1, 1, 1], num_heads=X4_HEADS,
          transformer_depth_output=[0, 0, 0] + [1] * 9, transformer_depth_middle=1, context_dim=X4_TEXT,
          use_spatial_transformer=True, use_linear_in_transformer=True, legacy=False, num_classes=1000,
          disable_self_attentions=[True, True, True, False])
SVD_DECODER = DecoderParams(4, 128, (1, 2, 4, 4), 2, SVD_KERNEL)
X4_DECODER = DecoderParams(4, 128, (1, 2, 4), 2, SVD_KERNEL)


class FusedAttention(TorchFunctionMode):
    """While it is open, attention on shapes is one operation."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.scaled_dot_product_attention and args[0].device.type == CARD:
            return torch.empty_like(args[0])
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def count_bytes(work) -> dict:
    """The most bytes of tensors that `work()` holds at one moment, by device."""
    # Not inference mode: there an operation hides those that it is made of.
    with FusedAttention(), for_benchmarks.ample_memory_and_plain_attention(), Tally() as tally:
        work()
    return {device: tally.most.get(device, 0) for device in (CARD, MAIN)}


def svd_decoder():
    """Stable Video Diffusion's temporal decoder."""
    return for_benchmarks.with_fused_attention(build_decoder(SVD_DECODER, DTYPE, CARD))


def x4_decoder():
    """The image decoder of the x4 upscaler's VAE."""
    return for_benchmarks.with_fused_attention(for_benchmarks.decoder_of(X4_DECODER.config(), DTYPE, CARD))


def x4_unet():
    return for_benchmarks.unet_of(X4, DTYPE, CARD)


def x4_layers(unet) -> TemporalStack:
    """Video LDM layers for the x4 upscaler."""
    params = video_ldm_params(unet, 4 * X4_CHANNELS, X4_TEXT, lambda channels: X4_HEADS, FRAMES)
    return TemporalStack(params, Factory(dtype=DTYPE, device=CARD))


class DecodingOnShapes(Decoding):
    """A decoding by `network` on shapes. Its pictures are black.

    A shape runs only once, because a piece leaves nothing behind.
    """

    def __init__(self, network, *arguments):
        super().__init__(*arguments)
        self.network, self.shapes = network, {}

    def decode_piece(self, z):
        if z.shape not in self.shapes:
            self.shapes[z.shape] = self.network(z.to(CARD, DTYPE)).shape
        return torch.zeros(self.shapes[z.shape])
