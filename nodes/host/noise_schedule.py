"""The noise schedule that a MODEL is sampled with."""

from types import SimpleNamespace

import comfy.model_sampling


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
