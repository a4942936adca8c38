"""The training of PVDM's diffusion: what a step draws, its loss by hand, and that a run resumes to the bit."""

from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from video_ldm.temporal import pvdm
from video_ldm.temporal.diffusion import Diffusion
from video_ldm.temporal.errors import VideoLDMError
from video_ldm.temporal.training.ema import EMA
from video_ldm.temporal.training.loop import Loop, LoopParams, StepContext
from video_ldm.temporal.training.loss_inputs import map_tensors
from video_ldm.temporal.training.planes import (
    EncodedVideos,
    PlaneDiffusionLoss,
    PlanePairs,
    StoredPlanes,
    encode,
)
from video_ldm.tests.plane_training_help import SMALL, UNET, T, autoencoder, context, frames, network
from video_ldm.tests.test_training_cuda_graph import FromTheCPU
from video_ldm.tests.test_training_loop import assert_same

# What a step of the diffusion draws

class Positions:
    """Stands for an autoencoder. The planes of a clip are its first pixels: which frames it got can be read off."""

    def __init__(self):
        self.given, self.weight = [], nn.Parameter(torch.zeros(1))

    def parameters(self):
        return iter([self.weight])

    def requires_grad_(self, value):
        self.weight.requires_grad_(value)

    def eval(self):
        pass

    def encode(self, x):
        self.given.append(x)
        return x[:, :2, :, 0, 0]            # b c t


def counted(videos=64, black=()):
    """Videos whose pixels say the number of their frame. The first half of those in `black` is black."""
    x = (torch.arange(1, 2 * T + 1).float() / 10)[None, :, None, None, None].expand(videos, 2 * T, 3, 8, 8).clone()
    x[list(black), :T] = -1.0
    return x


def first_frames(planes):
    """The number of the first frame of each clip; 0: the planes are exactly zero."""
    count = torch.arange(planes.shape[2])
    starts = []
    for one in planes:
        if not one.any():
            starts.append(0)
            continue
        start = round(one[0, 0].item() * 10)
        assert torch.allclose(one, ((start + count) / 10).expand_as(one), rtol=1e-3)        # consecutive frames
        starts.append(start)
    return starts


def test_a_clip_that_knows_the_one_before_is_the_second_of_its_video():
    pairs = EncodedVideos(Positions(), lambda step: counted())(context(), torch.ones(64, dtype=torch.bool))
    assert first_frames(pairs.target) == 64 * [T + 1] and first_frames(pairs.before) == 64 * [1]


def test_a_clip_that_knows_none_is_any_window_of_its_video():
    pairs = EncodedVideos(Positions(), lambda step: counted())(context(), torch.zeros(64, dtype=torch.bool))
    assert set(first_frames(pairs.target)) == {1, 2, 3, 4, 5}
    assert torch.equal(pairs.before, torch.zeros_like(pairs.target))


def test_a_black_first_half_is_never_a_condition_and_never_a_target():
    black, known = torch.arange(64) % 4 < 2, torch.arange(64) % 2 == 0
    pairs = EncodedVideos(Positions(), lambda step: counted(black=black.nonzero().flatten()))(context(), known)
    before, target = first_frames(pairs.before), first_frames(pairs.target)
    assert [start for start, lacks in zip(target, black) if lacks] == 32 * [T + 1]
    assert before == [1 if knows and not lacks else 0 for knows, lacks in zip(known, black)]
    assert torch.equal(pairs.before[~known | black], torch.zeros(48, 2, T))
    assert {start for start, lacks, knows in zip(target, black, known) if not lacks and not knows} == {1, 2, 3, 4, 5}


def test_a_first_half_that_is_not_quite_black_counts():
    dark = counted(1, black=[0])
    dark[0, 2, 1, 5, 5] = 1 / 127.5 - 1             # one pixel of one frame, by one of 255
    assert EncodedVideos(Positions(), lambda step: dark)(context(), torch.tensor([True])).before.any()


def test_videos_are_encoded_in_float32_by_the_frozen_autoencoder_also_in_mixed_precision():
    network = autoencoder()
    source = EncodedVideos(network, lambda step: frames(3, 2 * T))
    with torch.autocast("cpu", torch.bfloat16):
        pairs = source(context(), torch.tensor([True, True, True]))
    with torch.no_grad():
        halves = [network.encode(part.transpose(1, 2)) for part in frames(3, 2 * T).split(T, dim=1)]
    assert torch.equal(pairs.before, halves[0]) and torch.equal(pairs.target, halves[1])
    assert pairs.target.dtype == torch.float32 and not pairs.target.requires_grad
    assert not any(weight.requires_grad for weight in network.parameters())


