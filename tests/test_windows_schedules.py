"""Windows of frames: what every schedule and every way of joining must hold to, whatever the lengths."""

import itertools

import pytest
import torch

from video_ldm.temporal.schedules import FUSES, SCHEDULES, Fusion, halving

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


def test_steps_are_spread_by_halving():
    assert [halving(step) for step in range(5)] == [0, 0.5, 0.25, 0.75, 0.125]


def fused(schedule, fuse, frames, length, overlap, clips, channels, part_of):
    """Windows joined; part_of: (number of a window, its images) -> what it says of them, `images channels`."""
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
def test_what_all_windows_agree_on_stays_to_the_bit(schedule, fuse):
    for frames, length, overlap in LENGTHS:
        said = torch.randn(2 * frames, 2)
        assert torch.equal(fused(schedule, fuse, frames, length, overlap, 2, 2, lambda _, images: said[images]), said)


@pytest.mark.parametrize("fuse, expected", [("pyramid", [4 / 5, 3 / 5, 2 / 5, 1 / 5]), ("flat", [0.5] * 4),
                                            ("ramp", [4 / 5, 3 / 5, 2 / 5, 1 / 5])])
def test_two_windows_fade_into_one_another(fuse, expected):
    first = shares_of("static", fuse, 12, 8, 4)[:, 0]
    assert torch.equal(first[:4], torch.ones(4)) and torch.equal(first[8:], torch.zeros(4))
    assert (first[4:8] - torch.tensor(expected)).abs().max() < 1e-6
