"""How good the demo's clips are, by numbers: `python run.py bench --quality`.

Frechet distance between features of generated and of real held-out clips, in a small video network that was trained on
the driving world to tell its labels (demo/features.py; not FVD, whose network knows human actions), and motion: the
mean absolute difference of neighbouring frames, as a ratio to that of real clips. Every clip is sampled by ComfyUI's
own sampler through the MODEL that an artist gets, under the caption of a held-out drive.
"""

import argparse
import sys
import time
from pathlib import Path

import comfy.sample
import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

from ..demo import models, train, world
from ..demo.features import features_of, load_network
from ..nodes.host import attach
from ..nodes.host import models as host
from ..temporal.errors import VideoLDMError
from ..temporal.formats import load_temporal
from ..temporal.metrics import frechet_distance, motion_ratio

OUTPUT = train.ROOT / "output" / "quality"
REAL, COUNT, BATCH = 512, 128, 4        # reference clips, clips per row, clips sampled together
SAMPLER, SCHEDULER, STEPS, CFG = "dpmpp_2m", "normal", 20, 1.0
SHEET_CLIPS = 6
MOTION_RANGE = (0.7, 1.4)
SECOND, SHUFFLED, FROZEN = "real, a second set (the floor)", "real, frames shuffled", "real, first frame frozen"
IMAGE, ATTENTION, FULL = "image model alone (mix 1)", "attention only", "convolution + attention"


def main(argv=None):
    parser = argparse.ArgumentParser(prog="run.py bench --quality", description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=Path, default=train.BUNDLE, help="folder of the cascade")
    parser.add_argument("--train", type=Path, default=train.WORK, help="work folder with the attention-only layers")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="folder for the table and the contact sheet")
    parser.add_argument("--clips", type=int, default=COUNT, help="clips per row; figures are quoted for the default")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--cfg", type=float, default=CFG)
    arguments = parser.parse_args(argv)
    if arguments.clips % BATCH:
        raise SystemExit(f"--clips must be a multiple of {BATCH}.")
    rows, left_out = measure(arguments)
    arguments.output.mkdir(parents=True, exist_ok=True)
    text = table(rows, arguments)
    (arguments.output / "quality.md").write_text(text, encoding="utf-8")
    contact_sheet(rows).save(arguments.output / "quality.png")
    print(text)
    for line in left_out:
        print(line)
    failures = verdict({name: figures for name, _, figures in rows})
    print("\n".join(failures) if failures else "Every condition on these figures holds.")
    print(f"Table and contact sheet: '{arguments.output}'")
    return 1 if failures else 0


# What is measured

def measure(arguments):
    """Rows (name, clips, (distance, motion ratio)), and sentences on what could not be measured."""
    network = load_network(arguments.models / "features.safetensors")
    reference = real_clips(range(REAL))
    held_out = range(REAL, REAL + arguments.clips)
    known = features_of(network, reference)
    rows = []

    def add(name, clips):
        figures = frechet_distance(features_of(network, clips), known), motion_ratio(clips, reference)
        rows.append((name, clips, figures))
        print(f"{name}: distance {figures[0]:.3f}, motion {figures[1]:.2f}", file=sys.stderr, flush=True)

    second = real_clips(held_out)
    add(SECOND, second)
    add(SHUFFLED, shuffled(second))
    add(FROZEN, np.repeat(second[:, :1], second.shape[1], axis=1))
    cascade = Cascade(arguments)
    add(IMAGE, cascade.clips(cascade.video_model(0.0), held_out))
    left_out = []
    try:
        add(ATTENTION, cascade.clips(cascade.attention_model(), held_out))
    except VideoLDMError as error:
        left_out.append(f"The row '{ATTENTION}' is left out: {error}")
    add(FULL, cascade.clips(cascade.video_model(1.0), held_out))
    return rows, left_out


def real_clips(numbers):
    """Rendered held-out clips, uint8 (n t h w 3)."""
    size = models.FRAMES, models.HEIGHT, models.WIDTH, models.FPS
    return np.stack([world.clip(world.held_out_seed(number), *size).frames for number in numbers])


def shuffled(clips):
    """Each clip with its frames in another order, never the original one."""
    out = clips.copy()
    for number, clip in enumerate(clips):
        rng = np.random.default_rng(number)
        order = np.arange(len(clip))
        while (order == np.arange(len(clip))).all():
            order = rng.permutation(len(clip))
        out[number] = clip[order]
    return out


