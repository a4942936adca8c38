"""Scene layouts: boxes and labels that condition an image LDM (docs/papers.md#boxes).

As in the paper, box coordinates are embedded, and a transformer fuses the boxes and labels of a scene into tokens. The
network cross-attends to these tokens.

The paper trains an image LDM for it. Here the image LDM is already trained and stays frozen. New cross-attentions to
the tokens are added in front of its cross-attentions to text, and only these and the embeddings are trained. At first
they change nothing, because `to_out` is zero. Their queries get the position in the picture, because features of a
trained network need not hold it.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from .errors import VideoLDMError
from .layers import TORCH, Attention, Factory, FeedForward, attend

NOT_SAID = 0        # the number of a label's value when the label has none


@dataclass(frozen=True)
class LayoutParams:
    """The params of a scene layout network."""

    colours: tuple[str, ...]                            # names of the colours of boxes
    labels: tuple[tuple[str, tuple[str, ...]], ...]     # each label's name and its values
    width: int                                          # channels of tokens and cross-attentions
    heads: int                                          # attention heads; they divide the width
    layers: int                                         # transformer layers that fuse the tokens
    frequencies: int                                    # octaves of the coordinates' Fourier features
    sites: tuple[tuple[int, int], ...]                  # (number, channels) of the transformer blocks it acts in


@dataclass(frozen=True)
class Layout:
    """The layouts of b scenes with n boxes and k labels each."""

    boxes: Tensor       # `b n 4`: x0, y0, x1, y1 as fractions of the picture
    colours: Tensor     # `b n`: the number of each box's colour in LayoutParams.colours
    present: Tensor     # `b n`, bool: False marks padding instead of a box
    told: Tensor        # `b`, bool: True: the picture holds these boxes only. False: it may hold anything
    labels: Tensor      # `b k`: 1 + the number of the label's value, or NOT_SAID

    def to(self, device: torch.device | str) -> "Layout":
        """The same layouts on a device."""
        return Layout(*(getattr(self, name).to(device) for name in self.__dataclass_fields__))

    def __getitem__(self, index: Any) -> "Layout":
        """The layouts of some scenes, chosen as in a tensor."""
        return Layout(*(getattr(self, name)[index] for name in self.__dataclass_fields__))


def concatenate_layouts(layouts: list[Layout]) -> Layout:
    """All scenes of several layouts in one. The layouts have the same number of boxes."""
    return Layout(*(torch.cat([getattr(layout, name) for layout in layouts]) for name in Layout.__dataclass_fields__))


def unconditional_layout(params: LayoutParams, scenes: int = 1) -> Layout:
    """Layouts that say nothing about their scenes, for classifier-free guidance."""
    return Layout(torch.zeros(scenes, 0, 4), torch.zeros(scenes, 0, dtype=torch.long),
                  torch.zeros(scenes, 0, dtype=torch.bool), torch.zeros(scenes, dtype=torch.bool),
                  torch.full((scenes, len(params.labels)), NOT_SAID))


def drop_conditions(layout: Layout, rate: float, generator: torch.Generator) -> Layout:
    """Drop conditions at random, for training.

    Each label, all boxes of a scene together, and the whole layout of a scene are dropped with probability `rate`.
    """
    scenes, labels = layout.labels.shape
    dropped = torch.rand(scenes, labels + 2, generator=generator).to(layout.boxes.device) < rate
    dropped |= dropped[:, -1:]
    told = layout.told & ~dropped[:, labels]
    return replace(layout, told=told, present=layout.present & told[:, None],
                   labels=torch.where(dropped[:, :labels], NOT_SAID, layout.labels))


def fourier_features(values: Tensor, frequencies: int) -> Tensor:
    """Fourier features of coordinates in 0..1: `... v -> ... (2 v frequencies)`.

    The lowest frequency is half a wave across the picture. Each further one is twice as high.
    """
    octaves = torch.pi * 2.0 ** torch.arange(frequencies, device=values.device)
    angles = (values[..., None] * octaves).flatten(-2)
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def picture_grid(tokens: int, height: int, width: int, device: torch.device | None = None) -> Tensor:
    """The x and y of each token of a feature map, `s 2`, in 0..1.

    A feature map has the size of the latents, halved any number of times. Raises VideoLDMError if `tokens` fits none.

    Args:
        tokens: s, the number of tokens of the feature map.
        height, width: the size of the latents.
        device: of the result.
    """
    while height * width > tokens and height * width > 1:
        height, width = (height + 1) // 2, (width + 1) // 2
    if height * width != tokens:
        raise VideoLDMError(f"Scene Layout cannot tell where in the picture the model is working: {tokens} places are "
                            "no halving of the latents. Something in the graph changes the sizes within the model. "
                            "Remove it, or leave Scene Layout out.")
    y, x = ((torch.arange(size, device=device) + 0.5) / size for size in (height, width))
    return torch.stack([x.repeat(height), y.repeat_interleave(width)], dim=-1)


class FusionBlock(nn.Module):
    """Self-attention among the tokens of a scene, then a GEGLU. Both are residual."""

    def __init__(self, params: LayoutParams, make: Factory = TORCH) -> None:
        super().__init__()
        self.norm1 = make.layer_norm(params.width)
        self.attn = Attention(params.width, params.heads, None, make)
        self.norm2 = make.layer_norm(params.width)
        self.ff = FeedForward(params.width, make)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x), mask=mask)
        return x + self.ff(self.norm2(x))


class BoxConditioner(nn.Module):
    """Turns layouts into tokens: one per box, one per label, and one for `Layout.told`."""

    def __init__(self, params: LayoutParams, make: Factory = TORCH) -> None:
        super().__init__()
        width = params.width
        self.frequencies = params.frequencies
        self.box = nn.Sequential(make.linear(2 * 6 * params.frequencies, width), nn.SiLU(),
                                 make.linear(width, width))
        self.colour = make.embedding(len(params.colours), width)
        self.labels = nn.ModuleList(make.embedding(1 + len(values), width)
                                    for _, values in params.labels)
        self.told = make.embedding(2, width)
        self.blocks = nn.ModuleList(FusionBlock(params, make) for _ in range(params.layers))
        self.norm = make.layer_norm(width)

    def forward(self, layout: Layout) -> tuple[Tensor, Tensor]:
        """Returns the tokens `b n+k+1 width` and their mask `b 1 1 n+k+1`, which is False at padding."""
        middles = (layout.boxes[..., :2] + layout.boxes[..., 2:]) / 2
        coordinates = torch.cat([layout.boxes, middles], -1)
        boxes = self.box(fourier_features(coordinates, self.frequencies)) + self.colour(layout.colours)
        labels = [embed(layout.labels[:, k]) for k, embed in enumerate(self.labels)]
        x = torch.cat([boxes, torch.stack([*labels, self.told(layout.told.long())], dim=1)], dim=1)
        said = layout.present.new_ones(len(x), len(labels) + 1)
        mask = torch.cat([layout.present, said], dim=1)[:, None, None]
        for block in self.blocks:
            x = block(x, mask)
        return self.norm(x), mask


class LayoutAttention(nn.Module):
    """Cross-attention of a feature map `b s c` to the tokens of its scene. Returns the residual."""

    def __init__(self, channels: int, params: LayoutParams, make: Factory = TORCH) -> None:
        super().__init__()
        width = params.width
        self.heads = params.heads
        self.norm = make.layer_norm(channels)
        self.to_q = make.linear(channels, width)
        self.to_place = make.linear(2 * 2 * params.frequencies, width, bias=False)
        self.to_k = make.linear(width, width, bias=False)
        self.to_v = make.linear(width, width, bias=False)
        self.to_out = make.linear(width, channels)
        nn.init.zeros_(self.to_out.weight)
        nn.init.zeros_(self.to_out.bias)

    def forward(self, x: Tensor, tokens: Tensor, mask: Tensor, grid: Tensor) -> Tensor:
        q = self.to_q(self.norm(x)) + self.to_place(grid)
        k, v = (to(tokens).expand(len(x), -1, -1) for to in (self.to_k, self.to_v))
        return self.to_out(attend(q, k, v, self.heads, mask))


class SceneLayout(nn.Module):
    """The conditioner and its cross-attentions. They are small, so they compute in float32 in any network."""

    def __init__(self, params: LayoutParams, make: Factory = TORCH) -> None:
        super().__init__()
        self.params = params
        self.conditioner = BoxConditioner(params, make)
        self.attentions = nn.ModuleDict({str(site): LayoutAttention(channels, params, make)
                                         for site, channels in params.sites})

    def bind_layout(self, layout: Layout, height: int, width: int) -> Callable[[Tensor, int], Tensor]:
        """Prepare one call of the network: returns `act(x, site)`, which adds the layout to a block's features.

        The network calls `act` in each transformer block, between self-attention and cross-attention to text. x is
        `b s c`, and site is the number of the block. `act` raises VideoLDMError for other channels than trained.

        Args:
            layout: one scene, or one per image.
            height, width: the size of the latents.
        """
        tokens, mask = self.conditioner(layout)
        channels = dict(self.params.sites)

        def act(x: Tensor, site: int) -> Tensor:
            if site not in channels:
                return x
            if x.shape[-1] != channels[site]:
                raise VideoLDMError(f"The scene layout was made for an image model with {channels[site]} channels "
                                    f"where this one has {x.shape[-1]}. Use the image model that it was trained on.")
            grid = fourier_features(picture_grid(x.shape[1], height, width, x.device), self.params.frequencies)
            return x + self.attentions[str(site)](x.float(), tokens, mask, grid).to(x.dtype)
        return act