@pytest.mark.parametrize("x, known", [(frames(2, 7), 2), (frames(2, 8), 3), (frames(2, 8)[0], 2)],
                         ids=["no two clips", "another batch", "one video"])
def test_videos_of_another_shape_are_refused(x, known):
    with pytest.raises(VideoLDMError, match=f"A step takes {known} videos of two clips.*These are"):
        EncodedVideos(autoencoder(), lambda step: x)(context(), torch.ones(known, dtype=torch.bool))


def stored(starts):
    """Planes (k c l) of windows that begin at these frames."""
    return np.stack([np.stack(2 * [np.arange(start, start + T) / 10]) for start in starts]).astype(np.float16)


def test_stored_planes_are_drawn_as_encoded_videos_are():
    """Windows from every second frame of two longer videos, and of one that is shorter than two clips."""
    videos = [stored(range(1, 10, 2)), stored(range(101, 106, 2)), stored([201, 203])]
    source = StoredPlanes(videos, apart=2)
    pairs = source(context(), torch.ones(200, dtype=torch.bool))
    seen = set(zip(first_frames(pairs.before), first_frames(pairs.target)))
    assert seen == {(1, 5), (3, 7), (5, 9), (101, 105), (0, 201), (0, 203)}
    pairs = source(context(), torch.zeros(300, dtype=torch.bool))
    assert set(first_frames(pairs.target)) == {1, 3, 5, 7, 9, 101, 103, 105, 201, 203}
    assert torch.equal(pairs.before, torch.zeros_like(pairs.target)) and pairs.target.dtype == torch.float32


def test_a_window_is_drawn_as_often_as_from_videos_of_two_clips():
    """Windows 1 to 5 of a video of five: two clips begin at 1, 2 or 3, and a window at one of three places of them."""
    source = StoredPlanes([stored(range(1, 6))], apart=2)
    drawn = np.array(first_frames(source(context(), torch.zeros(9000, dtype=torch.bool)).target))
    shares = [(drawn == start).mean() for start in range(1, 6)]
    assert shares == pytest.approx([1 / 9, 2 / 9, 3 / 9, 2 / 9, 1 / 9], abs=0.02)       # 4 standard errors


def test_planes_that_cannot_be_drawn_from_are_refused():
    for videos in ([], [stored([1]), stored([1])[:0]]):
        with pytest.raises(VideoLDMError, match="no planes to draw from"):
            StoredPlanes(videos, apart=2)
    with pytest.raises(VideoLDMError, match="1 window or more after it, not 0"):
        StoredPlanes([stored([1])], apart=0)


# The loss of the diffusion

class Fixed:
    """Stands for a source: known planes, with the clip before where it is to be known."""

    def __init__(self, target, before):
        self.target, self.before, self.known = target, before, []

    def __call__(self, step, known):
        self.known.append(known)
        return PlanePairs(self.target, self.before * known[:, None, None])


class Answer(nn.Module):
    """Stands for a network. It is called as a PlaneUNet is, and answers with what it is given, in shares of its own."""

    params = SimpleNamespace(conditional=True, channels=2)

    def __init__(self):
        super().__init__()
        self.share = nn.Parameter(torch.tensor(0.5))

    def forward(self, x, tau, shape, cond):
        assert shape == SMALL.shape
        return self.share * x + 0.25 * cond + tau[:, None, None] / 1000


