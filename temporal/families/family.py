"""A family of files: how it is recognised, how it is loaded, and facts from its authors."""

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from ..errors import VideoLDMError
from ..formats.contents import WEIGHT_TYPES
from ..formats.files import TensorFile
from ..formats.temporal_file import (
    Base,
    Identified,
    NoiseLevels,
    SamplerHint,
    Schedule,
    TemporalFile,
    dtype_name,
    require_complete,
    require_distinct,
    require_known,
    require_one_dtype,
)
from ..formats.tensor_names import Keys
from ..formats.video_network import Heads, TextEncoder, VideoNetwork
from ..layers import BrickParams
from ..params import InputFramesParams, PlacedFramesParams, StackParams
from ..picture_input import PictureParams
from ..slots import Site, run_order
from ..spatial_changes import SpatialChange
from ..spatial_names import places

# The nodes that load files: {Identified.takes: the node's title}
LOADERS = {"temporal": "Load Temporal Layers", "motion_lora": "Motion LoRA", "decoder": "Load Temporal Decoder",
           "layout": "Scene Layout", "video_model": "Load Video Model", "pvdm": "Load PVDM",
           "sparse_control": "Load SparseCtrl", "camera": "Camera Motion"}


NUMBERED = re.compile(r"(?:input_blocks|middle_block|output_blocks|transformer_blocks)\.(\d+)\.")     # in LDM's names


@dataclass(frozen=True)
class Family:
    """A kind of file that the pack takes. FAMILIES (families/__init__.py) lists them all."""

    listed: str                     # the name of its files in lists, as in "AnimateDiff v1, v2 and v3 for SD 1.5"
    takes: str | None               # the node that loads them, a key of LOADERS. None: they are only recognised
    # From the file's tensors and its metadata. Returns None for a file of another kind.
    detect: Callable[[Keys, Mapping[str, str]], Identified | None]
    # Raises VideoLDMError for a damaged file. None: the files are only recognised.
    load: Callable[[TensorFile, Identified], Any] | None


@dataclass(frozen=True)
class Facts:
    """Facts about a published set of temporal layers that its file does not hold."""

    family: str                                 # its name in sentences
    title: str                                  # what it is, with an article
    base: Base                                  # the image model it was trained on
    schedule: Schedule                          # the noise schedule it was trained with
    frames: int                                 # length of the clips it was trained on
    licence: str
    fps: float | None = None                    # frames per second of the clips it makes. None: not stated
    positions: int | None = None                # length of its position table, if the file does not hold the table
    spatial: tuple[SpatialChange, ...] = ()     # its changes of the spatial network
    notes: tuple[str, ...] = ()                 # sentences for the report
    hint: SamplerHint | None = None             # sampling settings that it needs
    noise: NoiseLevels | None = None            # for layers of an upscaler
    input_frames: InputFramesParams | None = None   # known frames through its network's own input. None: it takes none
    placed_frames: PlacedFramesParams | None = None     # known frames in the image model's input. None: it takes none
    image_alone: bool = False                   # whether a clip of one frame is the image model's
    norms: str = ""                             # a sentence for the report on which frames its norms see
    picture: PictureParams | None = None        # one given picture, through a change in `spatial`. None: it takes none

    def identified(self, kind: str, takes: str = "temporal", also: str | None = None) -> Identified:
        """The result of detection. takes, also: as in Identified."""
        return Identified(kind, self.title, f"Load it with {LOADERS[takes]}.", takes, also)

    def stack_params(self, bricks: tuple[tuple[Site, BrickParams], ...], positions: int | None) -> StackParams:
        """Params of the layers. positions: the length of the position table. None: no limit."""
        return StackParams(self.family, bricks, self.frames, positions, self.spatial, input_frames=self.input_frames,
                           placed_frames=self.placed_frames, image_alone=self.image_alone, picture=self.picture)

    def temporal_file(self, file: TensorFile, kind: str, params: StackParams, tensors: dict[str, Tensor],
                      notes: tuple[str, ...] = ()) -> TemporalFile:
        """The content of a file.

        Args:
            file: the open file.
            kind: as in Identified.
            params: of its layers.
            tensors: by stack key.
            notes: further sentences for the report.

        Raises VideoLDMError if the tensors are not exactly those of the layers, or mix dtypes.
        """
        require_complete(file.name, self.title, params, tensors)
        require_one_dtype(file.name, tensors)
        return TemporalFile(file.name, kind, self.title, params, tensors, self.schedule, self.base, self.fps,
                            self.licence, dict(file.metadata), [*self.notes, *notes], self.hint, self.noise,
                            self.norms)


