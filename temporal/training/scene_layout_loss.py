"""The loss of a scene layout's network on a frozen image LDM."""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor, nn

from ..diffusion import Diffusion
from ..scene_layout import Layout, SceneLayout, drop_conditions
from .batch import check_null_context, drop_context
from .image import Noised, denoising_loss
from .loss_inputs import RecordableLoss
from .temporal import freeze


class Scenes(NamedTuple):
    """A batch of images."""

    latents: Tensor     # (n c h w)
    layout: Layout      # of n scenes
    context: Tensor     # a text for each, (n l d)


class LayoutLoss(RecordableLoss):
    """`loss(step)` for the Loop, which trains `scene` alone: the denoising loss of images with their layouts.

    Args:
        backbone: an image LDM, frozen here.
        scene: the network that is trained.
        call: `call(backbone, scene, x, tau, context, layout)` gives the backbone's output with the layout.
        diffusion: the image model's.
        scenes: StepContext -> Scenes.
        null_context: what replaces a dropped text, (l d).
        dropout: the probability that a label, the boxes, or everything is left out. The paper drops labels with 0.1.
        text_dropout: the probability that the text is dropped. The layout then has to do without it.
    """

    def __init__(self, backbone: nn.Module, scene: SceneLayout, call: Callable[..., Tensor], diffusion: Diffusion,
                 scenes: Callable[..., Scenes], null_context: Tensor, dropout: float = 0.1, text_dropout: float = 0.5):
        check_null_context(null_context, text_dropout)
        freeze(backbone)
        self.backbone, self.scene, self.call, self.diffusion, self.scenes = backbone, scene, call, diffusion, scenes
        self.null_context, self.dropout, self.text_dropout = null_context, dropout, text_dropout

    def to(self, device):
        self.backbone.to(device)
        self.scene.to(device)

    def draw(self, step) -> tuple[Noised, Layout]:
        x, layout, context = self.scenes(step)
        layout = drop_conditions(layout, self.dropout, step.generator)
        context = drop_context(context, self.null_context, self.text_dropout, step.generator)
        tau = self.diffusion.random_tau(len(x), step.generator, x.device)
        return Noised(x, tau, self.diffusion.random_noise(x, step.generator), context), layout

    def compute(self, inputs) -> dict:
        noised, layout = inputs

        def backbone(x, tau, context):
            return self.call(self.backbone, self.scene, x, tau, context, layout)
        return {"loss": denoising_loss(backbone, self.diffusion, noised)}
