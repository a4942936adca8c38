"""Patch-wise discriminators: of clips by 3-D convolutions (Video LDM, section 3.1.1), of images by 2-D ones.

Each answer judges a patch, so a decoder trained on small crops serves pictures of any size. PatchGAN has BatchNorm.
Here it is GroupNorm, because a batch is a clip or two.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import leaky_relu, relu

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
