"""The demo's scene layouts: boxes, colours and labels of the rendered frames."""

import numpy as np
import torch

from ..nodes.host.layout_conditioning import call_unet
from ..temporal.formats import scene_layout_file as layout_format
from ..temporal.formats.temporal_file import Base
from ..temporal.scene_layout import Layout, LayoutParams, SceneLayout, concatenate_layouts
from ..temporal.training.scene_layout_loss import LayoutLoss, Scenes
from . import models, world

LABELS = (("light", ("day", "night")), ("crowdedness", ("empty", "quiet", "busy")))
MOST_CARS = 3       # that the world draws
# The transformer blocks of models.UNET on its two finest levels. On the coarsest, a pixel is as large as a car.
SITES = ((0, 64), (1, 128), (6, 128), (7, 128), (8, 64), (9, 64))


def params(unet) -> LayoutParams:
    """For models.UNET, or for one with other channels and as many levels."""
    narrow, wide = (unet.model_channels * mult for mult in unet.channel_mult[:2])
    return LayoutParams(colours=tuple(world.COLOURS), labels=LABELS, width=48, heads=4, layers=2, frequencies=5,
                        sites=tuple((site, narrow if channels == 64 else wide) for site, channels in SITES))


def layout_of(drive, times) -> Layout:
    """What a drive shows at these times, one scene for each."""
    count = len(times)
    boxes, colours = np.zeros((count, MOST_CARS, 4), np.float32), np.zeros((count, MOST_CARS), np.int64)
    present = np.zeros((count, MOST_CARS), bool)
    names = list(world.COLOURS)
    for scene, time in enumerate(times):
        for car, (colour, *corners) in enumerate(world.boxes(drive, time, models.HEIGHT, models.WIDTH)):
            boxes[scene, car], colours[scene, car], present[scene, car] = corners, names.index(colour), True
    said = world.labels(drive)
    labels = torch.tensor([[1 + said["night"], 1 + said["crowdedness"]]]).expand(count, -1)
    return Layout(torch.from_numpy(boxes), torch.from_numpy(colours), torch.from_numpy(present),
                  torch.ones(count, dtype=torch.bool), labels)


class Frames:
    """Draws frames of the training drives with their layouts and texts. Call it with a StepContext."""

    def __init__(self, latents, batch, embeddings, rows):
        """latents (n t c h w) are of training seeds 0..n-1. embeddings (k l d) and rows give each clip its text."""
        self.latents, self.batch, self.embeddings, self.rows = latents, batch, embeddings, rows

    def __call__(self, step) -> Scenes:
        clips, frames = (torch.randint(0, count, (step.share(self.batch),), generator=step.generator).tolist()
                         for count in self.latents.shape[:2])
        x = torch.stack([torch.from_numpy(np.array(self.latents[clip, frame])) for clip, frame in zip(clips, frames)])
        layouts = [layout_of(world.scene(world.train_seed(clip)), [frame / models.FPS])
                   for clip, frame in zip(clips, frames)]
        layout = concatenate_layouts(layouts)
        context = torch.stack([self.embeddings[self.rows[clip]] for clip in clips])
        return Scenes(x.to(step.device), layout.to(step.device), context.to(step.device))


def loss(unet, scene: SceneLayout, diffusion, latents, texts) -> LayoutLoss:
    frames = Frames(latents, models.stage("layout").batch, texts["embeddings"], texts["rows"].tolist())
    return LayoutLoss(unet, scene, call_unet, diffusion, frames, texts["null"], models.DROPOUT)


def write(path, weights, null_text, notes) -> int:
    """Write the trained network in fp16; the file's size in bytes."""
    half = {key: tensor.to(torch.float16) for key, tensor in weights.items()}
    base = Base("Video LDM demo", models.UNET.context_dim)
    layout_format.write(path, half, params(models.UNET), null_text, base=base, licence=models.LICENCE,
                        metadata={**notes, "most_boxes": str(MOST_CARS)})
    return path.stat().st_size
