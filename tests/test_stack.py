"""What must be true of temporal layers on a UNet: docs/papers.md#statements-on-video-ldm, V1 to V8, V16 and V17."""

import threading
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from video_ldm.temporal.call import CallSettings, open_call
from video_ldm.temporal.errors import VideoLDMError
from video_ldm.temporal.layers import (
    Factory,
    GivenCall,
    Mix,
    MotionModule,
    MotionParams,
    ResBlockParams,
    TemporalResBlock,
    TemporalTransformer,
    TransformerParams,
    motion,
)
from video_ldm.temporal.layers.attention import contiguous_sum
from video_ldm.temporal.new_layers import video_ldm_params
from video_ldm.temporal.params import StackParams
from video_ldm.temporal.slots import Site, unet_sites
from video_ldm.temporal.spatial_changes import POOLED_NORMS
from video_ldm.temporal.stack import TemporalStack
from video_ldm.temporal.unet import is_resblock, spatial_norms, unet_blocks
from video_ldm.tests.small import (
    EMB_DIM,
    SD15_SIZE,
    batch,
    randomise,
    relative_error,
    small_stack,
    small_unet,
    unet_model,
)

T = 4
TRANSFORMER = TransformerParams(64, 4, 96, 1)


@pytest.fixture(scope="module")
def unet():
    return small_unet()


@pytest.fixture(scope="module")
def stack(unet):
    return small_stack(unet, T)


@torch.no_grad()
def call(unet, sets, x, timesteps, context):
    with open_call(unet, sets, context):
        return unet(x, timesteps, context=context)


def motion_stack(unet, pool=False, table_length=0, positions=32):
    bricks = tuple((site, MotionParams(channels, 8, 1, 2, table_length, False))
                   for site, (_, channels) in unet_sites(unet).items() if site.slot == "post_attn")
    params = StackParams("AnimateDiff", bricks, 16, positions, (POOLED_NORMS,) if pool else ())
    return randomise(TemporalStack(params), 3)


# docs/papers.md#v3

@pytest.mark.parametrize("context_dim, expected", [(768, 649_687_078), (1024, 656_076_838)])
def test_a_stable_diffusion_unet_gets_22_resblocks_16_transformers_and_the_papers_parameter_count(
        context_dim, expected):
    unet = unet_model(dict(SD15_SIZE, context_dim=context_dim), device="meta")
    params = video_ldm_params(unet, 1280, context_dim, lambda channels: 8, 8)
    stack = TemporalStack(params, Factory(device="meta"))
    slots = [site.slot for site, _ in params.bricks]
    assert (slots.count("post_res"), slots.count("in_attn_post_ff")) == (22, 16)
    assert sum(isinstance(module, Mix) for module in stack.modules()) == 38
    assert sum(weight.numel() for weight in stack.parameters()) == expected


# docs/papers.md#v1, #v2 and #v4

def test_strength_0_is_bit_identical_to_the_image_model_even_with_nan_in_the_layers(unet, stack):
    x, timesteps, context = batch(2, T)
    image = call(unet, [], x, timesteps, context)
    assert torch.equal(call(unet, [(stack, CallSettings(T, 0.0))], x, timesteps, context), image)
    broken = small_stack(unet, T)
    nn.init.constant_(next(broken.parameters()), float("nan"))
    assert torch.equal(call(unet, [(broken, CallSettings(T, 0.0))], x, timesteps, context), image)


def test_permuting_frames_permutes_the_image_models_outputs_but_not_the_video_models(unet, stack):
    x, timesteps, context = batch(1, T)
    order = torch.tensor([2, 0, 3, 1])
    image = call(unet, [], x, timesteps, context)
    assert relative_error(call(unet, [], x[order], timesteps, context), image[order]) < 1e-6
    layers = [(stack, CallSettings(T))]
    video = call(unet, layers, x, timesteps, context)
    assert relative_error(call(unet, layers, x[order], timesteps, context), video[order]) > 1e-2


