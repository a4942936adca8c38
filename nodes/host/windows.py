"""More frames than one window: the pack's own handler of ComfyUI's context windows.

Core's handler fails at `dim=0` before version 0.18 and slices neither per-frame text nor ControlNet pictures there; it
takes a batch of clips for one. Here a window is a clip to the temporal layers, and whatever belongs to an image of the
batch goes with it into the window: as core would spread it over the whole batch, and then the window's part of that.
"""

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import comfy.model_management
import torch
from comfy.context_windows import ContextFuseMethod, ContextSchedule, IndexListContextHandler, IndexListContextWindow
from comfy.patcher_extension import WrappersMP

from ...temporal.errors import VideoLDMError
from ...temporal.schedules import FUSES, SCHEDULES, Fusion
from . import compat
from .conflicts import refuse_in_pieces
from .options import CLIP, clip_options, frames_per_clip, layer_sets_in, transformer_options
from .sockets import Control, Model

HANDLER = "context_handler"         # core's key for the one handler of a MODEL
WINDOW = "context_window"           # core's key for the window of a call
AD_PARAMS = "ad_params"                 # AnimateDiff-Evolved's key for the frames of a call, which other packs read
CORE_ESTIMATE = "ContextWindows_prepare_sampling"      # what core's own node tells about memory
LOOPED = "looped"


class ClipWindow(IndexListContextWindow):
    """Some frames of every clip of a batch: `frames` within a clip, `index_list` within the batch."""

    def __init__(self, frames: list[int], clip: int, batch: int) -> None:
        images = [first + frame for first in range(0, batch, clip) for frame in frames]
        super().__init__(images, dim=0, **compat.window_size(batch))
        self.frames = frames
        self.batch = batch

    def of(self, full: torch.Tensor) -> torch.Tensor:
        """The window's part of something with one item for each image, or one for all; fewer items are repeated."""
        return full if len(full) == 1 else full[self.items(len(full))]

    def items(self, count: int) -> list[int]:
        """Which of `count` items belongs to each image."""
        return [image % count for image in self.index_list]


class FrameWindows(IndexListContextHandler):
    """Windows of `length` frames over every clip, predicted one after the other in each step and fused.

    Cancelling acts between windows. Nothing of a call is kept on the handler, which clones of a MODEL share.
    """

    def __init__(self, length: int, overlap: int, schedule: str, fuse: str) -> None:
        super().__init__(ContextSchedule(schedule, SCHEDULES[schedule]), ContextFuseMethod(fuse, FUSES[fuse]),
                         context_length=length, context_overlap=overlap, closed_loop=schedule == LOOPED, dim=0)

    def divides(self, frames: int) -> bool:
        return frames > self.context_length or self.closed_loop and frames == self.context_length

    def images_per_call(self, images: int, transformer_options: dict) -> int:
        """How many of the images of a batch run at a time."""
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
        """Predictions `images c h w` for each of `conds`; `calc_cond_batch` predicts one window's."""
        refuse_in_pieces(model_options, "Frame Windows")
        options = model_options.get("transformer_options", {})
        frames = frames_per_clip(len(x_in), options)
        call = copy.copy(self)          # the step of this call: two clones may be in different ones
        call.set_step(timestep, model_options)
        fused = [Fusion(x_in, frames) for _ in conds]
        for window in call.get_context_windows(model, x_in, model_options):
            comfy.model_management.throw_exception_if_processing_interrupted()
            controls = {}
            sub_conds = [self.get_resized_cond(cond, x_in, window, controls=controls) for cond in conds]
            sub_options = {**model_options, "transformer_options": in_window(options, window)}
            parts = calc_cond_batch(model, sub_conds, window.of(x_in), window.of(timestep), sub_options)
            weights = self.fuse_method.func(window.frames, frames, self.context_overlap)
            for fusion, part in zip(fused, parts, strict=True):
                fusion.add(part, window.frames, window.index_list, weights)
        return [fusion.mean for fusion in fused]

    def set_step(self, timestep: torch.Tensor, model_options: dict) -> None:
        """The step of a noise level: the last whose level is not below it, also for a sampler's steps in between."""
        sigmas = model_options.get("transformer_options", {}).get("sample_sigmas")
        if sigmas is not None:
            self._step = max(int((sigmas >= timestep[0].to(sigmas) * (1 - 1e-4)).sum()) - 1, 0)

    def get_resized_cond(self, cond_in: list | None, x_in: torch.Tensor, window: ClipWindow, device: Any = None,
                         controls: dict | None = None) -> list | None:
        """One conditioning, as core's `convert_cond` has it, for a window. controls: those the window already has."""
        if cond_in is None:
            return None
        controls = {} if controls is None else controls
        return [windowed_cond(cond, window, controls) for cond in cond_in]


