"""Strength by frame and by region: the curve, the mask, and what a call makes of them (temporal/layer_strength.py)."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from video_ldm.temporal.call import Call, CallSettings, open_call
from video_ldm.temporal.errors import VideoLDMError
from video_ldm.temporal.fps_embedding import FpsEmbedding
from video_ldm.temporal.layer_strength import HOLD, LINEAR, FrameStrength, read_curve, resized
from video_ldm.temporal.layers import (
    ClipTransformerParams,
    FrameAttentionParams,
    FrameConvParams,
    GivenCall,
    LevelParams,
    MotionParams,
    ResBlockParams,
    ResidualConvParams,
    RotaryParams,
    StagedConvParams,
    TransformerParams,
)
from video_ldm.temporal.params import StackParams
from video_ldm.temporal.slots import SLOTS, unet_sites
from video_ldm.temporal.spatial_changes import POOLED_NORMS, SPARSE_CAUSAL
from video_ldm.temporal.stack import TemporalStack
from video_ldm.tests.small import EMB_DIM, SMALL, batch, randomise, relative_error, small_unet

T = 4
VALUES = torch.tensor([0.0, 1.0, 0.25, 0.0])        # of the frames of a clip
STILL, MOVING = [0, 3], [1, 2]
CHANNELS = SMALL["model_channels"]
FPS = FpsEmbedding(CHANNELS, EMB_DIM, 8.0)

# {family: (the layers of each slot by channels, its changes of the spatial network)}
FAMILIES = {
    "Video LDM": ({"post_res": lambda c: ResBlockParams(c, EMB_DIM, 1),
                   "in_attn_post_ff": lambda c: TransformerParams(c, 8, 768, 1)}, ()),
    "AnimateDiff v2": ({"post_attn": lambda c: MotionParams(c, 8)}, ()),
    "AnimateDiff v1, Hotshot-XL": ({"post_attn": lambda c: MotionParams(c, 8)}, (POOLED_NORMS,)),
    "AnimateDiff SDXL beta": ({"post_attn": lambda c: MotionParams(c, 8, norm_pooled=True)}, ()),
    "LaVie": ({"in_attn_pre_ff": lambda c: RotaryParams(c, 2)}, (POOLED_NORMS,)),
    "LaVie interpolation": ({"in_attn_post_ff": lambda c: FrameAttentionParams(c, 8)}, (POOLED_NORMS,)),
    "ModelScope": ({"post_conv_in": lambda c: ClipTransformerParams(c, 8, c),
                    "post_res": lambda c: StagedConvParams(c),
                    "post_attn": lambda c: ClipTransformerParams(c, 8, c)}, ()),
    "VideoCrafter": ({"post_attn": lambda c: ClipTransformerParams(c, 8, c, reach=16)}, (FPS,)),
    "Upscale-A-Video": ({"post_res": lambda c: ResidualConvParams(c), "in_attn_pre_ff": lambda c: RotaryParams(c, 2),
                         "post_level": lambda c: LevelParams(c, EMB_DIM)}, (POOLED_NORMS,)),
}
ALL_SLOTS = ({"post_conv_in": lambda c: ClipTransformerParams(c, 8, c), "post_res": lambda c: StagedConvParams(c),
              "in_attn_pre_ff": lambda c: RotaryParams(c, 2), "in_attn_post_ff": lambda c: FrameAttentionParams(c, 8),
              "post_attn": lambda c: MotionParams(c, 8), "post_level": lambda c: LevelParams(c, EMB_DIM),
              **dict.fromkeys(("post_conv1", "post_conv2", "post_shortcut", "post_resampler", "post_conv_out"),
                              FrameConvParams)},
             (POOLED_NORMS,))
assert set(ALL_SLOTS[0]) == set(SLOTS)
each_family = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture(scope="module")
def unet():
    return small_unet()


@pytest.fixture(scope="module")
def image(unet):
    """What the image model makes of the clips, without layers."""
    return call(unet, [])


def stack_of(unet, layers, spatial=(), seed=1):
    bricks = tuple((site, layers[site.slot](attachment.channels)) for site, attachment in unet_sites(unet).items()
                   if site.slot in layers)
    return randomise(TemporalStack(StackParams("tests'", bricks, T, None, spatial)), seed)


def by_frame(values=VALUES, clips=2):
    return values.repeat(clips)[:, None, None]


@torch.no_grad()
def call(unet, sets, clips=2):
    x, timesteps, context = batch(clips, T)
    with open_call(unet, sets, context):
        return unet(x, timesteps, context=context).unflatten(0, (clips, T))


def with_strengths(unet, stack, strengths, strength=1.0):
    return call(unet, [(stack, CallSettings(T, strength, strengths=strengths))])


# Curves

@pytest.mark.parametrize("text, interpolation, wanted", [
    ("0: 0.2, 15: 1.0", LINEAR, {0: 0.2, 3: 0.36, 15: 1.0, 16: 1.0, 99: 1.0}),
    ("0: 0.2, 15: 1.0", HOLD, {0: 0.2, 14: 0.2, 15: 1.0, 99: 1.0}),
    ("15:1\n0 :0.2", LINEAR, {0: 0.2, 3: 0.36, 15: 1.0}),       # in any order
    ("4: 0; 8: 2", LINEAR, {0: 0.0, 4: 0.0, 5: 0.5, 6: 1.0, 8: 2.0, 9: 2.0}),
    ("0 0.2, 1 .5", LINEAR, {0: 0.0, 1: 0.2, 2: 1.0, 3: 0.5, 4: 0.5, 50: 0.5}),
    (" 0.7 ", HOLD, {0: 0.7, 1: 0.7, 9: 0.7}),
])
def test_a_curve_goes_through_its_points_and_holds_before_and_after_them(text, interpolation, wanted):
    values = read_curve(text, interpolation).values(list(wanted))
    assert torch.allclose(values, torch.tensor(list(wanted.values())), rtol=0, atol=1e-7)
    named = read_curve(text, interpolation).points
    assert read_curve(text, interpolation).values([n for n, _ in named]).tolist() == torch.tensor(
        [value for _, value in named]).tolist()


def test_a_list_is_the_curve_with_these_points():
    assert read_curve("0 0.5 1 1") == read_curve("0: 0, 1: 0.5, 2: 1, 3: 1")
    assert read_curve(" \n, ") is None


@pytest.mark.parametrize("text, words", [
    ("a lot", "'a' in the curve is no strength. Write one number for each frame"),
    ("0: 1, 3: nan", "'3:nan' in the curve is no strength"),
    ("0: 1, 3: inf", "'3:inf' in the curve is no strength"),
    ("0:1:2", "'0:1:2' in the curve is no strength"),
    ("0.5: 1", "'0.5:1' in the curve is no strength"),
    ("-1: 1", "'-1:1' in the curve is no strength"),
    ("0:", "'0:' in the curve is no strength"),
    ("9999999: 1", "'9999999:1' in the curve is no strength"),
    ("1 " + "9" * 50 + "x", "'9{40}'... in the curve is no strength"),
    ("0 1 -0.5", "gives frame 2 the strength -0.5, and strengths go from 0"),
    ("0: 1, 8: 2.5", "gives frame 8 the strength 2.5, and strengths go from 0, the image model alone, to 2"),
    ("0: 1, 0: 0.5", "names frame 0 twice"),
    ("0: 1, 0.5", "has frame numbers in some places and none in others"),
])
def test_other_texts_are_refused_with_what_is_wrong(text, words):
    with pytest.raises(VideoLDMError, match=words):
        read_curve(text)


# Maps

def test_curve_and_mask_multiply_in_each_frame_and_place():
    mask = torch.rand(3, 4, 6, generator=torch.Generator().manual_seed(0))
    curve = read_curve("0: 0.5, 2: 1.5")
    places = mask.unflatten(1, (2, 2)).unflatten(3, (3, 2)).mean((2, 4))        # of 2x2 pixels
    seen = FrameStrength(curve, mask).of([2, 0, 1], (2, 3))
    assert relative_error(seen, torch.stack([1.5 * places[2], 0.5 * places[0], places[1]])) < 1e-6
    assert torch.equal(FrameStrength(None, mask[:1]).of([5, 9], (4, 6)), mask[:1].expand(2, -1, -1))
    assert FrameStrength(curve, None).of([1, 2], (2, 3)).tolist() == [[[1.0]], [[1.5]]]


def test_a_place_is_0_or_1_only_where_its_whole_area_is():
    mask = torch.zeros(1, 6, 8)
    mask[:, :, 3:] = 1
    assert resized(mask, (3, 4)).tolist() == [[[0, 0.5, 1, 1]] * 3]
    thirds = torch.zeros(1, 6, 9)
    thirds[:, :, 5:] = 1            # of nine pixels in a row: three for each place
    assert torch.allclose(resized(thirds, (2, 3))[0], torch.tensor([0, 1 / 3, 1]).expand(2, 3), rtol=0, atol=1e-6)
    assert resized(resized(mask, (3, 4)), (2, 2))[0, 0].tolist() == [0.25, 1]       # as the levels of a network see it


def test_masks_that_fit_neither_the_frames_nor_their_proportions_are_refused():
    strength = FrameStrength(None, torch.ones(3, 16, 24))
    strength.check(3, (2, 3))
    replace(strength, mask=torch.ones(1, 135, 240)).check(99, (68, 120))        # a side that was rounded to latents
    with pytest.raises(VideoLDMError, match="has 3 masks, and the video has 4 frames"):
        strength.check(4, (2, 3))
    with pytest.raises(VideoLDMError, match="is 24x16 pixels, and the frames have other proportions .64x64 latents."):
        strength.check(3, (64, 64))


# One layer

BRICKS = {"post_res": StagedConvParams(CHANNELS), "post_attn": MotionParams(CHANNELS, 8),
          "in_attn_post_ff": FrameAttentionParams(CHANNELS, 8), "in_attn_pre_ff": RotaryParams(CHANNELS, 2)}


def one_layer(unet, slot, **settings):
    site = next(site for site in unet_sites(unet) if site.slot == slot)
    stack = randomise(TemporalStack(StackParams("tests'", ((site, BRICKS[slot]),), T, None)), 5)
    return site, stack.layers[site.name], Call(stack, CallSettings(T, **settings), None)


def features(slot, height=4, width=6):
    x = torch.randn(2 * T, CHANNELS, height, width, generator=torch.Generator().manual_seed(7))
    return x.flatten(2).transpose(1, 2).contiguous() if "attn_p" in slot and slot != "post_attn" else x


@pytest.mark.parametrize("slot", BRICKS)
@torch.no_grad()
def test_a_layers_output_enters_as_far_as_the_frames_strength_says(unet, slot):
    site, layer, opened = one_layer(unet, slot, strength=0.8, strengths=by_frame())
    x = features(slot)
    full = layer(x, GivenCall(T, 0.8))                      # the layer's result, or the residual that it adds
    seen = opened.run(site, x)
    residual = slot == "in_attn_pre_ff"
    for image, share in enumerate(by_frame().flatten().tolist()):
        wanted = share * full[image] if residual else x[image] + share * (full[image] - x[image])
        assert relative_error(seen[image], wanted) < 1e-6 if share else torch.equal(seen[image], wanted)
    assert torch.equal(seen[[1, T + 1]], full[[1, T + 1]])      # strength 1: as the layer gave it


@pytest.mark.parametrize("slot", BRICKS)
@torch.no_grad()
def test_in_a_region_it_is_the_layers_output_and_in_another_what_came_in(unet, slot):
    """The mask is of 8x12 places, and the features have 4x6: a place has the mean of four."""
    mask = torch.rand(2 * T, 8, 12, generator=torch.Generator().manual_seed(3))
    mask[:, :, :4], mask[:, :, 8:] = 0, 1
    site, layer, opened = one_layer(unet, slot, strengths=mask)
    opened.tokens = (4, 6)      # the hook on the transformer says so
    x = features(slot)
    full, seen = layer(x, GivenCall(T)), opened.run(site, x)
    share = mask.unflatten(1, (4, 2)).unflatten(3, (6, 2)).mean((2, 4))
    share = share[:, None] if x.ndim == 4 else share.flatten(1)[:, :, None]
    without = torch.zeros_like(x) if slot == "in_attn_pre_ff" else x
    assert relative_error(seen, without + share * (full - without)) < 1e-6
    assert torch.equal(torch.where(share == 0, seen, 0), torch.where(share == 0, without, 0))
    assert torch.equal(torch.where(share == 1, seen, 0), torch.where(share == 1, full, 0))
    assert 0 < (share == 0).sum() < share.numel() / 2 and (share == 1).any()


@torch.no_grad()
def test_nan_and_infinity_of_a_layer_stay_out_of_frames_and_regions_of_strength_0(unet):
    mask = torch.ones(2 * T, 4, 6)
    mask[0], mask[1, :, :3] = 0, 0
    site, layer, opened = one_layer(unet, "post_attn", strengths=mask)
    nn.init.constant_(layer.temporal_transformer.proj_out.bias, float("inf"))
    x = features("post_attn")
    seen = opened.run(site, x)
    assert torch.equal(seen[0], x[0]) and torch.equal(seen[1, :, :, :3], x[1, :, :, :3])
    assert not seen[1, :, :, 3:].isfinite().any()


def test_tokens_that_are_no_places_of_the_picture_are_refused(unet):
    site, _, opened = one_layer(unet, "in_attn_post_ff", strengths=torch.ones(2 * T, 4, 6))
    opened.tokens = (4, 6)
    with pytest.raises(VideoLDMError, match="changes the number of places inside a transformer"):
        opened.run(site, features("in_attn_post_ff")[:, :12])


# The whole network

@each_family
def test_frames_of_strength_0_are_the_image_models_to_the_bit_in_every_family(unet, image, family):
    seen = with_strengths(unet, stack_of(unet, *FAMILIES[family]), by_frame())
    assert torch.equal(seen[:, STILL], image[:, STILL])
    assert all(relative_error(seen[:, frame], image[:, frame]) > 1e-3 for frame in MOVING)


def test_frames_of_strength_0_are_the_image_models_whatever_the_other_frames_become(unet, image):
    stack = stack_of(unet, *ALL_SLOTS)
    nn.init.constant_(next(stack.parameters()), float("nan"))
    seen = with_strengths(unet, stack, by_frame())
    assert torch.equal(seen[:, STILL], image[:, STILL]) and not seen[:, MOVING].isfinite().any()


def test_frames_with_a_region_of_strength_are_not_the_image_models_and_black_frames_among_them_are(unet, image):
    stack = stack_of(unet, *ALL_SLOTS)
    mask = torch.zeros(2 * T, 8, 12)
    mask[[1, 2, T + 1, T + 2], :3, 2:9] = 0.5
    seen = with_strengths(unet, stack, mask)
    assert torch.equal(seen[:, STILL], image[:, STILL])
    assert all(relative_error(seen[:, frame], image[:, frame]) > 1e-3 for frame in MOVING)


def test_a_region_of_strength_0_gets_nothing_of_the_layer_at_any_site_and_the_rest_does(unet, monkeypatch):
    stack, run, sites = stack_of(unet, *ALL_SLOTS), Call.run, []
    mask = torch.zeros(2 * T, 8, 12)
    mask[:, 2:6, 4:] = 1
    inner = torch.zeros(4, 6)       # the second level, where two places are one
    inner[1:3, 2:] = 1

    def compared(opened, site, x, emb=None):
        result = run(opened, site, x, emb)
        sites.append(site)
        before = torch.zeros_like(x) if site.slot == "in_attn_pre_ff" else x
        changed = (result != before).any(dim=1 if x.ndim == 4 else 2).flatten(1)
        assert torch.equal(changed, (mask[0] if changed.shape[1] == 96 else inner).flatten().expand_as(changed) > 0)
        return result
    monkeypatch.setattr(Call, "run", compared)
    with_strengths(unet, stack, mask)
    assert sorted(sites) == sorted(site for site, _ in stack.params.bricks)


@pytest.mark.parametrize("strength", [1.0, 0.7])
def test_a_map_of_1_is_the_call_without_a_map_to_the_bit(unet, strength):
    stack = stack_of(unet, *ALL_SLOTS)
    plain = with_strengths(unet, stack, None, strength)
    assert torch.equal(with_strengths(unet, stack, torch.ones(2 * T, 1, 1), strength), plain)
    assert torch.equal(with_strengths(unet, stack, torch.ones(2 * T, 8, 12), strength), plain)


@each_family
def test_a_map_of_one_number_is_that_strength_and_it_multiplies(unet, family):
    stack = stack_of(unet, *FAMILIES[family])
    wanted = with_strengths(unet, stack, None, 0.4)
    for shape in ((1, 1), (8, 12)):
        assert relative_error(with_strengths(unet, stack, torch.full((2 * T, *shape), 0.5), 0.8), wanted) < 1e-5


def test_a_map_of_zeros_is_the_image_model_to_the_bit(unet, image):
    stack = stack_of(unet, *ALL_SLOTS)
    assert torch.equal(with_strengths(unet, stack, torch.zeros(2 * T, 1, 1)), image)
    assert torch.equal(with_strengths(unet, stack, torch.zeros(2 * T, 8, 12)), image)


def test_the_frames_of_another_clip_change_nothing(unet):
    stack = stack_of(unet, *ALL_SLOTS)
    other = by_frame().clone()
    other[T:] = 0.6
    assert torch.equal(with_strengths(unet, stack, by_frame())[0], with_strengths(unet, stack, other)[0])


# Changes of the spatial network

def test_norms_of_two_sets_are_pooled_where_one_of_them_acts(unet, image):
    motion = {"post_attn": lambda c: MotionParams(c, 8)}
    weak, bare, whole = (stack_of(unet, motion, spatial, seed) for spatial, seed in
                         (((POOLED_NORMS,), 1), ((), 1), ((POOLED_NORMS,), 2)))
    mapped, plain = CallSettings(T, strengths=by_frame()), CallSettings(T)
    wanted = call(unet, [(bare, mapped), (whole, plain)])       # the second pools the norms of all frames
    assert torch.equal(call(unet, [(weak, mapped), (whole, plain)]), wanted)
    x, timesteps, context = batch(2, T)
    with torch.no_grad(), open_call(unet, [(weak, mapped)], context), open_call(unet, [(whole, plain)], context):
        assert torch.equal(unet(x, timesteps, context=context).unflatten(0, (2, T)), wanted)
    both = call(unet, [(weak, mapped), (whole, mapped)])
    assert torch.equal(both[:, STILL], image[:, STILL]) and relative_error(both, wanted) > 1e-3


def test_the_frame_rate_is_told_in_the_embedding_of_frames_with_strength_alone(unet):
    stack, seen = stack_of(unet, *FAMILIES["VideoCrafter"]), []
    handle = unet.input_blocks[1][0].register_forward_pre_hook(lambda module, args: seen.append(args[1]))
    try:
        for strengths in (by_frame(), None):
            with_strengths(unet, stack, strengths)
        call(unet, [])
    finally:
        handle.remove()
    some, told, plain = seen
    frames = by_frame().flatten() > 0
    assert torch.equal(some[frames], told[frames]) and torch.equal(some[~frames], plain[~frames])
    assert relative_error(told, plain) > 1e-3


def test_a_change_that_cannot_leave_single_frames_is_refused_beside_strength_0(unet):
    stack = stack_of(unet, FAMILIES["LaVie interpolation"][0], (SPARSE_CAUSAL,))
    with pytest.raises(VideoLDMError, match="So single frames cannot stay the image model's with these tests' layers"):
        with_strengths(unet, stack, by_frame())
    assert with_strengths(unet, stack, by_frame(VALUES.clamp(min=0.1))).isfinite().all()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in unet.modules())
