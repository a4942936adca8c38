"""For benchmarks alone: ComfyUI's networks of any size, and settings of ComfyUI that are the same on every machine."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import comfy.ldm.modules.attention as core_attention
import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.sample
import comfy.sd
import comfy.supported_models
import comfy.utils
import torch
from comfy.ldm.models.autoencoder import AutoencoderKL
from comfy.ldm.modules.diffusionmodules.model import Decoder, pytorch_attention
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from comfy.patcher_extension import WrappersMP
from torch import Tensor, nn

from ...temporal.layers import Factory
from ...temporal.sparse_control import SparseControl, SparseControlParams, SparseControlParts
from . import compat, layer_weights, sparse_control
from .sockets import Model, Vae

# Networks

def unet_of(config: dict, dtype: torch.dtype, device: Any) -> nn.Module:
    """ComfyUI's UNet of any size. Its weights are not initialised."""
    return UNetModel(**config, dtype=dtype, device=device, operations=comfy.ops.disable_weight_init)


def sparse_control_of(params: SparseControlParams, config: dict, dtype: torch.dtype, device: Any) -> nn.Module:
    """SparseCtrl's network of any size. Its weights are not initialised. config: of the UNet that it steers."""
    operations = compat.layer_operations()
    encoder = sparse_control.core_encoder(config, dtype, device, operations)
    return SparseControl(params, encoder, SparseControlParts(params, Factory(operations, dtype, device,
                                                                             layer_weights.host_attention)))


def decoder_of(config: dict, dtype: torch.dtype, device: Any) -> nn.Module:
    """ComfyUI's decoder of an image VAE, of any size."""
    with torch.device(device):
        return Decoder(**config).to(dtype)


def with_fused_attention(decoder: Any) -> nn.Module:
    """The decoder with PyTorch's own attention, whatever attention ComfyUI chose on this machine."""
    decoder.mid.attn_1.optimized_attention = pytorch_attention
    return decoder


def x4_upscaler(config: dict, dtype: torch.dtype, device: Any) -> Model:
    """A MODEL of core's class for the x4 upscaler, of any size."""
    about = comfy.supported_models.SD_X4Upscaler(dict(config))
    about.set_inference_dtype(dtype, None)
    return comfy.model_patcher.ModelPatcher(about.get_model({}, "", device=device), load_device=torch.device(device),
                                            offload_device=torch.device("cpu"))


def image_autoencoder(config: dict) -> nn.Module:
    """ComfyUI's autoencoder with 4 latent channels, of any size."""
    return AutoencoderKL(ddconfig=config, embed_dim=4)


def vae_of(autoencoder: nn.Module, config: dict, factor: int, dtype: torch.dtype | None) -> Vae:
    """A VAE of core's class.

    Args:
        autoencoder: its network.
        config: the network's sizes.
        factor: pixels along a side of a latent.
        dtype: of the weights; None: core's choice.
    """
    vae = comfy.sd.VAE(sd=autoencoder.state_dict(), config={"params": {"ddconfig": config, "embed_dim": 4}},
                       dtype=dtype)
    vae.latent_channels, vae.upscale_ratio, vae.downscale_ratio = 4, factor, factor
    return vae


# Runs

def sample(model: Model, latent: Tensor, seed: int, steps: int, cfg: float, sampler: str, scheduler: str,
           positive: list, negative: list) -> Tensor:
    """Sample as core's KSampler does, without its progress bar.

    Args:
        model: the MODEL.
        latent: an empty latent of the size to make.
        seed, steps, cfg, sampler, scheduler: KSampler's widgets.
        positive, negative: CONDITIONING.
    """
    noise = comfy.sample.prepare_noise(latent, seed)
    return comfy.sample.sample(model, noise, steps, cfg, sampler, scheduler, positive, negative, latent,
                               disable_pbar=True, seed=seed)


def wrap_network(model: Model, key: str, wrapper: Callable) -> None:
    """Put `wrapper(executor, x, timesteps, context, ...)` around every call of the network."""
    model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, key, wrapper)


def wrap_conditions(model: Model, key: str, wrapper: Callable) -> None:
    """Put `wrapper(executor, ...)` around core's calc_cond_batch."""
    model.add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, key, wrapper)


# ComfyUI itself

def hide_progress_bars() -> None:
    """Hide core's progress bars for the rest of this process."""
    comfy.utils.PROGRESS_BAR_ENABLED = False


def unload_models() -> None:
    comfy.model_management.unload_all_models()


def empty_cache() -> None:
    comfy.model_management.soft_empty_cache()


@contextmanager
def ample_memory_and_plain_attention() -> Iterator[None]:
    """While open, core sees unlimited memory, and attention is PyTorch's.

    Core runs both conditions in one batch only if memory allows. Counts of memory must not depend on the machine.
    """
    with patch.object(comfy.model_management, "get_free_memory", ample_memory), \
            patch.object(core_attention, "optimized_attention", core_attention.attention_pytorch):
        yield


def ample_memory(device: Any = None, torch_free_too: bool = False) -> Any:
    """Replaces core's get_free_memory."""
    return (10 ** 12, 10 ** 12) if torch_free_too else 10 ** 12
