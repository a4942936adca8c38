"""The training of PVDM's autoencoder: every term by hand, what learns, and that a run resumes to the bit."""


import pytest
import torch
from torch import nn

from video_ldm.temporal.errors import VideoLDMError
from video_ldm.temporal.training.discriminator import hinge_loss
from video_ldm.temporal.training.loop import Loop, LoopParams
from video_ldm.temporal.training.planes import (
    EncodedVideos,
    PlaneAutoencoderLoss,
    PlaneAutoencoderTerms,
    WeightedClips,
)
from video_ldm.tests.plane_training_help import NO_JUDGE, PIXELS_ONLY, T, autoencoder, context, frames, judge
from video_ldm.tests.test_training_loop import assert_same

# The autoencoder's terms, by hand

class Scaled(nn.Module):
    """Stands for an autoencoder. It returns half of each clip, and keeps what it was given."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.5))

    def forward(self, x):
        assert x.shape[1] == 3              # b 3 t H W
        return self.scale * x


class Counted(nn.Module):
    """Stands for a judge. It answers with a multiple of the mean of each clip or frame, and has two features."""

    def __init__(self):
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(3.0))
        self.seen = []

    def forward(self, x):
        self.seen.append(x.detach())
        mean = x.flatten(1).mean(1)
        return self.factor * mean, [mean, 10 * mean]


class Distance(nn.Module):
    """Stands for the perceptual network."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(2.0))
        self.seen = []

    def forward(self, y, x):
        self.seen.append((y.detach(), x.detach()))
        return self.weight * (y - x).square().mean()


def numbered(step):
    """Two clips. Every pixel of a frame is 0.1, 0.2, 0.3, 0.4 in the first one, and minus that in the other."""
    values = torch.tensor([[0.1, 0.2, 0.3, 0.4], [-0.1, -0.2, -0.3, -0.4]])
    return WeightedClips(values[:, :, None, None, None].expand(2, T, 3, 8, 8).contiguous())


def test_every_term_of_the_autoencoder_is_that_of_its_formula():
    clip_judge, frame_judge, distance = Counted(), Counted(), Distance()
    loss = PlaneAutoencoderLoss(Scaled(), numbered, PlaneAutoencoderTerms(), clip_judge, frame_judge, distance)
    figures = loss(context())
    (made, true), = distance.seen
    shown = true[:, 0, 0, 0]                                        # the random frame of each clip
    assert torch.equal(made, 0.5 * true)
    pixels = 4 * 0.125                                              # half of the mean of 0.1 to 0.4
    perceptual = 4 * 2.0 * (0.5 * shown).square().mean().item()
    # The judge of clips: means of -0.25 and 0.25, half of that for what was made
    hinge = 0.5 * (1 + 1)                                           # no answer of it reaches 1, and they sum to 0
    features = 4 * (0.125 + 1.25)                                   # the sum over both features
    means = shown.tolist()
    answers, fakes = [3 * one for one in means], [1.5 * one for one in means]
    frame_hinge = 0.5 * (sum(max(0, 1 - one) for one in answers) + sum(max(0, 1 + one) for one in fakes)) / 2
    frame_features = 4 * (1 + 10) * sum(abs(0.5 * one) for one in means) / 2
    frame_adversarial = -sum(fakes) / 2
    total = pixels + perceptual + hinge + features + frame_hinge + frame_features + frame_adversarial
    assert figures["loss"].item() == pytest.approx(total, rel=1e-5)
    assert figures["reconstruction"].item() == pytest.approx(pixels + perceptual, rel=1e-5)
    assert figures["clip_judge_loss"].item() == pytest.approx(hinge)
    assert figures["frame_judge_loss"].item() == pytest.approx(frame_hinge)
    assert figures["clip_judge_weight"] == figures["frame_judge_weight"] == 1
    assert figures["clip_judge_fooled"] == 0.5
    assert [one.shape for one in clip_judge.seen] == 3 * [(2, 3, T, 8, 8)]
    assert [one.shape for one in frame_judge.seen] == 3 * [(2, 3, 8, 8)]
    assert torch.equal(frame_judge.seen[1], true)                   # the same frame as the perceptual network's


