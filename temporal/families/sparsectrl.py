"""SparseCtrl for AnimateDiff v3: known frames as pictures (RGB) or as sketches (docs/formats.md#sparsectrl)."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..errors import VideoLDMError
from ..formats.contents import first_line
from ..formats.files import TensorFile
from ..formats.temporal_file import Base, Identified, require_distinct, require_known, require_one_dtype, require_shapes
from ..formats.tensor_names import Keys
from ..formats.video_network import SpatialWeights
from ..layers import Factory, MotionParams
from ..slots import Site
from ..sparse_control import LATENTS, PICTURES, SparseControlParams, SparseControlParts
from ..spatial_names import ldm_names, names_of_unet
from .family import LOADERS, Family, require_consecutive, require_weights
from .motion_modules import ANIMATEDIFF, PE, ModuleKey, brick_of, check_tables

MOTION = r"down_blocks\.\d+\.motion_modules\.\d+\.temporal_transformer\."
EMBEDDING = "controlnet_cond_embedding."
OWN = {EMBEDDING: "embedding.", "controlnet_down_blocks.": "zero_convs.", "controlnet_mid_block.": "middle_zero_conv."}
TITLES = {"sparsectrl_rgb": "an AnimateDiff SparseCtrl file for pictures (RGB)",
          "sparsectrl_scribble": "an AnimateDiff SparseCtrl file for sketches (scribble)"}
BASE = Base("Stable Diffusion 1.x", 768)
LAYERS = "AnimateDiff v3"       # the temporal layers that it was trained with
COLOURS = 3
RESBLOCK = re.compile(r"input_blocks\.(\d+)\.0\.in_layers\.0\.weight")
TEXT = re.compile(r".*\.attn2\.to_k\.weight")


@dataclass
class SparseControlFile(SpatialWeights):
    """The content of a file. The encoder's weights are read when they are needed."""

    name: str                           # the file's name
    kind: str                           # a key of TITLES
    params: SparseControlParams
    tensors: dict[str, Tensor]          # by the keys of SparseControlParts
    file: TensorFile
    spatial_names: Mapping[str, str]    # {name in LDM's UNet: the file's key} of the encoder's weights
    text_width: int | None              # of the text that it attends to
    base: Base = BASE
    licence: str = "Apache-2.0"
    notes: list[str] = field(default_factory=list)

    @property
    def title(self) -> str:
        return TITLES[self.kind]

    @property
    def dtype(self) -> torch.dtype:
        return self.tensors["middle_zero_conv.weight"].dtype

    def check_base(self, channels: tuple[int, ...], text_width: int | None, model: str) -> None:
        """Raise VideoLDMError for an image model that this file was not made for.

        Args:
            channels: of the model's input blocks and of its middle.
            text_width: the width of the model's text.
            model: the model's name, for the sentence.
        """
        made_for = f"{self.name} is {self.title}, made for {self.base.named}, and the connected MODEL is {model}"
        advice = f"Connect {self.base.source()}, with temporal layers on it."
        if self.text_width and text_width != self.text_width:
            raise VideoLDMError(f"{made_for}: its text has a width of {text_width} instead of {self.text_width}. "
                                f"{advice}")
        own = (*self.params.channels, self.params.middle_channels)
        if channels != own:
            raise VideoLDMError(f"{made_for}, whose blocks have other channels ({listed(channels)}, where this file "
                                f"has {listed(own)}). {advice}")


def listed(channels: tuple[int, ...]) -> str:
    """The channels of a few blocks."""
    return ", ".join(map(str, channels[:16])) + (", ..." if len(channels) > 16 else "")


def detect(keys: Keys, metadata: Mapping[str, str]) -> Identified | None:
    """Recognise a ControlNet with motion modules, by its names."""
    if not keys.has(MOTION) or not keys.has(re.escape(EMBEDDING)):
        return None
    kind = "sparsectrl_rgb" if keys.has(re.escape(EMBEDDING) + "weight") else "sparsectrl_scribble"
    return Identified(kind, TITLES[kind], f"Load it with {LOADERS['sparse_control']}.", "sparse_control")


