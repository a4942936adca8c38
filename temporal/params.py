"""Everything that rebuilds a set of temporal layers, weights apart."""

from dataclasses import dataclass

from .layers import BrickParams
from .slots import Site
from .spatial_changes import POOLED_NORMS, SpatialChange

FIRST_FRAMES = ((), (0,), (0, 1))       # of prediction layers: no, one or two first frames (docs/papers.md#prediction)
BOTH_ENDS = ((0, -1),)                  # of interpolation layers: the two key frames (docs/papers.md#interpolation)


@dataclass(frozen=True)
class ContextParams:
    """The input for context frames of prediction and interpolation layers."""

    channels: int                               # of context that each temporal ResBlock receives
    latent_channels: int                        # of z; c_S has one more, the mask
    levels: int                                 # resolutions of the network
    positions: tuple[tuple[int, ...], ...]      # the sets of context frames that the layers were trained for: numbers
    #                                             from 0, from the end where negative; () is a clip from noise alone

    @property
    def in_channels(self) -> int:
        return self.latent_channels + 1

    @property
    def from_noise(self) -> bool:
        return () in self.positions


@dataclass(frozen=True)
class SmallFramesParams:
    """The input for small frames of an upscaler's layers (Table 6: dim c_S 3).

    The small frames are those that the network itself is given: the last `in_channels` channels of its input.
    """

    channels: int           # of context that each temporal ResBlock receives
    levels: int             # resolutions of the network
    in_channels: int = 3


@dataclass(frozen=True)
class StackParams:
    """A set of temporal layers."""

    family: str                                                 # its name in sentences, as in "AnimateDiff v2"
    bricks: tuple[tuple[Site, BrickParams], ...]                # the layers, in the order they run
    frames: int                                                 # of the clips it was trained on
    positions: int | None                                       # frames of its position table; None: computed
    spatial: tuple[SpatialChange, ...] = ()                     # what it changes in the spatial network
    context: ContextParams | SmallFramesParams | None = None    # the input for context or small frames
    fps_width: int = 0                                          # of the token that tells the frame rate; 0: none
    shared_noise: bool = False      # an upscaler's layers, to be run with one noise for all frames of a clip

    @property
    def known_positions(self) -> tuple[tuple[int, ...], ...] | None:
        """The sets of context frames that the layers were trained for; None where they take none."""
        return self.context.positions if isinstance(self.context, ContextParams) else None

    @property
    def takes_small_frames(self) -> bool:
        return isinstance(self.context, SmallFramesParams)

    @property
    def pool_spatial_norms(self) -> bool:
        return POOLED_NORMS in self.spatial

    @property
    def mix_length(self) -> int:
        """Length of the mix over time: 1, or the only clip length that the layers can run."""
        return max((getattr(params, "mix_length", 1) for _, params in self.bricks), default=1)

    @property
    def table_length(self) -> int:
        """Length of the learned position table, 0 without one."""
        return max((getattr(params, "table_length", 0) for _, params in self.bricks), default=0)
