"""More frames than one window: the pack's own handler of ComfyUI's context windows.

Core's handler at `dim=0` fails before version 0.18. It cuts neither texts nor ControlNet pictures for a window, and it
takes a batch of clips for one clip. This handler makes each window a clip for the temporal layers. Items that belong to
images of the batch go into the window with them: they are given to the images as core gives them to the whole batch.
"""

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

import comfy.model_management
import torch
from comfy.context_windows import ContextFuseMethod, ContextSchedule, IndexListContextHandler, IndexListContextWindow
from comfy.patcher_extension import WrappersMP

from ...temporal.errors import VideoLDMError
from ...temporal.rollout import PER_KEY
from ...temporal.schedules import FUSES, SCHEDULES, Fusion, keys_within, windows_between_keys
from . import compat
from .conflicts import refuse_in_pieces
from .layer_strength import cut_frames
from .options import CLIP, clip_options, frames_per_clip, layer_sets, layer_sets_in, transformer_options
from .sockets import Control, Model

HANDLER = "context_handler"         # core's key for the handler of a MODEL
WINDOW = "context_window"           # core's key for the window of a call
AD_PARAMS = "ad_params"             # AnimateDiff-Evolved's key for the frames of a call; other packs read it
CORE_ESTIMATE = "ContextWindows_prepare_sampling"      # key of the wrapper with which core's node estimates memory
LOOPED = "looped"


class Selection(Protocol):
    """Some images of a batch or of a video: ClipWindow here, CallFrames in frame_conditioning.py."""

    def of(self, full: torch.Tensor) -> torch.Tensor:
        """The selected images' items. `full` has an item for each image, one for all, or fewer, to be repeated."""
        ...

    def items(self, count: int) -> list[int]:
        """For each selected image, which of `count` items belongs to it."""
        ...


class ClipWindow(IndexListContextWindow):
    """The same frames of every clip of a batch."""

    def __init__(self, frames: list[int], clip: int, batch: int) -> None:
        """
        Args:
            frames: frame numbers within a clip. `index_list` has the same frames as numbers within the batch.
            clip: frames of a clip.
            batch: images of the batch.
        """
        images = [first + frame for first in range(0, batch, clip) for frame in frames]
        super().__init__(images, dim=0, **compat.window_size(batch))
        self.frames = frames
        self.batch = batch

    def of(self, full: torch.Tensor) -> torch.Tensor:
        return full if len(full) == 1 else full[self.items(len(full))]

    def items(self, count: int) -> list[int]:
        return [image % count for image in self.index_list]


