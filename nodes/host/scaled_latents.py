"""Noise schedules that scale the clean latents down too, as VideoCrafter's do (docs/papers.md#videocrafter).

Such a network was trained on `x = sqrt(a) * s * latents + sqrt(1 - a) * noise`, with a factor s for each timestep. Core
samples `latents + sigma * noise`. That is x divided by `amplitude = sqrt(a) * s`, with
`sigma = sqrt(1 - a) / amplitude`. So the samplers stay core's. The object tells them these sigmas and multiplies the
network's input by the amplitude.
"""

from typing import Any

import torch
from comfy.model_sampling import V_PREDICTION, X0
from torch import Tensor

from ...temporal.diffusion import DataScale
from ...temporal.errors import VideoLDMError


class ScaledLatents:
    """What a scaled schedule does differently. It stands before a class of core's in a class of both."""

    data_scale: DataScale
    plain: type             # the class without the scale
    factors: Tensor         # s of each timestep
    levels: Tensor          # log(sigma) of each timestep
    sigmas: Tensor          # fields of core's class
    log_sigmas: Tensor
    num_timesteps: int

    def _register_schedule(self, *args: Any, **kwargs: Any) -> None:
        """Core's constructor calls it to make the sigmas of all timesteps."""
        super()._register_schedule(*args, **kwargs)         # type: ignore[misc]
        factors = self.data_scale.factors(self.num_timesteps)
        self.set_sigmas(self.sigmas.double() / factors)     # type: ignore[attr-defined]
        # LCM keeps some of the sigmas only. These two have all timesteps.
        self.factors, self.levels = factors.float(), self.log_sigmas.clone()

    def factor(self, sigma: Tensor) -> Tensor:
        """s at a noise level, interpolated in log(sigma)."""
        levels, factors = self.levels.to(sigma.device), self.factors.to(sigma.device)
        place = sigma.float().log()
        above = torch.searchsorted(levels, place.contiguous()).clamp(1, len(levels) - 1)
        share = ((place - levels[above - 1]) / (levels[above] - levels[above - 1])).clamp(0, 1)
        return torch.lerp(factors[above - 1], factors[above], share)

    def amplitude(self, sigma: Tensor) -> Tensor:
        """sqrt(a) * s at a noise level. sqrt(a) follows from sigma and s."""
        factor = self.factor(sigma)
        return factor / (1 + (sigma.float() * factor) ** 2) ** 0.5

    def calculate_input(self, sigma: Tensor, noise: Tensor) -> Tensor:
        """The network's input for core's latents."""
        return noise * as_batch(self.amplitude(sigma), noise)

    def noise_scaling(self, sigma: Tensor, noise: Tensor, latent_image: Tensor, max_denoise: bool = False) -> Tensor:
        """Core's latents to start from. At the highest level the network's input is the noise itself."""
        if max_denoise:
            return noise / as_batch(self.amplitude(sigma), noise) + latent_image
        return super().noise_scaling(sigma, noise, latent_image, max_denoise)   # type: ignore[misc]


def as_batch(values: Tensor, like: Tensor) -> Tensor:
    """One value for all images, or one for each, to multiply images with."""
    values = values.to(like.dtype)
    return values.view(()) if values.numel() == 1 else values.view(-1, *[1] * (like.ndim - 1))


def scaled_class(kind: type, scale: DataScale | None, title: str) -> type:
    """A class of core's with the scale, or the class itself without one.

    Args:
        kind: the class. If it has a scale already, that is replaced.
        scale: the factor on the latents. None: there is none.
        title: whose schedule it is, for the sentence.

    Raises VideoLDMError for a class whose prediction does not fit the scale.
    """
    kind = getattr(kind, "plain", kind)
    if scale is None:
        return kind
    if issubclass(kind, (V_PREDICTION, X0)):
        raise VideoLDMError(f"{title} was trained to predict noise in latents that are scaled down, and a node on the "
                            "MODEL sets another prediction. Set that node, ModelSamplingDiscrete, to eps or lcm, or "
                            "remove it.")
    return type("ScaledSchedule", (ScaledLatents, kind), {"data_scale": scale, "plain": kind})


def scale_of(sampling: Any) -> DataScale | None:
    """The scale of a model_sampling object. None: it has none."""
    return getattr(sampling, "data_scale", None)
