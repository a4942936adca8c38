"""Losses that a GPU can record.

Nothing is drawn, copied or waited for while they compute. A replay gives what the step gives.
"""

from dataclasses import replace

import comfy.model_management
import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from video_ldm.demo import autoencoder, data, layers, models, scene_layout_stage, upscaler
from video_ldm.nodes.host import models as host
from video_ldm.temporal.errors import VideoLDMError
from video_ldm.temporal.scene_layout import SceneLayout
from video_ldm.temporal.stack import TemporalStack
from video_ldm.temporal.training.clips import Clips
from video_ldm.temporal.training.cuda_graph import fill
from video_ldm.temporal.training.image import ImageLoss
from video_ldm.temporal.training.loop import Loop, LoopParams, StepContext
from video_ldm.temporal.training.loss_inputs import RecordableLoss, map_tensors, tensors_of
from video_ldm.temporal.training.temporal import TemporalLoss

CLIPS, TEXT = 3, models.TEXT_WIDTH
TEXTS = {"embeddings": torch.randn(CLIPS, 77, TEXT), "rows": torch.arange(CLIPS), "null": torch.zeros(77, TEXT)}


def latents(frames):
    return np.random.default_rng(0).standard_normal((CLIPS, frames, 4, 8, 16), dtype=np.float32)


def clips(frames, **more):
    return Clips(latents(frames), frames, 2, embeddings=TEXTS["embeddings"], **more)


def random_start(module):
    """Layers that begin as nothing would hide what they compute from."""
    with torch.no_grad():
        for weight in module.parameters():
            weight.add_(0.02 * torch.randn_like(weight))
    return module


def autoencoder_loss():
    frames = np.zeros((2, models.FRAMES, models.HEIGHT, models.WIDTH, 3), np.uint8)
    network = host.build_autoencoder(replace(models.AUTOENCODER, channels=32, channel_mult=(1, 1, 1, 1)))
    return autoencoder.AutoencoderLoss(network, frames, np.full((2, models.FRAMES, 3, 4), 0.2), 2), [network]


def image_loss():
    unet = host.build_unet(models.UNET)
    return ImageLoss(unet, models.diffusion(), clips(1), TEXTS["null"], 0.5), [unet]


def clip_loss(params, batch, **more):
    unet = host.build_unet(models.UNET)
    stack = random_start(TemporalStack(params(unet)))
    if more.get("train_spatial"):
        more["images"] = batch.images(2)
    return TemporalLoss(unet, stack, models.diffusion(), batch, TEXTS["null"], 0.5, **more), [unet, stack]


def layout_loss():
    unet, scene = host.build_unet(models.UNET), random_start(SceneLayout(scene_layout_stage.params(models.UNET)))
    return scene_layout_stage.loss(unet, scene, models.diffusion(), latents(2), TEXTS), [unet, scene]


def upscaler_loss(temporal):
    unet = host.build_unet(upscaler.UNET)
    stack = random_start(TemporalStack(upscaler.temporal_params(unet))) if temporal else None
    large = np.zeros((CLIPS, models.FRAMES, upscaler.HEIGHT, upscaler.WIDTH, 3), np.uint8)
    patches = upscaler.RenderedPatches(large, np.zeros((CLIPS, models.FRAMES, 3, 4)), models.FRAMES if temporal else 1,
                                       2, TEXTS["embeddings"], TEXTS["rows"].tolist())
    return upscaler.loss(unet, stack, patches, TEXTS), [unet] + ([stack] if temporal else [])


LOSSES = {
    "autoencoder": autoencoder_loss,
    "image": image_loss,
    "temporal": lambda: clip_loss(layers.temporal_params, clips(models.FRAMES)),
    "with images": lambda: clip_loss(layers.temporal_params, clips(models.FRAMES), train_spatial=True),
    "prediction": lambda: clip_loss(layers.prediction_params, clips(models.FRAMES)),
    "interpolation": lambda: clip_loss(layers.interpolation_params,
                                       clips(models.INTERPOLATED_FRAMES, fps=[data.rate_of(n) for n in range(CLIPS)])),
    "layout": layout_loss,
    "upscaler": lambda: upscaler_loss(False),
    "upscaler-temporal": lambda: upscaler_loss(True),
}


@pytest.fixture(params=LOSSES, scope="module")
def made(request):
    torch.manual_seed(0)
    return LOSSES[request.param]()


def step(number=0):
    return StepContext.make(number, 0)


def test_a_loss_is_computed_from_what_was_drawn_alone(made):
    loss, _ = made
    assert isinstance(loss, RecordableLoss)
    torch.manual_seed(1)
    whole, drawn = loss(step()), loss.draw(step())
    torch.manual_seed(2)
    parts = [loss.compute(drawn) for _ in range(2)]
    assert all(torch.equal(whole[name], part[name]) for part in parts for name in whole)


