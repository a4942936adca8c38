"""What PVDM costs beside a diffusion of pixels: `python run.py bench --pvdm`.

PVDM-S and the released autoencoder sample a video of 256x256: one clip of 16 frames, and 128 frames clip after clip.
Beside them stands a 3-D U-Net that diffuses the pixels of the whole video. It has as many weights as PVDM-S. Its
convolutions are 3x3x3 and it has no attention, which is the cheapest such network. Weights are random, in float32, on
the CPU. Times are those of a processor, so that other load on the machine hardly counts.

A video takes PVDM-S's steps of the paper: 100 for the first clip and 20 for each further one. Few steps are measured,
and the others reckoned from them. The pixels' network is too large for that: its step is measured on frames of
32x32, and reckoned by the count of FLOPs. Its memory is counted in tensors at both sizes, and measured at the small
one, which shows how far the count is right.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool3d, interpolate, silu
from torch.utils.flop_counter import FlopCounterMode

from ..temporal.layers import Factory
from ..temporal.pvdm import PVDM_S, RELEASED, Autoencoder, AutoencoderParams, PlaneUNet, UNetParams
from ..temporal.pvdm.unet import time_embedding
from .memory import Tally, growth, own_pages

RUN = Path(__file__).resolve().parent.parent / "run.py"
FIRST, FOLLOWING = 100, 20              # steps of a first clip and of others (PVDM, 100/20-s)
LENGTHS = (16, 128)                     # frames of the videos
PAPER_TIME, PAPER_MEMORY = 17.6, 3.5    # "up to", against other video models on one GPU
META = Factory(device="meta")


@dataclass(frozen=True)
class Case:
    """What is measured."""

    autoencoder: AutoencoderParams
    unet: UNetParams
    pixel_channels: int         # of the pixels' network, so that it has as many weights as the U-Net
    pixel_sides: int            # of the frames on which its step is measured

    def clip(self, frames: int, sides: int) -> tuple[int, ...]:
        return 1, 3, frames, sides, sides


FULL = Case(RELEASED, PVDM_S, 104, 32)
QUICK = Case(replace(RELEASED, height=64, width=64, channels=64, depth=2, plane_depth=1, heads=2, plane_hidden=128),
             replace(PVDM_S, model_channels=32, num_res_blocks=1), 32, 16)


# The network of pixels

class VoxelBlock(nn.Module):
    """Two convolutions over time and frame. The diffusion step scales and shifts between them."""

    def __init__(self, before: int, after: int, width: int, make: Factory) -> None:
        super().__init__()
        self.norm, self.second_norm = (make.group_norm(count, groups=8) for count in (before, after))
        self.first = make.conv3d(before, after, (3, 3, 3), padding=1)
        self.second = make.conv3d(after, after, (3, 3, 3), padding=1)
        self.emb = make.linear(width, 2 * after)
        self.skip = nn.Identity() if before == after else make.conv3d(before, after, (1, 1, 1))

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        scale, shift = self.emb(silu(emb))[..., None, None, None].chunk(2, dim=1)
        h = self.second_norm(self.first(silu(self.norm(x)))) * (1 + scale) + shift
        return self.skip(x) + self.second(silu(h))


class VoxelUNet(nn.Module):
    """eps of noisy clips `b 3 t H W`. It has the levels of PVDM's U-Net and halves frames in space alone."""

    def __init__(self, channels: int, params: UNetParams, make: Factory) -> None:
        super().__init__()
        widths, width = [mult * channels for mult in params.channel_mult], 4 * channels
        self.channels = channels
        self.time = nn.Sequential(make.linear(channels, width), nn.SiLU(), make.linear(width, width))
        self.enter = make.conv3d(3, channels, (3, 3, 3), padding=1)
        skips, current = [channels], channels
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        for after in widths:
            blocks = nn.ModuleList()
            for _ in range(params.num_res_blocks):
                blocks.append(VoxelBlock(current, after, width, make))
                current = after
                skips.append(current)
            self.down.append(blocks)
        self.middle = nn.ModuleList(VoxelBlock(current, current, width, make) for _ in range(2))
        for after in reversed(widths):
            blocks = nn.ModuleList()
            for _ in range(params.num_res_blocks):
                blocks.append(VoxelBlock(current + skips.pop(), after, width, make))
                current = after
            self.up.append(blocks)
        self.norm, self.leave = make.group_norm(current, groups=8), make.conv3d(current, 3, (3, 3, 3), padding=1)

    def forward(self, x: Tensor, tau: Tensor) -> Tensor:
        emb, skips = self.time(time_embedding(tau, self.channels)), []
        x = self.enter(x)
        for level, blocks in enumerate(self.down):
            x = avg_pool3d(x, (1, 2, 2)) if level else x
            for block in blocks:
                x = block(x, emb)
                skips.append(x)
        for block in self.middle:
            x = block(x, emb)
        for level, blocks in enumerate(self.up):
            x = interpolate(x, scale_factor=(1, 2, 2), mode="nearest") if level else x
            for block in blocks:
                x = block(torch.cat([x, skips.pop()], dim=1), emb)
        return self.leave(silu(self.norm(x)))


