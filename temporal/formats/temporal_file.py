"""The content of a file of temporal layers, and checks that all such files need."""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from ..diffusion import DataScale
from ..errors import VideoLDMError
from ..layers import Factory
from ..params import StackParams
from ..slots import Site
from ..stack import TemporalStack
from .contents import WEIGHT_TYPES, first_line
from .metadata import shown


@dataclass(frozen=True)
class Identified:
    """What a file is, found from the names and shapes of its tensors."""

    kind: str                   # a short name, as in "animatediff_v2"
    title: str                  # with an article, as in "an AnimateDiff v2 motion module"
    advice: str                 # a sentence that says where it belongs; "" for an unknown file
    takes: str | None = None    # the node that loads it, a key of LOADERS (families/family.py). None: no node does
    also: str | None = None     # a second node that loads a part of it, a key of LOADERS
    not_alone: str = ""         # why Load Temporal Layers does not take a whole network's layers, as a sentence


PREDICTIONS = ("eps", "v", "x0")


@dataclass(frozen=True)
class Schedule:
    """A noise schedule, in ComfyUI's names."""

    beta_schedule: str              # "linear": evenly spaced in sqrt(beta). "sqrt_linear": evenly spaced in beta
    linear_start: float             # the first beta
    linear_end: float               # the last beta
    prediction: str | None = None   # "eps", "v" or "x0". None: that of the image model
    scale: DataScale | None = None  # the factor on the clean latents. None: there is none


X4_UPSCALER, DEMO, DEMO_UPSCALER = "Stable Diffusion x4 upscaler", "Video LDM demo", "the Video LDM demo's upscaler"


class Base(NamedTuple):
    """The image model that temporal layers were trained on."""

    family: str                         # its name, as in "Stable Diffusion 1.x"
    context_dim: int | None = None      # the width of its text. None: unknown

    @property
    def named(self) -> str:
        """The name with the article that it needs in a sentence."""
        return f"the {self.family}" if self.family in (X4_UPSCALER, DEMO) else self.family

    def source(self, output: str = "MODEL") -> str:
        """Where the artist gets the model's MODEL, CLIP or VAE, as part of a sentence."""
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
    """The sampling settings that a distilled set of layers needs."""

    sampler: str
    model_sampling: str         # a value of ComfyUI's node ModelSamplingDiscrete. "": it does without the node
    cfg: tuple[float, float]    # lowest, highest
    steps: tuple[int, int]      # fewest, most
    scheduler: str = ""         # "": any

    def sentence(self) -> str:
        """The settings as a sentence for the report."""
        node = f" and ModelSamplingDiscrete set to {self.model_sampling}" if self.model_sampling else ""
        scheduler = f", scheduler {self.scheduler}" if self.scheduler else ""
        steps = span(*self.steps)
        return (f"Sample with {self.sampler}{node}{scheduler}, cfg {span(*self.cfg)}, {steps} "
                f"step{'s' * (steps != '1')}.")


def span(lowest: float, highest: float) -> str:
    """Two numbers as in "4 to 8", and equal ones as one."""
    return f"{lowest:g}" if lowest == highest else f"{lowest:g} to {highest:g}"


class NoiseLevels(NamedTuple):
    """The noise levels of small frames that an upscaler's layers were trained with."""

    author: str     # who trained the layers
    most: int       # the highest level in training
    usual: int      # the level that the authors sample with


