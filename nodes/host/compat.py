"""Differences between versions of ComfyUI. They are decided in this file alone."""

import contextlib
import copy
import inspect
import uuid
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import comfy.context_windows
import comfy.model_management
import comfy.model_patcher
import comfy.ops
import torch
from comfy.ldm.modules.diffusionmodules.model import AttnBlock, pytorch_attention
from torch import nn

from ...temporal.errors import VideoLDMError
from .api import io
from .options import layer_sets_in
from .sockets import Control, Patcher


def search_words(*words: str) -> dict:
    """An argument of a node's schema: further words that the page's search finds the node by.

    Versions before 0.9 have no such argument, and their page searches the nodes' names alone.
    """
    known = inspect.signature(io.Schema).parameters
    return {"search_aliases": list(words)} if "search_aliases" in known else {}


def layer_operations() -> Any:
    """Classes of layers that cast their weights to the input's dtype and device. fp16, fp8 and low VRAM need this."""
    return comfy.ops.manual_cast


def layer_patcher(stack: nn.Module) -> Patcher:
    """Temporal layers, or a network beside them, as a model under ComfyUI's memory management.

    It is always the plain patcher. ComfyUI 0.16 and later page a UNet's weights, and run a plain patcher beside it.
    They also rebuild patchers for other devices, by `cached_patcher_init`.
    """
    patcher = comfy.model_patcher.ModelPatcher(
        stack, load_device=comfy.model_management.get_torch_device(),
        offload_device=comfy.model_management.unet_offload_device())
    patcher.cached_patcher_init = (copied_patcher, (stack,))
    return patcher


def copied_patcher(stack: nn.Module, disable_dynamic: bool = False) -> Patcher:
    return layer_patcher(copy.deepcopy(stack))


def decoder_operations() -> Any:
    """Classes of layers for a VAE. They cast nothing: a VAE's weights and input have one dtype and device."""
    return comfy.ops.disable_weight_init


# Attributes that ComfyUI leaves on the modules of a loaded model. Those of 0.16 and later tie a module to paged memory.
MARKS = ("_v", "_v_signature", "_v_weight", "_v_bias", "_pin_state", "seed_key", "comfy_cast_weights",
         "prev_comfy_cast_weights", "comfy_force_cast_weights", "comfy_patched_weights", "weight_function",
         "bias_function", "dynamic_vbars", "dynamic_pins", "dynamic_patchers", "model_lowvram", "lowvram_patch_counter",
         "model_loaded_weight_memory", "model_offload_buffer_memory", "current_weight_patches_uuid")
MARK_ENDINGS = ("_lowvram_function", "_comfy_model_dtype")


def own_copy(module: Any, dtype: torch.dtype) -> Any:
    """A copy of a module with its own weights, on the CPU, without the attributes that ComfyUI left on it.

    deepcopy would also copy those attributes, and through them ComfyUI's paged memory.
    """
    copied = module.__new__(type(module))
    copied.__dict__ = {name: value.copy() if isinstance(value, dict) else value for name, value in vars(module).items()
                       if name not in MARKS and not name.endswith(MARK_ENDINGS)}
    for name, weight in module._parameters.items():
        if weight is not None:
            copied._parameters[name] = torch.nn.Parameter(copied_tensor(weight, dtype), requires_grad=False)
    for name, buffer in module._buffers.items():
        if buffer is not None:
            copied._buffers[name] = copied_tensor(buffer, dtype)
    for name, child in module._modules.items():
        if child is not None:
            copied._modules[name] = own_copy(child, dtype)
    return copied


