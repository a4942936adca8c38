"""Fine-tuning of a temporal decoder (Video LDM, section 3.1.1, Table 8): the encoder is frozen, clips of latents go in,
and a patch-wise discriminator of 3-D convolutions judges clips of pictures.

The paper states the discriminator and no other term; those here are LDM's for autoencoders (L1, perceptual, adversarial
with adaptive weight). The discriminator trains beside the decoder, in the same step and by the same optimizer. An image
discriminator besides the one for video worsened the paper's FVD from 32.94 to 51.01, so it is off unless given.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..decoder import TemporalDecoder
from ..errors import VideoLDMError
from .discriminator import feature_distance, hinge_loss, judged
from .temporal import freeze

LARGEST_WEIGHT = 1e4


class Clip(NamedTuple):
    """Latents (b t c h w) and the frames (b t 3 H W) in -1..1 they stand for; weights (b t 1 H W): how much each pixel
    counts, None for all alike."""

    latents: Tensor
    frames: Tensor
    weights: Tensor | None = None


@dataclass(frozen=True)
class DecoderLossParams:
    """What each term counts. adversarial: times the adaptive weight, from step `adversarial_from` on, before which the
    discriminator is not trained either. features: of the discriminator, matched; perceptual: of the network given."""

    adversarial: float
    adversarial_from: int
    features: float
    perceptual: float


def absolute_error(y: Tensor, x: Tensor, weights: Tensor | None) -> Tensor:
    """LDM's reconstruction term."""
    error = (y - x).abs()
    return error.mean() if weights is None else (weights * error).mean()


class DecoderLoss:
    """`loss(step)` for the Loop; `modules` is what the Loop trains.

    clips: StepContext -> Clip. discriminator: called with clips (b 3 t h w), gives (answers, features);
    image_discriminator: the same of frames (n 3 h w). post_quant: what stands between latents and decoder, frozen here.
    perceptual: pictures (n 3 h w), pictures -> distance; frozen here. train_spatial: the whole decoder learns, as SVD's
    did; without, its temporal layers alone, and the image decoder within stays what it was.
    """

    def __init__(self, decoder: TemporalDecoder, clips: Callable[..., Clip], params: DecoderLossParams,
                 discriminator: nn.Module | None = None, image_discriminator: nn.Module | None = None,
                 post_quant: nn.Module | None = None, perceptual: nn.Module | None = None,
                 reconstruction: Callable[..., Tensor] = absolute_error, train_spatial: bool = True):
        if params.perceptual and perceptual is None:
            raise VideoLDMError(f"The perceptual term counts {params.perceptual:g}, and no perceptual network is "
                                "given. Give one (temporal/training/perceptual.py), or set it to 0.")
        if (params.adversarial or params.features) and discriminator is None and image_discriminator is None:
            raise VideoLDMError("The adversarial and feature terms need a discriminator. Give one, or set both to 0.")
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
        answers, seen = judged(judge, y)
        adversarial = -answers.float().mean()
        weight = self.adaptive_weight(loss, adversarial)
        real, features = judge(x)
        fake, _ = judge(y.detach())
        own = hinge_loss(real, fake)
        added = self.params.adversarial * weight * adversarial + own
        if self.params.features:
            added = added + self.params.features * feature_distance(seen, [part.detach() for part in features])
        return {"loss": added, f"{name}_loss": own.detach(), f"{name}_weight": weight,
                f"{name}_fooled": (fake.detach() > 0).float().mean()}

    def adaptive_weight(self, loss: Tensor, adversarial: Tensor) -> Tensor:
        """Brings the adversarial gradient at the last layer to the size of the other terms' (VQGAN, Eq. 7)."""
        last = self.decoder.last_weight
        of_loss, of_adversarial = (torch.autograd.grad(term, last, retain_graph=True)[0].float().norm()
                                   for term in (loss, adversarial))
        return (of_loss / (of_adversarial + 1e-4)).clamp(0, LARGEST_WEIGHT).detach()


def zero_terms(name: str, like: Tensor) -> dict:
    """The same figures before a discriminator has begun: every step of a log has the same names."""
    zero = like.detach() * 0
    return {"loss": zero, f"{name}_loss": zero, f"{name}_weight": zero, f"{name}_fooled": zero}


def psnr(y: Tensor, x: Tensor) -> Tensor:
    """Peak signal to noise ratio of pictures in -1..1, in dB."""
    return 10 * torch.log10(4 / (y - x).detach().float().square().mean().clamp_min(1e-10))
