"""What temporal layers cost: `python run.py bench`.

It compares a step of a clip with temporal layers to a step of the same batch of images without. The UNet has Stable
Diffusion 1.5's size and random weights. The figures are time, FLOPs, and peak memory of the step beyond the weights.
Steps with and without layers alternate in one process, and the ratio is the median over pairs: other load on the
machine then falls on both.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from ..nodes.host import for_benchmarks
from ..nodes.host.layer_weights import build_stack
from ..temporal.call import CallSettings, open_call
from ..temporal.families import animatelcm_i2v, pia
from ..temporal.families.makeavid_sd import CONVOLUTION_SLOTS
from ..temporal.layers import (
    BrickParams,
    ClipTransformerParams,
    Factory,
    FrameAttentionParams,
    FrameConvParams,
    FrameResidualParams,
    MotionParams,
    RotaryParams,
    StagedConvParams,
    WeightedConvParams,
    WeightedTransformerParams,
)
from ..temporal.new_layers import video_ldm_params
from ..temporal.params import StackParams
from ..temporal.picture_input import GivenPicture
from ..temporal.reference_attention import KNOWN_ATTENTION, TRANSFORMER_EPS
from ..temporal.slots import Site, unet_sites
from ..temporal.sparse_control import LATENTS, SparseControlParams
from ..temporal.spatial_changes import POOLED_NORMS, SPARSE_CAUSAL, SpatialChange
from ..temporal.stack import TemporalStack
from .memory import growth, own_pages

RUN = Path(__file__).resolve().parent.parent / "run.py"
EMB_DIM, CONTEXT_DIM, HEADS, TOKENS = 1280, 768, 8, 77
SD15 = dict(image_size=32, in_channels=4, out_channels=4, model_channels=320, num_res_blocks=[2, 2, 2, 2],
            channel_mult=(1, 2, 4, 4), transformer_depth=[1, 1, 1, 1, 1, 1, 0, 0],
            transformer_depth_output=[1] * 9 + [0] * 3, transformer_depth_middle=1, num_heads=HEADS,
            context_dim=CONTEXT_DIM, use_spatial_transformer=True, use_linear_in_transformer=False, legacy=False)
IMAGES, MOTION, VIDEO_LDM = "images", "AnimateDiff v2", "Video LDM"
LAVIE, LAVIE_X4, MODELSCOPE = "LaVie", "LaVie interpolation", "ModelScope"
MUSEV, MAKEAVID = "MuseV", "makeavid-sd"
SPARSE, PIA, ANIMATELCM_I2V = "SparseCtrl", "PIA", "AnimateLCM-I2V"
SETS = (MOTION, VIDEO_LDM, LAVIE, LAVIE_X4, MODELSCOPE, MUSEV, MAKEAVID, SPARSE, PIA, ANIMATELCM_I2V)
MOTION_MODULES = (MOTION, SPARSE, PIA, ANIMATELCM_I2V)
# Diffusers' motion adapters, Lightning and AnimateLCM are AnimateDiff v2's modules with other weights
WITHOUT_MIDDLE = (SPARSE, PIA)          # their motion modules are those of AnimateDiff v3
POSITIONS = {ANIMATELCM_I2V: 64}        # 32 in the other motion modules
LEVELS = (320, 640, 1280, 1280)         # channels
# The blocks of Stable Diffusion 1.5's network without attention to text: there ModelScope and MuseV have no transformer
# over t
WITHOUT_TEXT = {("input", 10), ("input", 11), ("output", 0), ("output", 1), ("output", 2)}
HEAD_WIDTH, FIRST_WIDTH = 64, 512       # of ModelScope's attentions; channels inside its first transformer
COLUMNS = ("layers", "step without", "step with", "time ratio", "FLOP ratio", "time / FLOPs",
           "peak without", "peak with", "peak ratio")


@dataclass(frozen=True)
class Case:
    """What is measured."""
    device: str
    dtype: torch.dtype
    size: int           # height and width of the latents
    frames: int

    @property
    def title(self):
        where = torch.cuda.get_device_name() if self.device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
        return (f"{where}, {str(self.dtype).removeprefix('torch.')}, {self.frames} frames, "
                f"latents {self.size}x{self.size} ({8 * self.size}x{8 * self.size} pixels)")


def main(argv=None):
    parser = argparse.ArgumentParser(prog="run.py bench", description=__doc__.split("\n\n")[1])
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--size", type=int, default=16, help="height and width of the latents on the CPU (GPU: 64)")
    parser.add_argument("--pairs", type=int, default=5, help="steps with and without layers, alternating")
    parser.add_argument("--threads", type=int, help="CPU threads; torch's own number by default")
    parser.add_argument("--sets", nargs="+", choices=SETS, default=SETS, metavar="SET", help=f"of {SETS}")
    parser.add_argument("--memory-of", choices=(IMAGES, *SETS), help=argparse.SUPPRESS)     # the child of `cpu_peaks`
    options = parser.parse_args(argv)
    if options.threads:
        torch.set_num_threads(options.threads)
    case = Case("cpu", torch.float32, options.size, options.frames)
    if options.memory_of:
        print(json.dumps(resident_growth(case, options.memory_of)))
        return 0
    report(case, options, cpu_peaks(options))       # first: a child's high-water mark can begin at its parent's
    if torch.cuda.is_available():
        report(Case("cuda", torch.bfloat16, 64, options.frames), options, {})
    return 0


def report(case: Case, options, peaks: dict):
    """Measure every set of layers in a case and print its table. peaks: bytes by name, measured here on a GPU."""
    print(f"\n{case.title}, {options.pairs} pairs\n", flush=True)
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}", flush=True)
    unet, inputs = build_unet(case), batch(case)
    base_flops = flops(unet, None, inputs, case)
    for name in options.sets:
        stack, control = build_layers(unet, name, case), build_control(name, case)
        flop_ratio = flops(unet, stack, inputs, case, control) / base_flops         # the warm-up too
        alone, layered = partial(step, unet, None, inputs, case), partial(step, unet, stack, inputs, case, control)
        pairs = [(seconds(alone, case.device), seconds(layered, case.device)) for _ in range(options.pairs)]
        if case.device == "cuda":
            peaks = {IMAGES: allocated(unet, None, inputs, case), name: allocated(unet, stack, inputs, case, control)}
        without, with_layers = (statistics.median(times) for times in zip(*pairs))
        ratio = statistics.median(after / before for before, after in pairs)
        row = (name, f"{without:.3f} s", f"{with_layers:.3f} s", f"{ratio:.2f}", f"{flop_ratio:.2f}",
               f"{ratio / flop_ratio:.2f}", gigabytes(peaks[IMAGES]), gigabytes(peaks[name]),
               f"{peaks[name] / peaks[IMAGES]:.2f}")
        print(f"| {' | '.join(row)} |", flush=True)
        del stack, control, layered


def gigabytes(size: int) -> str:
    return f"{size / 1e9:.2f} GB"


# Networks

def build_unet(case: Case):
    """ComfyUI's own UNet at Stable Diffusion 1.5's size."""
    unet = for_benchmarks.unet_of(SD15, case.dtype, case.device)
    fill(unet.named_parameters())
    return unet.requires_grad_(False).eval()


def build_layers(unet, name: str, case: Case) -> TemporalStack:
    """A set of temporal layers as Load Temporal Layers builds it, on ComfyUI's operations and attention."""
    params = params_of(unet, name, case.frames)
    tensors = {key: torch.empty(weight.shape, dtype=case.dtype)
               for key, weight in TemporalStack(params, Factory(device="meta")).state_dict().items()}
    fill(tensors.items())
    return build_stack(params, tensors, case.dtype).to(case.device)


