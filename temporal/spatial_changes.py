"""What a set of temporal layers changes in the spatial network while its call is open.

A change is no layer at a site: it is an object of the layers' params with hooks of its own. A new kind is one more
class with these three members.
"""

from dataclasses import dataclass
from typing import Protocol

from einops import rearrange
from torch import nn

from .layers import Factory
from .unet import spatial_norms


class ChangeCall(Protocol):
    """What a change needs of the open call (temporal/call.py)."""

    @property
    def acting(self) -> bool: ...

    @property
    def frames(self) -> int: ...


class SpatialChange(Protocol):
    """A change of the spatial network."""

    note: str           # a sentence for the report of the node that loads the layers

    def build(self, make: Factory) -> nn.Module | None:
        """The weights of the change; None: it has none."""

    def attach(self, call: ChangeCall, unet: nn.Module, weights: nn.Module | None) -> list:
        """Put its hooks on the network; returns the handles that take them off again."""


@dataclass(frozen=True)
class PooledNorms:
    """The spatial GroupNorms see all frames of a clip together (docs/formats.md#norms)."""

    note = "The image model's norms see all frames of a clip together."

    def build(self, make: Factory) -> None:
        return None

    def attach(self, call: ChangeCall, unet: nn.Module, weights: nn.Module | None) -> list:
        """Frames lie side by side in height while a norm runs."""
        def fold(module, args):
            if not call.acting:
                return None
            return rearrange(args[0], "(b t) c h w -> b c (t h) w", t=call.frames), *args[1:]

        def unfold(module, args, output):
            return rearrange(output, "b c (t h) w -> (b t) c h w", t=call.frames) if call.acting else None

        handles = []
        for norm in spatial_norms(unet):
            handles += [norm.register_forward_pre_hook(fold), norm.register_forward_hook(unfold)]
        return handles


POOLED_NORMS = PooledNorms()
