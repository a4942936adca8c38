"""The temporal layers that a sampler of the pack needs on its MODEL, and the frame rate that they make."""

from ...temporal.errors import VideoLDMError
from .options import LayerSet, layer_sets
from .sockets import Model

FALLBACK_FPS = 8.0      # where the layers' file names no frame rate


def require_layers(model: Model) -> list[LayerSet]:
    """The sets of temporal layers on a MODEL; refused where it has none."""
    sets = layer_sets(model)
    if not sets:
        raise VideoLDMError("The connected MODEL has no temporal layers, so its frames would be unrelated images. "
                            "Connect the MODEL of Load Temporal Layers.")
    return sets


def fps_of(sets: list[LayerSet]) -> float:
    """Frames per second that the layers make, from the last set that says."""
    return next((layers.fps for layers in reversed(sets) if layers.fps), FALLBACK_FPS)
