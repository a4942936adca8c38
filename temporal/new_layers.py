"""Untrained temporal layers for a network."""

from collections.abc import Callable

from torch import nn

from .layers import BrickParams, ResBlockParams, TransformerParams
from .params import StackParams
from .slots import Site, unet_sites


def video_ldm_params(unet: nn.Module, emb_dim: int, context_dim: int, heads_of: Callable[[int], int], frames: int,
                     mix_length: int = 1, convolution: bool = True, attention: bool = True) -> StackParams:
    """Params of untrained Video LDM layers for an LDM UNet (docs/papers.md#layers).

    There is a temporal ResBlock after every ResBlock, and a temporal transformer in every spatial transformer.

    Args:
        unet: the network.
        emb_dim: width of its timestep embedding.
        context_dim: width of its text.
        heads_of: the number of attention heads for a number of channels, as in the spatial transformers.
        frames: length of the clips to train on.
        mix_length: length of the mix vector: 1, or `frames`.
        convolution, attention: False leaves out the ResBlocks or the transformers, for ablations.
    """
    bricks: list[tuple[Site, BrickParams]] = []
    for site, (_, channels) in unet_sites(unet).items():
        if site.slot == "post_res" and convolution:
            bricks.append((site, ResBlockParams(channels, emb_dim, mix_length)))
        elif site.slot == "in_attn_post_ff" and attention:
            bricks.append((site, TransformerParams(channels, heads_of(channels), context_dim, mix_length)))
    return StackParams("Video LDM", tuple(bricks), frames, None)
