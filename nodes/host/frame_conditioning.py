"""CONDITIONING of a video that is sampled in several calls: each call gets the items of its own frames.

Core gives the items of a CONDITIONING to the images of one call, in order. It repeats them if there are fewer items
than images. A node that samples a video in several calls therefore cuts the CONDITIONING for each call. Then every
frame has the items that it would have in one call for the whole video. Frame Windows does the same within a call
(windows.py).
"""

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from .made_for import check_made_for, without_length
from .options import VideoFrames, set_clip_options, transformer_options, with_clip_options
from .sampling import SamplerSettings
from .sockets import Model
from .windows import AD_PARAMS, windowed_control, windowed_value

# Options of a CONDITIONING that hold an item for each image: {name: least number of dimensions}. With fewer dimensions
# there is one item for all images.
PER_FRAME = {"pooled_output": 2, "cross_attn_controlnet": 3, "pooled_output_controlnet": 2, "attention_mask": 2,
             "mask": 3, "noise_concat": 4, "concat_latent_image": 4, "concat_image": 4, "concat_mask": 3,
             "denoise_mask": 3}


@dataclass(frozen=True)
class CallFrames:
    """Which frames of a video the images of a call are."""

    numbers: tuple[int, ...]        # the frame number of each image of the call, counted through all clips
    total: int                      # frames of all clips together
    clip: int                       # frames of one clip
    per_key: int = 1                # frames from one key frame to the next; 1: there are no key frames

    def of(self, full: Tensor) -> Tensor:
        """The items of this call. `full` has one item for all frames, one for each frame, or fewer, to be repeated."""
        return full if len(full) == 1 else full[self.items(len(full))]

    @property
    def keys(self) -> int:
        """Key frames of one clip. Without key frames, its frames."""
        return -(-self.clip // self.per_key)

    @property
    def takes(self) -> list[int]:
        """The numbers of items that fit a clip: one for each frame, or one for each key frame."""
        return [self.clip, self.keys] if self.per_key > 1 else [self.clip]

    def items(self, count: int) -> list[int]:
        """For each image, which of `count` items belongs to it.

        There may be an item for each frame, or for each key frame. Any other number of items is repeated in turn, as
        core repeats it.
        """
        keys = self.keys
        for_keys = self.per_key > 1 and count in (keys, keys * (self.total // self.clip))
        if for_keys and count not in (self.total, self.clip):
            return [(number // self.clip * keys + number % self.clip // self.per_key) % count
                    for number in self.numbers]
        return [number % count for number in self.numbers]


def frames_of_batch(images: int, clip: int) -> CallFrames:
    """A call with all frames of all clips."""
    return CallFrames(tuple(range(images)), images, clip)


def frames_of_clip(start: int, frames: int, length: int) -> CallFrames:
    """A clip that begins at frame `start` of a video. Frames beyond the video's end get the last frame's items."""
    return CallFrames(tuple(min(start + n, length - 1) for n in range(frames)), length, length)


def model_of(model: Model, clip: int, prompt: list | None, fps: float, frames: CallFrames) -> Model:
    """A clone of MODEL for one call on some frames of a video.

    Layer Strength counts along the video. Other packs read the frame numbers from the clone's options: IPAdapter, for
    one, may have a picture for each frame.

    Args:
        model: the MODEL.
        clip: frames of one clip in the call.
        prompt: CONDITIONING for the temporal layers alone; None: they take the positive text.
        fps: the frame rate to make.
        frames: the frames of the call.
    """
    m = with_clip_options(model, clip, temporal_texts(prompt, frames), fps)
    set_clip_options(m, video=VideoFrames(tuple(number % frames.clip for number in frames.numbers), frames.clip))
    transformer_options(m)[AD_PARAMS] = {"full_length": frames.total, "context_length": len(frames.numbers),
                                         "sub_idxs": list(frames.numbers)}
    return m


def settings_of(settings: SamplerSettings, frames: CallFrames) -> SamplerSettings:
    """Sampling settings with the conditionings of one call."""
    controls: dict = {}
    return replace(settings, positive=conditioning_of(settings.positive, frames, controls),
                   negative=conditioning_of(settings.negative, frames, controls))


def conditioning_of(conditioning: list, frames: CallFrames, controls: dict) -> list:
    """A CONDITIONING for the frames of one call.

    controls: copies of ControlNets, by id. Pass the same dict for all CONDITIONINGs of a call: core runs two
    conditionings together only if they have the same ControlNet object.

    Raises if Prompt Travel made it for another number of frames.
    """
    for text, options in conditioning:
        check_made_for(text, options, frames.takes)
    return [[text if text is None else frames.of(text), options_of(options, frames, controls)]
            for text, options in conditioning]


def options_of(options: dict, frames: CallFrames, controls: dict) -> dict:
    """The options of a CONDITIONING, for the frames of one call."""
    out = {name: frames.of(value) if per_frame(name, value, frames.total) else value
           for name, value in without_length(options).items()}
    if options.get("control") is not None:
        out["control"] = windowed_control(options["control"], frames, controls)
    if options.get("model_conds"):
        out["model_conds"] = {name: windowed_value(value, frames) for name, value in options["model_conds"].items()}
    return out


def per_frame(name: str, value: Any, total: int) -> bool:
    """Whether an option has an item for each image of a batch.

    An option that core does not know counts if it has exactly one item for each frame of the video.
    """
    if not isinstance(value, Tensor) or not value.ndim:
        return False
    if name in PER_FRAME:
        return value.ndim >= PER_FRAME[name]
    return len(value) == total > 1


def temporal_texts(prompt: list | None, frames: CallFrames) -> dict[int, Tensor] | None:
    """The temporal layers' own text in place of the positive one, for the frames of a call."""
    if prompt is None:
        return None
    text, options = prompt[0]
    check_made_for(text, options, frames.takes)
    return {0: frames.of(text)}
