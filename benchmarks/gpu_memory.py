"""Working memory on a GPU, measured: `python run.py bench --card`.

It is what Temporal VAE Decode and Video Upscale take at their peak, beyond the weights and what else lies on the GPU
before. Networks have their real sizes, random weights, and 16 bits. Beside each figure stands what tensor_memory.py
counts without a GPU. PyTorch's allocator is measured, so workspaces of convolutions are included. The count does not
see those.
"""

import argparse
import sys
import time
from collections import deque
from collections.abc import Sequence

import torch

from ..nodes.host import for_benchmarks
from ..nodes.host.decoding import DecodeSettings, Decoding
from ..nodes.host.lazy_video import LazyVideo
from ..nodes.host.temporal_vae import build_decoder, with_temporal_decoder
from ..nodes.upscale import FACTOR, decode_settings
from ..temporal.decoder import SVD_KERNEL, DecoderParams
from ..temporal.formats.decoder import DecoderFile
from . import decode, upscale
from .speed import fill
from .tensor_memory import CARD, FRAMES, SVD_DECODER, X4, X4_DECODER, count_bytes, svd_decoder, x4_decoder

OVERLAP, CLIP, STEPS = 2, 14, 2             # a clip of two windows
COUNTS, GROWN = (16, 64, 256), (512, 512)   # of the decode; height and width while frames grow
SIZES = ((256, 256), (512, 512), (1024, 1024), (1280, 2048))
TILES = (0, 512)
UPSCALES = ((256, 256, 0, 16), (256, 256, 0, 64), (256, 256, 0, CLIP), (512, 512, 0, CLIP), (1024, 1024, 512, CLIP),
            (1024, 1024, 0, CLIP), (1280, 2048, 1024, CLIP))    # height, width, tile, frames
TINY, TINY_X4 = (DecoderParams(4, 32, mult, 1, SVD_KERNEL) for mult in ((1, 1, 1, 1), (1, 1, 1)))


