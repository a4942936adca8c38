"""Gradient checkpointing of a UNet whose temporal layers are forward hooks.

The hooks of `open_call` act only while the call is open. Checkpointing recomputes a block in the backward pass, when
the call is closed already; on a GPU that happens in another thread. So each recomputation opens a fresh copy of the
call. Without it the temporal layers inside the block would be left out.
"""

from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from threading import get_ident

import torch
from torch.utils.checkpoint import checkpoint

from ..call import attach_calls, open_call
from ..slots import SLOTS
from ..unet import is_resblock, is_transformer, unet_blocks


@contextmanager
def open_call_checkpointed(unet, layers, context=None):
    """As `open_call`, with less memory: blocks and temporal layers keep only their inputs for the backward pass."""
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
        self.thread = None          # the thread in which the call is open
        self.replaced = []          # (module, the forward it had as an attribute of its own, or None)
        blocks = [layer for _, _, layers in unet_blocks(unet) for layer in layers]
        modules = [layer for layer in blocks if is_resblock(layer) or is_transformer(layer)]
        # Layers inside a spatial transformer are recomputed with it; the others act after their block has returned.
        for call in calls:
            modules += [call.stack.layers[site.name] for site, _ in call.stack.params.bricks
                        if not SLOTS[site.slot].inside_block]
        self.modules = list(dict.fromkeys(modules))

    def enter(self):
        self.thread = get_ident()
        for module in self.modules:
            self.replaced.append((module, vars(module).get("forward")))
            module.forward = partial(self._forward, module.forward)

    def leave(self):
        for module, forward in self.replaced:
            del module.forward
            if forward is not None:
                module.forward = forward
        self.thread = None

    def _forward(self, forward, *args, **kwargs):
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        # Options that the network rewrites from block to block are kept as they were here.
        args = tuple(dict(arg) if isinstance(arg, dict) else arg for arg in args)
        kwargs = {name: dict(arg) if isinstance(arg, dict) else arg for name, arg in kwargs.items()}
        return checkpoint(forward, *args, use_reentrant=False, context_fn=lambda: (nullcontext(), _Reopened(self)),
                          **kwargs)


class _Reopened:
    """Entered by every recomputation of one block, so that the layers of the call act once more.

    Reached sites are not recorded, because one block runs and not the whole UNet. A backward pass inside the call, in
    the thread of the call, finds the hooks still at work and adds none.
    """

    def __init__(self, region):
        self.region, self.opened = region, []

    def __enter__(self):
        region = self.region
        inside = region.thread == get_ident()
        calls = [replace(call, reached=set()) for call in region.calls]
        self.opened.append(nullcontext() if inside else attach_calls(region.unet, calls))
        self.opened[-1].__enter__()

    def __exit__(self, *error):
        return self.opened.pop().__exit__(*error)
