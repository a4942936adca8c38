"""Gathers every node of the pack for ComfyUI."""

from . import convert, decode, interpolate, load, longer, pvdm, sample, scene_layout, upscale, video, windows
from .host.api import ComfyExtension


class VideoLDMExtension(ComfyExtension):
    async def get_node_list(self) -> list:
        return [*load.NODES, *convert.NODES, *scene_layout.NODES, *sample.NODES, *windows.NODES, *longer.NODES,
                *interpolate.NODES, *decode.NODES, *upscale.NODES, *video.NODES,
                *pvdm.NODES]
