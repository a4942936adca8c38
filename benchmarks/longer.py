"""The quality of extended and of interpolated video: parts of `bench --quality`.

Extension: held-out drives are continued from their first frame, clip after clip. The figures are Frechet distance and
motion of the last 16 frames at several lengths. Interpolation: PSNR against the true frames inside the cars' boxes. The
second temporal difference at key frames, against that elsewhere, shows seams.
"""

import sys

import numpy as np
import torch

from ..demo import bundle, models, world
from ..demo.features import features_of, load_network
from ..nodes.host import sampling
from ..nodes.interpolate import InterpolationPass, interpolate
from ..temporal.metrics import frechet_distance, motion_ratio
from ..temporal.rollout import interpolated_length
from ..temporal.training.plot import plot_curves
from .cascade import Cascade, real_clips

REAL = 512                                  # reference clips
ROLLOUTS, LENGTHS, TAIL = 16, (16, 64, 256), 16
STEPS, CFG = 20, 1.0                        # of each clip, key frames and those between
GUIDANCES = (1.0, 2.0)
CLIPS, KEYS = 24, 8                         # of interpolation
OURS, LATENT, PIXEL, REPEAT = "Latent Interpolate x4", "latent blending", "pixel blending", "key frames repeated"


# Extension

def extension(arguments):
    """The table of extended video, and sentences on what does not hold. The plot goes to the output folder."""
    cascade = Cascade(arguments.models, arguments.train, STEPS, CFG)
    network, reference = load_network(arguments.models / "features.safetensors"), real_clips(range(REAL))
    real_features, model = features_of(network, reference), cascade.bundled()
    numbers = range(REAL, REAL + min(arguments.clips, ROLLOUTS))
    starts = cascade.encode(np.stack([real[0] for real in real_clips(numbers)]))
    rows, failures = [], []
    for guidance in GUIDANCES:
        latents = cascade.rollouts(model, starts, numbers, max(LENGTHS), guidance)
        for length in LENGTHS:
            clips = tail(cascade, latents[:, length - TAIL:length])
            distance = frechet_distance(features_of(network, clips), real_features)
            rows.append((guidance, length, distance, motion_ratio(clips, reference)))
            print(f"guidance {guidance:g}, {length} frames: distance {distance:.1f}", file=sys.stderr, flush=True)
        first, *_, last = (row[2] for row in rows if row[0] == guidance)
        if last > 2 * first:
            failures.append(f"FAILED: with context guidance {guidance:g} the distance of the last {TAIL} of "
                            f"{LENGTHS[-1]} frames ({last:.1f}) is more than twice that of the first ({first:.1f}).")
    floor = frechet_distance(features_of(network, real_clips(range(REAL, REAL + 2 * len(numbers)))), real_features)
    curves = {f"context guidance {g:g}": [(row[1], row[2]) for row in rows if row[0] == g] for g in GUIDANCES}
    plot_curves(curves, arguments.output / "longer.png", "Frechet distance of the last 16 frames against length")
    return extension_table(rows, floor, len(numbers)), failures


def tail(cascade, latents):
    """Clips of FRAMES frames, uint8 `(n t h w 3)`, of latents `(n 16 c h w)`."""
    frames = cascade.decode(torch.from_numpy(latents).flatten(0, 1))
    return frames.reshape(-1, models.FRAMES, *frames.shape[1:])


def extension_table(rows, floor, count):
    lines = [f"{count} held-out drives, extended from their first frame; the last {TAIL} frames, as clips of "
             f"{models.FRAMES}; {STEPS} steps. As many real clips: {floor:.1f}.", "",
             "| context guidance | length, frames | Frechet distance | motion, ratio to real |", "|---|---|---|---|"]
    lines += [f"| {guidance:g} | {length} | {distance:.1f} | {ratio:.2f} |"
              for guidance, length, distance, ratio in rows]
    return "\n".join(lines) + "\n"


# Interpolation

