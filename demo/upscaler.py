"""The demo's upscaler, of the paper's driving kind: a diffusion model in pixel space, four times the size.

The image upscaler is trained on single frames. Then its temporal layers are trained; they see the small frames too.
Both learn on patches of rendered clips, at every rate that the cascade makes. Attention reads the text only, as in the
finer levels of the Stable Diffusion x4 upscaler. Self-attention would meet more pixels in a frame than on a patch.
"""

from dataclasses import asdict, replace

import numpy as np
import torch
from torch.nn.functional import avg_pool2d

from ..nodes.host.models import UNetParams
from ..temporal.conditioning import add_small_frames_input
from ..temporal.diffusion import Diffusion
from ..temporal.formats.pixel_upscaler import UpscalerParams
from ..temporal.formats.temporal_file import Base, Schedule
from ..temporal.new_layers import video_ldm_params
from ..temporal.training.upscaler import Patches, UpscalerLoss
from ..temporal.upscaler import FACTOR, PIXEL_CHANNELS, TRAINED_LEVEL, fold_pixels
from . import models, world
from .autoencoder import to_model
from .data import car_weights, corners_of, render_clips

HEIGHT, WIDTH = FACTOR * models.HEIGHT, FACTOR * models.WIDTH
CLIPS = 800                             # rendered once, seeds 0..799, a third at each rate
PATCH = 96                                          # large pixels
LINEAR_START, LINEAR_END = 1e-4, 0.02               # the paper's driving upsampler, Table 6; also for the small frames
STEPS = 1000                                        # of noise
PREDICTION = "x0"                                   # so small a network cannot pass on noise of 48 channels
DETAILS = 3.0                                       # brings the details to about unit variance
USUAL_LEVEL = 150                                   # the paper's, in pixel space (Appendix H)
CONTEXT_CHANNELS = 64                               # the paper's 128, at this UNet's width
UNET = UNetParams(latent_channels=PIXEL_CHANNELS, model_channels=64, channel_mult=(1, 2, 2), num_res_blocks=(1, 1, 1),
                  transformer_depth=(0, 0, 1), head_channels=32, context_dim=models.TEXT_WIDTH, concat_channels=3,
                  noise_levels=TRAINED_LEVEL + 1, self_attention=False)


def diffusion() -> Diffusion:
    return Diffusion(LINEAR_START, LINEAR_END, STEPS, PREDICTION)


def augmentation() -> Diffusion:
    return Diffusion(LINEAR_START, LINEAR_END, STEPS)


BASE = Base("the Video LDM demo's upscaler", UNET.context_dim)
SCHEDULE = Schedule("linear", LINEAR_START, LINEAR_END, PREDICTION)


def file_params(title) -> UpscalerParams:
    """What the file of the image upscaler says."""
    return UpscalerParams(asdict(UNET), LINEAR_START, LINEAR_END, PREDICTION, LINEAR_START, LINEAR_END,
                          TRAINED_LEVEL, USUAL_LEVEL, DETAILS, title, models.LICENCE)


def temporal_params(unet):
    """Layers with convolutions only, which keeps the bundle small. All frames of a clip share one noise."""
    params = video_ldm_params(unet, UNET.emb_dim, UNET.context_dim, lambda channels: channels // UNET.head_channels,
                              models.FRAMES, attention=False)
    return replace(add_small_frames_input(params, len(UNET.channel_mult), CONTEXT_CHANNELS), shared_noise=True)


def large_clip(index):
    """Large frames and corners of training drive `index`, from a moment somewhere in it."""
    rate = models.ALL_RATES[index % len(models.ALL_RATES)]
    start = (index * 0.6180339887) % 1 * (models.FRAMES - 1) * (1 / models.FPS - 1 / rate)
    clip = world.clip(world.train_seed(index), models.FRAMES, HEIGHT, WIDTH, rate, start)
    return clip.frames, corners_of(clip)


def render(path):
    """Render all of them to an .npy file, uint8 (n t h w 3). Returns the corners of their cars (n t 3 4)."""
    frames = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=(CLIPS, models.FRAMES, HEIGHT, WIDTH, 3))
    corners = np.zeros((CLIPS, models.FRAMES, 3, 4), np.float32)
    for index, clip in enumerate(render_clips(large_clip, CLIPS)):
        frames[index], corners[index] = clip
    frames.flush()
    return corners


class RenderedPatches:
    """`patches(step)` for an UpscalerLoss: patches of clips, with small frames by averaging. Cars count more.

    Args:
        frames: large frames, uint8 (n t h w 3).
        corners: of the cars in them, (n t k 4).
        length: frames of a patch.
        batch: patches per step, over all processes.
        embeddings, rows: texts (k l d), and the row of each clip's text.
    """

    def __init__(self, frames, corners, length, batch, embeddings, rows):
        self.frames, self.corners, self.length, self.batch = frames, corners, length, batch
        self.embeddings, self.rows = embeddings, rows

    def __call__(self, step) -> Patches:
        drawn = [self.draw(step.generator) for _ in range(step.share(self.batch))]
        pixels, weights = (torch.stack(part) for part in zip(*(part for _, *part in drawn)))
        context = torch.stack([self.embeddings[self.rows[index]] for index, *_ in drawn])
        x_low, weights = (avg_pool2d(part.flatten(0, 1), FACTOR).unflatten(0, part.shape[:2])
                          for part in (pixels, weights))
        return Patches(*(part.to(step.device) for part in (fold_pixels(pixels), x_low, context, weights)))

    def draw(self, generator):
        """(clip, patch (t 3 h w) in -1..1, weights (t 1 h w)). Patches begin at the edge of a small pixel."""
        def below(count):
            return int(torch.randint(0, count, (), generator=generator))
        index, first = below(len(self.frames)), below(models.FRAMES - self.length + 1)
        top, left = (FACTOR * below((size - PATCH) // FACTOR + 1) for size in (HEIGHT, WIDTH))
        when = slice(first, first + self.length)
        patch = np.array(self.frames[index, when, top:top + PATCH, left:left + PATCH])
        origin, size = np.array([left, top, left, top]), np.array([WIDTH, HEIGHT, WIDTH, HEIGHT])
        weights = car_weights((self.corners[index, when] * size - origin) / PATCH, PATCH, PATCH)
        return index, to_model(torch.from_numpy(patch)), torch.from_numpy(weights)


def loss(unet, stack, patches, texts) -> UpscalerLoss:
    return UpscalerLoss(unet, stack, diffusion(), augmentation(), patches, null_context=texts["null"],
                        dropout=models.DROPOUT, details=DETAILS)
