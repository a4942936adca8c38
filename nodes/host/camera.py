"""CameraCtrl on a MODEL: a camera's path steers the motion modules of AnimateDiff v3.

Its weights are an additional model, so ComfyUI's memory management moves them. The settings are in transformer_options.
The wrapper of the temporal layers (attach.py) asks for the camera of each call.
"""

from collections.abc import Hashable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ...temporal.camera import CameraPath
from ...temporal.camera_control import CameraControl, CameraInCall
from ...temporal.errors import VideoLDMError
from ...temporal.families.cameractrl import LAYERS, CameraFile
from ...temporal.layers import Factory
from . import compat, notes
from .layer_strength import video_frames
from .layer_weights import host_attention, patcher_of, shared_module
from .options import (
    CallClips,
    LayerSet,
    VideoFrames,
    frames_per_clip,
    layer_sets_in,
    transformer_options,
)
from .required_layers import require_layers
from .sockets import Executor, Model

KEY = "video_ldm_camera"        # key of the wrapper, of the weights and of the settings
FEATURES = 0.1          # memory that its features take, as a multiple of the same call without temporal layers


@dataclass(frozen=True, eq=False)
class CameraSettings:
    """The camera on a MODEL."""

    name: str                           # of the file
    layers: str                         # the key of the set of layers that it steers
    control: CameraControl
    path: CameraPath
    strength: float = 1.0
    # Of one sampling, set when it starts: its frames, height and width of its latents, and features that are kept
    video: VideoFrames | None = None
    size: tuple[int, ...] | None = None
    kept: dict[Hashable, list[Tensor]] = field(default_factory=dict)

    def __deepcopy__(self, memo: dict) -> "CameraSettings":
        """The settings themselves: a copy of the weights would be outside core's memory management."""
        return self


def settings_in(options: dict) -> CameraSettings | None:
    """The camera in transformer_options that acts. None: there is none."""
    settings = options.get(KEY)
    return settings if settings is not None and settings.strength != 0 else None


def load_network(file: CameraFile, dtype: torch.dtype, cache_key: Any = None) -> CameraControl:
    """The network with its weights.

    Args:
        file: the open file.
        dtype: of the weights to make.
        cache_key: MODELs with the same key and dtype share one network, while any of them is alive. None: no sharing.
    """
    def make() -> CameraControl:
        control = CameraControl(file.params, Factory(compat.layer_operations(), dtype, "meta", host_attention))
        control.load_state_dict({name: file.tensors.pop(name).to(dtype) for name in list(file.tensors)}, assign=True)
        return control
    return shared_module(cache_key, dtype, make)


def layers_of(model: Model, key: str) -> LayerSet:
    """The set of layers with this key on a MODEL."""
    return layer_sets_in(model.model_options["transformer_options"])[key]


def steered_layers(model: Model, file: CameraFile) -> str:
    """The key of the set of layers that the file steers. Raises VideoLDMError where there is none, or more than one."""
    options = model.model_options.get("transformer_options", {})
    misfits = {key: "they belong to a whole video network" if layers.network else file.misfit(layers.params)
               for key, layers in layer_sets_in(options).items()}
    fitting = [key for key, misfit in misfits.items() if not misfit]
    if KEY in options:
        raise VideoLDMError("The connected MODEL has a camera already, and two would contradict each other. Remove one "
                            "of the two Camera Motion nodes.")
    if not fitting:
        found = "; ".join(f"{layers.name or layers.title} ({layers.title}): {misfits[key]}"
                          for key, layers in layer_sets_in(options).items())
        raise VideoLDMError(f"{file.name} steers {LAYERS}'s motion modules, and the connected MODEL has {found}. Load "
                            "v3_sd15_mm.ckpt with Load Temporal Layers, on a checkpoint of Stable Diffusion 1.x.")
    if len(fitting) > 1:
        raise VideoLDMError(f"The connected MODEL has two sets of {LAYERS}'s layers, and the camera steers one. Remove "
                            "one of the two Load Temporal Layers nodes.")
    return fitting[0]


def attach_camera(model: Model, settings: CameraSettings) -> Model:
    """A clone of MODEL whose temporal layers follow a camera."""
    require_layers(model)
    m = model.clone()
    m.set_additional_models(KEY, [patcher_of(settings.control)])
    m.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, start_sampling)
    transformer_options(m)[KEY] = settings
    return m


def start_sampling(executor: Executor, noise: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Wraps a sampling: holds its camera against its frames, and keeps what belongs to it alone."""
    options = executor.class_obj.model_options["transformer_options"]       # the guider's own, for this sampling
    settings = settings_in(options)
    if settings is not None:
        video = video_frames(options, len(noise), frames_per_clip(len(noise), options))
        warning = settings.path.check(video.length)
        if warning and 0 in video.numbers:      # a video that is made in several calls warns once
            notes.warn(warning)
        options[KEY] = replace(settings, video=video, size=tuple(noise.shape[2:]), kept={})
    return executor(noise, *args, **kwargs)


def camera_in_call(key: str, layers: LayerSet, x: Tensor, clips: CallClips, options: dict) -> CameraInCall | None:
    """The camera that a set of layers follows in a call of the network on x. None: none.

    Args:
        key: of the set of layers.
        layers: the set.
        x: the noisy latents.
        clips: of the call.
        options: the transformer_options of the call.
    """
    settings = settings_in(options)
    if settings is None or settings.layers != key or layers.strength == 0:
        return None
    check_call(settings, x, clips)
    images = clips.clips * clips.frames
    video, window = settings.video or video_frames(options, images, clips.frames), options.get("context_window")
    if window is None and len(video.numbers) != images:
        raise VideoLDMError(f"The camera of {settings.name} is for {len(video.numbers)} images, and a node of the "
                            f"graph samples {images} of them by themselves. Remove that node, or Camera Motion.")
    numbers = [video.numbers[image] for image in (range(images) if window is None else window.index_list)]
    found = [tuple(numbers[first:first + clips.frames]) for first in range(0, len(numbers), clips.frames)]
    found = found[:1] if len(set(found)) == 1 else found
    return CameraInCall(settings.control, settings.strength,
                        tuple((part, partial(settings.path.cameras, part, video.length)) for part in found),
                        tuple(x.shape[2:]), settings.kept)


def check_call(settings: CameraSettings, x: Tensor, clips: CallClips) -> None:
    """Refuse a call with too many frames, and one for a part of the picture."""
    most = settings.control.params.frames
    if clips.frames > most:
        raise VideoLDMError(f"CameraCtrl ({settings.name}) sees {most} frames at most, and {clips.frames} are sampled "
                            f"together. Connect Frame Windows in the mode windows with a length of {most} or less, or "
                            "make fewer frames.")
    if settings.size is not None and settings.size != tuple(x.shape[2:]):
        raise VideoLDMError("A part of the picture is sampled by itself, and the camera sees the whole picture. Remove "
                            "the area from the conditioning, or the node that works on tiles of the picture.")


def refuse_camera(model: Model, node: str) -> None:
    """Refuse a camera in a node that works on parts of the picture. node: its title."""
    if KEY in model.model_options.get("transformer_options", {}):
        raise VideoLDMError(f"{node} works on tiles of the picture, and a camera sees the whole picture. Connect the "
                            "MODEL without Camera Motion.")