@pytest.mark.parametrize("name, weight", [("pixels", 2.0), ("perceptual", 0.5), ("adversarial", 3.0),
                                          ("features", 7.0)])
def test_each_weight_multiplies_its_own_term(name, weight):
    def value(**weights):
        off = dict(pixels=0.0, perceptual=0.0, adversarial=0.0, features=0.0)
        loss = PlaneAutoencoderLoss(Scaled(), numbered, PlaneAutoencoderTerms(**(off | weights)), Counted(), Counted(),
                                    Distance())
        return loss(context(1))["loss"].item()
    none, one, several = value(), value(**{name: 1.0}), value(**{name: weight})
    assert none > 0 and abs(one - none) > 1e-3                      # the judges' own loss is always there
    assert several - none == pytest.approx(weight * (one - none), rel=1e-4)


def test_the_random_frame_is_any_frame_of_a_clip_and_one_for_each_clip():
    distance = Distance()
    terms = PlaneAutoencoderTerms(adversarial=0.0, features=0.0)
    loss = PlaneAutoencoderLoss(Scaled(), numbered, terms, perceptual=distance)
    for step in range(60):
        loss(context(step))
    drawn = [tuple(round(abs(value) * 10) for value in true[:, 0, 0, 0].tolist()) for _, true in distance.seen]
    assert {one for one, _ in drawn} == {other for _, other in drawn} == {1, 2, 3, 4}
    assert any(one != other for one, other in drawn)


def test_pixels_that_count_more_weigh_more():
    def clips(step):
        weights = torch.zeros(2, T, 1, 8, 8)
        weights[:, 3] = 2.0
        return numbered(step)._replace(weights=weights)
    figures = PlaneAutoencoderLoss(Scaled(), clips, PIXELS_ONLY)(context())
    assert figures["loss"].item() == pytest.approx(2 * 0.2 / 4)


# Its networks

def test_a_judge_learns_from_its_own_loss_alone_and_its_weight_is_fixed():
    loss = PlaneAutoencoderLoss(autoencoder(), lambda step: WeightedClips(frames()),
                                PlaneAutoencoderTerms(perceptual=0.0), judge(3), judge(2))
    loss(context())["loss"].backward()
    alone, x = judge(3), frames().transpose(1, 2)
    with torch.no_grad():
        y = loss.autoencoder(x)
    hinge_loss(alone(x)[0], alone(y)[0]).backward()
    for ours, other in zip(loss.modules["clip_judge"].parameters(), alone.parameters(), strict=True):
        assert torch.allclose(ours.grad, other.grad, atol=1e-6)
    assert all(conv.weight.grad.abs().max() > 0 for conv in alone.convs)
    assert all(weight.grad is not None for weight in loss.modules["frame_judge"].parameters())


def test_the_autoencoder_learns_from_the_answers_with_a_fixed_weight_and_not_from_the_judges_own_loss():
    """However large the reconstruction's gradient is, the adversarial one is 50 times that of the mean answer."""
    def gradient(pixels, adversarial):
        terms = PlaneAutoencoderTerms(pixels, 0.0, adversarial, 0.0)
        loss = PlaneAutoencoderLoss(autoencoder(), lambda step: WeightedClips(frames()), terms, judge(3))
        loss(context())["loss"].backward()
        return loss.autoencoder.to_pixel[1].weight.grad
    network = autoencoder()
    (-50 * judge(3)(network(frames().transpose(1, 2)))[0].mean()).backward()
    answers = network.to_pixel[1].weight.grad
    assert not gradient(0.0, 0.0).any()
    for pixels in (0.0, 10.0):
        added = gradient(pixels, 50.0) - gradient(pixels, 0.0)
        assert (added - answers).abs().max() < 1e-3 * answers.abs().max()


