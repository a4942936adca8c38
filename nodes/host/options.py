"""What a MODEL carries about its temporal layers and its clips, in ComfyUI's transformer_options.

Two frozen records travel there: a LayerSet for each set of layers, and one ClipOptions. They belong to a clone of a
MODEL, so two clones never see each other's.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from ...temporal.errors import VideoLDMError
from ...temporal.formats.temporal_file import NoiseLevels
from ...temporal.params import StackParams
from .sockets import Model

PREFIX = "video_ldm/"       # each set of layers has a key of its own that begins so
CLIP = "video_ldm_clip"     # the key of the ClipOptions


@dataclass(frozen=True)
class LayerSet:
    """One set of temporal layers on a MODEL."""

    params: StackParams
    title: str = ""                         # what the layers are, with an article
    name: str = ""                          # of the file they came from, "" where there is none
    fps: float | None = None                # frames per second of the clips they make
    noise: NoiseLevels | None = None        # of an upscaler's layers: the noise on the small frames that they know
    strength: float = 1.0                   # 0 is the image model, 1 is as trained
    max_distance: int | None = None         # frames that attention over time reaches; None: all


@dataclass(frozen=True)
class ContextFrames:
    """Known frames of the clips that are sampled."""

    latents: Tensor                 # `(k n) c h w`, as a LATENT has them; k is 1 or the number of clips
    scaled: Tensor                  # the same as the model has them
    positions: tuple[int, ...]      # n frame numbers, counted from the end where negative
    frames: int | None = None       # of a clip, once it is being sampled; the positions then count from its start


@dataclass(frozen=True)
class ClipOptions:
    """What a sampling says about its clips."""

    frames: int | None = None                       # of one clip; None: the whole batch, until a sampling starts
    images: int | None = None                       # of one condition in the calls of the network that run now
    texts: Mapping[int, Tensor] | None = None       # {0 positive, 1 negative: text of the temporal layers, `n l d`}
    fps: float | None = None                        # the frame rate to make, for layers that are told it
    context: ContextFrames | None = None
    hide_context: bool = False                      # context guidance asks for the prediction without context frames


def transformer_options(model: Model) -> dict:
    """A clone's own options. They are copied first, so that the MODEL it was cloned from never sees a change."""
    options = model.model_options.get("transformer_options", {}).copy()
    model.model_options["transformer_options"] = options
    return options


def layer_sets(model: Model) -> list[LayerSet]:
    """The sets of temporal layers on a MODEL, in the order they act."""
    return list(layer_sets_in(model.model_options.get("transformer_options", {})).values())


def layer_sets_in(options: dict) -> dict[str, LayerSet]:
    """{key: set} of the sets of temporal layers in transformer_options."""
    return {key: value for key, value in options.items() if key.startswith(PREFIX) and isinstance(value, LayerSet)}


def clip_options(options: dict) -> ClipOptions:
    """The ClipOptions in transformer_options, or the defaults."""
    return options.get(CLIP) or ClipOptions()


def set_clip_options(model: Model, **changes: Any) -> None:
    """Change some of a clone's ClipOptions."""
    options = transformer_options(model)
    options[CLIP] = replace(clip_options(options), **changes)


def with_clip_options(model: Model, frames: int, texts: Mapping[int, Tensor] | None = None,
                      fps: float | None = None) -> Model:
    """A clone of MODEL that runs clips of `frames` frames.

    Args:
        texts: what its temporal layers hear, {0: positive, 1: negative}; None leaves it as it is.
        fps: the frame rate to make, for layers that are told it; None leaves it as it is.
    """
    m = model.clone()
    changes = {"frames": frames, "texts": texts or None, "fps": fps}
    set_clip_options(m, **{name: value for name, value in changes.items() if value is not None})
    return m


def frames_per_clip(images: int, options: dict) -> int:
    """Frames of one clip of a batch of `images`; without ClipOptions the whole batch is one clip."""
    frames = clip_options(options).frames or images
    if images % frames:
        raise VideoLDMError(f"The batch of {images} frames does not divide into clips of {frames} frames. Make the "
                            "batch a multiple of the frames per clip, or set frames per clip to 0 on Load Temporal "
                            "Layers.")
    return frames


@dataclass(frozen=True)
class CallClips:
    """The images of one call of the network, in their order: repeats x conditions x clips x frames."""

    repeats: int                    # of the batch: other nodes run several tiles of the picture in one call
    conditions: tuple[int, ...]     # as core numbers them in this call
    clips: int                      # of each condition
    frames: int                     # of each clip

    @property
    def parts(self) -> tuple[int, ...]:
        """The condition of each part of the batch."""
        return self.conditions * self.repeats


def clips_in_call(batch: int, options: dict) -> CallClips:
    """What a call of `batch` images holds. Its batch decides nothing: other nodes multiply it within a call."""
    clip, conditions = clip_options(options), tuple(options.get("cond_or_uncond") or [0])
    if clip.frames is None:
        raise VideoLDMError("The model was called outside ComfyUI's own sampling, so the number of frames of a clip is "
                            "not known. Set frames per clip on Load Temporal Layers.")
    images = clip.images or batch // len(conditions)
    expected = images * len(conditions)
    if not expected or batch % expected:
        raise VideoLDMError(f"A call of the model holds {batch} images where the sampling has {expected}. Another node "
                            "divides the batch within the call, and temporal layers need all frames of a clip "
                            "together. Remove that node.")
    frames = frames_per_clip(images, options)
    return CallClips(batch // expected, conditions, images // frames, frames)
