"""The driving world.

A drive is the same whatever its size and rate. Labels, captions and boxes tell the truth.
"""

import numpy as np
import pytest

from video_ldm.demo import world


def brightness_error(a, b):
    return np.abs(a.astype(float) - b.astype(float)).mean()


def test_the_same_seed_gives_the_same_drive():
    first, again, other = (world.clip(seed, 3) for seed in (5, 5, 6))
    assert np.array_equal(first.frames, again.frames)
    assert (first.caption, first.labels, first.boxes) == (again.caption, again.labels, again.boxes)
    assert not np.array_equal(first.frames, other.frames)


def test_the_frame_rate_only_chooses_moments():
    slow, fast = world.clip(9, 4, fps=4.0), world.clip(9, 13, fps=16.0)
    assert np.array_equal(slow.frames, fast.frames[::4])
    assert slow.boxes == fast.boxes[::4]


def test_the_resolution_only_chooses_pixels():
    small, large = world.clip(9, 3, 64, 128), world.clip(9, 3, 128, 256)
    halved = large.frames.reshape(3, 64, 2, 128, 2, 3).astype(float).mean((2, 4))
    assert brightness_error(small.frames, halved) < 2.5
    for boxes, larger in zip(small.boxes, large.boxes):
        assert boxes == pytest.approx(larger) if not boxes else [box[0] for box in boxes] == [box[0] for box in larger]
        for box, other in zip(boxes, larger):
            assert box[1:] == pytest.approx(other[1:], abs=1e-6)


def test_training_seeds_and_held_out_seeds_never_meet():
    assert world.train_seed(0) == 0 and world.held_out_seed(0) == world.HELD_OUT
    assert world.train_seed(world.HELD_OUT - 1) < world.held_out_seed(0)
    for wrong in (-1, world.HELD_OUT):
        with pytest.raises(ValueError):
            world.train_seed(wrong)
    with pytest.raises(ValueError):
        world.held_out_seed(-1)


def test_captions_say_what_the_labels_say():
    for seed in range(60):
        drawn = world.scene(seed)
        labels, words = world.labels(drawn), world.caption(drawn)
        assert ("at night" in words) == bool(labels["night"])
        assert ("driving fast" in words) == bool(labels["fast"]) == (labels["speed"] > 9)
        assert ("turning right" in words) == (labels["steering"] > 0) == (drawn.curvature > 0.005)
        assert words.count(" car") == labels["cars"] == len(drawn.cars)
        assert all(f"a {colour} car" in words for colour in labels["colours"])


def test_boxes_lie_on_cars():
    """In the box of the nearest car, and not beside it, is its paint: the picture without cars differs there alone."""
    for seed in (1, 4, 9, 11):
        drawn = world.scene(seed)
        bare = world.Scene(**{**drawn.__dict__, "cars": ()})
        with_cars, without = (world.render(scene, 0.0, 64, 128).astype(float) for scene in (drawn, bare))
        changed = np.abs(with_cars - without).max(-1) > 12
        inside = np.zeros_like(changed)
        boxes = world.boxes(drawn, 0.0)
        for _, x0, y0, x1, y1 in boxes:
            left, right = x0 - 0.1 * (x1 - x0), x1 + 0.1 * (x1 - x0)             # the shadow reaches a little further
            below = int(np.ceil((y1 + 0.15 * (y1 - y0)) * 64)) + 1
            inside[int(y0 * 64):below, max(int(left * 128) - 1, 0):int(np.ceil(right * 128)) + 1] = True
            assert changed[int(y0 * 64):int(np.ceil(y1 * 64)), int(x0 * 128):int(np.ceil(x1 * 128))].mean() > 0.6
        assert boxes and not (changed & ~inside).any()


def test_cars_keep_their_colour_and_the_road_moves():
    moving = world.clip(3, 8)
    seen = {box[0] for boxes in moving.boxes for box in boxes}
    assert seen <= set(moving.labels["colours"])
    assert np.abs(np.diff(moving.frames.astype(float), axis=0)).mean() > 1


def test_night_is_darker_than_day():
    bright = {night: [] for night in (0, 1)}
    for seed in range(40):
        bright[world.labels(world.scene(seed))["night"]].append(world.clip(seed, 1).frames.mean())
    assert max(bright[1]) < min(bright[0])
