"""Attaches temporal layers to a MODEL.

The weights are an additional model, so they live under ComfyUI's memory management. A keyed wrapper around the
diffusion model opens the call (`temporal.stack.open_call`). Hooks are on the live network for that one call alone. So
neither injections nor their bookkeeping are needed: `clone()` copies `is_injected`, and a dying clone ejects a live
one's hooks.
"""

import logging
import math
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from comfy.patcher_extension import CallbacksMP, WrappersMP

from ...temporal.call import CallSettings, open_call
from ...temporal.conditioning import known_input
from ...temporal.errors import VideoLDMError
from ...temporal.stack import TemporalStack
from .compat import core_windows_act, refuse_core_windows
from .image_model import refuse_compiled
from .layer_weights import lora_patches, patcher_of
from .options import (
    CLIP,
    PREFIX,
    CallClips,
    LayerSet,
    clip_options,
    clips_in_call,
    frames_per_clip,
    set_clip_options,
    transformer_options,
)
from .sockets import Control, Model

ROLE = "video_ldm_role"         # on each conditioning of a sampling: 0 for the positive ones, 1 for the negative
ROLES = {"positive": 0, "negative": 1}
ACTIVATIONS = 1.5               # memory of a clip with temporal layers, in units of the same batch without


class TemporalLayersWrapper:
    """Runs around one call of the diffusion model: tells the layers how many frames a clip has, and what else they
    need."""

    def __init__(self, key: str, stack: TemporalStack) -> None:
        self.key, self.stack = key, stack
        self.warned: set[int] = set()

    def __deepcopy__(self, memo: dict) -> "TemporalLayersWrapper":
        """Other nodes copy a MODEL's options whole. A copy of the layers would be out of core's memory management, and
        without their motion LoRA."""
        return self

    def __call__(self, executor: Callable, x: torch.Tensor, timesteps: torch.Tensor | None = None,
                 context: torch.Tensor | None = None, y: torch.Tensor | None = None, control: Control | None = None,
                 transformer_options: dict = {}, **kwargs: Any) -> torch.Tensor:
        layers = transformer_options.get(self.key) or LayerSet(self.stack.params)
        clips = clips_in_call(len(x), transformer_options)
        settings = CallSettings(
            frames=clips.frames,
            strength=layers.strength,
            text=temporal_text(context, clips, transformer_options),
            max_distance=layers.max_distance,
            known=known_frames(self.stack, x, transformer_options),
            fps=clip_options(transformer_options).fps,
        )
        self.warn(settings)
        with open_call(executor.class_obj, [(self.stack, settings)], context) as calls:
            note_running(executor, calls)
            return executor(x, timesteps, context, y, control, transformer_options, **kwargs)

    def warn(self, settings: CallSettings) -> None:
        warning = self.stack.check_frames(settings.frames) if settings.strength != 0 else None
        if warning and settings.frames not in self.warned:
            self.warned.add(settings.frames)
            logging.warning("[Video LDM] %s", warning)


def note_running(executor: Callable, calls: list) -> None:
    """Let calls know whether the network runs: a wrapper further in, core's EasyCache for one, may answer for it."""
    network = executor.original
    for call in calls:
        call.running = False

    def run(*args: Any, **kwargs: Any) -> Any:
        for call in calls:
            call.running = True
        return network(*args, **kwargs)
    executor.original = run


def known_frames(stack: TemporalStack, x: torch.Tensor, options: dict) -> torch.Tensor | None:
    """c_S `(b t) c+1 h w` of layers that take context frames, else None; the same for every condition.

    An upscaler's layers see the small frames, which stand at the end of its input x.
    """
    takes, clip = stack.params.context, clip_options(options)
    if takes is None:
        return None
    if stack.params.takes_small_frames:
        return x[:, -takes.in_channels:]
    known = clip.context
    if known is None or clip.hide_context:
        if not takes.from_noise and not clip.hide_context:
            raise VideoLDMError("These temporal layers make the frames between known ones, and no context frames are "
                                "connected. Sample with Latent Interpolate x4, or connect Context Frames.")
        return None
    if known.scaled.shape[2:] != x.shape[2:]:
        raise VideoLDMError("A part of the picture is sampled by itself, and the temporal layers see known frames of "
                            "the whole picture. Remove the area from the conditioning, or the node that works on tiles "
                            "of the picture.")
    call, window = clips_in_call(len(x), options), options.get("context_window")
    if window is None:
        in_call = list(range(known.frames or call.frames))
    else:
        in_call = list(getattr(window, "frames", window.index_list))
    inside = [n for n, position in enumerate(known.positions) if position in in_call]
    if not inside:
        return None
    latents = known.scaled.unflatten(0, (-1, len(known.positions)))[:, inside].flatten(0, 1)
    positions = [in_call.index(known.positions[n]) for n in inside]
    return known_input(latents, positions, call.frames, call.clips).repeat(len(call.parts), 1, 1, 1)


