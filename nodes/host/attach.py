"""Attaches temporal layers to a MODEL.

The weights are an additional model, so they live under ComfyUI's memory management. A keyed wrapper around the
diffusion model opens the call (`temporal.stack.open_call`). Hooks are on the live network for that one call alone. So
neither injections nor their bookkeeping are needed: `clone()` copies `is_injected`, and a dying clone ejects a live
one's hooks.
"""

import logging
import math
import uuid

import torch
from comfy.patcher_extension import CallbacksMP, WrappersMP

from ...temporal.call import CallSettings, open_call
from ...temporal.conditioning import known_input
from ...temporal.errors import VideoLDMError
from ...temporal.stack import TemporalStack
from .compat import refuse_core_windows
from .image_model import refuse_compiled
from .layer_weights import lora_patches, patcher_of
from .options import PREFIX, LayerSet, clip_options, frames_per_clip, set_clip_options, transformer_options

ACTIVATIONS = 1.5               # memory of a clip with temporal layers, in units of the same batch without


class TemporalLayersWrapper:
    """Runs around one call of the diffusion model: tells the layers how many frames a clip has, and what else they
    need."""

    def __init__(self, key: str, stack: TemporalStack):
        self.key, self.stack = key, stack
        self.warned: set[int] = set()

    def __call__(self, executor, x, timesteps=None, context=None, y=None, control=None, transformer_options={},
                 **kwargs):
        layers = transformer_options.get(self.key) or LayerSet(self.stack.params)
        settings = CallSettings(
            frames=frames_per_clip(len(x), transformer_options),
            strength=layers.strength,
            text=temporal_text(context, transformer_options),
            max_distance=layers.max_distance,
            known=known_frames(self.stack, x, transformer_options),
            fps=clip_options(transformer_options).fps,
        )
        self.warn(settings)
        with open_call(executor.class_obj, [(self.stack, settings)], context) as calls:
            note_running(executor, calls)
            return executor(x, timesteps, context, y, control, transformer_options, **kwargs)

    def warn(self, settings: CallSettings):
        warning = self.stack.check_frames(settings.frames) if settings.strength != 0 else None
        if warning and settings.frames not in self.warned:
            self.warned.add(settings.frames)
            logging.warning("[Video LDM] %s", warning)


def note_running(executor, calls):
    """Let calls know whether the network runs: a wrapper further in, core's EasyCache for one, may answer for it."""
    network = executor.original
    for call in calls:
        call.running = False

    def run(*args, **kwargs):
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
    frames, chunks = frames_per_clip(len(x), options), len(options.get("cond_or_uncond") or [0])
    window = options.get("context_window")
    if window is None:
        in_call = list(range(known.frames or frames))
    else:
        in_call = list(getattr(window, "frames", window.index_list))
    inside = [n for n, position in enumerate(known.positions) if position in in_call]
    if not inside:
        return None
    latents = known.scaled.unflatten(0, (-1, len(known.positions)))[:, inside].flatten(0, 1)
    positions = [in_call.index(known.positions[n]) for n in inside]
    return known_input(latents, positions, frames, len(x) // chunks // frames).repeat(chunks, 1, 1, 1)


def temporal_text(context: torch.Tensor | None, options: dict) -> torch.Tensor | None:
    """The text of the temporal layers, `(b t) l d`, where it is not the spatial one (papers.md A.8), else None."""
    texts = clip_options(options).texts
    if not texts or context is None:
        return None
    chunks = options.get("cond_or_uncond") or [0]
    spatial = context.chunk(len(chunks))
    own = [texts[index].to(part).expand(len(part), -1, -1) if index in texts else part
           for index, part in zip(chunks, spatial)]
    length = math.lcm(*(part.shape[1] for part in own))     # repeated tokens leave attention as it is
    return torch.cat([part.repeat(1, length // part.shape[1], 1) for part in own])


def reserve_memory(executor, model, noise_shape, *args, **kwargs):
    """Tell core what a clip with temporal layers takes, or a window of it, before it decides what stays in memory."""
    images, options = noise_shape[0], kwargs.get("model_options") or {}
    handler = options.get("context_handler")
    if hasattr(handler, "images_per_call"):
        images = handler.images_per_call(images, options.get("transformer_options", {}))
    return executor(model, [math.ceil(images * ACTIVATIONS), *noise_shape[1:]], *args, **kwargs)


def refuse_windows(executor, noise, *args, **kwargs):
    """Around a sampling: core's own context windows must not be wrong in silence."""
    guider = executor.class_obj
    refuse_core_windows(guider.model_options, guider.conds, len(noise),
                        clip_options(guider.model_options.get("transformer_options", {})).frames)
    return executor(noise, *args, **kwargs)


def attach_layers(model, stack: TemporalStack, layers: LayerSet, loras=(), frames: int = 0):
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
    m.remove_wrappers_with_key(WrappersMP.PREPARE_SAMPLING, PREFIX)     # once, however many sets are chained
    m.add_wrapper_with_key(WrappersMP.PREPARE_SAMPLING, PREFIX, reserve_memory)
    m.remove_wrappers_with_key(WrappersMP.OUTER_SAMPLE, PREFIX)
    m.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, PREFIX, refuse_windows)
    m.remove_callbacks_with_key(CallbacksMP.ON_PRE_RUN, PREFIX)
    m.add_callback_with_key(CallbacksMP.ON_PRE_RUN, PREFIX, refuse_compiled)
    transformer_options(m)[key] = layers
    if frames:
        set_clip_options(m, frames=frames)
    return m
