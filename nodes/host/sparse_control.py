"""SparseCtrl on a MODEL: known frames through a second network, whose residuals are added as a ControlNet's are.

Its weights are an additional model, so ComfyUI's memory management moves them. A wrapper around the diffusion model
runs it once for a call of the network, with all its conditions. The settings are in transformer_options.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from comfy.cldm.cldm import ControlNet
from comfy.patcher_extension import WrappersMP
from torch import Tensor, nn

from ...temporal.conditioning import context_input_from_latents
from ...temporal.errors import VideoLDMError
from ...temporal.families.sparsectrl import SparseControlFile
from ...temporal.layer_strength import Curve
from ...temporal.layers import Factory
from ...temporal.sparse_control import PICTURES, SparseControl, SparseControlParts, added, scaled
from ...temporal.unet import out_channels
from . import compat, notes
from .core_networks import network_of_sizes
from .known_frames import check_size, frames_in_call
from .layer_weights import host_attention, patcher_of, shared_module
from .options import (
    CallClips,
    ContextFrames,
    VideoFrames,
    clip_options,
    clips_in_call,
    frames_per_clip,
    layer_sets,
    layer_sets_in,
    transformer_options,
)
from .sockets import Control, Executor, Model

KEY = "video_ldm_sparse_control"        # key of the wrappers, of the weights and of the settings
HEADS = 8                               # of every attention in the encoder
RESIDUALS = 0.1         # memory that its residuals take, as a multiple of the same call without temporal layers


@dataclass(frozen=True)
class SparseSettings:
    """Settings of SparseCtrl on a MODEL."""

    name: str                           # of the file
    sees: str                           # as in SparseControlParams
    per_latent: int                     # as in SparseControlParams
    strength: float = 1.0               # multiplies all residuals
    curve: Curve | None = None          # further strengths by frame, which multiply. None: 1
    start: float = 0.0                  # the share of the sampling at which it begins
    end: float = 1.0                    # the share of the sampling at which it ends
    # The highest and the lowest noise level at which it acts; set when sampling starts
    sigmas: tuple[float, float] | None = None


def settings_in(options: dict) -> SparseSettings | None:
    """The settings in transformer_options. None: the MODEL has no SparseCtrl."""
    return options.get(KEY)


def sparse_settings(model: Model) -> SparseSettings | None:
    """The settings on a MODEL. None: it has no SparseCtrl."""
    return settings_in(model.model_options.get("transformer_options", {}))


def sees_pictures(model: Model) -> bool:
    """Whether the MODEL has a SparseCtrl that sees pictures and not latents."""
    settings = sparse_settings(model)
    return settings is not None and settings.sees == PICTURES


def refuse_pictures(model: Model, node: str) -> None:
    """Refuse a SparseCtrl for sketches in a node that takes the frames from latents. node: its title."""
    settings = sparse_settings(model)
    if settings is not None and settings.sees == PICTURES:
        raise VideoLDMError(f"{settings.name} on this MODEL sees sketches, and {node} gives it frames of the video "
                            "itself. Load a SparseCtrl file for pictures (RGB) there, or give the sketches to Context "
                            "Frames.")


# The network

def load_sparse_control(file: SparseControlFile, dtype: torch.dtype, cache_key: Any = None) -> SparseControl:
    """The network with its weights.

    Args:
        file: the open file.
        dtype: of the weights to make.
        cache_key: MODELs with the same key and dtype share one network, while any of them is alive. None: no sharing.
    """
    def make() -> SparseControl:
        network = sparse_network(file, dtype)
        tensors = {f"encoder.{name}": tensor for name, tensor in file.read_spatial().items()}
        tensors |= {f"parts.{name}": tensor for name, tensor in file.tensors.items()}
        network.load_state_dict({name: tensors.pop(name).to(dtype) for name in list(tensors)}, assign=True)
        return network
    return shared_module(cache_key, dtype, make)


def sparse_network(file: SparseControlFile, dtype: torch.dtype = torch.float32) -> SparseControl:
    """The network without weights: core's ControlNet gives the encoder. Raises VideoLDMError for a damaged file."""
    operations = compat.layer_operations()
    parts = SparseControlParts(file.params, Factory(operations, dtype, "meta", host_attention))
    return SparseControl(file.params, encoder_of(file, dtype, operations), parts)


