"""VideoCrafter's text-to-video network in plain PyTorch, written from its description (docs/papers.md#videocrafter).

Modules have the published names, so that a state dict is a file. One call runs one clip: `t c h w`.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HEAD = 64           # channels of an attention head
REACH = 16          # the largest distance of two frames in the tables of relative positions
INIT_HEADS = 8      # heads of the transformer behind the first convolution
# {kind of file: (convolutions over time, relative positions, embedding of the frame rate)}
VERSIONS = {"videocrafter2": (True, False, True), "videocrafter1_512": (False, True, False),
            "videocrafter1_1024": (False, True, True)}
PUBLISHED_NAMES = {"videocrafter2": "videocrafter_t2v_512_v2.0", "videocrafter1_512": "videocrafter_t2v_512_v1.0",
                   "videocrafter1_1024": "videocrafter_t2v_1024_v1.0"}


def sinusoid(value: float, width: int) -> Tensor:
    angles = [value * math.exp(-math.log(10000) * i / (width // 2)) for i in range(width // 2)]
    return torch.tensor([math.cos(a) for a in angles] + [math.sin(a) for a in angles])


def two_layers(width: int, out: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, out), nn.SiLU(), nn.Linear(out, out))


class Table(nn.Module):
    def __init__(self):
        super().__init__()
        self.embeddings_table = nn.Parameter(torch.zeros(2 * REACH + 1, HEAD))

    def forward(self, frames: int) -> Tensor:
        """The vector from frame i to frame j at [i, j]."""
        return torch.stack([torch.stack([self.embeddings_table[min(max(j - i, -REACH), REACH) + REACH]
                                         for j in range(frames)]) for i in range(frames)])


class Attention(nn.Module):
    """Attention of x `s n c` to a context `s m d`. With tables, each key and value depends on the distance too."""

    def __init__(self, width: int, context: int, relative: bool = False):
        super().__init__()
        self.to_q, self.to_k, self.to_v = (nn.Linear(inputs, width, bias=False) for inputs in (width, context, context))
        self.to_out = nn.Sequential(nn.Linear(width, width))
        if relative:
            self.relative_position_k, self.relative_position_v = Table(), Table()
        self.relative = relative

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        q, k, v = (to(y).unflatten(-1, (-1, HEAD)).transpose(1, 2) for to, y in
                   ((self.to_q, x), (self.to_k, context), (self.to_v, context)))
        k, v = k[:, :, None], v[:, :, None]                     # s h 1 m d: the same for every query
        if self.relative:
            k, v = k + self.relative_position_k(x.shape[1]), v + self.relative_position_v(x.shape[1])
        shares = ((q[:, :, :, None] * k).sum(-1) / HEAD ** 0.5).softmax(-1)
        return self.to_out((shares[..., None] * v).sum(-2).transpose(1, 2).flatten(2))


class Gate(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.proj = nn.Linear(width, 8 * width)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, -1)
        return value * F.gelu(gate)


class Block(nn.Module):
    def __init__(self, width: int, text: int, relative: bool = False):
        super().__init__()
        self.attn1, self.attn2 = Attention(width, width, relative), Attention(width, text, relative)
        self.ff = nn.Module()
        self.ff.net = nn.Sequential(Gate(width), nn.Identity(), nn.Linear(4 * width, width))
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))

    def forward(self, x: Tensor, text: Tensor | None) -> Tensor:
        """text: None for an attention over time, whose second attention is to the frames again."""
        normed = self.norm1(x)
        x = x + self.attn1(normed, normed)
        normed = self.norm2(x)
        x = x + self.attn2(normed, normed if text is None else text)
        return x + self.ff.net(self.norm3(x))


class SpatialTransformer(nn.Module):
    def __init__(self, width: int, text: int):
        super().__init__()
        self.norm = nn.GroupNorm(32, width, eps=1e-6)
        self.proj_in, self.proj_out = nn.Linear(width, width), nn.Linear(width, width)
        self.transformer_blocks = nn.ModuleList([Block(width, text)])

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        tokens = self.proj_in(self.norm(x).flatten(2).mT)
        tokens = self.proj_out(self.transformer_blocks[0](tokens, text.expand(len(x), -1, -1)))
        return x + tokens.mT.reshape(x.shape)


class TimeTransformer(nn.Module):
    """Attention over the frames of a clip at each place. The norm sees the whole clip."""

    def __init__(self, width: int, inner: int, relative: bool, convolution: bool = False):
        super().__init__()
        self.norm = nn.GroupNorm(32, width, eps=1e-6)
        self.proj_in, self.proj_out = ((nn.Conv1d(a, b, 1) if convolution else nn.Linear(a, b))
                                       for a, b in ((width, inner), (inner, width)))
        self.transformer_blocks = nn.ModuleList([Block(inner, inner, relative)])

    def project(self, projection: nn.Module, x: Tensor) -> Tensor:
        return projection(x.mT).mT if isinstance(projection, nn.Conv1d) else projection(x)

    def forward(self, x: Tensor) -> Tensor:
        frames, channels, height, width = x.shape
        normed = self.norm(x.transpose(0, 1)[None])[0].transpose(0, 1)
        places = self.project(self.proj_in, normed.permute(2, 3, 0, 1).reshape(-1, frames, channels))
        places = self.project(self.proj_out, self.transformer_blocks[0](places, None))
        return x + places.reshape(height, width, frames, channels).permute(2, 3, 0, 1)


class TimeConvolutions(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        for stage in range(1, 5):
            parts = [nn.GroupNorm(32, width), nn.SiLU(), nn.Conv3d(width, width, (3, 1, 1), padding=(1, 0, 0))]
            self.add_module(f"conv{stage}", nn.Sequential(*parts[:2], *[nn.Identity()] * (stage > 1), parts[2]))

    def forward(self, x: Tensor) -> Tensor:
        clip = x.transpose(0, 1)[None]
        for stage in range(1, 5):
            clip = getattr(self, f"conv{stage}")(clip)
        return x + clip[0].transpose(0, 1)


class ResBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, emb: int, convolutions: bool):
        super().__init__()
        self.in_layers = nn.Sequential(nn.GroupNorm(32, inputs), nn.SiLU(), nn.Conv2d(inputs, outputs, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb, outputs))
        self.out_layers = nn.Sequential(nn.GroupNorm(32, outputs), nn.SiLU(), nn.Identity(),
                                        nn.Conv2d(outputs, outputs, 3, padding=1))
        self.skip_connection = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1)
        self.temopral_conv = TimeConvolutions(outputs) if convolutions else nn.Identity()

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.in_layers(x) + self.emb_layers(emb)[:, None, None]
        return self.temopral_conv(self.skip_connection(x) + self.out_layers(h))


class Resampler(nn.Module):
    def __init__(self, width: int, up: bool):
        super().__init__()
        if up:
            self.conv = nn.Conv2d(width, width, 3, padding=1)
        else:
            self.op = nn.Conv2d(width, width, 3, stride=2, padding=1)
        self.up = up

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest")) if self.up else self.op(x)


class VideoCrafter(nn.Module):
    """The network. attention: for each level, whether its blocks have transformers."""

    def __init__(self, kind: str, channels=(320, 640, 1280, 1280), resblocks: int = 2,
                 attention=(True, True, True, False), text: int = 1024):
        super().__init__()
        convolutions, relative, told = VERSIONS[kind]
        first, emb = channels[0], 4 * channels[0]
        self.told, self.width = told, first

        def block(inputs: int, outputs: int, attend: bool) -> list:
            layers = [ResBlock(inputs, outputs, emb, convolutions)]
            return layers + [SpatialTransformer(outputs, text), TimeTransformer(outputs, outputs, relative)] * attend
        self.time_embed = two_layers(first, emb)
        if told:
            self.fps_embedding = two_layers(first, emb)
        inputs, width, skips = [[nn.Conv2d(4, first, 3, padding=1)]], first, [first]
        for level, own in enumerate(channels):
            for _ in range(resblocks):
                inputs.append(block(width, own, attention[level]))
                width = own
                skips.append(width)
            if level < len(channels) - 1:
                inputs.append([Resampler(width, up=False)])
                skips.append(width)
        middle = [*block(width, width, True), ResBlock(width, width, emb, convolutions)]
        outputs = []
        for level, own in reversed(list(enumerate(channels))):
            for n in range(resblocks + 1):
                outputs.append(block(width + skips.pop(), own, attention[level]))
                width = own
                if level and n == resblocks:
                    outputs[-1].append(Resampler(width, up=True))
        self.input_blocks, self.output_blocks = (nn.ModuleList(map(nn.ModuleList, part)) for part in (inputs, outputs))
        self.middle_block = nn.ModuleList(middle)
        self.init_attn = nn.ModuleList([TimeTransformer(first, INIT_HEADS * HEAD, relative, convolution=True)])
        self.out = nn.Sequential(nn.GroupNorm(32, first), nn.SiLU(), nn.Conv2d(first, 4, 3, padding=1))

    def forward(self, x: Tensor, timestep: float, text: Tensor, fps: float) -> Tensor:
        """x `t c h w`, text `l d`."""
        emb = self.time_embed(sinusoid(timestep, self.width))
        if self.told:
            emb = emb + self.fps_embedding(sinusoid(fps, self.width))
        skips = []
        for number, block in enumerate(self.input_blocks):
            x = run(block, x, emb, text)
            if number == 0:
                x = self.init_attn[0](x)
            skips.append(x)
        x = run(self.middle_block, x, emb, text)
        for block in self.output_blocks:
            x = run(block, torch.cat([x, skips.pop()], 1), emb, text)
        return self.out(x)


def run(block: nn.ModuleList, x: Tensor, emb: Tensor, text: Tensor) -> Tensor:
    for layer in block:
        more = (emb,) if isinstance(layer, ResBlock) else (text,) if isinstance(layer, SpatialTransformer) else ()
        x = layer(x, *more)
    return x


# What a whole checkpoint holds beside the network

SCALES = {"videocrafter2": (0.7, 1400), "videocrafter1_1024": (0.3, 1000), "videocrafter1_512": None}


def scale_table(kind: str) -> Tensor | None:
    """The buffer scale_arr: from 1 to the last value in 400 entries, then the last value again."""
    if SCALES[kind] is None:
        return None
    last, length = SCALES[kind]
    return torch.tensor([1 - (1 - last) * min(n, 399) / 399 for n in range(length)])


def checkpoint(kind: str, weights: dict) -> dict:
    """A whole checkpoint's tensors: the network, stand-ins for VAE and text encoder, and the buffers."""
    betas = torch.linspace(0.00085 ** 0.5, 0.012 ** 0.5, 1000, dtype=torch.float64) ** 2
    table = scale_table(kind)
    return ({f"model.diffusion_model.{key}": value for key, value in weights.items()}
            | {"first_stage_model.decoder.conv_in.weight": torch.zeros(512, 4, 3, 3),
               "cond_stage_model.model.positional_embedding": torch.zeros(77, 1024), "betas": betas.float(),
               "alphas_cumprod": torch.cumprod(1 - betas, 0).float(), "posterior_mean_coef1": betas.float()}
            | ({} if table is None else {"scale_arr": table}))
