"""Small files of whole video networks: the published names with a tenth of the channels, and random weights."""

import numpy as np
import torch

from video_ldm.temporal.layers.position import rotation_angles
from video_ldm.tests.formats_help import PUBLISHED

# Networks that differ from a published file in one tensor: SEINE is LaVie's base with more input channels.
KINDS = PUBLISHED | {"seine": PUBLISHED["lavie_base"] | {"conv_in.weight": (320, 9, 3, 3)}}
BIAS = ".relative_attention_bias.weight"        # LaVie's table by distance has a column for each head
ROTATION = ".rotary_emb.freqs"


def network_shapes(kind: str) -> dict:
    """Names and shapes of a small file. kind: a key of KINDS, as in "lavie_base"."""
    return {key: (shape[0], 1) if key.endswith(BIAS) else tuple(map(narrowed, shape))
            for key, shape in KINDS[kind].items()}


def narrowed(size: int) -> int:
    """A tenth of a number of channels of the network. The text keeps its width."""
    return size // 10 if size % 320 == 0 else size


def network_tensors(kind: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> dict:
    """The weights of a small file. They are spread like fresh ones, so that the network's output stays about 1.

    NumPy's old generator draws the same numbers on every machine and in every version.
    """
    source = np.random.RandomState(seed)
    return {key: drawn(key, shape, source).to(dtype) for key, shape in network_shapes(kind).items()}


def drawn(key: str, shape: tuple, source: np.random.RandomState) -> torch.Tensor:
    if key.endswith(ROTATION):
        return rotation_angles(torch.ones(1))[0]
    value = torch.from_numpy((source.random_sample(shape) * 2 - 1) * 3 ** 0.5).float()      # of variance 1
    if len(shape) == 1:
        return 1 + 0.1 * value if "norm" in key and key.endswith("weight") else 0.1 * value
    if key.endswith(BIAS):
        return value
    return value / (value[0].numel() ** 0.5)
