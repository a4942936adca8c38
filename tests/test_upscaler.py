"""The arithmetic of Video Upscale: noise on the small frames, windows and tiles, without a network."""

import pytest
import torch

from video_ldm.temporal.diffusion import Diffusion
from video_ldm.temporal.errors import VideoLDMError
from video_ldm.temporal.upscaler import (
    TRAINED_LEVEL,
    augment_small_frames,
    check_level,
    fold_pixels,
    match_colours,
    plan_pieces,
    predict_in_pieces,
    repeat_small_pixels,
    unfold_pixels,
    unscale_augmented,
)
from video_ldm.tests.small import relative_error

SCHEDULE = Diffusion(0.0001, 0.02)
# frames, height, width, window, overlap, tile: one piece, windows alone, tiles alone, both, odd sizes, dense overlap
VIDEOS = [(3, 6, 8, 8, 2, 0), (10, 6, 8, 4, 2, 0), (3, 30, 44, 8, 2, 16), (11, 30, 44, 4, 2, 16), (9, 17, 23, 4, 1, 8),
          (8, 10, 9, 4, 3, 8), (1, 5, 7, 8, 2, 16)]


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("video", VIDEOS)
def test_windows_and_tiles_of_a_pointwise_denoiser_give_the_whole_video_to_the_bit(video):
    cuts, x = plan_pieces(*video), noise(video[0], 3, *video[1:3])

    def denoise(x):
        return torch.tanh(3 * x) + x.square()
    pieces = predict_in_pieces(lambda frames, rows, columns: denoise(x[frames, :, rows, columns]), cuts, 3)
    assert torch.equal(pieces, denoise(x))


@pytest.mark.parametrize("video", VIDEOS)
def test_the_weights_of_all_pieces_sum_to_one_everywhere(video):
    """Each piece says 1 in a channel of its own, so that the channels come out as the pieces' weights."""
    cuts, seen = plan_pieces(*video), []

    def mark(frames, rows, columns):
        length, height, width = (span.stop - span.start for span in (frames, rows, columns))
        part = torch.zeros(length, cuts.pieces, height, width)
        part[:, len(seen)] = 1
        seen.append((frames, rows, columns))
        return part
    weights = predict_in_pieces(mark, cuts, cuts.pieces)
    assert len(seen) == cuts.pieces
    assert (weights.sum(1) - 1).abs().max() < 1e-6 and weights.min() >= 0
    for number, (frames, rows, columns) in enumerate(seen):
        outside = weights[:, number].clone()
        assert outside[frames, rows, columns].max() > 0
        outside[frames, rows, columns] = 0
        assert not outside.any()


def test_within_a_shared_stretch_the_weight_moves_evenly_from_one_piece_to_the_next():
    """Its outer quarters belong to one side alone, whose network saw what lies beyond."""
    cuts = plan_pieces(1, 1, 24, 8, 2, 16)
    assert [(span.start, span.stop) for span in cuts.columns] == [(0, 16), (8, 24)]
    right = predict_in_pieces(lambda frames, rows, columns: torch.full((1, 1, 1, 16), float(columns.start > 0)),
                              cuts, 1)
    fade = torch.arange(1, 5) / 5
    assert torch.allclose(right.flatten(), torch.cat([torch.zeros(10), fade, torch.ones(10)]))


def test_pieces_are_of_one_size_and_never_larger_than_the_video():
    for video in VIDEOS:
        cuts, (frames, height, width, window, overlap, tile) = plan_pieces(*video), video
        assert cuts.whole == (frames, height, width)
        assert cuts.largest == (min(frames, window), min(height, tile or height), min(width, tile or width))
        for spans, size in zip((cuts.frames, cuts.rows, cuts.columns), cuts.largest):
            assert {span.stop - span.start for span in spans} == {size} and spans[0].start == 0
            assert all(after.start <= before.stop for before, after in zip(spans, spans[1:]))
        assert all(after.start <= before.stop - overlap for before, after in zip(cuts.frames, cuts.frames[1:]))


def test_tiles_share_a_quarter_and_are_the_fewest_that_do():
    """Tiles of 16 that share 4: two reach over 28 places, and 29 take a third."""
    for size, starts in ((28, [0, 12]), (29, [0, 6, 13]), (40, [0, 12, 24]), (41, [0, 8, 17, 25])):
        cuts = plan_pieces(1, size, size, 8, 2, 16)
        assert [span.start for span in cuts.rows] == [span.start for span in cuts.columns] == starts
        assert cuts.pieces == len(starts) ** 2


def test_small_frames_are_spread_over_their_pixels_and_freed_of_the_weight_of_their_noise():
    """c_gamma / alpha_gamma stands for x_low. At level 0 there is no noise, so no weight is taken off."""
    x = noise(2, 3, 2, 3)
    for level in (0, 30, 250):
        levels = torch.tensor([level, 0])
        scale = torch.tensor([SCHEDULE.alpha[level].item() if level else 1.0, 1.0])[:, None, None, None]
        assert relative_error(unscale_augmented(x, levels, SCHEDULE), x / scale) < 1e-6
    large = unfold_pixels(repeat_small_pixels(x))
    assert torch.equal(large, x.repeat_interleave(4, 2).repeat_interleave(4, 3))


