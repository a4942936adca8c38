"""Fine-tuning of a temporal decoder: its discriminator, its terms, and that it learns."""

import pytest
import torch
from torch import nn

from video_ldm.temporal.decoder import TemporalDecoder
from video_ldm.temporal.errors import VideoLDMError
from video_ldm.temporal.training.decoder import Clip, DecoderLoss, DecoderLossParams, absolute_error, psnr
from video_ldm.temporal.training.discriminator import PatchDiscriminator, feature_distance, hinge_loss, judged
from video_ldm.temporal.training.loop import Loop, LoopParams, StepContext
from video_ldm.temporal.training.perceptual import VGGDistance
from video_ldm.tests.decoder_help import image_decoder, latents, small_params

FRAMES = 4
NO_JUDGE = DecoderLossParams(adversarial=0.0, adversarial_from=0, features=0.0, perceptual=0.0)
JUDGED = DecoderLossParams(adversarial=0.5, adversarial_from=0, features=0.1, perceptual=0.0)


def fresh_decoder(seed=0):
    """Fresh temporal layers on a random image decoder of 2 levels."""
    torch.manual_seed(seed)
    return TemporalDecoder(image_decoder(small_params(mult=(1, 1)), seed), (3, 1, 1))


def judge(seed=1, dims=3):
    torch.manual_seed(seed)
    return PatchDiscriminator(dims, channels=8, layers=1)


def clips(step):
    """Two clips whose frames say how many frames have passed, which the latents of a frame alone do not."""
    z = latents(2 * FRAMES, 4, 4, seed=9).unflatten(0, (2, FRAMES))
    x = torch.linspace(-0.8, 0.8, FRAMES).view(1, FRAMES, 1, 1, 1).expand(2, FRAMES, 3, 8, 8).contiguous()
    return Clip(z, x)


def context(step=0):
    return StepContext.make(step, seed=0)


# The discriminator

def test_every_answer_judges_a_patch_of_a_frame_and_its_neighbours():
    network, x = judge(), torch.randn(1, 3, 5, 32, 32, requires_grad=True)
    network.norms = nn.ModuleList(nn.Identity() for _ in network.norms)     # they pool over the whole clip
    answers, features = network(x)
    assert answers.shape[:3] == (1, 1, 5) and len(features) == 2
    answers[0, 0, 0, 2, 2].backward()
    seen = x.grad[0].abs().sum(0) > 0
    assert seen.any(2).any(1).tolist() == [True, True, True, True, False]      # three layers of kernel 3 over time
    assert seen.any(0).any(0).sum() < 32 and seen.any(0).any(1).sum() < 32      # a patch, not the picture


def test_a_discriminator_of_images_takes_images_and_one_of_clips_clips_of_any_length():
    assert judge(dims=2)(torch.randn(3, 3, 32, 32))[0].shape[:2] == (3, 1)
    for frames in (1, 6):
        assert judge()(torch.randn(2, 3, frames, 24, 40))[0].shape[:3] == (2, 1, frames)
    with pytest.raises(ValueError, match="2 or 3 dimensions"):
        PatchDiscriminator(4)


def test_judged_gives_gradients_to_the_pictures_and_none_to_the_discriminator():
    network, x = judge(), torch.randn(1, 3, 3, 16, 16, requires_grad=True)
    answers, features = judged(network, x)
    assert torch.equal(answers, network(x)[0])
    (answers.mean() + features[0].mean()).backward()
    assert x.grad.abs().sum() > 0 and all(weight.grad is None for weight in network.parameters())


def test_the_losses_are_those_of_their_formulas():
    assert hinge_loss(torch.tensor([2.0, 0.5]), torch.tensor([-2.0, 0.0])).item() == pytest.approx(0.5 * (0.25 + 0.5))
    assert feature_distance([torch.ones(2), torch.zeros(3)], [torch.zeros(2), torch.full((3,), 3.0)]).item() == 2.0
    y, x, weights = torch.ones(2, 3, 2, 2), torch.zeros(2, 3, 2, 2), torch.zeros(2, 1, 2, 2)
    weights[0] = 3
    assert [absolute_error(y, x, part).item() for part in (None, weights, weights * 0)] == [1, 1.5, 0]
    assert psnr(y, x).item() == pytest.approx(6.0206, abs=1e-3)     # peak to peak is 2


