"""The loss of an image LDM: also of its spatial fine-tuning on the frames of videos (Video LDM, Table 6)."""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor, nn

from ..diffusion import Diffusion
from .batch import Batch, check_null_context, drop_context, frames_as_images
from .loss_inputs import RecordableLoss


class Noised(NamedTuple):
    """A flat batch with what was drawn for it."""

    x: Tensor                           # (n c h w)
    tau: Tensor                         # the step of each item, (n)
    noise: Tensor                       # like x
    context: Tensor | None = None       # a text for each item, (n l d)
    weights: Tensor | None = None       # how much each pixel counts, (n 1 h w); None: all alike


def squared_error(diffusion: Diffusion, output: Tensor, x: Tensor, noise: Tensor, tau: Tensor,
                  weights: Tensor | None = None, x0_weighting: bool = False) -> Tensor:
    """|| target - output ||^2, its mean over everything, in float32.

    Args:
        output: what the network predicts at x_tau.
        x, noise: the clean batch (n ...) and its noise.
        tau: the step of each item, (n).
        weights: how much each pixel counts, (n 1 ...); None for all alike. They do not change what the best output is.
        x0_weighting: take the error of the clean x that follows from the output. High noise then counts for more than
            low noise (Salimans and Ho 2022, section 4). High noise is where colours and positions are decided.
    """
    error = output.float() - diffusion.target(x, noise, tau).float()
    if x0_weighting and diffusion.prediction != "x0":
        alpha, sigma = diffusion.coefficients(tau, error)
        error = error * (sigma / alpha if diffusion.prediction == "eps" else sigma)
    return (error.square() if weights is None else weights * error.square()).mean()


def denoising_loss(backbone: Callable[..., Tensor], diffusion: Diffusion, noised: Noised,
                   x0_weighting: bool = False) -> Tensor:
    """|| target - f(x_tau, tau, c) ||^2 over a flat batch. x0_weighting: see `squared_error`."""
    x, tau, noise, context, weights = noised
    output = backbone(diffusion.add_noise(x, tau, noise), tau, context=context)
    return squared_error(diffusion, output, x, noise, tau, weights, x0_weighting)


class ImageLoss(RecordableLoss):
    """`loss(step)` for the Loop: the image model's own loss.

    Every frame of a clip counts as an image with a tau of its own. That is the fine-tuning on video frames that comes
    before temporal training.

    Args:
        backbone: called as `backbone(x, timesteps, context=...)`.
        diffusion: the image model's.
        batch: StepContext -> Batch of this process.
        null_context: what replaces a dropped text, (l d).
        dropout: the probability that a text is dropped.
    """

    def __init__(self, backbone: nn.Module, diffusion: Diffusion, batch: Callable[..., Batch],
                 null_context: Tensor | None = None, dropout: float = 0.0):
        check_null_context(null_context, dropout)
        self.backbone, self.diffusion, self.batch = backbone, diffusion, batch
        self.null_context, self.dropout = null_context, dropout

    def draw(self, step) -> Noised:
        x, context, *_ = frames_as_images(self.batch(step))
        context = drop_context(context, self.null_context, self.dropout, step.generator)
        tau = self.diffusion.random_tau(len(x), step.generator, x.device)
        return Noised(x, tau, self.diffusion.random_noise(x, step.generator), context)

    def compute(self, inputs: Noised) -> dict:
        return {"loss": denoising_loss(self.backbone, self.diffusion, inputs)}
