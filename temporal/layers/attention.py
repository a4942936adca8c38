"""Attention over frames (Video LDM, section 3.1; SVD's `SpatialVideoTransformer`)."""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from .mix import Mix
from .position import distance_band, timestep_sinusoid


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
    """Scaled dot-product attention on `b n (heads d)`; the signature of ComfyUI's `optimized_attention`."""
    q, k, v = (rearrange(x, "b n (h d) -> b h n d", h=heads) for x in (q, k, v))
    return rearrange(F.scaled_dot_product_attention(q, k, v, attn_mask=mask), "b h n d -> b n (h d)")


class Attention(nn.Module):
    """q, k, v without bias, out with; `context_dim` is the width of keys and values where it is not `dim`."""

    def __init__(self, dim: int, heads: int, context_dim: int | None = None, attention=attend,
                 operations=nn, dtype=None, device=None):
        super().__init__()
        if heads < 1 or dim % heads:
            raise ValueError(f"{dim} channels do not divide into {heads} attention heads")
        place = {"dtype": dtype, "device": device}
        self.heads = heads
        self.attention = attention
        self.to_q = operations.Linear(dim, dim, bias=False, **place)
        self.to_k = operations.Linear(context_dim or dim, dim, bias=False, **place)
        self.to_v = operations.Linear(context_dim or dim, dim, bias=False, **place)
        self.to_out = nn.Sequential(operations.Linear(dim, dim, **place), nn.Dropout(0.0))

    def forward(self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        context = x if context is None else context
        out = self.attention(self.to_q(x), self.to_k(context), self.to_v(context), self.heads, mask=mask)
        return self.to_out(out)


class GEGLU(nn.Module):
    def __init__(self, dim: int, inner: int, operations=nn, dtype=None, device=None):
        super().__init__()
        self.proj = operations.Linear(dim, inner * 2, dtype=dtype, device=device)

    def forward(self, x: Tensor) -> Tensor:
        x, gate = self.proj(x).chunk(2, dim=-1)
        return F.gelu(gate).mul_(x)     # in place: the widest tensors of a block, and fresh memory is slow on a CPU


class FeedForward(nn.Module):
    """GEGLU, four times as wide inside."""

    def __init__(self, dim: int, operations=nn, dtype=None, device=None):
        super().__init__()
        self.net = nn.Sequential(
            GEGLU(dim, dim * 4, operations, dtype, device),
            nn.Dropout(0.0),
            operations.Linear(dim * 4, dim, dtype=dtype, device=device),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class TemporalTransformerBlock(nn.Module):
    """ff_in, self-attention over t, cross-attention to text, GEGLU; each residual, on `b s t c`."""

    def __init__(self, dim: int, heads: int, context_dim: int, attention=attend, operations=nn,
                 dtype=None, device=None):
        super().__init__()
        place = {"dtype": dtype, "device": device}
        self.norm_in = operations.LayerNorm(dim, **place)
        self.ff_in = FeedForward(dim, operations, **place)
        self.norm1 = operations.LayerNorm(dim, **place)
        self.attn1 = Attention(dim, heads, None, attention, operations, **place)
        self.norm2 = operations.LayerNorm(dim, **place)
        self.attn2 = Attention(dim, heads, context_dim, attention, operations, **place)
        self.norm3 = operations.LayerNorm(dim, **place)
        self.ff = FeedForward(dim, operations, **place)

    def forward(self, x: Tensor, text: Tensor, mask: Tensor | None = None) -> Tensor:
        """x `b s t c`, text `b l d`: one text for a whole clip, so that all its tokens share keys and values."""
        x = x + self.ff_in(self.norm_in(x))
        x = x + self.attn1(self.norm1(x).flatten(0, 1), mask=mask).view_as(x)
        x = x + self.attn2(self.norm2(x).flatten(1, 2), context=text).view_as(x)
        return x + self.ff(self.norm3(x))


class TemporalTransformer(nn.Module):
    """Slot `in_attn_post_ff`: acts on what a spatial transformer block gave out, then mixes."""

    def __init__(self, channels: int, heads: int, context_dim: int, mix_length: int = 1, attention=attend,
                 operations=nn, dtype=None, device=None):
        super().__init__()
        place = {"dtype": dtype, "device": device}
        self.channels = channels
        self.time_stack = nn.ModuleList(
            [TemporalTransformerBlock(channels, heads, context_dim, attention, operations, **place)])
        self.time_pos_embed = nn.Sequential(
            operations.Linear(channels, channels * 4, **place),
            nn.SiLU(),
            operations.Linear(channels * 4, channels, **place),
        )
        self.time_mixer = Mix(mix_length, dtype, device)

    def positions(self, frames: int, like: Tensor) -> Tensor:
        sinusoid = timestep_sinusoid(torch.arange(frames, device=like.device), self.channels)
        return self.time_pos_embed(sinusoid.to(like.dtype))

    def forward(self, x: Tensor, text: Tensor, frames: int, strength: float = 1.0,
                max_distance: int | None = None) -> Tensor:
        """x `(b t) s c`, text `b l d`, frames t."""
        clip = rearrange(x, "(b t) s c -> b s t c", t=frames).contiguous() + self.positions(frames, x)
        band = distance_band(frames, max_distance, x.device)
        temporal = self.time_stack[0](clip, text, band)
        return self.time_mixer(x, rearrange(temporal, "b s t c -> (b t) s c"), frames, strength)
