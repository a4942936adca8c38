"""Known frames of prediction and interpolation layers: docs/papers.md#statements-on-video-ldm, V9, V11 and V12."""

import copy
import math

import pytest
import torch
from torch.nn.functional import conv2d, silu

from video_ldm.temporal.call import CallSettings, open_call
from video_ldm.temporal.conditioning import (
    add_context_input,
    context_input,
    context_input_from_latents,
    context_mask,
    initialise_stack,
    resolve_positions,
)
from video_ldm.temporal.errors import VideoLDMError
from video_ldm.temporal.families import load_temporal, video_ldm
from video_ldm.temporal.formats.temporal_file import Base, Schedule
from video_ldm.temporal.layers import ContextDownsampler
from video_ldm.temporal.layers.position import timestep_sinusoid
from video_ldm.temporal.new_layers import video_ldm_params
from video_ldm.temporal.params import BOTH_ENDS, FIRST_FRAMES
from video_ldm.temporal.slots import unet_sites
from video_ldm.temporal.stack import TemporalStack
from video_ldm.temporal.training.checkpointing import open_call_checkpointed
from video_ldm.temporal.unet import unet_levels
from video_ldm.tests.small import EMB_DIM, batch, randomise, small_stack, small_unet

FRAMES = 5


def run(unet, stack, x, t, context, **settings):
    with torch.no_grad(), open_call(unet, [(stack, CallSettings(frames=FRAMES, **settings))], context=context):
        return unet(x, t, context=context)


def context_stack(unet, positions=FIRST_FRAMES, seed=3, **options):
    params = add_context_input(small_stack(unet, FRAMES).params, levels=2, positions=positions, channels=16, **options)
    return randomise(TemporalStack(params), seed)


@pytest.fixture(scope="module")
def unet():
    return small_unet()


def test_the_context_input_is_the_masked_latents_and_the_mask():
    z = torch.randn(2, FRAMES, 4, 3, 2)
    c = context_input(z, context_mask((0, -1), FRAMES).expand(2, -1)).unflatten(0, (2, FRAMES))
    assert c.shape == (2, FRAMES, 5, 3, 2)
    assert torch.equal(c[:, [0, 4], :4], z[:, [0, 4]]) and (c[:, 1:4] == 0).all()
    assert (c[:, [0, 4], 4] == 1).all()


def test_what_stands_in_unknown_frames_does_not_matter():
    z = torch.randn(1, FRAMES, 4, 3, 2)
    poisoned = z.clone()
    poisoned[:, 1:] = torch.nan
    mask = context_mask((0,), FRAMES)[None]
    assert torch.equal(context_input(z, mask), context_input(poisoned, mask))


def test_known_frames_alone_give_the_same_input_as_the_whole_clip():
    z = torch.randn(3, FRAMES, 4, 3, 2)
    whole = context_input(z, context_mask((0, 1), FRAMES).expand(3, -1))
    assert torch.equal(context_input_from_latents(z[:, :2].flatten(0, 1), (0, 1), FRAMES, 3), whole)
    one = context_input_from_latents(z[0, :2], (0, 1), FRAMES, 3).unflatten(0, (3, FRAMES))
    assert torch.equal(one[0], one[2]) and torch.equal(one[0], whole[:FRAMES])


@pytest.mark.parametrize("positions, frames, sentence", [
    ((5,), 5, "Context frame 5 lies outside the clip, whose frames are 0 to 4"),
    ((-6,), 5, "Context frame -6 lies outside"),
    ((0, -5), 5, "name the same frame twice"),
    ((0, 1), 2, "All 2 frames of the clip are context frames"),
    ((0,), 1, "All 1 frames")])
def test_positions_that_make_no_sense_are_refused(positions, frames, sentence):
    with pytest.raises(VideoLDMError, match=sentence):
        resolve_positions(positions, frames)


def test_context_for_another_number_of_clips_is_refused():
    with pytest.raises(VideoLDMError, match="given for 2 clips, and 3 clips are sampled"):
        context_input_from_latents(torch.zeros(2, 4, 3, 2), (0,), FRAMES, 3)


