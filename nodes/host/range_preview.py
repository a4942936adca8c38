"""A small video of the frames that a node has read, which the page plays in the node."""

import logging
from fractions import Fraction
from typing import Any

import numpy as np
import torch

from ...temporal.video import preview_video
from . import files
from .pixels import frame_bytes

MOST_FRAMES = 64        # a longer range shows this many of its frames, at a rate at which it lasts as long
COARSE_SIDE = 512       # pixels; rows and columns of frames at least twice as large are left out before reducing


def range_preview(images: torch.Tensor, rate: Fraction) -> dict[str, Any] | None:
    """The entry for a node's `ui`. None if no preview could be written, which the log says; nothing else fails.

    images: IMAGE (t h w c). rate: frames per second.
    """
    shown = np.linspace(0, len(images) - 1, min(len(images), MOST_FRAMES)).round().astype(int)
    step = max(1, max(images.shape[1:3]) // COARSE_SIDE)
    try:
        target = files.temporary_target()
        with preview_video(target.path(".mp4"), rate * len(shown) / len(images)) as player:
            for number in shown:
                player.add(frame_bytes(images[number, ::step, ::step]))
        return {"images": [target.result(".mp4")], "animated": (True,)}
    except Exception as error:      # a full disk, a missing encoder: the frames are read all the same
        logging.warning("[Video LDM] Load Video Frames cannot show its frames in the node: %s", error)
        return None