def encoder_of(file: SparseControlFile, dtype: torch.dtype, operations: Any) -> nn.Module:
    """The encoder without weights. Raises VideoLDMError where no encoder has the shapes of the file."""
    looks = f"{file.name} looks like {file.title}, but"

    encoder, _ = network_of_sizes(file.spatial_shapes, looks,
                                  lambda config: core_encoder(config, dtype, "meta", operations))
    channels = tuple(map(out_channels, map(list, (*encoder.input_blocks, encoder.middle_block))))
    if channels != (*file.params.channels, file.params.middle_channels):
        raise VideoLDMError(f"{looks} its convolutions behind the blocks have other channels than the blocks. The file "
                            "is damaged: download it again.")
    return encoder


def core_encoder(config: dict, dtype: torch.dtype, device: Any, operations: Any) -> nn.Module:
    """The encoder of core's ControlNet for a UNet, without weights. config: of the UNet."""
    own = {key: value for key, value in config.items() if key not in ("out_channels", "transformer_depth_output")}
    own |= {"num_heads": HEADS, "num_head_channels": -1, "hint_channels": 3}
    whole = ControlNet(**own, dtype=dtype, device=device, operations=operations)
    encoder = nn.Module()
    encoder.time_embed, encoder.input_blocks = whole.time_embed, whole.input_blocks
    encoder.middle_block = whole.middle_block
    return encoder


# On a MODEL

def check_model(model: Model, file: SparseControlFile, unet: nn.Module, text_width: int | None, title: str) -> None:
    """Refuse a MODEL on which this file does not act as it was made to.

    Args:
        model: the MODEL.
        file: the open file.
        unet: the MODEL's network.
        text_width: of the text that it attends to.
        title: the MODEL's name in a sentence.
    """
    blocks = map(list, (*unet.input_blocks, unet.middle_block or ()))
    file.check_base(tuple(out_channels(block) for block in blocks if block), text_width, title)
    for layers in layer_sets(model):
        if layers.network:
            raise VideoLDMError(f"The connected MODEL ({layers.title}) is a whole video network, and {file.name} is "
                                "made for an image model with AnimateDiff's layers. Connect Load SparseCtrl behind "
                                "Load Temporal Layers, on a checkpoint of Stable Diffusion 1.x.")
    refuse_two_ways(model, file.name)
    if sparse_settings(model) is not None:
        raise VideoLDMError("The connected MODEL has a SparseCtrl already, and known frames enter through one alone. "
                            "Remove one of the two Load SparseCtrl nodes.")
    if clip_options(model.model_options.get("transformer_options", {})).context is not None:
        raise VideoLDMError("The connected MODEL has its context frames already, and Context Frames has to know that "
                            "SparseCtrl sees them. Connect Load SparseCtrl before Context Frames.")


def refuse_two_ways(model: Model, name: str) -> None:
    """Refuse layers with an input of their own for known frames. name: of the SparseCtrl file."""
    for layers in layer_sets(model):
        if layers.params.known_frames_inputs:
            raise VideoLDMError(f"The temporal layers on this MODEL ({layers.title}) take context frames as an input "
                                f"of their own, and {name} is a second way for the same frames. Use the layers without "
                                "SparseCtrl, or SparseCtrl with AnimateDiff v3's layers.")


def attach_sparse_control(model: Model, control: SparseControl, settings: SparseSettings) -> Model:
    """A clone of MODEL on which SparseCtrl acts."""
    m = model.clone()
    m.set_additional_models(KEY, [patcher_of(control)])
    m.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, KEY, SparseControlWrapper(control))
    m.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, start_sampling)
    transformer_options(m)[KEY] = settings
    return m


