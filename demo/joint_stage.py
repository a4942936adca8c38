"""Joint training on pictures and clips, in small (docs/papers.md#lavie-joint-training): a part of `bench --quality`.

The bundled image model is fine-tuned whole, with LaVie's layers. No clip shows a car of PAINT, and none is at night.
Pictures of all drives show both. One arm sees the clips alone. The other sees as many clips, and pictures beside them.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from ..nodes.host import models as host
from ..temporal.params import StackParams
from ..temporal.layers import RotaryParams
from ..temporal.slots import unet_sites
from ..temporal.spatial_changes import POOLED_NORMS
from ..temporal.stack import TemporalStack
from ..temporal.training.clips import Clips
from ..temporal.training.loop import Loop, LoopParams
from ..temporal.training.temporal import TemporalLoss
from . import bundle, models, world
from .autoencoder import encode
from .text import encode_ids, text_params, token_ids

PAINT = "blue"
CLIPS, PICTURES = 256, 1024             # different clips, and pictures of as many drives
BATCH, IMAGES = 2, 4                    # of a step. The paper has 4 pictures beside 16 frames; here both clips are 16
LOOP = LoopParams(steps=400, lr=8e-4, lr_end=1e-5, warmup=20, ema_decay=0.98, precision="float32", save_every=50,
                  seed=31)
ALONE, JOINT = "clips alone", "clips with pictures"
ARMS = {ALONE: False, JOINT: True}      # whether pictures are seen
ENCODED = 64                            # pictures that are encoded together


def shows_paint(scene: world.Scene) -> bool:
    return any(car.colour == PAINT for car in scene.cars)


def drives(wanted, count, seed_of, first=0) -> list[int]:
    """The first `count` numbers from `first` on whose drives are wanted. seed_of: world.train_seed or held_out_seed."""
    found: list[int] = []
    while len(found) < count:
        if wanted(world.scene(seed_of(first))):
            found.append(first)
        first += 1
    return found


def without_concepts(scene: world.Scene) -> bool:
    return not scene.night and not shows_paint(scene)