# The loss

def test_the_decoder_learns_what_only_neighbouring_frames_tell(tmp_path):
    loss = DecoderLoss(fresh_decoder(), clips, NO_JUDGE)
    params = LoopParams(steps=60, lr=3e-3, warmup=0, ema_decay=0.0, device="cpu")
    loop = Loop(params, loss.modules, loss, tmp_path, "decoder")
    before = loss(context())["reconstruction"].item()
    loop.run()
    with torch.no_grad():
        after, batch = loss(context())["reconstruction"].item(), clips(None)
        image = loss.decoder(batch.latents.flatten(0, 1), skip_video=True)
    assert after < 0.4 * before
    assert after < 0.7 * absolute_error(image, batch.frames.flatten(0, 1), None).item()


def test_decoder_and_discriminator_learn_in_one_step_each_from_its_own_loss_alone():
    loss = DecoderLoss(fresh_decoder(), clips, JUDGED, judge())
    figures = loss(context())
    names = ("loss", "weight", "fooled")
    assert set(figures) == {"loss", "psnr", "reconstruction", *(f"discriminator_{name}" for name in names)}
    figures["loss"].backward()
    judged_alone = judge()
    x = clips(None).frames.transpose(1, 2)
    with torch.no_grad():
        y = loss.decoder(clips(None).latents.flatten(0, 1), FRAMES).unflatten(0, (2, FRAMES)).transpose(1, 2)
    hinge_loss(judged_alone(x)[0], judged_alone(y)[0]).backward()
    for ours, alone in zip(loss.modules["discriminator"].parameters(), judged_alone.parameters()):
        assert torch.allclose(ours.grad, alone.grad, atol=1e-6)     # its own loss and nothing of the decoder's
    assert loss.decoder.last_weight.grad.abs().sum() > 0


def test_the_adaptive_weight_brings_the_adversarial_gradient_to_the_size_of_the_others():
    loss = DecoderLoss(fresh_decoder(), clips, JUDGED, judge())
    last = loss.decoder.last_weight
    batch = clips(None)
    y = loss.decoder(batch.latents.flatten(0, 1), FRAMES)
    error = absolute_error(y, batch.frames.flatten(0, 1), None)
    adversarial = -judged(loss.judges["discriminator"], y.unflatten(0, (2, FRAMES)).transpose(1, 2))[0].mean()
    weight = loss.adaptive_weight(error, adversarial)
    norms = [torch.autograd.grad(term, last, retain_graph=True)[0].norm() for term in (error, weight * adversarial)]
    assert not weight.requires_grad and norms[1].item() == pytest.approx(norms[0].item(), rel=1e-2)


def test_the_discriminator_begins_when_it_is_told_and_the_log_has_the_same_names_before():
    later = DecoderLossParams(adversarial=0.5, adversarial_from=5, features=0.1, perceptual=0.0)
    loss = DecoderLoss(fresh_decoder(), clips, later, judge())
    before, after = loss(context(4)), loss(context(5))
    assert before.keys() == after.keys() and before["discriminator_loss"] == 0 < after["discriminator_loss"]
    assert torch.equal(before["loss"], before["reconstruction"])
    before["loss"].backward()
    assert all(weight.grad is None for weight in loss.modules["discriminator"].parameters())


def test_an_image_discriminator_is_off_unless_given():
    assert DecoderLoss(fresh_decoder(), clips, JUDGED, judge()).modules.keys() == {"decoder", "discriminator"}
    both = DecoderLoss(fresh_decoder(), clips, JUDGED, judge(), judge(2, dims=2))
    assert both.modules.keys() == {"decoder", "discriminator", "image_discriminator"}
    figures = both(context())
    figures["loss"].backward()
    assert figures["image_discriminator_loss"] > 0
    assert all(weight.grad is not None for weight in both.modules["image_discriminator"].parameters())


