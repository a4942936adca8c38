"""The params of a set of temporal layers: everything that rebuilds it except the weights."""

from dataclasses import dataclass

from .fps_embedding import FpsEmbedding
from .layers import BrickParams
from .picture_input import PictureParams
from .slots import Site
from .spatial_changes import POOLED_NORMS, SpatialChange

# The sets of context frames that layers are trained for
FIRST_FRAMES = ((), (0,), (0, 1))       # prediction: none, the first, or the first two (docs/papers.md#prediction)
BOTH_ENDS = ((0, -1),)                  # interpolation: the two key frames (docs/papers.md#interpolation)


@dataclass(frozen=True)
class ContextParams:
    """The input for context frames of prediction and interpolation layers."""

    channels: int           # channels of context that each temporal ResBlock receives
    latent_channels: int    # channels of the latents z. c_S has one more, the mask
    levels: int             # number of resolutions of the network
    # The sets of context frames that the layers were trained for. A set holds frame numbers from 0. Negative numbers
    # count from the end. The empty set is a clip without context frames.
    positions: tuple[tuple[int, ...], ...]

    @property
    def in_channels(self) -> int:
        """Channels of c_S."""
        return self.latent_channels + 1

    @property
    def from_noise(self) -> bool:
        """Whether the layers were trained to make clips without context frames too."""
        return () in self.positions


@dataclass(frozen=True)
class SmallFramesParams:
    """The input for small frames of an upscaler's layers (Video LDM, Table 6: dim c_S 3).

    The small frames are the last `in_channels` channels of the network's own input.
    """

    channels: int           # channels of context that each temporal ResBlock receives
    levels: int             # number of resolutions of the network
    in_channels: int = 3    # channels of the small frames


def is_trained(trained: tuple[tuple[int, ...], ...] | None, known: set[int], frames: int) -> bool:
    """Whether a set of known frames is among those trained for.

    Args:
        trained: the sets, as in ContextParams. None: any set.
        known: frame numbers from 0.
        frames: of the clip.
    """
    return trained is None or any(known == {p % frames for p in candidate} for candidate in trained)


def listed(trained: tuple[tuple[int, ...], ...] | None) -> str:
    """The sets of known frames that layers were trained for, in words."""
    return "; ".join(", ".join(map(str, candidate)) or "none" for candidate in trained or ())


MASK_FIRST, MASK_LAST, COPIES = "mask, latents", "latents, mask", "copies"     # forms of InputFramesParams
GREY, ZEROS = "grey", "zeros"                                                   # fillers of InputFramesParams


@dataclass(frozen=True)
class InputFramesParams:
    """Known frames through further channels of the network's own input. They follow the noisy latents.

    In the forms with a mask, the known frames stand at their places and the other frames hold a filler. In the form
    COPIES every frame has the latents of a key frame, and there is no mask.
    """

    form: str                   # MASK_FIRST (SEINE), MASK_LAST (Video LDM, appendix H.2) or COPIES (LaVie)
    given: float = 1.0          # the mask's value at a known frame. The other frames have 1 - given
    filler: str = ZEROS         # GREY: unknown frames hold the encoding of mid-grey. ZEROS: they hold zeros
    latent_channels: int = 4    # channels of the latents
    # The sets of known frames that the network was trained for, as in ContextParams. None: any set.
    positions: tuple[tuple[int, ...], ...] | None = None

    @property
    def channels(self) -> int:
        """The further channels of the network's input."""
        return self.latent_channels + (self.form != COPIES)

    @property
    def from_noise(self) -> bool:
        """Whether the network was trained to make clips without known frames too."""
        return self.form != COPIES and (self.positions is None or () in self.positions)


IN_PLACE, HINT = "in place", "hint"     # forms of PlacedFramesParams


@dataclass(frozen=True)
class PlacedFramesParams:
    """Known frames in the input of the image model, for layers that were trained to find them there.

    Clips without known frames run too. Then nothing is placed.
    """

    # IN_PLACE (MuseV): the known frames take the places of their noisy latents, without noise. HINT (makeavid-sd): the
    # further channels of an inpainting model hold the first frame, in every frame, and its mask is 0 everywhere
    form: str
    # The sets of known frames that the layers were trained for, as in ContextParams
    positions: tuple[tuple[int, ...], ...] = ((0,),)

    @property
    def from_noise(self) -> bool:
        """Whether the layers were trained to make clips without known frames too. Their authors do not say so."""
        return False


@dataclass(frozen=True)
class StackParams:
    """The params of a set of temporal layers."""

    family: str                                                 # its name in sentences, as in "AnimateDiff v2"
    bricks: tuple[tuple[Site, BrickParams], ...]                # the layers, in the order they run
    frames: int                                                 # length of the clips that it was trained on
    positions: int | None                                       # frame positions it was trained with. None: no limit
    spatial: tuple[SpatialChange, ...] = ()                     # its changes of the spatial network
    context: ContextParams | SmallFramesParams | None = None    # its input for context frames or small frames
    fps_width: int = 0                                          # width of its frame-rate token. 0: it has none
    shared_noise: bool = False                                  # True: an upscaler that uses one noise for all frames
    input_frames: InputFramesParams | None = None               # further channels of the network's own input
    placed_frames: PlacedFramesParams | None = None             # known frames in the image model's input
    frame_width: int = 0                                        # width of its embedding of frame numbers. 0: none
    image_alone: bool = False       # True: a clip of one frame is the image model's, bit for bit
    picture: PictureParams | None = None                        # one given picture, through a change in `spatial`

    @property
    def known_positions(self) -> tuple[tuple[int, ...], ...] | None:
        """The sets of context frames that the layers were trained for. None for layers without context frames."""
        return self.context.positions if isinstance(self.context, ContextParams) else None

    @property
    def known_frames_inputs(self) -> tuple[ContextParams | InputFramesParams | PlacedFramesParams | PictureParams, ...]:
        """The inputs for known frames: of the layers, of their network, of the image model, and for a picture."""
        layers = (self.context,) if isinstance(self.context, ContextParams) else ()
        others = (self.input_frames, self.placed_frames, self.picture)
        return (*layers, *(takes for takes in others if takes is not None))

    @property
    def remakes_key_frames(self) -> bool:
        """Whether the network makes all frames of an interpolated clip anew, from copies of its key frames."""
        return self.input_frames is not None and self.input_frames.form == COPIES

    @property
    def takes_small_frames(self) -> bool:
        return isinstance(self.context, SmallFramesParams)

    @property
    def pool_spatial_norms(self) -> bool:
        return POOLED_NORMS in self.spatial

    @property
    def usual_fps(self) -> float | None:
        """The frame rate that a network is told by default. None: it is told none."""
        return next((change.usual for change in self.spatial if isinstance(change, FpsEmbedding)), None)

    @property
    def mix_length(self) -> int:
        """The length of the mix vector over time. If it is above 1, the layers run clips of this length only."""
        return max((getattr(params, "mix_length", 1) for _, params in self.bricks), default=1)

    @property
    def table_length(self) -> int:
        """The length of the learned position table. 0: there is none."""
        return max((getattr(params, "table_length", 0) for _, params in self.bricks), default=0)
