"""Temporal layers of ModelScope's video networks, which ZeroScope and VideoCrafter share
(docs/formats.md#modelscope-and-zeroscope; docs/papers.md#modelscope).

There are two kinds:
    StagedConv          four convolutions over t after each ResBlock
    ClipTransformer     self-attention over t after the first convolution and after each spatial transformer

The norms of both pool over all frames of a clip. The names of modules are those of the files.
"""

from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn

from .attention import FeedForward, Projections
from .brick import BrickCall
from .factory import TORCH, Factory
from .motion import over_frames

KERNEL = (3, 1)     # over t and over places


@dataclass(frozen=True)
class StagedConvParams:
    """Params of four convolutions over t, slot `post_res`."""

    channels: int

    def build(self, make: Factory) -> nn.Module:
        return StagedConv(self, make)


@dataclass(frozen=True)
class ClipTransformerParams:
    """Params of a transformer over t, slots `post_conv_in` and `post_attn`."""

    channels: int
    heads: int
    inner: int          # channels between the two projections
    blocks: int = 1     # transformer blocks
    # VideoCrafter 1: the largest distance of two frames in its tables of relative positions. None: it has no tables
    reach: int | None = None

    def build(self, make: Factory) -> nn.Module:
        return ClipTransformer(self, make)


class StagedConv(nn.Module):
    """Slot `post_res`: `x + conv4(conv3(conv2(conv1(x))))`. A fresh one is the identity."""

    def __init__(self, params: StagedConvParams, make: Factory = TORCH) -> None:
        super().__init__()
        self.conv1 = stage(params.channels, make)
        self.conv2 = stage(params.channels, make, nn.Dropout(0.0))
        self.conv3 = stage(params.channels, make, nn.Dropout(0.0))
        self.conv4 = stage(params.channels, make, nn.Dropout(0.0))
        nn.init.zeros_(self.conv4[-1].weight)
        nn.init.zeros_(self.conv4[-1].bias)

    def forward(self, x: Tensor, call: BrickCall) -> Tensor:
        """x `(b t) c h w`."""
        return torch.add(x, self.residual(x, call), alpha=call.strength)

    def residual(self, x: Tensor, call: BrickCall) -> Tensor:
        """What the convolutions make of x `(b t) c h w`."""
        h = rearrange(x, "(b t) c h w -> b c t (h w)", t=call.frames)
        for conv in (self.conv1, self.conv2, self.conv3, self.conv4):
            h = conv(h)
        return rearrange(h, "b c t (h w) -> (b t) c h w", h=x.shape[2])


def stage(channels: int, make: Factory, *dropout: nn.Module) -> nn.Sequential:
    """A norm that pools over t, h and w, and a convolution over t, on `b c t (h w)`.

    The published convolution has the kernel (3, 1, 1) on `b c t h w`. PyTorch runs the same faster in two dimensions.
    """
    return nn.Sequential(make.group_norm(channels), nn.SiLU(), *dropout,
                         make.conv2d(channels, channels, KERNEL, padding=(1, 0)))


class RelativePosition(nn.Module):
    """A learned vector for each distance of two frames, up to `reach` on both sides. Farther frames have the last."""

    def __init__(self, reach: int, width: int, make: Factory = TORCH) -> None:
        super().__init__()
        self.reach = reach
        self.embeddings_table = nn.Parameter(torch.empty(2 * reach + 1, width, **make.weights))
        nn.init.xavier_uniform_(self.embeddings_table)

    def forward(self, frames: int, like: Tensor) -> Tensor:
        """The vectors from frame i to frame j, `i j d`, in the dtype and on the device of `like`."""
        times = torch.arange(frames, device=like.device)
        distances = (times[None] - times[:, None]).clamp(-self.reach, self.reach)
        return self.embeddings_table.to(like)[distances + self.reach]


class ClipAttention(Projections):
    """Self-attention over t. With tables, keys and values depend on the distance of the two frames too."""

    def __init__(self, params: ClipTransformerParams, make: Factory = TORCH) -> None:
        super().__init__(params.inner, params.heads, None, make)
        self.relative_position_k: RelativePosition | None = None
        self.relative_position_v: RelativePosition | None = None
        if params.reach is not None:
            width = params.inner // params.heads
            self.relative_position_k = RelativePosition(params.reach, width, make)
            self.relative_position_v = RelativePosition(params.reach, width, make)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """x `s t c`."""
        if self.relative_position_k is None or self.relative_position_v is None:
            return self.attend(x, x, mask)
        q, k, v = (rearrange(to(x), "s t (h d) -> s h t d", h=self.heads) for to in (self.to_q, self.to_k, self.to_v))
        q = q * q.shape[-1] ** -0.5
        to_keys, to_values = (table(x.shape[1], q) for table in (self.relative_position_k, self.relative_position_v))
        scores = q @ k.mT + torch.einsum("shid,ijd->shij", q, to_keys)
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf"))
        shares = scores.softmax(dim=-1)
        out = shares @ v + torch.einsum("shij,ijd->shid", shares, to_values)
        return self.to_out(rearrange(out, "s h t d -> s t (h d)"))


class ClipBlock(nn.Module):
    """Two self-attentions over t and a GEGLU, each residual, on `s t c`."""

    def __init__(self, params: ClipTransformerParams, make: Factory = TORCH) -> None:
        super().__init__()
        self.norm1 = make.layer_norm(params.inner)
        self.attn1 = ClipAttention(params, make)
        self.norm2 = make.layer_norm(params.inner)
        self.attn2 = ClipAttention(params, make)
        self.norm3 = make.layer_norm(params.inner)
        self.ff = FeedForward(params.inner, make)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = x + self.attn1(self.norm1(x), mask)
        x = x + self.attn2(self.norm2(x), mask)
        return x + self.ff(self.norm3(x))


class ClipTransformer(nn.Module):
    """Slots `post_conv_in` and `post_attn`: norm, linear layer, blocks over t, linear layer; residual.

    A fresh one is the identity.
    """

    def __init__(self, params: ClipTransformerParams, make: Factory = TORCH) -> None:
        super().__init__()
        self.norm = make.group_norm(params.channels, eps=1e-6)
        self.proj_in = make.linear(params.channels, params.inner)
        self.transformer_blocks = nn.ModuleList(ClipBlock(params, make) for _ in range(params.blocks))
        self.proj_out = make.linear(params.inner, params.channels)
        nn.init.zeros_(self.proj_out.weight)
        nn.init.zeros_(self.proj_out.bias)

    def forward(self, x: Tensor, call: BrickCall) -> Tensor:
        """x `(b t) c h w`."""
        h = self.norm(rearrange(x, "(b t) c h w -> b c t h w", t=call.frames))
        return torch.add(x, over_frames(self, h, call.band(x.device)), alpha=call.strength)
