"""Attaches temporal layers to a MODEL.

The weights are an additional model, so ComfyUI's memory management moves them. A keyed wrapper around the diffusion
model opens each call (`temporal.call.open_call`). The layers' hooks are on the network for that one call alone.

ComfyUI's injections would keep the hooks longer, and are not safe: `clone()` copies `is_injected`, so a clone that is
deleted would remove the hooks of a clone that is in use.
"""

import math
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from comfy.patcher_extension import CallbacksMP, WrappersMP

from ...temporal.call import CallSettings, open_call
from ...temporal.stack import TemporalStack
from . import camera, notes
from .clip_warnings import warn_of_clip
from .compat import core_windows_act, refuse_core_windows
from .conflicts import refuse_merged_in_part, refuse_readers_of_attention
from .image_model import refuse_compiled
from .known_frames import check_all_given, context_input, further_channels, with_further_channels
from .latents import check_latents
from .layer_strength import acting_in_call, fix_strengths, strengths_in_call
from .layer_weights import lora_patches, patcher_of
from .made_for import check_made_for
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
from .picture import check_picture_given, picture_in_call
from .placed_frames import Place, placed
from .reuse import reuse_in_call
from .sockets import Control, Executor, Model
from .sparse_control import RESIDUALS, settings_in
from .texts import check_conditions

ROLE = "video_ldm_role"         # key in each conditioning of a sampling: 0 for positive, 1 for negative
ROLES = {"positive": 0, "negative": 1}
ACTIVATIONS = 1.5               # memory of a call with temporal layers, as a multiple of the same call without


class TemporalLayersWrapper:
    """Runs around one call of the diffusion model. It tells the layers the frames of a clip and their settings."""

    def __init__(self, key: str, stack: TemporalStack) -> None:
        self.key, self.stack = key, stack
        self.warned: set[int] = set()       # clip lengths that were warned about
        self.warned_in: tuple[str, str] | None = None       # the run and node in which they were

    def __deepcopy__(self, memo: dict) -> "TemporalLayersWrapper":
        """The wrapper itself. Other nodes deep-copy a MODEL's options.

        A copy of the layers would be outside core's memory management, and would lack the motion LoRA.
        """
        return self

    def __call__(self, executor: Executor, x: torch.Tensor, timesteps: torch.Tensor | None = None,
                 context: torch.Tensor | None = None, y: torch.Tensor | None = None, control: Control | None = None,
                 transformer_options: dict | None = None, **kwargs: Any) -> torch.Tensor:
        transformer_options = transformer_options if transformer_options is not None else {}
        layers = transformer_options.get(self.key) or LayerSet(self.stack.params)
        clips = clips_in_call(len(x), transformer_options)
        places, place = placed(layers, x, transformer_options)
        settings = CallSettings(
            frames=clips.frames,
            strength=layers.strength,
            text=temporal_text(context, clips, transformer_options),
            max_distance=layers.max_distance,
            known=context_input(self.stack, x, transformer_options),
            fps=clip_options(transformer_options).fps,
            told_fps=layers.told_fps,
            strengths=strengths_in_call(layers, x, clips, transformer_options),
            acting=acting_in_call(layers, clips),
            reuse=reuse_in_call(self.key, clips, transformer_options),
            known_places=places,
            picture=picture_in_call(layers, x, clips, transformer_options),
            camera=camera.camera_in_call(self.key, layers, x, clips, transformer_options),
        )
        self.warn(settings)
        further = further_channels(layers, x, transformer_options)
        with open_call(executor.class_obj, [(self.stack, settings)], context) as calls:
            prepare_network(executor, calls, further, place)
            return executor(x, timesteps, context, y, control, transformer_options, **kwargs)

    def warn(self, settings: CallSettings) -> None:
        warning = self.stack.check_frames(settings.frames) if settings.acts else None
        node = notes.running_node()
        if node != self.warned_in:
            self.warned_in, self.warned = node, set()
        if warning and settings.frames not in self.warned:
            self.warned.add(settings.frames)
            notes.warn(warning)


