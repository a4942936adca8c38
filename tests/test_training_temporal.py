"""Training temporal layers on an image model: who learns from what, and gradient checkpointing through hooks."""

import threading
from contextlib import nullcontext

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from video_ldm.temporal.call import CallSettings, open_call
from video_ldm.temporal.conditioning import add_context_input
from video_ldm.temporal.diffusion import Diffusion
from video_ldm.temporal.errors import VideoLDMError
from video_ldm.temporal.layers import MotionParams
from video_ldm.temporal.params import BOTH_ENDS, FIRST_FRAMES, StackParams
from video_ldm.temporal.slots import unet_sites
from video_ldm.temporal.spatial_changes import POOLED_NORMS
from video_ldm.temporal.stack import TemporalStack
from video_ldm.temporal.training.batch import Batch
from video_ldm.temporal.training.checkpointing import open_call_checkpointed
from video_ldm.temporal.training.clips import Clips
from video_ldm.temporal.training.image import ImageLoss
from video_ldm.temporal.training.loop import Loop, LoopParams, StepContext
from video_ldm.temporal.training.temporal import TemporalLoss
from video_ldm.tests.small import batch, randomise, small_stack, small_unet
from video_ldm.tests.training_worker import FRAMES, TEXT, temporal_loss, tiny_stack, tiny_unet, tiny_videos

DIFFUSION = Diffusion(0.0015, 0.0195, prediction="v")


def step(number=0):
    return StepContext.make(number, 0)


def tiny_images(count=3, seed=4):
    generator = torch.Generator().manual_seed(seed)
    images = Batch(torch.randn(count, 4, 6, 8, generator=generator), torch.randn(count, 3, TEXT, generator=generator))
    return lambda step: images


def gradients(module):
    return {name: None if p.grad is None else p.grad.clone() for name, p in module.named_parameters()}


# Who learns

def test_gradients_go_to_the_temporal_parameters_and_to_every_one_of_them():
    """docs/papers.md#v8, on ComfyUI's own UNet."""
    unet = small_unet()
    stack = small_stack(unet, 4)
    texts = torch.randn(2, 7, 768, generator=torch.Generator().manual_seed(0))
    clips = Clips(torch.randn(2, 4, 4, 8, 8, generator=torch.Generator().manual_seed(1)), 4, 2, embeddings=texts)
    loss = TemporalLoss(unet, stack, DIFFUSION, clips)
    assert loss.modules == {"temporal": stack} and not any(p.requires_grad for p in unet.parameters())
    loss(step())["loss"].backward()
    assert all(p.grad is None for p in unet.parameters())
    assert not [name for name, gradient in gradients(stack).items() if gradient is None or not gradient.abs().max() > 0]


def test_the_loss_is_the_denoising_loss_with_one_tau_per_clip_and_noise_per_frame():
    loss = temporal_loss(batch=2)
    seen = {}

    class Recorder(torch.nn.Module):
        def forward(self, x, timesteps, context=None):
            seen.update(x=x, tau=timesteps, context=context)
            return torch.zeros_like(x)
    recorder = Recorder()
    loss.backbone, loss.open_call = recorder, lambda *args, **kwargs: nullcontext()
    x = torch.randn(2, FRAMES, 4, 64, 64)
    drawn = loss.draw_clips(Batch(x, torch.randn(2, 3, TEXT)), torch.Generator().manual_seed(0))
    value = loss.compute(drawn)["loss"]
    tau = seen["tau"].reshape(2, FRAMES)
    assert torch.all(tau == tau[:, :1]) and tau[0, 0] != tau[1, 0]
    context = seen["context"].reshape(2, FRAMES, 3, TEXT)
    assert torch.equal(context, context[:, :1].expand_as(context))
    alpha, sigma = (table[seen["tau"]].float()[:, None, None, None] for table in (DIFFUSION.alpha, DIFFUSION.sigma))
    noise = (seen["x"] - alpha * x.flatten(0, 1)) / sigma
    assert (torch.corrcoef(noise.flatten(1)) - torch.eye(2 * FRAMES)).abs().max() < 0.06
    assert value.item() == pytest.approx((alpha * noise - sigma * x.flatten(0, 1)).square().mean().item(), rel=1e-4)


def test_image_frames_bypass_the_temporal_layers_and_give_them_no_gradient():
    """docs/papers.md#l9: the image loss is that of the image model alone."""
    loss = temporal_loss(2, images=tiny_images(), train_spatial=True)
    image = loss.image_loss(step())["loss"]
    image.backward()
    assert all(gradient is None for gradient in gradients(loss.stack).values())
    assert all(gradient is not None for gradient in gradients(loss.backbone).values())
    plain = ImageLoss(loss.backbone, loss.diffusion, tiny_images())(step())["loss"]
    assert torch.equal(image, plain)
    with open_call(loss.backbone, [(loss.stack, CallSettings(frames=1, strength=0.0))]):
        assert torch.equal(ImageLoss(loss.backbone, loss.diffusion, tiny_images())(step())["loss"], plain)


