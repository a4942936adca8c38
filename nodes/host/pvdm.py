"""PVDM in ComfyUI: its two networks under core's memory management, and what the nodes do with them.

Planes travel as a LATENT: samples `(clips) c 1 l`, one row for each clip, values in -1..1. So core's nodes for LATENT
save, mix and cut them.
"""

import hashlib
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import comfy.model_management
import comfy.utils
import latent_preview
import torch
from torch import Tensor, nn

from ...temporal.errors import VideoLDMError
from ...temporal.layers import Factory
from ...temporal.pvdm import AutoencoderParams, PlaneShape, SamplerParams, UNetParams, diffusion, roll_out
from ...temporal.pvdm.files import AutoencoderFile, DiffusionFile
from . import compat, files
from .decoding import cancellable
from .latents import KIND, PLANES, RATE
from .layer_weights import host_attention
from .moving_preview import sheet_preview, spread
from .sampling import previews
from .sockets import Latent, Patcher

TYPES = [torch.float16, torch.bfloat16, torch.float32]


@dataclass(frozen=True)
class Network:
    """A network under core's memory management."""

    patcher: Patcher
    dtype: torch.dtype          # that it computes in

    @property
    def device(self) -> torch.device:
        return self.patcher.load_device

    @property
    def module(self) -> Any:
        return self.patcher.model

    def load(self, memory: float) -> None:
        """Have core load the weights, all or a part of them. memory: bytes that a call needs beside them."""
        comfy.model_management.load_models_gpu([self.patcher], memory_required=memory)

    def cast(self, x: Tensor) -> Tensor:
        return x.to(self.device, self.dtype)


@dataclass(frozen=True)
class Pvdm:
    """What Load PVDM gives: an autoencoder, and the diffusion network of its planes."""

    name: str                       # the files' names
    autoencoder: Network
    unet: Network
    params: AutoencoderParams
    unet_params: UNetParams
    fps: float | None               # frames per second of its clips. None: not stated

    @property
    def shape(self) -> PlaneShape:
        return self.params.shape

    @property
    def frames(self) -> int:
        """Frames of a clip."""
        return self.params.frames

    @property
    def size(self) -> str:
        """Width and height of its frames."""
        return f"{self.params.width}x{self.params.height}"


# Loading

_patchers: weakref.WeakValueDictionary = weakref.WeakValueDictionary()


def load_pvdm(autoencoder: AutoencoderFile, unet: DiffusionFile, stamps: Sequence[Any]) -> Pvdm:
    """The two networks of a PVDM.

    Args:
        autoencoder, unet: the files. Their weights are taken out of them.
        stamps: a value for each file that changes when the file does. Equal stamps share one network in memory.
    """
    return Pvdm(f"{autoencoder.name} and {unet.name}", autoencoder_network(autoencoder, stamps[0]),
                unet_network(unet, stamps[1]), autoencoder.params, unet.params, unet.fps or autoencoder.fps)


def autoencoder_network(file: AutoencoderFile, stamp: Any) -> Network:
    """An autoencoder, in the dtype that core chooses for a VAE."""
    management = comfy.model_management
    devices = compat.Devices(management.vae_device(), management.vae_offload_device())
    dtype = management.vae_dtype(devices.load_device, TYPES)
    return Network(patcher_of(file, stamp, dtype, devices), dtype)


def unet_network(file: DiffusionFile, stamp: Any) -> Network:
    """A diffusion network, in the dtype that core chooses for a UNet of its size and type."""
    management = comfy.model_management
    devices = compat.Devices(management.get_torch_device(), management.unet_offload_device())
    count = sum(tensor.numel() for tensor in file.tensors.values())
    stored = management.unet_dtype(devices.load_device, count, TYPES, file.dtype)
    computed = management.unet_manual_cast(stored, devices.load_device, TYPES) or stored
    return Network(patcher_of(file, stamp, stored, devices), computed)


def patcher_of(file: AutoencoderFile | DiffusionFile, stamp: Any, dtype: torch.dtype,
               devices: compat.Devices) -> Patcher:
    """A file's network as core's ModelPatcher.

    Args:
        file: the file. Its weights are taken out of it.
        stamp: as in load_pvdm.
        dtype: of the weights.
        devices: where it computes, and where its weights wait.
    """
    key = file.kind, stamp, dtype, devices
    patcher = _patchers.get(key)
    if patcher is None:
        network = file.network(Factory(compat.layer_operations(), dtype, "meta", host_attention))
        patcher = _patchers[key] = compat.module_patcher(network, devices)
    return patcher


# Memory

def memory_of_autoencoder(pvdm: Pvdm) -> float:
    """Bytes that one call of the autoencoder needs beside its weights."""
    p, shape = pvdm.params, pvdm.shape
    tokens = shape.t * shape.h * shape.w
    pixels = 3 * p.frames * p.height * p.width
    # A feed-forward holds its input, eight times as many numbers, and four times as many.
    return (24 * tokens * p.channels + 4 * pixels) * pvdm.autoencoder.dtype.itemsize


def memory_of_unet(pvdm: Pvdm) -> float:
    """Bytes that one call of the diffusion network needs beside its weights."""
    p = pvdm.unet_params
    return 48 * pvdm.shape.length * p.model_channels * pvdm.unet.dtype.itemsize


# Clips and planes

def encode_clips(pvdm: Pvdm, images: Tensor, on_clip: Callable[[int], None] | None = None) -> Tensor:
    """Planes `(clips) c l` of frames `(clips t) h w 3` in 0..1, clip by clip."""
    network = pvdm.autoencoder
    rows = []
    for number, clip in enumerate(images.split(pvdm.frames), 1):
        network.load(memory_of_autoencoder(pvdm))
        x = network.cast(clip.movedim(-1, 0)[None] * 2 - 1)
        with compat.on_device(network.device), cancellable(network.module, nn.Linear):
            rows.append(network.module.encode(x).float().cpu())
        if on_clip is not None:
            on_clip(number)
    return torch.cat(rows)


