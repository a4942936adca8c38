"""Time per frame of decoding, upscaling and writing: `python run.py bench --per-frame`.

1. How many frames the network computes for those of a video, counted: what windows share is computed twice.
2. Temporal VAE Decode beside core's VAE Decode.
3. Video Upscale beside the same number of single pictures through the same network.
4. Writing a file: the whole against the sum of its parts, making the frames and encoding them.

The networks are narrow, with random weights. What is compared alternates in one process, and a ratio is the median over
rounds: other load on the machine then falls on both. Decoding and upscaling are seconds of the processor, and writing,
where two threads work side by side, is seconds of the clock.
"""

import argparse
import statistics
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..nodes.host.decoding import DecodeSettings, Decoding
from ..nodes.host.lazy_video import LazyVideo
from ..nodes.host.pixels import frame_bytes
from ..nodes.host.sampling import SamplerSettings
from ..nodes.host.upscaling import upscale
from ..temporal.upscaler import PiecePlan, plan_pieces
from ..temporal.video import KINDS, write_video
from ..temporal.windows import window_slices
from .decode import image_vae, random_vae
from .upscale import LEVEL, X4_TEXT, small_model, with_layers

DECODE, UPSCALE = (12, 4), (8, 2)       # frames of a window and of the overlap: the usual ones of both nodes
FRAMES = (16, 64, 113, 256)             # lengths that are counted
MEASURED = 16                           # frames that are timed, which makes 2 windows and 3
SIZE = (64, 128)                        # height and width of the decoded frames
SMALL = (16, 24)                        # of the frames that are upscaled
WRITTEN = (256, 448)                    # height and width of the frames that are written
ROUNDS = 3
WRITING, WRITING_FORMATS = "writing", ("mp4", "webm", "png")
Work = Callable[[], Any]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="run.py bench --per-frame", description=__doc__.split("\n\n")[0])
    parser.add_argument("--frames", type=int, default=MEASURED, help="that are timed")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--parts", nargs="+", choices=(*TIMED, WRITING), default=(*TIMED, WRITING))
    options = parser.parse_args(argv)
    report_counted()
    print(f"\nCPU, {torch.get_num_threads()} threads, {options.frames} frames, median of {options.rounds} rounds\n")
    with torch.inference_mode():
        for part, works in TIMED.items():
            if part in options.parts:
                report(part, options.frames, alternating(works(options.frames), options.rounds, time.process_time))
        if WRITING in options.parts:
            report_writing(2 * options.frames, options.rounds)
    return 0


# Counted

def computed(frames: int, window: int, overlap: int | None) -> int:
    """How many frames the network computes for a video of this length. overlap None: frames do not see each other."""
    return sum(span.stop - span.start for span in window_slices(frames, window, overlap))


def least(frames: int, window: int, overlap: int) -> int:
    """What as many windows take that share exactly this overlap."""
    return frames + (len(window_slices(frames, window, overlap)) - 1) * overlap


def report_counted() -> None:
    print(f"\nframes that are computed (factor), counted\n\n| frames | {' | '.join(map(str, FRAMES))} |\n"
          f"|{'---|' * (len(FRAMES) + 1)}")
    for title, (window, overlap) in (("Temporal VAE Decode", DECODE), ("Video Upscale with layers", UPSCALE)):
        counts = [computed(frames, window, overlap) for frames in FRAMES]
        cells = [f"{count} ({count / frames:.2f})" for count, frames in zip(counts, FRAMES)]
        print(f"| {title}, windows of {window} that share {overlap} or more | {' | '.join(cells)} |")
        print(f"| an overlap of exactly {overlap} | "
              f"{' | '.join(str(least(frames, window, overlap)) for frames in FRAMES)} |")
    cells = [f"{count} ({count / frames:.2f})" for count, frames in ((computed(n, 8, None), n) for n in FRAMES)]
    print(f"| a plain VAE, Video Upscale without layers | {' | '.join(cells)} |", flush=True)


# Timed

def alternating(works: Mapping[str, Work], rounds: int,
                clock: Callable[[], float] = time.perf_counter) -> dict[str, list[float]]:
    """Seconds of each work in each round. What is planned and loaded only once is not timed."""
    for work in works.values():
        work()
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds):
        for name, work in works.items():
            seconds[name].append(timed(work, clock))
    return seconds


def timed(work: Work, clock: Callable[[], float] = time.perf_counter) -> float:
    began = clock()
    work()
    return clock() - began


def ratio(seconds: list[float], base: list[float]) -> float:
    return statistics.median(own / other for own, other in zip(seconds, base, strict=True))


def report(title: str, frames: int, seconds: dict[str, list[float]]) -> None:
    """The first work is what the others are compared with."""
    base = next(iter(seconds.values()))
    print(f"\n| {title.capitalize()} | ms a frame | ratio |\n|---|---|---|")
    for name, own in seconds.items():
        print(f"| {name} | {statistics.median(own) / frames * 1000:.1f} | {ratio(own, base):.2f} |", flush=True)


