"""The demo's temporal layers, untrained: for key frames, prediction and interpolation."""

from dataclasses import replace

from ..temporal.conditioning import add_context_input
from ..temporal.new_layers import video_ldm_params
from ..temporal.params import BOTH_ENDS, FIRST_FRAMES
from . import models


def prediction_params(unet):
    return add_context_input(temporal_params(unet), len(models.UNET.channel_mult), FIRST_FRAMES,
                        channels=models.CONTEXT_CHANNELS)


def interpolation_params(unet):
    params = replace(temporal_params(unet), frames=models.INTERPOLATED_FRAMES)
    return add_context_input(params, len(models.UNET.channel_mult), BOTH_ENDS, channels=models.CONTEXT_CHANNELS,
                        fps_width=models.UNET.context_dim)


def temporal_params(unet, convolution=True):
    return video_ldm_params(unet, models.UNET.emb_dim, models.UNET.context_dim,
                            lambda channels: channels // models.UNET.head_channels, models.FRAMES,
                            convolution=convolution)
