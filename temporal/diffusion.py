"""Variance-preserving diffusion in 1000 discrete steps, as the image LDM was trained (Video LDM, section 3.1).

x_tau = alpha_tau * x + sigma_tau * eps, with alpha_tau^2 + sigma_tau^2 = 1. The network predicts eps,
v = alpha_tau * eps - sigma_tau * x, or "x0", x itself, which asks nothing of it that x does not hold. The paper predates
the rescaling to zero terminal SNR: it is not done.
"""

import torch

from .errors import VideoLDMError

PREDICTIONS = ("eps", "v", "x0")
SCHEDULES = ("linear", "sqrt_linear")


def make_betas(linear_start, linear_end, steps, schedule):
    """The table of betas, float64, shape (steps,). The names are LDM's, whose "linear" is linear in sqrt(beta)."""
    if schedule == "linear":
        return torch.linspace(linear_start ** 0.5, linear_end ** 0.5, steps, dtype=torch.float64) ** 2
    if schedule == "sqrt_linear":
        return torch.linspace(linear_start, linear_end, steps, dtype=torch.float64)
    raise VideoLDMError(f"The beta schedule '{schedule}' is unknown. Use one of: {', '.join(SCHEDULES)}.")


class Diffusion:
    """Noise schedule and training target. Tables are float64 on the CPU; results have the input's dtype."""

    def __init__(self, linear_start, linear_end, steps=1000, prediction="eps", schedule="linear"):
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
        self._tables = {}           # on each device: a copy in every step would wait for a GPU, and cannot be recorded

    def random_tau(self, count, generator=None, device="cpu"):
        """`count` steps drawn uniformly from 0..steps-1, int64. Drawn on the CPU: the same on every device."""
        return torch.randint(0, self.steps, (count,), generator=generator).to(device)

    def random_noise(self, like, generator=None):
        """Gaussian noise of the shape, dtype and device of `like`: independent in every frame, no part is shared."""
        return torch.randn(like.shape, generator=generator, dtype=torch.float32).to(like.device, like.dtype)

    def add_noise(self, x, tau, noise):
        """x_tau = alpha_tau x + sigma_tau eps. x, noise: (n ...); tau: (n,) int64."""
        alpha, sigma = self.coefficients(tau, x)
        return alpha * x + sigma * noise

    def target(self, x, noise, tau):
        """What the network is to predict: eps, v = alpha_tau eps - sigma_tau x, or x."""
        if self.prediction != "v":
            return noise if self.prediction == "eps" else x
        alpha, sigma = self.coefficients(tau, x)
        return alpha * noise - sigma * x

    def predicted_x(self, output, x_tau, tau):
        """The clean x that a network output stands for at x_tau."""
        if self.prediction == "x0":
            return output
        alpha, sigma = self.coefficients(tau, x_tau)
        if self.prediction == "eps":
            return (x_tau - sigma * output) / alpha
        return alpha * x_tau - sigma * output

    def predicted_noise(self, output, x_tau, tau):
        """The noise eps that a network output stands for at x_tau."""
        if self.prediction == "eps":
            return output
        alpha, sigma = self.coefficients(tau, x_tau)
        return (x_tau - alpha * output) / sigma if self.prediction == "x0" else alpha * output + sigma * x_tau

    def coefficients(self, tau, x):
        """alpha_tau and sigma_tau as (n, 1, ...), ready to multiply x of shape (n, ...)."""
        if tau.shape != x.shape[:1]:
            raise VideoLDMError(f"tau must hold one step per batch item: {tuple(tau.shape)} for {tuple(x.shape)}.")
        shape = (-1, *[1] * (x.ndim - 1))
        return (table[tau].reshape(shape).to(x.device, x.dtype) for table in self.tables(tau.device))

    def tables(self, device):
        """alpha and sigma of all steps, on this device."""
        if device not in self._tables:
            self._tables[device] = tuple(table.to(device) for table in (self.alpha, self.sigma))
        return self._tables[device]
