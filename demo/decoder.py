"""The demo's temporal decoder: the bundled autoencoder's own, with layers over time that learn from clips of the world.

Its spatial layers stay. Trained along, under a discriminator that counted ten times as much, they lowered the error of
pixels and raised the distance of the clips; which of the two did it was not tried apart.
Clips are rendered as they are needed, at every rate that the cascade makes: key frames and both steps between them.
"""

import numpy as np
import torch

from ..nodes.host import models as host
from ..nodes.host.temporal_vae import build_decoder
from ..temporal.decoder import SVD_KERNEL, DecoderParams
from ..temporal.formats import decoder as file_format
from ..temporal.training.decoder import Clip, DecoderLoss, DecoderLossParams
from ..temporal.training.discriminator import PatchDiscriminator
from . import models, world
from .autoencoder import encode, reconstruction_error, to_model
from .data import car_weights, corners_of

FRAMES = 6                              # of a training clip: the paper's (Table 8)
RATES = (models.FPS, *models.RATES)     # frames per second of the clips, drawn evenly
LATENTS = "the Video LDM demo"
# Pixels' error is small beside a discriminator's answers, whose share the adaptive weight brings down to its size.
TERMS = DecoderLossParams(adversarial=0.02, adversarial_from=100, features=0.0, perceptual=0.0)
JUDGE_CHANNELS = 32
CHANGE = 4.0                            # of the squared error of what changes from frame to frame: flicker


def params():
    about = models.AUTOENCODER
    return DecoderParams(about.latent_channels, about.channels, about.channel_mult, about.num_res_blocks, SVD_KERNEL)


class DrivingClips:
    """`clips(step)` for a DecoderLoss: rendered clips, their latents from the frozen encoder, cars counting more."""

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
        rate = int(torch.randint(0, len(RATES), (), generator=generator))
        latest = (models.FRAMES - 1) / models.FPS - (FRAMES - 1) / RATES[rate]
        start = float(torch.rand((), generator=generator)) * max(latest, 0)
        return world.clip(world.train_seed(index), FRAMES, models.HEIGHT, models.WIDTH, RATES[rate], start)


def error_over_time(y, x, weights):
    """The autoencoder's error of pictures, and that of their changes: y, x (n 3 h w), n frames of clips in order."""
    error, count = (y - x).unflatten(0, (-1, FRAMES)), weights.unflatten(0, (-1, FRAMES))[:, 1:]
    return reconstruction_error(y, x, weights) + CHANGE * (count * (error[:, 1:] - error[:, :-1]).square()).mean()


def loss_of(weights, batch: int) -> DecoderLoss:
    """The training of a fresh temporal decoder on the autoencoder with these weights, beside a fresh discriminator."""
    autoencoder = host.build_autoencoder(models.AUTOENCODER)
    autoencoder.load_state_dict(weights)
    decoder = build_decoder(params())
    decoder.load_state_dict(autoencoder.decoder.state_dict(), strict=False)
    return DecoderLoss(decoder, DrivingClips(autoencoder, batch), TERMS,
                       PatchDiscriminator(3, JUDGE_CHANNELS, layers=2), post_quant=autoencoder.post_quant_conv,
                       reconstruction=error_over_time, train_spatial=False)


def write(path, tensors, weights, metadata) -> int:
    """Write a trained decoder in fp16; the size in bytes. weights: of the autoencoder."""
    post_quant = {part: weights[f"post_quant_conv.{part}"] for part in ("weight", "bias")}
    half = {key: tensor.to(torch.float16) for key, tensor in tensors.items()}
    file_format.write(path, half, params(), latents=LATENTS, frames=FRAMES, licence=models.LICENCE, metadata=metadata,
                      post_quant={part: tensor.to(torch.float16) for part, tensor in post_quant.items()})
    return path.stat().st_size
