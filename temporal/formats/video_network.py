"""The content of a file with a whole video network: its own spatial weights and its temporal layers."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

from torch import Tensor

from .files import TensorFile
from .latents import LatentParams
from .temporal_file import TemporalFile


class TextEncoder(NamedTuple):
    """The text encoder that a network was trained with."""

    name: str       # as in "CLIP-L"
    source: str     # where the artist gets it, as part of a sentence: "the CLIP of a Stable Diffusion 1.x checkpoint"
    width: int      # the width of its text


CLIP_L = TextEncoder("CLIP-L", "the CLIP of a Stable Diffusion 1.x checkpoint", 768)
OPENCLIP_H = TextEncoder("OpenCLIP-H", "the CLIP of a Stable Diffusion 2.x checkpoint", 1024)


@dataclass(frozen=True)
class Heads:
    """The attention heads of the spatial transformers. One of the two is stated."""

    count: int | None = None    # heads of each attention
    width: int | None = None    # channels of each head


class SpatialWeights:
    """The spatial weights in an open file. They are read when they are needed."""

    file: TensorFile
    spatial_names: Mapping[str, str]    # {name in LDM's UNet: the file's key}

    @property
    def spatial_shapes(self) -> dict[str, tuple]:
        """Shapes of the spatial weights, by name in LDM's UNet."""
        return {name: self.file.shapes[key] for name, key in self.spatial_names.items()}

    def read_spatial(self) -> dict[str, Tensor]:
        """The spatial weights, by name in LDM's UNet."""
        tensors = self.file.read(self.spatial_names.values())
        return {name: tensors[key] for name, key in self.spatial_names.items()}


@dataclass
class VideoNetwork(SpatialWeights):
    """A whole video network. Its weights are read when they are needed."""

    layers: TemporalFile                # its temporal layers, its noise schedule, and facts about it
    file: TensorFile
    spatial_names: Mapping[str, str]    # {name in LDM's UNet: the file's key} of its spatial weights
    heads: Heads
    text: TextEncoder
    latents: LatentParams | None = None     # None: those of Stable Diffusion 1.x and 2.x

    def layers_alone(self) -> TemporalFile:
        """The temporal layers, for an image model. `Identified.not_alone` says for which files they are refused."""
        layers = self.layers
        # The image model predicts as it was trained to. Its own spatial layers do that.
        layers.schedule = replace(layers.schedule, prediction=None)
        layers.notes.append("Only its temporal layers are used. They were not trained together with this image model. "
                            "Load Video Model loads the whole network.")
        return layers
