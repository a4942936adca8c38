"""Gradient checkpointing of a UNet whose temporal layers are forward hooks.

The hooks of `open_call` act only while the call is open. Checkpointing recomputes a block in the backward pass, when
that call is long closed (on a GPU in another thread, too): each recomputation opens a fresh copy of the call, or the
temporal layers inside the block would be left out of it.
"""

from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from threading import get_ident

import torch
from torch.utils.checkpoint import checkpoint

from ..stack import attached, is_resblock, is_transformer, open_call, unet_blocks


@contextmanager
def open_call_checkpointed(unet, layers, context=None):
    """As `open_call`; the blocks of the UNet and the temporal layers keep their inputs alone for the backward pass."""
    with open_call(unet, layers, context) as calls:
        region = _Region(unet, calls)
        try:
            region.enter()
            yield calls
        finally:
            region.leave()


class _Region:
    """The modules of one call whose forward is checkpointed while the call is open."""

    def __init__(self, unet, calls):
        self.unet, self.calls = unet, calls
        self.open_in = None         # the thread whose call is open
        blocks = [layer for _, _, layers in unet_blocks(unet) for layer in layers]
        self.modules = [layer for layer in blocks if is_resblock(layer) or is_transformer(layer)]
        # Layers inside a spatial transformer are recomputed with it; the others act after their block has returned.
        for call in calls:
            self.modules += [call.stack.layers[site.name] for site, _ in call.stack.params.bricks
                             if site.slot != "in_attn_post_ff"]

    def enter(self):
        self.open_in = get_ident()
        for module in self.modules:
            module.forward = partial(self._forward, module.forward)

    def leave(self):
        for module in self.modules:
            module.__dict__.pop("forward", None)
        self.open_in = None

    def _forward(self, forward, *args, **kwargs):
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        # Options that the network rewrites from block to block are kept as they were here.
        args = [dict(arg) if isinstance(arg, dict) else arg for arg in args]
        kwargs = {name: dict(arg) if isinstance(arg, dict) else arg for name, arg in kwargs.items()}
        contexts = lambda: (nullcontext(), self._reopened())    # noqa: E731  forward, recomputation
        return checkpoint(forward, *args, use_reentrant=False, context_fn=contexts, **kwargs)

    def _reopened(self):
        """A context in which the call's layers act once more. Sites are not counted: one block is run, not the UNet."""
        if self.open_in == get_ident():     # a backward pass inside the call, whose own hooks still act here
            return nullcontext()
        return attached(self.unet, [replace(call, reached=set()) for call in self.calls])
