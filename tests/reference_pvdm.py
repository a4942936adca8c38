"""PVDM in plain PyTorch, written from the papers and not from the pack's code. It is slow on purpose.

Networks are computed in float64 from a dictionary of weights in the published names. Planes are three pictures
`c i j` in the order xy (rows, columns), yt (time, columns), xt (time, rows). One clip at a time.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

GROUPS = 32


class Weights:
    """The weights, and the layers that both networks have."""

    def __init__(self, weights: dict) -> None:
        self.weights = {key: value.double() for key, value in weights.items()}

    def count(self, prefix: str) -> int:
        """How many numbered parts stand below a name."""
        return len({key[len(prefix) + 1:].split(".")[0] for key in self.weights if key.startswith(f"{prefix}.")})

    def has(self, key: str) -> bool:
        return key in self.weights

    def linear(self, name: str, x: Tensor) -> Tensor:
        """A matrix on the last axis. Kernels of one position are matrices too."""
        weight = self.weights[f"{name}.weight"].flatten(1)
        return x @ weight.T + self.weights.get(f"{name}.bias", torch.zeros(()).double())

    def scaled(self, name: str, x: Tensor) -> Tensor:
        """The factor and the offset of a norm, on the last axis."""
        return x * self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"]


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One head. `n d`, `m d`, `m d` -> `n d`."""
    scores = torch.exp(q @ k.T / math.sqrt(q.shape[1]))
    return scores / scores.sum(1, keepdim=True) @ v


def turning(angles: list[list[float]]) -> Tensor:
    """For each position, the matrix `d d` that turns its features. Feature 2i goes by its own angle, and so does
    feature 2i + 1: they may differ."""
    matrices = torch.zeros(len(angles), len(angles[0]), len(angles[0])).double()
    for matrix, row in zip(matrices, angles):
        for i in range(0, len(row), 2):
            matrix[i, i], matrix[i, i + 1] = math.cos(row[i]), -math.sin(row[i])
            matrix[i + 1, i], matrix[i + 1, i + 1] = math.sin(row[i + 1]), math.cos(row[i + 1])
    return matrices