def decoding(frames: int) -> dict[str, Work]:
    plain, temporal = image_vae(32), random_vae(32)
    z = torch.randn(frames, 4, SIZE[0] // 8, SIZE[1] // 8)

    def decode(vae: Any, window: int, overlap: int) -> Work:
        return lambda: deque(Decoding(vae, z, DecodeSettings(window, overlap, 0, 1)).frames(), maxlen=0)
    factor = computed(frames, *DECODE) / frames
    return {"core's VAE Decode": lambda: plain.decode(z),
            "Temporal VAE Decode, plain VAE": decode(plain, *DECODE),
            "the temporal decoder, all frames at once": decode(temporal, frames, 0),
            f"the temporal decoder in windows, {factor:.2f} frames a frame": decode(temporal, *DECODE)}


def upscaling(frames: int) -> dict[str, Work]:
    alone = small_model()
    layered = with_layers(small_model())
    small = torch.rand(frames, *SMALL, 3)
    text = [[torch.randn(1, 77, X4_TEXT), {}]]
    settings = SamplerSettings(1, 8.0, "euler", "normal", text, text)

    def run(model: Any, images: Tensor, overlap: int | None) -> Tensor:
        return upscale(model, images, LEVEL, cuts_of(images, UPSCALE[0], overlap), 1, settings)
    factor = computed(frames, *UPSCALE) / frames
    return {"single pictures, one after the other": lambda: [run(alone, image, None) for image in small.split(1)],
            "Video Upscale without layers": lambda: run(alone, small, None),
            "with layers, all frames at once": lambda: upscale(layered, small, LEVEL, cuts_of(small, frames, 0), 1,
                                                               settings),
            f"with layers in windows, {factor:.2f} frames a frame": lambda: run(layered, small, UPSCALE[1])}


def cuts_of(images: Tensor, window: int, overlap: int | None) -> PiecePlan:
    frames, height, width, _ = images.shape
    return plan_pieces(frames, height, width, window, overlap, 0)


TIMED = {"decoding": decoding, "upscaling": upscaling}


# Writing

def report_writing(frames: int, rounds: int) -> None:
    """The whole, as a share of the sum of its parts. A window is waited for, as for a graphics card."""
    height, width = WRITTEN
    pictures = smooth(frames, height, width)
    print(f"\n| Writing {frames} frames of {width}x{height}, fastest of {rounds} | making, ms a frame | encoding "
          f"| both, as written | share of the sum | the longer part's share |\n|{'---|' * 6}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for format in WRITING_FORMATS:
            held = [frame_bytes(picture) for picture in pictures]
            seconds = min(timed(partial(write, folder, held, format)) for _ in range(3)) / frames
            video = LazyVideo(waited_for(pictures, seconds), frames, width, height, 8)
            making, encoding, both = (min(own) / frames * 1000
                                      for own in parts(video, folder, format, rounds).values())
            print(f"| {format} | {making:.1f} | {encoding:.1f} | {both:.1f} | {both / (making + encoding):.2f} | "
                  f"{max(making, encoding) / (making + encoding):.2f} |", flush=True)


def parts(video: LazyVideo, folder: str, format: str, rounds: int) -> dict[str, list[float]]:
    """Seconds of making the frames, of encoding them, and of both as a node does it, in each round."""
    bits = KINDS[format].frame_bits
    held = list(video.iterate_frames(bits=bits))
    return alternating({"making": lambda: deque(video.iterate_frames(bits=bits), maxlen=0),
                        "encoding": lambda: write(folder, held, format),
                        "both": lambda: write(folder, video.iterate_frames(bits=bits), format)}, rounds)


def write(folder: str, frames: Iterable[np.ndarray], format: str) -> None:
    with tempfile.TemporaryDirectory(dir=folder) as empty:
        write_video(Path(empty) / "clip", frames, 8, format)


def waited_for(pictures: Tensor, seconds: float) -> Callable[[int, int], Iterator[Tensor]]:
    """Makes frames window by window. A window takes this long for each frame, and no time of the processor."""
    def make(first: int, last: int) -> Iterator[Tensor]:
        for piece in pictures[first:last].split(UPSCALE[0]):
            time.sleep(seconds * len(piece))
            yield piece
    return make


def smooth(frames: int, height: int, width: int) -> Tensor:
    """IMAGE of moving colours with a little noise, which costs an encoder about what a video does."""
    grid = torch.stack(torch.meshgrid(torch.linspace(0, 9, height), torch.linspace(0, 16, width), indexing="ij"))
    waves = [torch.stack([(grid[0] + 0.2 * n).sin(), (grid[1] - 0.3 * n).sin(), (grid.sum(0) + 0.1 * n).sin()], -1)
             for n in range(frames)]
    return (torch.stack(waves) / 2 + 0.5 + 0.02 * torch.randn(frames, height, width, 3)).clamp(0, 1)