def test_the_second_stage_begins_at_its_step():
    terms = PlaneAutoencoderTerms(perceptual=0.0, adversarial_from=5)
    loss = PlaneAutoencoderLoss(autoencoder(), lambda step: WeightedClips(frames()), terms, judge(3), judge(2))
    before, after = loss(context(4)), loss(context(5))
    assert before.keys() == after.keys() and before["clip_judge_loss"] == before["frame_judge_fooled"] == 0
    assert torch.equal(before["loss"], before["reconstruction"]) and after["loss"] > after["reconstruction"]
    before["loss"].backward()
    assert all(weight.grad is None for name in ("clip_judge", "frame_judge") for weight in
               loss.modules[name].parameters())


def test_training_the_decoder_alone_leaves_the_encoder_and_the_planes_bit_for_bit(tmp_path):
    network = autoencoder()
    with torch.no_grad():
        planes, clips = network.encode(frames().transpose(1, 2)), network(frames().transpose(1, 2))
    before = {name: weight.clone() for name, weight in network.state_dict().items()}
    loss = PlaneAutoencoderLoss(network, lambda step: WeightedClips(frames()), NO_JUDGE, decoder_only=True)
    params = LoopParams(2, 1e-2, warmup=0, ema_decay=0.0, device="cpu")
    loop = Loop(params, loss.modules, loss, tmp_path, "decoder")
    loop.run()
    network.load_state_dict(loop.ema_state("autoencoder"))
    changed = {name for name, weight in network.state_dict().items() if not torch.equal(weight, before[name])}
    decoder = {name for name in before if name.startswith(("decoder.layers.", "to_pixel.", "post_"))}
    assert changed == decoder
    with torch.no_grad():
        assert torch.equal(network.encode(frames().transpose(1, 2)), planes)
        assert not torch.equal(network(frames().transpose(1, 2)), clips)


def test_an_autoencoder_that_was_frozen_before_is_trained_again():
    network = autoencoder()
    EncodedVideos(network, None)
    assert not any(weight.requires_grad for weight in network.parameters())
    PlaneAutoencoderLoss(network, numbered, NO_JUDGE)
    assert all(weight.requires_grad for weight in network.parameters())


def test_the_autoencoder_learns_and_a_resumed_run_equals_an_uninterrupted_one(tmp_path):
    """The run is cut in the middle of stage one, and again in stage two."""
    def loop(folder):
        terms = PlaneAutoencoderTerms(perceptual=0.0, adversarial_from=30)
        loss = PlaneAutoencoderLoss(autoencoder(), lambda step: WeightedClips(frames()), terms, judge(3), judge(2))
        params = LoopParams(34, 5e-3, warmup=0, ema_decay=0.9, betas=(0.5, 0.9), save_every=100, log_every=1,
                            device="cpu")
        return Loop(params, loss.modules, loss, folder, "autoencoder")
    whole = loop(tmp_path / "whole")
    first = whole.loss(context())["reconstruction"].item()
    whole.run()
    assert whole.loss(context())["reconstruction"].item() < 0.9 * first
    for stop in (17, 32):
        cut = loop(tmp_path / "cut")
        assert not cut.run(on_step=lambda step, steps, stop=stop: step == stop)
    last = loop(tmp_path / "cut")
    assert last.step == 32 and last.run()
    assert_same(last, whole)


def test_terms_without_their_network_are_refused():
    with pytest.raises(VideoLDMError, match="no perceptual network is given"):
        PlaneAutoencoderLoss(autoencoder(), numbered, PlaneAutoencoderTerms(adversarial=0.0, features=0.0))
    with pytest.raises(VideoLDMError, match="need a discriminator"):
        PlaneAutoencoderLoss(autoencoder(), numbered, PlaneAutoencoderTerms(perceptual=0.0))
    with pytest.raises(VideoLDMError, match="up to 4 frames of 8x8.*given 5 frames"):
        PlaneAutoencoderLoss(autoencoder(), lambda step: WeightedClips(frames(length=5)), NO_JUDGE)(context())