def test_every_resblock_takes_the_context_channels_of_its_own_resolution(unet):
    levels = unet_levels(unet)
    shapes = {}

    def noting(key):
        return lambda module, args, out: shapes.update({key: out.shape[2:]})
    handles = [module.register_forward_hook(noting((site.part, site.index)))
               for site, (module, _) in unet_sites(unet).items() if site.slot == "post_res"]
    x, t, context = batch(1, 1, height=9, width=12)        # odd: the downsampler must round as the network does
    with torch.no_grad():
        unet(x, t, context=context)
    for handle in handles:
        handle.remove()
    stack = context_stack(unet)
    maps = stack.context_downsampler(torch.zeros(1, 5, 9, 12))
    assert {level: set(shapes[key] for key in shapes if levels[key] == level) for level in (0, 1)} == {
        0: {maps[0].shape[2:]}, 1: {maps[1].shape[2:]}}


def test_blocks_that_another_node_runs_smaller_take_the_known_frames_at_their_size(unet):
    """As PatchModelAddDownscale does (deep shrink), from the second level on."""
    def shrink(h, transformer_options):
        return h[..., ::2, ::2] if transformer_options["block"][1] == 1 else h

    def grow(h, hsp, transformer_options):
        return torch.nn.functional.interpolate(h, hsp.shape[2:]), hsp
    patches = {"patches": {"input_block_patch_after_skip": [shrink], "output_block_patch": [grow]}}
    stack, (x, t, context) = context_stack(unet), batch(1, FRAMES)
    made, frame = [], torch.randn(1, 4, 1, 1)
    handle = stack.context_downsampler.register_forward_hook(lambda module, args, maps: made.append(maps))
    whole, half = (context_input_from_latents(frame.expand(-1, -1, *size), (0,), FRAMES, 1)
                   for size in ((8, 12), (4, 6)))
    with torch.no_grad(), open_call(unet, [(stack, CallSettings(frames=FRAMES, known=whole))], context=context):
        seen = unet(x, t, context=context, transformer_options=patches)
    with torch.no_grad(), open_call(unet, [(stack, CallSettings(frames=FRAMES))], context=context):
        without = unet(x, t, context=context, transformer_options=patches)
    handle.remove()
    smaller = [maps[1] for maps in made if maps[0].shape[2:] == (4, 6)]
    expected = stack.context_downsampler(half)[1]
    assert expected.shape[2:] == (2, 3) and (smaller[0] - expected).abs().max() < 1e-5 * expected.abs().max()
    assert (seen[1:] - without[1:]).abs().max() > 1e-3 * without.abs().max()


def test_context_changes_the_output_and_no_context_is_the_all_zero_mask(unet):
    stack = context_stack(unet)
    x, t, context = batch(2, FRAMES)
    known = context_input_from_latents(torch.randn(2, 4, *x.shape[2:]), (0,), FRAMES, 2)
    without = run(unet, stack, x, t, context)
    assert torch.equal(without, run(unet, stack, x, t, context, known=torch.zeros_like(known)))
    assert (run(unet, stack, x, t, context, known=known) - without).abs().max() > 1e-3 * without.abs().max()


def test_context_acts_through_the_temporal_convolutions_alone(unet):
    stack = context_stack(unet)
    x, t, context = batch(1, FRAMES)
    known = context_input_from_latents(torch.randn(1, 4, *x.shape[2:]), (0,), FRAMES, 1)
    for site, _ in stack.params.bricks:      # alpha 1 at the convolutions; attention stays at work
        if site.slot == "post_res":
            stack.layers[site.name].time_mixer.mix_factor.data.fill_(float("inf"))
    assert torch.equal(run(unet, stack, x, t, context, known=known), run(unet, stack, x, t, context))
    plain = unet(x, t, context=context)
    assert torch.equal(run(unet, stack, x, t, context, known=known, strength=0), plain)


def test_layers_without_context_extend_losslessly(unet):
    plain = small_stack(unet, FRAMES)
    params = add_context_input(plain.params, levels=2, positions=FIRST_FRAMES, channels=16, fps_width=768)
    assert all(brick.context_channels in (0, 16) for _, brick in params.bricks if hasattr(brick, "context_channels"))
    stack = TemporalStack(params)
    initialise_stack(stack, plain.state_dict())
    for name, weight in stack.state_dict().items():
        if name.endswith("in_layers.2.weight"):
            channels = weight.shape[0]
            assert weight.shape[1] == channels + 16 and (weight[:, channels:] == 0).all()
    bare = TemporalStack(add_context_input(plain.params, levels=2, positions=FIRST_FRAMES, channels=16))
    initialise_stack(bare, plain.state_dict())
    x, t, context = batch(1, FRAMES)
    known = context_input_from_latents(torch.randn(1, 4, *x.shape[2:]), (0,), FRAMES, 1)
    expected = run(unet, plain, x, t, context)
    ours = run(unet, bare, x, t, context, known=known)
    assert (ours - expected).abs().max() < 1e-5 * expected.abs().max()      # a wider convolution sums in another order


