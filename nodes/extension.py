"""Gathers every node of the pack for ComfyUI."""

from . import (
    camera_motion,
    convert,
    decode,
    free_init,
    interpolate,
    layer_strength,
    load,
    load_video,
    longer,
    noise,
    picture_motion,
    prompt_travel,
    pvdm,
    reuse,
    sample,
    save_video,
    scene_layout,
    sparse_control,
    upscale,
    windows,
)
from .host.api import ComfyExtension

# In the order of the menu.
FILES = (
    load,
    sparse_control,
    camera_motion,
    convert,
    scene_layout,
    prompt_travel,
    sample,
    noise,
    free_init,
    windows,
    layer_strength,
    reuse,
    picture_motion,
    longer,
    interpolate,
    decode,
    upscale,
    load_video,
    save_video,
    pvdm,
)


class VideoLDMExtension(ComfyExtension):
    async def get_node_list(self) -> list:
        return [node for file in FILES for node in file.NODES]
