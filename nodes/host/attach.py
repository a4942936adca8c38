"""Temporal layers on a MODEL: the only place of the pack that touches ModelPatcher.

The weights are an additional model, so they live under ComfyUI's memory management. A keyed wrapper around the
diffusion model opens the call (`temporal.stack.open_call`): hooks are on the live network for that one call alone. So
neither injections nor their bookkeeping are needed: `clone()` copies `is_injected`, and a dying clone ejects a live
one's hooks.
"""

import inspect
import logging
import math
import uuid
import weakref
from types import SimpleNamespace

import comfy.lora
import comfy.model_sampling
import torch
from comfy.ldm.modules import attention
from comfy.patcher_extension import CallbacksMP, WrappersMP

from ...temporal.conditioning import known_input
from ...temporal.errors import VideoLDMError
from ...temporal.layers import attend
from ...temporal.stack import CallSettings, TemporalStack, open_call
from .compat import layer_operations, layer_patcher, refuse_core_windows

FRAMES = "video_ldm_frames"     # transformer_options: frames per clip; absent: the whole batch is one clip
TEXT = "video_ldm_text"         # transformer_options: {index in cond_or_uncond: text of the temporal layers, 1 l d}
KNOWN = "video_ldm_known"       # transformer_options: the KnownFrames of context.py; None or absent: no context frames
FPS = "video_ldm_fps"           # transformer_options: the frame rate to make, for layers that are told it
PREFIX = "video_ldm/"           # keys of sets of temporal layers
COMPILED = "torch.compile"      # core's key for a compiled model
ACTIVATIONS = 1.5               # memory of a clip with temporal layers, in units of the same batch without


