"""The AnimateDiff motion module: temporal self-attention after a spatial transformer (docs/formats.md#animatediff)."""

from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn

from .attention import FeedForward, Projections
from .brick import BrickCall, Merge
from .factory import TORCH, Factory
from .position import interleaved_sinusoid

# On a CPU the blocks run on this many numbers per thread at a time. Inside they are 8 times as wide, which fits L3.
CACHED = 1024 * 320


@dataclass(frozen=True)
class MotionParams:
    """Params of AnimateDiff's motion module, slot `post_attn`."""

    channels: int
    heads: int
    blocks: int = 1                 # transformer blocks
    attentions: int = 2             # self-attentions in each block
    table_length: int = 0           # length of a learned position table. 0: positions are computed sinusoids
    norm_pooled: bool = False       # True: the module's norm pools over the frames of a clip

    def build(self, make: Factory) -> nn.Module:
        return MotionModule(self, make)


class MotionAttention(Projections):
    """Self-attention over t. Frame positions are added to the input of q, k and v, after the norm."""

    def __init__(self, params: MotionParams, make: Factory = TORCH) -> None:
        super().__init__(params.channels, params.heads, None, make)
        length = params.table_length
        self.pos_encoder = PositionTable(length, params.channels, make) if length else None

    def positions(self, frames: int, like: Tensor) -> Tensor:
        """The frame positions, `t c`."""
        if self.pos_encoder is not None:
            return self.pos_encoder(frames).to(like)
        return interleaved_sinusoid(frames, like.shape[-1], like.device).to(like.dtype)

    def forward(self, x: Tensor, mask: Tensor | None = None, merge: Merge | None = None) -> Tensor:
        """x `s t c`. merge: changes the input of q, k and v, with its frame positions. None: nothing does."""
        x = x + self.positions(x.shape[1], x)
        x = x if merge is None else merge(x)
        return self.attend(x, x, mask)


class PositionTable(nn.Module):
    """A learned position table, for files whose table is not the computed sinusoid. Its length limits the clip."""

    def __init__(self, length: int, dim: int, make: Factory = TORCH) -> None:
        super().__init__()
        self.pe = nn.Parameter(torch.zeros(1, length, dim, **make.weights))

    def forward(self, frames: int) -> Tensor:
        return self.pe[0, :frames]


class MotionBlock(nn.Module):
    """Temporal self-attentions and a GEGLU, each residual, on `(b s) t c`."""

    def __init__(self, params: MotionParams, make: Factory = TORCH) -> None:
        super().__init__()
        self.attention_blocks = nn.ModuleList(MotionAttention(params, make) for _ in range(params.attentions))
        self.norms = nn.ModuleList(make.layer_norm(params.channels) for _ in range(params.attentions))
        self.ff = FeedForward(params.channels, make)
        self.ff_norm = make.layer_norm(params.channels)

    def forward(self, x: Tensor, mask: Tensor | None = None, merge: Merge | None = None) -> Tensor:
        """merge: as in MotionAttention, for the first attention alone."""
        for number, (norm, attention) in enumerate(zip(self.norms, self.attention_blocks)):
            x = x + attention(norm(x), mask, merge if number == 0 else None)
        return x + self.ff(self.ff_norm(x))


class TemporalTransformer3D(nn.Module):
    """Norm, linear layer, blocks over t, linear layer. Returns the residual of `(b t) c h w`.

    The norm runs per frame in AnimateDiff's own code. It pools over the frames in diffusers and in the SDXL beta.
    """

    def __init__(self, params: MotionParams, make: Factory = TORCH) -> None:
        super().__init__()
        channels = params.channels
        self.norm_pooled = params.norm_pooled
        self.norm = make.group_norm(channels, eps=1e-6)
        self.proj_in = make.linear(channels, channels)
        self.transformer_blocks = nn.ModuleList(MotionBlock(params, make) for _ in range(params.blocks))
        self.proj_out = make.linear(channels, channels)
        nn.init.zeros_(self.proj_out.weight)
        nn.init.zeros_(self.proj_out.bias)

    def normalise(self, x: Tensor, frames: int) -> Tensor:
        """The norm of x `(b t) c h w`, per frame or pooled over the frames. Returns `b c t h w`."""
        if not self.norm_pooled:
            return rearrange(self.norm(x), "(b t) c h w -> b c t h w", t=frames)
        return self.norm(rearrange(x, "(b t) c h w -> b c t h w", t=frames))

    def forward(self, x: Tensor, call: BrickCall) -> Tensor:
        return over_frames(self, self.normalise(x, call.frames), call.band(x.device), merge=call.merge)


def over_frames(transformer: nn.Module, x: Tensor, mask: Tensor | None, added: Tensor | None = None,
                merge: Merge | None = None) -> Tensor:
    """Run `proj_in`, `transformer_blocks` and `proj_out` of a module. Returns `(b t) c h w`.

    Args:
        transformer: the module.
        x: `b c t h w`.
        mask: of the attention over time; None: all frames attend to each other.
        added: `t c`, to add behind proj_in; None: nothing.
        merge: for MotionBlock: what changes the input of the first block's first attention; None: nothing.
    """
    clips, _, _, height, _ = x.shape
    pixels = rearrange(x, "b c t h w -> (b h w) t c")
    slices, length = [], slice_length(pixels)
    for number, part in enumerate(pixels.split(length)):
        h = transformer.proj_in(part.contiguous())      # one copy here saves a copy in every linear layer
        if added is not None:
            h = h + added
        for n, block in enumerate(transformer.transformer_blocks):
            if merge is not None and n == 0:        # other families' blocks take no merge
                h = block(h, mask, merge.part(number * length, length))
            else:
                h = block(h, mask)
        slices.append(rearrange(transformer.proj_out(h), "s t c -> t s c"))
    return rearrange(torch.cat(slices, dim=1), "t (b h w) c -> (b t) c h w", b=clips, h=height)


def slice_length(x: Tensor) -> int:
    """How many pixels of x `s t c` run at a time: on a CPU as many as its caches hold, elsewhere all."""
    if x.device.type != "cpu":
        return len(x)
    return max(1, CACHED * torch.get_num_threads() // x[0].numel())


class MotionModule(nn.Module):
    """Slot `post_attn`: `x + strength * temporal_transformer(x)`."""

    def __init__(self, params: MotionParams, make: Factory = TORCH) -> None:
        super().__init__()
        self.temporal_transformer = TemporalTransformer3D(params, make)

    def forward(self, x: Tensor, call: BrickCall) -> Tensor:
        """x `(b t) c h w`."""
        return torch.add(x, self.temporal_transformer(x, call), alpha=call.strength)
