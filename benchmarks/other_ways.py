"""Other ways to compute the parts of temporal layers: `python run.py bench --ways`.

Each part is computed as the pack does it today, and in other ways with the same result. The table has the time of each
way as a ratio to today's, the bytes that it moves, and how far its result is off. On a GPU it runs in bfloat16 on clips
of 512x512, else in float32 on small ones. A way that this machine does not have is listed with the reason.

A way becomes the pack's own only where a GPU is faster with it and a CPU is not slower.
"""

import argparse
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..nodes.host.layer_weights import host_attention
from ..temporal.layers import (
    Attention,
    Factory,
    GivenCall,
    Mix,
    MotionParams,
    ResBlockParams,
    TransformerParams,
)
from .speed import CONTEXT_DIM, EMB_DIM, HEADS, TOKENS, fill, seconds
from .traffic import FusedAttention, Traffic

TODAY, COMPILED, GRAPH = "as today", "torch.compile", "CUDA graph"
COLUMNS = ("part", "way", "time", "ratio", "moves", "largest difference")
LEVELS = ((320, 1), (640, 2), (1280, 4))        # channels, and how many times smaller than the latents
CLIPS = 2                                       # with and without the prompt
BACKENDS = {"flash attention": SDPBackend.FLASH_ATTENTION, "memory-efficient attention": SDPBackend.EFFICIENT_ATTENTION,
            "cuDNN's attention": SDPBackend.CUDNN_ATTENTION, "attention in parts": SDPBackend.MATH}
# Both are one kernel on a GPU. They compute in float32 and round once.
GATED = """template <typename T> T gated(T x, T gate) {
    const float g = static_cast<float>(gate);
    return static_cast<T>(static_cast<float>(x) * 0.5f * g * (1.0f + erff(g * 0.70710678f)));
}"""
MIXED = """template <typename T> T mixed(T spatial, T temporal, T share) {
    const float s = static_cast<float>(spatial), a = static_cast<float>(share);
    return a == 0.0f ? spatial : static_cast<T>(s + a * (static_cast<float>(temporal) - s));
}"""

Work = Callable[[], Tensor]


@dataclass(frozen=True)
class Size:
    """What the parts run on."""

    channels: int
    side: int               # height and width of the features
    frames: int
    device: str
    dtype: torch.dtype

    def random(self, *shape: int) -> Tensor:
        return torch.randn(*shape, device=self.device, dtype=self.dtype)

    @property
    def features(self) -> Tensor:
        """`(b t) c h w`."""
        return self.random(CLIPS * self.frames, self.channels, self.side, self.side)

    @property
    def tokens(self) -> Tensor:
        """`(b t) s c`."""
        return self.random(CLIPS * self.frames, self.side ** 2, self.channels)

    @property
    def make(self) -> Factory:
        return Factory(dtype=self.dtype, device=self.device, attention=host_attention)


@dataclass(frozen=True)
class Part:
    """A part of the layers, and the ways to compute it."""

    name: str
    ways: dict[str, Work]       # the first is today's


# The ways

def attention_over_frames(size: Size) -> Part:
    """x + attention of the frames of each pixel, x `(b t) s c`."""
    x, layer = size.tokens, filled(Attention(size.channels, HEADS, None, size.make))
    frames = size.frames

    def copied(attend: Callable[[Tensor], Tensor] = layer) -> Tensor:
        pixels = rearrange(x, "(b t) s c -> (b s) t c", t=frames)
        return x + rearrange(attend(pixels), "(b s) t c -> (b t) s c", s=x.shape[1])

    def strided(attend: Callable[..., Tensor]) -> Tensor:
        """q, k and v stay in the layout of x. Attention reads them with strides, clip by clip."""
        q, k, v = (rearrange(to(x), "(b t) s (h d) -> b s h t d", t=frames, h=HEADS)
                   for to in (layer.to_q, layer.to_k, layer.to_v))
        out = torch.stack([rearrange(attend(*clip), "s h t d -> t s (h d)") for clip in zip(q, k, v)])
        return x + layer.to_out(out.flatten(0, 1))

    def chosen(backend: SDPBackend) -> Tensor:
        with sdpa_kernel(backend):
            return strided(F.scaled_dot_product_attention)
    return Part("attention over frames", {
        TODAY: copied, "strides, PyTorch's choice": partial(strided, F.scaled_dot_product_attention),
        "strides, matrix products": partial(strided, products),
        **{f"strides, {name}": partial(chosen, backend) for name, backend in BACKENDS.items()}})


