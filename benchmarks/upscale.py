"""Memory of Video Upscale: `python run.py bench --upscale`.

The first table is measured on the CPU, in processes of their own, against the number of frames. It says what a piece
takes beyond what stays between pieces, how much stays (latents, small frames and noise of the whole video), and what
core's Save Video and Save Video File take to write the result. The networks are narrow, with random weights: 32
channels in place of the upscaler's 256 and of the VAE's 128. So the finding is how memory grows with frames, not its
size.

The second table is counted for the upscaler's own size in 16 bits with temporal layers (tensor_memory.py). It says
what the network takes on the GPU for a piece, and main memory for the whole video, against frames, their size, and
tiles.
"""

import argparse
import json
import subprocess
import sys
from collections import deque

import psutil
import torch

from ..nodes.host import for_benchmarks
from ..nodes.host.attach import attach_layers
from ..nodes.host.decoding import Decoding
from ..nodes.host.layer_weights import build_stack
from ..nodes.host.lazy_video import LazyVideo
from ..nodes.host.options import PREFIX, LayerSet, clip_options, transformer_options
from ..nodes.host.sampling import SamplerSettings
from ..nodes.host.upscaling import upscale
from ..nodes.upscale import FACTOR, decode_settings
from ..temporal.call import CallSettings, open_call
from ..temporal.decoder import SVD_KERNEL, DecoderParams
from ..temporal.layers import Factory
from ..temporal.new_layers import video_ldm_params
from ..temporal.stack import TemporalStack
from ..temporal.upscaler import plan_pieces
from .decode import PACK, RUN, STREAM, card_and_main, consume
from .memory import growth, own_pages
from .speed import fill
from .tensor_memory import (
    CARD,
    DTYPE,
    FRAMES,
    MAIN,
    X4,
    X4_HEADS,
    X4_TEXT,
    DecodingOnShapes,
    count_bytes,
    x4_decoder,
    x4_layers,
    x4_unet,
)

OVERLAP, LEVEL = 2, 30
COUNTS = (16, 64, 256)
SMALL = (16, 32)                            # height and width of the small frames while their number grows
SIZES = ((256, 256), (512, 512), (1024, 1024), (1280, 2048))        # of the large frames
GROWN = (512, 512)                          # of the large frames while their number grows
TILES = (1024, 512, 256, 0)                 # of the large frames; the node's default first
SAMPLING = "sampling"
CHANNELS = 32                               # of the networks that run on the CPU
NARROW = dict(X4, model_channels=CHANNELS)


def main(argv=None):
    parser = argparse.ArgumentParser(prog="run.py bench --upscale", description=__doc__.split("\n\n")[0])
    parser.add_argument("--frames", type=int, nargs="+", default=COUNTS)
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)      # the child: what, frames
    options = parser.parse_args(argv)
    for_benchmarks.hide_progress_bars()
    if options.measure:
        print(json.dumps(measure(options.measure[0], int(options.measure[1]))))
        return 0
    report_frames(options.frames)
    report_counted(options.frames)
    return 0


# Measured: small networks on the CPU

def report_frames(counts):
    height, width = (FACTOR * side for side in SMALL)
    print(f"CPU, {torch.get_num_threads()} threads, U-Net and VAE of {CHANNELS} channels, frames of {width}x{height}, "
          f"windows of {FRAMES} that share {OVERLAP}\n\n| frames | a piece | rests between pieces | of it latents | "
          f"{STREAM} | {PACK} |\n|{'---|' * 6}", flush=True)
    for frames in counts:
        sampling, *files = (child(what, frames) for what in (SAMPLING, STREAM, PACK))
        cells = [sampling["piece"], sampling["rest"], sampling["latents"], *(file["peak"] for file in files)]
        print(f"| {frames} | {' | '.join(f'{cell / 1e6:.1f} MB' for cell in cells)} |", flush=True)


def child(what: str, frames: int) -> dict:
    print(f"{what}: {frames} frames ...", file=sys.stderr, flush=True)
    command = [sys.executable, str(RUN), "_inside", "benchmarks.upscale", "--measure", what, str(frames)]
    answer = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=own_pages()).stdout
    return json.loads(answer.splitlines()[-1])


@torch.inference_mode()
def measure(what: str, frames: int) -> dict:
    """Bytes that the work takes beyond what is there before it."""
    if what == SAMPLING:
        return measure_sampling(frames)
    vae = small_vae()
    write(vae, FRAMES, what)                # what is loaded and planned only once is not measured
    latents = torch.randn(frames, 4, *SMALL)
    return {"peak": growth(lambda: write(vae, frames, what, latents))}


def measure_sampling(frames: int) -> dict:
    """piece: the most that a call of the network takes. rest: the most that is in memory before such a call."""
    model, pieces, resting, process = with_layers(small_model()), [], [], psutil.Process()

    def watched(executor, *arguments):
        out = []
        resting.append(process.memory_info().rss)
        pieces.append(growth(lambda: out.append(executor(*arguments))))
        return out[0]
    for_benchmarks.wrap_conditions(model, "bench", watched)
    sample(model, torch.rand(FRAMES, *SMALL, 3), 0)
    before = process.memory_info().rss
    pieces.clear()
    resting.clear()
    small = torch.rand(frames, *SMALL, 3)
    latents = sample(model, small, 0)
    return {"piece": max(pieces), "rest": max(resting) - before, "latents": latents.nbytes}


