"""Small SparseCtrl files, and MODELs with SparseCtrl on them.

tests/fixtures/sparsectrl.json holds the names and shapes of two small files, and residuals that the published code
computes for them: of each residual every 97th number, or every 293rd.
"""

import json
import re
from pathlib import Path

import torch

from video_ldm.nodes.longer import ContextFrames
from video_ldm.nodes.sparse_control import LoadSparseControl
from video_ldm.tests.formats_help import PUBLISHED
from video_ldm.tests.host import checkpoints

RECORDED = json.loads((Path(__file__).parent / "fixtures" / "sparsectrl.json").read_text())
KINDS = ("rgb", "scribble")


def wave(shape: tuple, number: int) -> torch.Tensor:
    """Numbers that every machine computes alike, as free as random ones, and spread as weights of this shape are."""
    count = torch.Size(shape).numel()
    angles = torch.arange(count, dtype=torch.float64) * 12.9898 + number * 78.233
    values = (2 * torch.frac((torch.sin(angles) * 43758.5453).abs()) - 1) * 3 ** 0.5
    return values.reshape(shape) * ((count // shape[0]) ** -0.5 if len(shape) > 1 else 0.2)


def ones(shape: tuple, number: int) -> torch.Tensor:
    """The same with a spread of 1."""
    values = wave(shape, number)
    return (values / values.std()).float()


def weights(shapes: dict, gain: float = 1.0) -> dict:
    """Weights of these shapes. gain: multiplies the last convolutions, whose results are the residuals."""
    found = {}
    for number, key in enumerate(sorted(shapes)):
        is_norm = "norm" in key and key.endswith("weight")
        last = key.startswith(("controlnet_down_blocks", "controlnet_mid_block"))
        found[key] = ((wave(tuple(shapes[key]), number) + is_norm) * (gain if last else 1)).float()
    return found


def recorded_file(kind: str) -> dict:
    """The file that the published code ran: two levels of 32 and 64 channels."""
    return weights(RECORDED[kind]["shapes"])


def shapes_for_unet(kind: str) -> dict:
    """Names and shapes of a file for checkpoints.UNET: the published file's first level, with one ResBlock.

    The middle has that level's 320 channels in place of 1280.
    """
    first = re.compile(r"(?:conv_in|time_embedding|controlnet_cond_embedding|controlnet_down_blocks\.[01])\."
                       r"|down_blocks\.0\.(?:resnets|attentions|motion_modules)\.0\.")
    shapes = {}
    for key, shape in PUBLISHED[f"ad_v3_sd15_sparsectrl_{kind}"].items():
        if "mid_block" in key:
            kept = 1 if key.endswith("time_emb_proj.weight") else None      # the width of the step's embedding
            shapes[key] = tuple(size // 4 if size >= 1280 and axis != kept else size for axis, size in enumerate(shape))
        elif first.match(key):
            shapes[key] = tuple(shape)
    return shapes


def write_for_unet(path, kind: str, dtype: torch.dtype = torch.float32, gain: float = 1.0, change=dict) -> None:
    """Write a file for checkpoints.UNET. change: of its tensors, before they are saved."""
    checkpoints.save(path, checkpoints.as_type(change(weights(shapes_for_unet(kind), gain)), dtype))


def with_sparse(model, file: str = "rgb.safetensors", strength: float = 1.0, **options):
    return LoadSparseControl.execute(model, file, strength, **options).result[0]


def with_known(model, frames: str = "0", **sources):
    """A MODEL with context frames. sources: latent, image or vae."""
    guidance = sources.pop("guidance", 1.0)
    return ContextFrames.execute(model, frames, guidance, **sources).result[0]
