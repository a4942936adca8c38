"""The mix of a temporal layer's output with the spatial features (Video LDM, section 3.1 and appendix D)."""

import torch
from einops import rearrange
from torch import Tensor, nn

from .factory import TORCH, Factory


class Mix(nn.Module):
    """`alpha * spatial + (1 - alpha) * temporal`: alpha = sigmoid(mix_factor) weights the SPATIAL branch.

    mix_factor is a scalar in text-to-video models, and a vector over time in driving models. The sigmoid and the
    initial value 0.5 come from the public SVD code. The paper does not state them.
    """

    def __init__(self, length: int = 1, make: Factory = TORCH) -> None:
        super().__init__()
        self.mix_factor = nn.Parameter(torch.full((length,), 0.5, **make.weights))

    def forward(self, spatial: Tensor, temporal: Tensor, frames: int, strength: float = 1.0) -> Tensor:
        """Mix two tensors `(b t) ...`. Without gradients `temporal` may be changed: the caller has no more use for it.

        Strength s below 1 moves alpha towards 1, the image model. alpha becomes 1 - s (1 - alpha).
        """
        share = strength * torch.sigmoid(-self.mix_factor.to(spatial.device, torch.float32))    # s (1 - alpha)
        if len(share) > 1:
            share = share.repeat(spatial.shape[0] // frames)
            share = rearrange(share, "n -> n" + " 1" * (spatial.ndim - 1))
        share, temporal = share.to(spatial.dtype), temporal.to(spatial.dtype)
        # Where alpha is 1, infinity and NaN of the temporal branch must not come through as 0 * x.
        if torch.is_grad_enabled():
            return torch.where(share == 0, spatial, torch.lerp(spatial, temporal, share))
        # In place it moves a third less. lerp is exact where the share is 0 or 1.
        return torch.lerp(spatial, temporal.masked_fill_(share == 0, 0), share)
