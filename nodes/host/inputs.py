"""Checks of a node's inputs. ComfyUI checks a widget's value, but not a value that comes through a link.

Every node of the pack has `@checked` above its `execute`. It compares each value with the node's schema. A wrong value
is refused with one sentence before the node begins to work. What the node reports and warns of is shown on the page.
"""

import functools
import inspect
import numbers
from collections.abc import Callable
from typing import Any, TypeGuard

import torch

from ...temporal.errors import VideoLDMError
from . import notes
from .api import io
from .latents import CLIP_FRAMES, RATE
from .sockets import Audio, Clip, Model, Vae, Video
from .video_sources import sound_of

# Inputs of these names may name a file outside their list: the node reports a missing file.
FILES = ("file", "autoencoder", "diffusion")
LONGEST_QUOTE = 40      # characters of a wrong text that a sentence quotes
OVERSHOT = 0.01         # how far a mask may go beyond black and white: resizing can make it overshoot
LINKED = "Correct what is linked there."


class Wrong(Exception):
    """A value is wrong. Its text is the end of a sentence that begins with the input's name."""


def checked(execute: Callable) -> Callable:
    """A decorator for a node's `execute`, below @classmethod. It checks the inputs against the node's schema.

    It also gives the page the node's warnings and report.
    """
    signature = inspect.signature(execute)

    @functools.wraps(execute)
    def run(cls: Any, *args: Any, **kwargs: Any) -> Any:
        given = signature.bind(cls, *args, **kwargs)
        schema = cls.define_schema()
        for declared in schema.inputs:
            if declared.id in given.arguments:
                value = given.arguments[declared.id]
                given.arguments[declared.id] = accepted(schema.display_name, declared, value)
        with notes.collected() as warnings:
            output = execute(*given.args, **given.kwargs)
        return notes.with_text(schema, output, warnings)
    marked: Any = run
    marked.checks_inputs = True
    return marked


def accepted(node: str, declared: io.Input, value: Any) -> Any:
    """The value for an input, with a whole number as int. Raises if the input does not take the value."""
    if value is None and declared.optional:
        return getattr(declared, "default", None)       # a widget whose link gave nothing
    try:
        return CHECKS.get(str(declared.get_io_type()), anything)(declared, value)
    except Wrong as wrong:
        raise VideoLDMError(f"{node}: {declared.id} {wrong}") from None


def anything(declared: io.Input, value: Any) -> Any:
    if value is None:
        raise Wrong(f"was given nothing, and it takes {declared.get_io_type()}. {LINKED}")
    return value


