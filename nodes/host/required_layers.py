"""For the pack's samplers: the temporal layers on their MODEL, and the frame rate of what these make."""

from ...temporal.errors import VideoLDMError
from ...temporal.formats.temporal_file import TemporalFile
from .options import LayerSet, layer_sets
from .sockets import Model

FALLBACK_FPS = 8.0      # if no file of layers names a frame rate


def require_layers(model: Model) -> list[LayerSet]:
    """The sets of temporal layers on a MODEL. Raises if there are none."""
    sets = layer_sets(model)
    if not sets:
        raise VideoLDMError("The connected MODEL has no temporal layers, so its frames would be unrelated images. "
                            "Connect the MODEL of Load Temporal Layers.")
    return sets


def refuse_own_layers(model: Model, layers: TemporalFile) -> None:
    """Refuse layers on a whole network that has the same layers already. Both would act, one after the other."""
    for own in layer_sets(model):
        if own.network and own.params.bricks == layers.params.bricks:
            raise VideoLDMError(f"{layers.name} holds the same temporal layers as the connected MODEL ({own.title}), "
                                "and these act on it already. Connect the MODEL to the sampler as it is, or connect "
                                "an image model here.")


def fps_of(sets: list[LayerSet]) -> float:
    """The frame rate of what the layers make, by the last set that names one."""
    return next((layers.fps for layers in reversed(sets) if layers.fps), FALLBACK_FPS)
