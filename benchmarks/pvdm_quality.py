"""The quality of the demo's PVDM: `python run.py bench --quality --part pvdm`.

Videos of CLIPS clips are sampled from nothing, each clip from the planes of the one before it. The first and the last
clips of them are measured against real clips of held-out drives. Real drives change with time: cars leave. So the last
clips are compared with what real drives show so much later. A video that wears out is further from these than the
first clips are from theirs.

The features and the other columns are those of the key-frame table (quality.py). They are made for 8 frames at 4 frames
a second, so every second frame of a clip counts.
"""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..demo import models, pvdm, pvdm_stages, world
from ..demo.features import features_of, load_network, to_clips
from ..temporal.errors import VideoLDMError
from ..temporal.metrics import frechet_distance, motion, motion_ratio
from ..temporal.pvdm import Autoencoder, PlaneUNet, SamplerParams, diffusion, roll_out
from . import colours, longer
from .cascade import FROZEN, SECOND, SHUFFLED, THROUGH, Cascade, shuffled
from .reconstruction import psnr

REAL, ROLLOUTS, CLIPS = 512, 48, 8          # reference drives; sampled videos, and the clips of each
TOGETHER = 8                                # videos that are sampled in one batch
STEPS, FOLLOWING = 50, 20                   # of the sampler: for a first clip, and for those that follow
QUICK = 8                                   # steps of both with --quick
STRIDE = int(pvdm.FPS / models.FPS)         # of the frames that are measured
SECONDS = pvdm.AUTOENCODER.frames / pvdm.FPS            # of a clip
LATER = (CLIPS - 1) * SECONDS               # from the beginning of a video to its last clip
SHEET_VIDEOS = 6                            # in the picture
MOST = 2.0                                  # times the first clips' distance that the last clips' may be
FIRST, LAST = "**PVDM, first clip**", f"**PVDM, clip {CLIPS}**"
CASCADE, EXTENDED = "Video LDM demo, extended, first clip", f"Video LDM demo, extended, clip {CLIPS}"
HEAD = ["| clips | at their moment | at the beginning | motion | cars that keep their colour | cars a clip |",
        "|---|---|---|---|---|---|"]


class Figures(NamedTuple):
    """A row of the table."""

    distance: float             # to real clips of the same moment of a drive
    from_first: float           # to real clips of the beginning
    motion: float               # as a ratio to that of the real clips of the same moment
    kept: float                 # share of cars that keep their colour
    cars: float                 # cars a clip


# The model

class Model:
    """The demo's PVDM."""

    def __init__(self, autoencoder: Autoencoder, unet: PlaneUNet) -> None:
        self.autoencoder, self.unet = autoencoder, unet

    @classmethod
    def load(cls, folder: Path) -> "Model":
        """The two files of a folder of demo models, in float32."""
        return cls(*(pvdm_stages.load(stage, folder) for stage in pvdm_stages.TRAINED))

    @torch.no_grad()
    def through(self, clips: np.ndarray) -> np.ndarray:
        """uint8 clips (n t h w 3), encoded and decoded."""
        return np.concatenate([to_frames(self.autoencoder(to_clips(clips[first:first + TOGETHER])))
                               for first in range(0, len(clips), TOGETHER)])

    @torch.no_grad()
    def videos(self, numbers: range, clips: int, steps: tuple[int, int]) -> np.ndarray:
        """A video for each number, which is its seed: uint8 (n clips t h w 3).

        steps: of the first clip, and of each of the others.
        """
        parts = []
        for first in range(0, len(numbers), TOGETHER):
            planes = self.planes(numbers[first:first + TOGETHER], clips, steps)
            parts.append(np.stack([to_frames(self.autoencoder.decode(clip)) for clip in planes], axis=1))
            print(f"  {first + len(parts[-1])} of {len(numbers)} videos", end="\r", file=sys.stderr)
        return np.concatenate(parts)

    def planes(self, numbers: range, clips: int, steps: tuple[int, int], before: Tensor | None = None) \
            -> Iterator[Tensor]:
        """Planes of one clip of all videos after another."""
        size = len(numbers), self.unet.params.channels, self.autoencoder.params.shape.length

        def generator(clip: int, use: int = 1) -> torch.Generator:
            return torch.Generator().manual_seed(1_000_000 * clip + 2 * numbers[0] + use)

        def network(x: Tensor, tau: Tensor, cond: Tensor | None) -> Tensor:
            return self.unet(x, tau, self.autoencoder.params.shape, cond)
        first, following = map(SamplerParams, steps)
        return roll_out(clips, first, following, network,
                        lambda clip: torch.randn(size, generator=generator(clip, 0)),
                        diffusion(self.unet.params.prediction), generator, before)


