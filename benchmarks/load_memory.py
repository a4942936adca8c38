"""Memory that loading takes: `python run.py bench --load`.

It is the peak of what the process holds, beyond what it holds before, as a multiple of the file's size. Private memory
counts, and so do pages of the file that the process has mapped. The file has the names of LaVie's base network and
random weights. Load Video Model makes a MODEL of it. Load Temporal Layers reads its temporal layers alone. Convert
Temporal File writes it as safetensors.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

from ..nodes.host import conversion
from ..nodes.host.layer_weights import build_stack
from ..nodes.host.models import load_image_model
from ..nodes.host.sockets import Model
from ..nodes.host.video_network import load_video_network
from ..temporal.families import load_temporal, load_video_model
from ..temporal.formats.safetensors_files import write_tensors
from ..temporal.formats.video_network import VideoNetwork
from ..temporal.stack import TemporalStack
from .memory import growth, own_pages

ROOT = Path(__file__).resolve().parents[1]
WARM_UP = ROOT / "models" / "demo" / "image.safetensors"     # what is loaded and planned only once is not measured
BOUNDS = {".pt": 1.3, ".safetensors": 1.1}


def main(argv=None):
    parser = argparse.ArgumentParser(prog="run.py bench --load", description=__doc__.split("\n\n")[0])
    parser.add_argument("--divisor", type=int, default=2, help="divides the published numbers of channels; 1: the "
                        "published file of 3.6 GB, written twice to a temporary folder. Default: 2")
    parser.add_argument("--measure", nargs="+", help=argparse.SUPPRESS)     # in a process of its own: files
    options = parser.parse_args(argv)
    if not (ROOT / "tests").is_dir():       # the registry's copy of the pack has no tests
        print("This needs the names of the published file. They are in tests/: run it in a checkout of the repository.")
        return 1
    if options.measure:
        print(json.dumps([measured(Path(file)) for file in options.measure]))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        files = write_files(Path(folder), options.divisor)
        print(f"{files[0].stat().st_size / 1e9:.2f} GB, float32, on a CPU: peak of memory by the file's size\n\n"
              f"| file | bound | {' | '.join(WORK)} |\n|{'---|' * (2 + len(WORK))}", flush=True)
        for file, ratios in zip(files, ratios_of(files)):
            cells = [f"{ratios[name]:.2f}" for name in WORK]
            print(f"| {file.suffix} | {BOUNDS[file.suffix]} | {' | '.join(cells)} |", flush=True)
    return 0


def write_files(folder: Path, divisor: int) -> list[Path]:
    """Random files of LaVie's base network, as a torch file and as a safetensors file."""
    from ..tests.formats_help import PUBLISHED
    from ..tests.network_help import drawn
    shapes = {key: divided(key, shape, divisor) for key, shape in PUBLISHED["lavie_base"].items()}
    source = np.random.RandomState(0)

    def weights() -> Iterator[tuple[str, torch.Tensor]]:
        return ((key, drawn(key, shape, source)) for key, shape in shapes.items())
    files = [folder / f"lavie_base{ending}" for ending in BOUNDS]
    write_tensors(files[1], {key: (torch.float32, shape) for key, shape in shapes.items()}, weights(), {})
    with safe_open(str(files[1]), framework="pt") as file:
        torch.save({"ema": {key: file.get_tensor(key).clone() for key in shapes}}, files[0])
    return files


def divided(key: str, shape: tuple[int, ...], divisor: int) -> tuple[int, ...]:
    """A tensor's shape in a network with fewer channels. The text keeps its width."""
    if key.endswith("relative_attention_bias.weight"):      # it has a column for each head
        return shape[0], max(1, shape[1] // divisor)
    return tuple(size // divisor if size % 320 == 0 else size for size in shape)


def ratios_of(files: list[Path]) -> list[dict[str, float]]:
    """For each file, the peak of memory by the file's size, by the names in WORK. Measured in a process of its own."""
    command = [sys.executable, str(ROOT / "run.py"), "_inside", "benchmarks.load_memory", "--measure",
               *map(str, files)]
    answer = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
                            env=own_pages()).stdout
    return json.loads(answer.splitlines()[-1])


def measured(file: Path) -> dict[str, float]:
    """The ratios of one file. They are measured in this process."""
    made: list = [load_image_model(WARM_UP)]
    ratios = {}
    for name, work in WORK.items():
        ratios[name] = growth(partial(keep, made, work, file)) / file.stat().st_size
        made.clear()
    return ratios


def keep(made: list, work: Callable[[Path], Any], file: Path) -> None:
    made.append(work(file))


def load_whole(file: Path) -> Model:
    network = load_video_model(file)
    assert isinstance(network, VideoNetwork)
    return load_video_network(network)


def load_layers(file: Path) -> TemporalStack:
    layers = load_temporal(file)
    return build_stack(layers.params, layers.tensors, torch.float32)


def convert(file: Path) -> Any:
    with tempfile.TemporaryDirectory(dir=file.parent) as folder:
        return conversion.convert(file, Path(folder) / "converted.safetensors", lambda share: None)


WORK = {"Load Video Model": load_whole, "Load Temporal Layers": load_layers, "Convert Temporal File": convert}