def is_real(value: Any) -> TypeGuard[float]:
    """Whether a value is a number. Python counts True and False as numbers, and no input takes them for one."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


# Widgets

def whole_number(declared: io.Input, value: Any) -> int:
    takes = f"whole numbers from {declared.min} to {declared.max}"
    if not is_real(value) or not declared.min <= value <= declared.max:
        raise Wrong(f"is {shown(value)}, and it takes {takes}. {LINKED}")
    if value != int(value):
        raise Wrong(f"is {shown(value)}, a fraction, and it takes {takes}. {LINKED}")
    return int(value)


def number(declared: io.Input, value: Any) -> float:
    # `not min <= value <= max` also refuses NaN, for which every comparison is false.
    if not is_real(value) or not declared.min <= value <= declared.max:
        raise Wrong(f"is {shown(value)}, and it takes numbers from {declared.min:g} to {declared.max:g}. {LINKED}")
    return float(value)


def boolean(declared: io.Input, value: Any) -> bool:
    if not isinstance(value, bool):
        raise Wrong(f"is {shown(value)}, and it takes true or false. {LINKED}")
    return value


def text(declared: io.Input, value: Any) -> str:
    if not isinstance(value, str):
        raise Wrong(f"is {shown(value)}, and it takes text. {LINKED}")
    return value


def choice(declared: io.Input, value: Any) -> str:
    if declared.id in FILES:
        if not isinstance(value, str) or not value:
            raise Wrong(f"is {shown(value)}, and it takes the name of a file. Choose one from its list.")
        return value
    options = list(declared.options or [])
    if value not in options:
        names = ", ".join(map(str, options[:12])) + (", ..." if len(options) > 12 else "")
        raise Wrong(f"is {shown(value)}, and it takes one of these: {names}. {LINKED}")
    return value


def shown(value: Any) -> str:
    """A wrong value as text, short enough for a sentence."""
    if value is None:
        return "nothing"
    if isinstance(value, str):
        return f"'{value[:LONGEST_QUOTE]}'" + ("..." if len(value) > LONGEST_QUOTE else "")
    if isinstance(value, int) and value.bit_length() > 128:
        return f"a number of {value.bit_length()} bits"
    if isinstance(value, bool | numbers.Number):
        return str(value)
    return f"of the type {type(value).__name__}"


# What is connected

def model(declared: io.Input, value: Any) -> Model:
    if not all(hasattr(value, part) for part in ("clone", "model_options", "get_model_object")):
        raise Wrong(f"was given {what(value)}, and it takes a MODEL. Connect one, such as that of Load Checkpoint.")
    return value


def vae(declared: io.Input, value: Any) -> Vae:
    if not all(hasattr(value, part) for part in ("encode", "decode", "first_stage_model")):
        raise Wrong(f"was given {what(value)}, and it takes a VAE. Connect one, such as that of Load Checkpoint.")
    return value


def clip(declared: io.Input, value: Any) -> Clip:
    if value is None:
        raise Wrong("was given nothing, and it takes a CLIP. A file with a network alone has none: load one with Load "
                    "CLIP, or take that of Load Checkpoint.")
    if not all(hasattr(value, part) for part in ("tokenize", "encode_from_tokens_scheduled")):
        raise Wrong(f"was given {what(value)}, and it takes a CLIP. Connect one, such as that of Load Checkpoint.")
    return value


def conditioning(declared: io.Input, value: Any) -> list | tuple:
    if not isinstance(value, list | tuple):
        raise Wrong(f"was given {what(value)}, and it takes a CONDITIONING. Connect that of CLIP Text Encode.")
    if not value:
        raise Wrong("is an empty CONDITIONING. Connect that of CLIP Text Encode.")
    for entry in value:
        if not isinstance(entry, list | tuple) or len(entry) != 2 or not isinstance(entry[1], dict):
            raise Wrong("is no CONDITIONING of text and options. Connect that of CLIP Text Encode.")
        if entry[0] is None:
            raise Wrong("is a CONDITIONING without text, which image models attend to. Connect that of CLIP Text "
                        "Encode.")
        if not isinstance(entry[0], torch.Tensor) or entry[0].ndim != 3 or not entry[0].numel():
            raise Wrong("is a CONDITIONING whose text is no batch of tokens. Connect that of CLIP Text Encode.")
    return value


def latent(declared: io.Input, value: Any) -> dict:
    samples = value.get("samples") if isinstance(value, dict) else None
    if samples is None:
        raise Wrong(f"was given {what(value)}, and it takes a LATENT with samples. Connect that of a sampler or of VAE "
                    "Encode.")
    if not isinstance(samples, torch.Tensor):
        raise Wrong("is a LATENT of another kind of model, whose samples are no frames. Connect that of a Stable "
                    "Diffusion model.")
    if samples.ndim and not len(samples):
        raise Wrong("is a LATENT without frames. Connect the LATENT of a sampler.")
    if samples.ndim < 4 or not samples.numel():
        raise Wrong(f"is a LATENT of the size {size(samples)}, which is no batch of frames (frames, channels, height, "
                    "width). Connect that of a sampler or of VAE Encode.")
    if not torch.isfinite(samples).all():
        raise Wrong("is a LATENT with values that are no numbers (NaN or infinity). Whatever made it has failed: "
                    "sample it again, with a lower cfg or in float32.")
    check_entries(value)
    return value


def check_entries(value: dict) -> None:
    """Check the frame rate and the clip length that a LATENT may carry."""
    rate, frames = value.get(RATE), value.get(CLIP_FRAMES)
    if rate is not None and (not is_real(rate) or not 0 <= rate <= 1e6):
        raise Wrong(f"is a LATENT whose frame rate is {shown(rate)}. Sample it again, or set fps where there is one.")
    if frames is not None and (isinstance(frames, bool) or not isinstance(frames, numbers.Integral) or frames < 1):
        raise Wrong(f"is a LATENT that says its clips have {shown(frames)} frames. Sample it again.")


def image(declared: io.Input, value: Any) -> torch.Tensor:
    if not isinstance(value, torch.Tensor):
        raise Wrong(f"was given {what(value)}, and it takes an IMAGE. Connect one.")
    if value.ndim != 4:
        raise Wrong(f"is of the size {size(value)}, and an IMAGE has frames, height, width and channels. Connect one.")
    if not len(value):
        raise Wrong("is an empty batch, with no picture in it. Connect at least one frame.")
    if not value.numel():
        raise Wrong(f"has pictures of {value.shape[2]}x{value.shape[1]} pixels and {value.shape[3]} channels. Connect "
                    "pictures that are not empty.")
    return value


def mask(declared: io.Input, value: Any) -> torch.Tensor:
    """A mask `n h w` with values from 0 to 1. Core's nodes may give one picture as `h w`, and overshoot a little."""
    if not isinstance(value, torch.Tensor):
        raise Wrong(f"was given {what(value)}, and it takes a MASK. Connect one.")
    if value.ndim not in (2, 3) or not value.numel():
        raise Wrong(f"is of the size {size(value)}, and a MASK has pictures, height and width. Connect one.")
    value = value.float().cpu()
    if not bool(((value > -OVERSHOT) & (value < 1 + OVERSHOT)).all()):
        raise Wrong("has values beyond 0 (black) and 1 (white), or values that are no numbers. Connect a MASK between "
                    "black and white.")
    return value.reshape(-1, *value.shape[-2:]).clamp(0, 1)


def video(declared: io.Input, value: Any) -> Video:
    if not hasattr(value, "get_components"):
        raise Wrong(f"was given {what(value)}, and it takes a VIDEO. Connect that of Load Video or Load Video Frames.")
    return value


def audio(declared: io.Input, value: Any) -> Audio:
    if value is None:
        raise Wrong(f"was given nothing, and it takes an AUDIO. {LINKED}")
    sound_of(value)     # refuses what no video can have as its sound
    return value


def pvdm(declared: io.Input, value: Any) -> Any:
    if not all(hasattr(value, part) for part in ("autoencoder", "unet", "shape")):
        raise Wrong(f"was given {what(value)}, and it takes a PVDM. Connect that of Load PVDM.")
    return value


def what(value: Any) -> str:
    return "nothing" if value is None else f"something of the type {type(value).__name__}"


def size(tensor: torch.Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "1"


CHECKS: dict[str, Callable] = {
    "INT": whole_number, "FLOAT": number, "BOOLEAN": boolean, "STRING": text, "COMBO": choice, "MODEL": model,
    "CLIP": clip, "VAE": vae, "CONDITIONING": conditioning, "LATENT": latent, "IMAGE": image, "MASK": mask,
    "VIDEO": video, "AUDIO": audio, "VIDEO_LDM_PVDM": pvdm}
