"""Small CameraCtrl files, and MODELs with a camera on them.

tests/fixtures/cameractrl.json holds the names and shapes of a small file, pose lines, and what the published code
computes from them: the rays, the encoder's features, and two motion modules into which they are merged. Of each it has
every 97th number.
"""

import json
from pathlib import Path

import torch

from video_ldm.nodes.camera_motion import CameraMotion
from video_ldm.tests.host import checkpoints
from video_ldm.tests.sparse_help import weights

RECORDED = json.loads((Path(__file__).parent / "fixtures" / "cameractrl.json").read_text())
PE = ".pos_encoder.pe"
FILE, MOTION = "camera.safetensors", "motion_v3.safetensors"


def recorded_file() -> dict:
    """The file that the published code ran: two levels of 32 and 64 channels, without its tables of positions."""
    return weights({key: shape for key, shape in RECORDED["shapes"].items() if not key.endswith(PE)})


def tables(value=None) -> dict:
    """The file's tables of frame positions: the sinusoid, or another number in each place."""
    from video_ldm.temporal.layers import interleaved_sinusoid
    found = {key: interleaved_sinusoid(*shape[1:])[None] for key, shape in RECORDED["shapes"].items()
             if key.endswith(PE)}
    return {key: table if value is None else torch.full_like(table, value) for key, table in found.items()}


def nested(tensors: dict) -> dict:
    """The same tensors as the authors' file has them: in two dictionaries, with other things beside."""
    found: dict = {"epoch": 3, "global_step": 7}
    for key, tensor in tensors.items():
        outer, name = key.split(".", 1)
        found.setdefault(outer, {})[name] = tensor
    return found


def flat(tensors: dict) -> dict:
    """The same as in the pruned file: without the names of the dictionaries."""
    return {key.split(".", 1)[1]: tensor for key, tensor in tensors.items()}


def shapes_for_unet() -> dict:
    """Names and shapes of a file for checkpoints.UNET: one level of 320 channels, with one motion module and two."""
    stem = "temporal_transformer.transformer_blocks.0.attention_blocks.0.processor.qkv_merge"
    shapes = {key.split(".", 1)[1]: [320 if size in (32, 64) else 2560 if size in (256, 512) else
                                     1280 if size == 128 else size for size in shape]
              for key, shape in RECORDED["shapes"].items() if "_blocks.1." not in key and not key.endswith(PE)
              and "attention_processor" not in key}
    for place in ("down_blocks.0.motion_modules.0", "up_blocks.0.motion_modules.0", "up_blocks.0.motion_modules.1"):
        shapes |= {f"{place}.{stem}.weight": [320, 320], f"{place}.{stem}.bias": [320]}
    return shapes


def write_for_unet(path, dtype: torch.dtype = torch.float32, change=dict) -> None:
    """Write a file for checkpoints.UNET. change: of its tensors, before they are saved."""
    checkpoints.save(path, checkpoints.as_type(change(weights(shapes_for_unet())), dtype))


def v3_state(**options) -> dict:
    """A file like AnimateDiff v3's for checkpoints.UNET: motion modules, and none in the middle."""
    return {key: value for key, value in checkpoints.motion_state(**options).items() if "mid_block" not in key}


def with_camera(model, poses: str = "0: pan 0\n-1: pan 30, forward 1", strength: float = 1.0, file: str = FILE,
                move: str = "still", amount: float = 1.0):
    return CameraMotion.execute(model, file, move, amount, strength, poses).result[0]
