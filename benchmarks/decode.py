"""Working memory of Temporal VAE Decode on the CPU: `python run.py bench --decode`.

What a decode takes at its peak beyond the weights, the latents and the frames it returns, each in a process of its own:
against the number of frames, as a stream into a file and as an IMAGE; beside it the same frames in one window, which is
how a temporal decoder runs where nothing limits it; then against the size of the frames, in tiles. A temporal decoder
of the bundled autoencoder's size with random layers; `--channels 128` is Stable Video Diffusion's width.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch

from ..demo.decoder import params
from ..nodes.host.decoding import Decoding, DecodeSettings
from ..nodes.host.lazy_video import LazyVideo
from ..nodes.host.models import AutoencoderParams, build_autoencoder, vae_of
from ..nodes.host.temporal_vae import build_decoder, with_temporal_decoder
from ..temporal.formats import DecoderFile
from .memory import growth, own_pages

RUN = Path(__file__).resolve().parent.parent / "run.py"
WINDOW, OVERLAP, TILE = 8, 2, 256
FRAMES = (16, 64, 256)
SIZE = (64, 128)                            # height and width while frames grow
SIZES = ((256, 256), (512, 512), (720, 1280), (1280, 2048))
STREAM, IMAGE, WHOLE = "stream", "image", "one window"


def main(argv=None):
    parser = argparse.ArgumentParser(prog="run.py bench --decode", description=__doc__.split("\n\n")[0])
    parser.add_argument("--channels", type=int, default=32, help="of the finest level; 128 is Stable Diffusion's")
    parser.add_argument("--frames", type=int, nargs="+", default=FRAMES)
    parser.add_argument("--measure", nargs=5, help=argparse.SUPPRESS)      # the child: how, frames, height, width, tile
    options = parser.parse_args(argv)
    if options.measure:
        how, *numbers = options.measure
        print(json.dumps(measure(how, *map(int, numbers), options.channels)))
        return 0
    report(options)
    return 0


def report(options):
    """Print both tables."""
    height, width = SIZE
    print(f"CPU, {torch.get_num_threads()} threads, {options.channels} channels, frames of {width}x{height}, windows "
          f"of {WINDOW} that share {OVERLAP}\n\n| frames | {STREAM} into MP4 | as IMAGE | in {WHOLE} |\n"
          "|---|---|---|---|")
    for frames in options.frames:
        peaks = [child(how, frames, height, width, 0, options.channels) for how in (STREAM, IMAGE, WHOLE)]
        print(f"| {frames} | {' | '.join(map(megabytes, peaks))} |", flush=True)
    print(f"\nA window of {WINDOW} frames, streamed, in tiles of {TILE} pixels\n\n| size | peak |\n|---|---|")
    for height, width in SIZES:
        peak = child(STREAM, WINDOW, height, width, TILE, options.channels)
        print(f"| {width}x{height} | {megabytes(peak)} |", flush=True)


def megabytes(size: int) -> str:
    return f"{size / 1e6:.0f} MB"


def child(how: str, *numbers: int) -> int:
    *settings, channels = map(str, numbers)
    print(f"{how}: {' '.join(settings)} ...", file=sys.stderr, flush=True)
    command = [sys.executable, str(RUN), "_inside", "benchmarks.decode", "--channels", channels, "--measure", how]
    command += settings
    answer = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=own_pages()).stdout
    return json.loads(answer.splitlines()[-1])


def measure(how: str, frames: int, height: int, width: int, tile: int, channels: int) -> int:
    """Bytes that one decode takes beyond what is there before it and what it returns."""
    vae = random_vae(channels)
    window = frames if how == WHOLE else WINDOW
    decode(vae, STREAM, WINDOW, 64, 64, 0, WINDOW)      # what is loaded and planned once is not counted
    returned = frames * height * width * 12 if how == IMAGE else 0
    return growth(lambda: decode(vae, how, frames, height, width, tile, window)) - returned


def decode(vae, how: str, frames: int, height: int, width: int, tile: int, window: int):
    latents = torch.randn(frames, 4, height // 8, width // 8)
    decoding = Decoding(vae, latents, DecodeSettings(window, OVERLAP, tile, 1))
    video = LazyVideo(decoding.frames, frames, decoding.width, decoding.height, 8)
    with torch.inference_mode():
        if how == IMAGE:
            return video.get_components().images
        with tempfile.TemporaryDirectory() as folder:
            return video.save_to(str(Path(folder) / "clip.mp4"))


def random_vae(channels: int):
    """ComfyUI's VAE with a temporal decoder, random weights, of the bundled autoencoder's shape at another width."""
    torch.manual_seed(0)
    shape = replace(params(), channels=channels)
    about = AutoencoderParams(shape.latent_channels, channels, shape.channel_mult, shape.num_res_blocks)
    vae = vae_of(build_autoencoder(about).state_dict(), about)
    decoder = build_decoder(shape)
    decoder.load_state_dict(vae.first_stage_model.decoder.state_dict(), strict=False)
    file = DecoderFile("random", "random", "random", shape, decoder.state_dict(), {}, "none", 1)
    return with_temporal_decoder(vae, file)
