"""makeavid-sd's network from its description alone (docs/formats.md#makeavid-sd), on the tensors of a file.

Every tensor is `b c t h w`. Nothing of the pack is used.
"""

import math
import re

import torch
import torch.nn.functional as F
from torch import Tensor


def frames(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(0, 1)


def clips(x: Tensor, count: int) -> Tensor:
    return x.unflatten(0, (count, -1)).transpose(1, 2)


class Network:
    """tensors: of a file. heads: of every attention. eps: of the norms in front of the transformers."""

    def __init__(self, tensors: dict, heads: int = 8, eps: float = 1e-5) -> None:
        self.p, self.heads, self.eps = tensors, heads, eps

    def linear(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self.p[f"{name}.weight"], self.p.get(f"{name}.bias"))

    def layer_norm(self, x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.p[f"{name}.weight"], self.p[f"{name}.bias"])

    def norm(self, x: Tensor, name: str, eps: float = 1e-5) -> Tensor:
        return F.group_norm(x, 32, self.p[f"{name}.weight"], self.p[f"{name}.bias"], eps)

    def conv(self, x: Tensor, name: str, stride: int = 1) -> Tensor:
        """A spatial convolution of each frame, then one over the frames of each place."""
        weight, bias = (self.p[f"{name}.spatial_conv.{part}"] for part in ("weight", "bias"))
        y = clips(F.conv2d(frames(x), weight, bias, stride, weight.shape[-1] // 2), len(x))
        b, c, t, h, w = y.shape
        weight, bias = (self.p[f"{name}.temporal_conv.{part}"] for part in ("weight", "bias"))
        pixels = F.conv1d(y.permute(0, 3, 4, 1, 2).reshape(-1, c, t), weight, bias, padding=1)
        return pixels.reshape(b, h, w, c, t).permute(0, 3, 4, 1, 2)

    def resblock(self, x: Tensor, name: str, emb: Tensor) -> Tensor:
        h = self.conv(F.silu(self.norm(x, f"{name}.norm1")), f"{name}.conv1")
        h = h + self.linear(F.silu(emb), f"{name}.time_emb_proj")[:, :, None, None, None]
        h = self.conv(F.silu(self.norm(h, f"{name}.norm2")), f"{name}.conv2")
        return h + (self.conv(x, f"{name}.conv_shortcut") if f"{name}.conv_shortcut.spatial_conv.weight" in self.p
                    else x)

    def attention(self, x: Tensor, context: Tensor, name: str) -> Tensor:
        q, k, v = (self.linear(y, f"{name}.to_{to}").unflatten(-1, (self.heads, -1)).transpose(1, 2)
                   for y, to in ((x, "q"), (context, "k"), (context, "v")))
        shares = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1)
        return self.linear((shares @ v).transpose(1, 2).flatten(2), f"{name}.to_out.0")

    def transformer(self, x: Tensor, name: str, text: Tensor) -> Tensor:
        b, c, t, height, width = x.shape
        y = F.conv2d(self.norm(frames(x), f"{name}.norm", self.eps), self.p[f"{name}.proj_in.weight"],
                     self.p[f"{name}.proj_in.bias"]).flatten(2).mT
        block, n = f"{name}.transformer_blocks.0", 0
        while f"{block}.norm1.weight" in self.p:
            y = self.block(y, block, text, t)
            n += 1
            block = f"{name}.transformer_blocks.{n}"
        y = F.conv2d(y.mT.unflatten(2, (height, width)), self.p[f"{name}.proj_out.weight"],
                     self.p[f"{name}.proj_out.bias"])
        return x + clips(y, b)

    def block(self, y: Tensor, name: str, text: Tensor, t: int) -> Tensor:
        n = self.layer_norm(y, f"{name}.norm1")
        y = y + self.attention(n, n, f"{name}.attn1")
        y = y + self.attention(self.layer_norm(y, f"{name}.norm2"), text, f"{name}.attn2")
        pixels = self.layer_norm(y, f"{name}.norm_temporal").unflatten(0, (-1, t)).transpose(1, 2).flatten(0, 1)
        moved = self.attention(pixels, pixels, f"{name}.attn_temporal")
        y = y + moved.unflatten(0, (-1, y.shape[1])).transpose(1, 2).flatten(0, 1)
        value, gate = self.linear(self.layer_norm(y, f"{name}.norm3"), f"{name}.ff.net.0.proj").chunk(2, -1)
        return y + self.linear(value * F.gelu(gate), f"{name}.ff.net.2")

    def __call__(self, x: Tensor, step: Tensor, text: Tensor) -> Tensor:
        """x `b c t h w`, step `b`, text `(b t) l d`."""
        half = self.p["time_embedding.linear_1.weight"].shape[1] // 2
        angles = step[:, None] * torch.exp(-math.log(10000) * torch.arange(half) / half)
        emb = self.linear(torch.cat([angles.cos(), angles.sin()], -1), "time_embedding.linear_1")
        emb = self.linear(F.silu(emb), "time_embedding.linear_2")
        h = self.conv(x, "conv_in")
        skips = [h]
        for level in self.numbers(r"down_blocks\.(\d+)\."):
            for j in self.numbers(rf"down_blocks\.{level}\.resnets\.(\d+)\."):
                h = self.pair(h, f"down_blocks.{level}.", j, emb, text)
                skips.append(h)
            if f"down_blocks.{level}.downsamplers.0.conv.spatial_conv.weight" in self.p:
                h = self.conv(h, f"down_blocks.{level}.downsamplers.0.conv", stride=2)
                skips.append(h)
        h = self.pair(h, "mid_block.", 0, emb, text)
        h = self.resblock(h, "mid_block.resnets.1", emb)
        for level in self.numbers(r"up_blocks\.(\d+)\."):
            for j in self.numbers(rf"up_blocks\.{level}\.resnets\.(\d+)\."):
                h = self.pair(torch.cat([h, skips.pop()], 1), f"up_blocks.{level}.", j, emb, text)
            if f"up_blocks.{level}.upsamplers.0.conv.spatial_conv.weight" in self.p:
                h = F.interpolate(h, scale_factor=(1, 2, 2))
                h = self.conv(h, f"up_blocks.{level}.upsamplers.0.conv")
        return self.conv(F.silu(self.norm(h, "conv_norm_out")), "conv_out")

    def pair(self, h: Tensor, block: str, number: int, emb: Tensor, text: Tensor) -> Tensor:
        h = self.resblock(h, f"{block}resnets.{number}", emb)
        return self.transformer(h, f"{block}attentions.{number}", text) \
            if f"{block}attentions.{number}.norm.weight" in self.p else h

    def numbers(self, pattern: str) -> list[int]:
        return sorted({int(match[1]) for match in map(re.compile(pattern).match, self.p) if match})