def frame_angles(frames: int, width: int) -> list[list[float]]:
    """Feature j of frame n turns by n / 10000 ** (2 (j mod width/2) / width)."""
    return [[n / 10000 ** (2 * (j % (width // 2)) / width) for j in range(width)] for n in range(frames)]


def picture_angles(height: int, width: int, features: int) -> list[list[float]]:
    """The first half of the features turns with the row, the second with the column. Both go from -1 to 1. Pairs have
    frequencies from pi to 5 pi, evenly spaced in their logarithm."""
    pairs = features // 4
    frequencies = [math.pi * 5 ** (i / (pairs - 1)) for i in range(pairs)]

    def place(n, count):
        return -1 + 2 * n / (count - 1)
    return [[frequencies[j // 2] * place(row, height) for j in range(2 * pairs)]
            + [frequencies[j // 2] * place(column, width) for j in range(2 * pairs)]
            for row in range(height) for column in range(width)]


class ReferenceAutoencoder(Weights):
    def __init__(self, weights: dict, patch: int, heads: int, plane_heads: int) -> None:
        super().__init__(weights)
        self.patch, self.heads, self.plane_heads = patch, heads, plane_heads

    def encode(self, x: Tensor) -> list[Tensor]:
        """A clip `3 t H W` -> its planes."""
        p = self.patch
        t, height, width = x.shape[1], x.shape[2] // p, x.shape[3] // p
        patches = [[[x[:, n, i * p:(i + 1) * p, j * p:(j + 1) * p].permute(1, 2, 0).flatten() for j in range(width)]
                    for i in range(height)] for n in range(t)]
        patches = torch.stack([torch.stack([torch.stack(row) for row in frame]) for frame in patches]).double()
        u = self.timesformer("encoder", self.linear("encoder.to_patch_embedding", patches))
        planes = [torch.stack([torch.stack([self.project("xy", u[:, i, j]) for j in range(width)])
                               for i in range(height)]),
                  torch.stack([torch.stack([self.project("yt", u[n, :, j]) for j in range(width)]) for n in range(t)]),
                  torch.stack([torch.stack([self.project("xt", u[n, i]) for i in range(height)]) for n in range(t)])]
        return [plane.permute(2, 0, 1) for plane in planes]

    def decode(self, planes: list[Tensor]) -> Tensor:
        """Planes -> a clip `3 t H W`."""
        xy, yt, xt = (self.linear(f"post_{name}", plane.double().permute(1, 2, 0))
                      for name, plane in zip(("xy", "yt", "xt"), planes))
        t, height, width = len(yt), len(xy), xy.shape[1]
        u = torch.stack([torch.stack([torch.stack([xy[i, j] + yt[n, j] + xt[n, i] for j in range(width)])
                                      for i in range(height)]) for n in range(t)])
        u = self.timesformer("decoder", u)
        kernel, bias = self.weights["to_pixel.1.weight"], self.weights["to_pixel.1.bias"]
        x = torch.zeros(3, t, height * self.patch, width * self.patch).double()
        for n in range(t):
            for i in range(height):
                for j in range(width):
                    picture = (u[n, i, j, :, None, None, None] * kernel).sum(0) + bias[:, None, None]
                    rows, columns = (slice(k * self.patch, (k + 1) * self.patch) for k in (i, j))
                    x[:, n, rows, columns] = 2 / (1 + torch.exp(-picture)) - 1
        return x

    def project(self, name: str, tokens: Tensor) -> Tensor:
        """One position of a plane, of the tokens `n c` along the axis that the plane lacks. The learned token is the
        last of the row, and the first one is read."""
        x = torch.cat([tokens, self.weights[f"{name}_token"][0]])
        x = x + self.weights[f"{name}_pos_embedding"][0, :len(x)]
        for n in range(self.count(f"{name}_quant_attn.layers")):
            layer = f"{name}_quant_attn.layers.{n}"
            x = x + self.self_attention(f"{layer}.0.fn", self.normed(f"{layer}.0.norm", x), self.plane_heads)
            wide = self.linear(f"{layer}.1.fn.net.0", self.normed(f"{layer}.1.norm", x))
            x = x + self.linear(f"{layer}.1.fn.net.3", self.gelu(wide))
        return torch.tanh(self.linear(f"pre_{name}", x[0]))

    def timesformer(self, name: str, u: Tensor) -> Tensor:
        """Tokens `t h w c`."""
        t, height, width, _ = u.shape
        features = len(self.weights[f"{name}.layers.0.0.fn.to_qkv.weight"]) // 3 // self.heads
        over_time = turning(frame_angles(t, features))
        over_frame = turning(picture_angles(height, width, features))
        for n in range(self.count(f"{name}.layers")):
            layer = f"{name}.layers.{n}"
            normed = self.normed(f"{layer}.0.norm", u)
            u = u + torch.stack([torch.stack([
                self.self_attention(f"{layer}.0.fn", normed[:, i, j], self.heads, over_time)
                for j in range(width)], 1) for i in range(height)], 1)
            normed = self.normed(f"{layer}.1.norm", u)
            u = u + torch.stack([self.self_attention(f"{layer}.1.fn", frame.flatten(0, 1), self.heads, over_frame)
                                .unflatten(0, (height, width)) for frame in normed])
            wide = self.linear(f"{layer}.2.fn.net.0", self.normed(f"{layer}.2.norm", u))
            half = wide.shape[-1] // 2
            u = u + self.linear(f"{layer}.2.fn.net.3", wide[..., :half] * self.gelu(wide[..., half:]))
        return u

    def self_attention(self, name: str, x: Tensor, heads: int, turns: Tensor | None = None) -> Tensor:
        """Tokens `n c`. Queries, keys and values stand behind one another, heads within each."""
        qkv = self.linear(f"{name}.to_qkv", x)
        width = qkv.shape[1] // 3 // heads
        outputs = []
        for head in range(heads):
            q, k, v = (qkv[:, (part * heads + head) * width:][:, :width] for part in range(3))
            if turns is not None:
                q, k = (torch.einsum("nij,nj->ni", turns, part) for part in (q, k))
            outputs.append(attention(q, k, v))
        return self.linear(f"{name}.to_out.0", torch.cat(outputs, 1))

    def normed(self, name: str, x: Tensor) -> Tensor:
        mean, variance = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, unbiased=False)
        return self.scaled(name, (x - mean) / torch.sqrt(variance + 1e-5))

    @staticmethod
    def gelu(x: Tensor) -> Tensor:
        return x * (1 + torch.erf(x / math.sqrt(2))) / 2


class ReferenceUNet(Weights):
    """The U-Net of planes. levels, blocks: numbers of levels, and of ResBlocks of a level."""

    def __init__(self, weights: dict, levels: int, blocks: int, heads: int) -> None:
        super().__init__(weights)
        self.blocks, self.heads = blocks, heads
        self.down = {(blocks + 1) * level for level in range(1, levels)}       # input blocks that halve

    def __call__(self, planes: list[Tensor], tau: int, before: list[Tensor]) -> list[Tensor]:
        """eps of noisy planes. before: the planes of the clip before."""
        self.emb = self.time(tau)
        planes = [torch.cat(pair).double() for pair in zip(planes, before)]
        skips = []
        for n in range(self.count("input_blocks")):
            planes = self.across(f"input_attns.{n}", [self.block(f"input_blocks.{n}", plane, n in self.down)
                                                      for plane in planes])
            skips.append(planes)
        planes = self.across("mid_attn", [self.block("middle_block", plane) for plane in planes])
        for n in range(self.count("output_blocks")):
            planes = [torch.cat(pair) for pair in zip(planes, skips.pop())]
            planes = self.across(f"output_attns.{n}", [self.block(f"output_blocks.{n}", plane) for plane in planes])
        return [self.conv("out.2", F.silu(self.normed("out.0", plane))) for plane in planes]

    def time(self, tau: int) -> Tensor:
        half = self.weights["time_embed.0.weight"].shape[1] // 2
        angles = [tau * 10000 ** (-i / half) for i in range(half)]
        sinusoid = torch.tensor([math.cos(a) for a in angles] + [math.sin(a) for a in angles]).double()
        return self.linear("time_embed.2", F.silu(self.linear("time_embed.0", sinusoid)))

    def block(self, name: str, x: Tensor, down: bool = False) -> Tensor:
        """A plane through a block. A ResBlock behind another part of an output block doubles the plane."""
        for n in range(self.count(name)):
            part = f"{name}.{n}"
            if self.has(f"{part}.qkv.weight"):
                x = self.attended(part, x.flatten(1)).unflatten(1, x.shape[1:])
            elif self.has(f"{part}.weight"):
                x = self.conv(part, x)
            else:
                x = self.resblock(part, x, "down" if down else "up" if n and name != "middle_block" else "")
        return x

    def resblock(self, name: str, x: Tensor, resize: str) -> Tensor:
        h = self.resized(F.silu(self.normed(f"{name}.in_layers.0", x)), resize)
        h = self.conv(f"{name}.in_layers.2", h)
        x = self.resized(x, resize)
        scale, shift = self.linear(f"{name}.emb_layers.1", F.silu(self.emb)).unflatten(0, (2, -1))
        h = self.normed(f"{name}.out_layers.0", h) * (1 + scale[:, None, None]) + shift[:, None, None]
        h = self.conv(f"{name}.out_layers.3", F.silu(h))
        return h + (self.conv(f"{name}.skip_connection", x) if self.has(f"{name}.skip_connection.weight") else x)

    @staticmethod
    def resized(x: Tensor, resize: str) -> Tensor:
        if resize == "down":
            return (x[:, ::2, ::2] + x[:, 1::2, ::2] + x[:, ::2, 1::2] + x[:, 1::2, 1::2]) / 4
        return x.repeat_interleave(2, 1).repeat_interleave(2, 2) if resize else x

    def across(self, name: str, planes: list[Tensor]) -> list[Tensor]:
        """The attention over all three planes."""
        if not self.has(f"{name}.qkv.weight"):
            return planes
        row = self.attended(name, torch.cat([plane.flatten(1) for plane in planes], 1))
        found = []
        for plane in planes:
            size = plane[0].numel()
            found.append(row[:, :size].reshape(plane.shape))
            row = row[:, size:]
        return found

    def attended(self, name: str, x: Tensor) -> Tensor:
        """Positions `c l`. Each head has its queries, keys and values next to one another."""
        qkv = self.linear(f"{name}.qkv", self.normed(f"{name}.norm", x).T)
        width = qkv.shape[1] // 3 // self.heads
        heads = [attention(*(qkv[:, (3 * head + part) * width:][:, :width] for part in range(3)))
                 for head in range(self.heads)]
        return x + self.linear(f"{name}.proj_out", torch.cat(heads, 1)).T

    def normed(self, name: str, x: Tensor) -> Tensor:
        """Groups of channels, over all positions of one plane or of the whole row."""
        groups = x.reshape(GROUPS, -1)
        mean, variance = groups.mean(1, keepdim=True), groups.var(1, keepdim=True, unbiased=False)
        normal = ((groups - mean) / torch.sqrt(variance + 1e-5)).reshape(x.shape)
        return self.scaled(name, normal.movedim(0, -1)).movedim(-1, 0)

    def conv(self, name: str, x: Tensor) -> Tensor:
        weight, bias = self.weights[f"{name}.weight"], self.weights[f"{name}.bias"]
        return F.conv2d(x[None], weight, bias, padding=weight.shape[-1] // 2)[0]


def cumulative_alphas(steps: int = 1000) -> list[float]:
    """The product of 1 - beta up to each step. The square roots of beta are evenly spaced."""
    first, last = math.sqrt(0.0015), math.sqrt(0.0195)
    found, product = [], 1.0
    for n in range(steps):
        product *= 1 - (first + (last - first) * n / (steps - 1)) ** 2
        found.append(product)
    return found


def ddim(network, x: Tensor, moments: list[int], noises: list[Tensor], eta: float) -> Tensor:
    """DDIM (Eq. 12 and 16), with clean planes clamped and the network's own eps. noises: one for each step."""
    alphas = cumulative_alphas()
    for n, (now, noise) in enumerate(zip(moments, noises, strict=True)):
        eps = network(x, now)
        clean = ((x - math.sqrt(1 - alphas[now]) * eps) / math.sqrt(alphas[now])).clamp(-1, 1)
        if n + 1 == len(moments):
            return clean
        a, b = alphas[now], alphas[moments[n + 1]]
        sigma = eta * math.sqrt((1 - b) / (1 - a)) * math.sqrt(1 - a / b)
        x = math.sqrt(b) * clean + math.sqrt(1 - b - sigma ** 2) * eps + sigma * noise
    raise AssertionError("no steps")


def ancestral(network, x: Tensor, noises: list[Tensor], steps: int) -> Tensor:
    """DDPM (Algorithm 2) through its posterior (Eq. 6 and 7), with clean planes clamped. noises: from the last step to
    step 1. Step 0 has none."""
    alphas = cumulative_alphas(steps)
    for now in reversed(range(steps)):
        a, before = alphas[now], alphas[now - 1] if now else 1.0
        beta = 1 - a / before
        clean = ((x - math.sqrt(1 - a) * network(x, now)) / math.sqrt(a)).clamp(-1, 1)
        x = math.sqrt(before) * beta / (1 - a) * clean + math.sqrt(a / before) * (1 - before) / (1 - a) * x
        if now:
            x = x + math.sqrt(beta * (1 - before) / (1 - a)) * noises[steps - 1 - now]
    return x
