"""What a file of temporal layers says: the layers, and what they were trained for."""

from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import VideoLDMError
from ..layers import Factory
from ..params import StackParams
from ..slots import Site
from ..stack import TemporalStack
from .contents import WEIGHT_TYPES, first_line
from .metadata import shown


@dataclass(frozen=True)
class Identified:
    """What a file is, told by its keys and shapes."""

    kind: str
    title: str                  # with its article, as in "an AnimateDiff v2 motion module"
    place: str                  # a sentence that says where it belongs; "" for an unknown file
    takes: str | None = None    # which node loads it: a key of LOADERS (families/family.py); None: none


PREDICTIONS = ("eps", "v", "x0")


@dataclass(frozen=True)
class Schedule:
    """Noise schedule in ComfyUI's names: "linear" is evenly spaced in sqrt(beta), "sqrt_linear" in beta.

    prediction: "eps", "v", "x0", or None for the base model's own.
    """

    beta_schedule: str
    linear_start: float
    linear_end: float
    prediction: str | None = None


X4_UPSCALER, DEMO, DEMO_UPSCALER = "Stable Diffusion x4 upscaler", "Video LDM demo", "the Video LDM demo's upscaler"


class Base(NamedTuple):
    """The image model that the layers were trained on; context_dim is the width of its text, None where unknown."""

    family: str
    context_dim: int | None = None

    @property
    def named(self) -> str:
        """With the article that it has within a sentence."""
        return f"the {self.family}" if self.family in (X4_UPSCALER, DEMO) else self.family

    def source(self, output: str = "MODEL") -> str:
        """Where an artist gets the model's MODEL, CLIP or VAE."""
        if self.family == DEMO_UPSCALER and output == "MODEL":
            return "the MODEL of Load Video Model with video_ldm_driving_upscaler.safetensors"
        if self.family in (DEMO, DEMO_UPSCALER):
            return f"the {output} of Load Demo Models"
        if self.family == X4_UPSCALER:
            return f"the {output} of x4-upscaler-ema.safetensors from Load Checkpoint"
        article = "an" if self.family.startswith("SD") else "a"     # an SDXL, a Stable Diffusion
        return f"the {output} of {article} {self.family} checkpoint"


@dataclass(frozen=True)
class SamplerHint:
    """How a distilled set of layers wants to be sampled; `model_sampling` in the words of ComfyUI's
    ModelSamplingDiscrete node, cfg and steps as (least, most)."""

    sampler: str
    model_sampling: str
    cfg: tuple[float, float]
    steps: tuple[int, int]


class NoiseLevels(NamedTuple):
    """Noise on the small frames for layers of an upscaler: who trained them, the most they know, and what is usual."""

    author: str
    most: int
    usual: int


@dataclass
class TemporalFile:
    """A set of temporal layers, ready for `TemporalStack(params).load_state_dict(tensors)`.

    notes: sentences for the node's report. fps: frames per second of the clips it makes, None where nobody says.
    """

    name: str
    kind: str
    title: str
    params: StackParams
    tensors: dict[str, Tensor]
    schedule: Schedule
    base: Base
    fps: float | None = None
    licence: str = ""
    metadata: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    hint: SamplerHint | None = None
    noise: NoiseLevels | None = None

    @property
    def dtype(self) -> torch.dtype:
        """The type of most of the weights."""
        elements = Counter()
        for tensor in self.tensors.values():
            elements[tensor.dtype] += tensor.numel()
        return elements.most_common(1)[0][0]

    def check_base(self, channels: Mapping[Site, int], context_dim: int | None, model: str):
        """Refuse an image model that these layers were not made for: channels at its sites, width of its text, name."""
        widths = {brick.context_dim for _, brick in self.params.bricks if hasattr(brick, "context_dim")}
        wanted = self.base.context_dim or next(iter(widths), None)
        made_for = f"{self.name} is {self.title}, made for {self.base.named}, and the connected MODEL is {model}"
        advice = f"Connect {self.base.source()}, or choose temporal layers for the model that you have."
        if wanted and wanted != context_dim:
            raise VideoLDMError(f"{made_for}: its text has a width of {context_dim} instead of {wanted}. {advice}")
        for site, brick in self.params.bricks:
            if site not in channels:
                raise VideoLDMError(f"{made_for}, which has no place for the layer {site.name}. {advice}")
            if brick.channels != channels[site]:
                raise VideoLDMError(f"{made_for}, which has {channels[site]} channels instead of {brick.channels} at "
                                    f"the layer {site.name}. {advice}")


