"""Training whole video networks: pictures beside clips, known frames through the input, clips made of pictures."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from video_ldm.temporal.diffusion import Diffusion
from video_ldm.temporal.errors import VideoLDMError
from video_ldm.temporal.params import COPIES, GREY, MASK_FIRST, MASK_LAST, InputFramesParams
from video_ldm.temporal.training.batch import Batch
from video_ldm.temporal.training.clips import Clips
from video_ldm.temporal.training.loop import Loop, LoopParams, StepContext
from video_ldm.temporal.training.loss_inputs import map_tensors, tensors_of
from video_ldm.temporal.training.moving_pictures import MovingPictures, patches_of
from video_ldm.temporal.training.network import FIRST, MOST_NOISE, NetworkLoss, widened
from video_ldm.temporal.training.temporal import TemporalLoss
from video_ldm.temporal.upscaler import fold_pixels
from video_ldm.tests.training_worker import FRAMES, TEXT, TinyUNet, tiny_stack, tiny_videos

DIFFUSION = Diffusion(0.0015, 0.0195, prediction="v")
A4 = InputFramesParams(MASK_LAST, positions=((0, -1),))
TI = InputFramesParams(COPIES)
SEINE = InputFramesParams(MASK_FIRST, given=0.0, filler=GREY, positions=((), (0,)))


def step(number=0):
    return StepContext.make(number, 0)


def network(takes=None, seed=0, **more):
    """A tiny UNet for known frames of this form, made of one without them, and its temporal layers."""
    torch.manual_seed(seed)
    plain = TinyUNet()
    if takes is None:
        return plain, plain, tiny_stack(plain)
    unet, channels = TinyUNet(), 4 + takes.channels
    unet.input_blocks[0][0] = nn.Conv2d(channels, 32, 3, padding=1)
    unet.load_state_dict(widened(plain.state_dict(), channels))
    stack = tiny_stack(unet)
    stack.params = replace(stack.params, input_frames=takes, **more)
    return plain, unet, stack


def clips(frames=FRAMES, batch=2, **more):
    videos, texts = tiny_videos()
    return Clips(videos, frames, batch, embeddings=texts, **more)


def images(count=3):
    generator = torch.Generator().manual_seed(4)
    drawn = Batch(torch.randn(count, 4, 6, 8, generator=generator), torch.randn(count, 3, TEXT, generator=generator))
    return lambda step: drawn


def seen(loss, number=0):
    """What the UNet is given in a step, clips first: all inputs `n c h w`."""
    inputs = []
    handle = loss.backbone.input_blocks[0][0].register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    loss(step(number))
    handle.remove()
    return inputs


# Pictures beside clips

@pytest.mark.parametrize("takes", [None, A4])
def test_the_gradient_of_the_pictures_loss_by_every_temporal_weight_is_exactly_zero(takes):
    """docs/papers.md#l9, in one graph with the clips: what the pictures add to the gradient is 0, bit for bit."""
    _, unet, stack = network(takes)
    loss = NetworkLoss(unet, stack, DIFFUSION, clips(), images=images(), image_weight=0.5)
    figures = loss(step())
    weights = list(stack.parameters())
    pictures = torch.autograd.grad(figures["image"], weights, allow_unused=True, retain_graph=True)
    assert pictures == (None,) * len(weights)
    joint = torch.autograd.grad(figures["loss"], weights, retain_graph=True)
    alone = torch.autograd.grad(figures["video"], weights)
    assert all(torch.equal(one, other) for one, other in zip(joint, alone))
    assert any(gradient.abs().max() > 0 for gradient in alone)
    assert figures["loss"].item() == pytest.approx((figures["video"] + 0.5 * figures["image"]).item())
    assert all(p.requires_grad for p in unet.parameters()) and set(loss.modules) == {"spatial", "temporal"}


