"""Changes of the spatial network that belong to a set of temporal layers. They act while its call is open.

A change is not a layer at a site. It is an object in the params of the layers and installs its own hooks. To add a
kind of change, write one more class with the members of SpatialChange.
"""

from dataclasses import dataclass
from typing import Protocol

from einops import rearrange
from torch import Tensor, nn

from .layers import Factory
from .unet import spatial_norms


class ChangeCall(Protocol):
    """The part of an open call (temporal/call.py) that a change uses."""

    @property
    def acting(self) -> bool: ...

    @property
    def frames(self) -> int: ...

    @property
    def told_fps(self) -> Tensor | float | None: ...


class SpatialChange(Protocol):
    """A change of the spatial network."""

    note: str           # a sentence for the report of the node that loads the layers

    def build(self, make: Factory) -> nn.Module | None:
        """Make the module with the weights of the change. None: it has no weights."""

    def attach(self, call: ChangeCall, unet: nn.Module, weights: nn.Module | None) -> list:
        """Install its hooks on the network. Returns the handles that remove them."""


@dataclass(frozen=True)
class PooledNorms:
    """The spatial GroupNorms pool over all frames of a clip (docs/formats.md#norms)."""

    note = "The image model's norms see all frames of a clip together."

    def build(self, make: Factory) -> None:
        return None

    def attach(self, call: ChangeCall, unet: nn.Module, weights: nn.Module | None) -> list:
        """While a norm runs, the frames of a clip are stacked along the height."""
        def fold(module: nn.Module, args: tuple) -> tuple | None:
            if not call.acting:
                return None
            return rearrange(args[0], "(b t) c h w -> b c (t h) w", t=call.frames), *args[1:]

        def unfold(module: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
            return rearrange(output, "b c (t h) w -> (b t) c h w", t=call.frames) if call.acting else None

        handles = []
        for norm in spatial_norms(unet):
            handles += [norm.register_forward_pre_hook(fold), norm.register_forward_hook(unfold)]
        return handles


POOLED_NORMS = PooledNorms()
