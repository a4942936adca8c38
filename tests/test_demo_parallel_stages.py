"""Stages of train-demo side by side.

Every stage runs once. No stage waits for ever. A failure ends them all.
"""

import sys
import time

import pytest

from video_ldm.demo import data, models, parallel_stages, train
from video_ldm.temporal.training.distributed import pick_device


def test_every_stage_is_in_one_lane_and_the_lanes_come_to_an_end():
    stages = [stage for lane in parallel_stages.LANES for stage in lane]
    assert sorted(stages) == sorted(train.STEPS)
    waiting, done = [list(lane) for lane in parallel_stages.LANES], set()
    while any(waiting):
        ready = [lane for lane in waiting if lane and set(parallel_stages.NEEDS.get(lane[0], ())) <= done]
        assert ready, f"these wait for each other: {[lane[0] for lane in waiting if lane]}"
        done |= {lane.pop(0) for lane in ready}


def test_one_by_one_too_a_stage_comes_after_all_that_it_needs():
    order = list(train.STEPS)
    assert all(order.index(needed) < order.index(stage)
               for stage, needs in parallel_stages.NEEDS.items() for needed in needs)


def test_a_stage_is_finished_when_all_its_files_are_there(tmp_path):
    files = data.Files(tmp_path)
    for stage, paths in {"render": [files.frames], "latents": [files.latents, files.texts],
                         "render-large": [files.large], "interpolation-data": [files.interpolation],
                         "pvdm-render": [files.pvdm_frames, files.pvdm_boxes], "pvdm-planes": [files.pvdm_planes],
                         "image": [files.weights("image")]}.items():
        for path in paths:
            assert not parallel_stages.finished(stage, files)
            path.touch()
        assert parallel_stages.finished(stage, files)


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """Lanes whose process runs `script`, with its number as `lane` and the arguments as `argv`."""
    def make(script):
        path = tmp_path / "fake.py"
        path.write_text("import sys, time, pathlib\nargv, lane = sys.argv[3:-2], int(sys.argv[-1])\n" + script)
        monkeypatch.setattr(parallel_stages, "RUN", path)
    return make


def test_lanes_run_at_once_with_the_same_arguments(fake, tmp_path):
    fake("folder = pathlib.Path(argv[1])\n(folder / str(lane)).touch()\n"
         f"while len(list(folder.glob('[0-9]'))) < {len(parallel_stages.LANES)}: time.sleep(0.01)\n")
    assert parallel_stages.side_by_side(["--folder", str(tmp_path)]) == 0
    assert len(list(tmp_path.glob("[0-9]"))) == len(parallel_stages.LANES)


def test_a_lane_that_fails_ends_the_others(fake):
    fake("time.sleep(0 if lane == 1 else 60)\nsys.exit(3)\n")
    began = time.monotonic()
    assert parallel_stages.side_by_side([]) == 3 and time.monotonic() - began < 30


def test_what_lanes_say_of_their_progress_comes_through_and_is_not_for_a_terminal(fake, capsys):
    fake("sys.stderr.write(f'lane {lane}, {sys.stderr.isatty()}\\n')\n")
    assert parallel_stages.side_by_side([]) == 0
    lines = sorted(capsys.readouterr().err.splitlines())
    assert lines == [f"lane {lane}, False" for lane in range(len(parallel_stages.LANES))]


@pytest.mark.parametrize("arguments", [["--stage", "image"], ["--max-minutes", "1"]])
def test_side_by_side_is_for_whole_trainings(arguments, tmp_path):
    with pytest.raises(SystemExit, match="leave out --stage"):
        train.main(["--folder", str(tmp_path), "--side-by-side", *arguments])


def test_lanes_are_taken_on_a_gpu_and_where_asked_for(monkeypatch, tmp_path):
    taken = []
    monkeypatch.setattr(parallel_stages, "side_by_side", lambda argv: taken.append(argv) or 0)
    monkeypatch.setattr(train, "STEPS", {})
    folder = ["--folder", str(tmp_path)]
    train.main(folder)
    train.main([*folder, "--side-by-side"])
    monkeypatch.setattr(train, "pick_device", lambda: pick_device("cuda"))
    train.main(folder)
    train.main([*folder, "--no-side-by-side"])
    assert taken == [[*folder, "--side-by-side"], folder]


def test_a_gpu_is_given_larger_batches(monkeypatch):
    here = models.stage("prediction")
    monkeypatch.setattr(models, "pick_device", lambda: pick_device("cuda"))
    there = models.stage("prediction")
    given = here.on_gpu
    assert here == models.STAGES["prediction"] and here.loop.precision == "bfloat16"
    assert (there.batch, there.loop.steps, there.loop.lr) == (given.batch, given.steps, given.lr)
    assert there.batch * there.loop.steps > here.batch * here.loop.steps
    assert there.loop.cuda_graph and not here.loop.cuda_graph and there.loop.save_every == models.SAVED_EVERY
    assert there.loop.seed == here.loop.seed and there.title == here.title
    assert models.stage("features") == models.STAGES["features"]


def test_clips_are_drawn_in_order_by_all_cores(monkeypatch):
    monkeypatch.setattr(data, "FEW", 2)
    many = [frames for frames, _ in data.render_clips(data.key_frames, 5)]
    alone = [data.key_frames(index)[0] for index in range(5)]
    assert all((a == b).all() for a, b in zip(many, alone, strict=True))
    assert sys.platform != "linux" or not (many[0] == many[1]).all()
