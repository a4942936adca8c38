"""The demo's temporal decoder: the bundled autoencoder's decoder with layers over time. All of it is trained on clips.

Clips are rendered as they are needed, at every rate that the cascade makes. The far road counts more than the rest, and
errors count again in smaller pictures and in the mean over time. There is no discriminator. docs/training.md says why.
"""

import numpy as np
import torch
from torch.nn.functional import avg_pool2d

from ..nodes.host import models as host
from ..nodes.host.temporal_vae import build_decoder
from ..temporal.decoder import SVD_KERNEL, DecoderParams
from ..temporal.formats import decoder as file_format
from ..temporal.training.decoder import Clip, DecoderLoss, DecoderLossParams
from . import models, world
from .autoencoder import encode, reconstruction_error, to_model
from .data import car_weights, corners_of

FRAMES = 6                              # of a training clip: the paper's (Table 8)
LATENTS = "the Video LDM demo"
TERMS = DecoderLossParams(adversarial=0.0, adversarial_from=0, features=0.0, perceptual=0.0)
FAR = 4.0                               # how much more the far road counts
DEPTH, BREADTH = 0.125, 0.19            # its height and width, in fractions of the picture
BELOW = 0.09                            # how far its middle lies below the horizon
SCALES = (2, 4)                         # of the smaller pictures


def params():
    about = models.AUTOENCODER
    return DecoderParams(about.latent_channels, about.channels, about.channel_mult, about.num_res_blocks, SVD_KERNEL)


class DrivingClips:
    """`clips(step)` for a DecoderLoss: rendered clips with their latents from the frozen encoder. Cars count more."""

    def __init__(self, autoencoder, batch: int):
        self.autoencoder, self.batch = autoencoder.requires_grad_(False).eval(), batch

    def __call__(self, step) -> Clip:
        drawn = [self.draw(step.generator) for _ in range(step.share(self.batch))]
        frames = torch.from_numpy(np.stack([clip.frames for clip in drawn]))
        weights = [car_weights(corners_of(clip), models.HEIGHT, models.WIDTH) for clip in drawn]
        weights = torch.from_numpy(np.stack(weights))
        self.autoencoder.to(step.device)
        flat = frames.flatten(0, 1).to(step.device)
        parts = encode(self.autoencoder, flat).float(), to_model(flat), weights.flatten(0, 1).to(step.device)
        return Clip(*(part.unflatten(0, (len(drawn), FRAMES)) for part in parts))

    @staticmethod
    def draw(generator):
        index = int(torch.randint(0, models.TRAIN_CLIPS, (), generator=generator))
        rate = models.ALL_RATES[int(torch.randint(0, len(models.ALL_RATES), (), generator=generator))]
        latest = (models.FRAMES - 1) / models.FPS - (FRAMES - 1) / rate
        start = float(torch.rand((), generator=generator)) * max(latest, 0)
        return world.clip(world.train_seed(index), FRAMES, models.HEIGHT, models.WIDTH, rate, start)


def error_from_afar(y, x, weights):
    """The autoencoder's error, with more weight on the far road, plus that of smaller pictures and of means over time.

    y, x: frames of clips in their order, (n 3 h w). weights: (n 1 h w).
    """
    far, error = far_road(*x.shape[-2:]).to(x), y - x
    whole = reconstruction_error(y, x, weights + far)
    mean = error.unflatten(0, (-1, FRAMES)).mean(1)
    for scale in SCALES:                # squared errors of independent pixels count as much at every scale
        counts = 1 + avg_pool2d(far, scale)
        one, lasting = ((counts * avg_pool2d(part, scale).square()).mean() for part in (error, mean))
        whole = whole + scale ** 2 * (one + FRAMES / 2 * lasting)
    return whole


def far_road(height, width):
    """How much more each pixel counts, (1 1 h w): FAR where the road vanishes, less with the distance from there."""
    rows = ((torch.arange(height) + 0.5) / height - world.HORIZON - BELOW) / DEPTH
    columns = ((torch.arange(width) + 0.5) / width - 0.5) / BREADTH
    return FAR * torch.exp(-rows[:, None].square() - columns.square())[None, None]


def loss_of(weights, batch: int) -> DecoderLoss:
    """The training of a fresh temporal decoder on the autoencoder with these weights."""
    autoencoder = host.build_autoencoder(models.AUTOENCODER)
    autoencoder.load_state_dict(weights)
    decoder = build_decoder(params())
    decoder.load_state_dict(autoencoder.decoder.state_dict(), strict=False)
    return DecoderLoss(decoder, DrivingClips(autoencoder, batch), TERMS, post_quant=autoencoder.post_quant_conv,
                       reconstruction=error_from_afar)


def write(path, tensors, weights, metadata) -> int:
    """Write a trained decoder in fp16; the size in bytes. weights: of the autoencoder."""
    post_quant = {part: weights[f"post_quant_conv.{part}"] for part in ("weight", "bias")}
    half = {key: tensor.to(torch.float16) for key, tensor in tensors.items()}
    file_format.write(path, half, params(), latents=LATENTS, frames=FRAMES, licence=models.LICENCE, metadata=metadata,
                      post_quant={part: tensor.to(torch.float16) for part, tensor in post_quant.items()})
    return path.stat().st_size
