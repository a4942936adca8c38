"""What a family of files is: how it is told, how it is read, and what its authors say of it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..formats.files import TensorFile
from ..formats.temporal_file import (
    Base,
    Identified,
    NoiseLevels,
    SamplerHint,
    Schedule,
    TemporalFile,
    require_complete,
    require_one_dtype,
)
from ..formats.tensor_names import Keys
from ..layers import BrickParams
from ..params import StackParams
from ..slots import Site
from ..spatial_changes import SpatialChange

# What each node that loads files takes: {Identified.takes: the node's title}.
LOADERS = {"temporal": "Load Temporal Layers", "motion_lora": "Motion LoRA", "decoder": "Load Temporal Decoder",
           "layout": "Scene Layout", "video_model": "Load Video Model"}


@dataclass(frozen=True)
class Family:
    """A kind of file that the pack takes. FAMILIES (families/__init__.py) lists them all."""

    listed: str                     # how lists name its files, as in "AnimateDiff v1, v2 and v3 for SD 1.5"
    takes: str | None               # which node loads them: a key of LOADERS; None: none, they are only named
    detect: Callable[[Keys, Mapping[str, str]], Identified | None]      # None: a file of another kind
    load: Callable[[TensorFile, Identified], Any] | None                # raises VideoLDMError for a damaged file
    spatial_weights: bool = False   # the file's spatial weights belong to its layers: a whole video network


@dataclass(frozen=True)
class Facts:
    """What a published set of temporal layers brings besides its weights."""

    family: str                                 # its name in sentences
    title: str                                  # what it is, with an article
    base: Base
    schedule: Schedule
    frames: int                                 # of the clips it was trained on
    licence: str
    fps: float | None = None                    # frames per second of the clips it makes
    positions: int | None = None                # frames of its position table, where the file has none
    spatial: tuple[SpatialChange, ...] = ()     # what it changes in the spatial network
    notes: tuple[str, ...] = ()                 # sentences for the report
    hint: SamplerHint | None = None
    noise: NoiseLevels | None = None

    def identified(self, kind: str) -> Identified:
        return Identified(kind, self.title, f"Load it with {LOADERS['temporal']}.", takes="temporal")

    def stack_params(self, bricks: tuple[tuple[Site, BrickParams], ...], positions: int | None) -> StackParams:
        return StackParams(self.family, bricks, self.frames, positions, self.spatial)

    def temporal_file(self, file: TensorFile, kind: str, params: StackParams, tensors: dict[str, Tensor],
                      notes: tuple[str, ...] = ()) -> TemporalFile:
        """The content of a file; refused where its tensors are not exactly the layers' or mix types."""
        require_complete(file.name, self.title, params, tensors)
        require_one_dtype(file.name, tensors)
        return TemporalFile(file.name, kind, self.title, params, tensors, self.schedule, self.base, self.fps,
                            self.licence, dict(file.metadata), [*self.notes, *notes], self.hint, self.noise)
