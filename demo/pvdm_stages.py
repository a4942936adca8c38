"""The stages of `train-demo` that train the demo's PVDM (demo/pvdm.py), and its two files of the bundle."""

from pathlib import Path

import numpy as np
import torch

from ..temporal.atomic import write_atomically
from ..temporal.pvdm import Autoencoder, PlaneUNet, diffusion
from ..temporal.training.distributed import pick_device
from ..temporal.training.planes import PlaneDiffusionLoss, StoredPlanes
from . import data, models, pvdm
from .autoencoder import to_model
from .data import made, weights_of
from .stages import frozen, prepare, save_array, seeded, train

AUTOENCODER_FILE = "video_ldm_driving_pvdm_autoencoder.safetensors"
DIFFUSION_FILE = "video_ldm_driving_pvdm.safetensors"
TRAINED = {"pvdm-autoencoder": "autoencoder", "pvdm-diffusion": "unet"}      # the trained module of each stage
ENCODED = 8                                 # videos that are encoded together
KNOWN = 0.3                                 # the share of clips that know the clip before, as published for UCF-101


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
    planes = encode(network.to(pick_device()), frames)
    write_atomically(files.pvdm_planes, lambda temporary: save_array(temporary, planes))


@torch.no_grad()
def encode(network: Autoencoder, frames) -> np.ndarray:
    """Planes, float16 (n k c l), of the k windows STORED of videos, uint8 (n t h w 3)."""
    device, length = next(network.parameters()).device, network.params.frames
    parts = []
    for first in range(0, len(frames), ENCODED):
        videos = to_model(torch.from_numpy(np.array(frames[first:first + ENCODED])).flatten(0, 1))
        videos = videos.unflatten(0, (-1, frames.shape[1])).transpose(1, 2).to(device)
        windows = torch.stack([videos[:, :, start:start + length] for start in pvdm.STORED], dim=1)
        planes = network.encode(windows.flatten(0, 1)).unflatten(0, windows.shape[:2])
        parts.append(planes.half().cpu().numpy())
    return np.concatenate(parts)


def train_diffusion(files, arguments):
    """The U-Net of planes, with and without a clip before."""
    planes = np.load(made(files.pvdm_planes, "pvdm-planes"), mmap_mode="r")
    network, batch = seeded("pvdm-diffusion", lambda: PlaneUNet(pvdm.UNET)), models.stage("pvdm-diffusion").batch
    loss = PlaneDiffusionLoss(network, StoredPlanes(planes, batch), pvdm.AUTOENCODER.shape, diffusion(), batch, KNOWN)
    return train("pvdm-diffusion", files, {"unet": network}, loss, arguments)


STEPS = {"pvdm-render": render, "pvdm-autoencoder": train_autoencoder, "pvdm-planes": make_planes,
         "pvdm-diffusion": train_diffusion}


# The bundle

def write(output: Path, files) -> list[int]:
    """Write both files of a finished training. Returns their sizes in bytes."""
    return write_files(output, *(weights_of(files, stage, module) for stage, module in TRAINED.items()))


def write_files(output: Path, autoencoder: dict[str, torch.Tensor], unet: dict[str, torch.Tensor]) -> list[int]:
    """Write the two files in half precision. Returns their sizes in bytes.

    autoencoder, unet: the averaged weights, under the names that our networks have.
    """
    from safetensors.torch import save_file
    for name, w in ((AUTOENCODER_FILE, autoencoder), (DIFFUSION_FILE, unet)):
        save_file({k: v.half().contiguous() for k, v in w.items()}, output / name)
    return [(output / name).stat().st_size for name in (AUTOENCODER_FILE, DIFFUSION_FILE)]


def read(stage: str, folder: Path) -> tuple[str, dict[str, torch.Tensor]]:
    """The name of a stage's module, and its weights from the bundle."""
    from safetensors.torch import load_file
    return TRAINED[stage], load_file(folder / FILES[stage])


FILES = {"pvdm-autoencoder": AUTOENCODER_FILE, "pvdm-diffusion": DIFFUSION_FILE}


def is_bundled(stage, folder):
    return stage not in FILES or (folder / FILES[stage]).exists()


def networks(folder: Path) -> tuple[Autoencoder, PlaneUNet]:
    out = []
    for stage, net in (("pvdm-autoencoder", Autoencoder(pvdm.AUTOENCODER)), ("pvdm-diffusion", PlaneUNet(pvdm.UNET))):
        out.append(frozen(net, {k: v.float() for k, v in read(stage, folder)[1].items()}))
    return tuple(out)
