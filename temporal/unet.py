"""The parts of an LDM UNet: its blocks, ResBlocks, transformers, norms and levels.

They are recognised by their attributes and not by their classes. So no host need be imported here.
"""

from collections.abc import Iterator

from torch import nn

PARTS = ("input", "middle", "output")


def is_resblock(module: nn.Module) -> bool:
    return hasattr(module, "in_layers") and hasattr(module, "out_layers")


def is_transformer(module: nn.Module) -> bool:
    return hasattr(module, "transformer_blocks") and hasattr(module, "proj_out")


def unet_blocks(unet: nn.Module) -> Iterator[tuple[str, int, list[nn.Module]]]:
    """Yield (part, index, layers) for every block of an LDM UNet, in the order they run."""
    yield from (("input", i, list(block)) for i, block in enumerate(unet.input_blocks))
    if unet.middle_block is not None:
        yield "middle", 0, list(unet.middle_block)
    yield from (("output", i, list(block)) for i, block in enumerate(unet.output_blocks))


def out_channels(layers: list[nn.Module]) -> int:
    """The output channels of a block, given its layers."""
    return [layer.out_channels for layer in layers if hasattr(layer, "out_channels")][-1]


def first_resblock(unet: nn.Module) -> nn.Module:
    """The ResBlock that runs first."""
    return next(layer for _, _, layers in unet_blocks(unet) for layer in layers if is_resblock(layer))


def spatial_norms(unet: nn.Module) -> Iterator[nn.Module]:
    """The GroupNorms of the ResBlocks and of the output. Some families pool them over the frames of a clip."""
    for _, _, layers in unet_blocks(unet):
        for layer in filter(is_resblock, layers):
            yield layer.in_layers[0]
            yield layer.out_layers[0]
    yield unet.out[0]


def transformers(unet: nn.Module) -> Iterator[nn.Module]:
    """The spatial transformers, in the order they run."""
    for _, _, layers in unet_blocks(unet):
        yield from filter(is_transformer, layers)


def transformer_blocks(unet: nn.Module) -> Iterator[nn.Module]:
    """The blocks of all spatial transformers, in the order they run."""
    for layer in transformers(unet):
        yield from layer.transformer_blocks


def resblock_convolutions(resblock: nn.Module) -> dict[str, nn.Module]:
    """The 2-D convolutions of a ResBlock in the order they run: conv1, conv2 and shortcut. Not all have a shortcut."""
    found = {"conv1": resblock.in_layers[-1], "conv2": resblock.out_layers[-1],
             "shortcut": getattr(resblock, "skip_connection", None)}
    return {name: module for name, module in found.items() if isinstance(module, nn.Conv2d)}


def is_downsample(module: nn.Module) -> bool:
    return hasattr(module, "op") and hasattr(module, "use_conv")


def is_resampler(module: nn.Module) -> bool:
    """Whether a module is a Downsample or an Upsample."""
    return hasattr(module, "use_conv") and not is_resblock(module)


def unet_levels(unet: nn.Module) -> dict[tuple[str, int], int]:
    """The resolution of the ResBlocks in each block (part, index). 0: that of the latents; n: halved n times.

    An output block runs at the resolution of its skip connection, which comes from the input block opposite.
    """
    levels, level = {}, 0
    for index, block in enumerate(unet.input_blocks):
        level += any(is_downsample(layer) for layer in block)
        levels["input", index] = level
    last = len(unet.input_blocks) - 1
    levels["middle", 0] = level
    levels.update({("output", index): levels["input", last - index] for index in range(len(unet.output_blocks))})
    return levels