class Cascade:
    """The bundled cascade in this ComfyUI, sampled as core's KSampler does."""

    def __init__(self, arguments):
        self.arguments = arguments
        self.model, self.clip, self.vae = host.load_demo(arguments.models)
        self.layers = load_temporal(arguments.models / train.LAYERS_FILE)
        self.null = self.text("")

    def text(self, caption):
        return self.clip.encode_from_tokens(self.clip.tokenize(caption))

    def video_model(self, strength):
        """The image model with the bundled layers; strength 0 is mix 1 everywhere."""
        return self.patched(self.layers.params, self.layers.tensors, strength)

    def attention_model(self):
        """The image model with the ablation's layers, which `train-demo` leaves in its work folder."""
        path = self.arguments.train / "temporal-attention.safetensors"
        if not path.exists():
            raise VideoLDMError(f"there is no '{path}'. Train it with: python run.py train-demo")
        weights = {key.removeprefix("temporal."): value for key, value in load_file(path).items()}
        unet = attach.spatial_unet(self.model)
        return self.patched(train.temporal_params(unet, convolution=False), weights, 1.0)

    def patched(self, params, tensors, strength):
        stack = attach.build_stack(params, tensors, torch.float32)
        settings = {"strength": strength, "fps": models.FPS, "frames": models.FRAMES, "title": "quality"}
        return attach.attach_layers(self.model, stack, settings, frames=models.FRAMES)

    @torch.inference_mode()
    def clips(self, model, numbers):
        """A clip per held-out drive, under its caption, uint8 (n t h w 3); the same noise for every model."""
        numbers, parts, started = list(numbers), [], time.monotonic()
        for first in range(0, len(numbers), BATCH):
            parts.append(self.batch(model, numbers[first:first + BATCH]))
            done = first + BATCH
            print(f"  {done} of {len(numbers)} clips, {time.monotonic() - started:.0f} s", end="\r", file=sys.stderr)
        return np.concatenate(parts)

    def batch(self, model, numbers):
        scenes = [world.scene(world.held_out_seed(number)) for number in numbers]
        positive = torch.cat([self.text(world.caption(scene)) for scene in scenes]).repeat_interleave(models.FRAMES, 0)
        latent = torch.zeros(len(positive), models.UNET.latent_channels, models.HEIGHT // 8, models.WIDTH // 8)
        noise = comfy.sample.prepare_noise(latent, numbers[0])
        samples = comfy.sample.sample(
            model, noise, self.arguments.steps, self.arguments.cfg, SAMPLER, SCHEDULER, [[positive, {}]],
            [[self.null.expand(len(positive), -1, -1), {}]], latent, disable_pbar=True, seed=numbers[0])
        pictures = (self.vae.decode(samples) * 255 + 0.5).clamp(0, 255).to(torch.uint8)
        return pictures.cpu().numpy().reshape(len(numbers), models.FRAMES, *pictures.shape[1:])


# What is shown

def table(rows, arguments):
    lines = [f"Frechet distance, in the features of the demo's own video network (not FVD), to {REAL} real held-out",
             f"clips; {arguments.clips} clips a row; {SAMPLER}, {arguments.steps} steps, cfg {arguments.cfg:g}.", "",
             "| clips | Frechet distance | motion, ratio to real |", "|---|---|---|"]
    lines += [f"| {name} | {distance:.3f} | {ratio:.2f} |" for name, _, (distance, ratio) in rows]
    return "\n".join(lines) + "\n"


def verdict(figures):
    """Sentences on what does not hold of the figures {row: (distance, motion ratio)}."""
    distance, ratio = figures[FULL]
    failures = []
    if distance > figures[IMAGE][0] / 5:
        failures.append(f"FAILED: {FULL} ({distance:.3f}) is more than a fifth of {IMAGE} ({figures[IMAGE][0]:.3f}).")
    for other in (ATTENTION, FROZEN, SHUFFLED):
        if other in figures and distance >= figures[other][0]:
            failures.append(f"FAILED: {FULL} ({distance:.3f}) is not below {other} ({figures[other][0]:.3f}).")
    if not MOTION_RANGE[0] <= ratio <= MOTION_RANGE[1]:
        failures.append(f"FAILED: motion of {FULL} is {ratio:.2f} of the real one, outside {MOTION_RANGE}.")
    return failures


def contact_sheet(rows):
    """For the first held-out drives: real, image model alone, and the generated clips, one clip a row."""
    shown = [clips for name, clips, _ in rows if name in (SECOND, IMAGE, ATTENTION, FULL)]
    count = min(SHEET_CLIPS, len(shown[0]))
    strips = [np.concatenate(list(clips[number]), axis=1) for number in range(count) for clips in shown]
    return Image.fromarray(np.concatenate(strips, axis=0))
