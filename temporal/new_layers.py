"""Untrained temporal layers for a network."""

from collections.abc import Callable

from torch import nn

from .layers import BrickParams, ResBlockParams, TransformerParams
from .params import StackParams
from .slots import Site, unet_sites


def video_ldm_params(unet: nn.Module, emb_dim: int, context_dim: int, heads_of: Callable[[int], int], frames: int,
                     mix_length: int = 1, convolution: bool = True, attention: bool = True) -> StackParams:
    """Params of untrained Video LDM layers for an LDM UNet: a temporal ResBlock after every ResBlock and a temporal
    transformer in every spatial transformer (docs/papers.md#layers).

    heads_of: channels -> number of heads, as the spatial transformers have it. `convolution` and `attention` leave
    one kind out, for ablations.
    """
    bricks: list[tuple[Site, BrickParams]] = []
    for site, (_, channels) in unet_sites(unet).items():
        if site.slot == "post_res" and convolution:
            bricks.append((site, ResBlockParams(channels, emb_dim, mix_length)))
        elif site.slot == "in_attn_post_ff" and attention:
            bricks.append((site, TransformerParams(channels, heads_of(channels), context_dim, mix_length)))
    return StackParams("Video LDM", tuple(bricks), frames, None)
