"""Checks that a text fits the model that attends to it."""

import inspect
from collections.abc import Iterable

from torch import Tensor

from ...temporal.errors import VideoLDMError
from .image_model import context_dim, model_title
from .sockets import Conditioning, Model


def check_texts(model: Model, positive: Conditioning, negative: Conditioning,
                temporal_prompt: Conditioning | None = None) -> None:
    """Refuse a CONDITIONING that the text encoder of another model made."""
    for name, conditioning in (("positive", positive), ("negative", negative), ("temporal_prompt", temporal_prompt)):
        check_width(model, name, [text for text, _ in conditioning or []])


def check_conditions(model: Model, conditions: dict[str, list[dict]]) -> None:
    """The same for the conditions of a guider, which any sampler made: {name: conditions as core prepares them}."""
    for name, prepared in conditions.items():
        check_width(model, name, [condition["cross_attn"] for condition in prepared or []
                                  if condition.get("cross_attn") is not None])


def check_width(model: Model, name: str, texts: list[Tensor]) -> None:
    """Refuse texts `n l d` of another width than the MODEL's. Its cross-attention would fail on them deep inside."""
    wanted = context_dim(model)
    width = other_width(texts, wanted)
    if width is not None:
        source = inspect.getattr_static(model.model.model_config, "text_source",
                                        "the CLIP of the MODEL's own checkpoint")
        raise VideoLDMError(f"The text of {name} has a width of {width}, and the connected MODEL "
                            f"({model_title(model)}) takes {wanted}: it was encoded with the CLIP of another "
                            f"model. Connect a CLIP Text Encode with {source}.")


def other_width(texts: Iterable[Tensor], wanted: int | None) -> int | None:
    """The width of the first text that is not `wanted` wide. None if all are, or if any width will do."""
    return next((text.shape[-1] for text in texts if wanted is not None and text.shape[-1] != wanted), None)
