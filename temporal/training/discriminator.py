"""Patch-wise discriminators: of clips by 3-D convolutions (Video LDM, section 3.1.1), of images by 2-D ones.

Each answer judges a patch, so a decoder trained on small crops serves pictures of any size. PatchGAN has BatchNorm.
Here it is GroupNorm, because a batch is a clip or two.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import leaky_relu, relu

from ..errors import VideoLDMError

GROUPS = 8


class PatchDiscriminator(nn.Module):
    """Judges pictures (n 3 h w) with dims 2, clips (b 3 t h w) with dims 3.

    It gives (answers, features). There is one answer per patch and frame, a logit. The features are what every layer
    but the last gives. `layers` is how often the picture is halved. Time keeps its length, because clips have few
    frames.
    """

    def __init__(self, dims: int = 3, channels: int = 64, layers: int = 3):
        super().__init__()
        if dims not in (2, 3):
            raise ValueError(f"a discriminator has 2 or 3 dimensions, not {dims}")
        conv: Callable[..., nn.Module] = nn.Conv3d if dims == 3 else nn.Conv2d
        time = dims - 2                 # sizes along t, where there is one
        widths = [3, *(channels * min(2 ** number, 8) for number in range(layers + 1))]
        self.convs, self.norms = nn.ModuleList(), nn.ModuleList()
        for number, (before, after) in enumerate(zip(widths, widths[1:])):
            stride = 2 if number < layers else 1
            self.convs.append(conv(before, after, (3,) * time + (4, 4), (1,) * time + (stride, stride), 1))
            self.norms.append(nn.GroupNorm(GROUPS, after) if number else nn.Identity())
        self.last = conv(widths[-1], 1, (3,) * time + (4, 4), 1, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        features = []
        for conv, norm in zip(self.convs, self.norms):
            x = leaky_relu(norm(conv(x)), 0.2)
            features.append(x)
        return self.last(x), features


def judged(discriminator: nn.Module, x: Tensor):
    """(answers, features) for x. Gradients reach x, but not the discriminator's own weights."""
    weights = {name: weight.detach() for name, weight in discriminator.named_parameters()}
    return torch.func.functional_call(discriminator, weights, (x,))


def hinge_loss(real: Tensor, fake: Tensor) -> Tensor:
    """The discriminator's loss: real answers above 1, fake ones below -1."""
    return 0.5 * (relu(1 - real.float()).mean() + relu(1 + fake.float()).mean())


def feature_distance(features: list[Tensor], others: list[Tensor]) -> Tensor:
    """Mean absolute difference of two lists of features, layer by layer (pix2pixHD's feature matching)."""
    parts = [(one.float() - other.float()).abs().mean() for one, other in zip(features, others, strict=True)]
    return torch.stack(parts).mean()


def require_networks(perceptual: float, judged_terms: float, perceptual_network: nn.Module | None,
                     judges: Sequence[nn.Module | None]) -> None:
    """Raise VideoLDMError where a term of a loss counts, and the network that it needs is not given.

    Args:
        perceptual: the weight of the perceptual term.
        judged_terms: the weights of the adversarial and the feature term, added.
        perceptual_network, judges: the networks. None: it is not given.
    """
    if perceptual and perceptual_network is None:
        raise VideoLDMError(f"The perceptual term counts {perceptual:g}, and no perceptual network is given. Give one "
                            "(temporal/training/perceptual.py), or set it to 0.")
    if judged_terms and all(judge is None for judge in judges):
        raise VideoLDMError("The adversarial and feature terms need a discriminator. Give one, or set both to 0.")


class Judgement(NamedTuple):
    """What a discriminator makes of pictures."""

    own: Tensor                 # its own loss, which trains nothing but the discriminator
    adversarial: Tensor         # minus its mean answer, which trains nothing but what made the pictures
    fooled: Tensor              # the share of patches that it takes for real
    seen: list[Tensor]          # the features of the pictures
    features: list[Tensor]      # the features of the true pictures, without a gradient

    def terms(self, name: str, weight: Tensor, adversarial: Tensor | float, features: float) -> dict[str, Tensor]:
        """What a discriminator adds to a loss, and its figures.

        Args:
            name: of the discriminator, for the log.
            weight: for the log.
            adversarial, features: the factors of both terms. No features are compared where their factor is 0.
        """
        added = adversarial * self.adversarial + self.own
        if features:
            added = added + features * feature_distance(self.seen, self.features)
        return {"loss": added, f"{name}_loss": self.own.detach(), f"{name}_weight": weight,
                f"{name}_fooled": self.fooled}


def judgement(discriminator: nn.Module, y: Tensor, x: Tensor) -> Judgement:
    """A discriminator looks at pictures y that should look like x."""
    answers, seen = judged(discriminator, y)
    real, features = discriminator(x)
    fake, _ = discriminator(y.detach())
    return Judgement(hinge_loss(real, fake), -answers.float().mean(), (fake.detach() > 0).float().mean(), seen,
                     [part.detach() for part in features])


def zero_terms(name: str, like: Tensor) -> dict[str, Tensor]:
    """The terms of a discriminator before it has begun, because every step of a log has the same names."""
    zero = like.detach() * 0
    return {"loss": zero, f"{name}_loss": zero, f"{name}_weight": zero, f"{name}_fooled": zero}