def test_a_joint_batch_adds_the_weighted_image_loss_and_trains_everything():
    loss = temporal_loss(2, images=tiny_images(), image_weight=0.25, train_spatial=True)
    assert set(loss.modules) == {"temporal", "spatial"}
    figures = loss(step())
    assert figures["loss"].item() == pytest.approx((figures["video"] + 0.25 * figures["image"]).item())
    figures["loss"].backward()
    joint = gradients(loss.stack)
    alone = temporal_loss(2)
    alone(step())["loss"].backward()
    for name, gradient in gradients(alone.stack).items():       # exactly the video loss's gradient
        assert torch.equal(joint[name], gradient)
    assert all(p.grad is not None for p in loss.backbone.parameters())


def test_training_lowers_the_loss_and_leaves_the_image_model_as_it_was(tmp_path):
    unet = tiny_unet()
    before = {name: p.clone() for name, p in unet.named_parameters()}
    videos, texts = tiny_videos(1, FRAMES)
    loss = TemporalLoss(unet, tiny_stack(unet), DIFFUSION, Clips(videos, FRAMES, 4, embeddings=texts[:1]),
                        null_context=torch.zeros(3, TEXT), dropout=0.1)
    x, context = torch.randn(FRAMES, 4, 6, 8), texts[:1].expand(FRAMES, -1, -1)
    tau = torch.full((FRAMES,), 500)
    image_model = unet(x, tau, context=context)

    def validation():
        with torch.no_grad():
            return sum(loss(step(1000 + n))["loss"].item() for n in range(8)) / 8
    first = validation()
    Loop(LoopParams(60, 3e-3, warmup=5, device="cpu", save_every=60), loss.modules, loss, tmp_path, "tiny").run()
    assert validation() < 0.9 * first
    assert all(torch.equal(p, before[name]) for name, p in unet.named_parameters())
    with open_call(unet, [(loss.stack, CallSettings(FRAMES, strength=0.0))], context):
        assert torch.equal(unet(x, tau, context=context), image_model)
    with open_call(unet, [(loss.stack, CallSettings(FRAMES))], context):
        assert not torch.equal(unet(x, tau, context=context), image_model)


def test_spatial_fine_tuning_takes_every_frame_as_an_image_with_its_own_tau():
    unet, (videos, texts) = tiny_unet(), tiny_videos()
    clips = Clips(videos, FRAMES, 2, embeddings=texts)
    from_clips = ImageLoss(unet, DIFFUSION, clips)(step())["loss"]

    def as_images(step):
        latents, context = clips(step)[:2]
        return Batch(latents.flatten(0, 1), context.repeat_interleave(FRAMES, 0))
    assert torch.equal(from_clips, ImageLoss(unet, DIFFUSION, as_images)(step())["loss"])
    from_clips.backward()
    assert all(p.grad is not None for p in unet.parameters())


@pytest.mark.parametrize("make, sentence", [
    (lambda: temporal_loss(2, images=tiny_images()), "teach a model with frozen spatial layers nothing"),
    (lambda: temporal_loss(2, dropout=0.1), "needs the null context"),
    (lambda: temporal_loss(2, null_context=torch.zeros(3, TEXT), dropout=1.5), "a probability from 0 to 1"),
    (lambda: temporal_loss(2, frames=3)(step()), "have 4 frames, and the loss was set to 3"),
])
def test_settings_that_cannot_train_are_refused(make, sentence):
    with pytest.raises(VideoLDMError, match=sentence):
        make()


def test_a_set_up_in_which_something_else_would_learn_is_refused():
    unet = tiny_unet()
    stack = tiny_stack(unet)
    next(stack.parameters()).requires_grad_(False)
    with pytest.raises(VideoLDMError, match="'layers.*' does not require a gradient"):
        TemporalLoss(unet, stack, DIFFUSION, None)
    loss = temporal_loss(2)
    loss.backbone.out[0].weight.requires_grad_(True)
    with pytest.raises(VideoLDMError, match="to be frozen, but 'out.0.weight' requires a gradient"):
        loss.to("cpu")
    unet.inside = tiny_stack(unet)
    with pytest.raises(VideoLDMError, match="a part of the backbone"):
        TemporalLoss(unet, unet.inside, DIFFUSION, None)
    with torch.inference_mode():
        made_in_a_node = tiny_unet()
    with pytest.raises(VideoLDMError, match="Clone them outside inference mode"):
        TemporalLoss(made_in_a_node, tiny_stack(unet), DIFFUSION, None)


