"""What a MODEL is: its network, its name, the width of its text, and whether temporal layers can act on it."""

import inspect

from comfy.patcher_extension import WrappersMP
from torch import nn

from ...temporal.errors import VideoLDMError
from .sockets import Model, Patcher

COMPILED = "torch.compile"      # core's key for a compiled model


def refuse_compiled(patcher: Patcher) -> None:
    """torch.compile skips the guards of hooks: compiled plain first, the temporal layers would silently vanish."""
    wrappers = patcher.wrappers.get(WrappersMP.APPLY_MODEL, {})
    if COMPILED in wrappers or hasattr(patcher.get_model_object("diffusion_model"), "_orig_mod"):
        raise VideoLDMError("This MODEL is compiled by TorchCompileModel, which would silently leave the temporal "
                            "layers out. Remove TorchCompileModel from the graph.")


def spatial_unet(model: Model) -> nn.Module:
    """The UNet of a MODEL, refused where temporal layers cannot attach."""
    unet = getattr(getattr(model, "model", None), "diffusion_model", None)
    if not all(hasattr(unet, part) for part in ("input_blocks", "middle_block", "output_blocks")):
        raise VideoLDMError(f"The connected MODEL ({model_title(model)}) is no Stable Diffusion UNet, and temporal "
                            "layers attach to nothing else. Load a Stable Diffusion checkpoint.")
    return unet


def model_title(model: Model) -> str:
    names = {"SD15": "Stable Diffusion 1.x", "SD20": "Stable Diffusion 2.x",
             "SD21UnclipL": "Stable Diffusion 2.1 unCLIP", "SD21UnclipH": "Stable Diffusion 2.1 unCLIP", "SDXL": "SDXL",
             "SDXLRefiner": "SDXL refiner", "SSD1B": "SSD-1B", "SD_X4Upscaler": "the Stable Diffusion x4 upscaler",
             "SVD_img2vid": "Stable Video Diffusion"}
    config = model.model.model_config
    kind = type(config).__name__
    own = inspect.getattr_static(config, "title", None)     # asked plainly, core's configs log what they lack
    return own or names.get(kind, kind)


def context_dim(model: Model) -> int | None:
    """Width of the text that the model attends to, None where it does not say."""
    return getattr(model.model.model_config, "unet_config", {}).get("context_dim")