def load(file: TensorFile, found: Identified) -> SparseControlFile:
    """Load a file that `detect` has recognised. Raises VideoLDMError if it is damaged."""
    title = TITLES[found.kind]
    spatial = ldm_names(file.shapes)
    modules = {key: ModuleKey(key, ANIMATEDIFF) for key in file.shapes if ANIMATEDIFF.pattern.fullmatch(key)}
    names = names_of_unet(file.shapes)
    tables = [key for key in modules if key.endswith(PE)]
    own = {key: f"motion.{module.site(names).index}.{module.suffix}" for key, module in modules.items()
           if key not in tables and module.side == "down"}
    own |= {key: key.replace(theirs, ours, 1) for key in file.shapes for theirs, ours in OWN.items()
            if key.startswith(theirs)}
    require_known(file.name, title, sorted(set(file.shapes) - {*own, *spatial.values(), *tables}))
    require_distinct(file.name, title, ((name, key) for key, name in own.items()))
    require_weights(file, title, (*own, *spatial.values(), *tables))
    shapes = {name: file.shapes[key] for name, key in spatial.items()}
    require_consecutive(file.name, title, shapes)
    check_tables(file, title, tables)
    params = params_of(file, found.kind, {name: file.shapes[key] for key, name in own.items()}, shapes)
    tensors = {own[key]: tensor for key, tensor in file.read(own).items()}
    require_one_dtype(file.name, tensors)
    widths = {(*shape, 0, 0)[1] for name, shape in shapes.items() if TEXT.fullmatch(name)}
    return SparseControlFile(file.name, found.kind, params, tensors, file, spatial, max(widths, default=None))


def params_of(file: TensorFile, kind: str, shapes: Mapping[str, tuple],
              spatial: Mapping[str, tuple]) -> SparseControlParams:
    """The params of a file, whose own layers have exactly these shapes.

    Args:
        file: the open file.
        kind: a key of TITLES.
        shapes: of its own layers, by the keys of SparseControlParts.
        spatial: of the encoder's weights, by name in LDM's UNet.
    """
    looks = f"{file.name} looks like {TITLES[kind]}, but"
    first = spatial.get("input_blocks.0.0.weight", ())
    convolutions = sum(name.startswith("zero_convs.") and name.endswith(".weight") for name in shapes)
    channels = tuple(sum(shapes.get(f"zero_convs.{n}.weight", ())[:1]) for n in range(convolutions))
    middle = sum(shapes.get("middle_zero_conv.weight", ())[:1])
    if len(first) != 4 or not channels or not all((*first, *channels, middle)):
        raise VideoLDMError(f"{looks} lacks its first convolution or the convolutions behind its blocks. The file is "
                            "incomplete: download it again.")
    motion = motion_of(file, TITLES[kind], shapes)
    due = {int(match[1]) for match in map(RESBLOCK.fullmatch, spatial) if match}
    if {block for block, _ in motion} != due:
        raise VideoLDMError(f"{looks} has motion modules after the input blocks {[block for block, _ in motion]} and "
                            f"ResBlocks in {sorted(due)}. The file is incomplete: download it again.")
    rgb = kind == "sparsectrl_rgb"
    widths = () if rgb else tuple(sum(shapes.get(f"embedding.{name}.weight", ())[:1]) for name in
                                  ("conv_in", "blocks.1", "blocks.3", "blocks.5"))
    params = SparseControlParams(LATENTS if rgb else PICTURES, first[1], first[1] if rgb else COLOURS, channels,
                                 middle, motion, widths)
    try:
        parts = SparseControlParts(params, Factory(device="meta"))
        wanted = {key: tuple(tensor.shape) for key, tensor in parts.state_dict().items()}
    except (ValueError, RuntimeError, TypeError, ArithmeticError) as error:
        raise VideoLDMError(f"{looks} no network has its sizes ({first_line(error)}). The file is damaged or from an "
                            "unknown variant.") from None
    require_shapes(file.name, TITLES[kind], wanted, shapes)
    return params


def motion_of(file: TensorFile, title: str, shapes: Mapping[str, tuple]) -> tuple[tuple[int, MotionParams], ...]:
    """(number of the input block, params) of each motion module. Arguments as in params_of."""
    modules: dict[int, dict[str, tuple]] = {}
    for name, shape in shapes.items():
        if name.startswith("motion."):
            _, block, suffix = name.split(".", 2)
            modules.setdefault(int(block), {})[suffix] = shape
    found = tuple((block, brick_of(file.name, title, Site("input", block, "post_attn"), modules[block], 0, False))
                  for block in sorted(modules))
    if sum(brick.blocks * max(brick.attentions, 1) for _, brick in found) > len(shapes):
        raise VideoLDMError(f"{file.name} looks like {title}, but its names number more layers than it holds tensors. "
                            "The file is damaged: download it again.")
    return found


FAMILY = Family("SparseCtrl for AnimateDiff v3, RGB and scribble", "sparse_control", detect, load)
