"""The AnimateDiff motion module: temporal self-attention after a spatial transformer (formats.md, a)."""

import torch
from einops import rearrange
from torch import Tensor, nn

from .attention import Attention, FeedForward, attend
from .position import distance_band, interleaved_sinusoid

CACHED = 1024 * 320     # numbers per thread that the blocks take in at a time; 8 times as many, at their widest, fit L3


class MotionAttention(Attention):
    """Self-attention over t whose frame positions feed q, k and v, after the norm."""

    def __init__(self, dim: int, heads: int, table_length: int = 0, attention=attend,
                 operations=nn, dtype=None, device=None):
        super().__init__(dim, heads, None, attention, operations, dtype, device)
        self.pos_encoder = PositionTable(table_length, dim, dtype, device) if table_length else None

    def positions(self, frames: int, like: Tensor) -> Tensor:
        if self.pos_encoder is not None:
            return self.pos_encoder(frames).to(like)
        return interleaved_sinusoid(frames, like.shape[-1], like.device).to(like.dtype)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return super().forward(x + self.positions(x.shape[1], x), mask=mask)


class PositionTable(nn.Module):
    """Learned positions: a file whose table is not the sinusoid keeps its own, and ends where it ends."""

    def __init__(self, length: int, dim: int, dtype=None, device=None):
        super().__init__()
        self.pe = nn.Parameter(torch.zeros(1, length, dim, dtype=dtype, device=device))

    def forward(self, frames: int) -> Tensor:
        return self.pe[0, :frames]


class MotionBlock(nn.Module):
    """Two temporal self-attentions and a GEGLU, each residual, on `(b s) t c`."""

    def __init__(self, dim: int, heads: int, attentions: int = 2, table_length: int = 0, attention=attend,
                 operations=nn, dtype=None, device=None):
        super().__init__()
        place = {"dtype": dtype, "device": device}
        self.attention_blocks = nn.ModuleList(
            MotionAttention(dim, heads, table_length, attention, operations, **place) for _ in range(attentions))
        self.norms = nn.ModuleList(operations.LayerNorm(dim, **place) for _ in range(attentions))
        self.ff = FeedForward(dim, operations, **place)
        self.ff_norm = operations.LayerNorm(dim, **place)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        for norm, attention in zip(self.norms, self.attention_blocks):
            x = x + attention(norm(x), mask)
        return x + self.ff(self.ff_norm(x))


class TemporalTransformer3D(nn.Module):
    """Norm, in, blocks over t, out: the residual that is added to `(b t) c h w`.

    Its norm is per frame in AnimateDiff's own code, pooled over the frames in diffusers and in the SDXL beta.
    """

    def __init__(self, channels: int, heads: int, blocks: int = 1, attentions: int = 2, table_length: int = 0,
                 norm_pooled: bool = False, attention=attend, operations=nn, dtype=None, device=None):
        super().__init__()
        place = {"dtype": dtype, "device": device}
        self.norm_pooled = norm_pooled
        self.norm = operations.GroupNorm(32, channels, eps=1e-6, **place)
        self.proj_in = operations.Linear(channels, channels, **place)
        self.transformer_blocks = nn.ModuleList(
            MotionBlock(channels, heads, attentions, table_length, attention, operations, **place)
            for _ in range(blocks))
        self.proj_out = operations.Linear(channels, channels, **place)
        nn.init.zeros_(self.proj_out.weight)
        nn.init.zeros_(self.proj_out.bias)

    def normed(self, x: Tensor, frames: int) -> Tensor:
        if not self.norm_pooled:
            return self.norm(x)
        pooled = self.norm(rearrange(x, "(b t) c h w -> b c t h w", t=frames))
        return rearrange(pooled, "b c t h w -> (b t) c h w")

    def forward(self, x: Tensor, frames: int, max_distance: int | None = None) -> Tensor:
        _, _, height, _ = x.shape
        band = distance_band(frames, max_distance, x.device)
        h = rearrange(self.normed(x, frames), "(b t) c h w -> (b h w) t c", t=frames)
        slices = [self.over_time(places, band) for places in h.split(slice_length(h))]
        h = torch.cat([rearrange(places, "s t c -> t s c") for places in slices], dim=1)   # frames whole again in memory
        return rearrange(h, "t (b h w) c -> (b t) c h w", b=len(x) // frames, h=height)

    def over_time(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """x `s t c`: some places of the clips, each for itself."""
        h = self.proj_in(x.contiguous())        # one copy here, or every linear layer makes its own
        for block in self.transformer_blocks:
            h = block(h, mask)
        return self.proj_out(h)


def slice_length(x: Tensor) -> int:
    """How many places of `s t c` run at a time: on a CPU as many as its caches hold, elsewhere all."""
    if x.device.type != "cpu":
        return len(x)
    return max(1, CACHED * torch.get_num_threads() // x[0].numel())


class MotionModule(nn.Module):
    """Slot `post_attn`: `x + strength * temporal_transformer(x)`."""

    def __init__(self, channels: int, heads: int, blocks: int = 1, attentions: int = 2, table_length: int = 0,
                 norm_pooled: bool = False, attention=attend, operations=nn, dtype=None, device=None):
        super().__init__()
        self.temporal_transformer = TemporalTransformer3D(
            channels, heads, blocks, attentions, table_length, norm_pooled, attention, operations, dtype, device)

    def forward(self, x: Tensor, frames: int, strength: float = 1.0, max_distance: int | None = None) -> Tensor:
        """x `(b t) c h w`, frames t."""
        return torch.add(x, self.temporal_transformer(x, frames, max_distance), alpha=strength)