def test_the_new_columns_learn_from_the_first_step(unet):
    plain = small_stack(unet, FRAMES)
    stack = TemporalStack(add_context_input(plain.params, levels=2, positions=FIRST_FRAMES, channels=16))
    initialise_stack(stack, plain.state_dict())
    x, t, context = batch(1, FRAMES)
    known = context_input_from_latents(torch.randn(1, 4, *x.shape[2:]), (0,), FRAMES, 1)
    with open_call(unet, [(stack, CallSettings(frames=FRAMES, known=known))], context=context):
        unet(x, t, context=context).square().mean().backward()
    columns = stack.layers["input_1_post_res_0"].time_stack.in_layers[2].weight.grad[:, -16:]
    assert columns.abs().max() > 0
    unet.zero_grad(set_to_none=True)


def test_checkpointed_training_gives_the_same_gradients(unet):
    x, t, context = batch(2, FRAMES)
    known = context_input_from_latents(torch.randn(2, 4, *x.shape[2:]), (0, -1), FRAMES, 2)
    gradients = []
    for opened in (open_call, open_call_checkpointed):
        stack = context_stack(unet, BOTH_ENDS, fps_width=768)
        with opened(unet, [(stack, CallSettings(frames=FRAMES, known=known, fps=8.0))], context=context):
            unet(x, t, context=context).square().mean().backward()
        gradients.append({name: weight.grad for name, weight in stack.named_parameters()})
        unet.zero_grad(set_to_none=True)
    plain, kept_less = gradients
    assert all(plain[name].abs().max() > 0 for name in plain if name.startswith(("context_downsampler", "fps_token")))
    for name, gradient in plain.items():
        assert (kept_less[name] - gradient).abs().max() <= 1e-5 * gradient.abs().max(), name


def test_the_frame_rate_that_a_clip_is_told_changes_that_clip_alone(unet):
    stack = context_stack(unet, BOTH_ENDS, fps_width=768)
    x, t, context = batch(2, FRAMES)
    slow, fast = run(unet, stack, x, t, context, fps=7.5), run(unet, stack, x, t, context, fps=30.0)
    assert (slow - fast).abs().max() > 1e-4 * slow.abs().max()
    both = run(unet, stack, x, t, context, fps=torch.tensor([7.5, 30.0])).unflatten(0, (2, FRAMES))
    assert (both[0] - slow[:FRAMES]).abs().max() < 1e-5 * slow.abs().max()
    assert (both[1] - fast[FRAMES:]).abs().max() < 1e-5 * fast.abs().max()
    with pytest.raises(VideoLDMError, match="are told the frame rate to make"):
        run(unet, stack, x, t, context)


def test_the_frame_rate_token_is_the_sinusoid_of_100_log2_of_the_rate(unet):
    """[cos | sin] of 100 log2(fps) at frequencies 10000^(-i / half), then two linear layers with SiLU between."""
    token, rates, half = context_stack(unet, BOTH_ENDS, fps_width=768).fps_token, (1.875, 8.0, 30.0), 384
    weights = {name: weight.detach().double() for name, weight in token.named_parameters()}
    first, last = sorted({name.rsplit(".", 1)[0] for name in weights})
    for rate, ours in zip(rates, token(torch.tensor(rates), torch.zeros(1)).detach()):
        angles = [100 * math.log2(rate) * 10000 ** (-i / half) for i in range(half)]
        wave = torch.tensor([math.cos(a) for a in angles] + [math.sin(a) for a in angles], dtype=torch.float64)
        hidden = weights[f"{first}.weight"] @ wave + weights[f"{first}.bias"]
        hidden = hidden / (1 + (-hidden).exp())
        expected = weights[f"{last}.weight"] @ hidden + weights[f"{last}.bias"]
        assert ours.shape == (1, 768) and (ours[0] - expected).abs().max() < 1e-4 * expected.abs().max()