def main(argv=None):
    parser = argparse.ArgumentParser(prog="run.py bench --card", description=__doc__.split("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer sizes and frames")
    parser.add_argument("--device", default="cuda", help=argparse.SUPPRESS)
    parser.add_argument("--tiny", action="store_true", help=argparse.SUPPRESS)      # does it run, on a CPU
    options = parser.parse_args(argv)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("There is no CUDA graphics card here, and this measures the memory of one.")
        return 1
    for_benchmarks.hide_progress_bars()
    counts: Sequence[int] = COUNTS
    sizes: Sequence[tuple[int, int]] = SIZES
    upscales: Sequence[tuple[int, int, int, int]] = UPSCALES
    if options.quick:
        counts, sizes, upscales = COUNTS[:2], SIZES[:2], UPSCALES[:4]
    if options.tiny:
        counts, sizes, upscales = (10,), ((64, 64),), ((64, 64, 0, 10), (64, 96, 64, 8))
    bench = Bench(options.device, options.tiny)
    name = torch.cuda.get_device_name() if bench.cuda else "CPU, nothing measured"
    print(f"{name}, {bench.dtype}, torch {torch.__version__}, windows of {FRAMES} that share {OVERLAP}; MB on the "
          "card: measured / counted", flush=True)
    bench.report_decode(counts, sizes, (64, 64) if options.tiny else GROWN)
    for_benchmarks.unload_models()
    bench.report_upscale(upscales)
    return 0


class Bench:
    def __init__(self, device: str, tiny: bool):
        self.device, self.tiny, self.cuda = torch.device(device), tiny, device == "cuda"
        self.dtype = torch.float16 if self.cuda else torch.float32

    def report_decode(self, counts, sizes, grown):
        vae, network = temporal_vae(TINY if self.tiny else SVD_DECODER, self.dtype), svd_decoder()

        def pair(frames, height, width, tile):
            def work(*numbers):
                return lambda: decode_clip(vae, DecodeSettings(FRAMES, OVERLAP, tile, 1), *numbers)
            measured = self.measured(work(FRAMES, 64, 64), work(frames, height, width))
            counted = megabytes_or_failure(lambda: decode.count_decode(vae, network, height, width, tile)[CARD])
            return f"{measured} / {counted}"
        print("\nTemporal VAE Decode, Stable Video Diffusion's decoder\n\n| size | frames | whole frames | a frame "
              f"takes |\n|{'---|' * 4}", flush=True)
        for frames in counts:
            cell = pair(frames, grown[0], grown[1], 0)
            print(f"| {grown[1]}x{grown[0]} | {frames} | {cell} | {1000 * self.seconds / frames:.0f} ms |", flush=True)
        print(f"\n| size, {CLIP} frames | whole frames | tile 512 |\n|{'---|' * 3}", flush=True)
        for height, width in sizes:
            cells = [pair(CLIP, height, width, tile) for tile in TILES]
            print(f"| {width}x{height} | {' | '.join(cells)} |", flush=True)

    def report_upscale(self, rows):
        """Print the table of Video Upscale. rows: (height, width, tile, frames)."""
        with torch.no_grad():
            model = upscale.small_model(upscale.NARROW if self.tiny else X4, self.dtype, self.device)
            model = upscale.with_layers(model, self.dtype)
            vae = upscale.small_vae(TINY_X4 if self.tiny else X4_DECODER, self.dtype)
        decoder = x4_decoder()
        print(f"\nVideo Upscale, the x4 upscaler with temporal layers, {STEPS} steps, guidance\n\n| size | tile | "
              f"frames | sampling | a step takes | decoding |\n|{'---|' * 6}", flush=True)
        for row in rows:
            print(self.upscale_row(model, vae, decoder, *row), flush=True)

    def upscale_row(self, model, vae, decoder, height: int, width: int, tile: int, frames: int) -> str:
        """A row of the table: measured and counted."""
        small = torch.rand(frames, height // FACTOR, width // FACTOR, 3)
        latents = small.new_zeros(frames, 4, *small.shape[1:3])
        sampling = self.measured(lambda: upscale.sample(model, small[:FRAMES, :16, :16], 0),
                                 lambda: upscale.sample(model, small, tile, STEPS))
        step, settings = self.seconds / STEPS, decode_settings(vae, FRAMES, OVERLAP, tile)
        decoding = self.measured(lambda: decode_clip(vae, settings, 1, 64, 64),
                                 lambda: decode_clip(vae, settings, frames, height, width))
        shapes = upscale.sized_model()
        counted_sampling = megabytes_or_failure(
            lambda: count_bytes(lambda: upscale.sample(shapes, small, tile))[CARD])
        counted_decoding = megabytes_or_failure(
            lambda: count_bytes(lambda: upscale.decode(vae, decoder, latents, tile))[CARD])
        return (f"| {width}x{height} | {tile or 'none'} | {frames} | {sampling} / {counted_sampling} | {step:.2f} s | "
                f"{decoding} / {counted_decoding} |")

    def measured(self, warm, work) -> str:
        """The memory of `work()` in MB, and in self.seconds its time. warm() is the same in small; it loads weights."""
        self.seconds = float("nan")
        return megabytes_or_failure(lambda: self.peak(warm, work))

    @torch.inference_mode()
    def peak(self, warm, work) -> int:
        warm()
        for_benchmarks.empty_cache()
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        before, began = torch.cuda.memory_allocated(), time.perf_counter()
        work()                          # its result is in main memory, so the card has finished
        self.seconds = time.perf_counter() - began
        print(f"weights and the like: {before / 1e6:.0f} MB, {self.seconds:.1f} s", file=sys.stderr, flush=True)
        return torch.cuda.max_memory_allocated() - before


def megabytes_or_failure(work) -> str:
    """The bytes that `work()` returns, in MB. Where it fails the cell says so, and the table goes on."""
    try:
        return f"{work() / 1e6:.0f}"
    except Exception as error:
        print(error, file=sys.stderr, flush=True)
        return f"failed: {type(error).__name__}"


def decode_clip(vae, settings: DecodeSettings, frames: int, height: int, width: int):
    """Decode a whole stream. Only its last piece is kept."""
    factor = vae.spacial_compression_decode()
    decoding = Decoding(vae, torch.randn(frames, 4, height // factor, width // factor), settings)
    video = LazyVideo(decoding.frames, decoding.count, decoding.width, decoding.height, 8)
    deque(video.pieces(), maxlen=1)
    if decoding.tile != settings.tile:
        raise MemoryError       # it continued in smaller tiles, which is another row of the table


@torch.no_grad()
def temporal_vae(shape: DecoderParams, dtype: torch.dtype):
    """A VAE with a temporal decoder, both with random weights."""
    decoder = build_decoder(shape)
    fill(decoder.named_parameters())
    file = DecoderFile("random", "random", "random", shape, decoder.state_dict(), {}, "none", 1)
    return with_temporal_decoder(upscale.small_vae(shape, dtype), file)