# The pieces of work. Each is `make(...) -> work`, so that what a network needs is there before it is measured.

Work = Callable[[], Tensor]


def no_gradients(work: Work) -> Work:
    return torch.no_grad()(work)


def plane_step(case: Case, make: Factory) -> Work:
    """A step of PVDM's U-Net on the planes of a clip that has a clip before it."""
    network, shape = ready(PlaneUNet(case.unet, make), make), case.autoencoder.shape
    x, before = (torch.randn(1, case.unet.channels, shape.length, device=make.device) for _ in range(2))
    return no_gradients(partial(network, x, step_number(make), shape, before))


def decode(case: Case, make: Factory) -> Work:
    """A clip of 16 frames from its planes."""
    network = ready(Autoencoder(case.autoencoder, make), make)
    planes = torch.zeros(1, case.autoencoder.plane_channels, case.autoencoder.shape.length, device=make.device)
    return no_gradients(partial(network.decode, planes))


def pixel_step(case: Case, make: Factory, frames: int, sides: int) -> Work:
    """A step of the pixels' network on a whole video."""
    network = ready(VoxelUNet(case.pixel_channels, case.unet, make), make)
    return no_gradients(partial(network, torch.randn(case.clip(frames, sides), device=make.device), step_number(make)))


def small_pixel_step(case: Case, make: Factory) -> Work:
    return pixel_step(case, make, case.autoencoder.frames, case.pixel_sides)


MEASURED: dict[str, Callable[[Case, Factory], Work]] = {
    "plane_step": plane_step, "decode": decode, "small_pixel_step": small_pixel_step}


def ready(network: nn.Module, make: Factory) -> nn.Module:
    """With small random weights. Buffers go to the device of the weights."""
    network.to(make.device or "cpu").requires_grad_(False)
    if make.device != "meta":
        for weight in network.parameters():
            weight.uniform_(-0.02, 0.02)
    return network.eval()


def step_number(make: Factory) -> Tensor:
    return torch.full((1,), 500, device=make.device)


# Measures

def seconds(work: Work, times: int) -> float:
    """Seconds of a processor."""
    found = []
    for _ in range(times):
        began = time.process_time()
        work()
        found.append(time.process_time() - began)
    return statistics.median(found)


def flops(work: Work) -> int:
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def counted(work: Work) -> int:
    """Bytes of tensors at the fullest moment."""
    with Tally() as tally:
        work()
    return tally.most["meta"]


def weights(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def measured(work: Work, times: int) -> tuple[int, float]:
    """Bytes that the first run takes at most beyond the weights, and seconds of a processor of later runs."""
    return growth(work), seconds(work, times)


def in_own_process(name: str, options) -> tuple[int, float]:
    """`measured` of a piece in a process of its own: what earlier work freed does not count as free there."""
    print(f"{name} ...", file=sys.stderr, flush=True)
    command = [sys.executable, str(RUN), "_inside", "benchmarks.pvdm", "--piece", name, "--steps", str(options.steps),
               "--threads", str(options.threads), *(["--quick"] if options.quick else [])]
    answer = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=own_pages()).stdout
    memory, duration = json.loads(answer.splitlines()[-1])
    return memory, duration