def test_frame_numbers_are_embedded_as_cosines_then_sines_and_an_odd_width_ends_with_a_zero():
    for width in (4, 5):
        for number, row in zip((0, 3), timestep_sinusoid(torch.tensor([0, 3]), width)):
            expected = [math.cos(number), math.cos(number / 100), math.sin(number), math.sin(number / 100), 0.0]
            assert row.tolist() == pytest.approx(expected[:width], abs=1e-6)


def test_known_frames_of_another_size_are_refused(unet):
    x, t, context = batch(1, FRAMES)
    with pytest.raises(VideoLDMError, match="where the clip takes"):
        run(unet, context_stack(unet), x, t, context, known=torch.zeros(FRAMES, 5, 4, 4))


def test_layers_without_convolutions_take_no_context(unet):
    params = video_ldm_params(unet, EMB_DIM, 768, lambda channels: 8, FRAMES, convolution=False)
    with pytest.raises(VideoLDMError, match="have no temporal convolutions"):
        add_context_input(params, 2, FIRST_FRAMES)


def test_layers_for_a_shallower_network_are_refused(unet):
    stack = randomise(TemporalStack(add_context_input(small_stack(unet, FRAMES).params, 1, FIRST_FRAMES, channels=16)))
    with pytest.raises(VideoLDMError, match="halves its latents 1 times"):
        run(unet, stack, *batch(1, FRAMES))


# Files

def written(tmp_path, unet, **options):
    stack = context_stack(unet, **options)
    path = tmp_path / "layers.safetensors"
    video_ldm.write(path, stack, stack.params, schedule=Schedule("linear", 0.0015, 0.0195, "v"), base=Base("tiny", 768))
    return stack, path


@pytest.mark.parametrize("positions, fps_width", [(FIRST_FRAMES, 0), (BOTH_ENDS, 768)])
def test_a_file_of_context_layers_comes_back_whole(tmp_path, unet, positions, fps_width):
    stack, path = written(tmp_path, unet, positions=positions, fps_width=fps_width)
    layers = load_temporal(path)
    assert layers.params == stack.params and layers.metadata["version"] == "2"
    assert all(torch.equal(layers.tensors[key], value) for key, value in stack.state_dict().items())
    assert any("Takes context frames" in note for note in layers.notes)


def test_layers_without_context_stay_in_version_1(tmp_path, unet):
    stack, path = small_stack(unet, FRAMES), tmp_path / "plain.safetensors"
    video_ldm.write(path, stack, stack.params, schedule=Schedule("linear", 0.0015, 0.0195, "v"), base=Base("tiny", 768))
    assert load_temporal(path).metadata["version"] == "1"


@pytest.mark.parametrize("damage, sentence", [
    (lambda m, t: m.pop("context_positions"), "its context frames lack their positions"),
    (lambda m, t: m.update(context_positions="first"), "no list of lists"),
    (lambda m, t: m.update(context_positions="[]"), "no set of context frames at all"),
    (lambda m, t: [t.pop(key) for key in list(t) if key.startswith("context_downsampler")], "lack the downsampler"),
    (lambda m, t: t.pop("context_downsampler.steps.1.bias"), "incomplete")])
def test_a_damaged_file_of_context_layers_is_refused(tmp_path, unet, damage, sentence):
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file
    _, path = written(tmp_path, unet)
    with safe_open(path, framework="pt") as file:
        metadata = dict(file.metadata())
    tensors = copy.copy(load_file(path))
    damage(metadata, tensors)
    bad = tmp_path / "bad.safetensors"
    save_file(tensors, bad, metadata=metadata)
    with pytest.raises(VideoLDMError, match=sentence):
        load_temporal(bad)


@torch.no_grad()
def test_the_downsampler_is_a_convolution_and_for_each_further_resolution_silu_and_one_of_stride_2():
    known = torch.randn(3, 5, 9, 6, generator=torch.Generator().manual_seed(4))
    downsampler = randomise(ContextDownsampler(5, 8, 3))
    first, second, third = ((step.weight, step.bias) for step in downsampler.steps)
    maps = [conv2d(known, *first, padding=1)]
    for weights in (second, third):
        maps.append(conv2d(silu(maps[-1]), *weights, stride=2, padding=1))
    assert [tuple(level.shape) for level in maps] == [(3, 8, 9, 6), (3, 8, 5, 3), (3, 8, 3, 2)]
    assert all(torch.equal(ours, level) for ours, level in zip(downsampler(known), maps, strict=True))