def to_frames(clips: Tensor) -> np.ndarray:
    """uint8 clips (n t h w 3) of clips in -1..1, (n 3 t h w)."""
    return ((clips.clamp(-1, 1) + 1) * 127.5 + 0.5).to(torch.uint8).movedim(1, -1).numpy()


# Real clips

def moment(number: int) -> float:
    """Where in its drive a real clip begins, in seconds: as the clips begin that the PVDM was trained on."""
    return pvdm.start(number) + pvdm.STORED[number % len(pvdm.STORED)] / pvdm.FPS


def world_clips(numbers: range, begin: Callable[[int], float], frames: int, fps: float, height: int = models.HEIGHT,
                width: int = models.WIDTH) -> np.ndarray:
    """Clips of held-out drives, uint8 (n t h w 3).

    Args:
        numbers: of the drives.
        begin: where in its drive the clip of a number begins, in seconds.
        frames, fps, height, width: of a clip.
    """
    return np.stack([world.clip(world.held_out_seed(number), frames, height, width, fps, begin(number)).frames
                     for number in numbers])


def real_clips(numbers: range, later: float = 0.0, begin: Callable[[int], float] = moment) -> np.ndarray:
    """The same for the metric, `later` seconds after begin(number)."""
    return world_clips(numbers, lambda number: begin(number) + later, models.FRAMES, models.FPS)


# What is measured

class Measure:
    """Figures of clips against real ones. begin: where in its drive the clip of a number begins."""

    def __init__(self, network, begin=moment, real: int = REAL) -> None:
        self.network = network
        self.real = {later: real_clips(range(real), later, begin=begin) for later in (0.0, LATER)}
        self.features = {later: features_of(network, clips) for later, clips in self.real.items()}

    def row(self, clips: np.ndarray, later: float = 0.0) -> Figures:
        """The figures of uint8 clips (n t h w 3), 8 frames at 4 a second, `later` seconds into their videos."""
        features = features_of(self.network, clips)
        return Figures(frechet_distance(features, self.features[later]), frechet_distance(features, self.features[0.0]),
                       motion_ratio(clips, self.real[later]), *colours.figures_of(clips))


def quality(arguments) -> tuple[str, list[str]]:
    """The table, and sentences on what does not hold."""
    try:
        model = Model.load(arguments.models)
    except VideoLDMError as error:
        return "", [f"FAILED: PVDM was not measured: {error}"]
    network = load_network(arguments.models / "features.safetensors")
    count, steps = min(arguments.clips, ROLLOUTS), (QUICK, QUICK) if arguments.quick else (STEPS, FOLLOWING)
    numbers, rows = range(REAL, REAL + count), {}
    measure = Measure(network, real=2 * count if arguments.quick else REAL)

    def add(name: str, figures: Figures) -> None:
        rows[name] = figures
        print(row_of(name, figures), file=sys.stderr, flush=True)

    length = pvdm.AUTOENCODER.frames
    full, second = world_clips(numbers, moment, length, pvdm.FPS), real_clips(numbers)
    back = model.through(full)
    add(SECOND, measure.row(second))
    add(f"{SECOND}, {LATER:g} s later", measure.row(real_clips(numbers, LATER), LATER))
    add(SHUFFLED, measure.row(shuffled(second)))
    add(FROZEN, measure.row(np.repeat(second[:, :1], second.shape[1], axis=1)))
    add(THROUGH, measure.row(back[:, ::STRIDE]))
    videos = model.videos(numbers, CLIPS, steps)
    contact_sheet(videos).save(Path(arguments.output) / "pvdm.png")
    add(FIRST, measure.row(videos[:, 0, ::STRIDE]))
    add(LAST, measure.row(videos[:, -1, ::STRIDE], LATER))
    for name, figures in cascade_rows(arguments, network, numbers).items():
        add(name, figures)
    restored = (psnr(back, full), frechet_distance(features_of(network, back[:, ::STRIDE]),
                                                   features_of(network, full[:, ::STRIDE])))
    return table(rows, count, steps, restored, joint_ratio(videos, motion(full))), verdict(rows)


