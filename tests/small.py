"""Small random networks that several tests share."""

import torch
from torch import nn

from video_ldm.temporal.new_layers import video_ldm_params
from video_ldm.temporal.stack import TemporalStack

SD15 = dict(image_size=32, in_channels=4, out_channels=4, use_spatial_transformer=True, legacy=False, num_heads=8,
            transformer_depth_middle=1, context_dim=768, use_linear_in_transformer=False)
SD15_SIZE = dict(SD15, model_channels=320, num_res_blocks=[2, 2, 2, 2], channel_mult=(1, 2, 4, 4),
                 transformer_depth=[1, 1, 1, 1, 1, 1, 0, 0], transformer_depth_output=[1] * 9 + [0] * 3)
SMALL = dict(SD15, model_channels=64, num_res_blocks=[1, 1], channel_mult=(1, 2), transformer_depth=[1, 0],
             transformer_depth_output=[1, 1, 0, 0])
EMB_DIM = 4 * SMALL["model_channels"]


def unet_model(config, device="cpu", **more):
    """ComfyUI's own UNet, uninitialised."""
    import comfy.ops
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
    return UNetModel(**config, **more, dtype=torch.float32, device=device, operations=comfy.ops.disable_weight_init)


@torch.no_grad()
def randomise(module: nn.Module, seed: int = 0) -> nn.Module:
    """Random weights that keep activations near 1: matrices by their fan-in, norms near 1, biases and mixes free."""
    generator = torch.Generator().manual_seed(seed)
    norms = {f"{name}.weight" for name, part in module.named_modules()
             if isinstance(part, (nn.GroupNorm, nn.LayerNorm))}
    for name, weight in module.named_parameters():
        spread = weight[0].numel() ** -0.5 if weight.ndim > 1 else 0.2
        weight.copy_(torch.randn(weight.shape, generator=generator) * spread + (1.0 if name in norms else 0.0))
    return module


def small_unet(seed: int = 0):
    return randomise(unet_model(SMALL), seed)


def small_stack(unet, frames: int, seed: int = 1, **options) -> TemporalStack:
    return randomise(TemporalStack(video_ldm_params(unet, EMB_DIM, 768, lambda channels: 8, frames, **options)), seed)


def batch(clips: int, frames: int, seed: int = 2, height: int = 8, width: int = 12, text: int = 768):
    """Latents, timesteps and text of some clips: the text is one per clip."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(clips * frames, 4, height, width, generator=generator)
    context = torch.randn(clips, 7, text, generator=generator).repeat_interleave(frames, 0)
    return x, torch.full((clips * frames,), 500.0), context


def relative_error(ours: torch.Tensor, reference: torch.Tensor) -> float:
    return ((ours - reference).abs().max() / reference.abs().max()).item()