@dataclass
class TemporalFile:
    """A set of temporal layers, ready for `TemporalStack(params).load_state_dict(tensors)`."""

    name: str                                                   # the file's name
    kind: str                                                   # as in Identified
    title: str                                                  # as in Identified
    params: StackParams
    tensors: dict[str, Tensor]                                  # by the keys of TemporalStack
    schedule: Schedule
    base: Base
    fps: float | None = None                                    # frames per second of its clips. None: not stated
    licence: str = ""
    metadata: dict[str, str] = field(default_factory=dict)      # the file's metadata, unchanged
    notes: list[str] = field(default_factory=list)              # sentences for the node's report
    hint: SamplerHint | None = None
    noise: NoiseLevels | None = None                            # for layers of an upscaler
    norms: str = ""                                             # a sentence for the report: which frames norms see

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of most of the weights."""
        elements: Counter[torch.dtype] = Counter()
        for tensor in self.tensors.values():
            elements[tensor.dtype] += tensor.numel()
        return elements.most_common(1)[0][0]

    def check_base(self, channels: Mapping[Site, int], context_dim: int | None, model: str) -> None:
        """Raise VideoLDMError for an image model that these layers were not made for.

        Args:
            channels: the channels at each site of the model.
            context_dim: the width of the model's text.
            model: the model's name, for the sentence.
        """
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


def require_version(name: str, title: str, metadata: Mapping[str, str], supported: int) -> None:
    """Raise VideoLDMError for a file of another version of its format.

    Args:
        name: the file's name.
        title: what the file is, with an article.
        metadata: the file's metadata.
        supported: the version that the pack reads.
    """
    version = metadata.get("version")
    if version != str(supported):
        raise VideoLDMError(f"{name} is {title} of version {shown(version)}, and this pack reads version {supported}. "
                            "Update the pack.")


def require_complete(name: str, title: str, params: StackParams, tensors: Mapping[str, Tensor]) -> None:
    """Raise VideoLDMError unless the tensors are exactly those of the stack, in name and shape."""
    # Each block and each attention has tensors of its own, so there are no more parts than tensors. Without this check,
    # a name with a large number in it would build modules without end.
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
    require_shapes(name, title, wanted, {key: tuple(tensor.shape) for key, tensor in tensors.items()})


def require_shapes(name: str, title: str, wanted: Mapping[str, tuple], found: Mapping[str, tuple]) -> None:
    """Raise VideoLDMError unless a file's tensors are exactly those that its layers have, in name and shape.

    Args:
        name: the file's name.
        title: what the file is, with an article.
        wanted: shapes of the layers' tensors.
        found: shapes of the file's tensors.
    """
    missing = [key for key in wanted if key not in found]
    if missing:
        raise VideoLDMError(f"{name} looks like {title}, but {len(missing)} of its {len(wanted)} tensors are "
                            f"missing (the first: {missing[0]}). The file is incomplete: download or write it again.")
    require_known(name, title, [key for key in found if key not in wanted], "such layers do")
    for key, shape in wanted.items():
        if found[key] != shape:
            raise VideoLDMError(f"{name} looks like {title}, but {key} has shape {list(found[key])} where "
                                f"{list(shape)} is due. The file is damaged or from an unknown variant.")


def require_known(name: str, title: str, surplus: Sequence[str], owner: str = "it does") -> None:
    """Raise VideoLDMError if a file holds tensors that such files do not have.

    Args:
        name: the file's name.
        title: what the file is, with an article.
        surplus: the names of these tensors.
        owner: what lacks them, for the sentence: "such layers do".
    """
    if surplus:
        raise VideoLDMError(f"{name} looks like {title}, but holds {len(surplus)} tensors that {owner} not have (the "
                            f"first: {surplus[0]}). It comes from a variant that this pack does not know.")


def require_distinct(name: str, title: str, pairs: Iterable[tuple[str, str]]) -> None:
    """Raise VideoLDMError for two keys of a file that mean the same tensor, as in down_blocks.0 and down_blocks.00.

    Args:
        name: the file's name.
        title: what the file is, with an article.
        pairs: (the pack's name of a tensor, the file's key) of all tensors.
    """
    first: dict[str, str] = {}
    for own, key in pairs:
        if first.setdefault(own, key) != key:
            raise VideoLDMError(f"{name} looks like {title}, but its {shown(first[own], 120)} and {shown(key, 120)} "
                                "are the same tensor. It comes from a variant that this pack does not know.")


def published_suffix(key: str) -> str:
    """The part of a stack key that is the same at all sites."""
    return key.split(".", 2)[-1]


def require_one_dtype(name: str, tensors: Mapping[str, Tensor],
                      kind: Callable[[str], str] = published_suffix) -> None:
    """Raise VideoLDMError for weights that are not floating-point, and for tensors of one kind in two dtypes.

    kind: the kind of a tensor, from its key.
    """
    found: defaultdict[str, dict[torch.dtype, str]] = defaultdict(dict)
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
    """A dtype as a sentence shows it, as in "float16"."""
    return str(dtype).removeprefix("torch.")
