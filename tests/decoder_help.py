"""Small random autoencoders and temporal decoders that the decoder's tests share."""

import pytest
import torch

from video_ldm.temporal.decoder import SVD_KERNEL, DecoderParams, TemporalDecoder
from video_ldm.tests.small import randomise

WIDTHS = (1, 1, 2, 2)           # four levels of 32 channels: 8 pixels per latent, as every VAE of Stable Diffusion


def small_params(kernel=SVD_KERNEL, mult=WIDTHS, latent_channels=4):
    return DecoderParams(latent_channels, 32, mult, 1, kernel)


def image_decoder(params, seed=0):
    from comfy.ldm.modules.diffusionmodules.model import Decoder
    return randomise(Decoder(**params.config()), seed).requires_grad_(False)


def temporal_decoder(params, seed=0) -> TemporalDecoder:
    """With random temporal layers, whose mixes are random too."""
    import comfy.ops
    decoder = TemporalDecoder(image_decoder(params), params.kernel, comfy.ops.disable_weight_init)
    return randomise(decoder, seed).requires_grad_(False).eval()


def small_vae(seed=5, latent_channels=4):
    """A VAE of ComfyUI's own class with random weights."""
    import comfy.sd
    from comfy.ldm.models.autoencoder import AutoencoderKL
    config = {**small_params(latent_channels=latent_channels).config()}
    params = {"ddconfig": config, "embed_dim": latent_channels}
    vae = comfy.sd.VAE(sd=randomise(AutoencoderKL(**params), seed).state_dict(), config={"params": params})
    vae.latent_channels = latent_channels
    return vae


def latents(frames, height=6, width=8, channels=4, seed=3):
    return torch.randn(frames, channels, height, width, generator=torch.Generator().manual_seed(seed))


def write_decoder(path, params=None, seed=7, post_quant=None, dtype=torch.float32, **more):
    """A file as training writes it."""
    from video_ldm.temporal.formats import decoder as file_format
    params = params or small_params()
    tensors = {key: value.to(dtype) for key, value in temporal_decoder(params, seed).state_dict().items()}
    settings = {"latents": "the tests", "frames": 6, "fps": 8.0, "licence": "Apache-2.0", **more}
    file_format.write(path, tensors, params, post_quant=post_quant, **settings)
    return path


def with_random_decoder(vae, folder):
    """The same VAE with a random temporal decoder, read from a file in a folder."""
    from video_ldm.nodes.host.temporal_vae import with_temporal_decoder
    from video_ldm.temporal.families import load_decoder
    return with_temporal_decoder(vae, load_decoder(write_decoder(folder / "mine.safetensors")))


@pytest.fixture(scope="module")
def vae():
    return small_vae()


@pytest.fixture(scope="module")
def made(vae, tmp_path_factory):
    """The same VAE with a random temporal decoder."""
    return with_random_decoder(vae, tmp_path_factory.mktemp("files"))


def whole(vae, z, window=100, overlap=4, tile=0, clips=1):
    """All frames that Temporal VAE Decode makes of latents."""
    from video_ldm.nodes.host.decoding import DecodeSettings, Decoding
    return torch.cat(list(Decoding(vae, z, DecodeSettings(window, overlap, tile, clips)).frames()))