@torch.inference_mode()
def interpolation(arguments):
    """The table of interpolated video, and sentences on what does not hold."""
    cascade = Cascade(arguments.models, arguments.train, STEPS, CFG)
    model, rate = cascade.bundled(bundle.INTERPOLATION_FILE), models.RATES[0]
    errors: dict[str, list[np.ndarray]] = {name: [] for name in (OURS, LATENT, PIXEL, REPEAT)}
    seams: dict[str, list[float]] = {"real": [], OURS: []}
    for number in range(REAL, REAL + min(arguments.clips, CLIPS)):
        drive = world.clip(world.held_out_seed(number), interpolated_length(KEYS), models.HEIGHT, models.WIDTH, rate)
        keys = cascade.encode(drive.frames[::4])
        made = ways(cascade, model, keys, number, rate)
        inside = moving(drive)
        for name, frames in made.items():
            errors[name].append(np.square(frames.astype(np.float64) - drive.frames)[inside])
        seams["real"].append(seam(drive.frames))
        seams[OURS].append(seam(made[OURS]))
    psnr = {name: 10 * np.log10(255 ** 2 / np.concatenate(parts).mean()) for name, parts in errors.items()}
    best = max((name for name in psnr if name != OURS), key=lambda name: psnr[name])
    failures = [] if psnr[OURS] > psnr[best] else [
        f"FAILED: {OURS} ({psnr[OURS]:.2f} dB) does not beat {best} ({psnr[best]:.2f} dB)."]
    return interpolation_table(psnr, {name: np.mean(values) for name, values in seams.items()}, arguments), failures


def ways(cascade, model, keys, number, rate):
    """The frames of every way to fill the gaps between key frames, uint8 `(t h w 3)`."""
    positive = cascade.captions([number])
    settings = sampling.SamplerSettings(cascade.steps, cascade.cfg, "euler", "ddim_uniform", [[positive, {}]],
                                        [[cascade.null, {}]])
    progress = sampling.RolloutProgress(model, len(keys) - 1, cascade.steps)
    one_pass = InterpolationPass(model, settings, None, rate, number, 0, 1, 0, 1, 0, None, True, progress)
    pictures = cascade.decode(keys).astype(np.float64)
    return {OURS: cascade.decode(interpolate(keys, one_pass)),
            LATENT: cascade.decode(torch.from_numpy(blended(keys.numpy())).float()),
            PIXEL: np.rint(blended(pictures)).astype(np.uint8),
            REPEAT: np.rint(pictures[(np.arange(interpolated_length(len(keys))) + 2) // 4]).astype(np.uint8)}


def blended(keys):
    """`4(t-1)+1` arrays on the straight lines between t."""
    times = np.arange(interpolated_length(len(keys))) / 4
    before = np.minimum(times.astype(int), len(keys) - 2)
    share = (times - before).reshape(-1, *[1] * (keys.ndim - 1))
    return keys[before] * (1 - share) + keys[before + 1] * share


def moving(drive):
    """Pixels of the middle frames that lie in a car's box, bool `(t h w)`."""
    inside = np.zeros(drive.frames.shape[:3], bool)
    height, width = inside.shape[1:]
    for time, boxes in enumerate(drive.boxes):
        for _, x0, y0, x1, y1 in boxes if time % 4 else ():
            inside[time, int(y0 * height):int(np.ceil(y1 * height)), int(x0 * width):int(np.ceil(x1 * width))] = True
    return inside


def seam(frames):
    """Mean |x(t-1) - 2 x(t) + x(t+1)| at inner key frames over that elsewhere. 1: key frames cannot be seen."""
    frames = frames.astype(np.float64)
    second = np.abs(frames[:-2] - 2 * frames[1:-1] + frames[2:]).mean((1, 2, 3))
    times = np.arange(1, len(frames) - 1)
    return second[times % 4 == 0].mean() / second[times % 4 != 0].mean()


def interpolation_table(psnr, seams, arguments):
    lines = [f"{min(arguments.clips, CLIPS)} held-out drives, {KEYS} key frames each at {models.FPS:g} frames a "
             f"second, {STEPS} steps; the frames between, inside the cars' boxes.", "",
             "| frames between by | PSNR, dB |", "|---|---|"]
    lines += [f"| {name} | {value:.2f} |" for name, value in psnr.items()]
    lines += ["", f"Second temporal difference at key frames against elsewhere: {seams[OURS]:.2f}, of real video "
                  f"{seams['real']:.2f}."]
    return "\n".join(lines) + "\n"
