"""Attention over frames (Video LDM, section 3.1; SVD's `SpatialVideoTransformer`)."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from .brick import BrickCall
from .factory import TORCH, Factory
from .mix import Mix
from .position import timestep_sinusoid


@dataclass(frozen=True)
class TransformerParams:
    """Params of Video LDM's temporal transformer, slot `in_attn_post_ff`."""

    channels: int
    heads: int
    context_dim: int        # width of the text
    mix_length: int         # length of the mix vector. Above 1, the layer runs clips of this length only

    def build(self, make: Factory) -> nn.Module:
        return TemporalTransformer(self, make)


class Projections(nn.Module):
    """The projections of an attention. q, k and v have no bias, the output has one.

    Args:
        dim: channels of the features, a multiple of `heads`.
        heads: number of attention heads.
        context_dim: channels of the context that keys and values are made from. None: dim.
    """

    def __init__(self, dim: int, heads: int, context_dim: int | None = None, make: Factory = TORCH) -> None:
        super().__init__()
        if heads < 1 or dim % heads:
            raise ValueError(f"{dim} channels do not divide into {heads} attention heads")
        self.heads = heads
        self.attention = make.attention
        self.to_q = make.linear(dim, dim, bias=False)
        self.to_k = make.linear(context_dim or dim, dim, bias=False)
        self.to_v = make.linear(context_dim or dim, dim, bias=False)
        self.to_out = nn.Sequential(make.linear(dim, dim), nn.Dropout(0.0))

    def attend(self, x: Tensor, context: Tensor, mask: Tensor | None) -> Tensor:
        """Attention of x `b n c` to context `b m d`. The mask is True where x may attend to the context."""
        out = self.attention(self.to_q(x), self.to_k(context), self.to_v(context), self.heads, mask=mask)
        return self.to_out(out)


class Attention(Projections):
    """Cross-attention of x to a context, or self-attention without one."""

    def forward(self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        return self.attend(x, x if context is None else context, mask)


class GEGLU(nn.Module):
    """A linear layer to twice the width, of which one half gates the other through GELU."""

    def __init__(self, dim: int, inner: int, make: Factory = TORCH) -> None:
        super().__init__()
        self.proj = make.linear(dim, inner * 2)

    def forward(self, x: Tensor) -> Tensor:
        x, gate = self.proj(x).chunk(2, dim=-1)
        return F.gelu(gate).mul_(x)     # in place: these are a block's widest tensors, and CPUs allocate slowly


class FeedForward(nn.Module):
    """A feed-forward with GEGLU, four times as wide inside."""

    def __init__(self, dim: int, make: Factory = TORCH) -> None:
        super().__init__()
        self.net = nn.Sequential(GEGLU(dim, dim * 4, make), nn.Dropout(0.0), make.linear(dim * 4, dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class TemporalTransformerBlock(nn.Module):
    """ff_in, self-attention over t, cross-attention to text, then a GEGLU. Each is residual, on `b s t c`."""

    def __init__(self, dim: int, heads: int, context_dim: int, make: Factory = TORCH) -> None:
        super().__init__()
        self.norm_in = make.layer_norm(dim)
        self.ff_in = FeedForward(dim, make)
        self.norm1 = make.layer_norm(dim)
        self.attn1 = Attention(dim, heads, None, make)
        self.norm2 = make.layer_norm(dim)
        self.attn2 = Attention(dim, heads, context_dim, make)
        self.norm3 = make.layer_norm(dim)
        self.ff = FeedForward(dim, make)

    def forward(self, x: Tensor, text: Tensor, mask: Tensor | None = None) -> Tensor:
        """x `b s t c`, text `b l d`. A clip has one text, so its keys and values are computed once."""
        x = x + self.ff_in(self.norm_in(x))
        x = x + self.attn1(self.norm1(x).flatten(0, 1), mask=mask).view_as(x)
        x = x + self.attn2(self.norm2(x).flatten(1, 2), context=text).view_as(x)
        return x + self.ff(self.norm3(x))


def contiguous_sum(x: Tensor, y: Tensor) -> Tensor:
    """x + y in the order of x's dimensions in memory. x may be a view that lies in another order."""
    if torch.is_grad_enabled():
        return x.contiguous() + y
    # One pass: the sum is written where a copy of x would be. `out` has no gradient.
    return torch.add(x, y, out=torch.empty(x.shape, dtype=torch.result_type(x, y), device=x.device))


class TemporalTransformer(nn.Module):
    """Slot `in_attn_post_ff`: runs on the output of a spatial transformer block, then mixes with it."""

    def __init__(self, params: TransformerParams, make: Factory = TORCH) -> None:
        super().__init__()
        self.channels = channels = params.channels
        self.time_stack = nn.ModuleList(
            [TemporalTransformerBlock(channels, params.heads, params.context_dim, make)])
        self.time_pos_embed = nn.Sequential(
            make.linear(channels, channels * 4), nn.SiLU(), make.linear(channels * 4, channels))
        self.time_mixer = Mix(params.mix_length, make)

    def positions(self, frames: int, like: Tensor) -> Tensor:
        """Embeddings of the frame positions, `t c`."""
        sinusoid = timestep_sinusoid(torch.arange(frames, device=like.device), self.channels)
        return self.time_pos_embed(sinusoid.to(like.dtype))

    def forward(self, x: Tensor, call: BrickCall) -> Tensor:
        """x `(b t) s c`."""
        frames = call.frames
        clip = contiguous_sum(rearrange(x, "(b t) s c -> b s t c", t=frames), self.positions(frames, x))
        temporal = self.time_stack[0](clip, call.text, call.band(x.device))
        return self.time_mixer(x, rearrange(temporal, "b s t c -> (b t) s c"), frames, call.strength)