def test_a_network_without_known_frames_trains_as_temporal_layers_with_their_spatial_ones_do():
    _, unet, stack = network()
    loss = NetworkLoss(unet, stack, DIFFUSION, clips(), images=images())
    same = TemporalLoss(unet, stack, DIFFUSION, clips(), images=images(), train_spatial=True)
    assert loss(step())["loss"].item() == same(step())["loss"].item()


def test_pictures_in_a_network_with_known_frames_know_none():
    _, unet, stack = network(A4)
    inputs = seen(NetworkLoss(unet, stack, DIFFUSION, clips(), images=images(), most_noise=MOST_NOISE))
    assert [x.shape for x in inputs] == [(2 * FRAMES, 9, 6, 8), (3, 9, 6, 8)]
    assert not inputs[1][:, 4:].any()


# Known frames through the input

@pytest.mark.parametrize("takes", [A4, TI])
def test_a_widened_network_begins_as_the_one_it_is_made_from_bit_for_bit(takes):
    plain, unet, _ = network(takes)
    generator = torch.Generator().manual_seed(9)
    x, further = (torch.randn(5, channels, 6, 8, generator=generator) for channels in (4, takes.channels))
    tau, text = torch.full((5,), 300), torch.randn(5, 3, TEXT, generator=generator)
    assert torch.equal(unet(torch.cat([x, further], 1), tau, text), plain(x, tau, text))
    assert unet.input_blocks[0][0].weight.shape[1] == 4 + takes.channels


def test_the_known_frames_follow_the_noisy_latents_with_their_mask_last():
    """Video LDM, appendix H.2: noisy latents, masked latents, mask. Without noise they are the clean ones."""
    _, unet, stack = network(A4)
    loss = NetworkLoss(unet, stack, DIFFUSION, clips())
    (x,) = seen(loss)
    masked, mask = x[:, 4:8].unflatten(0, (2, FRAMES)), x[:, 8].unflatten(0, (2, FRAMES))
    clean = clips()(step()).latents
    assert torch.equal(masked[:, [0, -1]], clean[:, [0, -1]]) and not masked[:, 1:-1].any()
    assert mask[:, [0, -1]].eq(1).all() and not mask[:, 1:-1].any()
    (again,) = seen(loss)
    assert torch.equal(x, again) and not torch.equal(x[:, :4], x[:, 4:8])


def test_known_frames_get_noise_of_a_level_that_is_drawn_for_each_clip():
    """Level 0 changes nothing. Other levels are the network's own schedule, and at most MOST_NOISE."""
    _, unet, stack = network(A4)
    generator = torch.Generator().manual_seed(1)
    clean = torch.full((400, FRAMES, 4, 6, 8), 3.0)
    further = NetworkLoss(unet, stack, DIFFUSION, clips(), most_noise=MOST_NOISE).draw_further(A4, clean, generator)
    known = further.unflatten(0, (400, FRAMES))[:, [0, -1], :4]
    signal, spread = known.mean((2, 3, 4)) / 3, known.std((2, 3, 4))
    least, most = DIFFUSION.alpha[MOST_NOISE], DIFFUSION.sigma[MOST_NOISE]
    assert signal.min() > least - 0.04 and spread.max() < most * 1.2 and spread.max() > most * 0.85
    assert torch.allclose(signal[:, 0].square() + spread[:, 0].square(), torch.ones(400), atol=0.2)
    assert (signal[:, 0] - signal[:, 1]).abs().max() < 0.08         # one level for a clip
    assert not further.unflatten(0, (400, FRAMES))[:, 1:-1].any()
    few = NetworkLoss(unet, stack, DIFFUSION, clips(), most_noise=1).draw_further(A4, clean, generator)
    still = (few.unflatten(0, (400, FRAMES))[:, 0, :4] == 3.0).flatten(1).all(1).float().mean()
    assert 0.4 < still < 0.6                     # half of the clips have level 0


