"""LaVie's super-resolution UNet a quarter as wide, in its published names, and what it does, written down plainly.

The reference works on `b c t h w` and uses diffusers' names. It rotates with complex numbers. It shares nothing with
the layers of the pack but the file.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from video_ldm.temporal.layers.position import rotation_angles
from video_ldm.tests.formats_help import PUBLISHED
from video_ldm.tests.small import SD15, unet_model

LAVIE, UPSCALE_A_VIDEO = "lavie_vsr", "upscale_a_video_unet"
HEADS, TEXT, LEVELS = 2, 256, 4
UNET = dict(SD15, in_channels=7, model_channels=64, context_dim=TEXT, use_linear_in_transformer=True, num_classes=1000,
            num_heads=HEADS, num_res_blocks=[2] * 4, channel_mult=(1, 2, 2, 4),
            transformer_depth=[0, 0, 1, 1, 1, 1, 1, 1], transformer_depth_output=[0] * 3 + [1] * 9,
            disable_self_attentions=[True, True, True, False])


def quarter(name: str) -> dict:
    """A published file a quarter as wide, with heads of the same width."""
    def size(key: str, number: int) -> int:
        return number // 4 if number in (256, 512, 768, 1024, 1536, 2048, 4096, 8192) else number
    shapes = {key: tuple(size(key, number) for number in shape) for key, shape in PUBLISHED[name].items()}
    return {key: (32, HEADS) if "relative_attention_bias" in key else shape for key, shape in shapes.items()}


def random_file(shapes: dict, seed: int = 0) -> dict[str, Tensor]:
    """Weights that keep activations near 1, as `small.randomise` has them, and the published frequencies."""
    generator, tensors = torch.Generator().manual_seed(seed), {}
    for key, shape in shapes.items():
        spread = torch.Size(shape[1:]).numel() ** -0.5 if len(shape) > 1 and "bias" not in key else 0.2
        tensors[key] = torch.randn(shape, generator=generator) * spread
        if "norm" in key and key.endswith("weight"):
            tensors[key] += 1
        if key.endswith("freqs"):
            tensors[key] = rotation_angles(torch.ones(1))[0]
    return tensors


def temporal_shapes(channels=(256,) * 4, resblocks: int = 1, text=(0,), heads: int = 8) -> dict:
    """Keys and shapes of the temporal layers alone, for a UNet of these levels with transformers in those of `text`."""
    levels, shapes = len(channels), {}
    places = [("mid", "", 0, 1)] + [("down", f"s.{i}", i, resblocks) for i in range(levels)]
    places += [("up", f"s.{levels - 1 - i}", i, resblocks + 1) for i in range(levels)]
    for side, number, level, modules in places:
        own = {512: channels[-1 if side == "mid" else level], 1024: 4 * channels[0], 8: heads}
        copies = [("down_temporal_blocks.1.", f"{side}_temporal_block{number}.")]
        copies += [("down_blocks.1.attentions.0.", f"{side}_block{number}.attentions.{j}.")
                   for j in range(modules) if side == "mid" or level in text]
        for theirs, ours in copies:
            shapes |= {ours + key.removeprefix(theirs): tuple(own.get(size, size) for size in shape)
                       for key, shape in PUBLISHED[LAVIE].items() if key.startswith(theirs) and "temporal" in key}
    return shapes


def other_names(tensors: dict) -> dict:
    """The same file under Upscale-A-Video's names."""
    def name(key: str) -> str:
        for side in ("down", "up", "mid"):
            key = key.replace(f"{side}_temporal_block", f"{side}_temp_block")
        key = key.replace("resblocks_3d_t.", "resblocks_3d_temporal.")
        return key.replace("resblocks_3d_s.", "resblocks_3d_spatial.")
    return {name(key): tensor for key, tensor in tensors.items()}


def upscaler_unet(weights: dict):
    """ComfyUI's UNet with the spatial weights of such a file."""
    from comfy.utils import unet_to_diffusers
    unet = unet_model(UNET)
    renamed = {ours: weights[theirs] for theirs, ours in unet_to_diffusers(UNET).items() if theirs in weights}
    unet.load_state_dict(renamed | {"label_emb.weight": weights["class_embedding.weight"]})
    return unet


