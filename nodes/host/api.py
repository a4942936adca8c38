"""ComfyUI's V3 node interface. All of the pack imports it from here, so a change of API version is one line."""

from comfy_api.latest import ComfyExtension, Input, InputImpl, Types, io, ui

__all__ = ["ComfyExtension", "Input", "InputImpl", "Types", "io", "ui"]
