"""Video networks in plain PyTorch, written from the papers and not from the pack's code. It is slow on purpose.

It computes from a dictionary of weights in diffusers' names. Clips are `b t c h w`. Text is `b l d`, one for each clip.
`Reference` is Stable Diffusion's UNet, run on each frame. A family is a subclass: it overrides the steps that differ.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

GROUPS = 32


class Reference:
    """Stable Diffusion's UNet on each frame of clips. Subclasses override the steps below `# Steps of a family`."""

    pooled = False          # True: the norms of the ResBlocks and of the output see all frames of a clip

    def __init__(self, weights: dict, heads: int = 8, time_heads: int | None = None, dtype=torch.float64) -> None:
        """heads: of the spatial attentions. time_heads: of those over time, None for the same number."""
        self.weights = {key: value.to(dtype) for key, value in weights.items()}
        self.heads, self.time_heads, self.dtype = heads, time_heads or heads, dtype

    @torch.no_grad()
    def __call__(self, x: Tensor, timestep: float, text: Tensor) -> Tensor:
        """x `b t c h w`, text `b l d` -> the prediction `b t c h w`."""
        x, self.text = x.to(self.dtype), text.to(self.dtype)
        self.emb = self.time_embedding(timestep)[None].expand(len(x), -1)
        x = self.after_conv_in(self.conv("conv_in", x))
        x = self.up_side(*self.down_side(x))
        return self.conv("conv_out", F.silu(self.group_norm("conv_norm_out", x, 1e-5, self.pooled)))

    # Steps of a family

    def time_embedding(self, timestep: float) -> Tensor:
        sinusoid = self.sinusoid(timestep)
        return self.linear("time_embedding.linear_2", F.silu(self.linear("time_embedding.linear_1", sinusoid)))

    def after_conv_in(self, x: Tensor) -> Tensor:
        return x

    def after_resnet(self, name: str, x: Tensor) -> Tensor:
        return x

    def after_transformer(self, name: str, x: Tensor) -> Tensor:
        return x

    def self_attention_source(self, x: Tensor) -> Tensor:
        """The tokens that each frame's tokens `b t s c` attend to, `b t n c`."""
        return x

    def before_feed_forward(self, name: str, x: Tensor) -> Tensor:
        """Tokens `b t s c` of a block, between the attention to the text and the feed-forward."""
        return x

    def after_feed_forward(self, name: str, x: Tensor) -> Tensor:
        """Tokens `b t s c` of a block, after its feed-forward."""
        return x

    # The UNet

    def down_side(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The result of the input side and the middle, and the skips."""
        skips = [x]
        for level in range(self.count("down_blocks")):
            block = f"down_blocks.{level}"
            for n in range(self.count(f"{block}.resnets")):
                x = self.layer(block, n, x)
                skips.append(x)
            if f"{block}.downsamplers.0.conv.weight" in self.weights:
                x = self.conv(f"{block}.downsamplers.0.conv", x, stride=2)
                skips.append(x)
        x = self.resnet("mid_block.resnets.0", x)
        x = self.transformer("mid_block.attentions.0", x)
        return self.resnet("mid_block.resnets.1", x), skips

    def up_side(self, x: Tensor, skips: list[Tensor]) -> Tensor:
        for level in range(self.count("up_blocks")):
            block = f"up_blocks.{level}"
            for n in range(self.count(f"{block}.resnets")):
                x = self.layer(block, n, torch.cat([x, skips.pop()], dim=2))
            if f"{block}.upsamplers.0.conv.weight" in self.weights:
                larger = F.interpolate(x.flatten(0, 1), skips[-1].shape[-2:], mode="nearest")
                x = self.conv(f"{block}.upsamplers.0.conv", larger.unflatten(0, x.shape[:2]))
        return x

    def layer(self, block: str, n: int, x: Tensor) -> Tensor:
        """The n-th ResBlock of a block, and its transformer where there is one."""
        x = self.resnet(f"{block}.resnets.{n}", x)
        has_transformer = f"{block}.attentions.{n}.norm.weight" in self.weights
        return self.transformer(f"{block}.attentions.{n}", x) if has_transformer else x

    def resnet(self, name: str, x: Tensor) -> Tensor:
        h = self.conv(f"{name}.conv1", F.silu(self.group_norm(f"{name}.norm1", x, 1e-5, self.pooled)))
        h = h + self.linear(f"{name}.time_emb_proj", F.silu(self.emb))[:, None, :, None, None]
        h = self.conv(f"{name}.conv2", F.silu(self.group_norm(f"{name}.norm2", h, 1e-5, self.pooled)))
        if f"{name}.conv_shortcut.weight" in self.weights:
            x = self.conv(f"{name}.conv_shortcut", x)
        return self.after_resnet(name, x + h)

    def transformer(self, name: str, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        tokens = self.group_norm(f"{name}.norm", x, 1e-6, pooled=False).flatten(3).transpose(2, 3)     # b t s c
        tokens = self.linear(f"{name}.proj_in", tokens)
        for n in range(self.count(f"{name}.transformer_blocks")):
            tokens = self.block(f"{name}.transformer_blocks.{n}", tokens)
        tokens = self.linear(f"{name}.proj_out", tokens)
        return self.after_transformer(name, x + tokens.transpose(2, 3).unflatten(3, (height, width)))

    def block(self, name: str, x: Tensor) -> Tensor:
        normed = self.layer_norm(f"{name}.norm1", x)
        x = x + self.attention(f"{name}.attn1", normed, self.self_attention_source(normed), self.heads)
        normed = self.layer_norm(f"{name}.norm2", x)
        x = x + self.attention(f"{name}.attn2", normed, self.text[:, None].expand(-1, x.shape[1], -1, -1), self.heads)
        x = self.before_feed_forward(name, x)
        wide, gate = self.linear(f"{name}.ff.net.0.proj", self.layer_norm(f"{name}.norm3", x)).chunk(2, dim=-1)
        x = x + self.linear(f"{name}.ff.net.2", wide * F.gelu(gate))
        return self.after_feed_forward(name, x)

    # Its parts

    def count(self, prefix: str) -> int:
        """How many modules `prefix.0`, `prefix.1` and so on there are."""
        return len({key[len(prefix) + 1:].split(".")[0] for key in self.weights if key.startswith(f"{prefix}.")})

    def linear(self, name: str, x: Tensor) -> Tensor:
        weight = self.weights[f"{name}.weight"]
        out = x @ weight.flatten(1).T          # a 1x1 convolution is a linear layer too
        bias = self.weights.get(f"{name}.bias")
        return out if bias is None else out + bias

    def conv(self, name: str, x: Tensor, stride: int = 1) -> Tensor:
        """A convolution on each frame of `b t c h w`."""
        weight = self.weights[f"{name}.weight"]
        frames = F.conv2d(x.flatten(0, 1), weight, self.weights[f"{name}.bias"], stride, weight.shape[-1] // 2)
        return frames.unflatten(0, x.shape[:2])

    def layer_norm(self, name: str, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return scaled * self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"]

    def group_norm(self, name: str, x: Tensor, eps: float, pooled: bool) -> Tensor:
        """A norm of `b t c h w` over the channels of a group, height and width; pooled: over the frames too."""
        groups = x.unflatten(2, (GROUPS, -1))       # b t g c h w
        over = (1, 3, 4, 5) if pooled else (3, 4, 5)
        centred = groups - groups.mean(over, keepdim=True)
        scaled = (centred / (centred.square().mean(over, keepdim=True) + eps).sqrt()).flatten(2, 3)
        weight, bias = self.weights[f"{name}.weight"], self.weights[f"{name}.bias"]
        return scaled * weight[:, None, None] + bias[:, None, None]

    def attention(self, name: str, x: Tensor, source: Tensor, heads: int) -> Tensor:
        """Attention of tokens `... s c` to tokens `... n d`."""
        q, k, v = (self.linear(f"{name}.to_{to}", value) for to, value in (("q", x), ("k", source), ("v", source)))
        size = q.shape[-1] // heads
        parts = []
        for head in range(heads):
            own = slice(head * size, (head + 1) * size)
            scores = self.scores(name, head, q[..., own], k[..., own])
            parts.append(scores.softmax(-1) @ v[..., own])
        return self.linear(f"{name}.to_out.0", torch.cat(parts, dim=-1))

    def scores(self, name: str, head: int, q: Tensor, k: Tensor) -> Tensor:
        return (q / math.sqrt(q.shape[-1])) @ k.transpose(-1, -2)

    def sinusoid(self, timestep: float) -> Tensor:
        """Cosines, then sines, of the timestep at falling frequencies."""
        half = self.weights["time_embedding.linear_1.weight"].shape[1] // 2
        angles = torch.tensor([timestep * 10000.0 ** (-i / half) for i in range(half)], dtype=self.dtype)
        return torch.cat([angles.cos(), angles.sin()])


class LavieBase(Reference):
    """LaVie's base, and SEINE: pooled norms; attention over t with rotation and a bias, before the feed-forward."""

    pooled = True

    def before_feed_forward(self, name: str, x: Tensor) -> Tensor:
        return x + self.over_time(f"{name}.attn_temp", self.layer_norm(f"{name}.norm_temp", x))

    def over_time(self, name: str, x: Tensor) -> Tensor:
        pixels = x.transpose(1, 2)          # b s t c
        return self.attention(name, pixels, pixels, self.time_heads).transpose(1, 2)

    def scores(self, name: str, head: int, q: Tensor, k: Tensor) -> Tensor:
        table = self.weights.get(f"{name}.time_rel_pos_bias.relative_attention_bias.weight")
        if table is None:
            return super().scores(name, head, q, k)
        frames = q.shape[-2]
        bias = torch.stack([torch.stack([table[bucket(key - query), head] for key in range(frames)])
                            for query in range(frames)])
        q = q / math.sqrt(q.shape[-1])
        return rotated(q) @ rotated(k).transpose(-1, -2) + bias


class LavieInterpolation(LavieBase):
    """LaVie's interpolation: self-attention to the first and the previous frame; attention over t after the block."""

    def self_attention_source(self, x: Tensor) -> Tensor:
        frames = [torch.cat([x[:, 0], x[:, max(t - 1, 0)]], dim=1) for t in range(x.shape[1])]
        return torch.stack(frames, dim=1)

    def before_feed_forward(self, name: str, x: Tensor) -> Tensor:
        return x

    def after_feed_forward(self, name: str, x: Tensor) -> Tensor:
        return x + self.over_time(f"{name}.attn_temp", self.layer_norm(f"{name}.norm_temp", x))


def bucket(ahead: int) -> int:
    """The row of LaVie's table for a key that is `ahead` frames after the query."""
    distance = abs(ahead)
    if distance >= 8:
        distance = min(8 + int(math.log(distance / 8) / math.log(32 / 8) * 8), 15)
    return distance + (16 if ahead > 0 else 0)


def rotated(x: Tensor, first: int = 0) -> Tensor:
    """Rotary positions on `... t d`: frame t turns each adjacent pair of the first 32 channels."""
    x = x.clone()
    for t in range(x.shape[-2]):
        for pair in range(16):
            angle = (first + t) * 10000.0 ** (-2 * pair / 32)
            even, odd = x[..., t, 2 * pair].clone(), x[..., t, 2 * pair + 1].clone()
            x[..., t, 2 * pair] = even * math.cos(angle) - odd * math.sin(angle)
            x[..., t, 2 * pair + 1] = odd * math.cos(angle) + even * math.sin(angle)
    return x


NETWORKS = {"lavie_base": LavieBase, "seine": LavieBase, "lavie_interpolation": LavieInterpolation}
