"""The protocol of a brick: `params.build(factory)` makes it, `brick(x, call)` runs it.

A new kind of layer is a params class with `build`, and a module whose forward takes x and a call. Nothing else in the
pack needs to know it.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from .factory import Factory
from .position import distance_band


class BrickParams(Protocol):
    """The sizes of one brick. Two more attributes are read where a brick has them: `mix_length`, the only clip length
    it can run (1: any), and `table_length`, the length of its learned position table (0: none)."""

    @property
    def channels(self) -> int: ...

    def build(self, make: Factory) -> nn.Module: ...


class BrickCall(Protocol):
    """What a brick may ask about the call of the network that it runs in."""

    @property
    def frames(self) -> int:
        """t, the frames of a clip."""

    @property
    def strength(self) -> float:
        """0 is the image model, 1 is as trained."""

    @property
    def emb(self) -> Tensor:
        """The timestep embedding `(b t) e`."""

    @property
    def text(self) -> Tensor:
        """The text of each clip, `b l d`."""

    @property
    def context_maps(self) -> Tensor | None:
        """Context channels at the resolution of x, `(b t) k h w`; None for layers without context frames."""

    def band(self, device: torch.device) -> Tensor | None:
        """Which frames see each other, `t t`; None: all."""


@dataclass(frozen=True)
class GivenCall:
    """A BrickCall whose answers are given: it runs a brick alone, outside of a network."""

    frames: int
    strength: float = 1.0
    emb: Tensor | None = None
    text: Tensor | None = None
    context_maps: Tensor | None = None
    max_distance: int | None = None     # frames that attention over time reaches; None: all

    def band(self, device: torch.device) -> Tensor | None:
        return distance_band(self.frames, self.max_distance, device)
