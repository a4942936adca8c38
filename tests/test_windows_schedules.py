"""Windows of frames: what every schedule and every way of joining must hold to, whatever the lengths."""

import itertools

import pytest
import torch

from video_ldm.temporal.schedules import FUSES, SCHEDULES, Fusion, van_der_corput

LENGTHS = [(frames, length, overlap)
           for frames, length, overlap in itertools.product((5, 9, 17, 33), (4, 5, 8), (0, 1, 3, 7))
           if overlap < length < frames]
every_schedule = pytest.mark.parametrize("schedule", SCHEDULES)
every_fuse = pytest.mark.parametrize("fuse", FUSES)


@every_schedule
def test_windows_are_of_one_length_hold_each_frame_once_and_together_hold_them_all(schedule):
    for (frames, length, overlap), step in itertools.product(LENGTHS, range(6)):
        windows = SCHEDULES[schedule](frames, length, overlap, step)
        assert {len(window) for window in windows} == {length}
        assert all(len(set(window)) == length for window in windows)
        assert set().union(*windows) == set(range(frames))
        assert all((b - a) % frames == 1 for window in windows for a, b in zip(window, window[1:]))


@every_schedule
def test_neighbouring_windows_share_the_overlap_or_more(schedule):
    for (frames, length, overlap), step in itertools.product(LENGTHS, range(6)):
        windows = SCHEDULES[schedule](frames, length, overlap, step)
        following = windows[1:] + (windows[:1] if schedule == "looped" else [])
        assert all(len(set(a) & set(b)) >= overlap for a, b in zip(windows, following)), (frames, length, overlap, step)


def test_static_windows_are_as_few_as_can_be_and_the_same_in_every_step():
    assert SCHEDULES["static"](16, 8, 4) == [list(range(start, start + 8)) for start in (0, 4, 8)]
    for frames, length, overlap in LENGTHS:
        windows = SCHEDULES["static"](frames, length, overlap, 0)
        assert windows == SCHEDULES["static"](frames, length, overlap, 5)
        assert (len(windows) - 1) * (length - overlap) + overlap < frames      # one fewer would not reach


def test_shifting_windows_put_their_seams_at_every_place_within_a_few_steps():
    starts = {window[0] for step in range(8) for window in SCHEDULES["shifting"](100, 16, 8, step)}
    assert starts == set(range(85))


def test_looped_windows_join_the_last_frame_to_the_first():
    for step in range(4):
        assert any({15, 0} <= set(window) for window in SCHEDULES["looped"](16, 8, 4, step))


def test_the_shifts_of_successive_steps_are_spread_by_halving():
    assert [van_der_corput(step) for step in range(5)] == [0, 0.5, 0.25, 0.75, 0.125]


def fused(schedule, fuse, frames, length, overlap, clips, channels, part_of):
    """Windows joined. `part_of(number of a window, its images)` gives its result for them, `images channels`."""
    fusion = Fusion(torch.zeros(clips * frames, channels), frames)
    for number, window in enumerate(SCHEDULES[schedule](frames, length, overlap, 1)):
        images = [clip * frames + frame for clip in range(clips) for frame in window]
        fusion.add(part_of(number, images), window, images, FUSES[fuse](window, frames, overlap))
    return fusion.mean


def shares_of(schedule, fuse, frames, length, overlap):
    """How much each window counts at each frame, `frames windows`: each speaks in a channel of its own."""
    count = len(SCHEDULES[schedule](frames, length, overlap, 1))
    return fused(schedule, fuse, frames, length, overlap, 1, count,
                 lambda number, images: torch.eye(count)[[number] * len(images)])


@every_fuse
@every_schedule
def test_the_weights_of_the_windows_are_above_0_and_sum_to_1_at_every_frame(schedule, fuse):
    for sizes in LENGTHS:
        shares = shares_of(schedule, fuse, *sizes)
        assert (shares.sum(1) - 1).abs().max() < 1e-6
        for share, window in zip(shares.T, SCHEDULES[schedule](*sizes, 1)):
            assert share[window].min() > 0 and share.count_nonzero() == len(window)