def decode_clip(pvdm: Pvdm, row: Tensor) -> Tensor:
    """Frames `t h w 3` in 0..1 of the planes `c l` of a clip."""
    network = pvdm.autoencoder
    network.load(memory_of_autoencoder(pvdm))
    with compat.on_device(network.device), cancellable(network.module, nn.Linear):
        frames = network.module.decode(network.cast(row[None]))[0]
    return ((frames.float().cpu() + 1) / 2).clamp(0, 1).movedim(0, -1)


def as_latent(rows: Tensor, rate: float | None) -> Latent:
    """A LATENT of planes `(clips) c l`. rate: frames per second, None if it is not known."""
    latent: Latent = {"samples": rows.unsqueeze(2), KIND: PLANES}
    return latent if rate is None else {**latent, RATE: rate}


def planes_of(pvdm: Pvdm, latent: Latent) -> Tensor:
    """The planes `(clips) c l` of a LATENT. Raises VideoLDMError for a LATENT of anything else."""
    samples = latent["samples"]
    channels, length = pvdm.params.plane_channels, pvdm.shape.length
    if latent.get(KIND, PLANES) != PLANES or samples.ndim != 4 or samples.shape[1:] != (channels, 1, length):
        size = "x".join(map(str, samples.shape))
        raise VideoLDMError(f"The connected LATENT of the size {size} does not hold planes of {pvdm.name}, which are "
                            f"clips x {channels} x 1 x {length}. Connect the planes of PVDM Sampler or PVDM Encode "
                            "with the same PVDM; other latents belong into VAE Decode.")
    return samples[:, :, 0].float()


class PlaneDecoding:
    """Decodes planes `(clips) c l`, clip by clip. One clip of frames is in memory at a time."""

    def __init__(self, pvdm: Pvdm, rows: Tensor, node: str) -> None:
        self.pvdm, self.rows, self.node = pvdm, rows, node
        self.count, self.height, self.width = len(rows) * pvdm.frames, pvdm.params.height, pvdm.params.width

    def steps(self) -> int:
        return len(self.rows)

    def frames(self, first: int = 0, last: int | None = None,
               on_piece: Callable[[], None] | None = None) -> Iterator[Tensor]:
        """Frames `first` to `last`, as in FrameSource."""
        length = self.pvdm.frames
        last = self.count if last is None else last
        for number, row in enumerate(self.rows):
            start = number * length
            if start + length <= first or start >= last:
                continue
            files.check_cancelled()
            clip = decode_clip(self.pvdm, row)
            if on_piece is not None:
                on_piece()
            yield clip[max(first - start, 0):last - start]


# Sampling

def sample_clips(pvdm: Pvdm, seed: int, clips: int, first: SamplerParams, following: SamplerParams,
                 before: Tensor | None, progress: "ClipProgress") -> Tensor:
    """Planes `(clips) c l` of new clips, one after another.

    Args:
        pvdm: the PVDM.
        seed: of the noise. Each clip has noise of its own, so that fewer clips are the beginning of more.
        clips: how many.
        first, following: how a clip without one before it is sampled, and how the others are.
        before: the planes `1 c l` of a clip to go on from; None: none.
        progress: is told of every step.
    """
    network, memory = pvdm.unet, memory_of_unet(pvdm)
    shape = (1, pvdm.params.plane_channels, pvdm.shape.length)
    noises: dict[int, torch.Generator] = {}

    def noise(number: int) -> Tensor:
        network.load(memory)            # a preview may have moved the weights
        noises.clear()
        generator = noises[number] = torch.Generator().manual_seed(seed_of_clip(seed, number))
        return torch.randn(shape, generator=generator).to(network.device)

    def predicted(x: Tensor, tau: Tensor, cond: Tensor | None) -> Tensor:
        files.check_cancelled()
        given = None if cond is None else network.cast(cond)
        with compat.on_device(network.device):
            return network.module(network.cast(x), tau, pvdm.shape, given).float()
    rows = []
    for row in roll_out(clips, first, following, predicted, noise, diffusion(pvdm.unet_params.prediction),
                        noises.__getitem__, None if before is None else before.to(network.device, torch.float32),
                        progress.step):
        rows.append(row.cpu())
        progress.finish(rows[-1][0])
    return torch.cat(rows)


def seed_of_clip(seed: int, number: int) -> int:
    """The seed of the noise of a clip. Neighbouring seeds and clips have nothing in common."""
    return int.from_bytes(hashlib.blake2b(f"{seed} {number}".encode(), digest_size=8).digest(), "big")


class ClipProgress:
    """One bar counts the steps of all clips. Where ComfyUI previews, it shows frames of the last finished clip."""

    def __init__(self, pvdm: Pvdm, steps: int, rate: float) -> None:
        """steps: of all clips together. rate: frames per second of the video."""
        self.pvdm, self.steps, self.rate, self.done = pvdm, steps, rate, 0
        self.bar = comfy.utils.ProgressBar(steps)

    def step(self, done: int, clean: Tensor) -> None:
        """A step of a clip is done."""
        self.done += 1
        self.bar.update_absolute(self.done, self.steps)

    def finish(self, row: Tensor) -> None:
        """A clip is done. row: its planes `c l`."""
        if previews():
            clip = decode_clip(self.pvdm, row)
            pictures = [latent_preview.preview_to_image(clip[number], do_scale=False) for number in spread(len(clip))]
            sheet = sheet_preview(pictures, self.rate * len(pictures) / len(clip))
            self.bar.update_absolute(self.done, self.steps, sheet)
