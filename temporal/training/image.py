"""The loss of an image LDM: also of its spatial fine-tuning on the frames of videos (Video LDM, Table 6)."""

from collections.abc import Callable

from typing import NamedTuple

from torch import Tensor, nn

from .batch import Batch, check_null_context, drop_context, frames_as_images
from .diffusion import Diffusion
from .drawn import DrawnLoss


class Noised(NamedTuple):
    """A flat batch x (n c h w), its steps tau (n), its noise, a text for each (n l d) or None; weights (n 1 h w): how
    much each place counts, None for all alike."""

    x: Tensor
    tau: Tensor
    noise: Tensor
    context: Tensor | None = None
    weights: Tensor | None = None


def denoising_loss(backbone, diffusion, drawn: Noised, of_x=False):
    """|| target - f(x_tau, tau, c) ||^2 over a flat batch; of_x: as Diffusion.loss has it."""
    x, tau, noise, context, weights = drawn
    output = backbone(diffusion.add_noise(x, tau, noise), tau, context=context)
    return diffusion.loss(output, x, noise, tau, weights, of_x)


class ImageLoss(DrawnLoss):
    """`loss(step)` for the Loop. Batches of clips are taken apart into frames, each an image with a tau of its own:
    the fine-tuning on video frames that precedes temporal training, with the image model's own loss.

    backbone: called as `backbone(x, timesteps, context=...)`. batch: StepContext -> Batch of this process.
    null_context: (l d), what replaces a dropped text; dropout: how often.
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

    def compute(self, drawn: Noised) -> dict:
        return {"loss": denoising_loss(self.backbone, self.diffusion, drawn)}