def planes(count, seed=4):
    return torch.rand(count, 2, SMALL.shape.length, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_the_loss_of_the_diffusion_is_the_squared_error_of_its_noise():
    x, before = planes(3), planes(3, 5)
    loss = PlaneDiffusionLoss(Answer(), Fixed(x, before), SMALL.shape, pvdm.diffusion(), 3, known=1.0)
    inputs = loss.draw(context())
    assert torch.equal(inputs.x, x) and torch.equal(inputs.before, before)
    betas = np.linspace(0.0015 ** 0.5, 0.0195 ** 0.5, 1000) ** 2
    left = np.cumprod(1 - betas)[inputs.tau.numpy()][:, None, None]
    noise = inputs.noise.numpy()
    noisy = left ** 0.5 * x.numpy() + (1 - left) ** 0.5 * noise
    answer = 0.5 * noisy + 0.25 * before.numpy() + inputs.tau.numpy()[:, None, None] / 1000
    assert loss(context())["loss"].item() == pytest.approx(((answer - noise) ** 2).mean(), rel=1e-5)
    assert abs(noise.mean()) < 0.3 and 0.8 < noise.std() < 1.2 and 0 <= inputs.tau.min() <= inputs.tau.max() < 1000


def test_each_clip_knows_the_one_before_it_with_the_given_probability():
    x = planes(8)
    loss = PlaneDiffusionLoss(Answer(), source := Fixed(x, x), SMALL.shape, pvdm.diffusion(), 8, known=0.3)
    drawn = [loss.draw(context(step)) for step in range(500)]
    known = torch.stack(source.known)
    assert known.float().mean().item() == pytest.approx(0.3, abs=0.03)          # 4 standard errors
    assert (known.any(1) & ~known.all(1)).float().mean() > 0.9                  # not a whole batch at once
    for inputs, row in zip(drawn, known):
        assert torch.equal(inputs.before.flatten(1).any(1), row)


def test_its_mean_is_the_mixture_of_the_paper():
    """lambda times the loss with the clip before, and 1 - lambda times the one without, over the same noise."""
    x = planes(8)
    losses = {known: PlaneDiffusionLoss(Answer(), Fixed(x, 4 * x), SMALL.shape, pvdm.diffusion(), 8, known)
              for known in (0.0, 0.3, 1.0)}
    values = {known: torch.stack([loss(context(step))["loss"].detach() for step in range(500)])
              for known, loss in losses.items()}
    mixture = 0.3 * values[1.0] + 0.7 * values[0.0]
    difference = values[0.3] - mixture
    assert (values[1.0] - values[0.0]).mean() > 0.1
    assert difference.mean().abs() < 4 * difference.std() / 500 ** 0.5 < 0.02


def test_without_condition_the_network_has_no_input_for_it_and_learns():
    plain = network(conditional=False)
    source = StoredPlanes(planes(3)[:, None], apart=1)              # one window of each video
    loss = PlaneDiffusionLoss(plain, source, SMALL.shape, pvdm.diffusion(), 4, known=0.0)
    loss(context())["loss"].backward()
    assert plain.input_blocks[0][0].weight.shape[1] == 2 and plain.input_blocks[0][0].weight.grad.abs().sum() > 0
    with pytest.raises(VideoLDMError, match="no input for the clip before.*known=0"):
        PlaneDiffusionLoss(plain, source, SMALL.shape, pvdm.diffusion(), 4)
    inputs = PlaneDiffusionLoss(network(), EncodedVideos(autoencoder(), lambda step: frames(4, 2 * T)), SMALL.shape,
                                pvdm.diffusion(), 4, known=0.0).draw(context())
    assert torch.equal(inputs.before, torch.zeros_like(inputs.x))


def test_the_network_trains_and_sees_the_clip_before(tmp_path):
    """The target can only be told from the clip before: it is that clip again, of thousands."""
    class Same:
        def __call__(self, step, known):
            x = torch.rand(8, 2, 1, generator=step.generator).expand(-1, -1, SMALL.shape.length) * 2 - 1
            return PlanePairs(x, x * known[:, None, None])
    torch.manual_seed(0)
    loss = PlaneDiffusionLoss(pvdm.PlaneUNet(UNET), Same(), SMALL.shape, pvdm.diffusion(), 8, known=1.0)
    Loop(LoopParams(40, 3e-3, warmup=0, ema_decay=0.0, device="cpu"), loss.modules, loss, tmp_path, "diffusion").run()
    blind = PlaneDiffusionLoss(loss.network, Same(), SMALL.shape, pvdm.diffusion(), 8, known=0.0)
    with torch.no_grad():
        with_it, without = (torch.stack([one(context(step))["loss"] for step in range(1000, 1010)]).mean()
                            for one in (loss, blind))
    assert with_it < 0.8 * without


@pytest.mark.parametrize("known", [-0.1, 1.5])
def test_a_share_that_is_no_probability_is_refused(known):
    with pytest.raises(VideoLDMError, match="from 0 to 1"):
        PlaneDiffusionLoss(network(), None, SMALL.shape, pvdm.diffusion(), 4, known)


def test_planes_of_another_size_are_refused():
    loss = PlaneDiffusionLoss(network(), Fixed(planes(2), planes(2)), pvdm.PlaneShape(4, 2, 4), pvdm.diffusion(), 2)
    with pytest.raises(VideoLDMError, match="takes planes of 2 x 2 x 32 numbers.*These are 2 x 2 x 20"):
        loss(context())
    other = network(channels=3)
    with pytest.raises(VideoLDMError, match="takes planes of 2 x 3 x 20 numbers"):
        PlaneDiffusionLoss(other, Fixed(planes(2), planes(2)), SMALL.shape, pvdm.diffusion(), 2)(context())


# Runs

def diffusion_loss(batch=4):
    source = EncodedVideos(autoencoder(), lambda step: frames(step.share(batch), 2 * T, seed=step.step))
    return PlaneDiffusionLoss(network(), source, SMALL.shape, pvdm.diffusion(), batch, known=0.5)


def test_a_resumed_run_of_the_diffusion_equals_an_uninterrupted_one(tmp_path):
    def loop(folder):
        loss = diffusion_loss()
        params = LoopParams(6, 1e-3, warmup=2, ema_decay=0.9, save_every=100, log_every=1, device="cpu")
        return Loop(params, loss.modules, loss, folder, "diffusion")
    whole = loop(tmp_path / "whole")
    whole.run()
    assert not loop(tmp_path / "cut").run(on_step=lambda step, steps: step == 3)
    cut = loop(tmp_path / "cut")
    assert cut.step == 3 and cut.run()
    assert_same(cut, whole)


def test_the_average_warms_up_and_takes_in_every_step(tmp_path):
    loss = diffusion_loss()
    weights = []
    params = LoopParams(4, 1e-3, warmup=0, ema_decay=0.9999, device="cpu")
    loop = Loop(params, loss.modules, loss, tmp_path, "diffusion")
    name = "out.2.weight"

    def keep(step, steps):
        weights.append(loss.network.state_dict()[name].double())
    start = loss.network.state_dict()[name].double()
    loop.run(on_step=keep)
    average = start
    for n, weight in enumerate(weights):
        decay = (1 + n) / (10 + n)
        average = decay * average + (1 - decay) * weight
    assert torch.allclose(loop.ema_state("unet")[name].double(), average, atol=1e-6)
    assert not torch.allclose(average, weights[-1], atol=1e-5)


def test_while_it_warms_up_the_average_looks_back_as_far_as_the_published_one():
    """The mean age of the weights in the average, in steps. The published average takes in every 25th step."""
    ours, published, number = 0.0, 0.0, 0
    ema = EMA({}, 0.9999)
    for step in range(100_001):
        ours = ema.decay_at(step) * (ours + 1)
        if step % 25 == 0 and step > 0:
            number += 1
            published = min(0.9999, (1 + number) / (10 + number)) * (published + 25)
        if step == 80_000:
            assert ours == pytest.approx(step / 10, rel=0.01) and published == pytest.approx(step / 10, rel=0.01)
    assert 9_000 < ours < 10_000 < published < 10_100


def test_the_loss_is_computed_from_what_was_drawn_alone_as_a_recording_needs():
    loss = diffusion_loss()
    drawn = loss.draw(context())
    assert torch.equal(loss(context())["loss"], loss.compute(drawn)["loss"])
    assert not torch.equal(loss.compute(loss.draw(context(1)))["loss"], loss.compute(drawn)["loss"])
    on_meta = map_tensors(drawn, lambda tensor: torch.empty_like(tensor, device="meta"))
    loss.network.to("meta")
    loss.diffusion.tables(torch.device("meta"))
    with FromTheCPU():
        loss.compute(on_meta)["loss"].backward()
    assert all(weight.grad is not None for weight in loss.network.parameters())


def test_planes_are_encoded_where_the_autoencoder_is(monkeypatch):
    """A recorded training draws on the CPU, while the autoencoder is on the GPU. `meta` stands for the GPU."""
    monkeypatch.setattr(torch, "autocast", lambda *device, **settings: nullcontext())       # `meta` has none
    source = EncodedVideos(autoencoder(), lambda step: frames(2, 2 * T))
    source.to("meta")
    pairs = source(context(), torch.tensor([True, False]))
    assert pairs.target.device.type == pairs.before.device.type == "meta" and pairs.target.shape == (2, 2, 20)
    assert encode(autoencoder(), frames()).device.type == "cpu"


def test_two_processes_learn_what_one_learns():
    """The gradients of two shares of a batch, averaged, are those of the loss over both. In float64."""
    loss = diffusion_loss()
    loss.network.double()

    def gradient(inputs):
        loss.network.zero_grad()
        loss.compute(inputs)["loss"].backward()
        return torch.cat([weight.grad.flatten() for weight in loss.network.parameters()])
    shares = [map_tensors(loss.draw(StepContext.make(0, 0, rank, 2)), lambda tensor: tensor.double()
                          if tensor.is_floating_point() else tensor) for rank in (0, 1)]
    assert [len(one.x) for one in shares] == [2, 2] and not torch.equal(shares[0].noise, shares[1].noise)
    together = gradient(type(shares[0])(*(torch.cat(parts) for parts in zip(*shares))))
    mean = (gradient(shares[0]) + gradient(shares[1])) / 2
    assert (together - mean).abs().max() < 1e-6 * mean.abs().max()


def test_the_published_schedule_is_what_the_demo_and_the_sampler_use():
    betas, published = pvdm.diffusion(), Diffusion(0.0015, 0.0195, 1000, "eps", "linear")
    assert torch.equal(betas.alpha, published.alpha) and betas.prediction == "eps"
