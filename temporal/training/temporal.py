"""The loss of temporal layers on an image LDM (Video LDM, section 3.1), alone or jointly with images
(docs/papers.md#lavie-joint-training)."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..call import CallSettings, open_call
from ..conditioning import context_input, context_mask
from ..diffusion import Diffusion
from ..errors import VideoLDMError
from ..stack import TemporalStack
from .batch import Batch, as_clips, check_null_context, drop_context, per_frame
from .checkpointing import open_call_checkpointed
from .image import ImageLoss, Noised, denoising_loss
from .loss_inputs import RecordableLoss


def freeze(module: nn.Module) -> None:
    """Exclude every parameter of a module from training and put the module in eval mode."""
    module.requires_grad_(False)
    module.eval()


def draw_context_frames(positions, clips: Tensor, generator: torch.Generator) -> Tensor:
    """c_S `(b t) c+1 h w` of clean clips `b t c h w`: which frames are context frames is drawn for each clip.

    `positions` are the sets to choose from. In the paper (section 3.2) p_S is categorical over 0, 1 or 2 first frames.
    The paper gives no probabilities; here all sets are equally likely.
    """
    masks = torch.stack([context_mask(frames, clips.shape[1]) for frames in positions])
    chosen = torch.randint(0, len(masks), (len(clips),), generator=generator)
    return context_input(clips, masks[chosen].to(clips.device))


def check_trained(backbone: nn.Module, stack: TemporalStack, train_spatial: bool) -> None:
    """Refuse modules in which other parameters would learn than the temporal ones.

    With `train_spatial` the spatial ones have to learn too.
    """
    frozen = [name for name, p in stack.named_parameters() if not p.requires_grad]
    if frozen:
        raise VideoLDMError(f"The temporal layers are to be trained, but '{frozen[0]}' does not require a gradient.")
    wrong = [name for name, p in backbone.named_parameters() if p.requires_grad != train_spatial]
    if wrong:
        state = "does not require" if train_spatial else "requires"
        raise VideoLDMError(f"The spatial layers are to be {'trained' if train_spatial else 'frozen'}, but "
                            f"'{wrong[0]}' {state} a gradient.")
    if any(p.is_inference() for module in (backbone, stack) for p in module.parameters()):
        raise VideoLDMError("The model's weights were made in inference mode and cannot be part of training. Clone "
                            "them outside inference mode first.")


class NoisedClips(NamedTuple):
    """A batch of clips with what was drawn for it."""

    clips: Noised                           # all frames as one flat batch; a clip's tau and text are repeated for each
    frames: int                             # per clip
    context_frames: Tensor | None = None    # c_S `(b t) c+1 h w`, for layers with such an input
    fps: Tensor | None = None               # (b), for layers with such an input
    images: Noised | None = None
    further: Tensor | None = None           # further channels of the network's own input `(b t) k h w` (network.py)


class TemporalLoss(RecordableLoss):
    """`loss(step)` for the Loop; `modules` is what the Loop trains.

    All frames of a clip share one tau. Their noise is independent. Layers with an input for context frames get those of
    `draw_context_frames`. Layers with an input for the frame rate get that of the batch.

    Args:
        backbone: the image LDM. It is frozen here, unless `train_spatial`.
        stack: the temporal layers.
        diffusion: the image model's.
        clips: StepContext -> Batch of clips of this process.
        null_context, dropout: as in ImageLoss, drawn per clip.
        frames: cuts a flat batch of frames into clips.
        images: StepContext -> Batch of images, each with its own text. Temporal layers are bypassed for them, so they
            learn nothing from images.
        image_weight: how much the loss of images counts.
        train_spatial: train the backbone too, for interpolation models and joint training.
        checkpointing: less memory for one more forward pass.
        x0_weighting: for the error of clips, see `squared_error`.
    """

    def __init__(self, backbone: nn.Module, stack: TemporalStack, diffusion: Diffusion, clips: Callable[..., Batch],
                 null_context: Tensor | None = None, dropout: float = 0.0, frames: int | None = None,
                 images: Callable[..., Batch] | None = None, image_weight: float = 1.0, train_spatial: bool = False,
                 checkpointing: bool = False, x0_weighting: bool = False):
        check_null_context(null_context, dropout)
        if images is not None and not train_spatial:
            raise VideoLDMError("Images bypass the temporal layers, so they teach a model with frozen spatial layers "
                                "nothing. Train the spatial layers too, or leave the images out.")
        backbone_parameters = set(map(id, backbone.parameters()))
        if any(id(p) in backbone_parameters for p in stack.parameters()):
            raise VideoLDMError("The temporal layers are a part of the backbone; they must be a module of their own.")
        if not train_spatial:
            freeze(backbone)
        check_trained(backbone, stack, train_spatial)
        self.backbone, self.stack, self.diffusion, self.clips = backbone, stack, diffusion, clips
        self.null_context, self.dropout, self.frames = null_context, dropout, frames
        self.image_loss = images and ImageLoss(backbone, diffusion, images, null_context, dropout)
        self.image_weight, self.train_spatial, self.x0_weighting = image_weight, train_spatial, x0_weighting
        self.checkpointing, self.open_call = checkpointing, open_call_checkpointed if checkpointing else open_call

    @property
    def modules(self):
        return {"temporal": self.stack} | ({"spatial": self.backbone} if self.train_spatial else {})

    def to(self, device):
        """Move both modules to the device; the Loop calls it before the first step."""
        self.backbone.to(device)
        self.stack.to(device)
        check_trained(self.backbone, self.stack, self.train_spatial)

    def draw(self, step) -> NoisedClips:
        inputs = self.draw_clips(self.clips(step), step.generator)
        return inputs if self.image_loss is None else inputs._replace(images=self.image_loss.draw(step))

    def draw_clips(self, batch: Batch, generator: torch.Generator) -> NoisedClips:
        """Draw steps, noise, dropped texts and context frames for a batch of clips."""
        clips = as_clips(batch.latents, self.frames)
        count, frames = clips.shape[:2]
        if batch.context is not None and len(batch.context) != count:
            raise VideoLDMError(f"A batch of {count} clips came with {len(batch.context)} texts; each clip has one.")
        context = drop_context(batch.context, self.null_context, self.dropout, generator)
        tau = per_frame(self.diffusion.random_tau(count, generator, clips.device), frames)
        takes = self.stack.params.known_positions
        context_frames = draw_context_frames(takes, clips, generator) if takes is not None else None
        weights = None if batch.weights is None else batch.weights.flatten(0, 1)
        x = clips.flatten(0, 1)
        noised = Noised(x, tau, self.diffusion.random_noise(x, generator), per_frame(context, frames), weights)
        return NoisedClips(noised, frames, context_frames, batch.fps)

    def compute(self, inputs: NoisedClips) -> dict:
        video = self.video_loss(inputs)
        if inputs.images is None or self.image_loss is None:
            return {"loss": video}
        image = self.image_loss.compute(inputs.images)["loss"]
        return {"loss": video + self.image_weight * image, "video": video, "image": image}

    def video_loss(self, inputs: NoisedClips) -> Tensor:
        """The denoising loss of a batch of clips, with temporal layers."""
        with self.open_call(self.backbone, self.sets(inputs), context=inputs.clips.context):
            return denoising_loss(self.backbone, self.diffusion, inputs.clips, self.x0_weighting)

    def sets(self, inputs: NoisedClips) -> list[tuple[TemporalStack, CallSettings]]:
        """The temporal layers with the settings of this call."""
        return [(self.stack, CallSettings(frames=inputs.frames, known=inputs.context_frames, fps=inputs.fps))]
