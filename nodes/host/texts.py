"""The texts that nodes are given, against the model that attends to them."""

from ...temporal.errors import VideoLDMError
from .image_model import context_dim, model_title
from .sockets import Model


def check_texts(model: Model, positive: list, negative: list, temporal_prompt: list | None = None) -> None:
    """Refuse texts that were written by the text encoder of another model."""
    wanted = context_dim(model)
    if wanted is None:
        return
    for name, conditioning in (("positive", positive), ("negative", negative), ("temporal_prompt", temporal_prompt)):
        for text, _ in conditioning or []:
            if text.shape[-1] != wanted:
                raise VideoLDMError(f"The text of {name} has a width of {text.shape[-1]}, and the connected MODEL "
                                    f"({model_title(model)}) takes {wanted}: it was encoded with the CLIP of another "
                                    "model. Connect a CLIP Text Encode with the CLIP of the MODEL's own checkpoint.")
