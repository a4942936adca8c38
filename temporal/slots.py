"""Sites and slots: where a temporal layer attaches to a spatial network, and how it acts there.

A site is one such point of one network. A slot is a kind of site. A slot finds its sites in a UNet, and puts forward
hooks on the spatial module that a site belongs to. A new kind is one more class in SLOTS.

A hook leaves alone whatever is not part of the call it was made for: `call.acting` says whether that call is open here.
`call.run(site, x, emb)` gives what the layer at the site makes of x.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol

from torch import Tensor, cat, nn

from .unet import PARTS, is_resampler, is_resblock, is_transformer, out_channels, unet_blocks


class Site(NamedTuple):
    """A point of the spatial network at which a temporal layer attaches."""

    part: str           # input, middle or output
    index: int          # of the block, as LDM counts them
    slot: str           # the name of a slot
    n: int = 0          # which of several such sites of the block

    @property
    def name(self) -> str:
        return f"{self.part}_{self.index}_{self.slot}_{self.n}"


class Attachment(NamedTuple):
    """What a site belongs to."""

    module: nn.Module   # the spatial module that gets the hooks
    channels: int       # of the features that the layer receives


class SlotCall(Protocol):
    """What a hook needs of the open call (temporal/call.py)."""

    @property
    def acting(self) -> bool: ...

    due: dict[Site, Tensor]

    def run(self, site: Site, x: Tensor, emb: Tensor | None = None) -> Tensor: ...


class Slot(Protocol):
    """A kind of site."""

    name: str
    inside_block: bool      # the layer runs inside the module that a spatial block consists of

    def sites(self, unet: nn.Module) -> Iterator[tuple[Site, Attachment]]: ...

    def attach(self, call: SlotCall, site: Site, attachment: Attachment) -> list: ...


def after(call: SlotCall, site: Site) -> Callable:
    """A hook that lets the layer act on what a module gave out."""
    def hook(module, args, output):
        return call.run(site, output) if call.acting else None
    return hook


class PostConvIn:
    """After the first convolution of the network. Its result is also the first skip."""

    name, inside_block = "post_conv_in", False

    def sites(self, unet: nn.Module) -> Iterator[tuple[Site, Attachment]]:
        conv = unet.input_blocks[0][0]
        yield Site("input", 0, self.name), Attachment(conv, conv.out_channels)

    def attach(self, call: SlotCall, site: Site, attachment: Attachment) -> list:
        return [attachment.module.register_forward_hook(after(call, site))]


class PostRes:
    """After a ResBlock. The layer gets the ResBlock's own timestep embedding."""

    name, inside_block = "post_res", False

    def sites(self, unet: nn.Module) -> Iterator[tuple[Site, Attachment]]:
        for part, index, layers in unet_blocks(unet):
            for n, layer in enumerate(filter(is_resblock, layers)):
                yield Site(part, index, self.name, n), Attachment(layer, layer.out_channels)

    def attach(self, call: SlotCall, site: Site, attachment: Attachment) -> list:
        def hook(module, args, output):
            return call.run(site, output, args[1]) if call.acting else None
        return [attachment.module.register_forward_hook(hook)]


def blocks_of_transformers(unet: nn.Module, slot: str) -> Iterator[tuple[Site, Attachment]]:
    """A site for each block of each spatial transformer."""
    for part, index, layers in unet_blocks(unet):
        for layer in filter(is_transformer, layers):
            for n, block in enumerate(layer.transformer_blocks):
                yield Site(part, index, slot, n), Attachment(block, layer.in_channels)


class BeforeFeedForward:
    """Inside a transformer block, between attention to text and feed-forward. The layer gives a residual.

    The block keeps its skip from before its last norm. So a hook before that norm lets the feed-forward see the
    residual, and one after the block adds it once more.
    """

    name, inside_block = "in_attn_pre_ff", True

    def sites(self, unet: nn.Module) -> Iterator[tuple[Site, Attachment]]:
        return blocks_of_transformers(unet, self.name)

    def attach(self, call: SlotCall, site: Site, attachment: Attachment) -> list:
        def before_norm(module, args):
            if not call.acting:
                return None
            residual = call.due[site] = call.run(site, args[0])
            return args[0] + residual, *args[1:]

        def after_block(module, args, output):
            return output + call.due.pop(site) if call.acting and site in call.due else None

        block = attachment.module
        return [block.norm3.register_forward_pre_hook(before_norm), block.register_forward_hook(after_block)]


class AfterFeedForward:
    """After a transformer block, before the transformer's last projection."""

    name, inside_block = "in_attn_post_ff", True

    def sites(self, unet: nn.Module) -> Iterator[tuple[Site, Attachment]]:
        return blocks_of_transformers(unet, self.name)

    def attach(self, call: SlotCall, site: Site, attachment: Attachment) -> list:
        return [attachment.module.register_forward_hook(after(call, site))]


class PostAttn:
    """After the spatial transformer of a block, or after its ResBlock where it has none."""

    name, inside_block = "post_attn", False

    def sites(self, unet: nn.Module) -> Iterator[tuple[Site, Attachment]]:
        for part, index, layers in unet_blocks(unet):
            followed = list(filter(is_transformer, layers)) or list(filter(is_resblock, layers))
            for layer in followed[-1:]:
                channels = layer.in_channels if is_transformer(layer) else layer.out_channels
                yield Site(part, index, self.name), Attachment(layer, channels)

    def attach(self, call: SlotCall, site: Site, attachment: Attachment) -> list:
        return [attachment.module.register_forward_hook(after(call, site))]


class PostLevel:
    """After a whole level, Downsample and Upsample included, on the main path alone.

    The hook is on the module that runs next. That module takes the main path's channels first, and on the output side
    those of its skip behind them. The skips stay as they are.
    """

    name, inside_block = "post_level", False

    def sites(self, unet: nn.Module) -> Iterator[tuple[Site, Attachment]]:
        blocks = list(unet_blocks(unet))
        following = [(part, layers[0]) for part, _, layers in blocks[1:]] + [(None, unet.out)]
        for (part, index, layers), (next_part, module) in zip(blocks, following):
            if part != next_part or any(map(is_resampler, layers)):
                yield Site(part, index, self.name), Attachment(module, out_channels(layers))

    def attach(self, call: SlotCall, site: Site, attachment: Attachment) -> list:
        def hook(module, args):
            if not call.acting:
                return None
            channels = attachment.channels
            main, skip = args[0][:, :channels], args[0][:, channels:]
            main = call.run(site, main)
            return cat([main, skip], dim=1) if skip.shape[1] else main, *args[1:]
        return [attachment.module.register_forward_pre_hook(hook)]


# In the order in which they run within a block.
SLOTS: dict[str, Slot] = {slot.name: slot for slot in (
    PostConvIn(), PostRes(), BeforeFeedForward(), AfterFeedForward(), PostAttn(), PostLevel())}


def unet_sites(unet: nn.Module) -> dict[Site, Attachment]:
    """Every site of an LDM UNet, in the order in which they run."""
    found = [pair for slot in SLOTS.values() for pair in slot.sites(unet)]
    return dict(sorted(found, key=lambda pair: run_order(pair[0])))


def run_order(site: Site) -> tuple:
    """A key that sorts sites in the order in which they run."""
    return PARTS.index(site.part), site.index, list(SLOTS).index(site.slot), site.n
