"""Checkpoints of a training run: safetensors with a JSON header. They hold no pickle and are never half written.

`last.safetensors` is complete in itself: its header holds the JSON state. `last.json` repeats that state for people and
scripts. Nothing is read back from it, because two files cannot be replaced in one go.
"""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..atomic import write_atomically, write_text
from ..errors import VideoLDMError

FORMAT = "video_ldm_training"


def save_checkpoint(path, tensors: dict[str, Tensor], state: dict) -> None:
    """Write named tensors and a JSON-able `state` to `path` (.safetensors), and `state` to the .json beside it."""
    text = json.dumps(state, indent=1)
    header = {"format": FORMAT, "state": text}
    # One copy on the CPU, each tensor with storage of its own: safetensors refuses shared or strided memory.
    tensors = {name: t.detach().to("cpu", copy=True).contiguous() for name, t in tensors.items()}
    write_atomically(path, lambda temporary: save_file(tensors, temporary, metadata=header))
    write_text(Path(path).with_suffix(".json"), text)


def load_checkpoint(path) -> tuple[dict[str, Tensor], dict]:
    """(tensors, state) of a checkpoint. VideoLDMError where the file is damaged or something else."""
    try:
        with safe_open(str(path), framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError) as error:
        raise VideoLDMError(f"The checkpoint '{path}' cannot be read: it is damaged or incomplete ({error}). Restore "
                            "it from a copy, or delete it to train from the start.") from error
    if header.get("format") != FORMAT:
        raise VideoLDMError(f"'{path}' is a safetensors file but not a checkpoint of this training. Use an empty "
                            "folder, or the folder of the run to be resumed.")
    return tensors, json.loads(header["state"])


def load_into(target: dict[str, Tensor], tensors: dict[str, Tensor], prefix: str, path) -> None:
    """Copy `tensors[prefix + name]` into each tensor of the dict `target`. Names and shapes must agree."""
    stored = {name[len(prefix):]: t for name, t in tensors.items() if name.startswith(prefix)}
    for name in sorted(stored.keys() ^ target.keys()):
        where = "the checkpoint but not in the model" if name in stored else "the model but not in the checkpoint"
        raise VideoLDMError(f"'{path}' belongs to another model: '{prefix}{name}' is in {where}. Train in another "
                            "folder, or delete the checkpoint to train from the start.")
    for name, tensor in target.items():
        if stored[name].shape != tensor.shape:
            raise VideoLDMError(f"'{path}' belongs to another model: '{prefix}{name}' is {tuple(stored[name].shape)} "
                                f"in it and {tuple(tensor.shape)} here. Train in another folder.")
    with torch.no_grad():
        for name, tensor in target.items():
            tensor.copy_(stored[name])
