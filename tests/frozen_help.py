"""Small files of makeavid-sd and MuseV, in their published names, for any small UNet of Stable Diffusion's kind."""

import re

import torch

from video_ldm.temporal.layers import (
    FrameConvParams,
    FrameResidualParams,
    WeightedConvParams,
    WeightedTransformerParams,
)
from video_ldm.temporal.params import StackParams
from video_ldm.temporal.slots import unet_sites
from video_ldm.temporal.stack import TemporalStack

RESBLOCK = {"in_layers.0": "norm1", "in_layers.2": "conv1", "emb_layers.1": "time_emb_proj", "out_layers.0": "norm2",
            "out_layers.3": "conv2", "skip_connection": "conv_shortcut"}
ENDS = {"input_blocks.0.0": "conv_in", "time_embed.0": "time_embedding.linear_1",
        "time_embed.2": "time_embedding.linear_2", "out.0": "conv_norm_out", "out.2": "conv_out"}
CONVOLUTION = re.compile(r"(conv_in|conv_out|.*\.conv1|.*\.conv2|.*\.conv_shortcut|.*samplers\.0\.conv)\.")
CONVOLUTIONS = {"post_conv1": "resnets.{}.conv1.", "post_conv2": "resnets.{}.conv2.",
                "post_shortcut": "resnets.{}.conv_shortcut."}
EMBEDDING = 256         # width of MuseV's embedding of frame numbers in small files


def place(part: str, index: int, depth: int) -> tuple[str, int]:
    """(diffusers' block, number of the module in it). depth: ResBlocks in a level of the input side."""
    if part == "middle":
        return "mid_block.", 0
    level, number = divmod(index - (part == "input"), depth + 1)
    return f"{'down' if part == 'input' else 'up'}_blocks.{level}.", number


def diffusers_name(key: str, depth: int = 1) -> str:
    """diffusers' name of a weight of an LDM UNet."""
    for ours, theirs in ENDS.items():
        if key.startswith(ours + "."):
            return theirs + key.removeprefix(ours)
    if match := re.fullmatch(r"middle_block\.(\d)\.(.+)", key):
        number, rest = int(match[1]), match[2]
        block, module = "mid_block.", number // 2 if number != 1 else 0
        transformer = number == 1
    else:
        match = re.fullmatch(r"(input|output)_blocks\.(\d+)\.(\d)\.(.+)", key)
        block, module = place(match[1], int(match[2]), depth)
        number, rest = int(match[3]), match[4]
        if rest.startswith("op."):
            return f"{block}downsamplers.0.conv.{rest.removeprefix('op.')}"
        if number and rest.startswith("conv."):
            return f"{block}upsamplers.0.{rest}"
        transformer = number == 1
    if transformer:
        return f"{block}attentions.{module}.{rest}"
    name, kind = rest.rsplit(".", 1)
    return f"{block}resnets.{module}.{RESBLOCK[name]}.{kind}"


# makeavid-sd

def makeavid_params(unet) -> StackParams:
    """Params of its layers for a UNet."""
    slots = {"post_conv_in", "post_conv_out", "post_conv1", "post_conv2", "post_shortcut", "post_resampler"}
    bricks = [(site, FrameConvParams(channels) if site.slot in slots else FrameResidualParams(channels, 8))
              for site, (_, channels) in unet_sites(unet).items() if site.slot in slots | {"in_attn_pre_ff"}]
    return StackParams("makeavid-sd", tuple(bricks), 24, None)


def makeavid_prefix(site, depth: int) -> str:
    if site.slot in ("post_conv_in", "post_conv_out"):
        return site.slot.removeprefix("post_") + "."
    block, number = place(site.part, site.index, depth)
    if site.slot == "post_resampler":
        return f"{block}{'down' if site.part == 'input' else 'up'}samplers.0.conv."
    if site.slot == "in_attn_pre_ff":
        return f"{block}attentions.{number}.transformer_blocks.{site.n}."
    return block + CONVOLUTIONS[site.slot].format(site.n if site.part == "middle" else number)


def makeavid_file(unet, stack: TemporalStack, depth: int = 1) -> dict:
    """The tensors of a file with the weights of a UNet and of its layers."""
    found = {}
    for key, tensor in unet.state_dict().items():
        name = diffusers_name(key, depth)
        found[re.sub(CONVOLUTION, r"\1.spatial_conv.", name, count=1)] = tensor
    return found | layer_tensors(stack, makeavid_prefix, depth, lambda suffix, tensor: (
        tensor[..., 0] if tensor.ndim == 4 else tensor))


# MuseV

def musev_params(unet) -> StackParams:
    """Params of its layers for a UNet."""
    transformers = {(site.part, site.index) for site in unet_sites(unet) if site.slot == "in_attn_pre_ff"}
    bricks = [(site, WeightedConvParams(channels) if site.slot == "post_res" else
               WeightedTransformerParams(channels, 8, EMBEDDING))
              for site, (_, channels) in unet_sites(unet).items()
              if site.slot in ("post_conv_in", "post_res")
              or (site.slot == "post_attn" and (site.part, site.index) in transformers)]
    return StackParams("MuseV", tuple(bricks), 12, None, frame_width=EMBEDDING)


def musev_prefix(site, depth: int) -> str:
    if site.slot == "post_conv_in":
        return "transformer_in."
    block, number = place(site.part, site.index, depth)
    kind = "temp_convs" if site.slot == "post_res" else "temp_attentions"
    return f"{block}{kind}.{site.n if site.part == 'middle' else number}."


def musev_file(unet, stack: TemporalStack, depth: int = 1) -> dict:
    """The tensors of a file with the weights of a UNet and of its layers."""
    found = {diffusers_name(key, depth): tensor for key, tensor in unet.state_dict().items()}
    return found | layer_tensors(stack, musev_prefix, depth, lambda suffix, tensor: (
        tensor[..., None] if tensor.ndim == 4 else tensor))


def layer_tensors(stack: TemporalStack, prefix, depth: int, shaped) -> dict:
    """The tensors of a stack in a file's names."""
    found = {}
    for site, _ in stack.params.bricks:
        for suffix, tensor in stack.layers[site.name].state_dict().items():
            found[prefix(site, depth) + suffix] = shaped(suffix, tensor)
    return found | {key: tensor for key, tensor in stack.state_dict().items() if key.startswith("frame_embedding.")}


@torch.no_grad()
def loud(stack: TemporalStack) -> TemporalStack:
    """The stack with weights of MuseV's layers that are far from 0, and negative in every second layer."""
    for number, layer in enumerate(stack.layers.values()):
        if hasattr(layer, "temporal_weight"):
            layer.temporal_weight.fill_(0.7 if number % 2 else -0.7)
    return stack
