"""Video LDM for ComfyUI: temporal layers that turn a loaded Stable Diffusion model into a video model."""

REQUIRED_COMFYUI = "0.3.52"
WEB_DIRECTORY = "web"      # here, not in pyproject.toml: help pages are asked for by the folder's name, whatever it is


async def comfy_entrypoint():
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
