"""Scene layouts in ComfyUI. CONDITIONING carries them to the sampler, in core's entry for GLIGEN.

Core loads the model in a conditioning's `gligen` entry. At every call of the network it asks that model for a patch
(`set_position`), and runs the patch in each transformer block, between self-attention and cross-attention.
"""

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from ...temporal.formats.scene_layout_file import LayoutFile
from ...temporal.layers import Factory
from ...temporal.scene_layout import Layout, SceneLayout, unconditional_layout
from .compat import layer_operations, layer_patcher
from .sockets import Conditioning, Patcher


class LayoutModel(nn.Module):
    """The model of a `gligen` entry: it has the two methods that core calls."""

    def __init__(self, scene: SceneLayout) -> None:
        super().__init__()
        self.scene = scene

    def set_position(self, latent_shape: Sequence[int], layout: Layout, device: Any) -> Callable:
        return middle_patch(self.scene, layout.to(device), latent_shape)

    def set_empty(self, latent_shape: Sequence[int], device: Any) -> Callable:
        return self.set_position(latent_shape, unconditional_layout(self.scene.params), device)


def middle_patch(scene: SceneLayout, layout: Layout, latent_shape: Sequence[int]) -> Callable:
    """A patch of core's kind `middle_patch`, for one call of the network on latents of this shape."""
    act = scene.bind_layout(layout, *latent_shape[-2:])
    return lambda x, options: act(x, options["transformer_index"])


def call_unet(unet: nn.Module, scene: SceneLayout, x: torch.Tensor, tau: torch.Tensor, context: torch.Tensor,
              layout: Layout) -> torch.Tensor:
    """Call ComfyUI's UNet with a layout for each image, in training."""
    patches = {"middle_patch": [middle_patch(scene, layout, x.shape)]}
    return unet(x, tau, context=context, transformer_options={"patches": patches})


_patchers: weakref.WeakValueDictionary = weakref.WeakValueDictionary()


def layout_patcher(file: LayoutFile, cache_key: Any) -> Patcher:
    """The layout model of a file under ComfyUI's memory management. The same cache_key gives the same patcher."""
    patcher = _patchers.get(cache_key)
    if patcher is None:
        scene = SceneLayout(file.params, Factory(layer_operations(), torch.float32, "meta"))
        scene.load_state_dict({key: tensor.to(torch.float32, copy=True) for key, tensor in file.tensors.items()},
                              assign=True)
        patcher = _patchers[cache_key] = layer_patcher(LayoutModel(scene.requires_grad_(False).eval()))
    return patcher


def with_layout(conditioning: Conditioning, patcher: Patcher, layout: Layout | None) -> Conditioning:
    """CONDITIONING with this layout. None: with an open layout, for the negative."""
    entry = ("position", patcher, layout) if layout is not None else ("empty", patcher, [])
    return [[text, {**options, "gligen": entry}] for text, options in conditioning]
