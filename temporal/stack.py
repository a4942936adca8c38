"""A set of temporal layers with its weights."""

from torch import nn

from .clip_length import check_clip_length
from .layers import TORCH, ContextDownsampler, Factory, FpsToken, FrameEmbedding
from .params import StackParams


class TemporalStack(nn.Module):
    """The layers of a set, by site.

    The state-dict keys of the layers are `layers.<site name>.<published suffix>`. Some sets also have
    `context_downsampler.*`, `fps_token.*`, `frame_embedding.*` and `spatial.<number>.*`.
    """

    def __init__(self, params: StackParams, make: Factory = TORCH) -> None:
        super().__init__()
        self.params = params
        self.layers = nn.ModuleDict({site.name: brick.build(make) for site, brick in params.bricks})
        context = params.context
        if context is not None:
            self.context_downsampler = ContextDownsampler(context.in_channels, context.channels, context.levels, make)
        if params.fps_width:
            self.fps_token = FpsToken(params.fps_width, make)
        if params.frame_width:
            self.frame_embedding = FrameEmbedding(params.frame_width, make)
        changes = {str(n): change.build(make) for n, change in enumerate(params.spatial)}
        self.spatial = nn.ModuleDict({n: weights for n, weights in changes.items() if weights is not None})

    def check_frames(self, frames: int) -> str | None:
        """Check a clip length. Returns a warning for a length beyond the layers' training, else None.

        Raises VideoLDMError for a length that the layers cannot run.
        """
        params = self.params
        check_clip_length(params, frames, "the clip has",
                          "Set the number of frames to {limit}, or connect Frame Windows for more.")
        if params.positions is not None and frames > params.positions:
            return (f"{frames} frames exceed the {params.positions} positions that these {params.family} layers were "
                    f"trained with ({params.frames}-frame clips): positions are computed beyond the table, and motion "
                    "may degrade. Frame Windows keeps to the trained length.")
        return None
