"""What every brick is built from."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
    """Scaled dot-product attention. It has the signature of ComfyUI's `optimized_attention`.

    Args:
        q: queries `b n (heads d)`.
        k, v: keys and values `b m (heads d)`.
        heads: number of heads.
        mask: True where a query may attend to a key, or a bias to add to the scores. It broadcasts to `b heads n m`.
    """
    q, k, v = (rearrange(x, "b n (h d) -> b h n d", h=heads) for x in (q, k, v))
    return rearrange(F.scaled_dot_product_attention(q, k, v, attn_mask=mask), "b h n d -> b n (h d)")


@dataclass(frozen=True)
class Factory:
    """Makes the layers of a brick. They all have one dtype and one device."""

    operations: Any = nn                            # the module with the layer classes: torch.nn, or the host's
    dtype: torch.dtype | None = None                # None: torch's default
    device: torch.device | str | None = None        # None: torch's default
    attention: Callable[..., Tensor] = attend       # called like `attend`

    @property
    def weights(self) -> dict[str, Any]:
        """The keyword arguments that give a new weight its dtype and device."""
        return {"dtype": self.dtype, "device": self.device}

    def linear(self, inputs: int, outputs: int, bias: bool = True) -> nn.Module:
        return self.operations.Linear(inputs, outputs, bias=bias, **self.weights)

    def conv1d(self, inputs: int, outputs: int, kernel: int) -> nn.Module:
        return self.operations.Conv1d(inputs, outputs, kernel, **self.weights)

    def conv2d(self, inputs: int, outputs: int, kernel: int | tuple, **options: Any) -> nn.Module:
        return self.operations.Conv2d(inputs, outputs, kernel, **options, **self.weights)

    def conv_transpose2d(self, inputs: int, outputs: int, kernel: int, stride: int) -> nn.Module:
        return self.operations.ConvTranspose2d(inputs, outputs, kernel, stride=stride, **self.weights)

    def conv3d(self, inputs: int, outputs: int, kernel: tuple, **options: Any) -> nn.Module:
        return self.operations.Conv3d(inputs, outputs, kernel, **options, **self.weights)

    def layer_norm(self, channels: int) -> nn.Module:
        return self.operations.LayerNorm(channels, **self.weights)

    def group_norm(self, channels: int, eps: float = 1e-5, groups: int = 32) -> nn.Module:
        return self.operations.GroupNorm(groups, channels, eps=eps, **self.weights)

    def embedding(self, rows: int, width: int) -> nn.Module:
        return self.operations.Embedding(rows, width, **self.weights)


TORCH = Factory()       # torch.nn's own layers, float32, on torch's default device
