"""CONDITIONING of a video that is sampled in several calls: each call gets the items of its own frames.

Core spreads the items of a CONDITIONING over the batch of one call: the first item goes to the first image, fewer items
than images are repeated in turn. A node that samples a video in several calls cuts the CONDITIONING first, so that
every frame has what it would have in one call for the whole video. Frame Windows does the same within a call
(windows.py).
"""

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from .options import transformer_options, with_clip_options
from .sampling import SamplerSettings
from .sockets import Model
from .windows import AD_PARAMS, windowed_control, windowed_value

# What core's image models take one of for each image of a batch, beside the text itself, and its dimensions at least:
# with fewer it is one for all images.
PER_FRAME = {"pooled_output": 2, "cross_attn_controlnet": 3, "pooled_output_controlnet": 2, "attention_mask": 2,
             "mask": 3, "noise_concat": 4, "concat_latent_image": 4, "concat_image": 4, "concat_mask": 3,
             "denoise_mask": 3}


@dataclass(frozen=True)
class CallFrames:
    """Which frames of a video the images of a call are."""

    numbers: tuple[int, ...]        # of each image of the call, counted through all clips
    total: int                      # frames of all clips together
    clip: int                       # frames of one clip
    per_key: int = 1                # frames for each key frame; 1: there are no key frames

    def of(self, full: Tensor) -> Tensor:
        """The call's part of something with one item for each frame, or one for all; fewer items are repeated."""
        return full if len(full) == 1 else full[self.items(len(full))]

    def items(self, count: int) -> list[int]:
        """Which of `count` items belongs to each image.

        As many items as frames are one for each frame, as many as key frames one for each key frame. Other counts are
        repeated in turn, as core repeats them.
        """
        keys = -(-self.clip // self.per_key)
        for_keys = self.per_key > 1 and count in (keys, keys * (self.total // self.clip))
        if for_keys and count not in (self.total, self.clip):
            return [(number // self.clip * keys + number % self.clip // self.per_key) % count
                    for number in self.numbers]
        return [number % count for number in self.numbers]


def frames_of_batch(images: int, clip: int) -> CallFrames:
    """All frames of all clips, in one call."""
    return CallFrames(tuple(range(images)), images, clip)


def frames_of_clip(start: int, frames: int, length: int) -> CallFrames:
    """The frames of a clip that begins at frame `start` of a video; beyond its end the last frame's items stay."""
    return CallFrames(tuple(min(start + n, length - 1) for n in range(frames)), length, length)


def model_of(model: Model, clip: int, prompt: list | None, fps: float, frames: CallFrames) -> Model:
    """A clone of MODEL for one call on some frames of a video.

    Packs that keep something for each frame on the MODEL, such as the pictures of IPAdapter, are told which frames.

    Args:
        clip: frames of a clip of the call.
        prompt: CONDITIONING of the temporal layers alone; None: they hear the positive text.
        fps: frames per second to make.
    """
    m = with_clip_options(model, clip, temporal_texts(prompt, frames), fps)
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

    controls: the ControlNets that the call already has. Conditionings that share one share its copy too, or core would
    not run them together: pass the same dict for all CONDITIONINGs of a call.
    """
    return [[text if text is None else frames.of(text), options_of(options, frames, controls)]
            for text, options in conditioning]


def options_of(options: dict, frames: CallFrames, controls: dict) -> dict:
    """What a CONDITIONING says beside its text, for the frames of one call."""
    out = {name: frames.of(value) if per_frame(name, value, frames.total) else value
           for name, value in options.items()}
    if options.get("control") is not None:
        out["control"] = windowed_control(options["control"], frames, controls)
    if options.get("model_conds"):
        out["model_conds"] = {name: windowed_value(value, frames) for name, value in options["model_conds"].items()}
    return out


def per_frame(name: str, value: Any, total: int) -> bool:
    """Whether an option has items that core gives to the images of a batch.

    An option of another pack counts as one where it has exactly one item for each frame of the video.
    """
    if not isinstance(value, Tensor) or not value.ndim:
        return False
    if name in PER_FRAME:
        return value.ndim >= PER_FRAME[name]
    return len(value) == total > 1


def temporal_texts(prompt: list | None, frames: CallFrames) -> dict[int, Tensor] | None:
    """What the temporal layers hear in place of the positive text, cut for the frames of a call."""
    return None if prompt is None else {0: frames.of(prompt[0][0])}