def test_copies_are_those_of_the_key_frame_that_lavie_gives_each_frame():
    """Frame k has the copy of key frame (k + 1) // 4, which is frame 4 ((k + 1) // 4) of the clip."""
    _, unet, stack = network(TI)
    loss = NetworkLoss(unet, stack, DIFFUSION, clips(9), most_noise=MOST_NOISE)
    (x,) = seen(loss)
    clean = clips(9)(step()).latents
    assert torch.equal(x[:, 4:].unflatten(0, (2, 9)), clean[:, [0, 0, 0, 4, 4, 4, 4, 8, 8]])


def test_the_sets_of_known_frames_are_drawn_for_each_clip_and_grey_fills_the_others():
    _, unet, stack = network(SEINE)
    grey = torch.full((4, 6, 8), 0.25)
    loss = NetworkLoss(unet, stack, DIFFUSION, clips(), grey=grey, images=images())
    further = loss.draw_further(SEINE, torch.ones(60, FRAMES, 4, 6, 8), step().generator).unflatten(0, (60, FRAMES))
    given = further[:, :, 0, 0, 0] == 0
    assert not given[:, 1:].any() and 15 < given[:, 0].sum() < 45
    assert (further[:, :, 1:] == torch.where(given, 1.0, 0.25)[:, :, None, None, None]).all()
    assert (seen(loss)[1][:, 5:] == 0.25).all() and (seen(loss)[1][:, 4] == 1).all()


def test_a_step_can_be_recorded_all_that_is_random_is_drawn_before_it():
    """What `draw` returns is tensors and numbers, and `compute` gives the same figures from a copy of them."""
    _, unet, stack = network(SEINE)
    loss = NetworkLoss(unet, stack, DIFFUSION, clips(), images=images(), most_noise=MOST_NOISE,
                       grey=torch.full((4, 6, 8), 0.25), null_context=torch.zeros(3, TEXT), dropout=0.5)
    inputs = loss.draw(step())
    copied = map_tensors(inputs, torch.clone)
    torch.manual_seed(8)
    first = loss.compute(inputs)
    torch.manual_seed(9)
    assert all(torch.equal(first[name], value) for name, value in loss.compute(copied).items())
    assert any(tensor is inputs.further for tensor in tensors_of(inputs))


