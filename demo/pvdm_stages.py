"""The stages of `train-demo` that train the demo's PVDM (demo/pvdm.py), and its two files of the bundle."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..temporal.atomic import write_atomically
from ..temporal.families import load_pvdm
from ..temporal.layers import Factory
from ..temporal.pvdm import Autoencoder, PlaneUNet, diffusion
from ..temporal.pvdm import files as pvdm_files
from ..temporal.training.distributed import pick_device
from ..temporal.training.planes import PlaneDiffusionLoss, StoredPlanes, encode
from . import data, models, pvdm
from .data import made, weights_of
from .features import to_clips
from .stages import frozen, halved, notes, prepare, save_array, seeded, train

FILES = {"pvdm-autoencoder": "video_ldm_driving_pvdm_autoencoder.safetensors",
         "pvdm-diffusion": "video_ldm_driving_pvdm.safetensors"}
KINDS = {"pvdm-autoencoder": pvdm_files.AUTOENCODER, "pvdm-diffusion": pvdm_files.DIFFUSION}
TRAINED = {"pvdm-autoencoder": "autoencoder", "pvdm-diffusion": "unet"}      # the trained module of each stage
ENCODED = 8                                 # videos that are encoded together
KNOWN = 0.4                                 # the share of clips that know the clip before


# Stages

def render(files, arguments):
    prepare(data.render_set, files.pvdm_frames, files.pvdm_frames, files.pvdm_boxes, pvdm.video, pvdm.CLIPS,
            2 * pvdm.AUTOENCODER.frames)
    return f"{pvdm.CLIPS} videos of {2 * pvdm.AUTOENCODER.frames} frames, {models.WIDTH}x{models.HEIGHT}"


def train_autoencoder(files, arguments):
    frames = np.load(made(files.pvdm_frames, "pvdm-render"), mmap_mode="r")
    network = seeded("pvdm-autoencoder", lambda: Autoencoder(pvdm.AUTOENCODER))
    loss = pvdm.autoencoder_loss(network, frames, np.load(files.pvdm_boxes), models.stage("pvdm-autoencoder").batch)
    return train("pvdm-autoencoder", files, loss.modules, loss, arguments)


def make_planes(files, arguments):
    prepare(encode_all, files.pvdm_planes, files)
    return f"{len(pvdm.STORED)} clips of each video"


def encode_all(files):
    network = frozen(Autoencoder(pvdm.AUTOENCODER), weights_of(files, "pvdm-autoencoder", "autoencoder"))
    frames = np.load(made(files.pvdm_frames, "pvdm-render"), mmap_mode="r")
    planes = planes_of(network.to(pick_device()), frames)
    write_atomically(files.pvdm_planes, lambda temporary: save_array(temporary, planes))


def planes_of(network: Autoencoder, frames) -> np.ndarray:
    """Planes, float16 (n k c l), of the k windows STORED of videos, uint8 (n t h w 3)."""
    length, parts = network.params.frames, []
    for first in range(0, len(frames), ENCODED):
        videos = to_clips(np.array(frames[first:first + ENCODED])).transpose(1, 2)
        windows = torch.stack([videos[:, start:start + length] for start in pvdm.STORED], dim=1)
        planes = encode(network, windows.flatten(0, 1)).unflatten(0, windows.shape[:2])
        parts.append(planes.half().cpu().numpy())
    return np.concatenate(parts)


def train_diffusion(files, arguments):
    """The U-Net of planes, with and without a clip before."""
    planes = np.load(made(files.pvdm_planes, "pvdm-planes"), mmap_mode="r")
    network, batch = seeded("pvdm-diffusion", lambda: PlaneUNet(pvdm.UNET)), models.stage("pvdm-diffusion").batch
    source = StoredPlanes(planes, apart=pvdm.STORED.index(pvdm.AUTOENCODER.frames))
    loss = PlaneDiffusionLoss(network, source, pvdm.AUTOENCODER.shape, diffusion(pvdm.UNET.prediction), batch, KNOWN)
    return train("pvdm-diffusion", files, loss.modules, loss, arguments)


STEPS = {"pvdm-render": render, "pvdm-autoencoder": train_autoencoder, "pvdm-planes": make_planes,
         "pvdm-diffusion": train_diffusion}


# The bundle

def write(files, output: Path) -> list[int]:
    """Write both files of a finished training. Returns their sizes in bytes."""
    return write_files(output, *(weights_of(files, stage, module) for stage, module in TRAINED.items()))


def write_files(output: Path, autoencoder: dict[str, Tensor], unet: dict[str, Tensor]) -> list[int]:
    """Write the two files in half precision. Returns their sizes in bytes.

    autoencoder, unet: the averaged weights, under the names that our networks have.
    """
    about = {stage: notes(stage, pvdm.CLIPS) for stage in TRAINED}
    described = {stage: pvdm_files.About(pvdm.FPS, about[stage].pop("title"), models.LICENCE, pvdm.AUTOENCODER.shape)
                 for stage in TRAINED}
    pvdm_files.write_autoencoder(output / FILES["pvdm-autoencoder"], halved(autoencoder), pvdm.AUTOENCODER,
                                 described["pvdm-autoencoder"], about["pvdm-autoencoder"])
    pvdm_files.write_diffusion(output / FILES["pvdm-diffusion"], halved(unet), pvdm.UNET,
                               described["pvdm-diffusion"], about["pvdm-diffusion"])
    return [(output / file).stat().st_size for file in FILES.values()]


def read(stage: str, bundle: Path) -> tuple[str, dict[str, Tensor]]:
    """The name of a stage's module, and its weights from the bundle."""
    network = load(stage, bundle)
    return TRAINED[stage], network.state_dict()


def load(stage: str, bundle: Path) -> Any:
    """The network of a stage from the bundle, in float32."""
    return load_pvdm(bundle / FILES[stage], KINDS[stage]).network(Factory(device="meta"))


def is_bundled(stage: str, bundle: Path) -> bool:
    """Whether the bundle has a stage's file. Bundles from before PVDM lack its two files. All have the others."""
    return stage not in FILES or (bundle / FILES[stage]).exists()
