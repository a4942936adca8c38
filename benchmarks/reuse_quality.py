"""Reuse Temporal Layers on the demo: `python run.py bench --quality --part reuse`.

Rows of the same clips: the layers run in every step, or rest in 1 to 3 steps after each, or whole steps are left out so
that the layers run as often. The cost is that of all calls of the network in one clip, as a multiple of the image
model's in the same number of steps as the first row. FLOPs are counted; steps are timed on this machine, and a row
alternates with the image model.
"""

import statistics
import sys
import time

import torch
from torch.utils.flop_counter import FlopCounterMode

from ..demo import models
from ..demo.features import features_of, load_network
from ..nodes.host.reuse import with_reuse
from ..temporal.metrics import frechet_distance, motion_ratio
from ..temporal.reuse import MOST_REUSED
from . import colours
from .cascade import SAMPLER, SECOND, Cascade, real_clips

REAL = 512              # clips for the distance
PAIRS = 3               # clips timed with and without layers, alternating
WORST = 1.1             # the distance of one step's rest, as a multiple of that without
HEAD = ["| clips | steps | the layers run in | Frechet distance | motion | cars keep colour | FLOPs | time |",
        "|---|---|---|---|---|---|---|---|"]


def reuse(arguments) -> tuple[str, list[str]]:
    """The table, and sentences on what does not hold."""
    network = load_network(arguments.models / "features.safetensors")
    reference = real_clips(range(REAL))
    real = features_of(network, reference)
    held_out = range(REAL, REAL + arguments.clips)
    cost = Cost(arguments)
    rows = []

    def add(name, steps, runs, clips, costs):
        kept, _ = colours.figures_of(clips)
        figures = (frechet_distance(features_of(network, clips), real), motion_ratio(clips, reference), kept)
        rows.append((name, steps, runs, figures, costs))
        print(row_of(*rows[-1]), file=sys.stderr, flush=True)

    add(SECOND, None, None, real_clips(held_out), None)
    for rest in range(MOST_REUSED + 1):
        steps, runs = arguments.steps, -(-arguments.steps // (rest + 1))
        cascade = Cascade(arguments.models, arguments.train, steps, arguments.cfg)
        model = with_reuse(cascade.bundled(), rest, 0.0, 1.0)
        name = f"the layers rest in {rest} of {rest + 1} steps" if rest else "the layers run in every step"
        add(name, steps, runs, cascade.clips(model, held_out), cost.of(cascade, model, steps, runs))
        if rest:
            cascade = Cascade(arguments.models, arguments.train, runs, arguments.cfg)
            model = cascade.bundled()
            add("steps left out", runs, runs, cascade.clips(model, held_out), cost.of(cascade, model, runs, runs))
    return table(rows, arguments), verdict(rows)


class Cost:
    """What a clip costs, as a multiple of a clip of the image model alone in the usual number of steps."""

    def __init__(self, arguments) -> None:
        self.usual = arguments.steps
        self.image = Cascade(arguments.models, arguments.train, self.usual, arguments.cfg)
        self.alone = self.image.bundled(strength=0.0)
        self.short = Cascade(arguments.models, arguments.train, 1, arguments.cfg)
        self.counted = [self.flops(model) for model in (self.short.bundled(strength=0.0), self.short.bundled())]

    def flops(self, model) -> float:
        """FLOPs of one step."""
        with FlopCounterMode(display=False) as counter:
            self.clip(self.short, model)
        return counter.get_total_flops()

    @torch.inference_mode()
    def clip(self, cascade, model) -> float:
        """Seconds of one clip."""
        start = time.perf_counter()
        cascade.sample(model, [0], models.FRAMES, 0)
        return time.perf_counter() - start

    def of(self, cascade, model, steps: int, runs: int) -> tuple[float, float]:
        """(FLOPs, time) of a clip whose layers run in `runs` of `steps` steps."""
        without, with_layers = self.counted
        flops = (steps * without + runs * (with_layers - without)) / (self.usual * without)
        pairs = [(self.clip(self.image, self.alone), self.clip(cascade, model)) for _ in range(PAIRS)]
        return flops, statistics.median(after / before for before, after in pairs)


def row_of(name, steps, runs, figures, costs) -> str:
    distance, motion, kept = figures
    spent = [f"{cost:.2f}" for cost in costs] if costs else ["-", "-"]
    return (f"| {name} | {steps or '-'} | {runs or '-'} | {distance:.1f} | {motion:.2f} | {kept:.0%} | "
            f"{' | '.join(spent)} |")


def table(rows, arguments) -> str:
    lines = [f"Frechet distance, in the features of the demo's own video network (not FVD), to {REAL} real held-out",
             f"clips; {arguments.clips} clips a row; {SAMPLER}, cfg {arguments.cfg:g}. FLOPs and time of a clip are",
             f"multiples of those of the image model alone in {arguments.steps} steps.", "", *HEAD]
    return "\n".join(lines + [row_of(*row) for row in rows]) + "\n"


def verdict(rows) -> list[str]:
    """A sentence where one step's rest costs too much of the distance."""
    whole, rested = (row[3][0] for row in (rows[1], rows[2]))
    if rested <= WORST * whole:
        return []
    return [f"FAILED: with a rest of one step the distance is {rested:.1f}, more than {WORST} times {whole:.1f}."]
