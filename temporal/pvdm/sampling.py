"""Sampling of planes, clip after clip (docs/papers.md#pvdm-sampling).

A clip is sampled from noise. The next clip is conditioned on its planes, and so on without end.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..diffusion import Diffusion

LINEAR_START, LINEAR_END = 0.0015, 0.0195

# What the network predicts of planes `b c l` at step tau, given the planes of the clip before, or None
Network = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def diffusion(prediction: str = "eps") -> Diffusion:
    """The published noise schedule. prediction: what the network predicts."""
    return Diffusion(LINEAR_START, LINEAR_END, prediction=prediction)


@dataclass(frozen=True)
class SamplerParams:
    """How a clip is sampled."""

    steps: int              # 1 to the schedule's number. With all of them it is the ancestral sampler of DDPM
    eta: float = 1.0        # how much noise each step adds; 0: none
    guidance: float = 0.0   # w of eps = (1 + w) eps(clip before) - w eps(nothing)


def times(steps: int, total: int) -> list[int]:
    """The diffusion steps, from the last to the first, and -1 behind them."""
    return torch.linspace(-1, total - 1, steps + 1).int().tolist()[::-1]


def sample(network: Network, x: Tensor, cond: Tensor | None, params: SamplerParams, schedule: Diffusion,
           generator: torch.Generator | None = None, on_step: Callable[[int, Tensor], None] | None = None) -> Tensor:
    """Planes of clips from noise.

    Args:
        network: gives what the schedule says that it predicts.
        x: Gaussian noise `b c l`.
        cond: the planes of the clips before, like x; None for first clips.
        generator: for the noise of the steps. It is drawn on the generator's device.
        on_step: called with (steps done, the clean planes as they are predicted).
    """
    moments = times(params.steps, schedule.steps)
    ancestral = params.steps == schedule.steps
    for done, (now, then) in enumerate(zip(moments, moments[1:]), 1):
        tau = torch.full((len(x),), now, device=x.device)
        output = guided(network, x, tau, cond, params.guidance)
        clean = schedule.predicted_x(output, x, tau).clamp(-1, 1)
        # DDPM's posterior is that of the clamped planes, DDIM's noise that of the network.
        eps = schedule_noise(schedule, clean, x, tau) if ancestral else schedule.predicted_noise(output, x, tau)
        x = clean if then < 0 else ddim_step(schedule, clean, eps, now, then, 1.0 if ancestral else params.eta,
                                             generator)
        if on_step is not None:
            on_step(done, clean)
    return x


def guided(network: Network, x: Tensor, tau: Tensor, cond: Tensor | None, w: float) -> Tensor:
    output = network(x, tau, cond)
    return output if cond is None or not w else (1 + w) * output - w * network(x, tau, None)


def schedule_noise(schedule: Diffusion, clean: Tensor, x: Tensor, tau: Tensor) -> Tensor:
    """The noise that is left of x where `clean` is taken away."""
    alpha, sigma = schedule.coefficients(tau, x)
    return (x - alpha * clean) / sigma


def ddim_step(schedule: Diffusion, clean: Tensor, eps: Tensor, now: int, then: int, eta: float,
              generator: torch.Generator | None) -> Tensor:
    """From step `now` to the earlier step `then` (DDIM, Eq. 12 and 16)."""
    alpha, alpha_next = (float(schedule.alpha[moment] ** 2) for moment in (now, then))
    sigma = eta * ((1 - alpha / alpha_next) * (1 - alpha_next) / (1 - alpha)) ** 0.5
    x = alpha_next ** 0.5 * clean + (1 - alpha_next - sigma ** 2) ** 0.5 * eps
    if not sigma:
        return x
    device = generator.device if generator is not None else x.device
    noise = torch.randn(x.shape, generator=generator, device=device, dtype=torch.float32)
    return x + sigma * noise.to(x)


def roll_out(clips: int, first: SamplerParams, following: SamplerParams, network: Network,
             noise: Callable[[int], Tensor], schedule: Diffusion, generator: Callable[[int], torch.Generator],
             before: Tensor | None = None,
             on_step: Callable[[int, Tensor], None] | None = None) -> Iterator[Tensor]:
    """Planes of one clip after another. Each is conditioned on the planes before it, as they were sampled.

    Args:
        clips: how many.
        first, following: how a clip without one before it is sampled, and how the others are.
        noise, generator: of the clip of this number.
        before: the planes of a clip to go on from.
    """
    for number in range(clips):
        before = sample(network, noise(number), before, following if before is not None else first, schedule,
                        generator(number), on_step)
        yield before
