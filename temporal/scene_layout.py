"""Scene layouts: boxes and labels that condition an image LDM (docs/papers.md#boxes).

As in the paper, box coordinates are embedded, a transformer fuses the boxes and labels of a scene into tokens, and the
network cross-attends to them. The paper trains an image LDM of its own for it; here cross-attentions beside those to
the text are added to a trained image LDM, which stays as it is, and are trained with the embeddings. They begin as
nothing (`to_out` is zero), and their queries know where in the picture they are, which the network never had to.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from .errors import VideoLDMError
from .layers import Attention, Factory, FeedForward, attend

NOT_SAID = 0        # in place of a label's value


@dataclass(frozen=True)
class LayoutParams:
    """labels: (name, its values) of each label. sites: (ordinal among the network's transformer blocks, its channels).

    width: of tokens and cross-attentions. frequencies: octaves in which coordinates are embedded, from half a wave
    across the picture.
    """

    colours: tuple[str, ...]
    labels: tuple[tuple[str, tuple[str, ...]], ...]
    width: int
    heads: int
    layers: int
    frequencies: int
    sites: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Layout:
    """Scenes. boxes `b n 4`: x0, y0, x1, y1 in fractions of the picture; colours `b n`: numbers in
    LayoutParams.colours; present `b n`: false where there is no box. told `b`: whether the boxes are all there is;
    else anything may be in the picture. labels `b k`: 1 + number of the value, or NOT_SAID."""

    boxes: Tensor
    colours: Tensor
    present: Tensor
    told: Tensor
    labels: Tensor

    def to(self, device) -> "Layout":
        return Layout(*(getattr(self, name).to(device) for name in self.__dataclass_fields__))

    def __getitem__(self, index) -> "Layout":
        return Layout(*(getattr(self, name)[index] for name in self.__dataclass_fields__))


def concatenate_layouts(layouts: list[Layout]) -> Layout:
    """Scenes of several layouts as one; each has as many boxes."""
    return Layout(*(torch.cat([getattr(one, name) for one in layouts]) for name in Layout.__dataclass_fields__))


def unconditional_layout(params: LayoutParams, scenes: int = 1) -> Layout:
    """The unconditional layout."""
    return Layout(torch.zeros(scenes, 0, 4), torch.zeros(scenes, 0, dtype=torch.long),
                  torch.zeros(scenes, 0, dtype=torch.bool), torch.zeros(scenes, dtype=torch.bool),
                  torch.full((scenes, len(params.labels)), NOT_SAID))


def drop_conditions(layout: Layout, rate: float, generator: torch.Generator) -> Layout:
    """Leave out, each with this probability: a label, the boxes of a scene, and everything about a scene."""
    scenes, labels = layout.labels.shape
    unsaid = torch.rand(scenes, labels + 2, generator=generator).to(layout.boxes.device) < rate
    unsaid |= unsaid[:, -1:]
    told = layout.told & ~unsaid[:, labels]
    return replace(layout, told=told, present=layout.present & told[:, None],
                   labels=torch.where(unsaid[:, :labels], NOT_SAID, layout.labels))


def fourier_features(values: Tensor, frequencies: int) -> Tensor:
    """Fourier features of coordinates in 0..1: `... v -> ... (2 v frequencies)`."""
    octaves = torch.pi * 2.0 ** torch.arange(frequencies, device=values.device)
    angles = (values[..., None] * octaves).flatten(-2)
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def picture_grid(places: int, height: int, width: int, device=None) -> Tensor:
    """Coordinates x, y of the middles of a feature map's places, `s 2`; a map is the latents halved some times."""
    while height * width > places and height * width > 1:
        height, width = (height + 1) // 2, (width + 1) // 2
    if height * width != places:
        raise VideoLDMError(f"Scene Layout cannot tell where in the picture the model is working: {places} places are "
                            "no halving of the latents. Something in the graph changes the sizes within the model. "
                            "Remove it, or leave Scene Layout out.")
    y, x = ((torch.arange(size, device=device) + 0.5) / size for size in (height, width))
    return torch.stack([x.repeat(height), y.repeat_interleave(width)], dim=-1)


class FusionBlock(nn.Module):
    """Self-attention among the tokens of a scene and a GEGLU, each residual."""

    def __init__(self, params: LayoutParams, make: Factory = Factory()):
        super().__init__()
        self.norm1 = make.layer_norm(params.width)
        self.attn = Attention(params.width, params.heads, None, make)
        self.norm2 = make.layer_norm(params.width)
        self.ff = FeedForward(params.width, make)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x), mask=mask)
        return x + self.ff(self.norm2(x))


class BoxConditioner(nn.Module):
    """Layouts to tokens: one per box, one per label, and one that says whether the boxes are all there is."""

    def __init__(self, params: LayoutParams, make: Factory = Factory()):
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
        """Tokens `b n+k+1 width`, and which of them there are, `b 1 1 n+k+1`."""
        middles = (layout.boxes[..., :2] + layout.boxes[..., 2:]) / 2
        boxes = self.box(fourier_features(torch.cat([layout.boxes, middles], -1), self.frequencies)) + self.colour(layout.colours)
        labels = [embed(layout.labels[:, k]) for k, embed in enumerate(self.labels)]
        x = torch.cat([boxes, torch.stack([*labels, self.told(layout.told.long())], dim=1)], dim=1)
        said = layout.present.new_ones(len(x), len(labels) + 1)
        mask = torch.cat([layout.present, said], dim=1)[:, None, None]
        for block in self.blocks:
            x = block(x, mask)
        return self.norm(x), mask


class LayoutAttention(nn.Module):
    """Cross-attention of a feature map `b s c` to the tokens of its scene."""

    def __init__(self, channels: int, params: LayoutParams, make: Factory = Factory()):
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
    """The conditioner and its cross-attentions. They compute in float32, being small, whatever the network's type."""

    def __init__(self, params: LayoutParams, make: Factory = Factory()):
        super().__init__()
        self.params = params
        self.conditioner = BoxConditioner(params, make)
        self.attentions = nn.ModuleDict({str(site): LayoutAttention(channels, params, make)
                                         for site, channels in params.sites})

    def bind_layout(self, layout: Layout, height: int, width: int):
        """`act(x, site)` for one call of the network on latents of this size: x `b s c` of a transformer block, between
        its self-attention and its cross-attention to text, with what the layout says. One layout, or one per image."""
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
