"""Video upscalers in pixel space, as MODEL. They use ComfyUI's class of the x4 upscaler, with pixels for latents."""

from typing import Any

import comfy.latent_formats
import comfy.model_base
import comfy.supported_models_base
from comfy.ldm.modules.diffusionmodules.upscaling import ImageConcatWithNoiseAugmentation

from ...temporal.formats.contents import first_line
from ...temporal.formats.pixel_upscaler import PREFIX, UpscalerFile, UpscalerParams, damaged
from ...temporal.upscaler import FACTOR, PIXEL_CHANNELS
from .models import patcher_of_model, shapes_of_unet
from .network_params import UNetParams, read_unet_params
from .noise_schedule import schedule_of
from .sockets import Model


class FoldedPixels(comfy.latent_formats.LatentFormat):
    """Pixels in -1..1, folded: each "latent" holds a block of pixels. A preview shows the mean of each block."""
    scale_factor = 1.0
    latent_channels = PIXEL_CHANNELS
    latent_rgb_factors = [[float(colour == channel // FACTOR ** 2) / FACTOR ** 2 for colour in range(3)]
                          for channel in range(PIXEL_CHANNELS)]


class PixelUpscaler(comfy.model_base.SD_X4Upscaler):
    """Predicts what is missing in the enlarged small frames: their details, as folded pixels.

    `details` is the factor by which the network's details are scaled up. `usual_noise` is the noise level that the
    upscaler is meant to be run with.
    """

    def __init__(self, config: Any, params: UpscalerParams, device: Any = None) -> None:
        super().__init__(config, device=device)
        self.model_sampling = schedule_of("linear", params.linear_start, params.linear_end, params.prediction)
        schedule = {"linear_start": params.augmentation_start, "linear_end": params.augmentation_end}
        self.noise_augmentor = ImageConcatWithNoiseAugmentation(schedule, max_noise_level=params.most_noise)
        self.usual_noise, self.details = params.usual_noise, params.details


def load_upscaler(file: UpscalerFile) -> Model:
    """The MODEL of an upscaler's file."""
    unet = unet_params(file)
    config = model_config(file.params, unet)
    return patcher_of_model(config, {PREFIX + key: value for key, value in file.tensors.items()}, PREFIX)


def unet_params(file: UpscalerFile) -> UNetParams:
    """The network's sizes. Raises if the file does not hold exactly the tensors of that network."""
    try:
        unet = read_unet_params(file.params.unet, len(file.tensors))
        wanted = shapes_of_unet(unet)
    except (TypeError, ValueError, RuntimeError, AssertionError, IndexError, ArithmeticError) as error:
        raise damaged(file.name, f"no network has its sizes: {first_line(error)}") from None
    given = {key: tuple(tensor.shape) for key, tensor in file.tensors.items()}
    for key in sorted(given.keys() | wanted.keys()):
        if given.get(key) != wanted.get(key):
            raise damaged(file.name, f"{key} is {given.get(key, 'missing')} where {wanted.get(key, 'nothing')} is due")
    takes_pixels = unet.latent_channels == PIXEL_CHANNELS and unet.concat_channels == 3
    if not takes_pixels or unet.noise_levels <= file.params.most_noise:
        raise damaged(file.name, "its network does not take colours, small frames and their noise level")
    return unet


def model_config(params: UpscalerParams, unet: UNetParams) -> Any:
    """The config object that ComfyUI's model detection would make for this network."""
    class Upscaler(comfy.supported_models_base.BASE):
        latent_format = FoldedPixels
        title = params.title
        unet_extra_config: dict = {}
        sampling_settings = {"beta_schedule": "linear", "linear_start": params.linear_start,
                             "linear_end": params.linear_end}

        def get_model(self, state_dict: dict, prefix: str = "", device: Any = None) -> PixelUpscaler:
            return PixelUpscaler(self, params, device)
    return Upscaler(unet.config())
