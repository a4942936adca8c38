"""Two parts of PVDM's paper in small: `python run.py bench --quality --part pvdm-parts`.

demo/pvdm_small.py trains the networks. Autoencoders are compared by what they restore of held-out clips. The
diffusion networks go on from held-out clips. The one of joint training is given the planes of the clip. The other can
only make another clip. Real clips have gone through the autoencoder as well, so that its errors do not count.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..demo import pvdm_small as small
from ..demo.features import features_of, load_network, to_clips
from ..temporal.metrics import frechet_distance, motion, motion_ratio
from ..temporal.pvdm import Autoencoder, PlaneUNet, SamplerParams, diffusion, sample
from .cascade import SECOND
from .pvdm_quality import moment, to_frames, world_clips
from .reconstruction import psnr

CLIPS, REAL = 128, 512                      # clips of a row, and real ones that they are compared with
FIRST_REAL = 5000                           # number of the first held-out drive of the real ones
STEPS, TOGETHER = 50, 32                    # of the sampler; clips of a batch
HALF = small.FRAMES // 2
NAMES = {small.THREE: "three planes", small.ALONE_XY: "xy alone", small.JOINT: "joint training",
         small.UNCONDITIONAL: "unconditional alone"}


def parts(arguments) -> tuple[str, list[str]]:
    """Both tables, and sentences on what does not hold."""
    sizes = small.QUICK if arguments.quick else small.FULL
    count, real = min(arguments.clips, CLIPS), 2 * arguments.clips if arguments.quick else REAL
    folder = Path(arguments.output) / ("pvdm-parts-quick" if arguments.quick else "pvdm-parts")
    trainings = small.Trainings(folder, sizes)
    clips = films(range(count), 2 * small.FRAMES)
    networks = {arm: trainings.autoencoder(arm) for arm in (small.THREE, small.ALONE_XY)}
    restored = {arm: restore(network, clips[:, :small.FRAMES]) for arm, network in networks.items()}
    first = {arm: (psnr(back, clips[:, :small.FRAMES]), motion_ratio(back, clips[:, :small.FRAMES]))
             for arm, back in restored.items()}
    autoencoder = networks[small.THREE]
    going_on = GoingOn(load_network(arguments.models / "features.safetensors"), autoencoder, clips,
                       films(range(FIRST_REAL, FIRST_REAL + real), 2 * small.FRAMES))
    second = {SECOND: going_on.figures(going_on.starts, going_on.real_following)}
    for arm in (small.JOINT, small.UNCONDITIONAL):
        second[arm] = going_on.row(trainings.unet(arm, autoencoder), arm == small.JOINT)
        print(row_of(arm, second[arm]), file=sys.stderr, flush=True)
    return table(first, second, sizes, count), verdict(first, second)


def films(numbers: range, frames: int) -> np.ndarray:
    """Held-out clips, uint8 (n t h w 3)."""
    return world_clips(numbers, moment, frames, small.FPS, small.HEIGHT, small.WIDTH)


@torch.no_grad()
def restore(autoencoder: Autoencoder, clips: np.ndarray) -> np.ndarray:
    """uint8 clips (n t h w 3), encoded and decoded."""
    return np.concatenate([to_frames(autoencoder(part)) for part in to_clips(clips).split(TOGETHER)])


def enlarged(clips: np.ndarray) -> np.ndarray:
    """Clips with twice the height and width. The video network halves pictures first, so it sees them as they are."""
    return clips.repeat(2, axis=2).repeat(2, axis=3)


class GoingOn:
    """Measures how a network goes on from held-out clips.

    Args:
        network: the video network of the metric.
        autoencoder: of the planes.
        clips: held-out videos of two clips, uint8 (n t h w 3).
        real: others, for the distances.
    """

    def __init__(self, network, autoencoder: Autoencoder, clips: np.ndarray, real: np.ndarray) -> None:
        self.network, self.autoencoder = network, autoencoder
        t = small.FRAMES
        with torch.no_grad():
            self.planes = torch.cat([autoencoder.encode(part) for part in to_clips(clips[:, :t]).split(TOGETHER)])
        self.starts, self.real_following = restore(autoencoder, clips[:, :t]), restore(autoencoder, clips[:, t:])
        halves = restore(autoencoder, real[:, :t]), restore(autoencoder, real[:, t:])
        self.motion = motion(halves[1])
        self.features = {"clip": features_of(network, enlarged(halves[1])),
                         "joint": features_of(network, enlarged(across(*halves)))}

    def row(self, unet: PlaneUNet, given: bool) -> tuple[float, float, float]:
        """The figures of a network. given: whether it is given the planes of the clip before."""
        return self.figures(self.starts, self.following(unet, given))

    @torch.no_grad()
    def following(self, unet: PlaneUNet, given: bool) -> np.ndarray:
        """A clip behind each start clip, uint8 (n t h w 3). The same noise for every network."""
        generator, made = torch.Generator().manual_seed(7), []

        def network(x: Tensor, tau: Tensor, cond: Tensor | None) -> Tensor:
            return unet(x, tau, small.PARAMS.shape, cond)
        for before in self.planes.split(TOGETHER):
            noise = torch.randn(before.shape, generator=generator)
            planes = sample(network, noise, before if given else None, SamplerParams(STEPS),
                            diffusion(unet.params.prediction), generator)
            made.append(to_frames(self.autoencoder.decode(planes)))
        return np.concatenate(made)

    def figures(self, starts: np.ndarray, following: np.ndarray) -> tuple[float, float, float]:
        """Distance of the following clips, distance across the joint, and motion at the joint as a ratio to real."""
        clip, joint = (frechet_distance(features_of(self.network, enlarged(clips)), self.features[kind])
                       for kind, clips in (("clip", following), ("joint", across(starts, following))))
        jump = motion(np.stack([starts[:, -1], following[:, 0]], axis=1))
        return clip, joint, jump / self.motion


def across(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Clips of the last half of one clip and the first half of the next, uint8 (n t h w 3)."""
    return np.concatenate([first[:, -HALF:], second[:, :HALF]], axis=1)


