"""Changes of the spatial network that belong to a set of temporal layers. They act while its call is open.

A change is not a layer at a site. It is an object in the params of the layers and installs its own hooks. To add a
kind of change, write one more class with the members of SpatialChange.
"""

from dataclasses import dataclass
from typing import Protocol

from einops import rearrange
from torch import Tensor, cat, nn

from .errors import VideoLDMError
from .layers import Factory
from .unet import spatial_norms, transformer_blocks


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


@dataclass(frozen=True)
class SparseCausalAttention:
    """Spatial self-attention to the first and to the previous frame of the clip (docs/papers.md#lavie-interpolation).

    A frame's own keys and values are not among those it attends to. The first frame attends to itself twice.
    """

    note = "The image model's self-attention sees the first and the previous frame of the clip, not the frame itself."

    def build(self, make: Factory) -> None:
        return None

    def attach(self, call: ChangeCall, unet: nn.Module, weights: nn.Module | None) -> list:
        return [handle for block in transformer_blocks(unet) for handle in FirstAndPrevious(call).attach(block)]


class FirstAndPrevious:
    """Regroups the keys and values of one transformer block.

    It hooks the projections and not the attention. So each frame's keys are computed once, and nodes that replace the
    attention get the same keys.
    """

    def __init__(self, call: ChangeCall) -> None:
        self.call = call
        self.images = 0                             # the images in the block's input
        self.queries: tuple[int, ...] = ()          # the size of the queries, without the channels

    def attach(self, block: nn.Module) -> list:
        """Install the hooks on a transformer block. Returns the handles that remove them."""
        attention = block.attn1
        return [block.register_forward_pre_hook(self.count_images),
                attention.to_q.register_forward_hook(self.note_queries),
                attention.to_k.register_forward_hook(self.regroup),
                attention.to_v.register_forward_hook(self.regroup),
                attention.to_out.register_forward_pre_hook(self.check_result)]

    def count_images(self, module: nn.Module, args: tuple) -> None:
        if self.call.acting:
            self.images = len(args[0])

    def note_queries(self, module: nn.Module, args: tuple, output: Tensor) -> None:
        if self.call.acting:
            self.queries = tuple(output.shape[:2])

    def regroup(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
        """Keys or values `(b t) s c` -> `(b t) 2s c`. Raises VideoLDMError where a node mixes or cuts the frames."""
        if not self.call.acting:
            return None
        if not len(output) == self.queries[0] == self.images:
            raise VideoLDMError("A node cuts or joins the frames for the spatial self-attention (HyperTile does). "
                                "This network's self-attention sees the whole first and previous frame of each frame. "
                                "Remove that node.")
        clips = rearrange(output, "(b t) s c -> b t s c", t=self.call.frames)
        first = clips[:, :1]
        pair = cat([first.expand_as(clips), cat([first, clips[:, :-1]], dim=1)], dim=2)
        return rearrange(pair, "b t s c -> (b t) s c")

    def check_result(self, module: nn.Module, args: tuple) -> None:
        """Raise VideoLDMError for a result that was made from keys or values in place of queries."""
        if self.call.acting and args[0].shape[:2] != self.queries:
            raise VideoLDMError("A node puts each frame's own keys or values in the place of the spatial "
                                "self-attention (Perturbed-Attention Guidance does). This network's self-attention "
                                "sees the first and the previous frame, not the frame itself. Remove that node.")


POOLED_NORMS = PooledNorms()
SPARSE_CAUSAL = SparseCausalAttention()
