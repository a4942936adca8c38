"""Reuse Temporal Layers on a MODEL: one KeptResiduals for each sampling, in the sampling's own options."""

from collections.abc import Hashable, Sequence
from typing import Any

import comfy.model_management
from comfy.patcher_extension import WrappersMP

from ...temporal.errors import VideoLDMError
from ...temporal.reuse import KeptResiduals, ReuseInCall, ReusePlan
from ...temporal.slots import unet_sites
from ...temporal.unet import unet_levels
from . import notes
from .image_model import spatial_unet
from .options import CallClips, layer_sets_in
from .sockets import Executor, Model

KEY = "video_ldm_reuse"         # key of the wrapper, and of what a sampling keeps in its transformer_options
SIDE = 64                       # latents of the sides of a picture of 512x512 pixels


def with_reuse(model: Model, steps: int, start: float, end: float) -> Model:
    """A clone whose temporal layers rest in some steps. It replaces an earlier reuse on the MODEL.

    Args:
        model: the MODEL.
        steps: how many steps use again what one has kept. 0: none, and nothing is kept.
        start, end: the range of the sampling in which they do, from 0 to 1.
    """
    m = model.clone()
    m.remove_wrappers_with_key(WrappersMP.SAMPLER_SAMPLE, KEY)
    if steps:
        sigmas = m.get_model_object("model_sampling").percent_to_sigma
        plan = ReusePlan(steps, float(sigmas(start)), float(sigmas(end)))
        m.add_wrapper_with_key(WrappersMP.SAMPLER_SAMPLE, KEY, SamplingWithReuse(plan))
    return m


def refuse_reuse(model: Model, node: str) -> None:
    """Refuse it in a node of the pack whose memory must not grow with the length of the video. node: its title."""
    if model.get_wrappers(WrappersMP.SAMPLER_SAMPLE, KEY):
        raise VideoLDMError(f"Reuse Temporal Layers keeps what the layers add to every piece of a video, and {node} "
                            "works piece by piece to need little memory. Connect the MODEL without Reuse Temporal "
                            "Layers.")


class SamplingWithReuse:
    """Wraps core's sampler. What is kept lives as long as the sampling."""

    def __init__(self, plan: ReusePlan) -> None:
        self.plan = plan

    def __call__(self, executor: Executor, model_wrap: Any, sigmas: Any, extra_args: dict, callback: Any, noise: Any,
                 *args: Any, **kwargs: Any) -> Any:
        options = dict(extra_args["model_options"].get("transformer_options", {}))
        kept = options[KEY] = KeptResiduals(self.plan, self.waits_on_cpu(model_wrap, extra_args["model_options"],
                                                                       noise.shape))
        model_options = {**extra_args["model_options"], "transformer_options": options}
        result = executor(model_wrap, sigmas, {**extra_args, "model_options": model_options}, callback, noise, *args,
                          **kwargs)
        if kept.step > 2 and kept.reused < kept.ran * self.plan.steps / 3:
            notes.warn("Reuse Temporal Layers found hardly a step that could use the layers' results again. Set the "
                       "schedule of Frame Windows to static, so that its windows stay in place, or widen the range.")
        return result

    def waits_on_cpu(self, model_wrap: Any, model_options: dict, shape: Sequence[int]) -> bool:
        """Whether what is kept waits in the computer's memory: on a GPU that has too little left beside a call."""
        network = model_wrap.inner_model
        device = comfy.model_management.get_torch_device()
        if comfy.model_management.is_device_cpu(device):
            return False
        item = comfy.model_management.dtype_size(network.get_dtype())
        conditions = max(1, len([conds for conds in model_wrap.conds.values() if conds]))
        options = model_options.get("transformer_options", {})
        images = shape[0] * overlapping(model_options.get("context_handler"))
        kept = item * conditions * images * numbers_per_image(network.diffusion_model, options, shape[2:])
        call = network.memory_required([conditions * shape[0], *shape[1:]])
        return kept + call > comfy.model_management.get_free_memory(device)


def overlapping(windows: Any) -> float:
    """In how many windows each frame is, on average. windows: the handler of a sampling; None: one window."""
    length, overlap = (getattr(windows, name, 0) for name in ("context_length", "context_overlap"))
    return length / (length - overlap) if length > overlap else 1.0


def numbers_per_image(unet: Any, options: dict, size: Sequence[int]) -> int:
    """How many numbers the temporal layers add to one image. size: height and width of its latents."""
    sites, levels = unet_sites(unet), unet_levels(unet)
    total = 0
    for layers in layer_sets_in(options).values():
        for site, _ in layers.params.bricks:
            height, width = (-(-side >> levels[site.part, site.index]) for side in size)
            total += sites[site].channels * height * width
    return total


def bytes_per_frame(model: Model) -> int:
    """Bytes that one frame of 512x512 pixels keeps for each condition."""
    item = comfy.model_management.dtype_size(model.model.get_dtype())
    options = model.model_options.get("transformer_options", {})
    return item * numbers_per_image(spatial_unet(model), options, (SIDE, SIDE))


def reuse_in_call(key: str, clips: CallClips, options: dict) -> ReuseInCall | None:
    """What one set of layers keeps or uses again in a call. None: nothing.

    Args:
        key: of the set of layers.
        clips: of the call.
        options: the transformer_options of the call.
    """
    kept, conditions = options.get(KEY), options.get("uuids")
    if kept is None or conditions is None or len(conditions) != len(clips.conditions):
        return None
    window = options.get("context_window")
    frames = None if window is None else tuple(window.index_list)
    keys: list[Hashable] = [(key, frames, condition, repeat)
                            for repeat in range(clips.repeats) for condition in conditions]
    return kept.call(keys, float(options["sigmas"][0]))