def temporal_text(context: torch.Tensor | None, call: CallClips, options: dict) -> torch.Tensor | None:
    """The text of the temporal layers, `(b t) l d`, where it is not the spatial one (docs/papers.md#two-texts), else
    None."""
    texts = clip_options(options).texts
    if not texts or context is None:
        return None
    spatial = context.chunk(len(call.parts))
    own = [texts[index].to(part).expand(len(part), -1, -1) if index in texts else part
           for index, part in zip(call.parts, spatial)]
    length = math.lcm(*(part.shape[1] for part in own))     # repeated tokens leave attention as it is
    return torch.cat([part.repeat(1, length // part.shape[1], 1) for part in own])


def reserve_memory(executor: Callable, model: Model, noise_shape: Sequence[int], *args: Any, **kwargs: Any) -> Any:
    """Tell core what a clip with temporal layers takes, or a window of it, before it decides what stays in memory."""
    images, options = noise_shape[0], kwargs.get("model_options") or {}
    handler = options.get("context_handler")
    if hasattr(handler, "images_per_call"):
        images = handler.images_per_call(images, options.get("transformer_options", {}))
    return executor(model, [math.ceil(images * ACTIVATIONS), *noise_shape[1:]], *args, **kwargs)


def start_sampling(executor: Callable, noise: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """Around a sampling: the length of its clips is known from here on. Core's own context windows must not be wrong in
    silence."""
    guider = executor.class_obj
    options = guider.model_options.setdefault("transformer_options", {})    # its own, for this sampling
    clip = clip_options(options)
    refuse_core_windows(guider.model_options, guider.conds, len(noise), clip.frames)
    if not core_windows_act(guider.model_options, len(noise)):      # each of theirs is a clip
        options[CLIP] = replace(clip, frames=frames_per_clip(len(noise), options))
    for name, role in ROLES.items():
        for cond in guider.conds.get(name) or ():
            cond[ROLE] = role
    return executor(noise, *args, **kwargs)


def tell_batch(executor: Callable, model: Model, conds: list, x_in: torch.Tensor, timestep: torch.Tensor,
               model_options: dict) -> list[torch.Tensor]:
    """Around the evaluation of conditions: the layers are told the batch as core has it, and which text is whose."""
    options = model_options.get("transformer_options", {})
    clip = clip_options(options)
    clip = replace(clip, frames=clip.frames or len(x_in), images=len(x_in), texts=texts_by_index(conds, clip.texts))
    return executor(model, conds, x_in, timestep, {**model_options, "transformer_options": {**options, CLIP: clip}})


def texts_by_index(conds: list, texts: Mapping[int, torch.Tensor] | None) -> Mapping[int, torch.Tensor] | None:
    """{role: text} -> {index in `conds`: text}: guidance nodes evaluate the negative alone, or other conditions."""
    roles = [next((cond[ROLE] for cond in batch or () if ROLE in cond), None) for batch in conds]
    if not texts or all(role is None for role in roles):
        return texts
    return {index: texts[role] for index, role in enumerate(roles) if role in texts}


def attach_layers(model: Model, stack: TemporalStack, layers: LayerSet, loras: Any = (), frames: int = 0) -> Model:
    """A clone of MODEL on which temporal layers act.

    Args:
        stack: the layers with their weights.
        layers: what travels with the MODEL about them.
        loras: (patches, strength) of each motion LoRA.
        frames: of one clip; 0: whoever samples says it, else the whole batch is one clip.
    """
    refuse_compiled(model)
    m = model.clone()
    key = f"{PREFIX}{uuid.uuid4().hex}"
    patcher = patcher_of(stack)
    for pairs, strength in loras:
        lora_patches(patcher, pairs, strength)
    m.set_additional_models(key, [patcher])
    m.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, key, TemporalLayersWrapper(key, stack))
    for kind, wrapper in ((WrappersMP.PREPARE_SAMPLING, reserve_memory), (WrappersMP.OUTER_SAMPLE, start_sampling),
                          (WrappersMP.CALC_COND_BATCH, tell_batch)):
        m.remove_wrappers_with_key(kind, PREFIX)        # once, however many sets are chained
        m.add_wrapper_with_key(kind, PREFIX, wrapper)
    m.remove_callbacks_with_key(CallbacksMP.ON_PRE_RUN, PREFIX)
    m.add_callback_with_key(CallbacksMP.ON_PRE_RUN, PREFIX, refuse_compiled)
    transformer_options(m)[key] = layers
    if frames:
        set_clip_options(m, frames=frames)
    return m
