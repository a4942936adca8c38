"""Two parts of PVDM's paper in small: a part of `bench --quality` (docs/papers.md#pvdm).

Everything is a quarter of the demo's PVDM in size and is trained for minutes. Two autoencoders learn for equal steps:
one with three planes, one that keeps only the plane xy. Two diffusion networks of the three planes learn for equal
steps: one that knows the clip before in some clips, as published, and one that never does.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..temporal.atomic import write_atomically
from ..temporal.pvdm import Autoencoder, AutoencoderParams, PlaneUNet, UNetParams, diffusion, join
from ..temporal.training.loop import Loop, LoopParams
from ..temporal.training.planes import (
    PlaneAutoencoderLoss,
    PlaneAutoencoderTerms,
    PlaneDiffusionLoss,
    StoredPlanes,
    WeightedClips,
    encode,
)
from . import models, pvdm, world
from .data import render_clips
from .features import to_clips

HEIGHT, WIDTH, FRAMES, FPS = 32, 64, 8, models.FPS
ENCODED = 16                                # videos that are encoded together
STARTS = (0, FRAMES // 2, FRAMES)           # of the windows of a video whose planes are stored
PARAMS = AutoencoderParams(frames=FRAMES, height=HEIGHT, width=WIDTH, patch=8, channels=64, plane_channels=8, depth=1,
                           heads=4, head_width=16, plane_depth=1, plane_heads=4, plane_head_width=16, plane_hidden=128)
UNET = UNetParams(channels=PARAMS.plane_channels, model_channels=32, channel_mult=(1, 2), num_res_blocks=1,
                  attention_levels=(1,), heads=4, row=PARAMS.shape.length, prediction="v")
TERMS = PlaneAutoencoderTerms(pixels=1.0, perceptual=0.0, adversarial=0.0, features=0.0)
THREE, ALONE_XY = "three-planes", "xy-alone"
JOINT, UNCONDITIONAL = "joint", "unconditional-alone"
KNOWN = {JOINT: 0.3, UNCONDITIONAL: 0.0}    # the share of clips that know the clip before; 0.3 is published


@dataclass(frozen=True)
class Sizes:
    """How long everything is trained, and on how much."""

    videos: int             # rendered videos of two clips
    steps: int              # of an autoencoder
    diffusion_steps: int    # of a diffusion network
    batch: int = 4          # clips of a step of an autoencoder
    diffusion_batch: int = 8


FULL, QUICK = Sizes(1000, 800, 2000), Sizes(8, 2, 2)


class OnePlane(Autoencoder):
    """An autoencoder of the same size that keeps the plane xy alone: yt and xt are zeros."""

    def encode(self, x: Tensor) -> Tensor:
        xy, yt, xt = self.shape_of(x).split(super().encode(x))
        return join([xy, torch.zeros_like(yt), torch.zeros_like(xt)])


def film(index: int) -> np.ndarray:
    """The frames of a training video of two clips."""
    return world.clip(world.train_seed(index), 2 * FRAMES, HEIGHT, WIDTH, FPS, pvdm.start(index)).frames


class Windows:
    """`clips(step)` of a PlaneAutoencoderLoss: windows of uint8 videos (n t h w 3)."""

    def __init__(self, frames: np.ndarray, batch: int) -> None:
        self.frames, self.batch = frames, batch

    def __call__(self, step) -> WeightedClips:
        count = step.share(self.batch)
        videos = torch.randint(0, len(self.frames), (count,), generator=step.generator).tolist()
        starts = torch.randint(0, FRAMES + 1, (count,), generator=step.generator).tolist()
        clips = np.stack([self.frames[video, start:start + FRAMES] for video, start in zip(videos, starts)])
        return WeightedClips(to_clips(clips).transpose(1, 2).to(step.device))


class Trainings:
    """The four trainings. What is finished is kept in the folder, and what was interrupted goes on."""

    def __init__(self, folder: Path, sizes: Sizes) -> None:
        self.folder, self.sizes = folder, sizes
        folder.mkdir(parents=True, exist_ok=True)

    def frames(self) -> np.ndarray:
        """The training videos, uint8 (n t h w 3)."""
        return np.stack(list(render_clips(film, self.sizes.videos)))

    def autoencoder(self, arm: str) -> Autoencoder:
        """A trained autoencoder: THREE or ALONE_XY."""
        loop = LoopParams(steps=self.sizes.steps, lr=2e-3, lr_end=1e-4, warmup=50, betas=(0.9, 0.99), ema_decay=0.98,
                          precision="float32", save_every=50, seed=51, device="cpu")

        def loss(network: Autoencoder) -> PlaneAutoencoderLoss:
            return PlaneAutoencoderLoss(network, Windows(self.frames(), self.sizes.batch), TERMS)
        return self.trained(arm, loop, lambda: (Autoencoder if arm == THREE else OnePlane)(PARAMS), loss)

    def unet(self, arm: str, autoencoder: Autoencoder) -> PlaneUNet:
        """A trained diffusion network of this autoencoder's planes: JOINT or UNCONDITIONAL."""
        loop = LoopParams(steps=self.sizes.diffusion_steps, lr=2e-3, lr_end=2e-5, warmup=50, ema_decay=0.99,
                          precision="float32", save_every=100, seed=52, device="cpu")

        def loss(network: PlaneUNet) -> PlaneDiffusionLoss:
            source = StoredPlanes(self.planes(autoencoder), apart=STARTS.index(FRAMES))
            return PlaneDiffusionLoss(network, source, PARAMS.shape, diffusion(UNET.prediction),
                                      self.sizes.diffusion_batch, KNOWN[arm])
        return self.trained(arm, loop, lambda: PlaneUNet(UNET), loss)

    def planes(self, autoencoder: Autoencoder) -> Tensor:
        """Planes (n k c l) of the windows STARTS of the training videos."""
        videos = to_clips(self.frames()).transpose(1, 2)
        return torch.stack([torch.cat([encode(autoencoder, part[:, start:start + FRAMES])
                                       for part in videos.split(ENCODED)]) for start in STARTS], dim=1)

    def trained(self, arm: str, params: LoopParams, build: Callable[[], nn.Module], loss_of: Callable) -> nn.Module:
        """A network with its averaged weights, trained now if need be.

        Args:
            arm: its name.
            params: of its training.
            build: makes it. Arms of one kind begin with the same weights.
            loss_of: its loss.
        """
        path = self.folder / f"{arm}.safetensors"
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(params.seed)
            network = build()
        if not path.exists():
            loss = loss_of(network)
            loop = Loop(params, {"network": network}, loss, self.folder / arm, arm)
            loop.run()
            weights = {name: tensor.contiguous() for name, tensor in loop.ema_state("network").items()}
            write_atomically(path, lambda temporary: save_file(weights, temporary))
        network.load_state_dict(load_file(path))
        return network.requires_grad_(False).eval()
