"""Weights of temporal layers under ComfyUI's memory management."""

import weakref
from collections.abc import Callable
from typing import Any, TypeVar

import comfy.lora
import torch
from comfy.ldm.modules import attention
from torch import nn

from ...temporal.layers import Factory, attend
from ...temporal.params import StackParams
from ...temporal.stack import TemporalStack
from .compat import layer_operations, layer_patcher
from .sockets import Model, Patcher

Module = TypeVar("Module", bound=nn.Module)


def layer_dtype(model: Model, stored: torch.dtype) -> torch.dtype:
    """The dtype of temporal weights: the UNet's, or the file's own if the UNet is in fp8."""
    dtype = model.model.get_dtype()
    return dtype if dtype in (torch.float32, torch.float16, torch.bfloat16) else stored


def host_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int,
                   mask: torch.Tensor | None = None) -> torch.Tensor:
    """The attention that the user chose for ComfyUI, and on a CPU PyTorch's own.

    Core's attention for CPUs saves memory at the cost of time. Attention over the frames of a clip needs little memory.
    """
    if q.device.type == "cpu":
        return attend(q, k, v, heads, mask)
    if mask is not None and mask.dtype == torch.bool:
        mask = as_numbers(mask, q.dtype)
    return attention.optimized_attention(q, k, v, heads, mask=mask)     # looked up at every call: other packs set it


def as_numbers(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A boolean mask as numbers to add to the scores. Core's attention functions do not agree on boolean masks."""
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, float("-inf"))


_modules: weakref.WeakValueDictionary = weakref.WeakValueDictionary()


def shared_module(cache_key: Any, dtype: torch.dtype, make: Callable[[], Module]) -> Module:
    """A module with its weights, which are not trained.

    Args:
        cache_key: MODELs with the same key and dtype share one module, while any of them is alive. None: no sharing.
        dtype: of the weights.
        make: makes the module. It is not called where one exists already.
    """
    key = (cache_key, dtype)
    module = _modules.get(key) if cache_key is not None else None
    if module is None:
        module = make().requires_grad_(False).eval()
        if cache_key is not None:
            _modules[key] = module
    return module


def build_stack(params: StackParams, tensors: dict, dtype: torch.dtype, cache_key: Any = None) -> TemporalStack:
    """The layers with their weights.

    Args:
        params: the layers.
        tensors: the file's weights. They are taken out of the dictionary one by one and become the stack's own where
            they have this dtype, so that memory holds no second copy. With a stack that exists already they stay.
        dtype: of the weights to make.
        cache_key: as in shared_module.
    """
    def make() -> TemporalStack:
        stack = TemporalStack(params, Factory(layer_operations(), dtype, "meta", host_attention))
        stack.load_state_dict({name: tensors.pop(name).to(dtype) for name in list(tensors)}, assign=True)
        return stack
    return shared_module(cache_key, dtype, make)


# id of a module: its first patcher, which the clones keep alive
_patchers: weakref.WeakValueDictionary = weakref.WeakValueDictionary()


def patcher_of(stack: nn.Module) -> Patcher:
    """A patcher for a stack, or another module with weights, that other MODELs may use too.

    It is a clone of the module's first patcher: core knows from `clone()` that patchers have the weights and their
    backup in common.
    """
    first = _patchers.get(id(stack))
    if first is None:
        first = _patchers[id(stack)] = layer_patcher(stack)
    return first.clone()


def lora_patches(patcher: Patcher, pairs: dict, strength: float) -> None:
    """Add a motion LoRA as ComfyUI's own LoRA patches: W += strength * up @ down, without alpha
    (docs/formats.md#motion-lora)."""
    names = {name: name for name in pairs}
    files = {}
    for name, (up, down) in pairs.items():
        files[f"{name}.lora_up.weight"], files[f"{name}.lora_down.weight"] = up, down
    patcher.add_patches(comfy.lora.load_lora(files, names, log_missing=False), strength)
