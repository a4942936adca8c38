"""FreeInit on a MODEL: a wrapper around the whole sampling, which runs it several times.

Each run is a complete sampling of core's. So what begins anew in each sampling begins anew in each run: ControlNets,
scheduled LoRA, context frames, caches.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import comfy.model_management
import comfy.sample
import torch
from comfy.model_sampling import EPS, IMG_TO_IMG
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ...temporal.conditioning import resolve_positions
from ...temporal.errors import VideoLDMError
from ...temporal.free_init import join_frequencies, low_pass
from .context import full_mask, takes_context
from .noise_schedule import OBJECT, schedule_wrapper
from .options import clip_options, frames_per_clip
from .sockets import Executor, Model, ModelSampling

KEY = "video_ldm_free_init"         # key of the wrapper
NEW_SEED = 0x2545F4914F6CDD1D       # the seeds of new noise are far from what others take
RUN_BITS = 24                       # torch's generator on the processor reads the lower 32 bits of a seed
SEEDS = 2 ** 64                     # how many there are
WHOLE = 0.999                       # a mask above this leaves nothing of the latent behind it


@dataclass(frozen=True, eq=False)
class FreeInit:
    """Wraps a sampling and runs it `runs` times."""

    runs: int               # 1: as without
    kind: str               # the filter, a key of temporal.free_init.FILTERS
    stop_space: float       # the filter's stop frequencies, from 0 to 1
    stop_time: float
    order: int              # of the Butterworth filter

    def __deepcopy__(self, memo: dict) -> "FreeInit":
        return self

    def __call__(self, executor: Executor, noise: Tensor, latent_image: Tensor, sampler: Any, sigmas: Tensor,
                 denoise_mask: Tensor | None = None, callback: Callable | None = None, disable_pbar: bool = False,
                 seed: int | None = None, **kwargs: Any) -> Tensor:
        guider = executor.class_obj
        frames = frames_per_clip(len(noise), guider.model_options.get("transformer_options", {}))
        made = made_anew(guider, noise, denoise_mask, frames)
        check(guider.model_patcher, noise, latent_image, sigmas, made)
        conds = copied(guider.conds)            # a sampling changes them

        def sampled(run: int, start: Tensor, latent: Tensor) -> Tensor:
            guider.conds = copied(conds)
            return executor(start, latent, sampler, sigmas, denoise_mask, in_run(callback, run, self.runs),
                            disable_pbar, seed, **kwargs)
        samples = sampled(0, noise, latent_image)
        latent = emptied(guider.model_patcher, latent_image, made)
        for run in range(1, self.runs):
            comfy.model_management.throw_exception_if_processing_interrupted()
            again = self.next_noise(guider.model_patcher, samples, noise, frames, seed_of_run(seed or 0, run))
            samples = sampled(run, torch.where(made, again, noise), latent)
        return samples

    def next_noise(self, model: Model, samples: Tensor, noise: Tensor, frames: int, seed: int) -> Tensor:
        """The noise of the next run.

        Args:
            model: the MODEL.
            samples: the result of the last run.
            noise: the first run's.
            frames: of a clip.
            seed: of the new noise.
        """
        noisy = noised(sampling_of(model), model.model.process_latent_in(samples.to(noise)), noise)
        new = comfy.sample.prepare_noise(noise, seed).to(noise)
        kept = low_pass(self.kind, (frames, *noise.shape[2:]), self.stop_space, self.stop_time, self.order)
        low, high = (tensor.unflatten(0, (-1, frames)) for tensor in (noisy, new))
        return join_frequencies(low, high, kept.to(noise.device)).flatten(0, 1)


def seed_of_run(seed: int, run: int) -> int:
    """The seed of a run's new noise. Neighbouring seeds, such as Extend Video's for its clips, share none."""
    return (seed ^ NEW_SEED ^ run << RUN_BITS) % SEEDS


def with_free_init(model: Model, free_init: FreeInit) -> Model:
    """A clone whose sampling is run several times. Its wrapper stands around all others, so each run has them all."""
    m = model.clone()
    m.remove_wrappers_with_key(WrappersMP.OUTER_SAMPLE, KEY)
    if free_init.runs > 1:
        m.wrappers[WrappersMP.OUTER_SAMPLE] = {KEY: [free_init], **m.wrappers.get(WrappersMP.OUTER_SAMPLE, {})}
    return m


def refuse_free_init(model: Model, node: str, reason: str) -> None:
    """Refuse FreeInit on a MODEL in a node of this pack that it does not suit. reason: a sentence."""
    if model.get_wrappers(WrappersMP.OUTER_SAMPLE, KEY):
        raise VideoLDMError(f"{node} does not take FreeInit. {reason} Connect the MODEL from before FreeInit.")


def sampling_of(model: Model) -> ModelSampling:
    """The object with which the MODEL is sampled. A wrapper inside may replace the MODEL's by the trained one."""
    wrapper = schedule_wrapper(model)
    return wrapper and wrapper.restored(model) or model.get_model_object(OBJECT)


