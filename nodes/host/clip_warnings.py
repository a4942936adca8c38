"""Warnings that a sampling begins with: what its temporal layers or its network were not trained on.

They are shown on the node that samples, core's KSampler too. The video is made all the same.
"""

import inspect

import torch

from . import notes
from .options import LayerSet, clip_options, layer_sets
from .sockets import Model

LATENT_PIXELS = 8       # along each side of a latent


def warn_of_clip(model: Model, model_options: dict, noise: torch.Tensor) -> None:
    """Warn of a clip that differs from the clips of training.

    Args:
        model: the MODEL that samples.
        model_options: of the sampling.
        noise: `n c h w`, all frames.
    """
    frames = frames_of_call(model_options, len(noise))
    handler = model_options.get("context_handler")
    window = getattr(handler, "window_widget", None)
    found = [] if window and len(noise) == 1 else [length_warning(layers, frames, window)
                                                   for layers in layer_sets(model)]
    found.append(size_warning(model, noise))
    for text in filter(None, found):
        notes.warn(text)


def frames_of_call(model_options: dict, images: int) -> int:
    """Frames that the layers see together: those of a window, else those of a clip."""
    frames = clip_options(model_options.get("transformer_options", {})).frames or images
    handler = model_options.get("context_handler")
    over_frames = hasattr(handler, "window_widget") or getattr(handler, "dim", None) == 0
    return min(frames, handler.context_length) if handler is not None and over_frames else frames


def length_warning(layers: LayerSet, frames: int, window: str | None = None) -> str | None:
    """A warning of a clip of another length than that of training, if it matters to these layers.

    window: the widget that says how many frames the layers see, where the node has one.
    """
    params = layers.params
    if layers.strength == 0:
        return None
    if frames == 1 and params.frames > 1:
        if window:
            return f"The layers see one frame at a time, so they do nothing. Set {window} to {params.frames}."
        return ("The clip has one frame, so nothing can move. Set frames to "
                f"{params.frames}, or make the latent that many frames long (batch_size).")
    beyond_positions = params.positions is not None and frames > params.positions      # the layers warn of these
    if frames <= params.frames or layers.max_distance is not None or beyond_positions:
        return None
    if window:
        advice = f"Set {window} to {params.frames}."
    else:
        advice = f"Set frames to {params.frames}, or connect Frame Windows behind Load Temporal Layers."
    return (f"{frames} frames are sampled together, and {layers.name or layers.title} was trained on clips of "
            f"{params.frames}: motion may be worse. {advice}")


def size_warning(model: Model, noise: torch.Tensor) -> str | None:
    """A warning of another size than that of training, for a network that knows one size only: the demo's."""
    trained = inspect.getattr_static(model.model.model_config, "trained_size", None)
    size = noise.shape[-1] * LATENT_PIXELS, noise.shape[-2] * LATENT_PIXELS
    if trained is None or size == trained:
        return None
    return (f"The demo was trained on pictures of {trained[0]}x{trained[1]} pixels, and these have "
            f"{size[0]}x{size[1]}: they will be poor. Set width to {trained[0]} and height to {trained[1]}.")
