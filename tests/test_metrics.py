"""The figures of quality, on sets whose answer is known."""

import numpy as np
import pytest

from video_ldm.temporal.errors import VideoLDMError
from video_ldm.temporal.metrics import frechet_distance, motion, motion_ratio


def test_the_distance_of_a_set_to_itself_is_zero():
    features = np.random.default_rng(0).normal(size=(50, 8))
    assert frechet_distance(features, features) == pytest.approx(0, abs=1e-9)


def test_the_distance_of_shifted_and_scaled_gaussians_is_the_analytic_one():
    rng = np.random.default_rng(1)
    base = rng.normal(size=(40, 5))
    a = (base - base.mean(0)) @ np.linalg.inv(np.linalg.cholesky(np.cov(base, rowvar=False))).T   # mean 0, covariance 1
    scales, shift = np.array([1, 2, 3, 0.5, 1]), np.array([0, 1, -2, 0, 0.5])
    expected = np.square(shift).sum() + np.square(scales - 1).sum()
    assert frechet_distance(a, a * scales + shift) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(a * scales + shift, a) == pytest.approx(expected, rel=1e-9)


def test_the_distance_is_right_for_covariances_of_lower_rank():
    rng = np.random.default_rng(2)
    few = rng.normal(size=(4, 16))
    assert frechet_distance(few, few) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(few, few + 1) == pytest.approx(16, rel=1e-9)


@pytest.mark.parametrize("a, b", [(np.zeros((1, 3)), np.zeros((5, 3))), (np.zeros((5, 3)), np.zeros((5, 4))),
                                  (np.full((5, 3), np.nan), np.zeros((5, 3)))])
def test_features_that_have_no_distance_are_refused_in_a_sentence(a, b):
    with pytest.raises(VideoLDMError, match="Frechet distance needs"):
        frechet_distance(a, b)


def test_a_frozen_clip_has_no_motion_and_a_steady_one_its_step():
    frozen = np.full((2, 5, 4, 6, 3), 100, np.uint8)
    moving = frozen + (np.arange(5, dtype=np.uint8) * 7).reshape(1, 5, 1, 1, 1)
    assert motion(frozen) == 0
    assert motion(moving) == pytest.approx(7)
    assert motion_ratio(moving, moving) == 1


def test_motion_is_the_mean_over_steps_places_and_clips_whichever_way_they_go():
    greys = np.array([[100, 90, 93], [10, 250, 250]], np.uint8)         # steps of 10 down and 3 up; of 240 up and 0
    clips = np.broadcast_to(greys[:, :, None, None, None], (2, 3, 4, 6, 3)).copy()
    assert motion(clips[0]) == pytest.approx(6.5) and motion(clips) == pytest.approx((6.5 + 120) / 2)
    assert motion(clips[None, :1].repeat(5, 0)) == pytest.approx(6.5)
    clips[0, 1, :, :3] = 100                                            # half the picture stays, then falls by 7
    assert motion(clips[0]) == pytest.approx((10 / 2 + (3 + 7) / 2) / 2)


def test_the_ratio_of_motion_is_that_of_the_clips_to_the_real_ones():
    still = np.full((5, 4, 6, 3), 100, np.uint8)
    by = [still + (np.arange(5, dtype=np.uint8) * step).reshape(5, 1, 1, 1) for step in (6, 4)]
    assert motion_ratio(by[0], by[1]) == pytest.approx(1.5) and motion_ratio(still, by[1]) == 0


def test_motion_needs_frames_and_real_clips_that_move():
    with pytest.raises(VideoLDMError, match="2 frames or more"):
        motion(np.zeros((1, 4, 4, 3), np.uint8))
    with pytest.raises(VideoLDMError, match="do not move"):
        motion_ratio(np.zeros((2, 4, 4, 3), np.uint8), np.zeros((2, 4, 4, 3), np.uint8))