def cascade_rows(arguments, network, numbers: range) -> dict[str, Figures]:
    """The Video LDM demo extended from the first frames of drives to the same time, as in longer.py."""
    cascade = Cascade(arguments.models, arguments.train, QUICK if arguments.quick else longer.STEPS, longer.CFG)
    numbers = numbers[:longer.ROLLOUTS]
    starts = cascade.encode(real_clips(numbers, begin=at_zero)[:, 0])
    length = models.FRAMES * CLIPS
    latents = torch.from_numpy(cascade.rollouts(cascade.bundled(), starts, numbers, length, 1.0))
    measure = Measure(network, at_zero, len(numbers) * 2 if arguments.quick else REAL)
    first, last = (cascade.decode(part.flatten(0, 1)).reshape(len(numbers), models.FRAMES, *measure.real[0.0].shape[2:])
                   for part in (latents[:, :models.FRAMES], latents[:, -models.FRAMES:]))
    floor = measure.row(real_clips(numbers, begin=at_zero))
    return {f"{SECOND}, {len(numbers)} at 0 s": floor, CASCADE: measure.row(first),
            EXTENDED: measure.row(last, LATER)}


def at_zero(number: int) -> float:
    """The Video LDM demo's clips begin with their drive."""
    return 0.0


def joint_ratio(videos: np.ndarray, real_motion: float) -> float:
    """The motion from the last frame of a clip to the first of the next one, as a ratio to real motion.

    videos: uint8 (n clips t h w 3). real_motion: that of neighbouring frames of real clips at the same rate.
    """
    pairs = np.stack([videos[:, :-1, -1], videos[:, 1:, 0]], axis=2)
    return motion(pairs.reshape(-1, 2, *videos.shape[3:])) / real_motion


# What is shown

def table(rows: dict[str, Figures], count: int, steps: tuple[int, int], restored: tuple[float, float],
          joint: float) -> str:
    lines = [f"PVDM: {count} videos of {CLIPS} clips, sampled from nothing; DDIM with eta 1, {steps[0]} steps for the "
             f"first clip and {steps[1]} for each of the others.",
             "The distances are to real held-out clips of the same moment of a drive, and of its beginning.", "", *HEAD]
    lines += [row_of(name, figures) for name, figures in rows.items()]
    lines += ["", f"Encoded and decoded, {count} real clips: PSNR {restored[0]:.2f} dB, Frechet distance to the clips "
                  f"themselves {restored[1]:.3f}.",
              f"From the last frame of a PVDM clip to the first of the next one the motion is {joint:.2f} times that "
              "of neighbouring real frames."]
    return "\n".join(lines) + "\n"


def row_of(name: str, figures: Figures) -> str:
    kept = "-" if np.isnan(figures.kept) else f"{figures.kept:.0%}"
    return (f"| {name} | {figures.distance:.1f} | {figures.from_first:.1f} | {figures.motion:.2f} | {kept} | "
            f"{figures.cars:.2f} |")


def contact_sheet(videos: np.ndarray) -> Image.Image:
    """The first and the last clip of some videos, every second frame, one clip a row."""
    strips = [np.concatenate(list(clip[::STRIDE]), axis=1) for video in videos[:SHEET_VIDEOS]
              for clip in (video[0], video[-1])]
    return Image.fromarray(np.concatenate(strips, axis=0))


def verdict(rows: dict[str, Figures]) -> list[str]:
    """Sentences on what does not hold: the last clips are at most twice as far from real ones as the first are."""
    first, last, failures = rows[FIRST].distance, rows[LAST].distance, []
    if not last <= MOST * first:
        failures.append(f"FAILED: the distance of clip {CLIPS} ({last:.1f}) is more than {MOST:g} times that of the "
                        f"first clip ({first:.1f}).")
    if not first < rows[SHUFFLED].distance:
        failures.append(f"FAILED: the first clip ({first:.1f}) is not below {SHUFFLED} "
                        f"({rows[SHUFFLED].distance:.1f}).")
    return failures
