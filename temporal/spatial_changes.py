"""Changes of the spatial network that belong to a set of temporal layers. They act while its call is open.

A change is not a layer at a site. It is an object in the params of the layers and installs its own hooks. To add a
kind of change, write one more class with the members of SpatialChange.
"""

from dataclasses import dataclass
from typing import Protocol

from einops import rearrange
from torch import Tensor, cat, nn, where

from .errors import VideoLDMError
from .layers import Factory
from .picture_input import GivenPicture
from .unet import spatial_norms, transformer_blocks


class ChangeCall(Protocol):
    """The part of an open call (temporal/call.py) that a change uses."""

    @property
    def acting(self) -> bool: ...

    @property
    def frames(self) -> int: ...

    @property
    def told_fps(self) -> Tensor | float | None: ...

    @property
    def known_places(self) -> tuple[int, ...]: ...

    @property
    def picture(self) -> GivenPicture | None: ...

    def frames_changed(self, change: "SpatialChange") -> Tensor | None: ...


class SpatialChange(Protocol):
    """A change of the spatial network.

    One more attribute is optional. `needs_known`: whether it does nothing where no frame of the clip is known.
    """

    note: str           # a sentence for the report of the node that loads the layers
    by_frame: bool      # whether it can leave single frames as the image model has them

    def build(self, make: Factory) -> nn.Module | None:
        """Make the module with the weights of the change. None: it has no weights."""

    def attach(self, call: ChangeCall, unet: nn.Module, weights: nn.Module | None) -> list:
        """Install its hooks on the network. Returns the handles that remove them."""


@dataclass(frozen=True)
class PooledNorms:
    """The spatial GroupNorms pool over all frames of a clip (docs/formats.md#norms)."""

    note, by_frame = "The image model's norms see all frames of a clip together.", True

    def build(self, make: Factory) -> None:
        return None

    def attach(self, call: ChangeCall, unet: nn.Module, weights: nn.Module | None) -> list:
        """While a norm runs, the frames of a clip are stacked along the height.

        Frames of strength 0 are then replaced by what the norm makes of each alone. The others still see them.
        """
        originals: dict[nn.Module, Tensor] = {}     # what the norms that run were given

        def fold(module: nn.Module, args: tuple) -> tuple | None:
            if not call.acting:
                return None
            originals[module] = args[0]
            return rearrange(args[0], "(b t) c h w -> b c (t h) w", t=call.frames), *args[1:]

        def unfold(module: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
            if not call.acting:
                return None
            original = originals.pop(module)
            pooled = rearrange(output, "b c (t h) w -> (b t) c h w", t=call.frames)
            changed = call.frames_changed(self)
            if changed is None:
                return pooled
            alone = ~changed.to(original.device)[:, None, None, None]
            return where(alone, module.forward(original), pooled)

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
    by_frame = False

    def build(self, make: Factory) -> None:
        return None

    def attach(self, call: ChangeCall, unet: nn.Module, weights: nn.Module | None) -> list:
        return [handle for block in transformer_blocks(unet) for handle in FirstAndPrevious(call).attach(block)]


class RegroupedKeys:
    """Regroups the keys and values of one transformer block.

    It hooks the projections and not the attention. So each frame's keys are computed once, and nodes that replace the
    attention get the same keys.
    """

    # What the self-attention sees, as parts of two sentences
    whole = ""      # "This network's self-attention sees ..."
    sees = ""

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

    @property
    def acting(self) -> bool:
        """Whether the keys are regrouped in this call."""
        return self.call.acting

    def group(self, clips: Tensor) -> Tensor:
        """Keys or values of clips `b t s c` -> those that each frame sees, `b t n c`."""
        raise NotImplementedError

    def count_images(self, module: nn.Module, args: tuple) -> None:
        if self.acting:
            self.images = len(args[0])

    def note_queries(self, module: nn.Module, args: tuple, output: Tensor) -> None:
        if self.acting:
            self.queries = tuple(output.shape[:2])

    def regroup(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
        """Keys or values `(b t) s c` -> `(b t) n c`. Raises VideoLDMError where a node mixes or cuts the frames."""
        if not self.acting:
            return None
        if not len(output) == self.queries[0] == self.images:
            raise VideoLDMError("A node cuts or joins the frames for the spatial self-attention (HyperTile does). "
                                f"This network's self-attention sees {self.whole}. Remove that node.")
        clips = rearrange(output, "(b t) s c -> b t s c", t=self.call.frames)
        return rearrange(self.group(clips), "b t s c -> (b t) s c")

    def check_result(self, module: nn.Module, args: tuple) -> None:
        """Raise VideoLDMError for a result that was made from keys or values in place of queries."""
        if self.acting and args[0].shape[:2] != self.queries:
            raise VideoLDMError("A node puts each frame's own keys or values in the place of the spatial "
                                "self-attention (Perturbed-Attention Guidance does). This network's self-attention "
                                f"sees {self.sees}. Remove that node.")


class FirstAndPrevious(RegroupedKeys):
    """Each frame sees the first frame and the one before."""

    whole = "the whole first and previous frame of each frame"
    sees = "the first and the previous frame, not the frame itself"

    def group(self, clips: Tensor) -> Tensor:
        first = clips[:, :1]
        return cat([first.expand_as(clips), cat([first, clips[:, :-1]], dim=1)], dim=2)


POOLED_NORMS = PooledNorms()
SPARSE_CAUSAL = SparseCausalAttention()
