"""ComfyUI's V3 node interface, imported here and nowhere else, so that a change of API version is one line."""

from comfy_api.latest import ComfyExtension, Input, InputImpl, Types, io, ui

__all__ = ["ComfyExtension", "Input", "InputImpl", "Types", "io", "ui"]