# The tables

def main(argv=None):
    parser = argparse.ArgumentParser(prog="run.py bench --pvdm", description=__doc__.split("\n\n")[1])
    parser.add_argument("--steps", type=int, default=2, help="runs of each piece that are timed")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads; default 1")
    parser.add_argument("--quick", action="store_true", help="small networks and frames of 64x64: seconds, and no "
                        "figure that means anything")
    parser.add_argument("--piece", choices=MEASURED, help=argparse.SUPPRESS)     # measured in this process
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    case = QUICK if options.quick else FULL
    if options.piece:
        print(json.dumps(measured(MEASURED[options.piece](case, Factory()), options.steps)))
        return 0
    report(case, {name: in_own_process(name, options) for name in MEASURED})
    return 0


def report(case: Case, found: dict[str, tuple[int, float]]) -> None:
    """Print the tables. found: bytes and seconds, by the names in MEASURED."""
    memory, times = ({name: pair[n] for name, pair in found.items()} for n in range(2))
    sides, frames = case.autoencoder.height, case.autoencoder.frames
    networks = (PlaneUNet(case.unet, META), Autoencoder(case.autoencoder, META),
                VoxelUNet(case.pixel_channels, case.unet, META))
    own, decoder, pixels = map(weights, networks)
    print(f"\n{sides}x{sides}, float32, CPU, {torch.get_num_threads()} threads. PVDM: {own / 1e6:.1f} million weights, "
          f"its autoencoder {decoder / 1e6:.1f}. Pixels: {pixels / 1e6:.1f}.\n")
    work = {name: make(case, META) for name, make in MEASURED.items()}
    small_flops = flops(work["small_pixel_step"])
    trust = memory["small_pixel_step"] / counted(work["small_pixel_step"])
    print("| piece | GFLOPs | seconds | peak memory beyond the weights |\n|---|---|---|---|")
    for title, name in (("a step of PVDM, 16 frames", "plane_step"), ("decoding 16 frames", "decode"),
                        (f"a step on pixels, 16 frames of {case.pixel_sides}x{case.pixel_sides}", "small_pixel_step")):
        print(f"| {title} | {flops(work[name]) / 1e9:.1f} | {times[name]:.2f} | {gigabytes(memory[name])} |")
    print(f"\nMemory measured by memory counted, for the step on pixels: {trust:.2f}\n")
    print("| video | PVDM: seconds, FLOPs, memory | pixels: seconds, FLOPs, memory | time | FLOPs | memory |\n"
          "|---|---|---|---|---|---|")
    own_memory = max(memory["plane_step"], memory["decode"]) + 4 * (own + decoder)
    for length in LENGTHS:
        following = length // frames - 1
        steps = FIRST + FOLLOWING * following
        large = pixel_step(case, META, length, sides)
        pixel_flops, pixel_memory = flops(large), counted(large) + 4 * pixels
        rate = times["small_pixel_step"] / small_flops
        ours = Cost(steps * times["plane_step"] + (following + 1) * times["decode"],
                    steps * flops(work["plane_step"]) + (following + 1) * flops(work["decode"]), own_memory)
        theirs = Cost(FIRST * pixel_flops * rate, FIRST * pixel_flops, pixel_memory)
        ratios = (theirs.seconds / ours.seconds, theirs.flops / ours.flops, theirs.memory / ours.memory)
        print(f"| {length} frames | {ours} | {theirs} | {' | '.join(f'{ratio:.1f} times' for ratio in ratios)} |")
    print(f"\nThe paper says up to {PAPER_TIME} times less time and {PAPER_MEMORY} times less memory, against other "
          "video models on one GPU.")


@dataclass(frozen=True)
class Cost:
    """Of a whole video."""

    seconds: float
    flops: float
    memory: float       # bytes, weights included

    def __str__(self) -> str:
        return f"{self.seconds:.0f} s, {self.flops / 1e12:.0f} T, {gigabytes(self.memory)}"


def gigabytes(size: float) -> str:
    return f"{size / 1e9:.2f} GB"
