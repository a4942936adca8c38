"""The rendered training set and what is derived from it, as files of the work folder `.train/`."""

import json
import multiprocessing
import os
import signal
import sys
from pathlib import Path

import numpy as np
from safetensors.torch import load_file

from . import world
from .models import FPS, FRAMES, HEIGHT, INTERPOLATED_FRAMES, RATES, TRAIN_CLIPS, WIDTH

CAR_WEIGHT = 3.0        # a pixel of a car of NEAR pixels or more counts 1 + this
NEAR = 512              # pixels; smaller cars count more, by the root of how much smaller they are
LARGEST = 6             # the most that CAR_WEIGHT is multiplied by
FEW = 100               # for so few clips it is not worth starting processes


class Files:
    """Names in the work folder."""

    def __init__(self, folder):
        self.folder = Path(folder)
        self.frames = self.folder / "frames.npy"            # uint8 (n t h w 3)
        self.boxes = self.folder / "boxes.npy"              # float32 (n t 3 4), fractions of the picture, 0 if absent
        self.latents = self.folder / "latents.npy"          # float32 (n t c h/8 w/8), scaled to unit deviation
        self.interpolation = self.folder / "interpolation.npy"     # the same of interpolation_clip(0), (1), ...
        self.large, self.large_boxes = self.folder / "large.npy", self.folder / "large-boxes.npy"    # for the upscaler
        self.pvdm_frames, self.pvdm_boxes = self.folder / "pvdm-frames.npy", self.folder / "pvdm-boxes.npy"
        self.pvdm_planes = self.folder / "pvdm-planes.npy"  # float16 (n k c l) of k windows of each video
        self.latent_params = self.folder / "latents.json"
        self.texts = self.folder / "texts.safetensors"      # embeddings of the different captions, and each clip's row

    def weights(self, stage):
        """Averaged weights of a finished stage."""
        return self.folder / f"{stage}.safetensors"


def weights_of(files, stage, name):
    """Averaged weights of one module of a finished stage."""
    weights, prefix = load_file(made(files.weights(stage), stage)), f"{name}."
    return {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}


def made(path, stage):
    """The path of a file that a stage makes. Stop with a sentence where that stage is not done yet."""
    if not path.exists():
        raise SystemExit(f"The stage '{stage}' has not been done yet: python run.py train-demo --stage {stage}")
    return path


def rate_of(index):
    """Frame rate of an interpolation clip. Every second one is for the second step of interpolation."""
    return RATES[index % len(RATES)]


def interpolation_clip(index):
    """Frames of a short clip at a rate that interpolation makes, from a moment somewhere in the training drive."""
    start = (index * 0.6180339887) % 1 * (FRAMES - 1) / FPS
    return world.clip(world.train_seed(index), INTERPOLATED_FRAMES, HEIGHT, WIDTH, rate_of(index), start).frames


def corners_of(clip):
    """Corners (t 3 4) of the cars in each frame, 0 where there are fewer."""
    corners = np.zeros((len(clip.boxes), 3, 4), np.float32)
    for time, found in enumerate(clip.boxes):
        for number, (_, *box) in enumerate(found):
            corners[time, number] = box
    return corners


def render_clips(render, count):
    """Yield render(0), render(1), ... in order. On Linux all cores work on them.

    `render` must be a function of a module, so that other processes find it.
    """
    if sys.platform != "linux" or count < FEW:
        yield from map(render, range(count))
        return
    # A pool ends its processes by SIGTERM, for which run.py has a handler that they inherit.
    with multiprocessing.get_context("fork").Pool(initializer=signal.signal,
                                                  initargs=(signal.SIGTERM, signal.SIG_DFL)) as pool:
        yield from pool.imap(render, range(count), chunksize=8)


def key_frames(index):
    """Frames and corners of a training clip."""
    clip = world.clip(world.train_seed(index), FRAMES, HEIGHT, WIDTH, FPS)
    return clip.frames, corners_of(clip)


def render_training_set(files):
    """Render frames and boxes once; seeds 0..TRAIN_CLIPS-1."""
    render_set(files.frames, files.boxes, key_frames, TRAIN_CLIPS, FRAMES)


def render_set(path, boxes_path, render, count, length):
    """Write the frames and boxes of render(0), render(1), ..., which gives both of `length` frames."""
    if path.exists() and boxes_path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    frames = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.uint8, shape=(count, length, HEIGHT, WIDTH, 3))
    boxes = np.zeros((count, length, 3, 4), np.float32)
    for index, clip in enumerate(render_clips(render, count)):
        frames[index], boxes[index] = clip
    frames.flush()
    del frames
    np.save(boxes_path, boxes)
    os.replace(temporary, path)


def car_weights(boxes, height, width):
    """How much each pixel counts: 1, and 1 + CAR_WEIGHT or more in the boxes (n k 4). float32 (n 1 h w).

    A far car has few pixels. Without more weight an autoencoder leaves it out, and its colour with it.
    """
    columns, rows = (np.arange(width) + 0.5) / width, (np.arange(height) + 0.5) / height
    across = (columns >= boxes[..., 0:1]) & (columns <= boxes[..., 2:3])
    down = (rows >= boxes[..., 1:2]) & (rows <= boxes[..., 3:4])
    area = (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1]) * height * width
    counts = CAR_WEIGHT * np.sqrt(NEAR / np.maximum(area, 1)).clip(1, LARGEST)
    inside = across[:, :, None, :] & down[:, :, :, None]
    return (1 + (counts[..., None, None] * inside).max(axis=1, keepdims=True)).astype(np.float32)


def captions():
    """The caption of every training clip."""
    return [world.caption(world.scene(world.train_seed(index))) for index in range(TRAIN_CLIPS)]


def write_json(path, value):
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(value), encoding="utf-8")
    os.replace(temporary, path)
