"""The layers against published modules on random weights: ComfyUI core's own video UNet, whole."""

import pytest
import torch

from video_ldm.temporal.call import CallSettings, open_call
from video_ldm.temporal.new_layers import video_ldm_params
from video_ldm.temporal.stack import TemporalStack
from video_ldm.tests.small import EMB_DIM, SMALL, batch, randomise, relative_error, unet_model

VIDEO = dict(use_temporal_resblock=True, use_temporal_attention=True, merge_strategy="learned_with_images",
             use_spatial_context=True, extra_ff_mix_layer=True, video_kernel_size=[3, 1, 1])


def published_prefix(site) -> str:
    """Where core's video UNet keeps the brick of a site."""
    block = "middle_block" if site.part == "middle" else f"{site.part}_blocks.{site.index}"
    if site.slot == "in_attn_post_ff":
        return f"{block}.1."
    return f"{block}.{2 * site.n}."


@pytest.mark.parametrize("clips, frames", [(1, 5), (2, 3)])
def test_video_ldm_layers_equal_comfyuis_own_video_unet(clips, frames):
    video = randomise(unet_model(SMALL, **VIDEO))
    image = unet_model(SMALL)
    weights = video.state_dict()
    assert image.load_state_dict(weights, strict=False).missing_keys == []
    params = video_ldm_params(image, EMB_DIM, 768, lambda channels: 8, frames)
    stack = TemporalStack(params)
    stack.load_state_dict({f"layers.{site.name}.{key}": weights[published_prefix(site) + key]
                           for site, _ in params.bricks for key in stack.layers[site.name].state_dict()})
    x, timesteps, context = batch(clips, frames)
    with torch.no_grad():
        expected = video(x, timesteps, context=context, num_video_frames=frames)
        plain = image(x, timesteps, context=context)
        with open_call(image, [(stack, CallSettings(frames))], context):
            ours = image(x, timesteps, context=context)
    assert relative_error(plain, expected) > 0.1        # the layers matter
    assert relative_error(ours, expected) < 1e-5