def require_version(name: str, title: str, metadata: Mapping[str, str], known: int):
    """Refuse a file of another version of its format."""
    version = metadata.get("version")
    if version != str(known):
        raise VideoLDMError(f"{name} is {title} of version {shown(version)}, and this pack reads version {known}. "
                            "Update the pack.")


def require_complete(name: str, title: str, params: StackParams, tensors: Mapping[str, Tensor]):
    """Refuse a set of tensors that is not exactly the stack's: a layer missing, a tensor too many, a wrong shape."""
    # Each block, and each attention in it, has tensors of its own. Without that bound, a name with a large number in it would
    # build modules for ever.
    parts = sum(getattr(brick, "blocks", 1) * max(getattr(brick, "attentions", 1), 1) for _, brick in params.bricks)
    if parts > len(tensors):
        raise VideoLDMError(f"{name} looks like {title}, but its names number {shown(parts)} layers, and it holds "
                            f"{len(tensors)} tensors. The file is incomplete: download or write it again.")
    try:
        stack = TemporalStack(params, Factory(device="meta"))
        wanted = {key: tuple(tensor.shape) for key, tensor in stack.state_dict().items()}
    except (ValueError, RuntimeError, TypeError, ArithmeticError) as error:    # channels that do not divide into groups
        raise VideoLDMError(f"{name} looks like {title}, but no layer has its sizes ({first_line(error)}). The file is "
                            "damaged or from an unknown variant.") from None
    missing = [key for key in wanted if key not in tensors]
    if missing:
        raise VideoLDMError(f"{name} looks like {title}, but {len(missing)} of its {len(wanted)} tensors are "
                            f"missing (the first: {missing[0]}). The file is incomplete: download or write it again.")
    surplus = [key for key in tensors if key not in wanted]
    if surplus:
        raise VideoLDMError(f"{name} looks like {title}, but holds {len(surplus)} tensors that such layers do not "
                            f"have (the first: {surplus[0]}). It comes from a variant that this pack does not know.")
    for key, shape in wanted.items():
        if tuple(tensors[key].shape) != shape:
            raise VideoLDMError(f"{name} looks like {title}, but {key} has shape {list(tensors[key].shape)} where "
                                f"{list(shape)} is due. The file is damaged or from an unknown variant.")


def published_suffix(key: str) -> str:
    """What a stack key has in common across the sites."""
    return key.split(".", 2)[-1]


def require_one_dtype(name: str, tensors: Mapping[str, Tensor], kind=published_suffix):
    """Refuse weights that are no floating-point numbers, and one kind of tensor in two types."""
    found = defaultdict(dict)
    for key, tensor in tensors.items():
        if tensor.dtype not in WEIGHT_TYPES:
            raise VideoLDMError(f"{name} holds {key} as {dtype_name(tensor.dtype)}, which is not a floating-point "
                                "type that this pack computes with. Quantised files are not taken: use the float16 or "
                                "float32 file.")
        found[kind(key)].setdefault(tensor.dtype, key)
    for dtypes in found.values():
        if len(dtypes) > 1:
            (one, first), (other, second) = list(dtypes.items())[:2]
            raise VideoLDMError(f"{name} mixes types: {first} is {dtype_name(one)}, {second} is "
                                f"{dtype_name(other)}. It was put together or converted wrongly: convert the whole "
                                "file to one type, or download it again.")


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