@dataclass(frozen=True)
class NetworkFacts:
    """Facts about a published video network that its file does not hold."""

    facts: Facts                # about its temporal layers
    text: TextEncoder
    heads: Heads                # of the spatial transformers
    # Why its temporal layers do not work on an image model, as a sentence. "": they do
    not_alone: str = ""
    slots: tuple[str, ...] = ()     # slots in which it surely has layers. A file without them is incomplete

    def identified(self, kind: str) -> Identified:
        """The result of detection."""
        found = self.facts.identified(kind, "video_model", None if self.not_alone else "temporal")
        return replace(found, not_alone=self.not_alone)

    def network(self, file: TensorFile, kind: str, params: StackParams, layer_names: Mapping[str, str],
                spatial_names: Mapping[str, str], unused: Iterable[str] = (),
                notes: tuple[str, ...] = ()) -> VideoNetwork:
        """The content of a file.

        Args:
            file: the open file.
            kind: as in Identified.
            params: of its temporal layers.
            layer_names: {file key: stack key} of the temporal layers' tensors.
            spatial_names: {name in LDM's UNet: file key} of the spatial weights.
            unused: file keys that are known and not needed.
            notes: further sentences for the report.

        Raises VideoLDMError for tensors that belong to neither part, for missing or incomplete temporal layers, and for
        spatial weights that are quantised.
        """
        known = {*layer_names, *spatial_names.values(), *unused}
        require_known(file.name, self.facts.title, sorted(set(file.shapes) - known))
        require_distinct(file.name, self.facts.title, ((own, key) for key, own in layer_names.items()))
        require_weights(file, self.facts.title, spatial_names.values())
        spatial = {name: file.shapes[key] for name, key in spatial_names.items()}
        require_consecutive(file.name, self.facts.title, spatial)
        self.check_text(file, spatial)
        self.check_layers(file, params, spatial)
        tensors = {layer_names[key]: tensor for key, tensor in file.read(layer_names).items()}
        layers = self.facts.temporal_file(file, kind, params, tensors, notes)
        return VideoNetwork(layers, file, dict(spatial_names), self.heads, self.text)

    def check_text(self, file: TensorFile, spatial: Mapping[str, tuple]) -> None:
        """Raise VideoLDMError for a network whose text has another width. spatial: as in check_layers."""
        for name, shape in spatial.items():
            if name.endswith(".attn2.to_k.weight") and shape[1:] != (self.text.width,):
                raise VideoLDMError(f"{file.name} looks like {self.facts.title}, but its text has a width of "
                                    f"{(*shape, 0, 0)[1]} where {self.text.width} is due ({self.text.name}). It comes "
                                    "from a variant that this pack does not know.")

    def check_layers(self, file: TensorFile, params: StackParams, spatial: Mapping[str, tuple]) -> None:
        """Raise VideoLDMError unless the temporal layers fit the network, and each place of their slots has one.

        spatial: shapes of the spatial weights, by name in LDM's UNet.
        """
        looks = f"{file.name} looks like {self.facts.title}, but"
        found = {site: brick.channels for site, brick in params.bricks}
        due = places(spatial, {site.slot for site in found} | set(self.slots))
        for site in sorted(due.keys() | found.keys(), key=run_order):
            if site not in found:
                raise VideoLDMError(f"{looks} its temporal layer {site.name} is missing. The file is incomplete: "
                                    "download it again.")
            if found[site] != due.get(site):
                raise VideoLDMError(f"{looks} its temporal layer {site.name} has {found[site]} channels where its "
                                    f"spatial layers have {due.get(site, 'no place for one')}. The file is damaged or "
                                    "from an unknown variant.")


def require_consecutive(name: str, title: str, spatial: Iterable[str]) -> None:
    """Raise VideoLDMError if the network's blocks are not numbered from 0 without a gap.

    Args:
        name: the file's name.
        title: what the file is, with an article.
        spatial: the names of the spatial weights in LDM's UNet.
    """
    numbers: defaultdict[str, set[int]] = defaultdict(set)
    for key in spatial:
        for match in NUMBERED.finditer(key):
            numbers[key[:match.start(1)]].add(int(match[1]))
    for place, found in numbers.items():
        if max(found) + 1 != len(found):
            raise VideoLDMError(f"{name} looks like {title}, but its {place.rstrip('.')} are numbered up to "
                                f"{max(found)}, and it holds {len(found)} of them. The file is incomplete or damaged: "
                                "download it again.")


def require_weights(file: TensorFile, title: str, keys: Iterable[str]) -> None:
    """Raise VideoLDMError for tensors that are no floating-point weights. They are not read."""
    for key in keys:
        if file.dtypes and file.dtypes[key] not in WEIGHT_TYPES:
            stored = file.dtypes[key]
            what = dtype_name(stored) if stored else "a type that this pack does not know"
            raise VideoLDMError(f"{file.name} looks like {title}, but holds {key} as {what}, which is not a "
                                "floating-point type that this pack computes with. Quantised files are not taken: use "
                                "the float16 or float32 file.")
