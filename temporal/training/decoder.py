"""Fine-tuning of a temporal decoder (Video LDM, section 3.1.1, Table 8).

The encoder is frozen. Clips of latents go in, and a patch-wise discriminator of 3-D convolutions judges the clips of
pictures that come out. The paper names no other term. The other terms here are LDM's for autoencoders: L1, perceptual,
and adversarial with an adaptive weight. The discriminator trains in the same step and by the same optimizer. A second
discriminator, of images, worsened the paper's FVD from 32.94 to 51.01, so there is none unless it is given.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..decoder import TemporalDecoder
from .discriminator import judgement, require_networks, zero_terms
from .temporal import freeze

LARGEST_WEIGHT = 1e4


class Clip(NamedTuple):
    """A batch of clips."""

    latents: Tensor                     # (b t c h w)
    frames: Tensor                      # what the latents stand for, (b t 3 H W) in -1..1
    weights: Tensor | None = None       # how much each pixel counts, (b t 1 H W); None: all alike


@dataclass(frozen=True)
class DecoderLossParams:
    """The weight of each term."""

    adversarial: float          # times the adaptive weight
    adversarial_from: int       # the first step with it; the discriminator is not trained before
    features: float             # of feature matching in the discriminator
    perceptual: float           # of the distance by the perceptual network


def absolute_error(y: Tensor, x: Tensor, weights: Tensor | None) -> Tensor:
    """LDM's reconstruction term."""
    error = (y - x).abs()
    return error.mean() if weights is None else (weights * error).mean()


class DecoderLoss:
    """`loss(step)` for the Loop. `modules` is what the Loop trains.

    Args:
        decoder: what is trained.
        clips: StepContext -> Clip.
        params: the weights of the terms.
        discriminator: called with clips (b 3 t h w), gives (answers, features).
        image_discriminator: the same for frames (n 3 h w).
        post_quant: the convolution between latents and decoder; frozen here.
        perceptual: the distance of pictures (n 3 h w) to pictures; frozen here.
        reconstruction: (pictures, true pictures, weights) -> error.
        train_spatial: True trains the whole decoder, as SVD's was. False trains only its temporal layers, and the image
            decoder inside stays what it was.
    """

    def __init__(self, decoder: TemporalDecoder, clips: Callable[..., Clip], params: DecoderLossParams,
                 discriminator: nn.Module | None = None, image_discriminator: nn.Module | None = None,
                 post_quant: nn.Module | None = None, perceptual: nn.Module | None = None,
                 reconstruction: Callable[..., Tensor] = absolute_error, train_spatial: bool = True):
        require_networks(params.perceptual, params.adversarial + params.features, perceptual,
                         (discriminator, image_discriminator))
        self.decoder, self.clips, self.params = decoder, clips, params
        self.judges = {name: network for name, network in (("discriminator", discriminator),
                                                           ("image_discriminator", image_discriminator)) if network}
        self.frozen = [network for network in (post_quant, perceptual) if network is not None]
        self.post_quant, self.perceptual, self.reconstruction = post_quant, perceptual, reconstruction
        self.modules = {"decoder": decoder, **self.judges}
        for network in self.frozen:
            freeze(network)
        temporal = set(decoder.temporal_names())
        for name, parameter in decoder.named_parameters():
            parameter.requires_grad_(train_spatial or name in temporal)

    def to(self, device):
        for network in self.frozen:
            network.to(device)

    def __call__(self, step):
        clip = self.clips(step)
        frames = clip.latents.shape[1]
        x, z = clip.frames.flatten(0, 1), clip.latents.flatten(0, 1)
        weights = None if clip.weights is None else clip.weights.flatten(0, 1)
        if self.post_quant is not None:
            z = self.post_quant(z)
        y = self.decoder(z, frames).float()
        loss = self.reconstruction(y, x, weights)
        if self.perceptual is not None and self.params.perceptual:
            loss = loss + self.params.perceptual * self.perceptual(y, x)
        figures = {"psnr": psnr(y, x), "reconstruction": loss.detach()}
        active = step.step >= self.params.adversarial_from
        total = loss
        for name, judge in self.judges.items():
            terms = self.judge(name, judge, y, x, frames, loss) if active else zero_terms(name, loss)
            total = total + terms.pop("loss")
            figures |= terms
        return {"loss": total, **figures}

    def judge(self, name: str, judge: nn.Module, y: Tensor, x: Tensor, frames: int, loss: Tensor) -> dict:
        """What a discriminator adds: to the decoder's loss, and its own."""
        if name == "discriminator":
            y, x = (part.unflatten(0, (-1, frames)).transpose(1, 2) for part in (y, x))
        found = judgement(judge, y, x)
        weight = self.adaptive_weight(loss, found.adversarial)
        return found.terms(name, weight, self.params.adversarial * weight, self.params.features)

    def adaptive_weight(self, loss: Tensor, adversarial: Tensor) -> Tensor:
        """Brings the adversarial gradient at the last layer to the size of the other terms' (VQGAN, Eq. 7)."""
        last = self.decoder.last_weight
        of_loss, of_adversarial = (torch.autograd.grad(term, last, retain_graph=True)[0].float().norm()
                                   for term in (loss, adversarial))
        return (of_loss / (of_adversarial + 1e-4)).clamp(0, LARGEST_WEIGHT).detach()


def psnr(y: Tensor, x: Tensor) -> Tensor:
    """Peak signal to noise ratio of pictures in -1..1, in dB."""
    return 10 * torch.log10(4 / (y - x).detach().float().square().mean().clamp_min(1e-10))
