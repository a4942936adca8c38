"""The figures of joint training: what is counted, and what the part says of it."""

import numpy as np
import pytest
import torch

from video_ldm.benchmarks import joint_quality as quality
from video_ldm.demo import joint_stage, train, world


def test_the_paint_and_the_night_are_counted_in_real_clips_that_show_them_and_in_no_others():
    def drives(wanted):
        return np.stack(list(map(joint_stage.film, joint_stage.drives(wanted, 6, world.held_out_seed, 50))))
    painted = drives(lambda scene: quality.shows_paint(scene) and not scene.night)
    night, day = drives(lambda scene: scene.night), drives(lambda scene: not scene.night)
    clips = np.stack(list(map(joint_stage.film, joint_stage.clip_drives(6, world.held_out_seed, 50))))
    assert quality.share(quality.frames_with_paint(painted)) > 0.6
    assert not quality.frames_with_paint(clips).any()
    assert quality.dark_frames(night).all() and not quality.dark_frames(day).any()


def test_a_clip_shows_what_half_of_its_frames_show():
    assert quality.share(np.array([[True] * 4 + [False] * 4, [True] * 3 + [False] * 5])) == 0.5


def test_clips_know_one_paint_and_no_night_and_pictures_know_all():
    clips = joint_stage.clip_drives(40, world.train_seed)
    pictures = joint_stage.drives(lambda scene: True, 60, world.train_seed, joint_stage.FIRST_PICTURE)
    paints = {car.colour for scene in clips for car in scene.cars}
    assert paints == {joint_stage.CLIP_PAINT} and not any(scene.night for scene in clips)
    assert {car.colour for scene in pictures for car in scene.cars} == set(world.COLOURS)
    assert any(scene.night for scene in pictures) and quality.PAINT != joint_stage.CLIP_PAINT
    assert not {scene.seed for scene in clips} & {scene.seed for scene in pictures}


@pytest.mark.parametrize("concept, other", [("night", "paint"), ("paint", "night")])
@pytest.mark.parametrize("kept, left, said", [
    (0.6, 0.45, []), (0.59, 0.4, ["with pictures 59% of the clips show the {}, less than two thirds of the image "
                                  "model's 90%"]),
    (0.9, 0.46, ["with clips alone 46% of the clips show the {}"]), (0.1, 0.9, ["with pictures 10%", "alone 90%"])])
def test_the_part_says_what_does_not_hold(concept, other, kept, left, said):
    names = quality.NETWORKS
    rows = {quality.IMAGE: {concept: 0.9, other: 1.0}, names[joint_stage.JOINT]: {concept: kept, other: 1.0},
            names[joint_stage.ALONE]: {concept: left, other: 0.0}}
    found = quality.verdict(rows)
    assert len(found) == len(said) and all(part.format(concept) in line for part, line in zip(said, found))


@pytest.mark.slow
def test_the_part_trains_both_networks_samples_them_and_goes_on_where_it_was_stopped(tmp_path, monkeypatch):
    """With one step, one clip and small pictures in number. The second time nothing is trained or sampled again."""
    for name, value in dict(CLIPS=2, PICTURES=3, LOOP=joint_stage.replace(joint_stage.LOOP, steps=1)).items():
        monkeypatch.setattr(joint_stage, name, value)
    for name, value in dict(STEPS=1, REAL=3, NAMED=1, NIGHTS=1, OTHERS=2).items():
        monkeypatch.setattr(quality, name, value)

    class Arguments:
        output, models, train, clips = tmp_path, train.BUNDLE, train.WORK, 2
    text, failures = quality.joint(Arguments)
    assert text.count("\n|") == 2 + 5 and "1 steps of 1 clip" in text and len(failures) <= 2
    files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.*")}
    torch.manual_seed(5)
    assert quality.joint(Arguments) == (text, failures)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.*")} == files
