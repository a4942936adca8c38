"""The loss of a scene layout's conditioner on a frozen image LDM."""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor, nn

from ..diffusion import Diffusion
from ..layout import Layout, SceneLayout, drop
from .batch import check_null_context, drop_context
from .image import Noised, denoising_loss
from .loss_inputs import RecordableLoss
from .temporal import freeze


class Scenes(NamedTuple):
    """Images n c h w with a layout and a text n l d each."""

    latents: Tensor
    layout: Layout
    context: Tensor


class LayoutLoss(RecordableLoss):
    """`loss(step)` for the Loop, which trains `scene` alone: the denoising loss of images, told their layout.

    backbone: an image LDM, frozen here. call: `call(backbone, scene, x, tau, context, layout)`, the network's output
    with the layout. scenes: StepContext -> Scenes. dropout: how often a label, the boxes, or everything is left out
    (the paper drops its labels with 0.1). text_dropout: how often the text is replaced by the null context (l d), so
    that layouts speak for themselves.
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
        layout = drop(layout, self.dropout, step.generator)
        context = drop_context(context, self.null_context, self.text_dropout, step.generator)
        tau = self.diffusion.random_tau(len(x), step.generator, x.device)
        return Noised(x, tau, self.diffusion.random_noise(x, step.generator), context), layout

    def compute(self, drawn) -> dict:
        noised, layout = drawn

        def backbone(x, tau, context):
            return self.call(self.backbone, self.scene, x, tau, context, layout)
        return {"loss": denoising_loss(backbone, self.diffusion, noised)}
