"""ComfyUI's own sampling, as KSampler runs it: noise, preview, progress and cancel are core's."""

import comfy.sample
import comfy.samplers
import comfy.utils
import latent_preview
import torch

SAMPLERS = comfy.samplers.KSampler.SAMPLERS
SCHEDULERS = comfy.samplers.KSampler.SCHEDULERS


def empty_latent(model, images: int, width: int, height: int) -> torch.Tensor:
    """Zeros in the shape of the model's latents, `images c h/8 w/8`."""
    latent = torch.zeros(images, 4, height // 8, width // 8)
    return comfy.sample.fix_empty_latent_channels(model, latent)


def ksample(model, seed, steps, cfg, sampler, scheduler, positive, negative, latent: dict, denoise: float) -> torch.Tensor:
    """KSampler: the same initial noise for the same seed, live preview, progress bar, cancel."""
    samples = comfy.sample.fix_empty_latent_channels(model, latent["samples"])
    noise = comfy.sample.prepare_noise(samples, seed, latent.get("batch_index"))
    return comfy.sample.sample(
        model, noise, steps, cfg, sampler, scheduler, positive, negative, samples, denoise=denoise,
        noise_mask=latent.get("noise_mask"), callback=latent_preview.prepare_callback(model, steps),
        disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED, seed=seed)
