"""The perceptual distance of pictures by VGG16. Its weights have to be there already: nothing is downloaded.

Trainings without it can match the features of the discriminator instead.
"""

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import max_pool2d, normalize

from ..errors import VideoLDMError

MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)      # of ImageNet, on which VGG was trained
STAGES = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21))               # convolutions by their number in torchvision's file
WIDTHS = (64, 128, 256, 512)


class VGGDistance(nn.Module):
    """LPIPS's distance without its learned weights: the mean squared difference of unit-length features of four stages.

    `path` is the file of torchvision's vgg16 weights (vgg16-397923af.pth). Pictures are (n 3 h w) in -1..1, with 16
    pixels or more a side.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, path):
        super().__init__()
        self.convs = nn.ModuleDict()
        before = 3
        for stage, width in zip(STAGES, WIDTHS):
            for number in stage:
                self.convs[str(number)] = nn.Conv2d(before, width, 3, padding=1)
                before = width
        self.register_buffer("mean", torch.tensor(MEAN).view(1, 3, 1, 1))
        self.register_buffer("deviation", torch.tensor(DEVIATION).view(1, 3, 1, 1))
        self.load(Path(path))
        self.requires_grad_(False).eval()

    def load(self, path: Path):
        try:
            stored = torch.load(path, map_location="cpu", weights_only=True)
            for number, conv in self.convs.items():
                conv.load_state_dict({part: stored[f"features.{number}.{part}"] for part in ("weight", "bias")})
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            raise VideoLDMError(f"'{path}' does not hold torchvision's VGG16 weights ({reason}). Use "
                                "vgg16-397923af.pth, or train without a perceptual network.") from error

    def features(self, x: Tensor) -> list[Tensor]:
        x, found = ((x + 1) / 2 - self.mean) / self.deviation, []
        for number, stage in enumerate(STAGES):
            x = max_pool2d(x, 2) if number else x
            for conv in stage:
                x = torch.relu(self.convs[str(conv)](x))
            found.append(normalize(x.float(), dim=1))
        return found

    def forward(self, y: Tensor, x: Tensor) -> Tensor:
        pairs = zip(self.features(y), self.features(x), strict=True)
        return torch.stack([(one - other).square().sum(1).mean() for one, other in pairs]).sum()
