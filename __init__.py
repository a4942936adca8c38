"""Video LDM for ComfyUI: temporal layers that turn a loaded Stable Diffusion model into a video model."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .nodes.extension import VideoLDMExtension

REQUIRED_COMFYUI = "0.3.52"
# Help pages. Declared here and not in pyproject.toml: an artist may rename the pack's folder, and this still works.
WEB_DIRECTORY = "web"


async def comfy_entrypoint() -> "VideoLDMExtension":
    """ComfyUI calls this to learn the pack's nodes.

    Imports happen here. So scripts and tests can import the rest of the pack without ComfyUI.
    """
    try:
        from .nodes.extension import VideoLDMExtension
    except ImportError as error:
        if (error.name or "").split(".")[0] not in ("comfy", "comfy_api"):
            raise
        raise ImportError(f"Video LDM needs ComfyUI {REQUIRED_COMFYUI} or newer, and this one lacks '{error.name}'. "
                          "Update ComfyUI, then restart it.") from error
    return VideoLDMExtension()
