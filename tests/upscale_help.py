"""The smallest x4 upscaler that ComfyUI detects, its VAE and temporal layers for it, all random."""

import torch

from video_ldm.temporal.families import video_ldm
from video_ldm.temporal.formats.temporal_file import Base, Schedule
from video_ldm.temporal.new_layers import video_ldm_params
from video_ldm.temporal.stack import TemporalStack
from video_ldm.tests import vsr_help
from video_ldm.tests.decoder_help import DecoderParams
from video_ldm.tests.host import checkpoints
from video_ldm.tests.small import SD15, randomise, unet_model

# 256 channels, 7 inputs and four levels are what ComfyUI tells it by; text at the first level alone.
UNET = dict(SD15, in_channels=7, model_channels=256, context_dim=1024, use_linear_in_transformer=True,
            num_classes=1000, num_res_blocks=[1] * 4, channel_mult=(1, 1, 1, 1), transformer_depth=[1, 0, 0, 0],
            transformer_depth_output=[1, 1, 0, 0, 0, 0, 0, 0], disable_self_attentions=[True, True, True, False])
EMB_DIM, TEXT, HEADS, FRAMES = 1024, 1024, 8, 4
SCHEDULE = Schedule("linear", 0.0001, 0.02, "v")
BASE = Base("Stable Diffusion x4 upscaler", TEXT)


def unet_state(seed: int = 0) -> dict:
    """State dict of the UNet, as ComfyUI's loader of diffusion models takes it."""
    return randomise(unet_model(UNET), seed).state_dict()


def write_layers(path, seed: int = 1, mix_length: int = 1, dtype: torch.dtype = torch.float32):
    unet = unet_model(UNET, device="meta")
    params = video_ldm_params(unet, EMB_DIM, TEXT, lambda channels: HEADS, FRAMES, mix_length)
    stack = randomise(TemporalStack(params), seed).to(dtype)
    video_ldm.write(path, stack, params, schedule=SCHEDULE, base=BASE, fps=8.0)


def write_published(path, seed: int = 4):
    """Layers for it in the layout of LaVie's super-resolution."""
    torch.save({"ema": vsr_help.random_file(vsr_help.temporal_shapes(), seed)}, path)


def vae_state(seed: int = 5) -> dict:
    """State dict of an autoencoder of the x4 upscaler's kind: two halvings, 4 pixels per latent. ComfyUI builds its VAE
    with 128 channels whatever the file says."""
    from comfy.ldm.models.autoencoder import AutoencoderKL
    config = {**DecoderParams(4, 128, (1, 2, 4), 2, (3, 1, 1)).config()}
    return randomise(AutoencoderKL(ddconfig=config, embed_dim=4), seed).state_dict()


def text(seed: int = 11, tokens: int = 7) -> list:
    return checkpoints.conditioning(seed, tokens, TEXT)


def small_frames(frames: int, height: int = 16, width: int = 16, seed: int = 3) -> torch.Tensor:
    """Pictures `t h w 3` in 0..1."""
    return torch.rand(frames, height, width, 3, generator=torch.Generator().manual_seed(seed))


def small_vae(seed: int = 5):
    """The same kind with 32 channels, as a VAE of ComfyUI's own class."""
    import comfy.sd
    from comfy.ldm.models.autoencoder import AutoencoderKL
    params = {"ddconfig": DecoderParams(4, 32, (1, 1, 2), 1, (3, 1, 1)).config(), "embed_dim": 4}
    vae = comfy.sd.VAE(sd=randomise(AutoencoderKL(**params), seed).state_dict(), config={"params": params})
    vae.latent_channels, vae.upscale_ratio, vae.downscale_ratio = 4, 4, 4
    return vae
