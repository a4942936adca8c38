"""An AnimateDiff file, read and attached, against diffusers' UNetMotionModel on random weights: the whole UNet."""

from dataclasses import replace

import pytest
import torch

from video_ldm.temporal.call import CallSettings, open_call
from video_ldm.temporal.families import load_motion_lora, load_temporal
from video_ldm.temporal.stack import TemporalStack
from video_ldm.tests.formats_help import saved
from video_ldm.tests.small import SD15, batch, randomise, relative_error, unet_model

TEXT = 48
CONFIGS = {
    "one ResBlock, with middle": dict(channel_mult=(1, 2), num_res_blocks=[1, 1], transformer_depth=[1, 0],
                                      transformer_depth_output=[1, 1, 0, 0]),
    "two ResBlocks, without middle": dict(channel_mult=(1, 2), num_res_blocks=[2, 2], transformer_depth=[1, 1, 0, 0],
                                          transformer_depth_output=[1, 1, 1, 0, 0, 0]),
}
# AnimateDiff's names for what diffusers calls otherwise; the table of positions is one per block there.
TO_ANIMATEDIFF = (("attn1.", "attention_blocks.0."), ("attn2.", "attention_blocks.1."), ("norm1.", "norms.0."),
                  ("norm2.", "norms.1."), ("norm3.", "ff_norm."))


def diffusers_unet(config: dict, middle: bool, in_channels: int = 4):
    from diffusers import UNetMotionModel
    return randomise(UNetMotionModel(
        in_channels=in_channels, block_out_channels=(64, 128), layers_per_block=config["num_res_blocks"][0],
        cross_attention_dim=TEXT,
        down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"),
        up_block_types=("UpBlockMotion", "CrossAttnUpBlockMotion"), num_attention_heads=8, motion_num_attention_heads=8,
        motion_max_seq_length=32, use_motion_mid_block=middle)).eval()


def animatediff_names(weights: dict) -> dict:
    """The motion part of a diffusers state dict under AnimateDiff's published names."""
    published = {}
    for key, tensor in weights.items():
        if ".motion_modules." not in key:
            continue
        stem, rest = key.split(".motion_modules.")
        ordinal, rest = rest.split(".", 1)
        place = f"{stem}.motion_modules.{ordinal}.temporal_transformer."
        if "pos_embed.pe" in rest:
            for m in range(2):
                published[place + rest.replace("pos_embed.pe", f"attention_blocks.{m}.pos_encoder.pe")] = tensor.clone()
            continue
        if rest.startswith("transformer_blocks."):
            for theirs, ours in TO_ANIMATEDIFF:
                rest = rest.replace(theirs, ours)
        published[place + rest] = tensor
    return published


def image_unet(config: dict, weights: dict):
    """ComfyUI's UNet with the spatial part of a diffusers state dict."""
    from comfy.utils import unet_to_diffusers
    unet = unet_model(config)
    renamed = {ours: weights[theirs] for theirs, ours in unet_to_diffusers(config).items() if theirs in weights}
    unet.load_state_dict(renamed)
    return unet


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("clips, frames", [(1, 5), (2, 3)])
@torch.no_grad()
def test_animatediff_layers_equal_diffusers_whole_unet(tmp_path, name, clips, frames):
    config = dict(SD15, model_channels=64, **CONFIGS[name]) | {"context_dim": TEXT}
    theirs = diffusers_unet(config, middle="with middle" in name)
    weights = theirs.state_dict()
    unet = image_unet(config, weights)
    file = load_temporal(saved(tmp_path, "mm.safetensors", animatediff_names(weights)))
    assert file.kind == ("animatediff_v2" if "with middle" in name else "animatediff_v3")
    x, timesteps, context = batch(clips, frames, text=TEXT)
    reference = theirs(x.unflatten(0, (clips, frames)).transpose(1, 2), timesteps[0], context).sample
    reference = reference.transpose(1, 2).flatten(0, 1)

    assert relative_error(run(unet, stack_of(file, pooled=True), x, timesteps, context, frames), reference) < 1e-5
    # Upstream's norm sees one frame at a time, diffusers' the whole clip (docs/formats.md#norms): not the same
    # function.
    assert relative_error(run(unet, stack_of(file, pooled=False), x, timesteps, context, frames), reference) > 1e-3


def stack_of(file, pooled: bool) -> TemporalStack:
    bricks = tuple((site, replace(brick, norm_pooled=pooled)) for site, brick in file.params.bricks)
    stack = TemporalStack(replace(file.params, bricks=bricks))
    stack.load_state_dict(file.tensors)
    return stack


def run(unet, stack, x, timesteps, context, frames):
    with open_call(unet, [(stack, CallSettings(frames=frames))], context):
        return unet(x, timesteps, context=context)


@torch.no_grad()
def test_a_motion_lora_in_diffusers_names_equals_diffusers_own_merge(tmp_path):
    """The published layout of diffusers, merged by our rule, against the same weights moved inside diffusers' UNet."""
    config = dict(SD15, model_channels=64, **CONFIGS["one ResBlock, with middle"]) | {"context_dim": TEXT}
    theirs = diffusers_unet(config, middle=True)
    unet = image_unet(config, theirs.state_dict())
    file = load_temporal(saved(tmp_path, "mm.safetensors", animatediff_names(theirs.state_dict())))
    generator, strength, lora = torch.Generator().manual_seed(5), 0.6, {}
    for key, weight in theirs.named_parameters():
        if ".motion_modules." in key and ".to_" in key and key.endswith("weight"):
            up, down = (torch.randn(*size, generator=generator) * 0.1 for size in ((len(weight), 4), (4, len(weight))))
            stem = "processor.to_".join(key.removesuffix(".weight").removesuffix(".0").rsplit("to_", 1))
            lora |= {f"unet.{stem}_lora.up.weight": up, f"unet.{stem}_lora.down.weight": down}
            weight.add_(strength * up @ down)
    stack = stack_of(file, pooled=True)
    for key, (up, down) in load_motion_lora(saved(tmp_path, "lora.safetensors", lora)).fitting(file.params).items():
        stack.get_parameter(key).add_(strength * up @ down)
    x, timesteps, context = batch(1, 4, text=TEXT)
    reference = theirs(x[None].transpose(1, 2), timesteps[0], context).sample[0].transpose(0, 1)
    assert relative_error(run(unet, stack, x, timesteps, context, 4), reference) < 1e-5
    plain = run(unet, stack_of(file, pooled=True), x, timesteps, context, 4)
    assert relative_error(plain, reference) > 1e-3