def in_window(options: dict, window: ClipWindow) -> dict:
    """The transformer options of a window's call: it is a clip, and the temporal layers hear its part of their text."""
    clip = clip_options(options)
    texts = clip.texts and {index: window.of(text) for index, text in clip.texts.items()}
    clip = replace(clip, frames=len(window.frames), texts=texts)
    return {**options, WINDOW: window, AD_PARAMS: ad_params(options, window), CLIP: clip}


def ad_params(options: dict, window: ClipWindow) -> dict:
    """Which images of the batch a window's call has, in AnimateDiff-Evolved's words.

    Packs that keep something for each image read it there: IPAdapter's pictures, Advanced-ControlNet's strengths. Where
    the batch is a part of a longer video already, the numbers are those of the video.
    """
    images, batch, outer = window.index_list, window.batch, options.get(AD_PARAMS) or {}
    if outer.get("sub_idxs") is not None:
        images, batch = [outer["sub_idxs"][image] for image in images], outer["full_length"]
    return {"full_length": batch, "context_length": len(images), "sub_idxs": images}


def windowed_cond(cond: dict, window: ClipWindow, controls: dict) -> dict:
    """What core reads of a conditioning while it samples, for a window: texts and pictures, masks, ControlNets."""
    cond = compat.apart(cond, repr(window.frames))
    cond["model_conds"] = {name: windowed_value(value, window) for name, value in cond["model_conds"].items()}
    if isinstance(cond.get("mask"), torch.Tensor):
        cond["mask"] = window.of(cond["mask"])
    if cond.get("control") is not None:
        cond["control"] = windowed_control(cond["control"], window, controls)
    return cond


def windowed_value(value: Any, window: ClipWindow) -> Any:
    """One of core's COND objects; those that hold no tensor are for the batch as a whole."""
    inner = getattr(value, "cond", None)
    if isinstance(inner, torch.Tensor) and inner.ndim:
        return value._copy_with(window.of(inner))
    if isinstance(inner, list) and all(isinstance(part, torch.Tensor) and part.ndim for part in inner):
        return value._copy_with([window.of(part) for part in inner])
    return value


def windowed_control(control: Control, window: ClipWindow, controls: dict) -> Control:
    """A ControlNet, and those before it, with the window's hints. Conditionings that share one share its copy too, or
    core would not run them together."""
    if id(control) in controls:
        return controls[id(control)]
    if cuts_own_hints(control):
        check_chain(control.previous_controlnet)
        return control
    part = controls[id(control)] = copy.copy(control)
    hint = control.cond_hint_original
    if isinstance(hint, torch.Tensor) and len(hint) > 1:
        part.cond_hint_original = window.of(hint)
        part.cond_hint = None           # prepared from the original, once for each window
        part.extra_concat_orig = [hint_part(extra, len(hint), window) for extra in control.extra_concat_orig]
    if control.previous_controlnet is not None:
        part.previous_controlnet = windowed_control(control.previous_controlnet, window, controls)
    clones = getattr(control, "multigpu_clones", None)
    if clones:
        part.multigpu_clones = {device: windowed_control(clone, window, controls) for device, clone in clones.items()}
    return part


def cuts_own_hints(control: Control) -> bool:
    """Whether a ControlNet takes its own part of its pictures, as those of Advanced-ControlNet do."""
    return hasattr(control, "sub_idxs")


def check_chain(control: Control) -> None:
    """Refuse a plain ControlNet behind one that takes its own part: that one asks it directly, for all its pictures."""
    while control is not None:
        hint = control.cond_hint_original
        if not cuts_own_hints(control) and hint is not None and len(hint) > 1:
            raise VideoLDMError("With Frame Windows a ControlNet with a picture for each frame cannot come before one "
                                "of Advanced-ControlNet. Apply it after that one, or apply both with Apply Advanced "
                                "ControlNet.")
        control = control.previous_controlnet


def hint_part(extra: torch.Tensor, hints: int, window: ClipWindow) -> torch.Tensor:
    """A mask that goes with hints: core spreads it over the hints, and those over the images."""
    return extra if len(extra) == 1 else extra[[hint % len(extra) for hint in window.items(hints)]]


def with_windows(model: Model, length: int, overlap: int, schedule: str, fuse: str) -> Model:
    """A clone that samples clips of more than `length` frames in windows."""
    m = with_max_distance(model, None)
    m.remove_wrappers_with_key(WrappersMP.PREPARE_SAMPLING, CORE_ESTIMATE)
    m.model_options[HANDLER] = FrameWindows(length, overlap, schedule, fuse)
    return m


def without_windows(model: Model, max_distance: int) -> Model:
    """A clone that samples all frames of a clip in one call, its attention over frames no wider than `max_distance`."""
    m = with_max_distance(model, max_distance)
    m.model_options.pop(HANDLER, None)
    return m


def with_max_distance(model: Model, max_distance: int | None) -> Model:
    """A clone whose temporal layers attend to frames at most so far away."""
    m = model.clone()
    options = transformer_options(m)
    options.update({key: replace(layers, max_distance=max_distance) for key, layers in layer_sets_in(options).items()})
    return m
