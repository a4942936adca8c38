"""How good the demo's clips are, by numbers: `python run.py bench --quality`. Longer video is in longer.py.

The Frechet distance is between features of generated and of real held-out clips. The features are those of a small
video network that was trained to tell the labels of the driving world (demo/features.py). It is not FVD, whose network
knows human actions. Motion is the mean absolute difference of neighbouring frames, as a ratio to that of real clips.
Cars are followed by their paint (colours.py): how many of them keep their colour, and how many there are in a clip.
Real clips that went through the autoencoder are the best that the cascade can give. So the bundled layers have to
reach LEAST_KEPT of their share. ComfyUI's own sampler samples every clip, through the MODEL that an artist gets, with
the caption of a held-out drive.
"""

import argparse
import math
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from ..demo import train
from ..demo.features import features_of, load_network
from ..temporal.errors import VideoLDMError
from ..temporal.metrics import frechet_distance, motion_ratio
from . import (
    colours,
    joint_quality,
    longer,
    pvdm_parts,
    pvdm_quality,
    reconstruction,
    reuse_quality,
    scene_layout_quality,
    upscale_quality,
)
from .cascade import BATCH, FROZEN, SAMPLER, SECOND, SHUFFLED, THROUGH, Cascade, real_clips, shuffled

OUTPUT = train.ROOT / "output" / "quality"
REAL, COUNT = 512, 128                  # reference clips, clips per row
STEPS, CFG = 30, 2.0                     # as the quickstart has them
SHEET_CLIPS = 6
QUICK_CLIPS, QUICK_STEPS = 8, 4         # with --quick
MOTION_RANGE = (0.7, 1.4)
LEAST_KEPT = 0.9                        # of the share of cars that keep their colour through the autoencoder
IMAGE, ATTENTION, FULL = "image model alone (mix 1)", "attention only", "convolution + attention"
BUNDLED = "the bundled layers: convolution + attention, trained on with context frames"
PARTS = ("key-frames", "longer", "interpolation", "layout", "reconstruction", "upscaling", "joint", "pvdm",
         "pvdm-parts", "reuse")


def main(argv=None):
    parser = argparse.ArgumentParser(prog="run.py bench --quality", description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=Path, default=train.BUNDLE, help="folder of the cascade")
    parser.add_argument("--train", type=Path, default=train.WORK, help="work folder with the arms of the ablation")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="folder for the tables and pictures")
    parser.add_argument("--part", choices=[*PARTS, "all"], default="all", help="one table only; default: all of them")
    parser.add_argument("--clips", type=int, default=COUNT, help="clips per row; figures are quoted for the default")
    parser.add_argument("--steps", type=int, default=STEPS, help="of the key frames")
    parser.add_argument("--cfg", type=float, default=CFG, help="of the key frames")
    parser.add_argument("--quick", action="store_true",
                        help="few clips and steps: shows that a part runs; its figures mean nothing")
    arguments = parser.parse_args(argv)
    if arguments.quick:
        arguments.clips, arguments.steps = min(arguments.clips, QUICK_CLIPS), min(arguments.steps, QUICK_STEPS)
    if arguments.clips < BATCH:
        raise SystemExit(f"--clips must be {BATCH} or more.")
    arguments.output.mkdir(parents=True, exist_ok=True)
    failures = []
    for part in PARTS if arguments.part == "all" else [arguments.part]:
        text, failed = MEASURES[part](arguments)
        (arguments.output / f"{part}.md").write_text(text, encoding="utf-8")
        print(text, flush=True)
        failures += failed
    print("\n".join(failures) if failures else "Every condition on these figures holds.")
    print(f"Tables and pictures: '{arguments.output}'")
    return 1 if failures else 0


# What is measured

def key_frames(arguments):
    """The table of the key-frame models, and sentences on what does not hold."""
    rows, left_out = measure(arguments)
    contact_sheet(rows).save(arguments.output / "key-frames.png")
    return table(rows, arguments) + "\n".join(left_out), verdict({name: figures for name, _, figures in rows})


