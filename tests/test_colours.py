"""Cars that keep their colour, on clips whose answer is known."""

from dataclasses import replace

import numpy as np
import pytest

from video_ldm.benchmarks.cascade import real_clips
from video_ldm.benchmarks.colours import LEAST, cars_of, figures_of, keeps_colour, pieces_of
from video_ldm.benchmarks.quality import BUNDLED, LEAST_KEPT, THROUGH, verdict_of_colours
from video_ldm.demo import world

CLIPS = range(20)


@pytest.fixture(scope="module")
def real():
    return real_clips(CLIPS)


def drive(number):
    return world.scene(world.held_out_seed(number))


def recoloured(number, frame=4):
    """A drive whose cars have the next colour of the world from a frame on."""
    scene, names = drive(number), list(world.COLOURS)
    cars = (replace(car, colour=names[(names.index(car.colour) + 1) % len(names)]) for car in scene.cars)
    other = replace(scene, cars=tuple(cars))
    return np.stack([world.render(other if at >= frame else scene, at / 4, 64, 128) for at in range(8)])


def clear_cars(number):
    """The colours of the cars of a drive that are large enough for long enough."""
    shown = [colour for at in range(8) for colour, x0, y0, x1, y1 in world.boxes(drive(number), at / 4)
             if (x1 - x0) * 128 * (y1 - y0) * 64 >= 2 * LEAST]
    return {colour for colour in shown if shown.count(colour) >= 4}


def test_cars_of_real_clips_keep_their_colour_and_most_of_them_are_found(real):
    kept, _ = figures_of(real)
    assert kept == 1
    clear = [(number, colour) for number in CLIPS for colour in clear_cars(number)]
    found = {(number, car[0].colour) for number in CLIPS for car in cars_of(real[number])}
    assert np.mean([car in found for car in clear]) > 0.85
    assert all(car in found for car in clear if car[1] != "white")      # small white ones are taken for lane marks


def test_no_paint_is_found_where_no_car_is(real):
    for number, clip in zip(CLIPS, real[:8]):
        for at, pieces in enumerate(pieces_of(clip)):
            there = world.boxes(drive(number), at / 4)
            for piece in pieces:
                x, y = piece.centre[0] / 128, piece.centre[1] / 64
                assert any(piece.colour == colour and x0 - 0.02 <= x <= x1 + 0.02 and y0 - 0.03 <= y <= y1 + 0.03
                           for colour, x0, y0, x1, y1 in there)


def test_cars_that_change_their_colour_midway_are_caught():
    clips = np.stack([recoloured(number) for number in CLIPS])
    seen_throughout = [car for clip in clips for car in cars_of(clip) if car[0].frame == 0 and car[-1].frame == 7]
    assert len(seen_throughout) > 10
    assert np.mean([keeps_colour(car) for car in seen_throughout]) < 0.1


def test_frames_of_unrelated_drives_hardly_hold_a_car_that_can_be_followed(real):
    frames = np.arange(8)
    mixed = np.stack([real[(7 * number + 13 * frames) % len(real), frames] for number in CLIPS])
    kept, cars = figures_of(mixed)
    assert kept < 0.2 and cars < figures_of(real)[1] / 2


def test_clips_without_cars_have_no_share():
    empty = [number for number in range(60) if not drive(number).cars][:2]
    kept, cars = figures_of(real_clips(empty))
    assert np.isnan(kept) and cars == 0


def test_the_bundled_layers_are_held_to_what_the_autoencoder_allows():
    def verdict(kept):
        return verdict_of_colours({THROUGH: (0, 0, 0.98, 1), BUNDLED: (0, 0, kept, 1)})
    assert not verdict(LEAST_KEPT) and "keep their colour" in verdict(0.7)[0] and not verdict_of_colours({})
    assert verdict(float("nan"))