def table(first: dict[str, tuple], second: dict[str, tuple], sizes: small.Sizes, count: int) -> str:
    lines = [f"PVDM in small, {small.WIDTH}x{small.HEIGHT}, clips of {small.FRAMES} frames at {small.FPS:g} a second; "
             f"{count} held-out clips a row.", "", f"Autoencoders, {sizes.steps} steps of {sizes.batch} clips:", "",
             "| planes | PSNR | motion, ratio to real |", "|---|---|---|"]
    lines += [f"| {NAMES[arm]} | {decibels:.2f} dB | {ratio:.2f} |" for arm, (decibels, ratio) in first.items()]
    lines += ["", f"Diffusion of the three planes, {sizes.diffusion_steps} steps of {sizes.diffusion_batch} clips; "
              f"clips that go on from real ones, {STEPS} steps:", "",
              "| training | distance of the following clips | distance across the joint | motion at the joint, ratio "
              "to real |", "|---|---|---|---|"]
    return "\n".join(lines + [row_of(arm, figures) for arm, figures in second.items()]) + "\n"


def row_of(arm: str, figures: tuple) -> str:
    distance, joint, jump = figures
    return f"| {NAMES.get(arm, arm)} | {distance:.1f} | {joint:.1f} | {jump:.2f} |"


def verdict(first: dict[str, tuple], second: dict[str, tuple]) -> list[str]:
    """Sentences on what does not hold: three planes restore more, and only joint training goes on from a clip."""
    (three, _), (alone, _), failures = first[small.THREE], first[small.ALONE_XY], []
    if three <= alone:
        failures.append(f"FAILED: three planes ({three:.2f} dB) do not restore more than xy alone ({alone:.2f} dB).")
    for column, what in ((1, "distance across the joint"), (2, "motion at the joint")):
        joint, other = second[small.JOINT][column], second[small.UNCONDITIONAL][column]
        if joint >= other:
            failures.append(f"FAILED: the {what} of joint training ({joint:.2f}) is not below that of unconditional "
                            f"training alone ({other:.2f}).")
    return failures
