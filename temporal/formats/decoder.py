"""Temporal decoders: Stable Video Diffusion's in all published forms, and those trained with this pack.

Internally and in files of this pack, names are those of the public SVD decoder after `decoder.`
(docs/formats.md#svd-decoder): `mid.block_1.conv1`, `mid.block_1.time_stack.in_layers.2`, `mid.block_1.mix_factor`,
`conv_out.time_mix_conv`.

A file holds the whole decoder, because the spatial layers are fine-tuned with the temporal ones. It also holds
`post_quant_conv` if the decoder was trained with one (SVD's was not). Sizes follow from shapes. The metadata of a file
of this pack:

    format, version         other versions than VERSION are refused
    latents                 the image model whose latents it decodes
    frames, fps             of the clips that it was trained on
    licence

Other entries of the metadata are kept unchanged.
"""

import math
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..atomic import StrPath, write_atomically
from ..decoder import GROUPS, KERNELS, DecoderParams
from ..errors import VideoLDMError
from .contents import first_line
from .files import TensorFile
from .metadata import MOST_FRAMES, MetadataError, fps_of, shown, text_of, whole
from .temporal_file import DEMO, Identified, require_known, require_one_dtype
from .tensor_names import Keys

FORMAT = "video_ldm_temporal_decoder"
VERSION = 1
TITLE = "a temporal decoder written by this pack"
SVD = "the temporal decoder of Stable Video Diffusion (a VAE)"
SVD_LATENTS = "Stable Diffusion 1.x and 2.x"
SVD_LICENCE = "Stability AI's community licence"
SVD_FRAMES = 14         # decoded together in its authors' scripts
RESERVED = ("format", "version", "latents", "frames", "fps", "licence")
REQUIRED = ("version", "latents", "frames")
PREFIXES = ("first_stage_model.", "vae.", "")       # in front of a VAE's keys: within a checkpoint, or alone
ADVICE = "Load it with Load Temporal Decoder."


@dataclass
class DecoderFile:
    """The content of a file with a temporal decoder."""

    name: str                                                   # the file's name
    kind: str                                                   # as in Identified
    title: str                                                  # as in Identified
    params: DecoderParams
    tensors: dict[str, Tensor]                                  # by the keys of TemporalDecoder
    post_quant: dict[str, Tensor]                               # weight and bias of post_quant_conv. Empty: it has none
    latents: str                                                # the image model whose latents it decodes
    frames: int                                                 # length of the clips it was trained on
    fps: float | None = None                                    # frame rate of these clips. None: not stated
    licence: str = ""
    metadata: dict[str, str] = field(default_factory=dict)      # the file's metadata, unchanged

    @property
    def dtype(self) -> torch.dtype:
        return self.tensors["conv_in.weight"].dtype

    def check_vae(self, channels: int, factor: int, title: str) -> None:
        """Raise VideoLDMError for a VAE whose latents this decoder cannot decode.

        Args:
            channels: of the VAE's latents.
            factor: pixels per latent, along each side.
            title: the VAE's name, for the message.
        """
        for what, own, other in (("channels", self.params.latent_channels, channels),
                                 ("pixels per latent", self.params.factor, factor)):
            if own != other:
                raise VideoLDMError(f"{self.name} is {self.title} for latents of {own} {what}, and the connected VAE "
                                    f"({title}) has {other}. {self.wanted_vae()}, or choose another file.")

    def wanted_vae(self) -> str:
        """The beginning of a sentence that says which VAE to connect."""
        demo = DEMO in self.latents
        return "Connect the VAE of Load Demo Models" if demo else f"Connect a VAE for {self.latents}"


# Names

RESBLOCK = {"norm1": "in_layers.0", "conv1": "in_layers.2", "norm2": "out_layers.0", "conv2": "out_layers.3"}
ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
DIFFUSERS_TOP = {"conv_norm_out": "norm_out", "time_conv_out": "conv_out.time_mix_conv"}


