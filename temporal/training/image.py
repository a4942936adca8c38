"""The loss of an image LDM: also of its spatial fine-tuning on the frames of videos (Video LDM, Table 6)."""

from collections.abc import Callable

from torch import Tensor, nn

from .batch import Batch, check_null_context, drop_context, frames_as_images
from .diffusion import Diffusion


def denoising_loss(backbone, diffusion, x, tau, context, generator, weights=None, of_x=False):
    """|| target - f(x_tau, tau, c) ||^2 over a flat batch x (n c h w) with its own noise in every item; weights
    (n 1 h w): how much each place counts, None for all alike; of_x: as Diffusion.loss has it."""
    noise = diffusion.random_noise(x, generator)
    output = backbone(diffusion.add_noise(x, tau, noise), tau, context=context)
    return diffusion.loss(output, x, noise, tau, weights, of_x)


class ImageLoss:
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

    def __call__(self, step):
        batch = frames_as_images(self.batch(step))
        context = drop_context(batch.context, self.null_context, self.dropout, step.generator)
        tau = self.diffusion.random_tau(len(batch.latents), step.generator, batch.latents.device)
        return {"loss": denoising_loss(self.backbone, self.diffusion, batch.latents, tau, context, step.generator)}
