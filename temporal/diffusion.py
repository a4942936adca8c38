"""Variance-preserving diffusion in 1000 discrete steps, as the image LDM was trained (Video LDM, section 3.1).

    x_tau = alpha_tau * x + sigma_tau * eps        alpha_tau^2 + sigma_tau^2 = 1

The network predicts "eps", "v" = alpha_tau * eps - sigma_tau * x, or "x0", which is x itself. The noise schedule is
not rescaled to zero terminal SNR, since the paper is older than that method.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import VideoLDMError

PREDICTIONS = ("eps", "v", "x0")
SCHEDULES = ("linear", "sqrt_linear")


def make_betas(linear_start: float, linear_end: float, steps: int, schedule: str) -> Tensor:
    """The table of betas, float64, shape (steps,). The names are LDM's: "linear" is linear in sqrt(beta)."""
    if schedule == "linear":
        return torch.linspace(linear_start ** 0.5, linear_end ** 0.5, steps, dtype=torch.float64) ** 2
    if schedule == "sqrt_linear":
        return torch.linspace(linear_start, linear_end, steps, dtype=torch.float64)
    raise VideoLDMError(f"The beta schedule '{schedule}' is unknown. Use one of: {', '.join(SCHEDULES)}.")


@dataclass(frozen=True)
class DataScale:
    """A factor that scales the clean data down: x_tau = alpha_tau * scale_tau * x + sigma_tau * eps
    (docs/papers.md#videocrafter)."""

    last: float         # the factor falls evenly from 1 to this value
    steps: int = 400    # over this many steps. Later steps have the last value

    def factors(self, steps: int) -> Tensor:
        """The factor of each of the first `steps` diffusion steps, float64."""
        falling = torch.linspace(1, self.last, self.steps, dtype=torch.float64)
        return torch.cat([falling, falling.new_full((max(steps - self.steps, 0),), self.last)])[:steps]


class Diffusion:
    """A noise schedule and a prediction type. Tables are float64; results have the input's dtype."""

    def __init__(self, linear_start: float, linear_end: float, steps: int = 1000, prediction: str = "eps",
                 schedule: str = "linear") -> None:
        """Make the tables.

        Args:
            linear_start, linear_end: the first and the last beta.
            steps: number of diffusion steps.
            prediction: what the network predicts, one of PREDICTIONS.
            schedule: how the betas are spaced, one of SCHEDULES.

        Raises VideoLDMError for values outside their bounds.
        """
        if prediction not in PREDICTIONS:
            raise VideoLDMError(f"The prediction type '{prediction}' is unknown. Use one of: {', '.join(PREDICTIONS)}.")
        if not 0 < linear_start <= linear_end < 1:
            raise VideoLDMError(f"Betas must satisfy 0 < start <= end < 1, not {linear_start} and {linear_end}.")
        if steps < 1:
            raise VideoLDMError(f"A diffusion needs at least one step, not {steps}.")
        self.linear_start, self.linear_end = linear_start, linear_end
        self.steps, self.prediction, self.schedule = steps, prediction, schedule
        alphas_cumprod = torch.cumprod(1.0 - make_betas(linear_start, linear_end, steps, schedule), dim=0)
        self.alpha = alphas_cumprod.sqrt()
        self.sigma = (1.0 - alphas_cumprod).sqrt()
        # One copy of the tables per device. Copying in every step would wait for the GPU and break CUDA graphs.
        self._tables: dict[torch.device, tuple[Tensor, ...]] = {}

    def random_tau(self, count: int, generator: torch.Generator | None = None,
                   device: torch.device | str = "cpu") -> Tensor:
        """`count` steps drawn uniformly from 0..steps-1, int64. They are drawn on the CPU, so devices do not differ."""
        return torch.randint(0, self.steps, (count,), generator=generator).to(device)

    def random_noise(self, like: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Gaussian noise with the shape, dtype and device of `like`. It is drawn on the CPU."""
        return torch.randn(like.shape, generator=generator, dtype=torch.float32).to(like.device, like.dtype)

    def add_noise(self, x: Tensor, tau: Tensor, noise: Tensor) -> Tensor:
        """x_tau = alpha_tau x + sigma_tau eps. x, noise: (n ...); tau: (n,) int64."""
        alpha, sigma = self.coefficients(tau, x)
        return alpha * x + sigma * noise

    def target(self, x: Tensor, noise: Tensor, tau: Tensor) -> Tensor:
        """The training target: eps, v = alpha_tau eps - sigma_tau x, or x."""
        if self.prediction != "v":
            return noise if self.prediction == "eps" else x
        alpha, sigma = self.coefficients(tau, x)
        return alpha * noise - sigma * x

    def predicted_x(self, output: Tensor, x_tau: Tensor, tau: Tensor) -> Tensor:
        """The clean x that a network's output at x_tau stands for."""
        if self.prediction == "x0":
            return output
        alpha, sigma = self.coefficients(tau, x_tau)
        if self.prediction == "eps":
            return (x_tau - sigma * output) / alpha
        return alpha * x_tau - sigma * output

    def predicted_noise(self, output: Tensor, x_tau: Tensor, tau: Tensor) -> Tensor:
        """The noise eps that a network's output at x_tau stands for."""
        if self.prediction == "eps":
            return output
        alpha, sigma = self.coefficients(tau, x_tau)
        return (x_tau - alpha * output) / sigma if self.prediction == "x0" else alpha * output + sigma * x_tau

    def coefficients(self, tau: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """alpha_tau and sigma_tau of shape (n, 1, ...), in the dtype of x (n, ...)."""
        if tau.shape != x.shape[:1]:
            raise VideoLDMError(f"tau must hold one step per batch item: {tuple(tau.shape)} for {tuple(x.shape)}.")
        shape = (-1, *[1] * (x.ndim - 1))
        alpha, sigma = (table[tau].reshape(shape).to(x.device, x.dtype) for table in self.tables(tau.device))
        return alpha, sigma

    def tables(self, device: torch.device) -> tuple[Tensor, ...]:
        """alpha and sigma of all steps, on this device."""
        if device not in self._tables:
            self._tables[device] = tuple(table.to(device) for table in (self.alpha, self.sigma))
        return self._tables[device]
