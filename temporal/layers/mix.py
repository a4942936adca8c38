"""How a temporal layer joins the spatial one (Video LDM, section 3.1 and appendix D)."""

import torch
from einops import rearrange
from torch import Tensor, nn

from .factory import Factory


class Mix(nn.Module):
    """alpha = sigmoid(mix_factor) weights the SPATIAL branch: `alpha * spatial + (1 - alpha) * temporal`.

    A scalar for text-to-video models, a vector over time for driving-type ones. The sigmoid and the initial
    mix_factor of 0.5 are those of the public SVD code; the paper leaves both open.
    """

    def __init__(self, length: int = 1, make: Factory = Factory()):
        super().__init__()
        self.mix_factor = nn.Parameter(torch.full((length,), 0.5, **make.weights))

    def forward(self, spatial: Tensor, temporal: Tensor, frames: int, strength: float = 1.0) -> Tensor:
        """Blend `(b t) ...` tensors; strength s moves alpha towards 1, the image model: 1 - s (1 - alpha)."""
        share = strength * torch.sigmoid(-self.mix_factor.to(spatial.device, torch.float32))    # s (1 - alpha)
        if len(share) > 1:
            share = share.repeat(spatial.shape[0] // frames)
            share = rearrange(share, "n -> n" + " 1" * (spatial.ndim - 1))
        share = share.to(spatial.dtype)
        mixed = torch.lerp(spatial, temporal.to(spatial.dtype), share)      # one pass; exact at either end
        return torch.where(share == 0, spatial, mixed)      # alpha 1 is a bypass: inf and NaN do not leak through 0 * x