@pytest.mark.parametrize("train_spatial", [True, False])
def test_spatial_layers_learn_only_where_asked_and_the_image_path_then_stays(tmp_path, train_spatial):
    decoder = fresh_decoder()
    z = latents(3, 4, 4)
    before = decoder(z, skip_video=True).detach()
    loss = DecoderLoss(decoder, clips, NO_JUDGE, train_spatial=train_spatial)
    trained = {name for name, weight in decoder.named_parameters() if weight.requires_grad}
    assert trained == (set(dict(decoder.named_parameters())) if train_spatial else set(decoder.temporal_names()))
    Loop(LoopParams(steps=2, lr=1e-3, warmup=0, ema_decay=0.0, device="cpu"), loss.modules, loss, tmp_path, "x").run()
    assert torch.equal(decoder(z, skip_video=True), before) == (not train_spatial)
    assert not torch.equal(decoder(z).detach(), before)


def test_what_stands_before_the_decoder_is_applied_and_frozen():
    quant = nn.Conv2d(4, 4, 1)
    loss = DecoderLoss(fresh_decoder(), clips, NO_JUDGE, post_quant=quant)
    with torch.no_grad():
        expected = loss.decoder(quant(clips(None).latents.flatten(0, 1)), FRAMES)
        assert torch.equal(loss(context())["psnr"], psnr(expected, clips(None).frames.flatten(0, 1)))
    assert not any(weight.requires_grad for weight in quant.parameters())


def test_terms_without_their_network_are_refused():
    with pytest.raises(VideoLDMError, match="no perceptual network is given"):
        DecoderLoss(fresh_decoder(), clips, DecoderLossParams(0.0, 0, 0.0, 1.0))
    with pytest.raises(VideoLDMError, match="need a discriminator"):
        DecoderLoss(fresh_decoder(), clips, JUDGED)


# The perceptual network, for who has its weights

def vgg_file(path, seed=3):
    """Random weights in torchvision's file."""
    torch.manual_seed(seed)
    state, before = {}, 3
    widths = (64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512)
    for number, width in zip((0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24), widths):
        state[f"features.{number}.weight"] = torch.randn(width, before, 3, 3) * (2 / (9 * before)) ** 0.5
        state[f"features.{number}.bias"] = torch.randn(width) * 0.1
        before = width
    torch.save(state, path)
    return state


def test_the_perceptual_distance_is_that_of_vggs_features(tmp_path):
    state = vgg_file(tmp_path / "vgg16.pth")
    network = VGGDistance(tmp_path / "vgg16.pth")
    y, x = torch.rand(2, 3, 32, 32) * 2 - 1, torch.rand(2, 3, 32, 32) * 2 - 1
    layers = []                         # VGG16 as torchvision lays it out: convolution, ReLU, and five poolings
    for number in range(23):
        if number in (4, 9, 16):
            layers.append(nn.MaxPool2d(2))
        elif f"features.{number}.weight" in state:
            conv = nn.Conv2d(*state[f"features.{number}.weight"].shape[1::-1], 3, padding=1)
            conv.load_state_dict({part: state[f"features.{number}.{part}"] for part in ("weight", "bias")})
            layers.append(conv)
        else:
            layers.append(nn.ReLU())
    mean, deviation = (torch.tensor(part).view(1, 3, 1, 1) for part in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    total = 0
    features = [((part + 1) / 2 - mean) / deviation for part in (y, x)]
    with torch.no_grad():
        for number, layer in enumerate(layers):
            features = [layer(part) for part in features]
            if number in (3, 8, 15, 22):
                one, other = (part / part.norm(dim=1, keepdim=True).clamp_min(1e-12) for part in features)
                total += (one - other).square().sum(1).mean()
        assert network(y, x).item() == pytest.approx(total.item(), rel=1e-5) and network(x, x) == 0
    loss = DecoderLoss(fresh_decoder(), clips, DecoderLossParams(0.0, 0, 0.0, 1.0), perceptual=network)
    assert loss(context())["loss"] > absolute_error(*[clips(None).frames] * 2, None)
    assert not any(weight.requires_grad for weight in network.parameters())


def test_another_file_is_no_perceptual_network(tmp_path):
    torch.save({"features.0.weight": torch.zeros(1)}, tmp_path / "x.pth")
    for path in (tmp_path / "x.pth", tmp_path / "gone.pth"):
        with pytest.raises(VideoLDMError, match="does not hold torchvision's VGG16 weights"):
            VGGDistance(path)