def ldm_name(key: str, levels: int) -> str:
    """LDM's name of a decoder's key in diffusers' naming. Other keys are returned unchanged.

    In diffusers' naming up_blocks.0 is the coarsest level. In LDM's naming up.0 is the finest.
    """
    if match := re.fullmatch(r"mid_block\.attentions\.0\.(.+)\.(weight|bias)", key):
        return f"mid.attn_1.{ATTENTION.get(match[1], match[1])}.{match[2]}"
    if match := re.fullmatch(r"up_blocks\.(\d+)\.upsamplers\.0\.(.+)", key):
        return f"up.{levels - 1 - int(match[1])}.upsample.{match[2]}"
    if match := re.fullmatch(r"(?:up_blocks\.(\d+)|mid_block)\.resnets\.(\d+)\.(.+)", key):
        block = f"mid.block_{int(match[2]) + 1}" if match[1] is None else \
            f"up.{levels - 1 - int(match[1])}.block.{match[2]}"
        return f"{block}.{resblock_name(match[3])}"
    top, _, end = key.rpartition(".")
    return f"{DIFFUSERS_TOP.get(top, top)}.{end}"


def resblock_name(rest: str) -> str:
    """LDM's name for the rest of a ResBlock's key."""
    rest = rest.replace("conv_shortcut", "nin_shortcut").removeprefix("spatial_res_block.")
    rest = rest.removeprefix("time_mixer.")
    match = re.fullmatch(r"temporal_res_block\.(\w+)\.(\w+)", rest)
    return f"time_stack.{RESBLOCK.get(match[1], match[1])}.{match[2]}" if match else rest


def prefix_of(keys: Collection[str]) -> str | None:
    """The prefix in front of `decoder.` in a file's keys. None: the file holds no decoder."""
    return next((p for p in PREFIXES if any(key.startswith(f"{p}decoder.") for key in keys)), None)


def names_of(keys: Collection[str]) -> tuple[dict[str, str], dict[str, str]]:
    """{name: file key} of the decoder's tensors, and the same of post_quant_conv's."""
    prefix = prefix_of(keys) or ""
    inside = {key.removeprefix(f"{prefix}decoder."): key for key in keys if key.startswith(f"{prefix}decoder.")}
    if any(name.startswith("mid_block.") for name in inside):
        found = (re.match(r"up_blocks\.(\d+)\.", name) for name in inside)
        levels = 1 + max((int(match[1]) for match in found if match), default=0)
        inside = renamed(inside, lambda name: ldm_name(name, levels))
    inside = renamed(inside, lambda name: re.sub(r"^time_mix_conv\.", "conv_out.time_mix_conv.", name))
    quant = {part: f"{prefix}post_quant_conv.{part}" for part in ("weight", "bias")}
    return inside, {part: key for part, key in quant.items() if key in keys}


def renamed(names: Mapping[str, str], rule: Callable[[str], str]) -> dict[str, str]:
    """{name: file key} with other names. A name that another tensor has already stays, so that it is refused later."""
    found: dict[str, str] = {}
    for name, key in names.items():
        new = rule(name)
        found[name if new in found else new] = key
    return found


def detect(keys: Keys, metadata: Mapping[str, str]) -> Identified | None:
    """Recognise a temporal decoder in a file. The file may hold other tensors too."""
    if metadata.get("format") == FORMAT:
        return Identified("video_ldm_decoder", TITLE, ADVICE, takes="decoder")
    if keys.has(r"(?:first_stage_model\.|vae\.)?decoder\.mid\.block_1\.(?:mix_factor|time_stack\.)"):
        return Identified("svd_temporal_decoder", SVD, ADVICE, takes="decoder")
    if keys.has(r"(?:first_stage_model\.|vae\.)?decoder\.mid_block\.resnets\.0\.temporal_res_block\."):
        return Identified("diffusers_svd_temporal_decoder", f"{SVD} in diffusers' naming", ADVICE, takes="decoder")
    return None


# Sizes

