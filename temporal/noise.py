"""The noise that a clip begins with, when its frames do not each have noise of their own (docs/papers.md#noise).

Mixed noise has a part that all frames share. FreeNoise and repeated noise take the frames' own noise in another order:
an order lists, for each frame of a clip, the frame whose noise it gets.
"""

import math
from itertools import pairwise

import torch
from torch import Tensor

from .windows import window_starts


def mix_weights(mix: float) -> tuple[float, float]:
    """The factors of the shared and of a frame's own noise: sqrt(a^2 / (1 + a^2)) and sqrt(1 / (1 + a^2)).

    Their squares add up to 1, so the mixed noise has variance 1. Two frames have the covariance a^2 / (1 + a^2).

    mix: a. 0: each frame has its own noise. Infinity: all frames have the same.
    """
    own = 1 / (1 + mix * mix)
    return math.sqrt(1 - own), math.sqrt(own)


def mixed_noise(own: Tensor, shared: Tensor, mix: float) -> Tensor:
    """PYoCo's mixed noise for clips.

    Args:
        own: noise of each frame, `(b t) c h w`.
        shared: noise of each clip, `b c h w`.
        mix: a, as in mix_weights.
    """
    of_clip, of_frame = mix_weights(mix)
    shared = shared.repeat_interleave(len(own) // len(shared), dim=0)
    return of_clip * shared + of_frame * own if of_clip else own


def free_noise_order(frames: int, length: int, overlap: int, seed: int) -> list[int]:
    """FreeNoise's order of the noise of a clip.

    The first window keeps its noise. Each later window brings new frames. They get the noise of the frames that it
    leaves behind, shuffled. So every static window holds the same noises, each once.

    Where the windows are evenly spaced, this is the published order. Otherwise it follows the windows of Frame Windows,
    whose distances differ by a frame.

    Args:
        frames: frames of the clip.
        length: frames of a window.
        overlap: the least number of frames that neighbouring windows share.
        seed: of the shuffles.
    """
    order = list(range(min(length, frames)))
    generator = torch.Generator().manual_seed(seed)
    for start, following in pairwise(window_starts(frames, length, overlap)):
        left = order[start:following]
        order += [left[place] for place in torch.randperm(len(left), generator=generator).tolist()]
    return order


def repeated_order(frames: int, length: int) -> list[int]:
    """The noise of the first `length` frames again and again."""
    return [frame % length for frame in range(frames)]