def copied_tensor(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return tensor.detach().to("cpu", dtype if tensor.is_floating_point() else tensor.dtype, copy=True)


class Devices(NamedTuple):
    """Where a network computes, and where its weights wait."""
    load_device: Any
    offload_device: Any


def module_patcher(module: nn.Module, like: Patcher | Devices) -> Patcher:
    """A network under ComfyUI's memory management, on the devices of `like`.

    It is the plain patcher, for the reasons that layer_patcher gives.
    """
    patcher = comfy.model_patcher.ModelPatcher(module, load_device=like.load_device,
                                               offload_device=like.offload_device)
    patcher.cached_patcher_init = (copied_module_patcher, (module, like))
    return patcher


def copied_module_patcher(module: nn.Module, like: Patcher | Devices, disable_dynamic: bool = False) -> Patcher:
    return module_patcher(copy.deepcopy(module), like)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory has run out, on a GPU or in main memory."""
    asked = getattr(comfy.model_management, "is_oom", None)
    if isinstance(error, (torch.cuda.OutOfMemoryError, MemoryError)) or (asked is not None and asked(error)):
        return True
    return isinstance(error, RuntimeError) and ("can't allocate memory" in str(error) or "out of memory" in str(error))


def on_device(device: Any) -> contextlib.AbstractContextManager:
    """A context in which one of several GPUs is the current one, where ComfyUI has such a context."""
    context = getattr(comfy.model_management, "cuda_device_context", None)
    return contextlib.nullcontext() if context is None else context(device)


MOST_SCORES = 2 ** 28       # largest matrix of attention scores, in bytes, in a decode on a CPU


@contextlib.contextmanager
def frugal_attention(network: nn.Module, device: torch.device) -> Iterator[None]:
    """While open, a VAE's attention over large pictures on a CPU keeps no matrix of scores.

    Core's attention there takes as much memory as is free: 1 GB and more for each frame of 1024x1024.
    """
    blocks = [part for part in network.modules() if device.type == "cpu" and isinstance(part, AttnBlock)]
    chosen = [block.optimized_attention for block in blocks]
    for block in blocks:
        block.optimized_attention = frugal(block.optimized_attention)
    try:
        yield
    finally:
        for block, attention in zip(blocks, chosen):
            block.optimized_attention = attention


def frugal(chosen: Callable) -> Callable:
    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        scores = len(q) * q[0, 0].numel() ** 2 * q.element_size()
        return (chosen if scores <= MOST_SCORES else pytorch_attention)(q, k, v)
    return attention


# Context windows

SLICING_WINDOWS = hasattr(comfy.context_windows, "slice_cond")      # since 0.18 core cuts conditioning for a window


def window_size(images: int) -> dict:
    """Arguments of core's window about the whole batch. Older versions have none."""
    known = inspect.signature(comfy.context_windows.IndexListContextWindow).parameters
    return {"total_frames": images} if "total_frames" in known else {}


def with_own_id(cond: dict, name: str) -> dict:
    """A copy of a conditioning with an id of its own, the same in every step.

    Some nodes keep a state between steps under this id. The id is made from `name`.
    """
    own = cond.get("uuid")
    return {**cond, "uuid": uuid.uuid5(own, name)} if isinstance(own, uuid.UUID) else dict(cond)


def core_windows_act(model_options: dict, images: int) -> bool:
    """Whether core's own context windows divide a batch of `images` over frames (dim 0)."""
    handler = model_options.get("context_handler")
    # Only the pack's own handler has `images_per_call`.
    if handler is None or getattr(handler, "dim", None) != 0 or hasattr(handler, "images_per_call"):
        return False
    return images > handler.context_length


def refuse_core_windows(model_options: dict, conds: dict, images: int, frames: int | None) -> None:
    """Refuse core's own context windows over frames (dim 0) where they would fail or give a wrong result.

    Args:
        model_options: of the sampling.
        conds: {name: conditions as core prepares them}.
        images: images of the batch.
        frames: frames of a clip; None if the whole batch is one clip.
    """
    if not core_windows_act(model_options, images):
        return
    if not SLICING_WINDOWS:
        reason = "fail in this version of ComfyUI"
    elif frames is not None:
        reason = "know nothing of clips"
    elif any(layers.by_frame for layers in layer_sets_in(model_options.get("transformer_options", {})).values()):
        reason = "give every window the strengths that Layer Strength has for the first frames"
    elif any(follows_frames(cond.get("control")) for batch in conds.values() for cond in batch):
        reason = "show the first pictures of a ControlNet to every window"
    else:
        return
    raise VideoLDMError(f"ComfyUI's own Context Windows over frames (dim 0) {reason}. Use Frame Windows instead.")


def follows_frames(control: Control) -> bool:
    """Whether a ControlNet, or one it is chained to, has a picture for each frame."""
    while control is not None:
        hint = control.cond_hint_original
        if hint is not None and len(hint) > 1:
            return True
        control = control.previous_controlnet
    return False