def params_of(name: str, title: str, shapes: Mapping[str, tuple]) -> DecoderParams:
    """The params of a decoder, from shapes. Raises VideoLDMError if they do not describe a decoder."""
    try:
        levels = 1 + max(int(m[1]) for m in (re.match(r"up\.(\d+)\.block\.", key) for key in shapes) if m)
        widths = [shapes[f"up.{level}.block.0.conv1.weight"][0] for level in range(levels)]
        blocks = sum(bool(re.fullmatch(r"up\.0\.block\.\d+\.conv1\.weight", key)) for key in shapes)
        kernel = tuple(shapes["mid.block_1.time_stack.in_layers.2.weight"][2:])
        latent_channels, channels = shapes["conv_in.weight"][1], math.gcd(*widths)
    except (KeyError, ValueError, IndexError) as error:
        raise VideoLDMError(f"{name} looks like {title}, but lacks {first_line(error)}. The file is incomplete: "
                            "download or write it again.") from None
    if kernel not in KERNELS:
        raise VideoLDMError(f"{name} looks like {title}, but its kernel over time is {kernel}; this pack knows "
                            f"{' and '.join(map(str, KERNELS))}.")
    if any(not width or width % GROUPS for width in widths):
        raise VideoLDMError(f"{name} looks like {title}, but its levels have {widths} channels, which do not divide "
                            f"into {GROUPS} groups. The file is damaged or from an unknown variant.")
    return DecoderParams(latent_channels, channels, tuple(width // channels for width in widths), blocks - 1, kernel)


def shapes_of(params: DecoderParams) -> dict[str, tuple]:
    """{name: shape} of all tensors of a temporal decoder."""
    widths = [params.channels * mult for mult in params.channel_mult]
    shapes: dict[str, tuple] = {}
    width = widths[-1]

    def layer(name: str, *weight: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = weight, weight[:1]

    def block(name: str, before: int, after: int) -> None:
        for part, size in (("norm1", before), ("norm2", after)):
            layer(f"{name}.{part}", size)
        layer(f"{name}.conv1", after, before, 3, 3)
        layer(f"{name}.conv2", after, after, 3, 3)
        if before != after:
            layer(f"{name}.nin_shortcut", after, before, 1, 1)
        for part in ("in_layers", "out_layers"):
            layer(f"{name}.time_stack.{part}.0", after)
            layer(f"{name}.time_stack.{part}.{2 if part == 'in_layers' else 3}", after, after, *params.kernel)
        shapes[f"{name}.mix_factor"] = (1,)

    layer("conv_in", width, params.latent_channels, 3, 3)
    for number in (1, 2):
        block(f"mid.block_{number}", width, width)
    layer("mid.attn_1.norm", width)
    for part in ("q", "k", "v", "proj_out"):
        layer(f"mid.attn_1.{part}", width, width, 1, 1)
    for level in reversed(range(len(widths))):
        for number in range(params.num_res_blocks + 1):
            block(f"up.{level}.block.{number}", width, widths[level])
            width = widths[level]
        if level:
            layer(f"up.{level}.upsample.conv", width, width, 3, 3)
    layer("norm_out", width)
    layer("conv_out", 3, width, 3, 3)
    layer("conv_out.time_mix_conv", 3, 3, *params.kernel)
    return shapes


# Reading

def load(file: TensorFile, found: Identified) -> DecoderFile:
    """Load the decoder of a file that `detect` has recognised. Raises VideoLDMError if it is damaged."""
    own = found.kind == "video_ldm_decoder"
    origin = origin_of(file) if own else {"latents": SVD_LATENTS, "frames": SVD_FRAMES, "licence": SVD_LICENCE}
    names, quant = names_of(file.shapes)
    params = params_of(file.name, found.title, {name: file.shapes[key] for name, key in names.items()})
    read = file.read([*names.values(), *quant.values()])
    tensors = check_tensors(file.name, found.title, params, {name: read[key] for name, key in names.items()})
    post_quant = {part: read[key] for part, key in quant.items()} if own else {}
    channels = params.latent_channels
    if post_quant and {part: tuple(tensor.shape) for part, tensor in post_quant.items()} != {
            "weight": (channels, channels, 1, 1), "bias": (channels,)}:
        raise VideoLDMError(f"{file.name} looks like {found.title}, but its post_quant_conv does not fit its latents "
                            f"of {channels} channels. The file is damaged: download or write it again.")
    require_one_dtype(file.name, tensors | {f"post_quant_conv.{part}": value for part, value in post_quant.items()})
    return DecoderFile(file.name, found.kind, found.title, params, tensors, post_quant, metadata=dict(file.metadata),
                       **origin)


def origin_of(file: TensorFile) -> dict[str, Any]:
    """The metadata of a file of this pack: latents, frames, fps and licence. Raises VideoLDMError if it is unusable."""
    metadata, name = file.metadata, file.name
    missing = [entry for entry in REQUIRED if entry not in metadata]
    if missing:
        raise VideoLDMError(f"{name} is {TITLE} whose metadata lacks {', '.join(missing)}. Write it again with this "
                            "pack.")
    if metadata["version"] != str(VERSION):
        raise VideoLDMError(f"{name} is written in version {shown(metadata['version'])} of the format of temporal "
                            f"decoders; this pack reads version {VERSION}. Update the pack.")
    try:
        return {"latents": text_of(metadata["latents"], "latents"),
                "frames": whole(metadata["frames"], "frames", 1, MOST_FRAMES, text=True), "fps": fps_of(metadata),
                "licence": text_of(metadata.get("licence", ""), "licence")}
    except MetadataError as error:
        raise VideoLDMError(f"{name} is {TITLE} whose metadata cannot be read: {error}. Write it again with this "
                            "pack.") from None


def check_tensors(name: str, title: str, params: DecoderParams, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors in LDM's shapes. Raises VideoLDMError unless they are exactly those of a decoder.

    Diffusers' attention has linear weights, which become the 1x1 kernels of LDM's attention.
    """
    wanted = shapes_of(params)
    missing, surplus = [key for key in wanted if key not in tensors], [key for key in tensors if key not in wanted]
    if missing:
        raise VideoLDMError(f"{name} looks like {title}, but {len(missing)} of its {len(wanted)} tensors are missing "
                            f"(the first: {missing[0]}). The file is incomplete: download or write it again.")
    require_known(name, title, surplus, "such a decoder does")
    result = {}
    for key, shape in wanted.items():
        tensor = tensors[key]
        if len(shape) == 4 and shape[2:] == (1, 1) and tuple(tensor.shape) == shape[:2]:
            tensor = tensor[..., None, None]
        if tuple(tensor.shape) != shape:
            raise VideoLDMError(f"{name} looks like {title}, but {key} has shape {list(tensor.shape)} where "
                                f"{list(shape)} is due. The file is damaged or from an unknown variant.")
        result[key] = tensor
    return result


# Writing

def write(path: StrPath, tensors: Mapping[str, Tensor], params: DecoderParams, *, latents: str, frames: int,
          post_quant: Mapping[str, Tensor] | None = None, fps: float | None = None, licence: str = "",
          metadata: Mapping[str, str] | None = None) -> None:
    """Write a decoder to `path`, completely or not at all. The tensors keep their dtypes.

    Args:
        path: of the file.
        tensors: the state dict of a TemporalDecoder.
        params: of the decoder.
        latents: the image model whose latents it decodes.
        frames, fps: of the clips that it was trained on.
        post_quant: weight and bias of the convolution in front of it, if it has one.
        licence: of the weights.
        metadata: further entries, text to text.

    Raises VideoLDMError for an incomplete set of tensors, and ValueError for a further entry with one of the format's
    names.
    """
    check_tensors(Path(path).name, TITLE, params, dict(tensors))
    header = {"format": FORMAT, "version": str(VERSION), "latents": latents, "frames": str(frames), "licence": licence}
    if fps is not None:
        header["fps"] = str(fps)
    for entry, value in (metadata or {}).items():
        if entry in RESERVED:
            raise ValueError(f"metadata entry '{entry}' is the format's own: give it by its argument")
        header[entry] = str(value)
    named = {f"decoder.{key}": tensor for key, tensor in tensors.items()}
    named |= {f"post_quant_conv.{part}": tensor for part, tensor in (post_quant or {}).items()}
    named = {key: tensor.detach().to("cpu", copy=True).contiguous() for key, tensor in named.items()}
    write_atomically(path, lambda temporary: save_file(named, temporary, metadata=header))
