"""Layers for the x4 upscaler, of LaVie's super-resolution and Upscale-A-Video: docs/papers.md#l3 to #l8."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from video_ldm.temporal.call import CallSettings, open_call
from video_ldm.temporal.errors import VideoLDMError
from video_ldm.temporal.families import load_temporal
from video_ldm.temporal.layers import (
    GivenCall,
    LevelModule,
    LevelParams,
    ResidualConv,
    ResidualConvParams,
    RotaryParams,
    RotaryTransformer,
)
from video_ldm.temporal.layers.position import distance_buckets, rotate, rotation_angles
from video_ldm.temporal.slots import Site, unet_sites
from video_ldm.temporal.stack import TemporalStack
from video_ldm.temporal.training.checkpointing import open_call_checkpointed
from video_ldm.tests import vsr_help
from video_ldm.tests.formats_help import saved
from video_ldm.tests.small import randomise, relative_error, unet_model

T = 5


@pytest.fixture(scope="module")
def weights():
    return vsr_help.random_file(vsr_help.quarter(vsr_help.LAVIE))


@pytest.fixture(scope="module")
def unet(weights):
    return vsr_help.upscaler_unet(weights).requires_grad_(False)


@pytest.fixture(scope="module")
def file(weights, tmp_path_factory):
    return load_temporal(saved(tmp_path_factory.mktemp("vsr"), "lavie_vsr.pt", {"ema": weights}))


@pytest.fixture(scope="module")
def stack(file):
    return stack_of(file)


def stack_of(file) -> TemporalStack:
    stack = TemporalStack(file.params)
    stack.load_state_dict(file.tensors)
    return stack


@torch.no_grad()
def run(unet, stack, frames, batch, **settings):
    x, timesteps, text, levels = batch
    with open_call(unet, [(stack, CallSettings(frames, **settings))], text):
        return unet(x, timesteps, context=text, y=levels)


def image(unet, batch):
    x, timesteps, text, levels = batch
    with torch.no_grad():
        return unet(x, timesteps, context=text, y=levels)


# The whole UNet

@pytest.mark.parametrize("clips, frames, height, width", [(1, 5, 16, 24), (2, 3, 18, 28), (1, 20, 8, 8)])
def test_the_whole_unet_is_the_published_one(unet, stack, weights, clips, frames, height, width):
    """Sizes that do not halve evenly, and frames further apart than the table of distances tells, among them."""
    batch = vsr_help.video_batch(clips, frames, height, width)
    x, text = batch[0].unflatten(0, (clips, frames)).transpose(1, 2), batch[2]
    with torch.no_grad():
        published = vsr_help.Published(weights)(x, 500.0, text, 50).transpose(1, 2).flatten(0, 1)
    assert relative_error(run(unet, stack, frames, batch), published) < 1e-5
    assert relative_error(image(unet, batch), published) > 0.1


def test_without_its_temporal_layers_the_reference_is_comfyuis_upscaler(unet, weights):
    """One frame, and temporal layers whose last weights are zero: so what is compared above is the upscaler."""
    last = ("resblock_temporal.conv2", "attn_temporal.to_out.0", "shift_conv")
    silent = {key: torch.zeros_like(tensor) if any(name in key for name in last) else tensor
              for key, tensor in weights.items()}
    batch = vsr_help.video_batch(1, 1)
    with torch.no_grad():
        published = vsr_help.Published(silent)(batch[0][None].transpose(1, 2), 500.0, batch[2], 50)
    assert relative_error(image(unet, batch), published[0].transpose(0, 1)) < 1e-5


@pytest.mark.parametrize("kind", ["resblock_temporal", "attn_temporal", "shift_conv"])
def test_every_kind_of_layer_changes_the_output(unet, file, kind):
    silent = stack_of(file)
    last = {"resblock_temporal": "resblock_temporal.conv2", "attn_temporal": "attn_temporal.to_out.0"}.get(kind, kind)
    for name, weight in silent.named_parameters():
        if last in name:
            nn.init.zeros_(weight)
    batch = vsr_help.video_batch(1, T)
    assert relative_error(run(unet, silent, T, batch), run(unet, stack_of(file), T, batch)) > 1e-3


def test_layers_of_zero_change_nothing_but_the_norms_which_see_the_whole_clip(unet, file):
    bare = stack_of(file)
    for name, weight in bare.named_parameters():
        if any(last in name for last in ("resblock_temporal.conv2", "attn_temporal.to_out.0", "shift_conv")):
            nn.init.zeros_(weight)
    clip, frames = vsr_help.video_batch(1, T), vsr_help.video_batch(T, 1)
    assert relative_error(run(unet, bare, 1, frames), image(unet, frames)) < 1e-6
    assert relative_error(run(unet, bare, T, clip), image(unet, clip)) > 1e-3
    alone = TemporalStack(replace(file.params, spatial=()))
    alone.load_state_dict(bare.state_dict())
    assert relative_error(run(unet, alone, T, clip), image(unet, clip)) < 1e-6


def test_strength_0_is_bit_identical_to_the_image_model_even_with_nan_in_the_layers(unet, file):
    broken = stack_of(file)
    for weight in broken.parameters():
        nn.init.constant_(weight, float("nan"))
    batch = vsr_help.video_batch(1, T)
    assert torch.equal(run(unet, broken, T, batch, strength=0.0), image(unet, batch))
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in unet.modules())


def test_clips_of_a_batch_do_not_see_each_other(unet, stack):
    both = vsr_help.video_batch(2, T)
    second = tuple(part[T:] for part in both)
    assert relative_error(run(unet, stack, T, both)[T:], run(unet, stack, T, second)) < 1e-5


def test_a_layer_that_is_not_reached_raises(unet, stack):
    x, timesteps, text, levels = vsr_help.video_batch(1, T)
    with pytest.raises(VideoLDMError, match="41 of 41 temporal layers were not reached"):
        with open_call(unet, [(stack, CallSettings(T))], text):
            unet.input_blocks[0](x, None)
    with pytest.raises(VideoLDMError, match="1 of 41 temporal layers were not reached .*output_11_post_level_0"):
        with open_call(unet, [(stack, CallSettings(T))], text):
            out, unet.out = unet.out, nn.Identity()
            try:
                with torch.no_grad():
                    unet(x, timesteps, context=text, y=levels)
            finally:
                unet.out = out


def test_gradients_reach_every_temporal_parameter_and_checkpointing_leaves_them_as_they_are(unet, file):
    x, timesteps, text, levels = vsr_help.video_batch(1, 3)
    found = []
    for opened in (open_call, open_call_checkpointed):
        stack = stack_of(file)
        with opened(unet, [(stack, CallSettings(3))], text):
            out = unet(x, timesteps, context=text, y=levels)
        out.square().mean().backward()
        found.append([weight.grad for weight in stack.parameters()])
    assert all(grad is not None and grad.abs().max() > 0 for grad in found[0])
    assert max(relative_error(again, grad) for grad, again in zip(*found)) < 1e-4


# Sites

def test_levels_end_with_their_resampler_and_the_last_of_each_side_with_its_last_block():
    sites = unet_sites(unet_model(vsr_help.UNET, device="meta"))
    ends = [(site.part, site.index, channels) for site, (_, channels) in sites.items() if site.slot == "post_level"]
    assert ends == [("input", 3, 64), ("input", 6, 128), ("input", 9, 128), ("input", 11, 256), ("middle", 0, 256),
                    ("output", 2, 256), ("output", 5, 128), ("output", 8, 128), ("output", 11, 64)]


def test_the_layers_sit_where_the_published_unet_has_them(file):
    sites = [site for site, _ in file.params.bricks]
    transformers = [("input", i) for i in (4, 5, 7, 8, 10, 11)] + [("middle", 0)] + [("output", i) for i in range(9)]
    for slot in ("post_res", "in_attn_pre_ff"):
        assert [site for site in sites if site.slot == slot] == [Site(*place, slot) for place in transformers]
    assert sum(site.slot == "post_level" for site in sites) == 9 and len(sites) == 41


# The layers themselves

def test_a_fresh_level_module_is_the_identity_and_so_is_one_whose_shift_is_zero():
    x, emb = torch.randn(2 * T, 64, 6, 6), torch.randn(2 * T, 32)
    assert torch.equal(LevelModule(LevelParams(64, 32))(x, GivenCall(T, emb=emb)), x)
    module = randomise(LevelModule(LevelParams(64, 32)))
    assert relative_error(module(x, GivenCall(T, emb=emb)), x) > 0.1
    nn.init.zeros_(module.shift_conv.weight)
    nn.init.zeros_(module.shift_conv.bias)
    assert torch.equal(module(x, GivenCall(T, emb=emb)), x)


def test_fresh_attention_adds_its_output_bias_alone():
    brick = RotaryTransformer(RotaryParams(64, 2))
    bias = brick.attn_temporal.to_out[0].bias
    assert torch.equal(brick(torch.randn(2 * T, 6, 64), GivenCall(T)), bias.expand(2 * T, 6, 64))


@pytest.mark.parametrize("kind", ["convolution", "attention", "level"])
def test_strength_scales_what_a_layer_adds(kind):
    x, emb = torch.randn(2 * T, 64, 4, 6), torch.randn(2 * T, 32)
    if kind == "convolution":
        brick = randomise(ResidualConv(ResidualConvParams(64)))
        added = lambda strength: brick(x, GivenCall(T, strength)) - x                      # noqa: E731
    elif kind == "level":
        brick = randomise(LevelModule(LevelParams(64, 32)))
        added = lambda strength: brick(x, GivenCall(T, strength, emb)) - x                 # noqa: E731
    else:
        brick = randomise(RotaryTransformer(RotaryParams(64, 2)))
        added = lambda strength: brick(x.flatten(2).transpose(1, 2), GivenCall(T, strength))       # noqa: E731
    with torch.no_grad():
        assert relative_error(2 * added(0.5), added(1.0)) < 1e-5 and added(1.0).std() > 0.05


def test_convolution_over_time_sees_its_own_pixel_and_the_frames_within_two_steps():
    conv = randomise(ResidualConv(ResidualConvParams(64))).resblock_temporal.conv1
    long = randomise(LevelModule(LevelParams(64, 32))).resblocks_3d_t.conv1
    x = torch.zeros(1, 64, 9, 5, 5)
    x[:, :, 4, 2, 2] = 1
    for network, reach in ((conv, 1), (long, 2)):
        with torch.no_grad():
            seen = (network(x) - network(torch.zeros_like(x))).abs().amax(dim=(0, 1))
        touched = seen[:, 2, 2] > 0
        assert touched.nonzero().flatten().tolist() == list(range(4 - reach, 5 + reach))
        seen[:, 2, 2] = 0
        assert seen.max() == 0


def test_shifting_all_positions_leaves_the_scores_as_they_are():
    q, k = torch.randn(3, 7, 2 * 48), torch.randn(3, 7, 2 * 48)

    def scores(first):
        turned = (rotate(x, 2, rotation_angles(torch.arange(first, first + 7))) for x in (q, k))
        q_turned, k_turned = (x.unflatten(-1, (2, -1)).transpose(1, 2) for x in turned)
        return q_turned @ k_turned.transpose(-1, -2)
    assert relative_error(scores(5), scores(0)) < 1e-5
    plain = torch.einsum("s i h d, s j h d -> s h i j", *(x.unflatten(-1, (2, -1)) for x in (q, k)))
    assert relative_error(scores(0), plain) > 0.1


def test_rotation_turns_pairs_of_the_first_32_channels_of_each_head_and_leaves_the_first_frame():
    x = torch.randn(1, 4, 2 * 48)
    turned = rotate(x, 2, rotation_angles(torch.arange(4)))
    heads, before = turned.unflatten(-1, (2, 48)), x.unflatten(-1, (2, 48))
    assert torch.equal(turned[:, 0], x[:, 0]) and torch.equal(heads[..., 32:], before[..., 32:])
    for i, frequency in ((0, 1.0), (1, 10000 ** (-2 / 32)), (15, 10000 ** (-30 / 32))):
        angle = 3 * frequency
        even, odd = before[0, 3, 1, 2 * i], before[0, 3, 1, 2 * i + 1]
        expected = torch.stack([even * math.cos(angle) - odd * math.sin(angle),
                                odd * math.cos(angle) + even * math.sin(angle)])
        assert relative_error(heads[0, 3, 1, 2 * i:2 * i + 2], expected) < 1e-5


def test_distances_in_time_share_rows_of_the_bias_table_as_in_t5():
    rows = distance_buckets(60)
    past = {0: 0, 1: 1, 7: 7, 8: 8, 9: 8, 10: 9, 11: 9, 31: 15, 32: 15, 59: 15}
    assert {d: rows[59, 59 - d].item() for d in past} == past
    future = {1: 17, 7: 23, 8: 24, 9: 24, 10: 25, 59: 31}
    assert {d: rows[0, d].item() for d in future} == future
    assert rows.tolist() == [[vsr_help.bucket(key - query) for key in range(60)] for query in range(60)]


def test_attention_mixes_neither_places_nor_clips_and_keeps_to_its_band():
    brick = randomise(RotaryTransformer(RotaryParams(64, 2)))
    x = torch.randn(2 * 9, 10, 64)
    changed = x.clone()
    changed[8, 3] += torch.randn(64)
    near = GivenCall(9, max_distance=2)
    with torch.no_grad():
        difference = (brick(changed, GivenCall(9)) - brick(x, GivenCall(9))).abs().amax(-1)
        banded = (brick(changed, near) - brick(x, near)).abs().amax(-1)
    assert (difference > 0).nonzero().tolist() == [[frame, 3] for frame in range(9)]
    assert (banded > 0).nonzero().tolist() == [[frame, 3] for frame in range(6, 9)]


def small_variance(*shape):
    """Values whose variance is that of the epsilons, so that these decide what a norm makes of them."""
    return 1e-3 * torch.randn(shape, generator=torch.Generator().manual_seed(6), dtype=torch.float64)


@torch.no_grad()
@pytest.mark.parametrize("part", ["resblock_temporal", "resblocks_3d_t", "resblocks_3d_s"])
@pytest.mark.parametrize("norm", ["norm1", "norm2"])
def test_the_norms_of_the_convolutions_have_an_epsilon_of_1e_6(part, norm):
    brick = ResidualConv(ResidualConvParams(64)) if part == "resblock_temporal" else LevelModule(LevelParams(64, 32))
    x = small_variance(2, 64, 3, 4, 5)
    groups = x.unflatten(1, (32, 2))
    dims = (2, 3, 4, 5)
    expected = (groups - groups.mean(dims, True)) / (groups.var(dims, unbiased=False, keepdim=True) + 1e-6).sqrt()
    ours = getattr(getattr(brick, part), norm).double()(x)
    assert relative_error(ours, expected.flatten(1, 2)) < 1e-6


@torch.no_grad()
def test_the_norm_before_attention_over_time_has_an_epsilon_of_1e_5():
    x = small_variance(3, 7, 64)
    expected = (x - x.mean(-1, True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    assert relative_error(RotaryTransformer(RotaryParams(64, 2)).norm_temporal.double()(x), expected) < 1e-6


def test_heads_narrower_than_the_rotation_are_refused():
    with pytest.raises(ValueError, match="64 channels in 4 heads are fewer than the 32"):
        RotaryTransformer(RotaryParams(64, 4))
