"""A small video network, trained to tell the labels of a clip of the driving world and whether its frames are in order.

Its features give the Frechet distance of the quality figures. They belong to this world: the distance is not FVD, whose
network knows human actions. The network has to measure motion, because it is asked for speeds and the bend. It is asked
for the order of frames too, because otherwise it hardly sees a wrong order (docs/training.md).
"""

from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from torch.nn.functional import avg_pool3d, binary_cross_entropy_with_logits, mse_loss

from ..temporal.errors import VideoLDMError
from . import world

WIDTH = 64                              # of the features
LANES = (-1, 0, 1)


class Block(nn.Module):
    """3-D convolution, norm, SiLU."""

    def __init__(self, channels, out, kernel, stride):
        super().__init__()
        self.conv = nn.Conv3d(channels, out, kernel, stride, padding=tuple(k // 2 for k in kernel), bias=False)
        self.norm = nn.GroupNorm(8, out)

    def forward(self, x):
        return nn.functional.silu(self.norm(self.conv(x)))


class VideoNetwork(nn.Module):
    """Clips -1..1 (b 3 t h w) -> features (b 64) -> answers. Pictures are halved first: fine detail does not count."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            Block(3, 24, (3, 5, 5), (1, 2, 2)), Block(24, 48, (3, 3, 3), (1, 2, 2)),
            Block(48, 64, (3, 3, 3), (1, 1, 1)), Block(64, 64, (3, 3, 3), (1, 2, 2)),
            Block(64, 64, (3, 3, 3), (2, 1, 1)))
        self.project = nn.Sequential(nn.Linear(2 * 64, 128), nn.SiLU(), nn.Linear(128, WIDTH))
        self.head = nn.Sequential(nn.SiLU(), nn.Linear(WIDTH, QUESTIONS + NUMBERS + 1))

    def features(self, clips):
        x = self.body(avg_pool3d(clips, (1, 2, 2))).float()
        return self.project(torch.cat([x.mean((2, 3, 4)), x.amax((2, 3, 4))], dim=1))

    def forward(self, clips):
        return self.head(self.features(clips))


def answers(scene):
    """The labels of a clip: yes/no questions, numbers, and a mask of the numbers, since an empty lane has no speed."""
    cars = {car.lane: car for car in scene.cars}
    labels = world.labels(scene)
    questions = [labels["night"], *(lane in cars for lane in LANES)]
    questions += [colour in labels["colours"] for colour in world.COLOURS]
    numbers = [scene.speed / 5 - 2, scene.curvature * 80]
    numbers += [(cars[lane].speed - scene.speed) / 6 if lane in cars else 0.0 for lane in LANES]
    numbers += [cars[lane].start / 15 - 1 if lane in cars else 0.0 for lane in LANES]
    mask = [1.0, 1.0] + 2 * [float(lane in cars) for lane in LANES]
    return questions, numbers, mask


QUESTIONS, NUMBERS = (len(part) for part in answers(world.scene(0))[:2])


def to_clips(frames):
    """uint8 frames (b t h w 3) as -1..1, (b 3 t h w)."""
    return torch.as_tensor(frames).permute(0, 4, 1, 2, 3).contiguous().float() / 127.5 - 1


def reordered(clips, generator):
    """Each clip (b 3 t h w) with its frames in another order, never the original one."""
    frames = clips.shape[2]
    orders = torch.stack([torch.randperm(frames, generator=generator) for _ in clips])
    same = (orders == torch.arange(frames)).all(dim=1)
    orders[same] = torch.arange(frames).roll(1)
    return torch.stack([clip[:, order] for clip, order in zip(clips, orders.to(clips.device))])


class FeatureLoss:
    """`loss(step)` for the Loop. frames: uint8 (n t h w 3) of training seeds 0..n-1.

    Labels are asked for clips in order only. The order is asked for each clip and for a copy with reordered frames.
    """

    def __init__(self, network, frames, batch):
        self.network, self.frames, self.batch = network, frames, batch

    def __call__(self, step):
        chosen = torch.randint(0, len(self.frames), (step.share(self.batch),), generator=step.generator).tolist()
        clips = to_clips(np.stack([self.frames[index] for index in chosen])).to(step.device)
        labels = [answers(world.scene(world.train_seed(index))) for index in chosen]
        questions, numbers, mask = (torch.tensor(part, dtype=torch.float32, device=step.device)
                                    for part in zip(*labels))
        both = self.network(torch.cat([clips, reordered(clips, step.generator)])).float()
        out, disorder = both[:len(clips), :-1], both[:, -1]
        mixed = (torch.arange(len(both), device=step.device) >= len(clips)).float()
        order = binary_cross_entropy_with_logits(disorder, mixed)
        asked = binary_cross_entropy_with_logits(out[:, :QUESTIONS], questions)
        measured = mse_loss(out[:, QUESTIONS:] * mask, numbers * mask)
        right = ((out[:, :QUESTIONS] > 0) == (questions > 0.5)).float().mean()
        told_order = ((disorder > 0) == (mixed > 0.5)).float().mean()
        return {"loss": asked + measured + order, "right": right, "squared_error": measured.detach(),
                "order_right": told_order}


@torch.no_grad()
def features_of(network, frames, batch=16):
    """Features (n 64), float64 numpy, of uint8 clips (n t h w 3)."""
    parts = [network.features(to_clips(frames[start:start + batch])) for start in range(0, len(frames), batch)]
    return torch.cat(parts).double().numpy()


def load_network(path):
    """The bundled network, in float32."""
    if not Path(path).is_file():
        raise VideoLDMError(f"There is no '{path}'. Install the pack again, or train it with: python run.py train-demo")
    network = VideoNetwork()
    try:
        network.load_state_dict({key: tensor.float() for key, tensor in load_file(path).items()})
    except (SafetensorError, RuntimeError, OSError) as error:
        raise VideoLDMError(f"'{path}' is not the demo's video network, or damaged ({error}).") from error
    return network.requires_grad_(False).eval()
