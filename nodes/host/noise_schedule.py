"""The noise schedule that a MODEL is sampled with.

ComfyUI's `model_sampling` object holds two things. The betas should be those that the temporal layers were trained on.
The prediction and its step rule (eps, v, LCM, zero terminal SNR) belong to the image model and its LoRA.

Load Temporal Layers replaces the MODEL's object by one with the trained betas and the same prediction. A
ModelSamplingDiscrete node after it makes a new object with the image model's betas. Each sampling then replaces that
object by one with the trained betas.

A whole network keeps its schedule in the same way. Its spatial layers were trained with it too, so the betas of other
layers do not take its place.
"""

import logging
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import comfy.model_sampling
import torch
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ...temporal.diffusion import DataScale
from ...temporal.errors import VideoLDMError
from ...temporal.formats.temporal_file import Schedule
from .scaled_latents import scale_of, scaled_class
from .sockets import Executor, Model, ModelSampling

KEY = "video_ldm_schedule"          # of the wrapper that keeps the trained betas
OBJECT = "model_sampling"           # core's name of the object
PREDICTIONS = {"eps": comfy.model_sampling.EPS, "v": comfy.model_sampling.V_PREDICTION, "x0": comfy.model_sampling.X0}
# Names of core's prediction classes, for reports.
RULES = {"EPS": "eps", "V_PREDICTION": "v", "X0": "x0", "IMG_TO_IMG": "image to image"}
SAME = 1e-5                         # relative difference of two noise levels that counts as rounding


@dataclass(frozen=True)
class TrainedBetas:
    """The noise schedule of temporal layers' training, in ComfyUI's names."""

    beta_schedule: str          # "linear", "sqrt_linear", ...
    linear_start: float         # the first beta
    linear_end: float           # the last beta
    prediction: str | None      # "eps", "v" or "x0" with these layers; None: the image model's own
    title: str                  # the layers' name, for reports
    scale: DataScale | None = None      # the factor on the clean latents; None: there is none
    network: bool = False               # whether they are a whole network's, whose spatial layers need them too

    def words(self) -> str:
        betas = f"{self.beta_schedule} {self.linear_start:g} to {self.linear_end:g}"
        return f"{betas}, latents scaled down to {self.scale.last:g}" if self.scale else betas


@dataclass(frozen=True, eq=False)
class KeepTrainedBetas:
    """A wrapper around a sampling. If a node replaced the trained betas, it restores them for this sampling alone."""

    trained: TrainedBetas
    made: ModelSampling         # the object with these betas that Load Temporal Layers put on the MODEL
    of_model: bool              # whether its prediction comes from a node before Load Temporal Layers

    def restored(self, model: Model) -> ModelSampling | None:
        """The object to sample with in place of the MODEL's. None if the MODEL has the trained betas."""
        current = model.get_model_object(OBJECT)
        if current is self.made:
            return None
        right = with_betas(current, self.trained)
        return None if torch.equal(right.sigmas, current.sigmas) else right

    def __call__(self, executor: Executor, noise: Tensor, latent_image: Tensor, sampler: str, sigmas: Tensor,
                 *args: Any, **kwargs: Any) -> Tensor:
        guider = executor.class_obj
        given, right = guider.model_patcher, self.restored(guider.model_patcher)
        if right is None:
            return executor(noise, latent_image, sampler, sigmas, *args, **kwargs)
        sigmas = same_steps(sigmas, given.get_model_object(OBJECT), right)
        guider.model_patcher = with_sampling(given, right)
        try:
            return executor(noise, latent_image, sampler, sigmas, *args, **kwargs)
        finally:
            guider.model_patcher = given


def with_schedule(model: Model, beta_schedule: str, linear_start: float, linear_end: float, prediction: str | None,
                  title: str = "the temporal layers") -> Model:
    """A clone that is sampled with the noise schedule of temporal layers' training.

    Args:
        model: the MODEL.
        beta_schedule, linear_start, linear_end: the betas, in ComfyUI's names.
        prediction: "eps", "v" or "x0" with these layers; None: the image model's own. A node such as
            ModelSamplingDiscrete overrides it.
        title: the layers' name, for reports.
    """
    trained = TrainedBetas(beta_schedule, linear_start, linear_end, prediction, title)
    base, before = model.get_model_object(OBJECT), schedule_wrapper(model)
    if before is not None and before.trained.network:
        check_same(trained, before.trained)
        return model.clone()        # with the network's own prediction
    of_model = OBJECT in model.object_patches
    if before is not None and base is before.made:
        of_model = before.of_model
    if of_model or prediction is None:
        made = with_betas(base, trained)
    else:
        check_discrete(base, trained)
        made = schedule_of(beta_schedule, linear_start, linear_end, prediction, base.zsnr)
    m = model.clone()
    m.add_object_patch(OBJECT, made)
    return keeping(m, KeepTrainedBetas(trained, made, of_model))