def video_batch(clips: int, frames: int, height: int = 16, width: int = 24, seed: int = 2):
    """Latents with the small frames, timesteps, text of each frame and noise levels."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(clips * frames, 7, height, width, generator=generator)
    text = torch.randn(clips, 7, TEXT, generator=generator).repeat_interleave(frames, 0)
    return x, torch.full((clips * frames,), 500.0), text, torch.full((clips * frames,), 50)


# What the published UNet does

class Published:
    """The UNet of a file: `weights` under LaVie's names."""

    def __init__(self, weights: dict[str, Tensor]):
        self.weights = weights

    def linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self.weights[f"{name}.weight"], self.weights.get(f"{name}.bias"))

    def conv(self, name: str, x: Tensor, stride: int = 1) -> Tensor:
        """A kernel of 4 dimensions acts on each frame."""
        weight = self.weights[f"{name}.weight"]
        weight = weight if weight.ndim == 5 else weight[:, :, None]
        padding = [size // 2 for size in weight.shape[2:]]
        return F.conv3d(x, weight, self.weights[f"{name}.bias"], stride=(1, stride, stride), padding=padding)

    def norm(self, name: str, x: Tensor, eps: float) -> Tensor:
        return F.group_norm(x, 32, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"], eps)

    def layer_norm(self, name: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.weights[f"{name}.weight"], self.weights[f"{name}.bias"])

    def resnet(self, name: str, x: Tensor, emb: Tensor, eps: float = 1e-5) -> Tensor:
        """Each norm sees all frames of a clip. Sizes of kernels tell temporal convolutions from spatial ones."""
        h = self.conv(f"{name}.conv1", F.silu(self.norm(f"{name}.norm1", x, eps)))
        if f"{name}.time_emb_proj.weight" in self.weights:
            h = h + self.linear(f"{name}.time_emb_proj", F.silu(emb))[:, :, None, None, None]
        h = self.conv(f"{name}.conv2", F.silu(self.norm(f"{name}.norm2", h, eps)))
        return h + (self.conv(f"{name}.conv_shortcut", x) if f"{name}.conv_shortcut.weight" in self.weights else x)

    def attention(self, name: str, x: Tensor, context: Tensor, over_time: bool = False) -> Tensor:
        q, k, v = (self.linear(f"{name}.to_{to}", tokens).unflatten(-1, (HEADS, -1)).transpose(1, 2)
                   for to, tokens in zip("qkv", (x, context, context)))
        q = q * q.shape[-1] ** -0.5
        if over_time:
            q, k = turned(q), turned(k)
        scores = q @ k.transpose(-1, -2)
        if over_time:
            table = self.weights[f"{name}.time_rel_pos_bias.relative_attention_bias.weight"]
            frames = range(x.shape[1])
            rows = torch.tensor([[bucket(key - query) for key in frames] for query in frames])
            scores = scores + table[rows].movedim(-1, 0)
        return self.linear(f"{name}.to_out.0", (scores.softmax(-1) @ v).transpose(1, 2).flatten(-2))

    def transformer(self, name: str, x: Tensor, emb: Tensor, text: Tensor, cross_alone: bool) -> Tensor:
        clips, _, frames, height, width = x.shape
        x = self.resnet(f"{name}.resblock_temporal", x, emb, 1e-6)
        pictures = self.norm(f"{name}.norm", x.transpose(1, 2).flatten(0, 1), 1e-6)
        h = self.linear(f"{name}.proj_in", pictures.flatten(2).transpose(1, 2))
        block = f"{name}.transformer_blocks.0"
        normed = self.layer_norm(f"{block}.norm1", h)
        h = h + self.attention(f"{block}.attn1", normed, text if cross_alone else normed)
        h = h + self.attention(f"{block}.attn2", self.layer_norm(f"{block}.norm2", h), text)
        places = h.unflatten(0, (clips, frames)).transpose(1, 2).flatten(0, 1)
        normed = self.layer_norm(f"{block}.norm_temporal", places)
        places = places + self.attention(f"{block}.attn_temporal", normed, normed, over_time=True)
        h = places.unflatten(0, (clips, height * width)).transpose(1, 2).flatten(0, 1)
        value, gate = self.linear(f"{block}.ff.net.0.proj", self.layer_norm(f"{block}.norm3", h)).chunk(2, dim=-1)
        h = h + self.linear(f"{block}.ff.net.2", value * F.gelu(gate))
        h = self.linear(f"{name}.proj_out", h).transpose(1, 2).reshape(pictures.shape)
        return x + h.unflatten(0, (clips, frames)).transpose(1, 2)

    def level(self, name: str, x: Tensor, emb: Tensor) -> Tensor:
        h = self.resnet(f"{name}.resblocks_3d_s", self.resnet(f"{name}.resblocks_3d_t", x, emb, 1e-6), emb, 1e-6)
        return x + self.conv(f"{name}.shift_conv", h)

    def block(self, name: str, j: int, level: int, x: Tensor, emb: Tensor, text: Tensor) -> Tensor:
        x = self.resnet(f"{name}.resnets.{j}", x, emb)
        return self.transformer(f"{name}.attentions.{j}", x, emb, text, level < LEVELS - 1) if level else x

    def __call__(self, x: Tensor, timestep: float, text: Tensor, noise_level: int) -> Tensor:
        """x `b 7 t h w`, text `(b t) l d` -> `b 4 t h w`."""
        wave = timestep * 10000.0 ** (-torch.arange(32) / 32)
        emb = self.linear("time_embedding.linear_1", torch.cat([wave.cos(), wave.sin()])[None])
        emb = self.linear("time_embedding.linear_2", F.silu(emb)) + self.weights["class_embedding.weight"][noise_level]
        x = self.conv("conv_in", x)
        skips = [x]
        for i in range(LEVELS):
            for j in range(2):
                x = self.block(f"down_blocks.{i}", j, i, x, emb, text)
                skips.append(x)
            if i < LEVELS - 1:
                x = self.conv(f"down_blocks.{i}.downsamplers.0.conv", x, stride=2)
                skips.append(x)
            x = self.level(f"down_temporal_blocks.{i}", x, emb)
        x = self.resnet("mid_block.resnets.0", x, emb)
        x = self.transformer("mid_block.attentions.0", x, emb, text, False)
        x = self.level("mid_temporal_block", self.resnet("mid_block.resnets.1", x, emb), emb)
        for i in range(LEVELS):
            for j in range(3):
                x = torch.cat([x, skips.pop()], dim=1)
                x = self.block(f"up_blocks.{i}", j, LEVELS - 1 - i, x, emb, text)
            if i < LEVELS - 1:
                x = F.interpolate(x, size=(x.shape[2], *skips[-1].shape[-2:]))
                x = self.conv(f"up_blocks.{i}.upsamplers.0.conv", x)
            x = self.level(f"up_temporal_blocks.{i}", x, emb)
        return self.conv("conv_out", F.silu(self.norm("conv_norm_out", x, 1e-5)))


def turned(x: Tensor) -> Tensor:
    """`s h t d`: pairs of the first 32 channels as complex numbers, turned by their frame's number."""
    pairs = torch.view_as_complex(x[..., :32].unflatten(-1, (16, 2)).contiguous())
    angles = torch.arange(x.shape[2])[:, None] * 10000.0 ** (-torch.arange(16) / 16)
    pairs = pairs * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([torch.view_as_real(pairs).flatten(-2), x[..., 32:]], dim=-1)


def bucket(ahead: int) -> int:
    """Row of the table of distances for a key so many frames ahead of its query."""
    distance = abs(ahead)
    row = distance if distance < 8 else min(15, 8 + int(math.log(distance / 8) / math.log(4) * 8))
    return row + 16 * (ahead > 0)
