"""Where the time of a step goes: `python run.py bench --profile`.

PyTorch's profiler times each operation of one step, and which kind of layer it belongs to. On a GPU these are the times
of its kernels, in bfloat16 at 512x512; else those of the CPU at 128x128. `bench --traffic` counts what the same
operations move. The network is Stable Diffusion 1.5's, with random weights.
"""

import argparse
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from ..temporal.stack import TemporalStack
from .speed import MOTION, SETS, VIDEO_LDM, Case, batch, build_control, build_layers, build_unet, step
from .traffic import IMAGE_MODEL, each_layer

LABEL = "layer "
LISTED = 12         # operations in the list of a part


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="run.py bench --profile", description=__doc__.split("\n\n")[1])
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--size", type=int, help="height and width of the latents; default: 64 on a GPU, else 16")
    parser.add_argument("--sets", nargs="+", choices=SETS, default=(MOTION, VIDEO_LDM), metavar="SET",
                        help=f"of {SETS}")
    options = parser.parse_args(argv)
    on_gpu = torch.cuda.is_available()
    case = Case("cuda", torch.bfloat16, options.size or 64, options.frames) if on_gpu else \
        Case("cpu", torch.float32, options.size or 16, options.frames)
    print(f"\n{case.title}", flush=True)
    unet, inputs = build_unet(case), batch(case)
    for name in options.sets:
        stack, control = build_layers(unet, name, case), build_control(name, case)
        step(unet, stack, inputs, case, control)        # what is loaded and planned only once is not measured
        print(f"\n{name}\n\n{table(profiled(partial(step, unet, stack, inputs, case, control), stack))}", flush=True)
        del stack, control
    return 0


def profiled(work: Callable[[], Any], stack: TemporalStack) -> Counter[tuple[str, str]]:
    """Microseconds of one run of `work` by (part, operation). The parts are the kinds of layers in the stack."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
    running: list[record_function] = []

    def begin(kind: str) -> None:
        running.append(record_function(LABEL + kind))
        running[-1].__enter__()
    with each_layer(stack, begin, lambda: running.pop().__exit__(None, None, None)), \
            profile(activities=activities) as found:
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    times: Counter[tuple[str, str]] = Counter()
    for event in found.events():
        if str(event.device_type).endswith("CPU") and not event.name.startswith(LABEL):
            own = event.self_device_time_total if torch.cuda.is_available() else event.self_cpu_time_total
            times[part_of(event), event.name.removeprefix("aten::")] += own
    return times


def part_of(event: Any) -> str:
    """The kind of layer that an event of the profiler is inside."""
    while event is not None:
        if event.name.startswith(LABEL):
            return event.name.removeprefix(LABEL)
        event = event.cpu_parent
    return IMAGE_MODEL


def table(times: Counter[tuple[str, str]]) -> str:
    """The times in words: a row for each part, with its slowest operations."""
    whole, parts = sum(times.values()), Counter[str]()
    for (part, _), time in times.items():
        parts[part] += time
    rows = ["| part | time | share | its slowest operations |", "|---|---|---|---|"]
    for part, total in parts.most_common():
        own = Counter({operation: time for (other, operation), time in times.items() if other == part})
        slowest = ", ".join(f"{operation} {time / 1000:.2f} ms" for operation, time in own.most_common(LISTED))
        rows.append(f"| {part} | {total / 1000:.1f} ms | {total / whole:.0%} | {slowest} |")
    return "\n".join(rows)
