"""A small random upscaler in pixel space, and random temporal layers for it that see the small frames."""

from dataclasses import asdict, replace

from video_ldm.nodes.host.models import UNetParams, build_unet
from video_ldm.temporal.conditioning import add_small_frames_input
from video_ldm.temporal.families import video_ldm
from video_ldm.temporal.formats import pixel_upscaler as upscaler_format
from video_ldm.temporal.formats.pixel_upscaler import UpscalerParams
from video_ldm.temporal.formats.temporal_file import Base, Schedule
from video_ldm.temporal.new_layers import video_ldm_params
from video_ldm.temporal.stack import TemporalStack
from video_ldm.temporal.upscaler import PIXEL_CHANNELS
from video_ldm.tests.host import checkpoints
from video_ldm.tests.small import randomise

TEXT, FRAMES, CONTEXT = 24, 4, 8
UNET = UNetParams(latent_channels=PIXEL_CHANNELS, model_channels=32, channel_mult=(1, 2), num_res_blocks=(1, 1),
                  transformer_depth=(0, 1), head_channels=32, context_dim=TEXT, concat_channels=3, noise_levels=1000,
                  self_attention=False)
PARAMS = UpscalerParams(asdict(UNET), 0.0001, 0.02, "v", 0.0001, 0.02, 250, 150, 3.0, "a random upscaler", "Apache-2.0")
BASE, SCHEDULE = Base("a random upscaler", TEXT), Schedule("linear", 0.0001, 0.02, "v")


def network(seed: int = 0):
    return randomise(build_unet(UNET), seed)


def stack_params(unet, shared_noise: bool = False):
    params = video_ldm_params(unet, UNET.emb_dim, TEXT, lambda channels: channels // 32, FRAMES)
    return replace(add_small_frames_input(params, len(UNET.channel_mult), CONTEXT), shared_noise=shared_noise)


def stack(unet, seed: int = 1, shared_noise: bool = False) -> TemporalStack:
    return randomise(TemporalStack(stack_params(unet, shared_noise)), seed)


def write_model(path, seed: int = 0):
    upscaler_format.write(path, network(seed).state_dict(), PARAMS)


def write_layers(path, seed: int = 1, shared_noise: bool = False):
    unet = network()
    video_ldm.write(path, stack(unet, seed), stack_params(unet, shared_noise), schedule=SCHEDULE, base=BASE, fps=8.0)


def text(seed: int = 11, tokens: int = 7) -> list:
    return checkpoints.conditioning(seed, tokens, TEXT)
