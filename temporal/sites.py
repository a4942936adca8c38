"""Sites: the places in an LDM UNet where a temporal layer attaches.

The network is told by shape rather than by class, so that no host is imported here.
"""

from typing import NamedTuple

from torch import nn

PARTS = ("input", "middle", "output")
SLOTS = ("post_res", "in_attn_pre_ff", "in_attn_post_ff", "post_attn", "post_level")      # in the order they run


class Site(NamedTuple):
    """A place in the spatial network: part, LDM block index, slot (what the brick follows) and its ordinal there."""

    part: str
    index: int
    slot: str
    n: int = 0

    @property
    def name(self) -> str:
        return f"{self.part}_{self.index}_{self.slot}_{self.n}"


def is_resblock(module: nn.Module) -> bool:
    return hasattr(module, "in_layers") and hasattr(module, "out_layers")


def is_transformer(module: nn.Module) -> bool:
    return hasattr(module, "transformer_blocks") and hasattr(module, "proj_out")


def unet_blocks(unet: nn.Module):
    """Yield (part, index, layers) for every block of an LDM UNet, in the order they run."""
    yield from (("input", i, list(block)) for i, block in enumerate(unet.input_blocks))
    if unet.middle_block is not None:
        yield "middle", 0, list(unet.middle_block)
    yield from (("output", i, list(block)) for i, block in enumerate(unet.output_blocks))


def unet_sites(unet: nn.Module) -> dict[Site, tuple[nn.Module, int]]:
    """Every site of an LDM UNet: the spatial module that a brick there belongs to (hooks.py), and its channels."""
    sites = {}
    for part, index, layers in unet_blocks(unet):
        resblocks = [layer for layer in layers if is_resblock(layer)]
        transformers = [layer for layer in layers if is_transformer(layer)]
        for n, layer in enumerate(resblocks):
            sites[Site(part, index, "post_res", n)] = (layer, layer.out_channels)
        for layer in transformers:
            for n, block in enumerate(layer.transformer_blocks):
                sites[Site(part, index, "in_attn_pre_ff", n)] = (block, layer.in_channels)
                sites[Site(part, index, "in_attn_post_ff", n)] = (block, layer.in_channels)
        followed = (transformers or resblocks)[-1:]
        for layer in followed:
            channels = layer.in_channels if is_transformer(layer) else layer.out_channels
            sites[Site(part, index, "post_attn", 0)] = (layer, channels)
    return sites | level_sites(unet)


def level_sites(unet: nn.Module) -> dict[Site, tuple[nn.Module, int]]:
    """The sites after whole levels, Downsample and Upsample included: the module that runs next, and the channels of
    the main path there. The next block takes them first, and behind them, on the output side, those of its skip."""
    blocks = list(unet_blocks(unet))
    following = [(part, layers[0]) for part, _, layers in blocks[1:]] + [(None, unet.out)]
    return {Site(part, index, "post_level"): (module, out_channels(layers))
            for (part, index, layers), (next_part, module) in zip(blocks, following)
            if part != next_part or any(map(is_resampler, layers))}


def out_channels(layers: list[nn.Module]) -> int:
    return [layer.out_channels for layer in layers if hasattr(layer, "out_channels")][-1]


def first_resblock(unet: nn.Module) -> nn.Module:
    return next(layer for _, _, layers in unet_blocks(unet) for layer in layers if is_resblock(layer))


def spatial_norms(unet: nn.Module):
    """The GroupNorms of the ResBlocks and of the output, which some families pool over the frames of a clip."""
    for _, _, layers in unet_blocks(unet):
        for layer in filter(is_resblock, layers):
            yield layer.in_layers[0]
            yield layer.out_layers[0]
    yield unet.out[0]


def is_downsample(module: nn.Module) -> bool:
    return hasattr(module, "op") and hasattr(module, "use_conv")


def is_resampler(module: nn.Module) -> bool:
    """A Downsample or an Upsample."""
    return hasattr(module, "use_conv") and not is_resblock(module)


def unet_levels(unet: nn.Module) -> dict[tuple[str, int], int]:
    """Resolution at which the ResBlocks of each block (part, index) run: 0 is the latents' own, each next one halved.

    An output block runs at the resolution of the skip it takes, which is that of the input block opposite.
    """
    levels, level = {}, 0
    for index, block in enumerate(unet.input_blocks):
        level += any(is_downsample(layer) for layer in block)
        levels["input", index] = level
    last = len(unet.input_blocks) - 1
    levels["middle", 0] = level
    levels.update({("output", index): levels["input", last - index] for index in range(len(unet.output_blocks))})
    return levels