def check_same(trained: TrainedBetas, network: TrainedBetas) -> None:
    """Refuse layers whose noise schedule is not that of the whole network on the MODEL."""
    if network.words() == trained.words():
        return
    if network.scale is not None:
        raise VideoLDMError(f"{network.title} samples latents that are scaled down, and {trained.title} was not "
                            "trained on such. Set schedule on Load Temporal Layers to the model's own.")
    raise VideoLDMError(f"The network of {network.title} was trained with another noise schedule "
                        f"({network.words()}) than {trained.title} ({trained.words()}). Set schedule on Load Temporal "
                        "Layers to the model's own.")


def keeping(model: Model, wrapper: KeepTrainedBetas) -> Model:
    """A clone with this wrapper in place of an earlier one."""
    m = model.clone()
    m.remove_wrappers_with_key(WrappersMP.OUTER_SAMPLE, KEY)
    m.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, wrapper)
    return m


def keep_networks(model: Model, schedule: Schedule, title: str) -> Model:
    """A clone that keeps its network's own schedule. Nodes and other layers bring schedules of image models.

    Args:
        model: the MODEL, whose object has the schedule already.
        schedule: the schedule.
        title: the network's name, for reports.
    """
    trained = TrainedBetas(schedule.beta_schedule, schedule.linear_start, schedule.linear_end, schedule.prediction,
                           title, schedule.scale, network=True)
    return keeping(model, KeepTrainedBetas(trained, model.get_model_object(OBJECT), of_model=False))


def schedule_wrapper(model: Model) -> KeepTrainedBetas | None:
    """The wrapper with the trained betas on a MODEL. None if no layers on it brought any."""
    return next(iter(model.get_wrappers(WrappersMP.OUTER_SAMPLE, KEY)), None)


def with_trained_betas(model: Model) -> Model:
    """The MODEL, or a clone with the trained betas if a node after Load Temporal Layers replaced them."""
    wrapper = schedule_wrapper(model)
    right = wrapper and wrapper.restored(model)
    return model if right is None else with_sampling(model, right)


def with_sampling(model: Model, sampling: ModelSampling) -> Model:
    """A clone with this model_sampling object. The log says why."""
    logging.info("[Video LDM] A node behind the video model brought a noise schedule of its own. The clip is sampled "
                 "with the schedule of the model's training and with that node's prediction.")
    m = model.clone()
    m.add_object_patch(OBJECT, sampling)
    return m


def schedule_of(beta_schedule: str, linear_start: float, linear_end: float, prediction: str,
                zsnr: bool = False, scale: DataScale | None = None) -> ModelSampling:
    """ComfyUI's object for a noise schedule of 1000 steps and what the network predicts.

    Args:
        beta_schedule, linear_start, linear_end: the betas, in ComfyUI's names.
        prediction: a key of PREDICTIONS.
        zsnr: whether the betas are rescaled to zero terminal SNR.
        scale: the factor on the clean latents. None: there is none.
    """
    kind = type("TrainedSchedule", (comfy.model_sampling.ModelSamplingDiscrete, PREDICTIONS[prediction]), {})
    kind = scaled_class(kind, scale, "The network")
    return kind(SimpleNamespace(sampling_settings={
        "beta_schedule": beta_schedule, "linear_start": linear_start, "linear_end": linear_end}), zsnr=zsnr)


def with_betas(base: ModelSampling, trained: TrainedBetas) -> ModelSampling:
    """An object of the class of `base`, so with its prediction and step rule, and with the trained betas and scale."""
    check_discrete(base, trained)
    settings = {"beta_schedule": trained.beta_schedule, "linear_start": trained.linear_start,
                "linear_end": trained.linear_end, "timesteps": base.num_timesteps}
    kind = scaled_class(type(base), trained.scale, trained.title)
    try:
        return kind(SimpleNamespace(sampling_settings=settings), zsnr=base.zsnr)
    except TypeError:
        raise no_place(base, trained) from None


