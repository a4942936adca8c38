"""Settings of temporal layers and of clips, in a MODEL's transformer_options.

There are two frozen records: a LayerSet for each set of layers, and one ClipOptions. Each clone of a MODEL has records
of its own.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from ...temporal.errors import VideoLDMError
from ...temporal.formats.temporal_file import NoiseLevels
from ...temporal.layer_strength import FrameStrength
from ...temporal.params import StackParams
from ...temporal.picture_input import PictureMotion
from .sockets import Model

PREFIX = "video_ldm/"       # the key of each set of layers begins with it
CLIP = "video_ldm_clip"     # the key of the ClipOptions


@dataclass(frozen=True)
class LayerSet:
    """One set of temporal layers on a MODEL."""

    params: StackParams
    title: str = ""                         # what the layers are, with an article
    name: str = ""                          # the name of their file, "" if there is none
    fps: float | None = None                # frame rate that the clips they make are played at
    noise: NoiseLevels | None = None        # for an upscaler's layers: noise levels of the small frames in training
    strength: float = 1.0                   # 0 is the image model, 1 is as trained
    max_distance: int | None = None         # how many frames away attention over time reaches; None: all frames
    told_fps: float | None = None           # frame rate to tell a network with an embedding of it; None: its authors'
    network: bool = False                   # whether they are the own layers of the MODEL's network
    picture_motion: PictureMotion = PictureMotion()     # for layers that move a given picture
    by_frame: tuple[FrameStrength, ...] = ()    # further strengths by frame and region; they multiply
    # What by_frame gives the images of one sampling, `(b t) h w` or `(b t) 1 1`; set when sampling starts
    strengths: Tensor | None = field(default=None, compare=False)
    # Which of these images have strength somewhere in the whole picture, of which the map may be a tile.
    acting: Tensor | None = field(default=None, compare=False)


@dataclass(frozen=True)
class ContextFrames:
    """Frames of a clip that are given: the model makes the others to go with them."""

    # `(k n) c h w`, as a LATENT has them; k is 1 or the number of clips. Pictures `(k n) 3 h w` where per_latent is 8
    latents: Tensor
    scaled: Tensor                  # the same, scaled as the model has them
    positions: tuple[int, ...]      # n frame numbers; negative ones count from the clip's end. May be empty
    frames: int | None = None       # frames of a clip; set when sampling starts, and positions then are not negative
    grey: Tensor | None = None      # mid-grey `c h w`, encoded and scaled, for networks that see it in unknown frames
    per_latent: int = 1             # places along each side of a latent: 8 where the frames are pictures


@dataclass(frozen=True)
class VideoFrames:
    """Which frames of a longer video the images of a sampling are."""

    numbers: tuple[int, ...]        # of each image, within its video
    length: int                     # frames of the video


@dataclass(frozen=True)
class ClipOptions:
    """Settings of the clips that are sampled."""

    frames: int | None = None                       # frames of one clip; None: the batch is one clip
    images: int | None = None                       # images of one condition in core's present batch
    texts: Mapping[int, Tensor] | None = None       # {0 positive, 1 negative: the temporal layers' own text `n l d`}
    fps: float | None = None                        # the frame rate to make, for layers with a frame rate token
    context: ContextFrames | None = None
    hide_context: bool = False                      # True while context guidance predicts without context frames
    video: VideoFrames | None = None                # None: each clip is a whole video


def transformer_options(model: Model) -> dict:
    """A clone's own options, to be changed. They are a new copy: the MODEL that was cloned keeps its own."""
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
        model: the MODEL.
        frames: frames of one clip.
        texts: the temporal layers' own text, {0: positive, 1: negative}; None changes nothing.
        fps: the frame rate to make, for layers with a frame rate token; None changes nothing.
    """
    m = model.clone()
    changes = {"frames": frames, "texts": texts or None, "fps": fps}
    set_clip_options(m, **{name: value for name, value in changes.items() if value is not None})
    return m


def frames_per_clip(images: int, options: dict) -> int:
    """Frames of one clip in a batch of `images`. If the options do not say, the whole batch is one clip."""
    frames = clip_options(options).frames or images
    if images % frames:
        raise VideoLDMError(f"The batch of {images} frames does not divide into clips of {frames} frames. Make the "
                            "batch a multiple of the frames per clip, or set frames per clip to 0 on Load Temporal "
                            "Layers.")
    return frames


@dataclass(frozen=True)
class CallClips:
    """The images of one call of the network. Their order is repeats x conditions x clips x frames."""

    repeats: int                    # how often another node repeats the batch, as for tiles of the picture
    conditions: tuple[int, ...]     # core's numbers of the conditions
    clips: int                      # clips of each condition
    frames: int                     # frames of each clip

    @property
    def parts(self) -> tuple[int, ...]:
        """The condition of each part of the batch."""
        return self.conditions * self.repeats


def clips_in_call(batch: int, options: dict) -> CallClips:
    """What a call of `batch` images holds. The frames come from the options: other nodes may repeat the batch."""
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
