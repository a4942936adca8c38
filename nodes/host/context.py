"""Context frames on a MODEL: frames of the clip that are given.

Layers that were trained with context frames take them as an input. For other layers ComfyUI's noise mask holds them in
place. All of it is on the clone, so core's samplers work as well as the pack's: the frames are in its
transformer_options, one wrapper stands around the sampling, and context guidance around calc_cond_batch.
"""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from comfy.patcher_extension import WrappersMP
from comfy.sampler_helpers import prepare_mask
from torch import Tensor

from ...temporal.conditioning import resolve_positions
from ...temporal.errors import VideoLDMError
from .compat import with_own_id
from .latents import check_channels, check_frames
from .options import CLIP, ContextFrames, clip_options, frames_per_clip, layer_sets, set_clip_options
from .sockets import Executor, Model

KEY = "video_ldm_context"       # key of the wrappers


def takes_context(model: Model) -> bool:
    """Whether temporal layers on the MODEL have an input for context frames."""
    return any(layers.params.known_positions for layers in layer_sets(model))


def check_trained(model: Model, positions: tuple[int, ...]) -> None:
    """Refuse positions for which a set of layers with an input for context frames was not trained."""
    for layers in layer_sets(model):
        trained, frames = layers.params.known_positions, layers.params.frames
        if not trained:
            continue
        known = set(resolve_positions(positions, frames))
        if not any(known == {p % frames for p in candidate} for candidate in trained):
            sets = "; ".join(", ".join(map(str, candidate)) or "none" for candidate in trained)
            raise VideoLDMError(f"The temporal layers ({layers.title}) were trained for the context frames {sets}, "
                                f"not for {', '.join(map(str, positions))}. Numbers count from 0, and from the end "
                                "where negative. Choose one of these sets.")


def with_context_frames(model: Model, latents: Tensor, positions: Iterable[int], guidance: float = 1.0) -> Model:
    """A clone that samples clips with these context frames.

    Args:
        model: the MODEL.
        latents: the context frames `(k n) c h w`, for k clips or for all.
        positions: n frame numbers, from the clip's end if negative.
        guidance: the scale of context guidance; 1 is off.
    """
    positions = tuple(positions)
    check_frames(latents, "The context frames")
    if not positions or len(latents) % len(positions):
        raise VideoLDMError(f"{len(latents)} context frames were given for {len(positions)} positions. Give one frame "
                            "for each position.")
    check_channels(latents, model.get_model_object("latent_format").latent_channels, "The context frames")
    m = model.clone()
    set_clip_options(m, context=ContextFrames(latents, m.model.process_latent_in(latents), positions))
    m.remove_wrappers_with_key(WrappersMP.OUTER_SAMPLE, KEY)
    m.remove_wrappers_with_key(WrappersMP.CALC_COND_BATCH, KEY)
    if takes_context(m):
        check_trained(m, positions)
        m.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, sample_with_context)
        if guidance != 1:
            m.add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, KEY, ContextGuidance(guidance))
    else:
        m.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, sample_with_noise_mask)
    return m


def fit_to_sampling(guider: Any, noise: Tensor) -> ContextFrames:
    """The context frames with their positions in the clips of this sampling. Raises if they do not fit its clips."""
    options = guider.model_options["transformer_options"]
    clip, frames = clip_options(options), frames_per_clip(len(noise), options)
    known = clip.context
    assert known is not None        # with_context_frames sets it together with this wrapper
    if known.latents.shape[2:] != noise.shape[2:]:
        given, wanted = (f"{shape[-1] * 8}x{shape[-2] * 8}" for shape in (known.latents.shape, noise.shape))
        raise VideoLDMError(f"The context frames are {given} pixels and the clip is {wanted}. Resize one of them: "
                            "context frames have the clip's own size.")
    positions = resolve_positions(known.positions, frames)
    clips, sets = len(noise) // frames, len(known.latents) // len(positions)
    if sets not in (1, clips):
        raise VideoLDMError(f"Context frames were given for {sets} clips, and {clips} clips are sampled. Give one set "
                            "for all clips, or one for each.")
    # The guider's options are its own for the length of one sampling.
    known = replace(known, positions=positions, frames=frames)
    options[CLIP] = replace(clip, context=known)
    return known


def write_context(samples: Tensor, known: ContextFrames) -> Tensor:
    """A copy of frames `(b t) ...` with the context frames at their positions."""
    clips = samples.clone().unflatten(0, (-1, known.frames))
    given = known.latents.to(samples).unflatten(0, (-1, len(known.positions)))
    clips[:, list(known.positions)] = given.expand(len(clips), *given.shape[1:])
    return clips.flatten(0, 1)


def sample_with_context(executor: Executor, noise: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Wraps a sampling. The layers take the context frames as an input, and the result has them unchanged."""
    known = fit_to_sampling(executor.class_obj, noise)
    return write_context(executor(noise, *args, **kwargs), known)


def sample_with_noise_mask(executor: Executor, noise: Tensor, latent_image: Tensor, sampler: str, sigmas: Tensor,
                           denoise_mask: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
    """Wraps a sampling, for layers without such an input. The frames are the latent to start from, behind a mask."""
    known = fit_to_sampling(executor.class_obj, noise)
    mask = torch.ones(len(noise), 1, *noise.shape[2:], device=noise.device)
    if denoise_mask is not None:
        # Newer versions pass a mask of the noise's shape. prepare_mask would take its channels for further masks.
        ready = denoise_mask.shape == noise.shape
        mask = (denoise_mask if ready else prepare_mask(denoise_mask, noise.shape, noise.device))[:, :1].clone()
    mask.unflatten(0, (-1, known.frames))[:, list(known.positions)] = 0
    samples = executor(noise, write_context(latent_image, known), sampler, sigmas, mask, *args, **kwargs)
    return write_context(samples, known)


class ContextGuidance:
    """Video LDM's context guidance (docs/papers.md#prediction), together with text guidance:

    `e = e(c, neg) + s_t (e(c, pos) - e(c, neg)) + (s_c - 1)(e(c, pos) - e(0, pos))`

    The same holds for the denoised prediction, which is linear in e. The last term is added to the prediction of every
    condition, and so to the guider's result: the weights of the conditions add up to 1.
    """

    def __init__(self, scale: float) -> None:
        self.scale = scale

    def __call__(self, executor: Executor, model: Model, conds: list, x_in: Tensor, timestep: Tensor,
                 model_options: dict) -> list[Tensor]:
        predictions = executor(model, conds, x_in, timestep, model_options)
        if not conds or conds[0] is None:
            return predictions
        options = {**model_options["transformer_options"]}
        options[CLIP] = replace(clip_options(options), hide_context=True)
        hidden = [with_own_id(cond, KEY) for cond in conds[0]]
        without, = executor(model, [hidden], x_in, timestep, {**model_options, "transformer_options": options})
        term = (self.scale - 1) * (predictions[0] - without)
        return [p if cond is None else p + term for p, cond in zip(predictions, conds)]