def params_of(unet, name: str, frames: int) -> StackParams:
    """The published layers of that name, with their changes of the spatial network."""
    if name == VIDEO_LDM:
        return video_ldm_params(unet, EMB_DIM, CONTEXT_DIM, lambda channels: HEADS, frames)
    found = ((site, brick_at(name, site, channels)) for site, (_, channels) in unet_sites(unet).items())
    bricks = tuple((site, brick) for site, brick in found if brick is not None)
    pictured = {PIA: pia.facts_for(LEVELS[0]), ANIMATELCM_I2V: animatelcm_i2v.facts_for(LEVELS)}
    changes: dict[str, tuple[SpatialChange, ...]] = {LAVIE: (POOLED_NORMS,), LAVIE_X4: (POOLED_NORMS, SPARSE_CAUSAL),
                                                     MUSEV: (KNOWN_ATTENTION,),
                                                     MAKEAVID: (POOLED_NORMS, TRANSFORMER_EPS),
                                                     **{other: facts.spatial for other, facts in pictured.items()}}
    return StackParams(name, bricks, frames, POSITIONS.get(name, 32) if name in MOTION_MODULES else None,
                       changes.get(name, ()), frame_width=EMB_DIM if name == MUSEV else 0,
                       picture=pictured[name].picture if name in pictured else None)