def test_alpha_weights_the_spatial_branch():
    spatial, temporal = torch.randn(2, T, 3), torch.randn(2, T, 3)
    mix = Mix()
    for factor, expected in ((1e4, spatial), (-1e4, temporal)):
        nn.init.constant_(mix.mix_factor, factor)
        assert torch.equal(mix(spatial, temporal, T), expected)
    nn.init.constant_(mix.mix_factor, 0.3)
    alpha = torch.sigmoid(torch.tensor(0.3))
    assert relative_error(mix(spatial, temporal, T), alpha * spatial + (1 - alpha) * temporal) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_gradients_the_mix_and_the_positions_are_the_same_to_the_bit(dtype):
    """They then work in place and in one pass over memory."""
    mix, numbers = Mix(T), torch.Generator().manual_seed(0)
    with torch.no_grad():
        mix.mix_factor.copy_(torch.tensor([1e4, -1e4, 0.3, 1e4]))
    spatial, temporal = (torch.randn(2 * T, 3, 5, generator=numbers).to(dtype) for _ in range(2))
    temporal[0], temporal[3] = float("nan"), float("inf")       # frames of alpha 1
    for strength in (1.0, 0.5, 0.0):
        with torch.enable_grad():
            expected = mix(spatial, temporal.clone(), T, strength)
        with torch.no_grad():
            assert torch.equal(mix(spatial, temporal.clone(), T, strength), expected)
        assert torch.isfinite(expected).all() and torch.equal(expected[[0, 3]], spatial[[0, 3]])
    view, positions = spatial.transpose(0, 1), torch.randn(2 * T, 5, generator=numbers).to(dtype)
    with torch.no_grad():
        made = contiguous_sum(view, positions)
    assert made.is_contiguous() and torch.equal(made, view + positions)


def test_strength_moves_alpha_linearly_towards_the_image_model():
    spatial, temporal = torch.randn(2, T, 3), torch.randn(2, T, 3)
    mix = Mix()
    full, half = mix(spatial, temporal, T), mix(spatial, temporal, T, strength=0.5)
    assert relative_error(half, (spatial + full) / 2) < 1e-6


def test_all_alphas_at_1_give_the_image_model_even_with_nan_in_the_layers(unet):
    stack = small_stack(unet, T)
    for module in stack.modules():
        if isinstance(module, Mix):
            nn.init.constant_(module.mix_factor, 1e4)
    nn.init.constant_(stack.layers["input_1_post_res_0"].time_stack.in_layers[2].weight, float("nan"))
    x, timesteps, context = batch(1, T)
    with_layers = call(unet, [(stack, CallSettings(T))], x, timesteps, context)
    assert torch.equal(with_layers, call(unet, [], x, timesteps, context))


# docs/papers.md#v5

def test_a_mix_over_time_takes_clips_of_its_own_length_alone(unet):
    stack = small_stack(unet, T, mix_length=T)
    x, timesteps, context = batch(2, T)
    call(unet, [(stack, CallSettings(T))], x, timesteps, context)
    with pytest.raises(VideoLDMError, match=f"clips of exactly {T} frames, and the clip has {2 * T}"):
        call(unet, [(stack, CallSettings(2 * T))], x, timesteps, context)


def test_a_mix_over_time_weights_each_frame_with_its_own_alpha():
    spatial, temporal = torch.randn(2 * T, 3, 5), torch.randn(2 * T, 3, 5)
    mix = Mix(T)
    with torch.no_grad():
        mix.mix_factor.copy_(torch.tensor([1e4, -1e4, 1e4, -1e4]))
    out = mix(spatial, temporal, T)
    assert torch.equal(out[0::2], spatial[0::2]) and torch.equal(out[1::2], temporal[1::2])


# docs/papers.md#v6

def test_temporal_convolution_sees_only_its_own_pixel():
    block = TemporalResBlock(ResBlockParams(64, 32, 1))
    randomise(block)
    conv = block.time_stack.in_layers[2]
    x = torch.randn(1, 64, T, 6, 6)
    changed = x.clone()
    changed[..., 2, 3] += 1
    difference = (conv(changed) - conv(x)).abs().amax(dim=(0, 1, 2))
    assert difference[2, 3] > 0
    difference[2, 3] = 0
    assert difference.max() == 0