def test_a_text_per_frame_where_one_per_clip_belongs_is_refused():
    loss = temporal_loss(2)
    with pytest.raises(VideoLDMError, match="2 clips came with 8 texts"):
        loss.draw_clips(Batch(torch.zeros(2, FRAMES, 4, 6, 8), torch.zeros(8, 3, TEXT)), None)


# Known frames and the frame rate

def told_loss(positions, fps_width=0):
    """A loss whose layers take known frames, and hear a frame rate where fps_width is not 0."""
    unet = small_unet(5) if fps_width else tiny_unet()
    plain = small_stack(unet, FRAMES).params if fps_width else tiny_stack(unet).params
    stack = randomise(TemporalStack(add_context_input(plain, 2 if fps_width else 1, positions, channels=8,
                                                 fps_width=fps_width)), 6)
    return TemporalLoss(unet, stack, DIFFUSION, None)


def clips_with_text(count, text=TEXT, fps=None):
    generator = torch.Generator().manual_seed(3)
    latents = torch.randn(count, FRAMES, 4, 6, 8, generator=generator)
    return Batch(latents, torch.randn(count, 3, text, generator=generator), fps)


def test_prediction_layers_learn_from_no_one_and_two_first_frames_equally_often():
    batch = clips_with_text(900)
    known = told_loss(FIRST_FRAMES).draw_clips(batch, step().generator).context_frames.unflatten(0, (900, FRAMES))
    mask = known[:, :, 4]
    assert torch.equal(mask, mask[:, :, :1, :1].expand_as(mask))
    sets = ["".join(map(str, row)) for row in mask[:, :, 0, 0].int().tolist()]
    assert {row: abs(sets.count(row) - 300) < 75 for row in set(sets)} == dict.fromkeys(("0000", "1000", "1100"), True)
    assert torch.equal(known[:, :, :4], batch.latents * mask[:, :, None])       # of the clean clips


def test_interpolation_layers_learn_from_the_two_ends_of_every_clip():
    batch = clips_with_text(20)
    known = told_loss(BOTH_ENDS).draw_clips(batch, step().generator).context_frames.unflatten(0, (20, FRAMES))
    assert known[:, :, 4].unique(dim=0).tolist() == [[[[float(n in (0, 3))] * 8] * 6 for n in range(FRAMES)]]
    assert torch.equal(known[:, [0, 3], :4], batch.latents[:, [0, 3]])


def test_the_known_frames_that_were_drawn_reach_the_layers():
    """The loss is that of a call which is given them, and another than without."""
    loss = told_loss(BOTH_ENDS)
    drawn = loss.draw_clips(clips_with_text(2), step().generator)
    assert torch.equal(loss.compute(drawn)["loss"], by_open_call(loss, drawn, known=drawn.context_frames))
    assert loss.compute(drawn)["loss"].item() != pytest.approx(by_open_call(loss, drawn).item(), rel=1e-4)


def test_the_frame_rate_of_each_clip_reaches_the_layers():
    loss, rates = told_loss(BOTH_ENDS, fps_width=768), torch.tensor([2.0, 30.0])
    drawn = loss.draw_clips(clips_with_text(2, 768, rates), step().generator)
    assert torch.equal(loss.compute(drawn)["loss"], by_open_call(loss, drawn, known=drawn.context_frames, fps=rates))
    swapped = by_open_call(loss, drawn, known=drawn.context_frames, fps=rates.flip(0))
    assert loss.compute(drawn)["loss"].item() != pytest.approx(swapped.item(), rel=1e-6)


def by_open_call(loss, drawn, **told):
    """The denoising loss of what was drawn, in a call of the network that is told so."""
    x, tau, noise, context = drawn.clips[:4]
    with open_call(loss.backbone, [(loss.stack, CallSettings(FRAMES, **told))], context):
        output = loss.backbone(DIFFUSION.add_noise(x, tau, noise), tau, context=context)
    return (output - DIFFUSION.target(x, noise, tau)).square().mean()


# Gradient checkpointing

def motion_stack(unet):
    """AnimateDiff-like layers after each transformer. Spatial norms pooled over frames put hooks inside the blocks."""
    bricks = tuple((site, MotionParams(channels, 8, 1, 2, 0, True))
                   for site, (_, channels) in unet_sites(unet).items() if site.slot == "post_attn")
    return randomise(TemporalStack(StackParams("AnimateDiff", bricks, 16, 32, (POOLED_NORMS,))), 3)


@pytest.fixture(scope="module")
def unet():
    return small_unet()


