"""The loss of a whole video network, whose spatial weights and temporal layers are trained together.

    LaVie's base                    clips, with pictures beside them (docs/papers.md#lavie-joint-training)
    LaVie's interpolation           copies of key frames in further channels of the input
    Video LDM's interpolation       the known frames and a mask there, with noise on the known frames
    SEINE's kind                    the same in another order, without noise

The further channels are those of `InputFramesParams` (temporal/params.py). A network for them begins as one without
them: `widened` gives its first convolution columns of zeros.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from ..conditioning import context_mask, copies_input, masked_input
from ..diffusion import Diffusion
from ..errors import VideoLDMError
from ..params import COPIES, InputFramesParams
from ..rollout import PER_KEY
from ..stack import TemporalStack
from ..upscaler import augment_per_frame
from .batch import Batch, per_frame
from .image import ImageLoss, denoising_loss
from .temporal import NoisedClips, TemporalLoss

FIRST = "input_blocks.0.0.weight"       # of the first convolution, in LDM's names
MOST_NOISE = 250                        # on known frames, in steps of the network's own schedule (Video LDM, H.2)


def widened(weights: Mapping[str, Tensor], channels: int) -> dict[str, Tensor]:
    """The weights of a UNet for a larger number of input channels.

    The columns of the further channels are zero, so the network begins as the one that it is made from.
    Raises VideoLDMError where the weights are not a UNet's, or take more channels already.
    """
    first = weights.get(FIRST)
    if first is None:
        raise VideoLDMError(f"The weights to begin with have no '{FIRST}': they are not those of a UNet in LDM's "
                            "names.")
    if first.shape[1] > channels:
        raise VideoLDMError(f"The network to begin with takes {first.shape[1]} channels, and the one to train takes "
                            f"{channels}. Begin with a network that takes no more.")
    wide = first.new_zeros(first.shape[0], channels, *first.shape[2:])
    wide[:, :first.shape[1]] = first
    return {**weights, FIRST: wide}


class NetworkLoss(TemporalLoss):
    """`loss(step)` for the Loop; `modules` is what the Loop trains: both parts of the network.

    Pictures go past the temporal layers. In a network with an input for known frames they know none.

    Args:
        backbone: the UNet. Its input has the channels of `stack.params.input_frames` behind the latents.
        stack: the temporal layers.
        diffusion: the network's.
        clips: StepContext -> Batch of clips of this process.
        null_context, dropout, frames, images, image_weight, checkpointing, x0_weighting: as in TemporalLoss.
        most_noise: known frames get noise of 0 to so many steps. 0: none. Copies of key frames never get any.
        grey: the encoding of mid-grey `c h w`, for networks with this filler.
    """

    def __init__(self, backbone: nn.Module, stack: TemporalStack, diffusion: Diffusion, clips: Callable[..., Batch],
                 null_context: Tensor | None = None, dropout: float = 0.0, frames: int | None = None,
                 images: Callable[..., Batch] | None = None, image_weight: float = 1.0, checkpointing: bool = False,
                 x0_weighting: bool = False, most_noise: int = 0, grey: Tensor | None = None):
        super().__init__(backbone, stack, diffusion, clips, null_context, dropout, frames, images, image_weight,
                         train_spatial=True, checkpointing=checkpointing, x0_weighting=x0_weighting)
        self.takes, self.most_noise, self.grey = stack.params.input_frames, most_noise, grey
        if not 0 <= most_noise < diffusion.steps:
            raise VideoLDMError(f"Known frames get noise of 0 to {diffusion.steps - 1} steps, not {most_noise}.")
        if self.takes is not None:
            check_input(backbone, self.takes, images is not None)
        if images is not None:
            self.image_loss = ImageLoss(self.run_on_images, diffusion, images, null_context, dropout)

    def to(self, device: torch.device) -> None:
        super().to(device)
        if self.grey is not None:       # here, because a recorded step must not copy it
            self.grey = self.grey.to(device)

    def draw_clips(self, batch: Batch, generator: torch.Generator) -> NoisedClips:
        inputs = super().draw_clips(batch, generator)
        if self.takes is None:
            return inputs
        clips = inputs.clips.x.unflatten(0, (-1, inputs.frames))
        return inputs._replace(further=self.draw_further(self.takes, clips, generator))

    def draw_further(self, takes: InputFramesParams, clips: Tensor, generator: torch.Generator) -> Tensor:
        """The further channels `(b t) c h w` of clean clips `b t c h w`. Which frames are known is drawn for each."""
        count, frames = clips.shape[:2]
        if takes.form == COPIES:
            if frames % PER_KEY != 1:
                raise VideoLDMError(f"Clips of {frames} frames do not begin and end with a key frame, of which every "
                                    f"{PER_KEY}th frame is one. Train on clips of {PER_KEY} n + 1 frames, as 5 or 17.")
            return copies_input(clips[:, ::PER_KEY], range(frames))
        masks = torch.stack([context_mask(known, frames) for known in takes.positions or ()])
        chosen = torch.randint(0, len(masks), (count,), generator=generator)
        flat = clips.flatten(0, 1)
        if self.most_noise:
            level = torch.randint(0, self.most_noise + 1, (count,), generator=generator)
            noise = self.diffusion.random_noise(flat, generator)
            flat = augment_per_frame(flat, per_frame(level.to(flat.device), frames), noise, self.diffusion)
        return masked_input(takes, flat.unflatten(0, (count, frames)), masks[chosen].to(flat.device), self.grey)

    def run_on_images(self, x: Tensor, timesteps: Tensor, context: Tensor | None = None) -> Tensor:
        """The network without temporal layers on pictures (n c h w), which know no frames."""
        if self.takes is not None:
            nothing = masked_input(self.takes, x[:, None], x.new_zeros(len(x), 1), self.grey)
            x = torch.cat([x, nothing], dim=1)
        return self.backbone(x, timesteps, context=context)

    def video_loss(self, inputs: NoisedClips) -> Tensor:
        """The denoising loss of a batch of clips, with temporal layers and known frames."""
        def run(x: Tensor, timesteps: Tensor, context: Tensor | None = None) -> Tensor:
            if inputs.further is not None:
                x = torch.cat([x, inputs.further.to(x)], dim=1)
            return self.backbone(x, timesteps, context=context)
        with self.open_call(self.backbone, self.sets(inputs), context=inputs.clips.context):
            return denoising_loss(run, self.diffusion, inputs.clips, self.x0_weighting)


def check_input(backbone: nn.Module, takes: InputFramesParams, images: bool) -> None:
    """Refuse a network whose input is not made for known frames of this form, and pictures that cannot be given."""
    channels, due = backbone.input_blocks[0][0].weight.shape[1], takes.latent_channels + takes.channels
    if channels != due:
        raise VideoLDMError(f"The network takes {channels} input channels. Latents of {takes.latent_channels} channels "
                            f"with known frames are {due}: make the network for {due}, and give it weights by "
                            "'widened'.")
    if takes.form == COPIES and images:
        raise VideoLDMError("Every frame of this network has the copy of a key frame, and a picture has none. Train "
                            "it on clips alone.")
    if takes.form != COPIES and not takes.positions:
        raise VideoLDMError("Training draws the known frames from the network's sets of positions, and its params "
                            "name none. State them, as in ((0,), (0, -1)).")