def test_gradient_checkpointing_gives_a_network_the_same_gradients():
    found = []
    for checkpointing in (False, True):
        _, unet, stack = network(A4)
        loss = NetworkLoss(unet, stack, DIFFUSION, clips(), images=images(), checkpointing=checkpointing)
        loss(step())["loss"].backward()
        found.append([p.grad for module in (unet, stack) for p in module.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_a_resumed_training_of_a_network_equals_an_uninterrupted_one(tmp_path):
    def loop(folder):
        _, unet, stack = network(A4)
        loss = NetworkLoss(unet, stack, DIFFUSION, clips(), images=images(), most_noise=MOST_NOISE,
                           null_context=torch.zeros(3, TEXT), dropout=0.5)
        return Loop(LoopParams(4, 1e-3, warmup=0, save_every=2, log_every=1, device="cpu"), loss.modules, loss,
                    tmp_path / folder, "tiny network")
    whole, halves = loop("whole"), loop("halves")
    assert whole.run() and not halves.run(on_step=lambda number, steps: number == 2)
    resumed = loop("halves")
    assert resumed.step == 2 and resumed.run()
    for name in ("spatial", "temporal"):
        one, other = whole.ema_state(name), resumed.ema_state(name)
        assert all(torch.equal(one[key], other[key]) for key in one)
        start = {"spatial": network(A4)[1], "temporal": network(A4)[2]}[name].state_dict()
        assert all(not torch.equal(one[key], start[key]) for key in one)


@pytest.mark.parametrize("make, match", [
    (lambda: widened({"conv_in.weight": torch.zeros(1)}, 8), "no 'input_blocks.0.0.weight'"),
    (lambda: widened({FIRST: torch.zeros(32, 9, 3, 3)}, 8), "takes 9 channels, and the one to train takes 8"),
    (lambda: NetworkLoss(network()[1], network(A4)[2], DIFFUSION, clips()), "takes 4 input channels.*are 9"),
    (lambda: NetworkLoss(*network(A4)[1:], DIFFUSION, clips(), most_noise=1000), "0 to 999 steps, not 1000"),
    (lambda: NetworkLoss(*network(TI)[1:], DIFFUSION, clips(5), images=images()), "a picture has none"),
    (lambda: NetworkLoss(*network(replace(A4, positions=None))[1:], DIFFUSION, clips()), "name none"),
    (lambda: NetworkLoss(*network(TI)[1:], DIFFUSION, clips(8))(step()), "Clips of 8 frames.*4 n \\+ 1"),
    (lambda: NetworkLoss(*network(SEINE)[1:], DIFFUSION, clips())(step()), "mid-grey"),
])
def test_networks_that_cannot_be_trained_are_refused_with_a_sentence(make, match):
    with pytest.raises(VideoLDMError, match=match):
        make()


# Clips made of pictures

def picture(height=40, width=60):
    """A picture in which every pixel is different: its row, its column, and 7."""
    rows, columns = np.mgrid[:height, :width]
    return np.stack([rows, columns, np.full_like(rows, 7)], axis=-1).astype(np.uint8)


def corners(clip):
    """The place of the window in each frame of a clip (t 3 h w): rows and columns."""
    return ((clip[:, :2, 0, 0] + 1) * 127.5).round().int().tolist()


def test_a_moving_picture_is_a_window_that_goes_along_a_line_in_whole_pixels_inside_the_picture():
    draw = MovingPictures([picture(), picture(30, 33)], 8, 24, 32, 20, fastest=3)
    batch = draw(step())
    assert batch.latents.shape == (20, 8, 3, 24, 32)
    expected = torch.from_numpy(picture()).movedim(-1, 0).float() / 127.5 - 1
    moved = 0
    for clip in batch.latents:
        places = corners(clip)
        for frame, (top, left) in zip(clip, places):
            assert torch.equal(frame, expected[:, top:top + 24, left:left + 32])
        steps = np.diff(places, axis=0)
        assert np.abs(steps).max() <= 3 and (np.ptp(steps, axis=0) <= 1).all()         # a line, up to rounding
        moved += len(set(map(tuple, places))) > 1
    assert moved > 15 and torch.equal(draw(step()).latents, batch.latents)
    assert not torch.equal(draw(step(1)).latents, batch.latents)
    still = MovingPictures([picture()], 8, 24, 32, 2, fastest=0)(step()).latents
    assert torch.equal(still[:, :1].expand_as(still), still)


def test_moving_pictures_are_patches_for_an_upscaler_with_the_text_of_their_picture():
    texts = torch.arange(3.0)[:, None, None].expand(3, 2, TEXT)
    draw = MovingPictures([picture(), picture()], 4, 16, 24, 3, 2, embeddings=texts, captions=[2, 0])
    patches = patches_of(draw, fold_pixels)(step())
    clip = draw(step())
    assert torch.equal(patches.x, fold_pixels(clip.latents)) and patches.x_low.shape == (3, 4, 3, 4, 6)
    assert torch.allclose(patches.x_low[1, 2, 0, 1, 1], clip.latents[1, 2, 0, 4:8, 4:8].mean())
    assert set(patches.context[:, 0, 0].tolist()) <= {2.0, 0.0} and torch.equal(patches.context, clip.context)


@pytest.mark.parametrize("change, match", [
    (dict(pictures=[]), "no pictures"), (dict(height=41), "32x41.*picture 0 has 60x40"), (dict(frames=0), "not 0, 24"),
    (dict(embeddings=torch.zeros(3, 2, 4)), "1 pictures came with 3 captions")])
def test_pictures_that_make_no_clips_are_refused_with_a_sentence(change, match):
    with pytest.raises(VideoLDMError, match=match):
        MovingPictures(**{**dict(pictures=[picture()], frames=8, height=24, width=32, batch=1, fastest=1), **change})
