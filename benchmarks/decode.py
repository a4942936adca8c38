"""Working memory of Temporal VAE Decode on the CPU: `python run.py bench --decode`.

The first table says what a decode takes at its peak, beyond the weights, the latents and the frames that it returns.
Each figure comes from a process of its own. The columns are a stream into a file by core's Save Video and by Save
Video File, an IMAGE, and the same frames in one window, as a temporal decoder without windows would run. The decoder
has the bundled autoencoder's size and random layers; `--channels 128` is Stable Video Diffusion's width.

The second table is counted for Stable Video Diffusion's decoder in 16 bits (tensor_memory.py), against the size of the
frames, with and without tiles.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections import deque
from dataclasses import replace
from pathlib import Path

import torch

from ..demo.decoder import params
from ..nodes.host.decoding import DecodeSettings, Decoding
from ..nodes.host.lazy_video import LazyVideo
from ..nodes.host.models import AutoencoderParams, build_autoencoder, vae_of
from ..nodes.host.temporal_vae import build_decoder, with_temporal_decoder
from ..temporal.formats.decoder import DecoderFile
from ..temporal.video import Sheet, write_video
from .memory import growth, own_pages
from .tensor_memory import CARD, MAIN, DecodingOnShapes, count_bytes, svd_decoder

RUN = Path(__file__).resolve().parent.parent / "run.py"
WINDOW, OVERLAP, SHEET = 8, 2, 16        # frames of a window, of the overlap, of the contact sheet
FRAMES = (16, 64, 256)
SIZE = (64, 128)                            # height and width while frames grow
SIZES = ((256, 256), (512, 512), (1024, 1024), (1280, 2048))
TILES = (0, 512, 256)
STREAM, PACK, IMAGE, WHOLE = "Save Video", "Save Video File", "as IMAGE", "in one window"


def main(argv=None):
    parser = argparse.ArgumentParser(prog="run.py bench --decode", description=__doc__.split("\n\n")[0])
    parser.add_argument("--channels", type=int, default=32, help="of the finest level; 128 is Stable Diffusion's")
    parser.add_argument("--frames", type=int, nargs="+", default=FRAMES)
    parser.add_argument("--measure", nargs=4, help=argparse.SUPPRESS)      # the child: how, frames, height, width
    options = parser.parse_args(argv)
    if options.measure:
        how, frames, height, width = options.measure
        print(json.dumps(measure(how, int(frames), int(height), int(width), options.channels)))
        return 0
    report(options)
    return 0


def report(options):
    """Print both tables."""
    height, width = SIZE
    hows = (STREAM, PACK, IMAGE, WHOLE)
    print(f"CPU, {torch.get_num_threads()} threads, {options.channels} channels, frames of {width}x{height}, windows "
          f"of {WINDOW} that share {OVERLAP}\n\n| frames | {' | '.join(hows)} |\n|{'---|' * 5}", flush=True)
    for frames in options.frames:
        peaks = [child(how, frames, height, width, options.channels) for how in hows]
        print(f"| {frames} | {' | '.join(map(megabytes, peaks))} |", flush=True)
    report_sizes()


def report_sizes():
    """Print the table of sizes: two windows of frames each, with the network on shapes."""
    print(f"\nStable Video Diffusion's decoder, 16 bits, windows of {WINDOW}: graphics card + main memory, counted\n\n"
          f"| size | {' | '.join(f'tile {tile}' if tile else 'whole frames' for tile in TILES)} |\n"
          f"|{'---|' * (len(TILES) + 1)}", flush=True)
    vae, network = random_vae(32), svd_decoder()
    for height, width in SIZES:
        cells = [card_and_main(count_decode(vae, network, height, width, tile)) for tile in TILES]
        print(f"| {width}x{height} | {' | '.join(cells)} |", flush=True)


def count_decode(vae, network, height: int, width: int, tile: int) -> dict:
    """Bytes by device of a streamed decode of two windows."""
    decoding = DecodingOnShapes(network, vae, torch.zeros(2 * WINDOW - OVERLAP, 4, height // 8, width // 8),
                               DecodeSettings(WINDOW, OVERLAP, tile, 1))
    video = LazyVideo(decoding.frames, decoding.count, width, height, 8)
    return count_bytes(lambda: deque(video.pieces(), maxlen=1))


def megabytes(size: int) -> str:
    return f"{size / 1e6:.0f} MB"


def card_and_main(most: dict) -> str:
    return f"{most[CARD] / 1e9:.2f} + {most[MAIN] / 1e9:.2f} GB"


def child(how: str, *numbers: int) -> int:
    *settings, channels = map(str, numbers)
    print(f"{how}: {' '.join(settings)} ...", file=sys.stderr, flush=True)
    command = [sys.executable, str(RUN), "_inside", "benchmarks.decode", "--channels", channels, "--measure", how]
    command += settings
    answer = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=own_pages()).stdout
    return json.loads(answer.splitlines()[-1])


def measure(how: str, frames: int, height: int, width: int, channels: int) -> int:
    """Bytes that one decode takes, beyond what is there before and what it returns."""
    vae = random_vae(channels)
    window = frames if how == WHOLE else WINDOW
    decode(vae, STREAM, WINDOW, 64, 64, WINDOW)      # what is loaded and planned only once is not measured
    returned = frames * height * width * 12 if how == IMAGE else 0
    return growth(lambda: decode(vae, how, frames, height, width, window)) - returned


def decode(vae, how: str, frames: int, height: int, width: int, window: int):
    latents = torch.randn(frames, 4, height // 8, width // 8)
    decoding = Decoding(vae, latents, DecodeSettings(window, OVERLAP, 0, 1))
    consume(LazyVideo(decoding.frames, frames, decoding.width, decoding.height, 8), how)


@torch.inference_mode()
def consume(video: LazyVideo, how: str):
    """All frames at once, or written to a file as core's Save Video or the pack's writes them."""
    if how == IMAGE:
        return video.get_components().images
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clip.mp4"
        if how == PACK:
            return write_video(path, seen_by(Sheet(SHEET), video.iterate_frames()), 8)
        return video.save_to(str(path))


def seen_by(sheet: Sheet, frames):
    for frame in frames:
        sheet.add(frame)
        yield frame


def image_vae(channels: int):
    """ComfyUI's VAE with random weights: the bundled autoencoder's shape, another width."""
    torch.manual_seed(0)
    shape = replace(params(), channels=channels)
    about = AutoencoderParams(shape.latent_channels, channels, shape.channel_mult, shape.num_res_blocks)
    return vae_of(build_autoencoder(about).state_dict(), about)


def random_vae(channels: int):
    """The same VAE with a temporal decoder and random weights."""
    vae, shape = image_vae(channels), replace(params(), channels=channels)
    decoder = build_decoder(shape)
    decoder.load_state_dict(vae.first_stage_model.decoder.state_dict(), strict=False)
    file = DecoderFile("random", "random", "random", shape, decoder.state_dict(), {}, "none", 1)
    return with_temporal_decoder(vae, file)
