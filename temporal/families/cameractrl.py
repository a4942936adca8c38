"""CameraCtrl for AnimateDiff v3: camera moves (docs/formats.md#cameractrl)."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..camera_control import HEADS, CameraControl, CameraParams
from ..errors import VideoLDMError
from ..formats.contents import first_line
from ..formats.files import TensorFile
from ..formats.temporal_file import Base, Identified, require_distinct, require_known, require_one_dtype, require_shapes
from ..formats.tensor_names import Keys
from ..layers import Factory, MotionParams
from ..params import StackParams
from ..slots import Site
from ..unet_names import UNetNames, resblocks_per_level
from .family import LOADERS, Family, require_weights
from .motion_modules import PE, check_tables, length_of

TITLE = "a CameraCtrl file (camera moves for AnimateDiff v3)"
BASE = Base("Stable Diffusion 1.x", 768)
LAYERS = "AnimateDiff v3"       # the temporal layers that it was trained with
FRAMES = 16                     # the length of its table of frame positions, where a file holds none
# What may stand before the names: the dictionaries of the authors' file, and the parts of the network that is saved
OUTER = re.compile(r"(?:(?:pose_encoder_state_dict|attention_processor_state_dict)[./])?"
                   r"(?:(?:module|unet|pose_encoder)\.)*")
MERGE = re.compile(r"(?P<side>down|up)_blocks\.(?P<level>\d+)\.motion_modules\.(?P<module>\d+)\.temporal_transformer\."
                   r"transformer_blocks\.0\.attention_blocks\.0\.processor\.qkv_merge\.(?P<rest>weight|bias)")
ENCODER = {"encoder_conv_in.": "conv_in.", "encoder_down_conv_blocks.": "blocks.",
           "encoder_down_attention_blocks.": "attentions."}
BLOCK = re.compile(r"blocks\.(\d+)\.(\d+)\.block1\.weight")


@dataclass
class CameraFile:
    """The content of a file."""

    name: str                       # the file's name
    params: CameraParams
    tensors: dict[str, Tensor]      # by the keys of CameraControl
    kind: str = "cameractrl"
    title: str = TITLE
    base: Base = BASE
    licence: str = "Apache-2.0"
    notes: list[str] = field(default_factory=list)

    @property
    def dtype(self) -> torch.dtype:
        return self.tensors["conv_in.weight"].dtype

    def misfit(self, layers: StackParams) -> str:
        """Why these temporal layers are not those that it was made for, as the end of a sentence. "": they are."""
        modules = {site: brick for site, brick in layers.bricks if isinstance(brick, MotionParams)}
        merges = {site: self.params.channels[level] for site, level in self.params.merges}
        other = any(brick.blocks != 1 or brick.table_length for brick in modules.values())
        if other or len(modules) < len(layers.bricks):
            return "they are no AnimateDiff motion modules of v3's kind"
        if layers.spatial or any(brick.norm_pooled for brick in modules.values()):
            return "their norms, or what they change in the image model, are not v3's"
        if modules.keys() > merges.keys():
            return "they have a motion module in the middle of the image model or in further places, where v3 has none"
        if {site: brick.channels for site, brick in modules.items()} != merges:
            return "their motion modules stand in other places or have other channels than v3's"
        return ""


def bare(key: str) -> str:
    """The name of a tensor without what stands before it."""
    match = OUTER.match(key)
    return key[match.end():] if match else key


def detect(keys: Keys, metadata: Mapping[str, str]) -> Identified | None:
    """Recognise a pose encoder with layers for motion modules, by their names."""
    if not keys.has(r".*encoder_down_conv_blocks\.\d+\.") or not keys.has(r".*motion_modules\..*\.qkv_merge\."):
        return None
    return Identified("cameractrl", TITLE, f"Load it with {LOADERS['camera']}.", "camera")


def load(file: TensorFile, found: Identified) -> CameraFile:
    """Load a file that `detect` has recognised. Raises VideoLDMError if it is damaged."""
    names = {key: bare(key) for key in file.shapes}
    merges = {key: match for key, name in names.items() if (match := MERGE.fullmatch(name))}
    unet = UNetNames(resblocks_per_level((match["side"], int(match["module"])) for match in merges.values()))
    tables = [key for key in file.shapes if key.endswith(PE) and names[key].startswith("encoder_")]
    own = {key: f"merges.{site_of(unet, match['side'], int(match['level']), int(match['module'])).name}.{match['rest']}"
           for key, match in merges.items()}
    own |= {key: name.replace(theirs, ours, 1) for key, name in names.items() for theirs, ours in ENCODER.items()
            if name.startswith(theirs) and key not in tables}
    require_known(file.name, TITLE, sorted(set(file.shapes) - {*own, *tables}))
    require_distinct(file.name, TITLE, ((name, key) for key, name in own.items()))
    require_weights(file, TITLE, (*own, *tables))
    check_tables(file, TITLE, tables)
    frames = length_of(file.name, TITLE, file.read(tables)) or FRAMES
    params = params_of(file, unet, {name: file.shapes[key] for key, name in own.items()}, frames)
    tensors = {own[key]: tensor for key, tensor in file.read(own).items()}
    require_one_dtype(file.name, tensors)
    return CameraFile(file.name, params, tensors)


def site_of(unet: UNetNames, side: str, level: int, module: int) -> Site:
    """The site of a motion module. side, level, module: its numbers in the file's names."""
    return Site(*unet.block(side, level, module), "post_attn")


def params_of(file: TensorFile, unet: UNetNames, shapes: Mapping[str, tuple], frames: int) -> CameraParams:
    """The params of a file, whose own layers have exactly these shapes.

    Args:
        file: the open file.
        unet: the numbering of the network's blocks.
        shapes: of its layers, by the keys of CameraControl.
        frames: the length of its table of frame positions.
    """
    looks = f"{file.name} looks like {TITLE}, but"
    found = [tuple(map(int, match.groups())) for match in map(BLOCK.fullmatch, shapes) if match]
    levels, blocks = (max((numbers[n] + 1 for numbers in found), default=0) for n in range(2))
    merged = [("down", unet.resblocks), ("up", unet.resblocks + 1)]
    if not levels * blocks or levels * (blocks + sum(count for _, count in merged)) > len(shapes):
        raise VideoLDMError(f"{looks} lacks blocks of its encoder, or its names number more layers than it holds "
                            "tensors. The file is incomplete or damaged: download it again.")
    channels = tuple(sum(shapes.get(f"blocks.{level}.0.block1.weight", ())[:1]) for level in range(levels))
    merges = tuple((site_of(unet, side, level, module), level if side == "down" else levels - 1 - level)
                   for side, count in merged for level in range(levels) for module in range(count))
    params = CameraParams(channels, blocks, merges, frames)
    try:
        if not all(channels) or any(width % HEADS for width in channels):
            raise ValueError(f"its levels have {channels} channels")
        network = CameraControl(params, Factory(device="meta"))
        wanted = {key: tuple(tensor.shape) for key, tensor in network.state_dict().items()}
    except (ValueError, RuntimeError, TypeError, ArithmeticError) as error:
        raise VideoLDMError(f"{looks} no network has its sizes ({first_line(error)}). The file is damaged or from an "
                            "unknown variant.") from None
    require_shapes(file.name, TITLE, wanted, shapes)
    return params


FAMILY = Family("CameraCtrl for AnimateDiff v3", "camera", detect, load)
