"""The temporal layers of Stable Video Diffusion, as initial values for training (docs/formats.md#svd-layers).

On an image model these weights would give garbage without an error. They were trained with EDM scaling and
v-prediction, on a network that sees the first frame, together with fine-tuned spatial layers.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

from ..errors import VideoLDMError
from ..formats.files import TensorFile
from ..formats.temporal_file import Identified, require_one_dtype
from ..formats.tensor_names import Keys
from ..layers import Factory, TransformerParams
from ..params import StackParams
from ..spatial_names import RESBLOCK
from ..stack import TemporalStack
from ..unet_names import BLOCK, UNetNames
from . import video_ldm
from .family import Family

HEAD_DIM = 64           # channels of an attention head
ADVICE = ("On an image model its temporal layers would be silent garbage: they expect EDM noise scaling and an image "
          "as condition. Load the whole checkpoint with core's Image Only Checkpoint Loader (img2vid model).")
CONTEXT_DIM = 1024      # one CLIP image token
DIFFUSERS = r".*\.temporal_transformer_blocks\.\d+\.attn1\.to_q\."


def detect(keys: Keys, metadata: Mapping[str, str]) -> Identified | None:
    """Recognise SVD's UNet, whole or only its temporal part, in LDM's or diffusers' naming.

    No other file has temporal layers of this layout and text width without this pack's metadata.
    """
    if keys.has(DIFFUSERS) and keys.has(r".*\.time_mixer\.mix_factor"):
        whole = keys.has(r"conv_in\.")
        return identified("diffusers_svd_unet", whole, " in diffusers' naming")
    if not (keys.has(r".*\.time_stack\.0\.attn1\.to_q\.") and keys.has(r".*\.time_mixer\.mix_factor")):
        return None
    if keys.shape(r".*\.time_stack\.0\.attn2\.to_k\.weight")[1:] != (CONTEXT_DIM,):
        return Identified("video_ldm_bare", "temporal layers in the Video LDM layout without the metadata of this "
                          "pack's format", "Their heads, frames and noise schedule cannot be told from the tensors: "
                          "use the file as this pack wrote it, with its metadata.")
    if keys.shape(r"label_emb\.0\.0\.weight")[1:] in ((256,), (1280,)):
        return Identified("sv3d", "an SV3D checkpoint (image to orbit of views)", ADVICE)
    return identified("svd_unet", keys.has(r"input_blocks\.0\.0\."), "")


def identified(kind: str, whole: bool, naming: str) -> Identified:
    """What the file is. whole: it holds spatial layers too. naming: added to the title."""
    title = "a Stable Video Diffusion checkpoint" if whole else "the temporal part of Stable Video Diffusion"
    return Identified(kind, title + naming, ADVICE)


# Diffusers' names

WHERE = re.compile(BLOCK + r"(?P<kind>resnets|attentions)\.(?P<number>\d+)\.(?P<rest>.+)")
NAMES = UNetNames(resblocks=2)


def ldm_name(key: str) -> str | None:
    """LDM's name of a temporal key in diffusers' naming. None for a spatial key."""
    match = WHERE.fullmatch(key)
    if match is None:
        return None
    rest = re.sub(r"^temporal_res_block\.(\w+)\.", lambda m: f"time_stack.{RESBLOCK[m[1]]}.", match["rest"])
    rest = re.sub(r"^temporal_transformer_blocks\.", "time_stack.", rest)
    rest = re.sub(r"^time_pos_embed\.linear_([12])\.", lambda m: f"time_pos_embed.{2 * int(m[1]) - 2}.", rest)
    if not rest.startswith("time_"):
        return None
    return f"{NAMES.module(match['side'], int(match['level'] or 0), match['kind'], int(match['number']))}.{rest}"


def ldm_names(keys: Iterable[str]) -> dict[str, str]:
    """{LDM name: file key} of the temporal tensors. The file keys are in either naming."""
    names = {key: ldm_name(key) or key for key in keys}
    return {name: key for key, name in names.items() if video_ldm.parse(name)}


# Initial values

@dataclass
class Initialisation:
    """Initial values for training temporal layers."""

    tensors: dict[str, Tensor]      # by stack key
    fresh: list[str]                # stack keys that keep their fresh values
    notes: list[str]                # sentences for a report


def params_of(file: TensorFile) -> StackParams:
    """Params of SVD's own temporal layers. The tensors do not tell the frames, so 14 is taken (svd's)."""
    named = {name: file.shapes[key] for name, key in ldm_names(file.shapes).items()}
    heads = {key.removesuffix(".time_pos_embed.0.weight"): sum(shape[1:2]) // HEAD_DIM
             for key, shape in named.items() if key.endswith("time_pos_embed.0.weight")}
    try:
        bricks = video_ldm.bricks_of(named, heads)
    except (KeyError, ValueError, IndexError) as error:
        raise VideoLDMError(f"{file.name} looks like Stable Video Diffusion, but a layer lacks {error}. The file is "
                            "incomplete: download it again.") from None
    return StackParams("Stable Video Diffusion", bricks, 14, None)


def load_initialisation(file: TensorFile, params: StackParams) -> Initialisation:
    """The tensors of SVD that fit the layers to be trained. Raises VideoLDMError if none do."""
    found = detect(Keys(file.raw_shapes), file.metadata)
    if found is None or found.kind not in ("svd_unet", "diffusers_svd_unet"):
        raise VideoLDMError(f"{file.name} is no Stable Video Diffusion checkpoint, and nothing else is taken as a "
                            "start for training temporal layers. Choose svd.safetensors or svd_xt.safetensors.")
    own = params_of(file)
    stack_keys = video_ldm.stack_keys(names := ldm_names(file.shapes))
    fresh_stack = TemporalStack(params, Factory(device="meta"))
    wanted = {key: tuple(tensor.shape) for key, tensor in fresh_stack.state_dict().items()}
    fitting = {key: names[name] for key, name in stack_keys.items() if wanted.get(key) == file.shapes[names[name]]}
    if not fitting:
        raise VideoLDMError(f"Nothing of {file.name} (Stable Video Diffusion) fits the temporal layers to be "
                            "trained: they have other channels. Train on a Stable Diffusion 1.x or 2.x model, or "
                            "start from nothing.")
    read = file.read(fitting.values())
    tensors = {key: read[name] for key, name in fitting.items()}
    fresh = [key for key in wanted if key not in tensors]
    require_one_dtype(file.name, tensors)
    return Initialisation(tensors, fresh, notes_of(own, params, tensors, fresh))


def notes_of(own: StackParams, params: StackParams, tensors: Mapping[str, Tensor], fresh: list[str]) -> list[str]:
    """Sentences for the report. own: SVD's params. params: those of the layers to be trained."""
    notes = [f"{len(tensors)} of {len(tensors) + len(fresh)} tensors start from Stable Video Diffusion."]
    if fresh:
        notes.append(f"{len(fresh)} start fresh (the first: {fresh[0]}).")
    heads = {site: brick.heads for site, brick in own.bricks if isinstance(brick, TransformerParams)}
    if any(brick.heads != heads.get(site, brick.heads)
           for site, brick in params.bricks if isinstance(brick, TransformerParams)):
        notes.append("Its attentions had heads of 64 channels; these have others, so attention starts scrambled.")
    return notes


FAMILY = Family("Stable Video Diffusion", None, detect, None)
