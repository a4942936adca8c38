"""The losses of a video upscaler (Video LDM, section 3.4, Appendix H.1): first the image upscaler, then its layers.

    || target - g(x_tau; c_gamma, gamma, tau) ||^2        c_gamma = alpha_gamma x_low + sigma_gamma eps

Training is on patches of clips; the weights then run on whole frames. The small frames are noised by gamma ~ U{0..250}
steps of the upscaler's own schedule. All frames of a clip have one level. Their noise is new in each frame, or one
noise for all of them, as the layers' params say.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..call import CallSettings, open_call
from ..diffusion import Diffusion
from ..errors import VideoLDMError
from ..stack import TemporalStack
from ..upscaler import TRAINED_LEVEL, augment_per_frame, repeat_small_pixels, unscale_augmented
from .batch import check_null_context, drop_context, per_frame
from .checkpointing import open_call_checkpointed
from .image import squared_error
from .loss_inputs import RecordableLoss
from .temporal import check_trained, freeze


class Patches(NamedTuple):
    """A batch of clips."""

    x: Tensor                           # the large frames, `b t c h w`: latents, or folded pixels
    x_low: Tensor                       # the small frames in -1..1, `b t 3 h w`
    context: Tensor | None = None       # a text per clip, (b l d)
    weights: Tensor | None = None       # how much each pixel counts, (b t 1 h w); None: all alike


class NoisedPatches(NamedTuple):
    """Patches with what was drawn for them."""

    patches: Patches
    tau: Tensor                     # the step of each frame, (b t)
    level: Tensor                   # gamma of each frame, (b t)
    noise: Tensor                   # of x, `(b t) c h w`
    noise_low: Tensor               # of x_low, `(b t) 3 h w`
    text: Tensor | None = None      # `(b t) l d`


class UpscalerLoss(RecordableLoss):
    """`loss(step)` for the Loop. `modules` is what the Loop trains.

    With `stack` that is the temporal layers, on the frozen upscaler. Without it, it is the upscaler itself, for which
    every frame is a picture.

    Layers whose params say shared_noise learn with one noise for all frames of a clip: one for x_tau, another for
    c_gamma. What stands still then flickers less, because frames are alike before the layers do anything. It is the
    extreme case of the mixed noise of Ge et al. 2023 ("Preserve Your Own Correlation").

    Args:
        backbone: called as `backbone(x, timesteps, context=..., y=levels)` with x_tau and c_gamma on x's channels.
        stack: the temporal layers, or None.
        diffusion: the upscaler's.
        augmentation: the schedule of the small frames' noise.
        patches: StepContext -> Patches of this process.
        most_noise: the highest level gamma.
        null_context, dropout: as in ImageLoss, drawn per clip.
        checkpointing: less memory for one more forward pass.
        x0_weighting: see `squared_error`. A small network then need not predict noise exactly where x is nearly clean.
        details: what the details of x are multiplied by, where x is folded pixels (temporal/upscaler.py).
    """

    def __init__(self, backbone: nn.Module, stack: TemporalStack | None, diffusion: Diffusion, augmentation: Diffusion,
                 patches: Callable[..., Patches], most_noise: int = TRAINED_LEVEL, null_context: Tensor | None = None,
                 dropout: float = 0.0, checkpointing: bool = False, x0_weighting: bool = False,
                 details: float | None = None):
        check_null_context(null_context, dropout)
        if not 0 <= most_noise < augmentation.steps:
            raise VideoLDMError(f"The small frames are noised by 0 to {augmentation.steps - 1} steps, "
                                f"not {most_noise}.")
        if stack is not None:
            freeze(backbone)
            check_trained(backbone, stack, train_spatial=False)
        self.backbone, self.stack, self.diffusion, self.augmentation = backbone, stack, diffusion, augmentation
        self.patches, self.most_noise, self.x0_weighting, self.details = patches, most_noise, x0_weighting, details
        self.null_context, self.dropout = null_context, dropout
        self.checkpointing, self.open_call = checkpointing, open_call_checkpointed if checkpointing else open_call

    @property
    def modules(self):
        return {"unet": self.backbone} if self.stack is None else {"temporal": self.stack}

    def to(self, device):
        for module in filter(None, (self.backbone, self.stack)):
            module.to(device)

    def draw(self, step) -> NoisedPatches:
        patches, generator = self.patches(step), step.generator
        clips, frames = check_patches(patches)
        independent = 1 if self.stack is not None else frames       # pictures that draw a tau and a level of their own
        tau = self.diffusion.random_tau(clips * independent, generator, patches.x.device)
        level = torch.randint(0, self.most_noise + 1, (clips * independent,), generator=generator)
        tau, level = (per_frame(one.to(tau.device), frames // independent) for one in (tau, level))
        noise_low, noise = (self.random_noise(like.flatten(0, 1), frames, generator)
                            for like in (patches.x_low, patches.x))
        text = per_frame(drop_context(patches.context, self.null_context, self.dropout, generator), frames)
        return NoisedPatches(patches, tau, level, noise, noise_low, text)

    def compute(self, inputs: NoisedPatches) -> dict:
        patches, tau, level, noise, noise_low, text = inputs
        x, x_low = patches.x.flatten(0, 1), patches.x_low.flatten(0, 1)
        c_low = augment_per_frame(x_low, level, noise_low, self.augmentation)
        if self.details is not None:
            x = (x - repeat_small_pixels(unscale_augmented(c_low, level, self.augmentation))) * self.details
        x_in = torch.cat([self.diffusion.add_noise(x, tau, noise), c_low.to(x)], dim=1)
        with self.open_call(self.backbone, self.sets(c_low, patches.x.shape[1]), context=text):
            output = self.backbone(x_in, tau, context=text, y=level)
        weights = None if patches.weights is None else patches.weights.flatten(0, 1)
        return {"loss": squared_error(self.diffusion, output, x, noise, tau, weights, self.x0_weighting)}

    def random_noise(self, like: Tensor, frames: int, generator) -> Tensor:
        """Noise like `(b t) c h w`: new in every frame, or one field per clip."""
        if self.stack is None or not self.stack.params.shared_noise:
            return self.diffusion.random_noise(like, generator)
        return per_frame(self.diffusion.random_noise(like[::frames], generator), frames)

    def sets(self, c_low: Tensor, frames: int) -> list:
        """The temporal layers with the settings of this call; none for pictures."""
        if self.stack is None:
            return []
        small_frames = c_low if self.stack.params.takes_small_frames else None
        return [(self.stack, CallSettings(frames=frames, known=small_frames))]


def check_patches(patches: Patches) -> tuple[int, int]:
    """Clips and frames of a batch, refused where its parts do not agree."""
    clips, frames = patches.x.shape[:2]
    if patches.x.ndim != 5 or patches.x_low.shape != (clips, frames, 3, *patches.x.shape[3:]):
        raise VideoLDMError(f"Patches are 'b t c h w' with small frames 'b t 3 h w'; these are "
                            f"{tuple(patches.x.shape)} with {tuple(patches.x_low.shape)}.")
    if patches.context is not None and len(patches.context) != clips:
        raise VideoLDMError(f"A batch of {clips} clips came with {len(patches.context)} texts; each clip has one.")
    return clips, frames