def prepare_network(executor: Executor, calls: list, further: torch.Tensor | None, place: Place | None) -> None:
    """Act when the network itself runs. A wrapper inside this one may skip it: EasyCache does.

    The calls are marked as running, and the network's input gets its further channels and its placed frames. Wrappers
    inside this one see the noisy latents alone, as on any MODEL.

    Args:
        executor: of the call.
        calls: the open calls of the temporal layers.
        further: the further channels; None: there are none.
        place: as in placed_frames.placed. Without an acting layer nothing is placed.
    """
    network = executor.original
    for call in calls:
        call.running = False

    def run(x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        for call in calls:
            call.running = True
        if place is not None and calls:
            x = place(x, calls[0].settings.acting_images)
        return network(with_further_channels(x, further), *args, **kwargs)
    executor.original = run


def temporal_text(context: torch.Tensor | None, call: CallClips, options: dict) -> torch.Tensor | None:
    """The temporal layers' own text `(b t) l d` (docs/papers.md#two-texts). None if they take the spatial text."""
    texts = clip_options(options).texts
    if not texts or context is None:
        return None
    spatial = context.chunk(len(call.parts))
    own = [texts[index].to(part).expand(len(part), -1, -1) if index in texts else part
           for index, part in zip(call.parts, spatial)]
    length = math.lcm(*(part.shape[1] for part in own))     # attention over repeated tokens gives the same result
    return torch.cat([part.repeat(1, length // part.shape[1], 1) for part in own])


def reserve_memory(executor: Executor, model: Model, noise_shape: Sequence[int], *args: Any, **kwargs: Any) -> Any:
    """Wraps core's preparation of a sampling. Core then reserves memory for one window with its temporal layers."""
    images, options = noise_shape[0], kwargs.get("model_options") or {}
    handler = options.get("context_handler")
    if handler is not None and hasattr(handler, "images_per_call"):
        images = handler.images_per_call(images, options.get("transformer_options", {}))
    mine = options.get("transformer_options", {})
    seen = (RESIDUALS if settings_in(mine) is not None else 0) + (camera.FEATURES if camera.settings_in(mine) else 0)
    return executor(model, [math.ceil(images * (ACTIVATIONS + seen)), *noise_shape[1:]], *args, **kwargs)


def start_sampling(executor: Executor, noise: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """Wraps a sampling: checks what the guider brings, and fixes the number of frames of its clips."""
    guider = executor.class_obj
    check_latents(guider.model_patcher, noise)
    check_conditions(guider.model_patcher, guider.conds)
    refuse_merged_in_part(guider.model_patcher)
    refuse_readers_of_attention(guider.model_options)
    options = guider.model_options.setdefault("transformer_options", {})    # the guider's own, for this sampling
    check_all_given(options)
    check_picture_given(options)
    clip = clip_options(options)
    refuse_core_windows(guider.model_options, guider.conds, len(noise), clip.frames)
    frames = len(noise)
    if not core_windows_act(guider.model_options, frames):      # each of core's windows is a clip
        frames = frames_per_clip(frames, options)
        options[CLIP] = replace(clip, frames=frames)
        fix_strengths(options, len(noise), frames, tuple(noise.shape[2:]))
    for cond in (cond for conds in guider.conds.values() for cond in conds or ()):
        check_made_for(cond.get("cross_attn"), cond, [frames], "a clip")
    warn_of_clip(guider.model_patcher, guider.model_options, noise)
    for name, role in ROLES.items():
        for cond in guider.conds.get(name) or ():
            cond[ROLE] = role
    return executor(noise, *args, **kwargs)


def pass_batch_on(executor: Executor, model: Model, conds: list, x_in: torch.Tensor, timestep: torch.Tensor,
                  model_options: dict) -> list[torch.Tensor]:
    """Wraps core's calc_cond_batch. Calls inside it get the size of core's batch and the text of each condition."""
    options = model_options.get("transformer_options", {})
    clip = clip_options(options)
    clip = replace(clip, frames=clip.frames or len(x_in), images=len(x_in), texts=texts_by_index(conds, clip.texts))
    return executor(model, conds, x_in, timestep, {**model_options, "transformer_options": {**options, CLIP: clip}})


def texts_by_index(conds: list, texts: Mapping[int, torch.Tensor] | None) -> Mapping[int, torch.Tensor] | None:
    """{role: text} -> {index in `conds`: text}. Guidance nodes may evaluate the negative alone, or other conditions."""
    roles = {index: cond[ROLE] for index, batch in enumerate(conds) for cond in reversed(batch or ()) if ROLE in cond}
    if not texts or not roles:
        return texts
    return {index: texts[role] for index, role in roles.items() if role in texts}


def attach_layers(model: Model, stack: TemporalStack, layers: LayerSet, loras: Any = (), frames: int = 0) -> Model:
    """A clone of MODEL on which temporal layers act.

    Args:
        model: the MODEL.
        stack: the layers with their weights.
        layers: the settings of these layers, which travel with the MODEL.
        loras: (patches, strength) of each motion LoRA.
        frames: frames of one clip. 0: the sampler node sets it; without one, the whole batch is one clip.
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
                          (WrappersMP.CALC_COND_BATCH, pass_batch_on)):
        m.remove_wrappers_with_key(kind, PREFIX)        # one wrapper of each kind serves all sets of layers
        m.add_wrapper_with_key(kind, PREFIX, wrapper)
    m.remove_callbacks_with_key(CallbacksMP.ON_PRE_RUN, PREFIX)
    m.add_callback_with_key(CallbacksMP.ON_PRE_RUN, PREFIX, refuse_compiled)
    transformer_options(m)[key] = layers
    if frames:
        set_clip_options(m, frames=frames)
    return m
