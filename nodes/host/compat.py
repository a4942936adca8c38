"""What differs between ComfyUI versions, decided in one place."""

import copy

import comfy.model_management
import comfy.model_patcher
import comfy.ops


def layer_operations():
    """Layers that cast their weights to the input's dtype and device, so that fp16, bf16, fp8 and low VRAM work."""
    return comfy.ops.manual_cast


def layer_patcher(stack):
    """Temporal layers as a model under ComfyUI's memory management.

    Always the plain patcher: hosts with paged weights (0.16 and later) run it beside a paged UNet, and the weights are
    then what the module says they are. Such hosts rebuild patchers for other devices, hence `cached_patcher_init`.
    """
    patcher = comfy.model_patcher.ModelPatcher(
        stack, load_device=comfy.model_management.get_torch_device(),
        offload_device=comfy.model_management.unet_offload_device())
    patcher.cached_patcher_init = (copied_patcher, (stack,))
    return patcher


def copied_patcher(stack, disable_dynamic=False):
    return layer_patcher(copy.deepcopy(stack))