def brick_at(name: str, site: Site, channels: int) -> BrickParams | None:
    """The layer that a published set has at a site. None: it has none there."""
    transformer = ClipTransformerParams(channels, channels // HEAD_WIDTH, channels)
    numbered = WeightedTransformerParams(channels, HEADS, EMB_DIM)
    bricks: dict[str, dict[str, BrickParams]] = {
        **{other: {"post_attn": MotionParams(channels, HEADS)} for other in MOTION_MODULES},
        LAVIE: {"in_attn_pre_ff": RotaryParams(channels, HEADS)},
        LAVIE_X4: {"in_attn_post_ff": FrameAttentionParams(channels, HEADS)},
        MODELSCOPE: {"post_res": StagedConvParams(channels), "post_attn": transformer,
                     "post_conv_in": ClipTransformerParams(channels, FIRST_WIDTH // HEAD_WIDTH, FIRST_WIDTH)},
        MUSEV: {"post_res": WeightedConvParams(channels), "post_attn": numbered, "post_conv_in": numbered},
        MAKEAVID: {"in_attn_pre_ff": FrameResidualParams(channels, HEADS),
                   **{slot: FrameConvParams(channels) for slot in CONVOLUTION_SLOTS}},
    }
    without_text = site.slot == "post_attn" and (site.part, site.index) in WITHOUT_TEXT
    if name in (MODELSCOPE, MUSEV) and without_text or name in WITHOUT_MIDDLE and site.part == "middle":
        return None
    return bricks[name].get(site.slot)


def sparse_params(frames: int) -> SparseControlParams:
    """The published SparseCtrl for pictures (RGB)."""
    first, second, third, fourth = LEVELS
    channels = (*[first] * 4, *[second] * 3, *[third] * 3, *[fourth] * 2)
    motion = tuple((block, MotionParams(channels[block], HEADS, attentions=1)) for block in (1, 2, 4, 5, 7, 8, 10, 11))
    return SparseControlParams(LATENTS, 4, 4, channels, fourth, motion, frames=frames)


def build_control(name: str, case: Case) -> Any:
    """SparseCtrl's network with random weights, for the set with that name. None for others."""
    if name != SPARSE:
        return None
    network = for_benchmarks.sparse_control_of(sparse_params(case.frames), SD15, case.dtype, case.device)
    if case.device != "meta":
        fill(network.named_parameters())
    return network.requires_grad_(False).eval()


@torch.no_grad()
def fill(weights):
    """Random weights that keep activations finite. They are made in place, so that peak memory does not show them."""
    for name, weight in weights:
        if weight.ndim > 1:
            bound = (3 / weight[0].numel()) ** 0.5
            weight.uniform_(-bound, bound)
        else:
            weight.fill_(float(name.endswith("weight")))


def batch(case: Case):
    """Latents, timesteps and text of one clip."""
    options = {"device": case.device, "dtype": case.dtype}
    x = torch.randn(case.frames, 4, case.size, case.size, **options)
    context = torch.randn(1, TOKENS, CONTEXT_DIM, **options).repeat(case.frames, 1, 1)
    return x, torch.full((case.frames,), 500.0, device=case.device), context


# Measures of one step; stack None is the image model

@torch.no_grad()
def step(unet, stack, inputs, case: Case, control=None):
    """control: SparseCtrl's network, which sees frame 0."""
    x, timesteps, context = inputs
    layers = [(stack, settings_of(stack, x, case))] if stack is not None else []
    with open_call(unet, layers, context):
        if control is None:
            return unet(x, timesteps, context=context)
        known = torch.cat([x, torch.ones_like(x[:, :1])], dim=1)
        known[1:] = 0
        residuals, middle = control(known, timesteps, context, case.frames)
        return unet(x, timesteps, context=context, control={"output": residuals, "middle": [middle]})


def settings_of(stack, x, case: Case) -> CallSettings:
    """With frame 0 known, for layers that see known frames through the image model."""
    known = (0,) if KNOWN_ATTENTION in stack.params.spatial else ()
    picture = GivenPicture(x[:1], 0, tuple(range(case.frames)), case.frames) if stack.params.picture else None
    return CallSettings(case.frames, known_places=known, picture=picture)


def flops(unet, stack, inputs, case: Case, control=None) -> int:
    with FlopCounterMode(display=False) as counter:
        step(unet, stack, inputs, case, control)
    return counter.get_total_flops()


def seconds(work: Callable[[], Any], device: str) -> float:
    """Seconds of a piece of work. device: that computes it."""
    if device == "cpu":
        began = time.perf_counter()
        work()
        return time.perf_counter() - began
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    torch.cuda.synchronize()
    events[0].record()
    work()
    events[1].record()
    torch.cuda.synchronize()
    return events[0].elapsed_time(events[1]) / 1000


def allocated(unet, stack, inputs, case: Case, control=None) -> int:
    """Bytes of GPU memory that a step takes beyond the weights, at its peak."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step(unet, stack, inputs, case, control)
    return torch.cuda.max_memory_allocated() - before


def cpu_peaks(options) -> dict:
    """Bytes that a step takes beyond the weights, by name. Each runs in a process of its own, and nothing before it."""
    peaks = {}
    for name in (IMAGES, *options.sets):
        print(f"peak memory: {name} ...", file=sys.stderr, flush=True)
        command = [sys.executable, str(RUN), "_inside", "benchmarks.speed", "--memory-of", name,
                   "--size", str(options.size), "--frames", str(options.frames),
                   "--threads", str(torch.get_num_threads())]
        answer = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=own_pages()).stdout
        peaks[name] = json.loads(answer.splitlines()[-1])
    return peaks


def resident_growth(case: Case, name: str) -> int:
    """Bytes of resident memory that one step takes at most, beyond what the process holds before it."""
    unet, inputs = build_unet(case), batch(case)
    stack = build_layers(unet, name, case) if name != IMAGES else None
    control = build_control(name, case)
    return growth(lambda: step(unet, stack, inputs, case, control))