@pytest.mark.parametrize("kind", ["video ldm", "motion"])
def test_temporal_attention_mixes_neither_places_nor_clips(kind):
    text = torch.randn(2, 7, 96)
    if kind == "video ldm":
        brick, run = TemporalTransformer(TRANSFORMER), lambda brick, x: brick(x, GivenCall(T, text=text))
        x, place = torch.randn(2 * T, 10, 64), (slice(T), 3)
    else:   # below the norm, whose statistics pool over places
        brick, x, place = MotionModule(MotionParams(64, 4)), torch.randn(10 * 2, T, 64), (3,)
        run = lambda brick, x: brick.temporal_transformer.transformer_blocks[0](x)      # noqa: E731
    randomise(brick)
    changed = x.clone()
    changed[place] += torch.randn_like(changed[place])
    with torch.no_grad():
        difference = (run(brick, changed) - run(brick, x)).abs()
    assert difference[place].amax() > 1e-3
    difference[place] = 0
    assert difference.max() == 0


# docs/papers.md#v7

def test_a_fresh_temporal_resblock_is_the_identity_whatever_its_mix():
    block = TemporalResBlock(ResBlockParams(64, 32, 1))
    x, emb = torch.randn(2 * T, 64, 6, 6), torch.randn(2 * T, 32)
    assert relative_error(block(x, GivenCall(T, emb=emb)), x) < 1e-6


def test_a_fresh_motion_module_is_the_identity():
    x = torch.randn(2 * T, 64, 6, 6)
    assert torch.equal(MotionModule(MotionParams(64, 8))(x, GivenCall(T)), x)


@pytest.mark.parametrize("frames", [1, 3, 11])
def test_scalar_mixes_run_any_number_of_frames(unet, stack, frames):
    x, timesteps, context = batch(1, frames)
    seen = call(unet, [(stack, CallSettings(frames))], x, timesteps, context)
    assert relative_error(seen, call(unet, [], x, timesteps, context)) > 1e-3       # the layers act
    both = batch(2, frames)
    alone = call(unet, [(stack, CallSettings(frames))], *(part[:frames] for part in both))
    assert relative_error(call(unet, [(stack, CallSettings(frames))], *both)[:frames], alone) < 1e-5


# docs/papers.md#v8

def test_gradients_reach_every_temporal_parameter_and_no_spatial_one(unet, stack):
    unet.requires_grad_(False)
    stack.zero_grad()
    x, timesteps, context = batch(1, T)
    with open_call(unet, [(stack, CallSettings(T))], context):
        out = unet(x, timesteps, context=context)
    out.square().mean().backward()
    assert all(weight.grad is not None and weight.grad.abs().max() > 0 for weight in stack.parameters())
    assert all(weight.grad is None for weight in unet.parameters())


# docs/papers.md#v16 and #v17

def test_the_attention_band_changes_nothing_up_to_its_length_and_cuts_what_lies_beyond():
    brick = randomise(TemporalTransformer(TRANSFORMER))
    text = torch.randn(1, 7, 96)
    near, far = (GivenCall(frames, text=text, max_distance=8) for frames in (9, 12))
    with torch.no_grad():
        short = torch.randn(9, 5, 64)
        assert torch.equal(brick(short, near), brick(short, GivenCall(9, text=text)))
        long = torch.randn(12, 5, 64)
        changed = long.clone()
        changed[0] += torch.randn_like(changed[0])
        difference = brick(changed, far) - brick(long, far)
        difference = difference.abs().amax(dim=(1, 2))
    assert difference[:9].min() > 0 and difference[9:].max() == 0


def test_the_temporal_text_is_an_input_of_its_own_that_defaults_to_the_spatial_one(unet, stack):
    x, timesteps, context = batch(2, T)
    other = batch(2, T, seed=9)[2]
    usual = call(unet, [(stack, CallSettings(T))], x, timesteps, context)
    same = call(unet, [(stack, CallSettings(T, text=context))], x, timesteps, context)
    swapped = call(unet, [(stack, CallSettings(T, text=other))], x, timesteps, context)
    assert torch.equal(same, usual)
    assert relative_error(swapped, usual) > 1e-3


