"""The demo's PVDM: a small triplane autoencoder and a small diffusion of its planes, of the driving world.

Its videos are two clips of 16 frames at 8 frames a second, from anywhere in the first 18 seconds of a drive.
"""

import numpy as np
import torch

from ..temporal.pvdm import Autoencoder, AutoencoderParams, UNetParams
from ..temporal.training.planes import PlaneAutoencoderLoss, PlaneAutoencoderTerms, WeightedClips
from . import models, world
from .autoencoder import reconstruction_error, to_model
from .data import car_weights, corners_of

FPS, CLIPS, LATEST = 8.0, 3000, 14.0        # LATEST: the last start of a video, seconds
AUTOENCODER = AutoencoderParams(frames=16, height=models.HEIGHT, width=models.WIDTH, patch=8, channels=128,
                                plane_channels=8, depth=2, heads=4, head_width=32, plane_depth=1, plane_heads=4,
                                plane_head_width=16, plane_hidden=256)
UNET = UNetParams(channels=8, model_channels=64, channel_mult=(1, 1, 2), num_res_blocks=1, attention_levels=(1, 2),
                  heads=2, row=AUTOENCODER.shape.length, prediction="v")     # narrower heads take longer on a CPU
TERMS = PlaneAutoencoderTerms(pixels=1.0, perceptual=0.0, adversarial=0.0, features=0.0)
STORED = (0, 16)                            # starts of the windows whose planes are stored


def start(index: int) -> float:
    """Where in its drive a video begins, seconds."""
    return (index * 0.6180339887) % 1 * LATEST


def video(index: int) -> tuple[np.ndarray, np.ndarray]:
    """Frames and corners of the cars of a training video."""
    clip = world.clip(world.train_seed(index), 2 * AUTOENCODER.frames, models.HEIGHT, models.WIDTH, FPS, start(index))
    return clip.frames, corners_of(clip)


class DrivingVideos:
    """`clips(step)` of a PlaneAutoencoderLoss: windows of the rendered videos. Cars count more.

    frames: uint8 (n t h w 3). boxes: those of the cars, (n t k 4).
    """

    def __init__(self, frames, boxes, batch: int):
        self.frames, self.boxes, self.batch = frames, boxes, batch

    def __call__(self, step) -> WeightedClips:
        drawn = [self.draw(step.generator) for _ in range(step.share(self.batch))]
        frames, weights = (torch.stack(part) for part in zip(*drawn))
        return WeightedClips(frames.to(step.device), weights.to(step.device))

    def draw(self, generator):
        length = AUTOENCODER.frames
        index = int(torch.randint(0, len(self.frames), (), generator=generator))
        start = int(torch.randint(0, self.frames.shape[1] - length + 1, (), generator=generator))
        window = slice(start, start + length)
        weights = car_weights(self.boxes[index, window], models.HEIGHT, models.WIDTH)
        return to_model(torch.from_numpy(np.array(self.frames[index, window]))), torch.from_numpy(weights)


def autoencoder_loss(network: Autoencoder, frames, boxes, batch: int) -> PlaneAutoencoderLoss:
    """The training of the autoencoder by its reconstruction alone."""
    return PlaneAutoencoderLoss(network, DrivingVideos(frames, boxes, batch), TERMS,
                                reconstruction=reconstruction_error)