def start_sampling(executor: Executor, noise: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Wraps a sampling: refuses one without known frames, and finds the noise levels at which SparseCtrl acts."""
    guider = executor.class_obj
    options = guider.model_options["transformer_options"]       # the guider's own, for this sampling
    settings = settings_in(options)
    if settings is not None:
        check_given(settings, clip_options(options).context)
        refuse_two_ways(guider.model_patcher, settings.name)
        refuse_shrunk_blocks(settings, options)
        sampling = guider.model_patcher.get_model_object("model_sampling")
        highest, lowest = (float(sampling.percent_to_sigma(share)) for share in (settings.start, settings.end))
        options[KEY] = replace(settings, sigmas=(highest, lowest))
        warn_of_frames_beyond(settings, clip_options(options).video, frames_per_clip(len(noise), options))
    return executor(noise, *args, **kwargs)


def check_given(settings: SparseSettings, known: ContextFrames | None) -> ContextFrames:
    """The known frames. Raises if there are none."""
    if known is None:
        raise VideoLDMError(f"{settings.name} on this MODEL is to see known frames, and none are connected. Connect "
                            "Context Frames between Load SparseCtrl and the sampler, or remove Load SparseCtrl.")
    return known


def refuse_shrunk_blocks(settings: SparseSettings, options: dict) -> None:
    """Refuse core's deep shrink: it runs some blocks at another size, and core leaves residuals out that do not fit."""
    patches = options.get("patches", {})
    for kind in ("input_block_patch", "input_block_patch_after_skip"):
        for patch in patches.get(kind, ()):
            if getattr(patch, "__qualname__", "").startswith("PatchModelAddDownscale"):
                raise VideoLDMError("PatchModelAddDownscale runs blocks of this MODEL at another size, where the "
                                    f"residuals of {settings.name} do not fit. Remove that node.")


def warn_of_frames_beyond(settings: SparseSettings, video: VideoFrames | None, frames: int) -> None:
    """Warn where the curve names a frame that the video does not have. A video made in several calls warns once.

    video: as in ClipOptions. frames: of a clip.
    """
    length = video.length if video else frames
    if settings.curve is not None and settings.curve.last >= length and (video is None or 0 in video.numbers):
        notes.warn(f"The strengths of SparseCtrl name frame {settings.curve.last}, and the last frame of the video is "
                   f"{length - 1}: they are cut there. Frames count from 0.")


class SparseControlWrapper:
    """Runs around one call of the diffusion model. It adds the residuals to those of core's ControlNets."""

    def __init__(self, network: SparseControl) -> None:
        self.network = network

    def __deepcopy__(self, memo: dict) -> "SparseControlWrapper":
        """The wrapper itself: a copy of the weights would be outside core's memory management."""
        return self

    def __call__(self, executor: Executor, x: Tensor, timesteps: Tensor | None = None, context: Tensor | None = None,
                 y: Tensor | None = None, control: Control | None = None, transformer_options: dict | None = None,
                 **kwargs: Any) -> Tensor:
        options = transformer_options if transformer_options is not None else {}
        settings = settings_in(options)
        if settings is not None and acts_at(settings, options):
            text = kwargs.get("crossattn_controlnet")       # core's text for ControlNets alone
            control = self.with_residuals(settings, x, timesteps, context if text is None else text, control, options)
        return executor(x, timesteps, context, y, control, transformer_options, **kwargs)

    def with_residuals(self, settings: SparseSettings, x: Tensor, timesteps: Tensor | None, text: Tensor | None,
                       control: Control | None, options: dict) -> Control | None:
        """The residuals of one call, with those of `control`, which stays as it is. Others: as in __call__."""
        known = check_given(settings, clip_options(options).context)
        check_size(known, x)
        call = clips_in_call(len(x), options)
        inside = frames_in_call(known, call, options)
        strengths = strengths_in_call(settings, known, call, options)
        if not inside.positions or not strengths.any():
            return control          # in a window without a known frame the image model has its temporal layers alone
        if text is None or timesteps is None:
            raise VideoLDMError(f"{settings.name} attends to text, and the model was called without any. Connect a "
                                "CONDITIONING made by CLIP Text Encode.")
        seen = context_input_from_latents(inside.latents, inside.positions, call.frames, call.clips)
        reach = next((layers.max_distance for layers in layer_sets_in(options).values() if layers.max_distance), None)
        with torch.no_grad():
            residuals, middle = self.network(seen.to(x).repeat(len(call.parts), 1, 1, 1), timesteps, text, call.frames,
                                             reach)
        strengths = strengths.repeat(len(call.parts))
        before = control or {}
        return {**{name: list(values) for name, values in before.items()},
                "output": added(before.get("output", ()), [scaled(residual, strengths) for residual in residuals]),
                "middle": added(before.get("middle", ()), [scaled(middle, strengths)])}


def acts_at(settings: SparseSettings, options: dict) -> bool:
    """Whether SparseCtrl acts in a call with these transformer_options."""
    if settings.strength == 0 or clip_options(options).hide_context:
        return False
    sigmas = options.get("sigmas")
    if settings.sigmas is None or sigmas is None:
        return True         # outside of core's sampling
    return settings.sigmas[1] <= float(sigmas[0]) <= settings.sigmas[0]


def strengths_in_call(settings: SparseSettings, known: ContextFrames, call: CallClips, options: dict) -> Tensor:
    """The strength of each image of one condition in a call, `(b t)`."""
    window = options.get("context_window")
    images = list(range(call.clips * call.frames)) if window is None else list(window.index_list)
    if settings.curve is None:
        return torch.full((len(images),), settings.strength)
    video, frames = clip_options(options).video, known.frames or call.frames
    numbers = [video.numbers[image] if video else image % frames for image in images]
    return settings.strength * settings.curve.values(numbers)
