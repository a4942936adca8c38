"""The loss of the demo's autoencoder: pictures are to come back, with latents near a unit Gaussian.

It is the absolute and squared error of pixels, and the squared error of their differences to the right and downwards,
which are the edges. Cars count more. A small KL divergence keeps the latents smooth enough for diffusion.
"""

import math

import numpy as np
import torch

from ..temporal.training.loss_inputs import RecordableLoss
from .data import car_weights
from .models import AUTOENCODER

ABSOLUTE, SQUARED, EDGES, KL = 0.3, 2.0, 2.0, 2e-4


def reconstruction_error(y, x, weights):
    """The weighted error of pictures y (n 3 h w) against x, weights (n 1 h w)."""
    error = y - x
    across, down = error[..., 1:] - error[..., :-1], error[..., 1:, :] - error[..., :-1, :]
    edges = (weights[..., 1:] * across.square()).mean() + (weights[..., 1:, :] * down.square()).mean()
    return ABSOLUTE * (weights * error.abs()).mean() + SQUARED * (weights * error.square()).mean() + EDGES * edges


def to_model(frames):
    """uint8 frames (n h w 3) as -1..1, (n 3 h w). Contiguous: channels-last convolutions are slow on a CPU."""
    return frames.movedim(-1, 1).contiguous().float() / 127.5 - 1


class AutoencoderLoss(RecordableLoss):
    """`loss(step)` for the Loop. frames: uint8 (n t h w 3). boxes: those of the cars, (n t k 4)."""

    def __init__(self, autoencoder, frames, boxes, batch):
        self.autoencoder, self.frames, self.boxes, self.batch = autoencoder, frames, boxes, batch

    def draw(self, step):
        x, weights = self.pictures(step.share(self.batch), step.generator)
        factor = 2 ** (len(AUTOENCODER.channel_mult) - 1)
        shape = len(x), AUTOENCODER.latent_channels, *(size // factor for size in x.shape[2:])
        noise = torch.randn(shape, generator=step.generator)
        return tuple(part.to(step.device) for part in (x, weights, noise))

    def compute(self, inputs):
        x, weights, noise = inputs
        mean, logvar = self.moments(x)
        y = self.decode(mean + noise * (0.5 * logvar).exp())
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        return {"loss": reconstruction_error(y, x, weights) + KL * kl, "psnr": psnr(y, x), "kl": kl.detach()}

    def pictures(self, count, generator):
        """`count` random frames as -1..1 (count 3 h w), and their pixels' weights."""
        clips = torch.randint(0, self.frames.shape[0], (count,), generator=generator).tolist()
        times = torch.randint(0, self.frames.shape[1], (count,), generator=generator).tolist()
        chosen = np.stack([self.frames[clip, time] for clip, time in zip(clips, times)])
        boxes = np.stack([self.boxes[clip, time] for clip, time in zip(clips, times)])
        weights = car_weights(boxes, *chosen.shape[1:3])
        return to_model(torch.from_numpy(chosen)), torch.from_numpy(weights)

    def moments(self, x):
        mean, logvar = self.autoencoder.quant_conv(self.autoencoder.encoder(x)).float().chunk(2, dim=1)
        return mean, logvar.clamp(-20, 10)

    def decode(self, z):
        return self.autoencoder.decoder(self.autoencoder.post_quant_conv(z)).float()


def psnr(y, x):
    """Peak signal to noise ratio of pictures -1..1, in dB."""
    return 10 * math.log10(4) - 10 * (y - x).detach().square().mean().log10()


@torch.no_grad()
def encode(autoencoder, frames):
    """Mean latents (n c h/8 w/8) of uint8 frames (n h w 3), without any scale."""
    return autoencoder.quant_conv(autoencoder.encoder(to_model(frames))).float().chunk(2, dim=1)[0]


@torch.no_grad()
def decode(autoencoder, latents):
    """uint8 frames (n h w 3) of latents (n c h/8 w/8), without any scale."""
    pictures = autoencoder.decoder(autoencoder.post_quant_conv(latents)).float().clamp(-1, 1)
    return ((pictures + 1) * 127.5 + 0.5).to(torch.uint8).movedim(1, -1)
