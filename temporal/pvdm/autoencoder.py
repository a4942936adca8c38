"""The autoencoder of PVDM: a clip to three planes and back (docs/papers.md#pvdm-autoencoder).

    x `b 3 t H W` in -1..1  ->  u `b c t h w`  ->  planes `b 4 l` in -1..1  ->  `b c t h w`  ->  x
"""

from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn

from ..errors import VideoLDMError
from ..layers.factory import TORCH, Factory
from .attention import AxisTransformer, TimeSformer
from .planes import PlaneShape, broadcast, join


@dataclass(frozen=True)
class AutoencoderParams:
    """The sizes of an autoencoder."""

    frames: int             # of a clip
    height: int             # of a frame, pixels
    width: int
    patch: int              # pixels along a side of a patch
    channels: int           # of a token
    plane_channels: int     # of the planes
    depth: int              # layers of the encoder, and of the decoder
    heads: int
    head_width: int
    plane_depth: int        # layers of the transformer of each plane
    plane_heads: int
    plane_head_width: int
    plane_hidden: int       # width inside its feed-forward

    def __post_init__(self) -> None:
        if self.height % self.patch or self.width % self.patch:
            raise ValueError(f"frames of {self.height} x {self.width} do not divide into patches of {self.patch}")
        if self.head_width % 4:
            raise ValueError(f"a head is {self.head_width} wide, and its positions need a multiple of 4")

    @property
    def shape(self) -> PlaneShape:
        """The grid of a clip."""
        return PlaneShape(self.frames, self.height // self.patch, self.width // self.patch)


RELEASED = AutoencoderParams(frames=16, height=256, width=256, patch=8, channels=384, plane_channels=4, depth=8,
                             heads=8, head_width=64, plane_depth=4, plane_heads=4, plane_head_width=48,
                             plane_hidden=512)


class Encoder(TimeSformer):
    def __init__(self, params: AutoencoderParams, make: Factory) -> None:
        super().__init__(params.channels, params.depth, params.heads, params.head_width, make)
        self.to_patch_embedding = make.linear(3 * params.patch ** 2, params.channels)
        self.patch = params.patch

    def encode(self, x: Tensor) -> Tensor:
        """x `b 3 t H W` -> `b t h w c`."""
        tokens = rearrange(x, "b c t (h p) (w q) -> b t h w (p q c)", p=self.patch, q=self.patch)
        height, width = tokens.shape[2:4]
        tokens = self(self.to_patch_embedding(tokens).flatten(2, 3), height, width)
        return tokens.unflatten(2, (height, width))


class Autoencoder(nn.Module):
    """Encodes clips to planes and decodes planes. It works on clips up to the size that it was trained for."""

    def __init__(self, params: AutoencoderParams, make: Factory = TORCH) -> None:
        super().__init__()
        self.params = params
        c, shape = params.channels, params.shape
        self.encoder = Encoder(params, make)
        self.decoder = TimeSformer(c, params.depth, params.heads, params.head_width, make)
        self.to_pixel = nn.Sequential(nn.Identity(), make.conv_transpose2d(c, 3, params.patch, stride=params.patch))
        self.register_buffer("coords", torch.linspace(-1, 1, params.frames)[:, None])    # unused; files have it
        for plane, length in zip(("xy", "yt", "xt"), (shape.t, shape.h, shape.w)):
            setattr(self, f"{plane}_token", nn.Parameter(torch.randn(1, 1, c, **make.weights)))
            setattr(self, f"{plane}_pos_embedding", nn.Parameter(torch.randn(1, length + 1, c, **make.weights)))
            setattr(self, f"{plane}_quant_attn", AxisTransformer(
                c, params.plane_depth, params.plane_heads, params.plane_head_width, params.plane_hidden, make))
            setattr(self, f"pre_{plane}", make.conv2d(c, params.plane_channels, 1))
            setattr(self, f"post_{plane}", make.conv2d(params.plane_channels, c, 1))

    def encode(self, x: Tensor) -> Tensor:
        """The planes `b c l` of clips `b 3 t H W` in -1..1. The planes are in -1..1 too."""
        self.check_clip(x)
        tokens = self.encoder.encode(x)
        return join([self.project("xy", rearrange(tokens, "b t h w c -> b h w t c")),
                     self.project("yt", rearrange(tokens, "b t h w c -> b t w h c")),
                     self.project("xt", tokens)])

    def decode(self, row: Tensor, shape: PlaneShape | None = None) -> Tensor:
        """Clips `b 3 t H W` in -1..1 of planes `b c l`. `shape` is their grid; without one, the trained grid."""
        shape = shape or self.params.shape
        planes = [getattr(self, f"post_{name}")(plane)
                  for name, plane in zip(("xy", "yt", "xt"), shape.split(row), strict=True)]
        tokens = self.decoder(rearrange(broadcast(planes), "b c t h w -> b t (h w) c"), shape.h, shape.w)
        pictures = self.to_pixel(rearrange(tokens, "b t (h w) c -> (b t) c h w", h=shape.h))
        return rearrange(2 * pictures.sigmoid() - 1, "(b t) c h w -> b c t h w", b=len(row))

    def forward(self, x: Tensor) -> Tensor:
        """Clips, encoded and decoded."""
        return self.decode(self.encode(x), self.shape_of(x))

    def project(self, plane: str, tokens: Tensor) -> Tensor:
        """A plane `b c i j` of tokens `b i j n c`: its transformer looks along n.

        A learned token stands behind the n tokens. What is kept is the output at the first of them, not at the learned
        one: the released weights were trained so.
        """
        b, i, j, n, c = tokens.shape
        token, positions = (getattr(self, f"{plane}_{part}").to(tokens) for part in ("token", "pos_embedding"))
        x = torch.cat([tokens.flatten(0, 2), token.expand(b * i * j, -1, -1)], dim=1) + positions[:, :n + 1]
        x = getattr(self, f"{plane}_quant_attn")(x)
        return getattr(self, f"pre_{plane}")(rearrange(x, "(b i j) c -> b c i j", i=i, j=j)).tanh()

    def shape_of(self, x: Tensor) -> PlaneShape:
        """The grid of clips `b 3 t H W`."""
        return PlaneShape(x.shape[2], x.shape[3] // self.params.patch, x.shape[4] // self.params.patch)

    def check_clip(self, x: Tensor) -> None:
        """Refuse clips that do not divide into patches, or that are larger than the position tables."""
        p = self.params
        frames, height, width = x.shape[2:]
        if height % p.patch or width % p.patch or frames > p.frames or height > p.height or width > p.width:
            raise VideoLDMError(f"This PVDM autoencoder takes clips of up to {p.frames} frames of "
                                f"{p.width}x{p.height}, with sides that divide by {p.patch}, and was given {frames} "
                                f"frames of {width}x{height}.")