@every_fuse
@every_schedule
def test_windows_that_agree_are_joined_without_a_change_to_the_bit(schedule, fuse):
    for frames, length, overlap in LENGTHS:
        said = torch.randn(2 * frames, 2)
        joined = fused(schedule, fuse, frames, length, overlap, 2, 2, lambda _, images, said=said: said[images])
        assert torch.equal(joined, said)


@pytest.mark.parametrize("fuse, expected", [("pyramid", [4 / 5, 3 / 5, 2 / 5, 1 / 5]), ("flat", [0.5] * 4),
                                            ("ramp", [4 / 5, 3 / 5, 2 / 5, 1 / 5])])
def test_two_windows_fade_into_one_another(fuse, expected):
    first = shares_of("static", fuse, 12, 8, 4)[:, 0]
    assert torch.equal(first[:4], torch.ones(4)) and torch.equal(first[8:], torch.zeros(4))
    assert (first[4:8] - torch.tensor(expected)).abs().max() < 1e-6


@pytest.mark.parametrize("fuse, window, overlap, expected", [
    # pyramid: 1 at the edges, one more each frame inwards, wherever in the clip, whatever the overlap
    ("pyramid", range(0, 5), 2, [1, 2, 3, 2, 1]),
    ("pyramid", range(4, 10), 1, [1, 2, 3, 3, 2, 1]),
    ("pyramid", [8, 9, 0, 1], 3, [1, 2, 2, 1]),
    # ramp: n + 1 of overlap + 1 parts, at the ends that have a neighbour
    ("ramp", range(3, 9), 2, [1 / 3, 2 / 3, 1, 1, 2 / 3, 1 / 3]),
    ("ramp", range(0, 6), 2, [1, 1, 1, 1, 2 / 3, 1 / 3]),
    ("ramp", range(4, 10), 2, [1 / 3, 2 / 3, 1, 1, 1, 1]),
    ("ramp", range(0, 10), 2, [1] * 10),
    ("ramp", range(3, 7), 3, [1 / 4, 1 / 2, 1 / 2, 1 / 4]),     # fades that cross: the lower of the two
    ("ramp", range(3, 7), 0, [1] * 4),
    ("ramp", [8, 9, 0, 1], 1, [1 / 2, 1, 1, 1 / 2]),            # a loop has no ends, here and where it begins at 0
    ("ramp", [9, 0, 1, 2], 1, [1 / 2, 1, 1, 1 / 2]),
    ("flat", range(3, 7), 2, [1] * 4),
])
def test_the_weights_of_a_window_in_a_clip_of_10_frames(fuse, window, overlap, expected):
    assert FUSES[fuse](list(window), 10, overlap) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("schedule, step, starts", [
    ("static", 0, [0, 3, 6, 9]), ("static", 3, [0, 3, 6, 9]),
    ("shifting", 0, [0, 3, 6, 9]), ("shifting", 1, [0, 1, 4, 7, 9]), ("shifting", 3, [0, 2, 5, 8, 9]),
    ("looped", 0, [0, 2, 5, 7, 10]), ("looped", 1, [1, 3, 6, 8, 11])])
def test_windows_of_4_frames_that_share_1_begin_here_in_a_clip_of_13(schedule, step, starts):
    assert [window[0] for window in SCHEDULES[schedule](13, 4, 1, step)] == starts


def test_three_windows_are_joined_by_their_shares_of_the_weights():
    """Windows of 4 begin at 0, 1 and 2 in 6 frames. By the pyramid the frames of a window count 1, 2, 2, 1."""
    expected = torch.tensor([[1, 0, 0], [2 / 3, 1 / 3, 0], [2 / 5, 2 / 5, 1 / 5], [1 / 5, 2 / 5, 2 / 5],
                             [0, 1 / 3, 2 / 3], [0, 0, 1]])
    assert (shares_of("static", "pyramid", 6, 4, 3) - expected).abs().max() < 1e-6


def test_static_windows_that_do_not_fit_evenly_are_spread_with_no_gap_more_than_one_longer():
    """5 windows of 4 frames that share 1 or more, over 14: 10 frames to go in 4 steps."""
    assert [window[0] for window in SCHEDULES["static"](14, 4, 1)] == [0, 2, 5, 8, 10]
