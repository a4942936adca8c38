"""ComfyUI's own sampling, as KSampler runs it: noise, progress and cancel are core's. Previews show the clip."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import comfy.model_management
import comfy.sample
import comfy.samplers
import comfy.utils
import latent_preview
import torch
from PIL import Image

from ...temporal.errors import VideoLDMError
from .attach import ACTIVATIONS
from .moving_preview import USUAL_RATE, sheet_preview, spread
from .noise_schedule import with_trained_betas
from .options import clip_options
from .sockets import Conditioning, Model

SAMPLERS = comfy.samplers.KSampler.SAMPLERS
SCHEDULERS = comfy.samplers.KSampler.SCHEDULERS
LATENT_PIXELS = 8       # along each side of a latent


@dataclass(frozen=True)
class SamplerSettings:
    """KSampler's settings, without the MODEL, the latent and the seed."""

    steps: int
    cfg: float
    sampler: str            # one of SAMPLERS
    scheduler: str          # one of SCHEDULERS
    positive: list          # CONDITIONING
    negative: list          # CONDITIONING


def empty_latent(model: Model, images: int, width: int, height: int) -> torch.Tensor:
    """Zeros in the shape of the model's latents, `images c h/8 w/8`. Refuses sizes that are no whole latents."""
    for name, pixels in (("width", width), ("height", height)):
        if pixels % LATENT_PIXELS:
            lower = pixels - pixels % LATENT_PIXELS
            raise VideoLDMError(f"{name} is {pixels} pixels, and a latent is {LATENT_PIXELS} pixels wide and high. Set "
                                f"{name} to {lower} or {lower + LATENT_PIXELS}.")
    latent = torch.zeros(images, 4, height // LATENT_PIXELS, width // LATENT_PIXELS)
    return comfy.sample.fix_empty_latent_channels(model, latent)


def with_own_channels(model: Model, latent: dict) -> dict:
    """A LATENT with as many channels as the model's, if it is empty. Core's nodes make empty latents of 4 channels."""
    return {**latent, "samples": comfy.sample.fix_empty_latent_channels(model, latent["samples"])}


def latent_channels(model: Model) -> int:
    """Channels of the model's latents."""
    return model.get_model_object("latent_format").latent_channels


def ksample(model: Model, seed: int, steps: int, cfg: float, sampler: str, scheduler: str, positive: Conditioning,
            negative: Conditioning, latent: dict, denoise: float, noise: torch.Tensor | None = None,
            callback: Callable | None = None) -> torch.Tensor:
    """Sample as core's KSampler does, with its progress bar and Cancel.

    Args:
        model: the MODEL.
        seed, steps, cfg, sampler, scheduler, denoise: KSampler's widgets.
        positive, negative: CONDITIONING.
        latent: the LATENT to start from.
        noise: the initial noise; None: KSampler's own for this seed.
        callback: called after each step; None: one that shows frames of the whole clip.
    """
    model = with_trained_betas(model)
    samples = comfy.sample.fix_empty_latent_channels(model, latent["samples"])
    if noise is None:
        noise = comfy.sample.prepare_noise(samples, seed, latent.get("batch_index"))
    callback = callback or RolloutProgress(model, 1, steps, clip_rate(model)).show_clip
    return comfy.sample.sample(
        model, noise, steps, cfg, sampler, scheduler, positive, negative, samples, denoise=denoise,
        noise_mask=latent.get("noise_mask"), callback=callback,
        disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED, seed=seed)


def sample(model: Model, seed: int, settings: SamplerSettings, samples: torch.Tensor, noise: torch.Tensor | None = None,
           callback: Callable | None = None) -> torch.Tensor:
    """`ksample` from noise alone. samples: an empty latent of the size to make."""
    return ksample(model, seed, settings.steps, settings.cfg, settings.sampler, settings.scheduler, settings.positive,
                   settings.negative, {"samples": samples}, 1.0, noise=noise, callback=callback)


def noise_like(latent: torch.Tensor, seed: int) -> torch.Tensor:
    """KSampler's initial noise for a latent."""
    return comfy.sample.prepare_noise(latent, seed)


class RolloutProgress:
    """Progress of a video that is sampled clip after clip.

    One bar counts the steps of all clips. The preview shows the frames of the last finished clip, then the first frame
    of the clip in progress. The page plays those of the finished clip.
    """

    def __init__(self, model: Model, clips: int, steps: int, rate: float | None = None) -> None:
        """rate: frames per second of the clips, at which the page plays the preview; None: the usual rate."""
        self.previewer = latent_preview.get_previewer(model.load_device, model.get_model_object("latent_format"))
        self.steps, self.done, self.rate = steps, 0, rate or USUAL_RATE
        self.bar = comfy.utils.ProgressBar(clips * steps)
        self.strip: list = []       # pictures of the last finished clip

    def callback(self, step: int, x0: torch.Tensor, x: torch.Tensor, total_steps: int) -> None:
        """Core's samplers call this after each step. Some take more steps than they were asked for, and FreeInit a
        multiple of them."""
        value = self.done + min((step + 1) * self.steps // max(total_steps, self.steps), self.steps)
        live = self.pictures(x0[:1]) if self.previewer else []
        self.show(value, self.strip + live)

    def show_clip(self, step: int, x0: torch.Tensor, x: torch.Tensor, total_steps: int) -> None:
        """`callback` for a video that is sampled at once: it shows frames of all of it, evenly spaced."""
        pictures = self.pictures(x0[number] for number in spread(len(x0))) if self.previewer else []
        preview = sheet_preview(pictures, self.rate * len(pictures) / len(x0)) if pictures else None
        if self.previewer and not pictures:         # another pack's previewer: it shows the clip in its own way
            preview = self.previewer.decode_latent_to_preview_image("JPEG", x0)
        self.bar.update_absolute(step + 1, total_steps, preview)

    def finish(self, frames: torch.Tensor) -> None:
        """A clip is finished. frames: its latents `t c h w`, scaled as the model has them."""
        self.strip = self.pictures(frames) if self.previewer else []
        self.advance()

    def advance(self, clips: int = 1) -> None:
        self.done += clips * self.steps
        self.show(self.done, self.strip)

    def pictures(self, frames: Iterable[torch.Tensor]) -> list:
        """A picture of each frame. None at all where another pack has put its own previewer in core's place."""
        made = [self.previewer.decode_latent_to_preview(frame[None]) for frame in frames]
        return made if all(isinstance(picture, Image.Image) for picture in made) else []

    def show(self, value: int, pictures: list) -> None:
        preview = sheet_preview(pictures, self.rate, len(self.strip)) if pictures else None
        self.bar.update_absolute(value, preview=preview)


def clip_rate(model: Model) -> float | None:
    """Frames per second of the clips that a MODEL is to make; None: not said."""
    return clip_options(model.model_options.get("transformer_options", {})).fps


def previews() -> bool:
    """Whether ComfyUI shows previews while it samples."""
    return latent_preview.args.preview_method != latent_preview.LatentPreviewMethod.NoPreviews


def process_latent_in(model: Model, latents: torch.Tensor) -> torch.Tensor:
    return model.model.process_latent_in(latents)


Cancelled = comfy.model_management.InterruptProcessingException


def batch_that_fits(model: Model, items: int, shape: Sequence[int]) -> int:
    """How many items of latents `n c h w` fit into a call with both conditions, by core's estimate of memory."""
    device = model.load_device
    free = comfy.model_management.get_free_memory(device)
    needed = model.model.memory_required([2 * shape[0], *shape[1:]]) * ACTIVATIONS * 1.5
    return max(1, min(items, int(free // max(needed, 1))))