class FrameWindows(IndexListContextHandler):
    """Windows of `length` frames over every clip. Each step predicts them one after the other and fuses them.

    Cancel acts between windows. Clones of a MODEL share the handler, so nothing of a call is kept on it.
    """

    def __init__(self, length: int, overlap: int, schedule: str, fuse: str, between_keys: bool = False) -> None:
        """
        Args:
            length: frames of a window.
            overlap: the least number of frames that neighbouring windows share.
            schedule: a key of SCHEDULES.
            fuse: a key of FUSES.
            between_keys: True: the clips are interpolated, and each window begins and ends with a key frame.
        """
        windows = SCHEDULES[schedule]
        if between_keys:
            windows, length = partial(windows_between_keys, windows), (keys_within(length) - 1) * PER_KEY + 1
        super().__init__(ContextSchedule(schedule, windows), ContextFuseMethod(fuse, FUSES[fuse]),
                         context_length=length, context_overlap=overlap, closed_loop=schedule == LOOPED, dim=0)

    def divides(self, frames: int) -> bool:
        """Whether clips of `frames` frames are sampled in windows."""
        return frames > self.context_length or self.closed_loop and frames == self.context_length

    def images_per_call(self, images: int, transformer_options: dict) -> int:
        """How many images of a batch are in one call of the network."""
        frames = frames_per_clip(images, transformer_options)
        return images // frames * self.context_length if self.divides(frames) else images

    def should_use_context(self, model: Model, conds: list, x_in: torch.Tensor, timestep: torch.Tensor,
                           model_options: dict) -> bool:
        return self.divides(frames_per_clip(len(x_in), model_options.get("transformer_options", {})))

    def get_context_windows(self, model: Model, x_in: torch.Tensor, model_options: dict) -> list[ClipWindow]:
        options = model_options.get("transformer_options", {})
        frames = frames_per_clip(len(x_in), options)
        windows = self.context_schedule.func(frames, self.context_length, self.context_overlap, self._step)
        return [ClipWindow(window, frames, len(x_in)) for window in windows]

    def execute(self, calc_cond_batch: Callable, model: Model, conds: list, x_in: torch.Tensor, timestep: torch.Tensor,
                model_options: dict) -> list[torch.Tensor]:
        """A prediction `images c h w` for each of `conds`. `calc_cond_batch` predicts one window."""
        refuse_in_pieces(model_options, "Frame Windows")
        options = model_options.get("transformer_options", {})
        frames = frames_per_clip(len(x_in), options)
        call = copy.copy(self)          # has the step of this call; two clones of a MODEL may be at different steps
        call.set_step(timestep, model_options)
        fused = [Fusion(x_in, frames) for _ in conds]
        for window in call.get_context_windows(model, x_in, model_options):
            comfy.model_management.throw_exception_if_processing_interrupted()
            controls: dict = {}
            sub_conds = [self.get_resized_cond(cond, x_in, window, controls=controls) for cond in conds]
            sub_options = {**model_options, "transformer_options": in_window(options, window)}
            parts = calc_cond_batch(model, sub_conds, window.of(x_in), window.of(timestep), sub_options)
            weights = self.fuse_method.func(window.frames, frames, self.context_overlap)
            for fusion, part in zip(fused, parts, strict=True):
                fusion.add(part, window.frames, window.index_list, weights)
        return [fusion.mean for fusion in fused]

    def set_step(self, timestep: torch.Tensor, model_options: dict) -> None:
        """Set the step: the last one whose noise level is not below this. Some samplers call between two steps."""
        sigmas = model_options.get("transformer_options", {}).get("sample_sigmas")
        if sigmas is not None:
            self._step = max(int((sigmas >= timestep[0].to(sigmas) * (1 - 1e-4)).sum()) - 1, 0)

    def get_resized_cond(self, cond_in: list | None, x_in: torch.Tensor, window: ClipWindow, device: Any = None,
                         controls: dict | None = None) -> list | None:
        """One conditioning, as core's `convert_cond` makes it, for a window.

        controls: copies of ControlNets that the window already has, by id.
        """
        if cond_in is None:
            return None
        controls = {} if controls is None else controls
        return [windowed_cond(cond, window, controls) for cond in cond_in]


def in_window(options: dict, window: ClipWindow) -> dict:
    """The transformer options for a window's call.

    The window is a clip, with its part of the temporal text and of the layers' strengths.
    """
    clip = clip_options(options)
    texts = clip.texts and {index: window.of(text) for index, text in clip.texts.items()}
    clip = replace(clip, frames=len(window.frames), texts=texts)
    return {**options, **cut_frames(options, window), WINDOW: window, AD_PARAMS: ad_params(options, window),
            CLIP: clip}


def ad_params(options: dict, window: ClipWindow) -> dict:
    """The images of a window's call, in the form of AnimateDiff-Evolved.

    Packs with an item for each image read it: IPAdapter for its pictures, Advanced-ControlNet for its strengths. If the
    batch is itself a part of a longer video, the numbers are those of the video.
    """
    images, batch, outer = window.index_list, window.batch, options.get(AD_PARAMS) or {}
    if outer.get("sub_idxs") is not None:
        images, batch = [outer["sub_idxs"][image] for image in images], outer["full_length"]
    return {"full_length": batch, "context_length": len(images), "sub_idxs": images}


def windowed_cond(cond: dict, window: ClipWindow, controls: dict) -> dict:
    """A conditioning for a window: its texts, pictures, masks and ControlNets."""
    cond = compat.with_own_id(cond, repr(window.frames))
    cond["model_conds"] = {name: windowed_value(value, window) for name, value in cond["model_conds"].items()}
    if isinstance(cond.get("mask"), torch.Tensor):
        cond["mask"] = window.of(cond["mask"])
    if cond.get("control") is not None:
        cond["control"] = windowed_control(cond["control"], window, controls)
    return cond


def windowed_value(value: Any, window: Selection) -> Any:
    """One of core's COND objects, for a window. Those without a tensor are the same for all images."""
    inner = getattr(value, "cond", None)
    if isinstance(inner, torch.Tensor) and inner.ndim:
        return value._copy_with(window.of(inner))
    if isinstance(inner, list) and all(isinstance(part, torch.Tensor) and part.ndim for part in inner):
        return value._copy_with([window.of(part) for part in inner])
    return value


