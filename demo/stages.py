"""What the stages of `train-demo` share: a training that resumes, data that one process prepares, and bundled files."""

import json
import time

import numpy as np
import torch
from safetensors.torch import save_file

from ..temporal.atomic import write_atomically
from ..temporal.training.distributed import rank
from ..temporal.training.loop import Loop
from . import models, world


def train(stage, files, modules, loss, arguments):
    """Run or resume one Loop, then write its averaged weights to files.weights(stage). Returns its last figures."""
    about = models.stage(stage)
    if files.weights(stage).exists() and not (files.folder / stage).exists():
        return "taken from the bundle"
    loop = Loop(about.loop, modules, loss, files.folder / stage, about.title)
    limit = arguments.max_minutes
    if not loop.run(max_seconds=None if limit is None else limit * 60):
        raise SystemExit(f"{about.title}: stopped at step {loop.step} of {about.loop.steps}; run again to go on.")
    weights = {f"{name}.{key}": tensor.contiguous() for name in modules for key, tensor in loop.ema_state(name).items()}
    if rank() == 0:
        write_atomically(files.weights(stage), lambda temporary: save_file(weights, temporary))
    last = json.loads(loop.log.read_text(encoding="utf-8").splitlines()[-1])
    numbers = ", ".join(f"{key} {value:.4g}" for key, value in last.items() if key not in ("step", "lr", "seconds"))
    return f"step {loop.step}, {numbers}, trained {loop.seconds:.0f} s in all"


def seeded(stage, build):
    """Build a network with the initial weights that belong to a stage."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(models.stage(stage).loop.seed)
        return build()


def frozen(network, weights):
    network.load_state_dict(weights)
    return network.requires_grad_(False).eval()


def prepare(make, path, *arguments):
    """Call `make` in the first process if `path` is missing. Return when the file is there."""
    if rank() == 0 and not path.exists():
        make(*arguments)
    while not path.exists():
        time.sleep(1)


def save_array(path, array):
    with open(path, "wb") as file:      # np.save would append .npy to the temporary name
        np.save(file, array)


def halved(tensors: dict) -> dict:
    return {key: tensor.to(torch.float16).contiguous() for key, tensor in tensors.items()}


def notes(stage, clips=None):
    """Where a file's weights come from. clips: how many drives it was trained on, if not those of most stages."""
    about = models.stage(stage)
    return {"title": f"Video LDM demo: {about.title}", "author": "video-ldm", "licence_note": models.LICENCE,
            "trained_on": f"procedural driving world, seeds 0 to {(clips or models.TRAIN_CLIPS) - 1}",
            "held_out_seeds": f"{world.HELD_OUT} and up", "steps": about.loop.steps, "seed": about.loop.seed,
            "batch": about.batch, "size": f"{models.WIDTH}x{models.HEIGHT}"}