def sample(model, small: torch.Tensor, tile: int, steps: int = 1) -> torch.Tensor:
    """Latents of the large frames, as the node makes them. small: `t h w 3`. tile: pixels of the large frames."""
    frames, height, width = small.shape[:3]
    cuts = plan_pieces(frames, height, width, FRAMES, OVERLAP, tile // FACTOR)
    text = [[torch.randn(1, 77, X4_TEXT), {}]]
    return upscale(model, small, LEVEL, cuts, 1, SamplerSettings(steps, 8.0, "euler", "normal", text, text))


def write(vae, frames: int, how: str, latents=None):
    latents = torch.randn(frames, 4, *SMALL) if latents is None else latents
    decoding = Decoding(vae, latents, decode_settings(vae, FRAMES, OVERLAP, TILES[0]))
    consume(LazyVideo(decoding.frames, frames, decoding.width, decoding.height, 8), how)


def small_model(config=NARROW, dtype=torch.float32, device="cpu"):
    """A MODEL of core's class for the x4 upscaler with random weights; by default with few channels."""
    model = for_benchmarks.x4_upscaler(config, dtype, device)
    fill(model.model.diffusion_model.named_parameters())
    return model


def with_layers(model, dtype=torch.float32):
    """The model with random temporal layers, on its own device."""
    unet, device = model.model.diffusion_model, model.load_device
    params = video_ldm_params(unet, 4 * unet.model_channels, X4_TEXT, lambda channels: X4_HEADS, FRAMES)
    shapes = {key: weight.shape for key, weight in TemporalStack(params, Factory(device=CARD)).state_dict().items()}
    tensors = {key: torch.empty(shape, dtype=dtype, device=device) for key, shape in shapes.items()}
    fill(tensors.items())
    return attach_layers(model, build_stack(params, tensors, dtype), LayerSet(params, "random layers"))


SMALL_VAE = DecoderParams(4, CHANNELS, (1, 1, 2), 1, SVD_KERNEL)       # 4 pixels per latent


def small_vae(shape=SMALL_VAE, dtype=None):
    """A VAE of core's class with random weights, in a type that core might not choose."""
    config = {**shape.config()}
    network = for_benchmarks.image_autoencoder(config)
    fill(network.named_parameters())
    return for_benchmarks.vae_of(network, config, shape.factor, dtype)


# Counted: the upscaler's own size

def report_counted(counts):
    vae, decoder = small_vae(), x4_decoder()
    print(f"\nThe x4 upscaler with temporal layers, 16 bits, windows of {FRAMES} that share {OVERLAP}, guidance: "
          "graphics card + main memory, counted\n\n"
          "| size | tile | frames | sampling | main memory / latents | decoding |\n"
          f"|{'---|' * 6}", flush=True)
    grown = [(*GROWN, TILES[0], frames) for frames in counts]
    sizes = [(*size, tile, 2 * FRAMES - OVERLAP) for size in SIZES for tile in TILES if tile < max(size)]
    for row in grown + sizes:
        print(counted_row(vae, decoder, *row), flush=True)


def counted_row(vae, decoder, height: int, width: int, tile: int, frames: int) -> str:
    latents = torch.zeros(frames, 4, height // FACTOR, width // FACTOR)
    small = torch.zeros(frames, height // FACTOR, width // FACTOR, 3)
    model = sized_model()
    sampling = count_bytes(lambda: sample(model, small, tile))
    decoding = count_bytes(lambda: decode(vae, decoder, latents, tile))
    return (f"| {width}x{height} | {tile or 'none'} | {frames} | {card_and_main(sampling)} | "
            f"{sampling[MAIN] / latents.nbytes:.1f} | {card_and_main(decoding)} |")


def sized_model():
    """A MODEL in whose place the upscaler's own U-Net runs on shapes, with temporal layers.

    A shape runs only once, because a piece leaves nothing behind.
    """
    model, unet = small_model(), x4_unet()
    stack, shapes = x4_layers(unet), set()
    # So that frames have noise of their own.
    transformer_options(model)[f"{PREFIX}counted"] = LayerSet(stack.params, "random layers")

    def on_shapes(executor, x, timesteps, context, y, control, options, **others):
        if x.shape not in shapes:
            shapes.add(x.shape)
            text = context.to(CARD, DTYPE)
            with open_call(unet, [(stack, CallSettings(clip_options(options).frames or len(x)))], text):
                unet(x.to(CARD, DTYPE), timesteps.to(CARD), text, y.to(CARD), transformer_options={})
        return torch.zeros_like(x[:, :4])
    for_benchmarks.wrap_network(model, "bench", on_shapes)
    return model


def decode(vae, network, latents: torch.Tensor, tile: int):
    decoding = DecodingOnShapes(network, vae, latents, decode_settings(vae, FRAMES, OVERLAP, tile))
    deque(decoding.frames(), maxlen=1)