def noised(sampling: ModelSampling, latents: Tensor, noise: Tensor) -> Tensor:
    """Latents at the highest noise level, in the form of the noise that core's samplers take.

    Core multiplies its noise to get the latents to start from. This divides by the same factor.
    """
    sigma, one = sampling.sigma_max.to(noise), noise.new_ones(1, 1, 1, 1)
    factor = sampling.noise_scaling(sigma, one, torch.zeros_like(one), True)
    return sampling.noise_scaling(sigma, noise, latents, False) / factor


def made_anew(guider: Any, noise: Tensor, mask: Tensor | None, frames: int) -> Tensor:
    """Where the sampling makes latents, `(b t) 1 h w`. Elsewhere a noise mask holds the latent that is given.

    Context Frames holds frames by a mask of its own, which is put on inside this wrapper.
    """
    made = full_mask(noise, mask) > WHOLE
    known = clip_options(guider.model_options.get("transformer_options", {})).context
    if known is not None and not takes_context(guider.model_patcher):
        made.unflatten(0, (-1, frames))[:, list(resolve_positions(known.positions, frames))] = False
    return made


def emptied(model: Model, latent: Tensor, made: Tensor) -> Tensor:
    """The latent without what is made anew: from the second run on that comes from the run before."""
    if made.all():
        return torch.zeros_like(latent)
    empty = model.model.process_latent_out(torch.zeros_like(latent))
    return torch.where(made.to(latent.device), empty, latent)


def copied(conds: dict) -> dict:
    return {name: [cond.copy() for cond in conds_of] for name, conds_of in conds.items()}


def in_run(callback: Callable | None, run: int, runs: int) -> Callable | None:
    """A sampling's callback that counts the steps of all runs."""
    if callback is None:
        return None

    def counted(step: int, x0: Tensor, x: Tensor, steps: int) -> None:
        callback(run * steps + min(step, steps - 1), x0, x, runs * steps)
    return counted


def check(model: Model, noise: Tensor, latent: Tensor, sigmas: Tensor, made: Tensor) -> None:
    """Refuse a sampling for which FreeInit's noise is not right."""
    sampling = model.get_model_object(OBJECT)
    if not isinstance(sampling, EPS) or isinstance(sampling, IMG_TO_IMG):
        kind = next((kind.__name__ for kind in type(sampling).__mro__ if kind.__module__ == EPS.__module__
                     and not issubclass(kind, torch.nn.Module)), type(sampling).__name__)
        raise VideoLDMError(f"FreeInit is made for models that predict noise or v, and this MODEL is sampled in "
                            f"another way ({kind}). Remove FreeInit, or the node that set this sampling.")
    if not noise.count_nonzero():
        raise VideoLDMError("FreeInit needs the noise that the clip begins with, and this sampling adds none. Turn "
                            "the sampler's noise on, or remove FreeInit.")
    if sigmas[-1] > 0:
        raise VideoLDMError(f"FreeInit begins again from finished clips, and this sampling ends at the noise level "
                            f"{sigmas[-1]:.3g}. Let it end at 0, or remove FreeInit.")
    if sigmas[0] < 0.999 * sampling.sigma_max.to(sigmas) and latent[made.expand_as(latent)].count_nonzero():
        raise VideoLDMError(f"FreeInit makes clips from noise alone, and this sampling keeps part of the connected "
                            f"latent: it begins at the noise level {sigmas[0]:.3g}, and the highest is "
                            f"{sampling.sigma_max:.3g}. Set denoise to 1, and scheduler to normal, or remove FreeInit.")
