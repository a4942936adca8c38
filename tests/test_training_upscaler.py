"""Training of a video upscaler: what its networks are given, and who learns from it."""

import pytest
import torch

from video_ldm.temporal.diffusion import Diffusion
from video_ldm.temporal.errors import VideoLDMError
from video_ldm.temporal.training.loop import Loop, LoopParams, StepContext
from video_ldm.temporal.training.upscaler import Patches, UpscalerLoss
from video_ldm.temporal.upscaler import (
    PIXEL_CHANNELS,
    augment_per_frame,
    fold_pixels,
    repeat_small_pixels,
    unfold_pixels,
    unscale_augmented,
)
from video_ldm.tests import pixel_help
from video_ldm.tests.small import relative_error

CLIPS, FRAMES = 3, 4
V, AUGMENTATION = Diffusion(0.0001, 0.02, prediction="v"), Diffusion(0.0001, 0.02)


def patches(seed=0):
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.rand(CLIPS, FRAMES, 3, 32, 32, generator=generator) * 2 - 1
    x_low = torch.nn.functional.avg_pool2d(pixels.flatten(0, 1), 4).unflatten(0, (CLIPS, FRAMES))
    return Patches(fold_pixels(pixels), x_low, torch.randn(CLIPS, 5, pixel_help.TEXT, generator=generator))


def step(number=0):
    return StepContext.make(number, 0)