def test_the_tensors_of_one_step_can_be_filled_with_those_of_another(made):
    """Which is all that changes between two replays: nothing that tells steps apart may be kept elsewhere."""
    loss, _ = made
    kept, second = map_tensors(loss.draw(step(0)), torch.clone), loss.draw(step(1))
    first = loss.compute(kept)["loss"]
    fill(kept, second)
    assert torch.equal(loss.compute(kept)["loss"], loss(step(1))["loss"])
    assert not torch.equal(loss.compute(kept)["loss"], first)


class FromTheCPU(TorchDispatchMode):
    """Refuses tensors of the CPU in what a GPU computes, except for numbers. `meta` stands for the GPU."""

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        given = [t.device.type for t in torch.utils._pytree.tree_leaves((arguments, options)) if is_large(t)]
        made = [t.device.type for t in torch.utils._pytree.tree_leaves(result) if is_large(t)]
        assert "cpu" not in given + made, f"{function} has a tensor of the CPU"
        return result


def is_large(leaf):
    return isinstance(leaf, torch.Tensor) and leaf.ndim > 0


@pytest.mark.slow
def test_nothing_is_copied_from_the_cpu_or_waited_for_while_it_computes(made, monkeypatch):
    """On `meta` a value that the CPU asks for raises. On a GPU the CPU would wait for it. No recording can do so."""
    loss, networks = made
    monkeypatch.setattr(comfy.model_management, "get_free_memory",         # of `meta`
                        lambda device, both=False: (2 ** 30, 2 ** 30) if both else 2 ** 30)
    drawn = map_tensors(loss.draw(step()), lambda tensor: torch.empty_like(tensor, device="meta"))
    schedules = [getattr(loss, name) for name in ("diffusion", "augmentation") if hasattr(loss, name)]
    for network in networks:
        network.to("meta")
    for schedule in schedules:          # the first of the runs before a recording brings them over
        schedule.tables(torch.device("meta"))
    with FromTheCPU():
        loss.compute(drawn)["loss"].backward()
    trained = [weight for network in networks for weight in network.parameters() if weight.requires_grad]
    assert any(weight.grad is not None for weight in trained)


def test_batches_of_another_shape_are_refused():
    kept = image_loss()[0].draw(step())
    with pytest.raises(VideoLDMError, match="batches of one shape.*cuda_graph=False"):
        fill(kept, kept._replace(x=kept.x[:1]))


def test_what_cannot_be_recorded_is_refused_where_it_is_asked_for(tmp_path):
    network = torch.nn.Linear(2, 2)
    with pytest.raises(VideoLDMError, match="'lines' cannot be recorded.*cuda_graph=False"):
        Loop(LoopParams(1, 1e-3, cuda_graph=True), {"net": network}, lambda step: {}, tmp_path, "lines")
    loss, _ = clip_loss(layers.temporal_params, clips(models.FRAMES), checkpointing=True)
    with pytest.raises(VideoLDMError, match="checkpoints gradients"):
        Loop(LoopParams(1, 1e-3, cuda_graph=True), loss.modules, loss, tmp_path, "layers")


@pytest.mark.slow
def test_without_a_gpu_a_recording_that_is_asked_for_changes_nothing(tmp_path):
    plain, asked = (trained(tmp_path / str(recorded), "layout", recorded, device="cpu") for recorded in (False, True))
    assert torch.equal(plain, asked)


def trained(folder, name, recorded, stop=None, **settings):
    """What 6 steps change in the weights. With `stop` they are made in two runs."""
    def loop():
        torch.manual_seed(0)
        loss, networks = LOSSES[name]()
        modules = getattr(loss, "modules", {"net": networks[-1]})
        return Loop(LoopParams(6, 1e-3, warmup=0, precision="float32", cuda_graph=recorded, **settings), modules, loss,
                    folder, name)
    first = loop()
    start = together(first)
    if not first.run(on_step=lambda number, steps: number == stop):
        first = loop()
        first.run()
    return together(first) - start


def together(loop):
    return torch.cat([average.flatten().cpu() for average in loop.ema.average.values()])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", LOSSES)
def test_a_training_that_is_recorded_ends_with_the_weights_of_one_that_is_not(name, tmp_path):
    plain, recorded, resumed = (trained(tmp_path / str(number), name, record, stop)
                                for number, (record, stop) in enumerate([(False, None), (True, None), (True, 3)]))
    for other in (recorded, resumed):       # a GPU adds in any order; a stale input would be another way altogether
        assert (other - plain).norm() < 0.02 * plain.norm()


def test_tensors_are_found_in_everything_that_a_loss_may_draw():
    drawn = {"a": (torch.ones(1), None, 3), "b": scene_layout_stage.layout_of(scene_layout_stage.world.scene(0), [0.0])}
    twice = map_tensors(drawn, lambda tensor: tensor.clone())
    assert twice["a"][1:] == (None, 3) and len(tensors_of(twice)) == 1 + 5
    with pytest.raises(TypeError, match="drew a str"):
        map_tensors({"a": "text"}, lambda tensor: tensor)