def measure(arguments):
    """Rows and sentences on what could not be measured.

    A row is (name, clips, (distance, motion ratio, share of cars that keep their colour, cars per clip)).
    """
    network = load_network(arguments.models / "features.safetensors")
    reference = real_clips(range(REAL))
    held_out = range(REAL, REAL + arguments.clips)
    real_features = features_of(network, reference)
    rows, left_out = [], []

    def add(name, make):
        try:
            clips = make()
        except VideoLDMError as error:
            left_out.append(f"The row '{name}' is left out: {error}")
            return
        figures = (frechet_distance(features_of(network, clips), real_features), motion_ratio(clips, reference),
                   *colours.figures_of(clips))
        rows.append((name, clips, figures))
        print(row_of(name, figures), file=sys.stderr, flush=True)

    second = real_clips(held_out)
    add(SECOND, lambda: second)
    add(SHUFFLED, lambda: shuffled(second))
    add(FROZEN, lambda: np.repeat(second[:, :1], second.shape[1], axis=1))
    cascade = Cascade(arguments.models, arguments.train, arguments.steps, arguments.cfg)
    add(THROUGH, lambda: cascade.through_autoencoder(second))
    add(IMAGE, lambda: cascade.clips(cascade.bundled(strength=0.0), held_out))
    add(ATTENTION, lambda: cascade.clips(cascade.arm("temporal-attention"), held_out))
    add(FULL, lambda: cascade.clips(cascade.arm("temporal"), held_out))
    add(BUNDLED, lambda: cascade.clips(cascade.bundled(), held_out))
    return rows, left_out


# What is shown

def table(rows, arguments):
    lines = [f"Frechet distance, in the features of the demo's own video network (not FVD), to {REAL} real held-out",
             f"clips; {arguments.clips} clips a row; {SAMPLER}, {arguments.steps} steps, cfg {arguments.cfg:g}.",
             f"Cars that show {colours.LEAST} pixels of paint or more in {colours.SEEN} frames or more are followed;",
             "one keeps its colour if its paint is the same in all of them.", "",
             "| clips | Frechet distance | motion, ratio to real | cars that keep their colour | cars a clip |",
             "|---|---|---|---|---|"]
    return "\n".join(lines + [row_of(name, figures) for name, _, figures in rows]) + "\n"


def row_of(name, figures):
    distance, ratio, kept, cars = figures
    return f"| {name} | {distance:.3f} | {ratio:.2f} | {'-' if math.isnan(kept) else f'{kept:.0%}'} | {cars:.2f} |"


def verdict(figures):
    """Sentences on what does not hold of the figures {row: (distance, motion ratio, kept, cars)}."""
    failures = [line for row in (FULL, BUNDLED) if row in figures for line in verdict_of(row, figures)]
    return failures + verdict_of_colours(figures)


def verdict_of(row, figures):
    distance, ratio, *_ = figures[row]
    failures = []
    if distance > figures[IMAGE][0] / 5:
        failures.append(f"FAILED: {row} ({distance:.3f}) is more than a fifth of {IMAGE} ({figures[IMAGE][0]:.3f}).")
    for other in (ATTENTION, FROZEN, SHUFFLED):
        if other in figures and distance >= figures[other][0]:
            failures.append(f"FAILED: {row} ({distance:.3f}) is not below {other} ({figures[other][0]:.3f}).")
    if not MOTION_RANGE[0] <= ratio <= MOTION_RANGE[1]:
        failures.append(f"FAILED: motion of {row} is {ratio:.2f} of the real one, outside {MOTION_RANGE}.")
    return failures


def verdict_of_colours(figures):
    if BUNDLED not in figures:
        return []
    kept, ceiling = figures[BUNDLED][2], figures[THROUGH][2]
    if kept >= LEAST_KEPT * ceiling:
        return []
    return [f"FAILED: {kept:.0%} of the cars of {BUNDLED} keep their colour, less than {LEAST_KEPT} of the share of "
            f"{THROUGH} ({ceiling:.0%})."]


def contact_sheet(rows):
    """For the first held-out drives: real, image model alone, and the generated clips, one clip a row."""
    shown = [clips for name, clips, _ in rows if name in (SECOND, IMAGE, ATTENTION, FULL, BUNDLED)]
    count = min(SHEET_CLIPS, len(shown[0]))
    strips = [np.concatenate(list(clips[number]), axis=1) for number in range(count) for clips in shown]
    return Image.fromarray(np.concatenate(strips, axis=0))


MEASURES = {"key-frames": key_frames, "longer": longer.extension, "interpolation": longer.interpolation,
            "layout": scene_layout_quality.control, "reconstruction": reconstruction.decoders,
            "upscaling": upscale_quality.upscaled_parts, "joint": joint_quality.joint, "pvdm": pvdm_quality.quality,
            "pvdm-parts": pvdm_parts.parts, "reuse": reuse_quality.reuse}