def test_windows_that_do_not_advance_are_refused():
    with pytest.raises(VideoLDMError, match="overlap is 4 frames and window is 4.*Lower overlap, or raise window"):
        plan_pieces(8, 4, 4, 4, 4, 0)


def test_small_frames_are_noised_by_the_upscalers_own_schedule():
    x, eps = noise(4, 3, 6, 8), noise(4, 3, 6, 8, seed=1)
    for level in (1, 30, 150, 250):
        alpha, sigma = SCHEDULE.alpha[level].float(), SCHEDULE.sigma[level].float()
        assert alpha ** 2 + sigma ** 2 == pytest.approx(1)
        assert relative_error(augment_small_frames(x, level, eps, SCHEDULE), alpha * x + sigma * eps) < 1e-6
    variance = augment_small_frames(torch.zeros(64, 3, 8, 8), 150, noise(64, 3, 8, 8), SCHEDULE).var()
    assert variance == pytest.approx(SCHEDULE.sigma[150].item() ** 2, rel=0.05)
    assert torch.equal(augment_small_frames(x, 0, eps, SCHEDULE), x)


def test_the_noise_of_one_frame_may_serve_all():
    x, eps = noise(4, 3, 6, 8), noise(1, 3, 6, 8, seed=1)
    assert torch.equal(augment_small_frames(x, 30, eps, SCHEDULE),
                       augment_small_frames(x, 30, eps.repeat(4, 1, 1, 1), SCHEDULE))


def test_the_noise_is_the_one_of_comfyuis_upscaler():
    from comfy.ldm.modules.diffusionmodules.upscaling import ImageConcatWithNoiseAugmentation
    core = ImageConcatWithNoiseAugmentation({"linear_start": 0.0001, "linear_end": 0.02}, max_noise_level=350)
    assert (core.linear_start, core.linear_end, core.num_timesteps) == (0.0001, 0.02, SCHEDULE.steps)
    x = noise(4, 3, 6, 8)
    eps = torch.randn(x.shape, generator=torch.Generator().manual_seed(-3))
    for level in (1, 30, 350):
        theirs, _ = core(x, torch.tensor([level]), seed=-3)
        assert relative_error(augment_small_frames(x, level, eps, SCHEDULE), theirs) < 1e-6


@pytest.mark.parametrize("level", [-1, TRAINED_LEVEL + 1])
def test_levels_that_the_upscaler_has_never_seen_are_refused(level):
    check_level(0, TRAINED_LEVEL)
    check_level(TRAINED_LEVEL, TRAINED_LEVEL)
    with pytest.raises(VideoLDMError, match=f"noise_level is {level}, .* levels from 0 to 250"):
        check_level(level, TRAINED_LEVEL)


# docs/papers.md#v14

def test_tiles_equal_the_whole_up_to_the_margin_of_a_networks_reach_and_differ_at_their_borders_alone_beyond_it():
    """Convolutions see the padding at a tile's border. The outermost quarter of a tile's overlap does not count."""
    kernels = noise(2, 3, 3, 3, 3, seed=4) / 5
    x, cuts = noise(2, 3, 30, 44), plan_pieces(2, 30, 44, 8, 2, 16)

    def network(x, layers):
        for kernel in kernels[:layers]:
            x = torch.tanh(torch.nn.functional.conv2d(x, kernel, padding=1))
        return x
    for layers in (1, 2):
        whole = network(x, layers)
        pieces = predict_in_pieces(
            lambda frames, rows, columns, layers=layers: network(x[frames, :, rows, columns], layers), cuts, 3)
        error = (pieces - whole).abs().amax((0, 1))
        borders = torch.zeros(30, 44, dtype=torch.bool)
        for spans, dim in ((cuts.rows, 0), (cuts.columns, 1)):
            for before, after in zip(spans, spans[1:]):
                shared = [slice(None), slice(None)]
                shared[dim] = slice(after.start, before.stop)
                borders[tuple(shared)] = True
        assert error[~borders].max() < 1e-6
        assert (error.max() < 1e-6) == (layers == 1)


def frame(height, width, seed=0):
    return torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("height, width", [(32, 48), (5, 3), (1, 1)])
def test_a_shift_of_all_colours_is_taken_back_and_details_stay(height, width):
    small = frame(height, width)
    details = frame(4 * height, 4 * width, 1)
    means = fold_pixels(details).unflatten(1, (3, 16)).mean(2, keepdim=True)
    details -= unfold_pixels(means.expand(-1, -1, 16, -1, -1).flatten(1, 2))
    large = small.repeat_interleave(4, 2).repeat_interleave(4, 3) + details
    shift = torch.tensor([0.05, 0.0, -0.03]).view(1, 3, 1, 1)
    assert (match_colours(small, large) - large).abs().max() < 1e-5
    assert (match_colours(small, large + shift) - large).abs().max() < 1e-5


def test_another_colour_on_one_side_is_taken_back_there_alone():
    small = torch.full((1, 3, 40, 80), 0.5)
    large = torch.full((1, 3, 160, 320), 0.5)
    large[..., :160] += 0.1
    kept = match_colours(small, large)
    assert (kept[..., :120] - 0.5).abs().max() < 0.005 and (kept[..., 200:] - 0.5).abs().max() < 0.005