class Recorder(torch.nn.Module):
    """Stands in for the network and keeps what it is given."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, x, timesteps, context=None, y=None):
        self.given = {"x": x, "tau": timesteps, "context": context, "y": y}
        return x[:, :PIXEL_CHANNELS] * self.weight


def test_pictures_draw_a_tau_and_a_noise_level_each():
    network = Recorder()
    drawn = patches()
    loss = UpscalerLoss(network, None, V, AUGMENTATION, lambda step: drawn, most_noise=250)
    assert loss.modules == {"unet": network}
    levels = []
    for number in range(40):
        loss(step(number))
        given = network.given
        assert given["x"].shape == (CLIPS * FRAMES, PIXEL_CHANNELS + 3, 8, 8)
        assert len(set(given["tau"].tolist())) > CLIPS and len(set(given["y"].tolist())) > CLIPS
        assert torch.equal(given["context"], drawn.context.repeat_interleave(FRAMES, 0))
        levels += given["y"].tolist()
    assert min(levels) < 10 and 240 < max(levels) <= 250


def test_a_clip_has_one_tau_and_one_level_and_its_network_sees_the_noised_small_frames():
    network, drawn = Recorder().requires_grad_(False), patches()
    stack = pixel_help.stack(pixel_help.network())
    loss = UpscalerLoss(network, None, V, AUGMENTATION, lambda step: drawn)
    loss.stack, loss.sets = stack, lambda c_low, frames: []
    loss.open_call = lambda *args, **kwargs: torch.no_grad()
    loss(step(3))
    given = {name: part.unflatten(0, (CLIPS, FRAMES)) for name, part in network.given.items()}
    assert torch.equal(given["tau"], given["tau"][:, :1].expand(-1, FRAMES))
    assert torch.equal(given["y"], given["y"][:, :1].expand(-1, FRAMES)) and len(set(given["y"][:, 0].tolist())) > 1
    # Take the clip's own small frames away, and what is left is noise: of unit variance, new in every frame.
    x_low, level = drawn.x_low.flatten(0, 1), network.given["y"]
    alpha = AUGMENTATION.alpha[level].float()[:, None, None, None]
    sigma = AUGMENTATION.sigma[level].float()[:, None, None, None]
    frames = ((network.given["x"][:, PIXEL_CHANNELS:] - alpha * x_low) / sigma).flatten(1)
    assert frames.std() == pytest.approx(1, rel=0.1)
    assert (torch.corrcoef(frames) - torch.eye(len(frames))).abs().max() < 0.4


def given_to_layers(shared_noise=False):
    """(noise of x_tau, noise of c_gamma) of clips with layers, each `b t ...`, and the loss."""
    drawn, unet, seen = patches(), pixel_help.network(), {}
    stack = pixel_help.stack(unet, shared_noise=shared_noise)
    unet.register_forward_pre_hook(lambda module, args, kwargs: seen.update(x=args[0], tau=args[1], y=kwargs["y"]),
                                   with_kwargs=True)
    loss = UpscalerLoss(unet, stack, V, AUGMENTATION, lambda step: drawn)(step(3))["loss"]

    def noise(x, clean, steps, schedule):
        alpha, sigma = (table[steps].float()[:, None, None, None] for table in (schedule.alpha, schedule.sigma))
        return ((x - alpha * clean.flatten(0, 1)) / sigma).unflatten(0, (CLIPS, FRAMES))
    return (noise(seen["x"][:, :PIXEL_CHANNELS], drawn.x, seen["tau"], V),
            noise(seen["x"][:, PIXEL_CHANNELS:], drawn.x_low, seen["y"], AUGMENTATION), loss)


def test_shared_noise_is_the_same_in_all_frames_of_a_clip_and_another_in_the_next():
    *noises, _ = given_to_layers(shared_noise=True)
    for noise in noises:
        assert relative_error(noise, noise[:, :1].expand_as(noise)) < 1e-3
        assert noise.std() == pytest.approx(1, rel=0.1)
        assert (torch.corrcoef(noise[:, 0].flatten(1)) - torch.eye(CLIPS)).abs().max() < 0.4
    assert relative_error(*(noise[..., :3, :, :] for noise in noises)) > 0.5        # and the two are not one


def test_without_shared_noise_every_frame_draws_as_the_diffusion_does():
    """Tau, level, noise of the small frames and noise of x, one after the other from one generator, as ever."""
    noise, noise_low, loss = given_to_layers()
    generator, drawn = step(3).generator, patches()
    V.random_tau(CLIPS, generator)
    torch.randint(0, 251, (CLIPS,), generator=generator)
    for ours, like in ((noise_low, drawn.x_low), (noise, drawn.x)):
        assert relative_error(ours, V.random_noise(like, generator)) < 1e-3
    assert torch.equal(loss, given_to_layers(shared_noise=False)[2])
    assert not torch.equal(loss, given_to_layers(shared_noise=True)[2])


def test_level_0_leaves_the_small_frames_as_they_are():
    x, eps = torch.randn(3, 3, 4, 4), torch.randn(3, 3, 4, 4)
    out = augment_per_frame(x, torch.tensor([0, 1, 200]), eps, AUGMENTATION)
    assert torch.equal(out[0], x[0]) and not torch.equal(out[1], x[1])
    assert relative_error(out[2], AUGMENTATION.alpha[200] * x[2] + AUGMENTATION.sigma[200] * eps[2]) < 1e-6


def test_with_layers_the_upscaler_is_frozen_and_every_temporal_parameter_learns():
    unet = pixel_help.network()
    stack = pixel_help.stack(unet)
    loss = UpscalerLoss(unet, stack, V, AUGMENTATION, lambda step: patches())
    assert loss.modules == {"temporal": stack} and not any(p.requires_grad for p in unet.parameters())
    loss(step())["loss"].backward()
    assert all(p.grad is None for p in unet.parameters())
    assert not [name for name, p in stack.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]


def test_checkpointing_gives_the_same_gradients():
    gradients = []
    for checkpointing in (False, True):
        unet = pixel_help.network()
        stack = pixel_help.stack(unet)
        UpscalerLoss(unet, stack, V, AUGMENTATION, lambda step: patches(), checkpointing=checkpointing)(
            step())["loss"].backward()
        gradients.append([p.grad for p in stack.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*gradients))


@pytest.mark.slow
def test_training_lowers_the_loss_on_its_own_patches(tmp_path):
    unet = pixel_help.network()
    stack = pixel_help.stack(unet)
    loss = UpscalerLoss(unet, stack, V, AUGMENTATION, lambda step: patches())
    params = LoopParams(steps=12, lr=2e-3, warmup=0, ema_decay=0.0, log_every=1)
    before = sum(loss(step(number))["loss"].item() for number in range(100, 106))
    Loop(params, loss.modules, loss, tmp_path, "upscaler layers").run()
    assert sum(loss(step(number))["loss"].item() for number in range(100, 106)) < 0.9 * before


@pytest.mark.parametrize("change, sentence", [
    (lambda p: p._replace(x=p.x.flatten(0, 1)), "Patches are 'b t c h w' with small frames"),
    (lambda p: p._replace(x_low=p.x_low[:, :2]), "Patches are 'b t c h w' with small frames"),
    (lambda p: p._replace(context=p.context[:1]), "A batch of 3 clips came with 1 texts"),
])
def test_patches_whose_parts_do_not_agree_are_refused(change, sentence):
    loss = UpscalerLoss(Recorder(), None, V, AUGMENTATION, lambda step: change(patches()))
    with pytest.raises(VideoLDMError, match=sentence):
        loss(step())


def test_noise_beyond_the_schedule_is_refused():
    with pytest.raises(VideoLDMError, match="noised by 0 to 999 steps, not 1000"):
        UpscalerLoss(Recorder(), None, V, AUGMENTATION, None, most_noise=1000)


def test_folding_loses_nothing_and_keeps_the_large_pixels_of_a_small_one_together():
    pixels = torch.randn(2, 5, 3, 12, 16)
    x = fold_pixels(pixels)
    assert x.shape == (2, 5, PIXEL_CHANNELS, 3, 4) and torch.equal(unfold_pixels(x), pixels)
    assert torch.equal(x[0, 0, :, 1, 2].sort().values, pixels[0, 0, :, 4:8, 8:12].flatten().sort().values)


@pytest.mark.parametrize("prediction", ["v", "eps", "x0"])
def test_the_target_of_folded_pixels_is_the_details_that_the_small_frames_lack(prediction):
    """A network that knows the details has no loss by either error.

    The small frames and the details together are the large frames.
    """
    drawn, scale = patches(), 3.0
    diffusion = Diffusion(0.0001, 0.02, prediction=prediction)

    class Knowing(torch.nn.Module):
        def forward(self, x, tau, context=None, y=None):
            base = repeat_small_pixels(unscale_augmented(x[:, PIXEL_CHANNELS:], y, AUGMENTATION))
            details = (drawn.x.flatten(0, 1) - base) * scale
            self.error = relative_error(unfold_pixels(base + details / scale), unfold_pixels(drawn.x.flatten(0, 1)))
            alpha, sigma = (table[tau].float()[:, None, None, None] for table in (diffusion.alpha, diffusion.sigma))
            noise = (x[:, :PIXEL_CHANNELS] - alpha * details) / sigma
            answers = {"eps": noise, "v": alpha * noise - sigma * details, "x0": details}
            return answers[prediction].requires_grad_()
    for x0_weighting in (False, True):
        network = Knowing()
        loss = UpscalerLoss(network, None, diffusion, AUGMENTATION, lambda step: drawn, x0_weighting=x0_weighting,
                            details=scale)
        assert loss(step(5))["loss"] < 1e-4 and network.error < 1e-6
