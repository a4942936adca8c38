"""Sites and slots: where temporal layers attach to a spatial network, and how they act there.

A site is one point of one network. A slot is a kind of site. A slot finds its sites in a UNet and installs forward
hooks on the spatial module of a site. To add a slot, write one more class and list it in SLOTS.

A hook acts only while its call is open in the current thread: it checks `call.acting`. `call.run(site, x, emb)` runs
the layer at the site.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol

from torch import Tensor, cat, nn

from .unet import (
    PARTS,
    is_resampler,
    is_resblock,
    is_transformer,
    out_channels,
    resblock_convolutions,
    unet_blocks,
)


class Site(NamedTuple):
    """A point of the spatial network at which a temporal layer attaches."""

    part: str           # input, middle or output
    # The number of the block in its part, as LDM counts blocks. It hides tuple.index, which nobody needs here.
    index: int          # type: ignore[assignment]
    slot: str           # the name of a slot
    n: int = 0          # the number of this site among the block's sites of the same slot

    @property
    def name(self) -> str:
        return f"{self.part}_{self.index}_{self.slot}_{self.n}"


class Attachment(NamedTuple):
    """The spatial module of a site."""

    module: nn.Module   # the module that gets the hooks
    channels: int       # channels of the features that the temporal layer receives


class SlotCall(Protocol):
    """The part of an open call (temporal/call.py) that hooks use."""

    @property
    def acting(self) -> bool: ...

    due: dict[Site, Tensor]     # residuals to add when their block ends

    def run(self, site: Site, x: Tensor, emb: Tensor | None = None) -> Tensor: ...


class Slot(Protocol):
    """A kind of site."""

    name: str
    inside_block: bool      # True: the layer runs inside a spatial transformer, not after a module of the block
    gives_residual: bool    # True: the layer's result is added to the features. False: it takes their place

    def sites(self, unet: nn.Module) -> Iterator[tuple[Site, Attachment]]: ...

    def attach(self, call: SlotCall, site: Site, attachment: Attachment) -> list: ...


def after(call: SlotCall, site: Site) -> Callable:
    """A forward hook that runs the layer on the module's output and returns its result."""
    def hook(module: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
        return call.run(site, output) if call.acting else None
    return hook


class PostConvIn:
    """After the first convolution of the network. Its result is also the first skip connection."""

    name, inside_block, gives_residual = "post_conv_in", False, False

    def sites(self, unet: nn.Module) -> Iterator[tuple[Site, Attachment]]:
        conv = unet.input_blocks[0][0]
        yield Site("input", 0, self.name), Attachment(conv, conv.out_channels)

    def attach(self, call: SlotCall, site: Site, attachment: Attachment) -> list:
        return [attachment.module.register_forward_hook(after(call, site))]


class PostConvOut:
    """After the last convolution of the network, on what the network predicts."""

    name, inside_block, gives_residual = "post_conv_out", False, False

    def sites(self, unet: nn.Module) -> Iterator[tuple[Site, Attachment]]:
        conv = unet.out[2]
        yield Site("output", len(unet.output_blocks) - 1, self.name), Attachment(conv, conv.out_channels)

    def attach(self, call: SlotCall, site: Site, attachment: Attachment) -> list:
        return [attachment.module.register_forward_hook(after(call, site))]


class PostResConv:
    """After one of the convolutions inside a ResBlock. which: a key of resblock_convolutions."""

    inside_block, gives_residual = False, False

    def __init__(self, which: str) -> None:
        self.name, self.which = f"post_{which}", which

    def sites(self, unet: nn.Module) -> Iterator[tuple[Site, Attachment]]:
        for part, index, layers in unet_blocks(unet):
            for n, layer in enumerate(filter(is_resblock, layers)):
                conv = resblock_convolutions(layer).get(self.which)
                if conv is not None:
                    yield Site(part, index, self.name, n), Attachment(conv, conv.out_channels)

    def attach(self, call: SlotCall, site: Site, attachment: Attachment) -> list:
        return [attachment.module.register_forward_hook(after(call, site))]


class PostResampler:
    """After a Downsample or an Upsample."""

    name, inside_block, gives_residual = "post_resampler", False, False

    def sites(self, unet: nn.Module) -> Iterator[tuple[Site, Attachment]]:
        for part, index, layers in unet_blocks(unet):
            for layer in filter(is_resampler, layers):
                yield Site(part, index, self.name), Attachment(layer, layer.out_channels)

    def attach(self, call: SlotCall, site: Site, attachment: Attachment) -> list:
        return [attachment.module.register_forward_hook(after(call, site))]


class PostRes:
    """After a ResBlock. The layer gets the ResBlock's own timestep embedding."""

    name, inside_block, gives_residual = "post_res", False, False

    def sites(self, unet: nn.Module) -> Iterator[tuple[Site, Attachment]]:
        for part, index, layers in unet_blocks(unet):
            for n, layer in enumerate(filter(is_resblock, layers)):
                yield Site(part, index, self.name, n), Attachment(layer, layer.out_channels)

    def attach(self, call: SlotCall, site: Site, attachment: Attachment) -> list:
        def hook(module: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
            return call.run(site, output, args[1]) if call.acting else None
        return [attachment.module.register_forward_hook(hook)]


def blocks_of_transformers(unet: nn.Module, slot: str) -> Iterator[tuple[Site, Attachment]]:
    """One site for each block of each spatial transformer."""
    for part, index, layers in unet_blocks(unet):
        for layer in filter(is_transformer, layers):
            for n, block in enumerate(layer.transformer_blocks):
                yield Site(part, index, slot, n), Attachment(block, layer.in_channels)


class BeforeFeedForward:
    """Inside a transformer block, between the attention to text and the feed-forward. The layer returns a residual.

    The block takes its skip connection before its last norm. So the residual is added twice: a hook before that norm
    adds it to the input of the feed-forward, and a hook after the block adds it to the output.
    """

    name, inside_block, gives_residual = "in_attn_pre_ff", True, True

    def sites(self, unet: nn.Module) -> Iterator[tuple[Site, Attachment]]:
        return blocks_of_transformers(unet, self.name)

    def attach(self, call: SlotCall, site: Site, attachment: Attachment) -> list:
        def before_norm(module: nn.Module, args: tuple) -> tuple | None:
            if not call.acting:
                return None
            residual = call.due[site] = call.run(site, args[0])
            return args[0] + residual, *args[1:]

        def after_block(module: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
            return output + call.due.pop(site) if call.acting and site in call.due else None

        block = attachment.module
        return [block.norm3.register_forward_pre_hook(before_norm), block.register_forward_hook(after_block)]


class AfterFeedForward:
    """After a transformer block, before the transformer's last projection."""

    name, inside_block, gives_residual = "in_attn_post_ff", True, False

    def sites(self, unet: nn.Module) -> Iterator[tuple[Site, Attachment]]:
        return blocks_of_transformers(unet, self.name)

    def attach(self, call: SlotCall, site: Site, attachment: Attachment) -> list:
        return [attachment.module.register_forward_hook(after(call, site))]


class PostAttn:
    """After the spatial transformer of a block, or after its ResBlock in a block without transformer."""

    name, inside_block, gives_residual = "post_attn", False, False

    def sites(self, unet: nn.Module) -> Iterator[tuple[Site, Attachment]]:
        for part, index, layers in unet_blocks(unet):
            followed = list(filter(is_transformer, layers)) or list(filter(is_resblock, layers))
            for layer in followed[-1:]:
                channels = layer.in_channels if is_transformer(layer) else layer.out_channels
                yield Site(part, index, self.name), Attachment(layer, channels)

    def attach(self, call: SlotCall, site: Site, attachment: Attachment) -> list:
        return [attachment.module.register_forward_hook(after(call, site))]


class PostLevel:
    """After a whole level with its Downsample or Upsample. The layer acts on the main path and not on the skips.

    The hook is on the module that runs next. On the output side that module receives the channels of the main path
    followed by the channels of a skip connection. Only the first are changed.
    """

    name, inside_block, gives_residual = "post_level", False, False

    def sites(self, unet: nn.Module) -> Iterator[tuple[Site, Attachment]]:
        blocks = list(unet_blocks(unet))
        following = [(part, layers[0]) for part, _, layers in blocks[1:]] + [(None, unet.out)]
        for (part, index, layers), (next_part, module) in zip(blocks, following):
            if part != next_part or any(map(is_resampler, layers)):
                yield Site(part, index, self.name), Attachment(module, out_channels(layers))

    def attach(self, call: SlotCall, site: Site, attachment: Attachment) -> list:
        def hook(module: nn.Module, args: tuple) -> tuple | None:
            if not call.acting:
                return None
            channels = attachment.channels
            main, skip = args[0][:, :channels], args[0][:, channels:]
            main = call.run(site, main)
            return cat([main, skip], dim=1) if skip.shape[1] else main, *args[1:]
        return [attachment.module.register_forward_pre_hook(hook)]


# In the order in which they run within a block
SLOTS: dict[str, Slot] = {slot.name: slot for slot in (
    PostConvIn(), PostResConv("conv1"), PostResConv("conv2"), PostResConv("shortcut"), PostRes(), BeforeFeedForward(),
    AfterFeedForward(), PostAttn(), PostResampler(), PostLevel(), PostConvOut())}


def unet_sites(unet: nn.Module) -> dict[Site, Attachment]:
    """Every site of an LDM UNet, in the order in which they run."""
    found = [pair for slot in SLOTS.values() for pair in slot.sites(unet)]
    return dict(sorted(found, key=lambda pair: run_order(pair[0])))


def run_order(site: Site) -> tuple:
    """A sort key: sites sort in the order in which they run."""
    return PARTS.index(site.part), site.index, list(SLOTS).index(site.slot), site.n