class TemporalLayersWrapper:
    """Around one call of the diffusion model: says how many frames a clip has, which text it hears, how strongly."""

    def __init__(self, key: str, stack: TemporalStack):
        self.key, self.stack = key, stack
        self.warned = set()

    def __call__(self, executor, x, timesteps=None, context=None, y=None, control=None, transformer_options={},
                 **kwargs):
        options = transformer_options.get(self.key, {})
        settings = CallSettings(
            frames=frames_per_clip(len(x), transformer_options),
            strength=options.get("strength", 1.0),
            text=temporal_text(context, transformer_options),
            max_distance=options.get("max_distance"),
            known=known_frames(self.stack, x, transformer_options),
            fps=transformer_options.get(FPS),
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


def frames_per_clip(batch: int, transformer_options: dict) -> int:
    """Frames of one clip; a sampler that says nothing runs its whole batch as one clip."""
    images = batch // len(transformer_options.get("cond_or_uncond") or [0])
    frames = transformer_options.get(FRAMES) or images
    if images % frames:
        raise VideoLDMError(f"The batch of {images} frames does not divide into clips of {frames} frames. Make the "
                            "batch a multiple of the frames per clip, or set frames per clip to 0 on Load Temporal "
                            "Layers.")
    return frames


def known_frames(stack: TemporalStack, x: torch.Tensor, transformer_options: dict):
    """c_S `(b t) c+1 h w` of layers with an input for known frames, else None; the same for every condition. An
    upscaler's layers see the small frames, which stand at the end of its input x."""
    takes, known = stack.params.context, transformer_options.get(KNOWN)
    if takes is None:
        return None
    if stack.params.takes_small_frames:
        return x[:, -takes.in_channels:]
    if known is None:
        # A key that is there and None: context guidance asks for the prediction without.
        if not takes.from_noise and KNOWN not in transformer_options:
            raise VideoLDMError("These temporal layers make the frames between known ones, and no context frames are "
                                "connected. Sample with Latent Interpolate x4, or connect Context Frames.")
        return None
    batch = len(x)
    frames, chunks = frames_per_clip(batch, transformer_options), len(transformer_options.get("cond_or_uncond") or [0])
    window = transformer_options.get("context_window")
    whole = window is None
    places = list(range(known.frames or frames) if whole else getattr(window, "frames", window.index_list))
    inside = [n for n, position in enumerate(known.positions) if position in places]
    if not inside:
        return None
    latents = known.scaled.unflatten(0, (-1, len(known.positions)))[:, inside].flatten(0, 1)
    positions = [places.index(known.positions[n]) for n in inside]
    return known_input(latents, positions, frames, batch // chunks // frames).repeat(chunks, 1, 1, 1)


def temporal_text(context, transformer_options: dict):
    """The text of the temporal layers, `(b t) l d`, where it is not the spatial one (papers.md A.8), else None."""
    texts = transformer_options.get(TEXT)
    if not texts or context is None:
        return None
    chunks = transformer_options.get("cond_or_uncond") or [0]
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
                        guider.model_options.get("transformer_options", {}).get(FRAMES))
    return executor(noise, *args, **kwargs)


def refuse_compiled(patcher):
    """torch.compile skips the guards of hooks: compiled plain first, the temporal layers would silently vanish."""
    wrappers = patcher.wrappers.get(WrappersMP.APPLY_MODEL, {})
    if COMPILED in wrappers or hasattr(patcher.get_model_object("diffusion_model"), "_orig_mod"):
        raise VideoLDMError("This MODEL is compiled by TorchCompileModel, which would silently leave the temporal "
                            "layers out. Remove TorchCompileModel from the graph.")


def spatial_unet(model):
    """The UNet of a MODEL, refused where temporal layers cannot attach."""
    unet = getattr(getattr(model, "model", None), "diffusion_model", None)
    if not all(hasattr(unet, part) for part in ("input_blocks", "middle_block", "output_blocks")):
        raise VideoLDMError(f"The connected MODEL ({model_title(model)}) is no Stable Diffusion UNet, and temporal "
                            "layers attach to nothing else. Load a Stable Diffusion checkpoint.")
    return unet


def model_title(model) -> str:
    names = {"SD15": "Stable Diffusion 1.x", "SD20": "Stable Diffusion 2.x",
             "SD21UnclipL": "Stable Diffusion 2.1 unCLIP", "SD21UnclipH": "Stable Diffusion 2.1 unCLIP", "SDXL": "SDXL",
             "SDXLRefiner": "SDXL refiner", "SSD1B": "SSD-1B", "SD_X4Upscaler": "the Stable Diffusion x4 upscaler",
             "SVD_img2vid": "Stable Video Diffusion"}
    config = model.model.model_config
    kind = type(config).__name__
    own = inspect.getattr_static(config, "title", None)     # asked plainly, core's configs log what they lack
    return own or names.get(kind, kind)


def context_dim(model) -> int | None:
    """Width of the text that the model attends to, None where it does not say."""
    return getattr(model.model.model_config, "unet_config", {}).get("context_dim")


def layer_dtype(model, stored: torch.dtype) -> torch.dtype:
    """Temporal weights take the UNet's dtype; beside an fp8 one they keep the precision of their file."""
    dtype = model.model.get_dtype()
    return dtype if dtype in (torch.float32, torch.float16, torch.bfloat16) else stored


def host_attention(q, k, v, heads: int, mask=None):
    """The attention that the user chose for ComfyUI; on a CPU torch's own, since core's choice there saves memory that
    attention over the frames of a clip does not take, and costs time."""
    if q.device.type == "cpu":
        return attend(q, k, v, heads, mask)
    if mask is not None and mask.dtype == torch.bool:
        mask = as_numbers(mask, q.dtype)
    return attention.optimized_attention(q, k, v, heads, mask=mask)     # looked up per call: chosen at start


def as_numbers(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A mask of true and false as what is added to the scores: core's attentions do not agree on the former."""
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, float("-inf"))


_stacks = weakref.WeakValueDictionary()


def build_stack(params, tensors: dict, dtype: torch.dtype, cache_key=None) -> TemporalStack:
    """The layers with their weights, shared by every MODEL that uses the same unchanged file in the same dtype."""
    key = (cache_key, dtype)
    stack = _stacks.get(key) if cache_key is not None else None
    if stack is None:
        stack = TemporalStack(params, operations=layer_operations(), dtype=dtype, device="meta",
                              attention=host_attention)
        # Copies: safetensors' own are views of the file, which then can be neither replaced (Windows) nor rewritten.
        stack.load_state_dict({name: tensor.to(dtype, copy=True) for name, tensor in tensors.items()}, assign=True)
        stack.requires_grad_(False).eval()
        if cache_key is not None:
            _stacks[key] = stack
    return stack


_patchers = weakref.WeakValueDictionary()      # id of a stack: its first patcher, which the clones keep alive


def patcher_of(stack: TemporalStack):
    """A patcher on a stack that other MODELs may use too: a clone, since core tells by `clone()` which patchers have
    their weights, and the backup of unpatched weights, in common."""
    first = _patchers.get(id(stack))
    if first is None:
        first = _patchers[id(stack)] = layer_patcher(stack)
    return first.clone()


def lora_patches(patcher, pairs: dict, strength: float):
    """Motion LoRA as ComfyUI's own LoRA patches: W += strength * up @ down, without alpha (formats.md, a)."""
    names = {name: name for name in pairs}
    files = {}
    for name, (up, down) in pairs.items():
        files[f"{name}.lora_up.weight"], files[f"{name}.lora_down.weight"] = up, down
    patcher.add_patches(comfy.lora.load_lora(files, names, log_missing=False), strength)


def attach_layers(model, stack: TemporalStack, settings: dict, loras=(), frames: int = 0):
    """A clone of MODEL on which the layers act; `settings` travel with it, per call, and whether the layers were
    trained on shared noise. loras: (patches, strength)."""
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
    options = transformer_options(m)
    options[key] = {**settings, "shared_noise": stack.params.shared_noise}
    if frames:
        options[FRAMES] = frames
    return m


def transformer_options(model) -> dict:
    """A clone's own options: copied first, so that the MODEL it came from never sees the change."""
    options = model.model_options.get("transformer_options", {}).copy()
    model.model_options["transformer_options"] = options
    return options


def sets_of_layers(model) -> list[dict]:
    """Settings of each set of temporal layers on a MODEL, in the order they act."""
    options = model.model_options.get("transformer_options", {})
    return [value for key, value in options.items() if key.startswith(PREFIX)]


def with_clip_options(model, frames: int, texts: dict | None = None, fps: float | None = None):
    """A clone that runs clips of `frames` frames, its temporal layers hearing `texts` ({0: positive, 1: negative}) and,
    where they are told it, the frame rate to make."""
    m = model.clone()
    options = transformer_options(m)
    options[FRAMES] = frames
    if texts:
        options[TEXT] = texts
    if fps is not None:
        options[FPS] = fps
    return m


def with_schedule(model, beta_schedule: str, linear_start: float, linear_end: float, prediction: str | None):
    """A clone sampled with the noise schedule of temporal layers' training; prediction None: the model's own."""
    base = model.get_model_object("model_sampling")
    if prediction is None:
        prediction = next((name for name in ("v", "x0") if isinstance(base, PREDICTIONS[name])), "eps")
    m = model.clone()
    m.add_object_patch("model_sampling", schedule_of(beta_schedule, linear_start, linear_end, prediction))
    return m


PREDICTIONS = {"eps": comfy.model_sampling.EPS, "v": comfy.model_sampling.V_PREDICTION, "x0": comfy.model_sampling.X0}


def schedule_of(beta_schedule: str, linear_start: float, linear_end: float, prediction: str):
    """ComfyUI's object for a noise schedule of 1000 steps and what the network predicts."""
    class TrainedSchedule(comfy.model_sampling.ModelSamplingDiscrete, PREDICTIONS[prediction]):
        pass

    return TrainedSchedule(SimpleNamespace(sampling_settings={
        "beta_schedule": beta_schedule, "linear_start": linear_start, "linear_end": linear_end}))
