"""The protocol of a brick: `params.build(factory)` makes it, `brick(x, call)` runs it.

To add a kind of layer, write a params class with `build`, and a module whose forward takes x and a call. Nothing else
in the pack changes.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from .factory import Factory
from .position import distance_band


class BrickParams(Protocol):
    """The params of one brick.

    Two more attributes are optional. `mix_length`: the only clip length it can run; 1: any. `table_length`: the length
    of its learned position table; 0: none.
    """

    @property
    def channels(self) -> int:
        """Channels of the features x."""

    def build(self, make: Factory) -> nn.Module:
        """Make the brick."""


class Merge(Protocol):
    """What changes the input of a motion module's first attention: the features of a camera."""

    def part(self, start: int, length: int) -> "Merge":
        """The same for `length` pixels from number `start` on."""

    def __call__(self, h: Tensor) -> Tensor:
        """h `s t c` of the pixels -> the input of queries, keys and values."""


class BrickCall(Protocol):
    """What a brick can read of the network call that it runs in."""

    @property
    def frames(self) -> int:
        """t, the number of frames of a clip."""

    @property
    def strength(self) -> float:
        """0: the image model alone. 1: the layers as trained."""

    @property
    def emb(self) -> Tensor:
        """The timestep embedding `(b t) e`."""

    @property
    def text(self) -> Tensor:
        """The text of each clip, `b l d`."""

    @property
    def context_maps(self) -> Tensor | None:
        """Context channels at the resolution of x, `(b t) k h w`. None for layers without context frames."""

    @property
    def frame_embedding(self) -> Tensor:
        """The embedding of the frame numbers `t e`, for layers with one."""

    @property
    def merge(self) -> Merge | None:
        """For a motion module: what changes the input of its first attention. None: nothing does."""

    def band(self, device: torch.device) -> Tensor | None:
        """The attention mask `t t`, True where frames attend to each other. None: all do."""


@dataclass(frozen=True)
class GivenCall:
    """A BrickCall with fixed values, to run a brick alone, outside of a network."""

    frames: int                             # fields as in BrickCall
    strength: float = 1.0
    emb: Tensor | None = None
    text: Tensor | None = None
    context_maps: Tensor | None = None
    frame_embedding: Tensor | None = None
    max_distance: int | None = None         # attention over time reaches this many frames. None: all frames
    merge: Merge | None = None

    def band(self, device: torch.device) -> Tensor | None:
        return distance_band(self.frames, self.max_distance, device)