def windowed_control(control: Control, window: Selection, controls: dict) -> Control:
    """A copy of a ControlNet, and of those it is chained to, with the window's hints.

    Core runs two conditionings together only if they have the same ControlNet object. So they get the same copy:
    `controls` has the copies by id.
    """
    if id(control) in controls:
        return controls[id(control)]
    if cuts_own_hints(control):
        check_chain(control.previous_controlnet)
        return control
    part = controls[id(control)] = copy.copy(control)
    hint = control.cond_hint_original
    if isinstance(hint, torch.Tensor) and len(hint) > 1:
        part.cond_hint_original = window.of(hint)
        part.cond_hint = None           # core prepares it again from the window's original hint
        part.extra_concat_orig = [hint_part(extra, len(hint), window) for extra in control.extra_concat_orig]
    if control.previous_controlnet is not None:
        part.previous_controlnet = windowed_control(control.previous_controlnet, window, controls)
    clones = getattr(control, "multigpu_clones", None)
    if clones:
        part.multigpu_clones = {device: windowed_control(clone, window, controls) for device, clone in clones.items()}
    return part


def cuts_own_hints(control: Control) -> bool:
    """Whether a ControlNet cuts its pictures for a window by itself, as those of Advanced-ControlNet do."""
    return hasattr(control, "sub_idxs")


def check_chain(control: Control) -> None:
    """Refuse a plain ControlNet with many pictures that is chained to one that cuts its own.

    The latter calls the former directly, and would get all its pictures.
    """
    while control is not None:
        hint = control.cond_hint_original
        if not cuts_own_hints(control) and hint is not None and len(hint) > 1:
            raise VideoLDMError("With Frame Windows a ControlNet with a picture for each frame cannot come before one "
                                "of Advanced-ControlNet. Apply it after that one, or apply both with Apply Advanced "
                                "ControlNet.")
        control = control.previous_controlnet


def hint_part(extra: torch.Tensor, hints: int, window: Selection) -> torch.Tensor:
    """The part of a mask that belongs to hints. Core gives masks to hints in turn, and hints to images in turn."""
    return extra if len(extra) == 1 else extra[[hint % len(extra) for hint in window.items(hints)]]


def with_windows(model: Model, windows: FrameWindows) -> Model:
    """A clone that samples clips of more frames than a window's in these windows."""
    m = with_max_distance(model, None)
    m.remove_wrappers_with_key(WrappersMP.PREPARE_SAMPLING, CORE_ESTIMATE)
    m.model_options[HANDLER] = windows
    return m


def with_windows_between_keys(model: Model, length: int, overlap: int) -> Model:
    """A clone that samples interpolated clips of more than `length` frames in windows.

    If Frame Windows is on the MODEL, its settings count instead of these. Raises if they do not fit.
    """
    found = model.model_options.get(HANDLER)
    if isinstance(found, FrameWindows):
        if found.closed_loop:
            raise VideoLDMError("Frame Windows is set to looped windows, and an interpolated clip does not go on from "
                                "its last frame to its first. Set schedule to static or shifting.")
        if keys_within(found.context_length) < 2:
            raise VideoLDMError(f"Frame Windows is set to windows of {found.context_length} frames, and a window of an "
                                f"interpolated clip has two key frames at least. Set length to {PER_KEY + 1} or more.")
        windows = FrameWindows(found.context_length, found.context_overlap, found.context_schedule.name,
                               found.fuse_method.name, True)
    elif found is not None or any(layers.max_distance for layers in layer_sets(model)):
        return model        # core's windows, or convolution in time: the artist's choice
    else:
        windows = FrameWindows(length, overlap, "static", "pyramid", True)
    return with_windows(model, windows)


def without_windows(model: Model, max_distance: int) -> Model:
    """A clone that samples all frames of a clip in one call. Attention over time reaches `max_distance` frames."""
    m = with_max_distance(model, max_distance)
    m.model_options.pop(HANDLER, None)
    return m


def with_max_distance(model: Model, max_distance: int | None) -> Model:
    """A clone whose temporal layers attend to frames at most this far away. None: to all frames."""
    m = model.clone()
    options = transformer_options(m)
    options.update({key: replace(layers, max_distance=max_distance) for key, layers in layer_sets_in(options).items()})
    return m