def products(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention `s h t d` as two matrix products and a softmax."""
    return (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1) @ v


def convolution_over_frames(size: Size) -> Part:
    """A convolution (3, 1, 1) of x `(b t) c h w`, over t."""
    x, frames, side = size.features, size.frames, size.side
    weight, bias = size.random(size.channels, size.channels, 3, 1, 1) / size.channels, size.random(size.channels)
    before, here, after = (weight[:, :, place, 0, 0] for place in range(3))

    def convolved_3d() -> Tensor:
        out = F.conv3d(rearrange(x, "(b t) c h w -> b c t h w", t=frames), weight, bias, padding=(1, 0, 0))
        return rearrange(out, "b c t h w -> (b t) c h w")

    def convolved_2d(layout: torch.memory_format = torch.contiguous_format) -> Tensor:
        clip = rearrange(x, "(b t) c h w -> b c t (h w)", t=frames).contiguous(memory_format=layout)
        out = F.conv2d(clip, weight[..., 0].contiguous(memory_format=layout), bias, padding=(1, 0))
        return rearrange(out, "b c t (h w) -> (b t) c h w", h=side)

    def three_products() -> Tensor:
        clip = rearrange(x, "(b t) c h w -> b t c (h w)", t=frames)
        out = here @ clip
        out[:, 1:] += before @ clip[:, :-1]
        out[:, :-1] += after @ clip[:, 1:]
        return rearrange(out.add_(bias[:, None]), "b t c (h w) -> (b t) c h w", h=side)

    def one_product() -> Tensor:
        clip = F.pad(rearrange(x, "(b t) c h w -> b t c (h w)", t=frames), (0, 0, 0, 0, 1, 1))
        three = torch.cat([clip[:, place:place + frames] for place in range(3)], dim=2)
        out = torch.cat([before, here, after], dim=1) @ three + bias[:, None]
        return rearrange(out, "b t c (h w) -> (b t) c h w", h=side)
    return Part("convolution over frames", {
        TODAY: convolved_3d, "2-D": convolved_2d, "2-D, channels last": partial(convolved_2d, torch.channels_last),
        "three matrix products": three_products, "one matrix product": one_product})


def gate(size: Size) -> Part:
    """What a feed-forward does between its linear layers: gelu(gate) * x."""
    wide = size.random(CLIPS * size.frames, size.side ** 2, 8 * size.channels)

    def today() -> Tensor:
        x, gated = wide.chunk(2, dim=-1)
        return F.gelu(gated).mul_(x)
    return Part("gate of a feed-forward", {TODAY: today, COMPILED: lambda: compiled(today)(),
                                           "one kernel": lambda: kernel(GATED)(*wide.chunk(2, dim=-1))})


def mix(size: Size) -> Part:
    """The mix with the spatial features."""
    spatial, temporal, layer = size.features, size.features, Mix(1, size.make)

    def today() -> Tensor:
        return layer(spatial, temporal, size.frames)

    def one_kernel() -> Tensor:
        share = torch.sigmoid(-layer.mix_factor.float()).to(size.dtype)
        return kernel(MIXED)(spatial, temporal, share)
    return Part("mix", {TODAY: today, COMPILED: lambda: compiled(today)(), "one kernel": one_kernel})


def norm(size: Size) -> Part:
    """The norm of a clip before a convolution over t, with its SiLU."""
    clip = rearrange(size.features, "(b t) c h w -> b c t h w", t=size.frames)
    layer = size.make.group_norm(size.channels)

    def today() -> Tensor:
        return F.silu(layer(clip))
    return Part("norm and SiLU of a clip", {TODAY: today, "SiLU in place": lambda: F.silu(layer(clip), inplace=True),
                                            COMPILED: lambda: compiled(today)()})


def whole_layer(size: Size, name: str, params, x: Tensor) -> Part:
    """A layer whole: compiled, and as a recorded graph of its kernels."""
    layer = filled(params.build(size.make))
    call = GivenCall(size.frames, emb=size.random(CLIPS * size.frames, EMB_DIM),
                     text=size.random(CLIPS, TOKENS, CONTEXT_DIM))

    def today() -> Tensor:
        return layer(x, call)
    return Part(name, {TODAY: today, COMPILED: lambda: compiled(today)(), GRAPH: lambda: recorded(today)()})


def parts(size: Size) -> Iterator[Part]:
    """All parts, made when they are asked for: each has large tensors of its own."""
    for make in (attention_over_frames, convolution_over_frames, gate, mix, norm):
        yield make(size)
    c = size.channels
    yield whole_layer(size, "AnimateDiff's motion module", MotionParams(c, HEADS), size.features)
    yield whole_layer(size, "Video LDM's convolutions", ResBlockParams(c, EMB_DIM, 1), size.features)
    yield whole_layer(size, "Video LDM's attention", TransformerParams(c, HEADS, CONTEXT_DIM, 1), size.tokens)


def filled(layer: nn.Module) -> nn.Module:
    fill(layer.named_parameters())
    return layer.requires_grad_(False).eval()


@cache
def compiled(work: Work) -> Work:
    return torch.compile(work, dynamic=False)


@cache
def kernel(code: str) -> Callable[..., Tensor]:
    """An elementwise kernel from this C++ text. Only CUDA has them."""
    if not torch.cuda.is_available():
        raise RuntimeError("needs CUDA")
    return torch.cuda.jiterator._create_jit_fn(code)


@cache
def recorded(work: Work) -> Work:
    """A function that runs the kernels of `work` again, launched as one."""
    if not torch.cuda.is_available():
        raise RuntimeError("needs CUDA")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = work()

    def again() -> Tensor:
        graph.replay()
        return out
    return again


# Measuring

@dataclass(frozen=True)
class Row:
    """What was found of one way."""

    part: str
    way: str
    seconds: float = 0.0
    ratio: float = 0.0          # to today's time, the median of pairs that alternate
    bytes: int = 0              # read and written; 0: not counted
    difference: float = 0.0     # the largest from today's result, as a share of that one's largest number
    missing: str = ""           # why this machine does not have this way

    @property
    def cells(self) -> tuple[str, ...]:
        if self.missing:
            return self.part, self.way, "-", "-", "-", f"not here: {self.missing}"
        moved = f"{self.bytes / 1e6:.0f} MB" if self.bytes else "-"
        return (self.part, self.way, f"{1000 * self.seconds:.2f} ms", f"{self.ratio:.2f}", moved,
                f"{self.difference:.1e}")


@torch.inference_mode()
def measure(part: Part, pairs: int, left_out: tuple[str, ...] = ()) -> Iterator[Row]:
    today = part.ways[TODAY]
    wanted = today()
    for name, work in part.ways.items():
        if name in left_out:
            continue
        try:
            difference = (work() - wanted).abs().max() / wanted.abs().max()     # the warm-up too
            times = [(seconds(today, wanted.device.type), seconds(work, wanted.device.type)) for _ in range(pairs)]
        except Exception as error:      # every kind that PyTorch's backends have of their own
            yield Row(part.name, name, missing=str(error).strip().splitlines()[0][:80])
            continue
        yield Row(part.name, name, statistics.median(after for _, after in times),
                  statistics.median(after / before for before, after in times),
                  0 if name in (COMPILED, GRAPH, "one kernel") else moved(work), float(difference))


def moved(work: Work) -> int:
    """Bytes that the operations read and write. Attention counts as one."""
    with Traffic() as traffic, FusedAttention(traffic):
        work()
    return traffic.total


def main(argv: list[str] | None = None) -> int:
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(prog="run.py bench --ways", description=__doc__.split("\n\n")[1])
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--size", type=int, default=64 if on_gpu else 8, help="height and width of the latents")
    parser.add_argument("--pairs", type=int, default=20 if on_gpu else 5, help="of runs, alternating with today's way")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    options = parser.parse_args(argv)
    device, dtype = ("cuda", torch.bfloat16) if on_gpu else ("cpu", torch.float32)
    for channels, smaller in LEVELS:
        size = Size(channels, max(1, options.size // smaller), options.frames, device, dtype)
        where = torch.cuda.get_device_name() if on_gpu else f"CPU, {torch.get_num_threads()} threads"
        print(f"\n{where}, torch {torch.__version__}, {str(dtype).removeprefix('torch.')}: {CLIPS} clips of "
              f"{size.frames} frames, {channels} channels, {size.side}x{size.side}\n")
        print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}")
        for part in parts(size):
            for row in measure(part, options.pairs, (COMPILED,) if options.no_compile else ()):
                print(f"| {' | '.join(row.cells)} |", flush=True)
        for made in (compiled, recorded):       # they hold the tensors of this size
            made.cache_clear()
    return 0
