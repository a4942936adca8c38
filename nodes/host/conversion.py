"""Convert Temporal File: the checks by ComfyUI's own network, the report, and the command.

The command is `python run.py convert IN OUT`.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from ...temporal import convert as converter
from ...temporal.convert import MARK, Converted, Told
from ...temporal.errors import VideoLDMError
from ...temporal.families.sparsectrl import SparseControlFile
from ...temporal.formats.pixel_upscaler import UpscalerFile
from ...temporal.formats.video_network import VideoNetwork
from . import sparse_control, upscaler_model, video_network


def convert(source: str | Path, target: str | Path, told: Told) -> Converted:
    """As temporal/convert.py, for files alone whose network ComfyUI can build."""
    return converter.convert(source, target, told, check)


def check(loaded: Any) -> None:
    """Raise VideoLDMError for a whole network that ComfyUI cannot build. loaded: what the file's loader returned."""
    if isinstance(loaded, VideoNetwork):
        video_network.model_config(loaded)
    elif isinstance(loaded, UpscalerFile):
        upscaler_model.unet_params(loaded)
    elif isinstance(loaded, SparseControlFile):
        sparse_control.sparse_network(loaded)


def report_of(done: Converted) -> str:
    """What the artist should know about a new file, one fact a line."""
    said = done.metadata.get
    lines = [f"{done.path.name}: {done.found.title}, {done.tensors} tensors, {done.path.stat().st_size / 1e9:.2f} GB.",
             f"Made from {said(f'{MARK}source')}, sha256 {said(f'{MARK}source_sha256')}. The weights are the same to "
             "the bit."]
    if done.left_out:
        parts = ", ".join(f"{name} ({count} tensors)" for name, count in done.left_out.items())
        lines.append(f"Left out, for this pack does not use it: {parts}. Keep the old file if you need it.")
    licence = said(f"{MARK}licence")
    lines.append(f"Licence: {licence}." if licence else "Licence: this pack does not know it. Its authors' page says "
                 "it.")
    if done.found.advice:
        lines.append(done.found.advice)
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="run.py convert")
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    options = parser.parse_args(argv)
    target = options.target / f"{options.source.stem}.safetensors" if options.target.is_dir() else options.target
    shown = [-1]

    def told(share: float) -> None:
        if int(10 * share) > shown[0]:
            shown[0] = int(10 * share)
            print(f"{10 * shown[0]} %", flush=True)
    try:
        done = convert(options.source, target, told)
    except VideoLDMError as error:
        print(error, file=sys.stderr)
        return 1
    print(report_of(done))
    return 0
