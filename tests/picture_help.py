"""Small files of layers that move a given picture, for small image models, and their formulas written once more."""

import torch
from torch.nn import functional as F

from video_ldm.tests.formats_help import motion_shapes, motion_tensors
from video_ldm.tests.host import checkpoints

ONE_LEVEL = (320,)          # channels of checkpoints.UNET
# PIA's lists by the distance to the picture, as its authors print them
LISTS = {
    "small": [1.0, 0.9, 0.85, 0.85, 0.85, 0.8],
    "moderate": [1.0, 0.8, 0.8, 0.8, 0.79, 0.78, 0.75],
    "large": [1.0, 0.8, 0.7, 0.7, 0.7, 0.7, 0.7, 0.7, 0.7, 0.7, 0.6, 0.5, 0.5],
    "loop, small": [1.0, 0.9, 0.85, 0.85, 0.85, 0.8, 0.8, 0.8, 0.8, 0.8, 0.8, 0.8, 0.85, 0.85, 0.9, 1.0],
    "loop, moderate": [1.0, 0.8, 0.8, 0.8, 0.79, 0.78, 0.75, 0.75, 0.75, 0.75, 0.75, 0.78, 0.79, 0.8, 0.8, 1.0],
    "loop, large": [1.0, 0.8, 0.7, 0.7, 0.7, 0.7, 0.6, 0.5, 0.5, 0.6, 0.7, 0.7, 0.7, 0.7, 0.8, 1.0],
    "new style, small": [0.5, 0.4, 0.4, 0.4, 0.35, 0.3],
    "new style, moderate": [0.5, 0.4, 0.4, 0.4, 0.35, 0.35, 0.3, 0.25, 0.2],
    "new style, large": [0.5, 0.2],
}


def by_distance(amount: str, frame: int, frames: int) -> list[float]:
    """The affinity of each frame of a clip."""
    values = LISTS[amount]
    return [values[min(abs(n - frame), len(values) - 1)] for n in range(frames)]


def scaled(tensors: dict) -> dict:
    """Random tensors with the spread that weights of their shapes have."""
    found = {}
    for key, tensor in tensors.items():
        if key.endswith(".pe"):
            found[key] = tensor
        else:
            spread = tensor[0].numel() ** -0.5 if tensor.ndim > 1 else 0.2
            is_norm = tensor.ndim == 1 and "norm" in key and key.endswith("weight")
            found[key] = tensor * spread + (1.0 if is_norm else 0.0)
    return found


def pia_state(channels=ONE_LEVEL, resblocks: int = 1, seed: int = 21) -> dict:
    """A file like PIA's."""
    shapes = motion_shapes(channels, resblocks, False, 32) | {
        "conv_in.weight": (channels[0], 9, 3, 3), "conv_in.bias": (channels[0],)}
    return scaled(motion_tensors(shapes, seed))


def encoder_shapes(channels=ONE_LEVEL) -> dict:
    """Names and shapes of AnimateLCM's picture encoder."""
    shapes = {"conv_in.weight": (channels[0], 4, 3, 3), "conv_in.bias": (channels[0],)}
    before = channels[0]
    for number, width in enumerate(width for width in channels for _ in range(2)):
        block = f"body.{number}."
        if before != width:
            shapes |= {f"{block}in_conv.weight": (width, before, 1, 1), f"{block}in_conv.bias": (width,)}
        shapes |= {f"{block}block1.weight": (width, width, 3, 3), f"{block}block1.bias": (width,),
                   f"{block}block2.weight": (width, width, 1, 1), f"{block}block2.bias": (width,)}
        before = width
    return {f"img_encoder.{key}": shape for key, shape in shapes.items()}


def i2v_state(channels=ONE_LEVEL, seed: int = 22) -> dict:
    """A file like AnimateLCM's for image to video. Its image model has two ResBlocks in a level."""
    return scaled(motion_tensors(motion_shapes(channels, 2, True, 0) | encoder_shapes(channels), seed))


def deep_unet_state(seed: int = 0) -> dict:
    """Like checkpoints.unet_state, with two ResBlocks in its level."""
    return checkpoints.unet_state(seed, num_res_blocks=[2], transformer_depth=[1, 1], transformer_depth_output=[1] * 3)


def encoded(state: dict, picture: torch.Tensor, numbers: list[int], motion_scale: float) -> list[torch.Tensor]:
    """What AnimateLCM's encoder makes of a picture `c h w`, `t c h w` for each level. It follows the paper's words."""
    def conv(name, x, padding=0):
        return F.conv2d(x, state[f"img_encoder.{name}.weight"], state[f"img_encoder.{name}.bias"], padding=padding)
    x = conv("conv_in", picture[None], 1).repeat(len(numbers), 1, 1, 1)
    width = x.shape[1]
    for row, number in enumerate(numbers):
        for channel in range(width):
            angle = torch.tensor(number / 10000 ** ((channel - channel % 2) / width))
            x[row, channel] += motion_scale * (angle.cos() if channel % 2 else angle.sin())
    features = []
    for block in range(1 + max(int(key.split(".")[2]) for key in state if key.startswith("img_encoder.body"))):
        if block and block % 2 == 0:
            x = torch.cat([x, x[:, :, -1:]], 2) if x.shape[2] % 2 else x
            x = torch.cat([x, x[:, :, :, -1:]], 3) if x.shape[3] % 2 else x
            x = (x[:, :, 0::2, 0::2] + x[:, :, 1::2, 0::2] + x[:, :, 0::2, 1::2] + x[:, :, 1::2, 1::2]) / 4
        if f"img_encoder.body.{block}.in_conv.weight" in state:
            x = conv(f"body.{block}.in_conv", x)
        x = x + conv(f"body.{block}.block2", conv(f"body.{block}.block1", x, 1).clamp(min=0))
        if block % 2:
            features.append(x)
    return features