# Calls

def test_clips_of_a_batch_do_not_see_each_other(unet, stack):
    x, timesteps, context = batch(3, T)
    layers = [(stack, CallSettings(T))]
    together = call(unet, layers, x, timesteps, context)
    changed = x.clone()
    changed[T:2 * T] = torch.randn_like(changed[T:2 * T])
    others = [*range(T), *range(2 * T, 3 * T)]
    assert torch.equal(call(unet, layers, changed, timesteps, context)[others], together[others])
    for clip in range(3):
        own = slice(clip * T, clip * T + T)
        alone = call(unet, layers, x[own], timesteps[own], context[own])
        assert relative_error(alone, together[own]) < 1e-5      # not to the bit: matmuls of another size sum otherwise


def test_nothing_is_left_on_the_network_after_a_call_or_after_one_that_failed(unet, stack):
    x, timesteps, context = batch(1, T)
    before = call(unet, [], x, timesteps, context)
    call(unet, [(stack, CallSettings(T))], x, timesteps, context)
    with pytest.raises(RuntimeError, match="on purpose"):
        with open_call(unet, [(stack, CallSettings(T))], context):
            raise RuntimeError("on purpose")
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in unet.modules())
    assert torch.equal(call(unet, [], x, timesteps, context), before)


def test_two_sets_act_one_after_the_other_and_the_same_set_twice_acts_twice(unet, stack):
    x, timesteps, context = batch(1, T)
    half = CallSettings(T, 0.5)
    once = call(unet, [(stack, half)], x, timesteps, context)
    twice = call(unet, [(stack, half), (stack, half)], x, timesteps, context)
    other = small_stack(unet, T, seed=5)
    both = call(unet, [(stack, half), (other, half)], x, timesteps, context)
    swapped = call(unet, [(other, half), (stack, half)], x, timesteps, context)
    outputs = [once, twice, both, swapped]
    assert all(relative_error(a, b) > 1e-3 for i, a in enumerate(outputs) for b in outputs[:i])


def test_another_thread_running_the_same_network_meanwhile_sees_the_image_model(unet, stack):
    x, timesteps, context = batch(1, T)
    image = call(unet, [], x, timesteps, context)
    seen = []
    with torch.no_grad(), open_call(unet, [(stack, CallSettings(T))], context):
        thread = threading.Thread(target=lambda: seen.append(unet(x, timesteps, context=context).detach()))
        thread.start()
        thread.join()
        unet(x, timesteps, context=context)
    assert torch.equal(seen[0], image)


def test_a_call_that_misses_a_site_raises(unet, stack):
    x, timesteps, context = batch(1, T)
    with pytest.raises(VideoLDMError, match="not reached"):
        with open_call(unet, [(stack, CallSettings(T))], context):
            unet.input_blocks[0](x, timesteps)


def test_layers_for_another_network_are_refused_before_anything_runs(unet):
    bricks = ((Site("input", 7, "post_attn"), MotionParams(64, 8, 1, 2, 0, False)),)
    params = StackParams("AnimateDiff", bricks, 16, 32)
    with pytest.raises(VideoLDMError, match="no place for the temporal layer input_7_post_attn_0"):
        with open_call(unet, [(TemporalStack(params), CallSettings(T))]):
            pass


# AnimateDiff's positions and norms

def test_positions_beyond_the_sinusoid_are_computed_with_a_warning_and_a_learned_table_refuses(unet):
    warning = motion_stack(unet).check_frames(33)
    assert "33 frames exceed the 32 positions" in warning and "16-frame clips" in warning
    assert motion_stack(unet).check_frames(32) is None
    with pytest.raises(VideoLDMError, match="learned table of 24 frame positions"):
        motion_stack(unet, table_length=24).check_frames(25)
    assert motion_stack(unet, table_length=24).check_frames(24) is None


