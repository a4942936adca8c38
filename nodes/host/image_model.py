"""Facts about a MODEL: its network, its name, the width of its text, and whether temporal layers can attach."""

import inspect

from comfy.patcher_extension import WrappersMP
from torch import nn

from ...temporal.errors import VideoLDMError
from .sockets import Model, Patcher

COMPILED = "torch.compile"      # core's key for a compiled model


def refuse_compiled(patcher: Patcher) -> None:
    """Refuse a compiled model. torch.compile does not guard hooks, so the temporal layers would silently not run."""
    wrappers = patcher.wrappers.get(WrappersMP.APPLY_MODEL, {})
    if COMPILED in wrappers or hasattr(patcher.get_model_object("diffusion_model"), "_orig_mod"):
        raise VideoLDMError("This MODEL is compiled by TorchCompileModel, which would silently leave the temporal "
                            "layers out. Remove TorchCompileModel from the graph.")


def spatial_unet(model: Model) -> nn.Module:
    """The UNet of a MODEL. Raises if temporal layers cannot attach to it."""
    unet = getattr(getattr(model, "model", None), "diffusion_model", None)
    if not all(hasattr(unet, part) for part in ("input_blocks", "middle_block", "output_blocks")):
        raise VideoLDMError(f"The connected MODEL ({model_title(model)}) is no Stable Diffusion UNet, and temporal "
                            "layers attach to nothing else. Load a Stable Diffusion checkpoint.")
    return unet


def model_title(model: Model) -> str:
    """The name of a MODEL's kind, for messages."""
    names = {"SD15": "Stable Diffusion 1.x", "SD20": "Stable Diffusion 2.x",
             "SD21UnclipL": "Stable Diffusion 2.1 unCLIP", "SD21UnclipH": "Stable Diffusion 2.1 unCLIP", "SDXL": "SDXL",
             "SDXLRefiner": "SDXL refiner", "SSD1B": "SSD-1B", "SD_X4Upscaler": "the Stable Diffusion x4 upscaler",
             "SVD_img2vid": "Stable Video Diffusion"}
    config = model.model.model_config
    kind = type(config).__name__
    own = inspect.getattr_static(config, "title", None)     # getattr would make core's configs log a missing attribute
    return own or names.get(kind, kind)


def context_dim(model: Model) -> int | None:
    """Width of the text that the model attends to. None if its config does not say."""
    return getattr(model.model.model_config, "unet_config", {}).get("context_dim")