def in_another_thread(work):
    """As a GPU's backward pass runs: in a thread that has never heard of the call."""
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()


def run_backward(opened, unet, sets, inside=None, after=lambda work: work(), twice=False):
    x, timesteps, context = batch(2, 4)
    for _, module in [("unet", unet), *((str(i), stack) for i, (stack, _) in enumerate(sets))]:
        module.zero_grad(set_to_none=True)
    with opened(unet, sets, context):
        output = unet(x, timesteps, context=context)
        loss = output.square().mean()
        if inside:
            inside(loss.backward)
    if not inside:
        after(lambda: loss.backward(retain_graph=twice))
    if twice:
        loss.backward()
    return output, [gradients(module) for module in (unet, *(stack for stack, _ in sets))]


def assert_same_gradients(one, other):
    assert torch.equal(one[0], other[0])
    for theirs, ours in zip(one[1], other[1]):
        different = [name for name in theirs if (theirs[name] is None) != (ours[name] is None)
                     or theirs[name] is not None and not torch.equal(theirs[name], ours[name])]
        assert not different


@pytest.mark.parametrize("kind, frozen", [("video_ldm", True), ("animatediff", True), ("both", False)])
def test_checkpointing_gives_the_same_gradients_bit_for_bit(unet, kind, frozen):
    unet.requires_grad_(not frozen)
    stacks = {"video_ldm": [small_stack(unet, 4)], "animatediff": [motion_stack(unet)],
              "both": [small_stack(unet, 4), motion_stack(unet)]}[kind]
    sets = [(stack, CallSettings(frames=4, strength=0.8)) for stack in stacks]
    plain = run_backward(open_call, unet, sets)
    assert_same_gradients(plain, run_backward(open_call_checkpointed, unet, sets))
    assert any(gradient is not None and gradient.abs().max() > 0 for gradient in plain[1][1].values())


@pytest.mark.slow
def test_the_backward_pass_may_run_inside_the_call_in_another_thread_or_twice(unet):
    unet.requires_grad_(False)
    sets = [(small_stack(unet, 4), CallSettings(frames=4))]
    plain = run_backward(open_call, unet, sets)
    for where in (dict(inside=lambda work: work()), dict(inside=in_another_thread), dict(after=in_another_thread)):
        assert_same_gradients(plain, run_backward(open_call_checkpointed, unet, sets, **where))
    doubled = run_backward(open_call, unet, sets, twice=True)
    assert_same_gradients(doubled, run_backward(open_call_checkpointed, unet, sets, twice=True))


def test_checkpointing_leaves_modules_and_hooks_as_they_were(unet):
    sets = [(small_stack(unet, 4), CallSettings(frames=4))]
    with pytest.raises(RuntimeError, match="interrupted"):
        with open_call_checkpointed(unet, sets):
            raise RuntimeError("interrupted")
    run_backward(open_call_checkpointed, unet, sets)
    for module in (*unet.modules(), *sets[0][0].modules()):
        assert "forward" not in vars(module) and not module._forward_hooks and not module._forward_pre_hooks


class Watch(TorchDispatchMode):
    """Remembers the memory of every tensor made. `alive` adds up what still exists."""

    def __init__(self):
        super().__init__()
        self.made = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.made[StorageWeakRef(storage)] = storage.nbytes()
        return result

    def alive(self):
        return sum(size for storage, size in self.made.items() if not storage.expired())


def test_checkpointing_keeps_far_fewer_activations_for_the_backward_pass(unet):
    unet.requires_grad_(True)
    sets = [(small_stack(unet, 4), CallSettings(frames=4))]
    x, timesteps, context = batch(2, 4, height=16, width=16)

    def kept(opened):
        with Watch() as watch, opened(unet, sets, context):
            output = unet(x, timesteps, context=context)
        assert output.grad_fn is not None
        return watch.alive()
    assert kept(open_call_checkpointed) < 0.3 * kept(open_call)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_trains_in_bfloat16_with_checkpointing_and_resumes(tmp_path):
    def make():
        loss = temporal_loss(2, checkpointing=True)
        return Loop(LoopParams(6, 1e-3, warmup=0, save_every=3), loss.modules, loss, tmp_path, "gpu")
    first = make()
    assert first.autocast and first.device.type == "cuda" and not first.run(on_step=lambda step, steps: step == 3)
    second = make()
    assert second.step == 3 and second.run()
    assert all(average.isfinite().all() for average in second.ema.average.values())


def test_a_loss_with_checkpointing_is_the_same_loss():
    plain, saving = temporal_loss(2), temporal_loss(2, checkpointing=True)
    for loss in (plain, saving):
        loss(step())["loss"].backward()
    ours, theirs = gradients(saving.stack), gradients(plain.stack)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
