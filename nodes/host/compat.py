"""What differs between ComfyUI versions, decided in one place."""

import contextlib
import copy
import inspect
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import comfy.context_windows
import comfy.model_management
import comfy.model_patcher
import comfy.ops
import torch
from comfy.ldm.modules.diffusionmodules.model import AttnBlock, pytorch_attention
from torch import nn

from ...temporal.errors import VideoLDMError
from ...temporal.stack import TemporalStack
from .sockets import Control, Patcher


def layer_operations() -> Any:
    """Layers that cast their weights to the input's dtype and device, so that fp16, bf16, fp8 and low VRAM work."""
    return comfy.ops.manual_cast


def layer_patcher(stack: TemporalStack) -> Patcher:
    """Temporal layers as a model under ComfyUI's memory management.

    Always the plain patcher: hosts with paged weights (0.16 and later) run it beside a paged UNet, and the weights are
    then what the module says they are. Such hosts rebuild patchers for other devices, hence `cached_patcher_init`.
    """
    patcher = comfy.model_patcher.ModelPatcher(
        stack, load_device=comfy.model_management.get_torch_device(),
        offload_device=comfy.model_management.unet_offload_device())
    patcher.cached_patcher_init = (copied_patcher, (stack,))
    return patcher


def copied_patcher(stack: TemporalStack, disable_dynamic: bool = False) -> Patcher:
    return layer_patcher(copy.deepcopy(stack))


def decoder_operations() -> Any:
    """Layers of a VAE: unlike others they run as they are, the VAE's weights and input being of one type and place."""
    return comfy.ops.disable_weight_init


# What the hosts leave on the modules of a loaded model; the paged ones (0.16 and later) tie a module to their memory.
MARKS = ("_v", "_v_signature", "_v_weight", "_v_bias", "_pin_state", "seed_key", "comfy_cast_weights",
         "prev_comfy_cast_weights", "comfy_force_cast_weights", "comfy_patched_weights", "weight_function",
         "bias_function", "dynamic_vbars", "dynamic_pins", "dynamic_patchers", "model_lowvram", "lowvram_patch_counter",
         "model_loaded_weight_memory", "model_offload_buffer_memory", "current_weight_patches_uuid")
MARK_ENDINGS = ("_lowvram_function", "_comfy_model_dtype")


def own_copy(module: Any, dtype: torch.dtype) -> Any:
    """A module of the same classes with weights of its own on the CPU, as if it had never been loaded anywhere.

    Not deepcopy: it would follow what a host that pages weights keeps on a module into that host's memory.
    """
    copied = module.__new__(type(module))
    copied.__dict__ = {name: value.copy() if isinstance(value, dict) else value for name, value in vars(module).items()
                       if name not in MARKS and not name.endswith(MARK_ENDINGS)}
    for name, weight in module._parameters.items():
        if weight is not None:
            copied._parameters[name] = torch.nn.Parameter(own_tensor(weight, dtype), requires_grad=False)
    for name, buffer in module._buffers.items():
        if buffer is not None:
            copied._buffers[name] = own_tensor(buffer, dtype)
    for name, child in module._modules.items():
        if child is not None:
            copied._modules[name] = own_copy(child, dtype)
    return copied


def own_tensor(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return tensor.detach().to("cpu", dtype if tensor.is_floating_point() else tensor.dtype, copy=True)


def vae_patcher(first_stage: nn.Module, like: Patcher) -> Patcher:
    """A VAE's network under ComfyUI's memory management, on the devices of the patcher `like`; plain as
    layer_patcher."""
    patcher = comfy.model_patcher.ModelPatcher(first_stage, load_device=like.load_device,
                                               offload_device=like.offload_device)
    patcher.cached_patcher_init = (copied_vae_patcher, (first_stage, like))
    return patcher


def copied_vae_patcher(first_stage: nn.Module, like: Patcher, disable_dynamic: bool = False) -> Patcher:
    return vae_patcher(copy.deepcopy(first_stage), like)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory has run out, on a GPU or in main memory."""
    asked = getattr(comfy.model_management, "is_oom", None)
    if isinstance(error, (torch.cuda.OutOfMemoryError, MemoryError)) or (asked is not None and asked(error)):
        return True
    return isinstance(error, RuntimeError) and ("can't allocate memory" in str(error) or "out of memory" in str(error))


def on_device(device: Any) -> contextlib.AbstractContextManager:
    """The context in which the host runs a network that lives on one of several GPUs."""
    context = getattr(comfy.model_management, "cuda_device_context", None)
    return contextlib.nullcontext() if context is None else context(device)


MOST_SCORES = 2 ** 28       # bytes of attention's scores that a decode on a CPU may hold


@contextlib.contextmanager
def frugal_attention(network: nn.Module, device: torch.device) -> Iterator[None]:
    """While open, a VAE's attention over large pictures on a CPU keeps no matrix of scores. Core's takes as much memory
    as happens to be free for it: 1 GB and more for each frame of 1024x1024."""
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

SLICING_WINDOWS = hasattr(comfy.context_windows, "slice_cond")      # 0.18: conditioning goes with a window at dim 0


def window_size(images: int) -> dict:
    """What a window is told about the whole batch."""
    known = inspect.signature(comfy.context_windows.IndexListContextWindow).parameters
    return {"total_frames": images} if "total_frames" in known else {}


def apart(cond: dict, name: str) -> dict:
    """A copy of a conditioning under an id of its own, which is the same in every step.

    Nodes that keep something between steps keep it by this id.
    """
    own = cond.get("uuid")
    return {**cond, "uuid": uuid.uuid5(own, name)} if isinstance(own, uuid.UUID) else dict(cond)


def core_windows_act(model_options: dict, images: int) -> bool:
    """Whether core's own context windows divide a batch of `images` over frames (dim 0)."""
    handler = model_options.get("context_handler")
    if getattr(handler, "dim", None) != 0 or hasattr(handler, "images_per_call"):      # this pack's own has that
        return False
    return images > handler.context_length


def refuse_core_windows(model_options: dict, conds: dict, images: int, frames: int | None) -> None:
    """Refuse core's own context windows over frames (dim 0) where they would fail, or be wrong in silence.

    conds: as core prepares them; images: of the batch; frames: per clip, None where the whole batch is one clip.
    """
    if not core_windows_act(model_options, images):
        return
    if not SLICING_WINDOWS:
        reason = "fail in this version of ComfyUI"
    elif frames is not None:
        reason = "know nothing of clips"
    elif any(follows_frames(cond.get("control")) for batch in conds.values() for cond in batch):
        reason = "show the first pictures of a ControlNet to every window"
    else:
        return
    raise VideoLDMError(f"ComfyUI's own Context Windows over frames (dim 0) {reason}. Use Frame Windows instead.")


def follows_frames(control: Control) -> bool:
    """Whether a ControlNet, or one before it, has a picture for each frame."""
    while control is not None:
        hint = control.cond_hint_original
        if hint is not None and len(hint) > 1:
            return True
        control = control.previous_controlnet
    return False