def test_pooled_spatial_norms_see_the_whole_clip_and_one_frame_clips_stay_as_they_were(unet):
    x, timesteps, context = batch(2, T)
    bare, pooled = motion_stack(unet), motion_stack(unet, pool=True)
    pooled.load_state_dict(bare.state_dict())
    assert relative_error(call(unet, [(pooled, CallSettings(T))], x, timesteps, context),
                          call(unet, [(bare, CallSettings(T))], x, timesteps, context)) > 1e-3
    one, many = (call(unet, [(layers, CallSettings(1))], x, timesteps, context) for layers in (bare, pooled))
    assert relative_error(many, one) < 1e-6


def test_places_run_in_slices_as_they_run_together(monkeypatch):
    brick = randomise(MotionModule(MotionParams(64, 8)))
    x = torch.randn(2 * T, 64, 5, 6)
    with torch.no_grad():
        monkeypatch.setattr(motion, "CACHED", 1 << 30)
        together = brick(x, GivenCall(T))
        monkeypatch.setattr(motion, "CACHED", 7 * T * 64)
        assert relative_error(brick(x, GivenCall(T)), together) < 1e-6


@torch.no_grad()
def test_norms_have_an_epsilon_of_1e_5_in_temporal_resblocks_and_of_1e_6_in_motion_modules():
    # The variance of x is that of the epsilons, so that these decide what a norm makes of it.
    x = 1e-3 * torch.randn(2, 64, 3, 4, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    groups = x.unflatten(1, (32, 2))
    centred, variance = groups - groups.mean((2, 3, 4), True), groups.var((2, 3, 4), unbiased=False, keepdim=True)
    block = TemporalResBlock(ResBlockParams(64, 32, 1)).time_stack
    module = MotionModule(MotionParams(64, 8)).temporal_transformer
    for norm, epsilon in ((block.in_layers[0], 1e-5), (block.out_layers[0], 1e-5), (module.norm, 1e-6)):
        assert relative_error(norm.double()(x), (centred / (variance + epsilon).sqrt()).flatten(1, 2)) < 1e-6


@torch.no_grad()
def test_a_clip_that_is_shorter_than_a_learned_table_has_its_first_positions():
    attention = MotionModule(MotionParams(64, 8, table_length=6)).temporal_transformer.transformer_blocks[0] \
        .attention_blocks[0]
    attention.pos_encoder.pe.copy_(torch.arange(6.0)[None, :, None].expand(1, 6, 64))
    assert attention.positions(4, torch.zeros(1, 4, 64))[:, 0].tolist() == [0, 1, 2, 3]


@torch.no_grad()
def test_a_pooled_norm_takes_mean_and_variance_over_the_frames_of_a_clip_while_its_call_acts(unet):
    norms = list(spatial_norms(unet))
    resblocks = [layer for _, _, layers in unet_blocks(unet) for layer in layers if is_resblock(layer)]
    assert len(norms) == 2 * len(resblocks) + 1 and norms[-1] is unet.out[0]
    call = SimpleNamespace(acting=True, frames=3, frames_changed=lambda change: None)
    handles = POOLED_NORMS.attach(call, unet, None)
    try:
        for norm in (norms[0], norms[-1]):
            x = torch.randn(6, norm.num_channels, 4, 5)
            groups = x.unflatten(0, (2, 3)).unflatten(2, (norm.num_groups, -1))
            centred = groups - groups.mean((1, 3, 4, 5), True)
            variance = groups.var((1, 3, 4, 5), unbiased=False, keepdim=True)
            normal = (centred / (variance + norm.eps).sqrt()).flatten(2, 3).flatten(0, 1)
            weight, bias = (part[:, None, None] for part in (norm.weight, norm.bias))
            call.acting = True
            assert relative_error(norm(x), normal * weight + bias) < 1e-5
            call.acting = False
            assert torch.equal(norm(x), nn.functional.group_norm(x, norm.num_groups, norm.weight, norm.bias, norm.eps))
    finally:
        for handle in handles:
            handle.remove()


def test_new_layers_all_have_the_length_of_the_mix_that_is_asked_for(unet):
    bricks = [brick for _, brick in video_ldm_params(unet, EMB_DIM, 768, lambda channels: 8, 5, mix_length=5).bricks]
    assert {(type(brick), brick.mix_length) for brick in bricks} == {(ResBlockParams, 5), (TransformerParams, 5)}