def check_discrete(base: ModelSampling, trained: TrainedBetas) -> None:
    """Refuse a MODEL whose noise levels do not come from betas."""
    if not isinstance(base, comfy.model_sampling.ModelSamplingDiscrete):
        raise no_place(base, trained)


def no_place(base: ModelSampling, trained: TrainedBetas) -> VideoLDMError:
    """The error for a model_sampling object that cannot take betas."""
    kind = next(kind.__name__ for kind in type(base).__mro__ if kind.__module__.startswith("comfy.")
                or kind is type(base))
    if trained.scale is not None:
        return VideoLDMError(f"The MODEL's noise schedule ({kind}) has no place for the scaled latents that "
                             f"{trained.title} was trained on. Remove the node that set it.")
    if trained.network:
        return VideoLDMError(f"The MODEL's noise schedule ({kind}) has no place for the betas that {trained.title} was "
                             "trained on. Remove the node that set it.")
    return VideoLDMError(f"The MODEL's noise schedule ({kind}) has no place for the betas that {trained.title} were "
                         "trained on. Remove the node that set it, or set schedule on Load Temporal Layers to the "
                         "model's own.")


def same_steps(sigmas: Tensor, wrong: ModelSampling, right: ModelSampling) -> Tensor:
    """The noise levels of the same timesteps in the right schedule.

    Core's samplers chose `sigmas` from the MODEL's schedule, the wrong one. If a scheduler node chose them from the
    right schedule already, on another MODEL, they are returned unchanged.

    Args:
        sigmas: noise levels of the steps.
        wrong: the MODEL's object.
        right: the object with the trained betas.
    """
    if chosen_with(sigmas, right) > chosen_with(sigmas, wrong) or sigmas.max() > wrong.sigma_max * (1 + SAME):
        return sigmas
    levels, log_sigmas = wrong.log_sigmas.double(), sigmas.double().clamp(min=1e-10).log().to(wrong.log_sigmas.device)
    above = torch.searchsorted(levels, log_sigmas).clamp(1, len(levels) - 1)
    share = ((log_sigmas - levels[above - 1]) / (levels[above] - levels[above - 1])).clamp(0, 1)
    share = torch.where((share - share.round()).abs() < 1e-3, share.round(), share)     # exactly a level, but rounded
    found = torch.lerp(right.log_sigmas.double()[above - 1], right.log_sigmas.double()[above], share).exp()
    return torch.where(sigmas > 0, found.to(sigmas), sigmas)


def chosen_with(sigmas: Tensor, sampling: ModelSampling) -> int:
    """How many of the noise levels are levels of this schedule."""
    levels = sampling.sigmas.to(sigmas)
    return int(torch.isclose(sigmas[:, None], levels, rtol=SAME, atol=0).any(dim=1).sum())


def words(sampling: ModelSampling) -> str:
    """The prediction and the step rule of a model_sampling object, in words for a report."""
    kinds = [kind for kind in type(sampling).__mro__ if issubclass(kind, comfy.model_sampling.EPS)
             and not issubclass(kind, torch.nn.Module)]
    name = kinds[0].__name__ if kinds else type(sampling).__name__
    found = [RULES.get(name, name)]
    levels, steps = len(sampling.sigmas), getattr(sampling, "num_timesteps", None)
    if steps and levels != steps:
        found.append(f"{levels} of {steps} steps")
    if getattr(sampling, "zsnr", False):
        found.append("zero terminal SNR")
    scale = scale_of(sampling)
    if scale is not None:
        found.append(f"latents scaled down to {scale.last:g}")
    return ", ".join(found)


def report(model: Model, as_trained: bool) -> list[str]:
    """The lines about the schedule in Load Temporal Layers' report. model: the MODEL that it made."""
    wrapper = schedule_wrapper(model)
    if as_trained and wrapper is not None:
        betas = f"as trained ({wrapper.trained.words()})"
        source = "that of the MODEL" if wrapper.of_model or wrapper.trained.prediction is None else "as trained"
    else:
        betas, source = "the model's own", "that of the MODEL"
        if wrapper is not None and model.get_model_object(OBJECT) is wrapper.made:
            betas += f", which is that of {wrapper.trained.title} ({wrapper.trained.words()})"
    return [f"Noise schedule: {betas}.", f"Prediction: {source} ({words(model.get_model_object(OBJECT))})."]
