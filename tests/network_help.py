"""Small files of whole video networks: the published names with a tenth of the channels, and random weights."""

import torch

from video_ldm.temporal.layers.position import rotation_angles
from video_ldm.tests.formats_help import PUBLISHED

BIAS = ".relative_attention_bias.weight"        # LaVie's table by distance has a column for each head
ROTATION = ".rotary_emb.freqs"


def network_shapes(kind: str, divisor: int = 10) -> dict:
    """Names and shapes of a small file.

    Args:
        kind: a key of PUBLISHED, as in "lavie_base".
        divisor: of the numbers of channels. 1: the published file.
    """
    return {key: (shape[0], max(1, 8 // divisor)) if key.endswith(BIAS)
            else tuple(narrowed(size, divisor) for size in shape) for key, shape in PUBLISHED[kind].items()}


def narrowed(size: int, divisor: int) -> int:
    """A part of a number of channels of the network. The text keeps its width."""
    return size // divisor if size % 320 == 0 else size


def network_tensors(kind: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> dict:
    """The weights of a small file. They are drawn like fresh ones, so that the network's output stays about 1."""
    generator = torch.Generator().manual_seed(seed)
    return {key: drawn(key, shape, generator).to(dtype) for key, shape in network_shapes(kind).items()}


def drawn(key: str, shape: tuple, generator: torch.Generator) -> torch.Tensor:
    if key.endswith(ROTATION):
        return rotation_angles(torch.ones(1))[0]
    value = torch.randn(shape, generator=generator)
    if len(shape) == 1:
        return 1 + 0.1 * value if "norm" in key and key.endswith("weight") else 0.1 * value
    if key.endswith(BIAS):
        return value
    return value / (value[0].numel() ** 0.5)
