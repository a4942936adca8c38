"""The training loop: what a run leaves behind, how it resumes, what stops it."""

import csv
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from video_ldm.temporal.errors import VideoLDMError
from video_ldm.temporal.training import distributed, plot
from video_ldm.temporal.training.checkpoint import write_atomically
from video_ldm.temporal.training.ema import EMA
from video_ldm.temporal.training.loop import Loop, LoopParams, StepContext, step_seed
from video_ldm.temporal.training.plot import plot_curves, plot_log, read_log, ticks, write_csv
from video_ldm.temporal.training.progress import Progress
from video_ldm.tests import training_worker

SETTINGS = dict(steps=40, lr=1e-2, warmup=5, ema_decay=0.9, save_every=10, log_every=4, device="cpu")


class Net(nn.Module):
    """A small network with everything that has state: dropout, buffers, a frozen part."""

    def __init__(self, width=8):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(4, width), nn.BatchNorm1d(width), nn.Linear(width, 1)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)

    def forward(self, x):
        return self.last(nn.functional.dropout(self.norm(self.first(self.frozen(x))), 0.2))


def make_loop(folder, broken_at=None, wreck=float("nan"), **settings):
    torch.manual_seed(0)
    net = Net(settings.pop("width", 8))

    def loss(step):
        x = torch.randn(16, 4, generator=step.generator)
        if step.step == broken_at and isinstance(wreck, BaseException):
            raise wreck
        scale = wreck if step.step == broken_at else 1.0
        return {"loss": scale * (net(x) - x.sum(1, keepdim=True)).square().mean(), "size": x.abs().mean()}
    return Loop(LoopParams(**(SETTINGS | settings)), {"net": net}, loss, folder, "small net")


def everything(loop):
    """All tensors a run ends with: weights, buffers, average, optimizer."""
    tensors = dict(loop._weights()) | {f"ema.{k}": v for k, v in loop.ema.average.items()}
    return tensors | {f"{n}.{k}": v for n, state in loop._optimizer_states() for k, v in state.items()}


def assert_same(one, other):
    one, other = everything(one), everything(other)
    assert one.keys() == other.keys()
    different = [name for name in one if not torch.equal(one[name], other[name])]
    assert not different


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    loop = make_loop(tmp_path_factory.mktemp("run"))
    assert loop.run()
    return loop


def test_a_resumed_run_ends_with_the_weights_of_an_uninterrupted_one(uninterrupted, tmp_path):
    assert not make_loop(tmp_path).run(on_step=lambda step, steps: step == 17)
    second = make_loop(tmp_path)
    assert second.step == 17 and second.run()
    assert_same(uninterrupted, second)


def test_a_run_that_crashed_between_checkpoints_ends_with_the_same_weights(uninterrupted, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        make_loop(tmp_path, broken_at=27, wreck=KeyboardInterrupt()).run()
    second = make_loop(tmp_path)
    assert second.step == 20 and second.run()
    assert_same(uninterrupted, second)
    assert [row["step"] for row in read_log(second.log)] == [row["step"] for row in read_log(uninterrupted.log)]


def test_max_seconds_stops_after_a_step_and_saves(tmp_path):
    loop = make_loop(tmp_path)
    assert not loop.run(max_seconds=0)
    assert loop.step == 1 and make_loop(tmp_path).step == 1


def test_a_finished_run_does_nothing_more(uninterrupted):
    again = make_loop(uninterrupted.folder)
    assert again.step == 40 and again.run()
    assert_same(uninterrupted, again)


def test_training_leaves_the_programs_own_randomness_alone(tmp_path):
    torch.manual_seed(5)
    loop = make_loop(tmp_path, steps=3)
    torch.manual_seed(5)
    loop.run()
    drawn = torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.rand(3))


def test_only_what_requires_a_gradient_is_trained_and_frozen_weights_are_not_stored(uninterrupted, tmp_path):
    fresh = make_loop(tmp_path)
    assert torch.equal(fresh.modules["net"].frozen.weight, uninterrupted.modules["net"].frozen.weight)
    assert not torch.equal(fresh.modules["net"].first.weight, uninterrupted.modules["net"].first.weight)
    with safe_open(str(uninterrupted.checkpoint), framework="pt") as file:
        names = set(file.keys())
    assert "model.net.norm.running_mean" in names and not any("frozen" in name for name in names)


def test_the_checkpoint_is_safetensors_with_its_state_in_the_header_and_beside_it(uninterrupted):
    with safe_open(str(uninterrupted.checkpoint), framework="pt") as file:
        state = json.loads(file.metadata()["state"])
    assert state == json.loads(uninterrupted.checkpoint.with_suffix(".json").read_text())
    assert state["step"] == 40 and state["settings"]["lr"] == 1e-2
    assert sorted(path.name for path in uninterrupted.folder.iterdir()) == \
        ["last.json", "last.safetensors", "log.csv", "log.jsonl", "log.png"]


@pytest.mark.parametrize("wreck", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_with_a_sentence_and_keeps_the_last_good_checkpoint(tmp_path, wreck):
    with pytest.raises(VideoLDMError, match="stopped at step 13: loss is (nan|inf).* checkpoint of step 10 .* is kept"):
        make_loop(tmp_path, broken_at=13, wreck=wreck).run()
    kept = make_loop(tmp_path)
    assert kept.step == 10 and all(tensor.isfinite().all() for tensor in everything(kept).values())


def test_a_bad_loss_that_a_gpu_reports_late_is_still_never_saved(tmp_path):
    loop = make_loop(tmp_path, broken_at=13, log_every=100)
    checked = loop._refuse_bad
    loop._refuse_bad = lambda rows: checked(rows) if len(rows) > 1 else None      # no look after each step, as on a GPU
    with pytest.raises(VideoLDMError, match="stopped at step 13"):
        loop.run()
    assert make_loop(tmp_path).step == 10


@pytest.mark.parametrize("damage", [lambda data: data[:len(data) // 2], lambda data: b"", lambda data: b"<p>" + data])
def test_a_damaged_checkpoint_is_refused_in_a_sentence_and_left_alone(uninterrupted, tmp_path, damage):
    broken = damage(uninterrupted.checkpoint.read_bytes())
    (tmp_path / "last.safetensors").write_bytes(broken)
    with pytest.raises(VideoLDMError, match="last.safetensors' cannot be read: it is damaged or incomplete"):
        make_loop(tmp_path)
    assert (tmp_path / "last.safetensors").read_bytes() == broken


def test_a_checkpoint_of_another_model_is_refused_naming_the_tensor(uninterrupted, tmp_path):
    (tmp_path / "last.safetensors").write_bytes(uninterrupted.checkpoint.read_bytes())
    sentence = r"another model: 'model.net.first.weight' is \(8, 4\) in it and \(9, 4\) here"
    with pytest.raises(VideoLDMError, match=sentence):
        make_loop(tmp_path, width=9)


def test_an_ordinary_safetensors_file_is_not_taken_for_a_checkpoint(tmp_path):
    save_file({"a": torch.zeros(1)}, tmp_path / "last.safetensors")
    with pytest.raises(VideoLDMError, match="not a checkpoint of this training"):
        make_loop(tmp_path)


def test_a_failed_write_leaves_the_old_file_and_nothing_half_made(tmp_path):
    target = tmp_path / "file.txt"
    target.write_text("old")

    def write(path):
        path.write_text("half")
        raise OSError("disk full")
    with pytest.raises(OSError):
        write_atomically(target, write)
    assert target.read_text() == "old" and list(tmp_path.iterdir()) == [target]


def test_the_average_follows_its_formula_and_is_what_ema_state_returns(uninterrupted):
    weight = nn.Parameter(torch.zeros(2))
    ema = EMA({"w": weight}, 0.5)
    expected = 0.0
    for n in range(20):
        weight.data.fill_(n + 1.0)
        ema.update({"w": weight}, n)
        decay = min(0.5, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * (n + 1)
    assert torch.allclose(ema.average["w"], torch.full((2,), expected))
    state = uninterrupted.ema_state("net")
    assert state.keys() == uninterrupted.modules["net"].state_dict().keys()
    assert torch.equal(state["first.weight"], uninterrupted.ema.average["net.first.weight"])
    assert torch.equal(state["frozen.weight"], uninterrupted.modules["net"].frozen.weight)


def test_the_checkpoint_holds_the_live_weights_and_the_average_under_their_own_names(uninterrupted):
    stored = load_file(uninterrupted.checkpoint)
    for name, weight in uninterrupted.parameters.items():
        assert torch.equal(stored[f"model.{name}"], weight)
        assert torch.equal(stored[f"ema.{name}"], uninterrupted.ema.average[name])
        assert not torch.equal(stored[f"model.{name}"], stored[f"ema.{name}"])


def test_what_is_handed_on_after_training_is_the_average_and_not_the_last_weights(uninterrupted):
    state, live = uninterrupted.ema_state("net"), uninterrupted.modules["net"].state_dict()
    for name, average in uninterrupted.ema.average.items():
        assert torch.equal(state[name.removeprefix("net.")], average)
        assert not torch.equal(state[name.removeprefix("net.")], live[name.removeprefix("net.")])
    assert torch.equal(state["norm.running_mean"], live["norm.running_mean"])       # buffers have no average


def test_the_learning_rate_warms_up_and_falls_along_a_cosine(tmp_path):
    loop = make_loop(tmp_path, steps=100, warmup=10, lr=1.0)
    assert [loop.lr_at(step) for step in (0, 4, 9, 50, 99)] == pytest.approx([0.1, 0.5, 1, 1, 1])
    loop = make_loop(tmp_path, steps=100, warmup=0, lr=1.0, lr_end=0.2)
    assert [loop.lr_at(step) for step in (0, 50, 100)] == pytest.approx([1, 0.6, 0.2])


def test_gradients_are_clipped_and_biases_do_not_decay(tmp_path):
    loop = make_loop(tmp_path, steps=1, grad_clip=1e-3)
    loop.run()
    norm = torch.cat([p.grad.flatten() for p in loop.parameters.values()]).norm()
    assert norm == pytest.approx(1e-3, rel=1e-3) and read_log(loop.log)[0]["grad_norm"] > 0.1
    decays = {id(p): group["weight_decay"] for group in loop.optimizer.param_groups for p in group["params"]}
    assert {name: decays[id(p)] for name, p in loop.parameters.items() if name.startswith("net.first")} == \
        {"net.first.weight": 0.01, "net.first.bias": 0.0}


def test_bfloat16_is_used_on_the_cpu_only_when_asked_for(tmp_path):
    seen = []

    def losses(precision):
        net = nn.Linear(4, 1)

        def loss(step):
            output = net(torch.ones(2, 4))
            seen.append(output.dtype)
            return {"loss": output.float().square().mean()}
        return Loop(LoopParams(**(SETTINGS | {"steps": 2, "precision": precision})), {"net": net}, loss,
                    tmp_path / precision, "net")
    for precision in ("auto", "bfloat16"):
        losses(precision).run()
    assert seen == [torch.float32] * 2 + [torch.bfloat16] * 2
    assert losses("bfloat16").modules["net"].weight.dtype == torch.float32
    with pytest.raises(VideoLDMError, match="precision 'half' is unknown"):
        losses("half")


def test_trained_weights_must_be_float32_and_there_must_be_some(tmp_path):
    half = nn.Linear(2, 2).half()
    with pytest.raises(VideoLDMError, match="'net.weight' is torch.float16. Trained weights must be float32"):
        Loop(LoopParams(**SETTINGS), {"net": half}, None, tmp_path, "half")
    with pytest.raises(VideoLDMError, match="nothing to train"):
        Loop(LoopParams(**SETTINGS), {"net": half.requires_grad_(False)}, None, tmp_path, "frozen")


def test_a_loss_that_depends_on_nothing_trained_is_refused(tmp_path):
    loop = Loop(LoopParams(**SETTINGS), {"net": nn.Linear(2, 2)}, lambda step: {"loss": torch.ones(())}, tmp_path, "x")
    with pytest.raises(VideoLDMError, match="does not depend on any parameter that is trained"):
        loop.run()


def test_the_log_has_means_over_its_steps_and_can_be_drawn(uninterrupted, tmp_path):
    rows = read_log(uninterrupted.log)
    assert [row["step"] for row in rows] == sorted({*range(4, 41, 4), 10, 30})     # every fourth step, and each save
    assert set(rows[0]) == {"step", "loss", "size", "grad_norm", "lr", "seconds"}
    assert rows[-1]["loss"] < rows[0]["loss"]
    plot_log(uninterrupted.log, tmp_path / "two.png", names=("loss", "grad_norm"), title="small net")
    image = Image.open(tmp_path / "two.png").convert("RGB")
    colours = {colour for _, colour in image.getcolors(1 << 20)}
    assert image.size == (900, 420) and {(31, 87, 164), (200, 92, 20)} <= colours
    (tmp_path / "empty.jsonl").write_text("")
    plot_log(tmp_path / "empty.jsonl", tmp_path / "empty.png")
    assert ticks(0, 1) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])


def test_the_log_is_a_table_too_with_every_figure_of_every_line(uninterrupted):
    rows = read_log(uninterrupted.log)
    with open(uninterrupted.folder / "log.csv", newline="", encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    assert [{name: float(value) for name, value in row.items()} for row in table] == rows


def test_a_table_has_room_for_figures_that_not_every_line_has(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"step": 1, "loss": 2.5}\n{"step": 2, "loss": 2, "psnr": 30}\n{"step": 3, "lo')
    write_csv(tmp_path / "log.jsonl", tmp_path / "log.csv")
    assert (tmp_path / "log.csv").read_text().split() == ["step,loss,psnr", "1,2.5,", "2,2,30"]


def colours_of(image, box):
    return {colour for _, colour in image.crop(box).getcolors(1 << 20)}


def test_the_legend_shows_each_curves_own_line_beside_its_name(tmp_path, monkeypatch):
    """Read off the picture: where the legend says a name, the line before it has the colour of that curve."""
    named = {}
    text = plot._Plot.text
    monkeypatch.setattr(plot._Plot, "text", lambda self, corner, words, *colour: (
        named.__setitem__(words, corner), text(self, corner, words, *colour)))
    curves = {f"curve {number}": [(0, number), (10, number)] for number in range(len(plot.STYLES))}
    plot_curves(curves, tmp_path / "curves.png", "title")
    image = Image.open(tmp_path / "curves.png").convert("RGB")
    below = max(int(named[name][1]) for name in curves) + plot.ROW
    for number, (name, (colour, _)) in enumerate(zip(curves, plot.STYLES, strict=True)):
        x, y = map(int, named[name])
        assert colours_of(image, (x - 8 - plot.SAMPLE, y, x - 8, y + 12)) - {(255, 255, 255)} == {colour}
        rows = [row for row in range(below, image.height) if image.getpixel((plot.LEFT, row)) == colour]
        span = image.height - plot.BOTTOM - below
        assert rows, f"{name} is not drawn in its own colour"
        height = (image.height - plot.BOTTOM - np.mean(rows)) / span
        assert height == pytest.approx(number / (len(curves) - 1), abs=0.05)
    assert len({style for style in plot.STYLES}) == len({colour for colour, _ in plot.STYLES}) == 6
    assert len({pattern for _, pattern in plot.STYLES}) == 6        # apart in grey as well


def test_dashes_are_as_long_as_their_pattern_says_also_around_corners():
    pieces = list(plot.dashes([(0, 0), (10, 0), (10, 10)], (6, 2)))
    assert pieces == [[(0, 0), (6, 0)], [(8, 0), (10, 0), (10, 4)], [(10, 6), (10, 10)]]


def test_the_progress_line_tells_done_speed_and_time_left(capsys):
    progress = Progress("title", 120, start=20)
    assert re.fullmatch(r"title:  50%\|#+5? +\| 60/120 \[00:10<00:15,  4.00 steps/s, loss 0.1235\]",
                        progress.line(60, {"loss": 0.12346}, 10.0))
    progress.update(60, {"loss": 0.1})          # a moment after the start: nothing
    progress.update(120, {"loss": 0.1}, force=True)
    progress.close()
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1 and "120/120" in shown


def test_a_terminal_gets_one_line_that_is_redrawn():
    class Terminal(io.StringIO):
        def isatty(self):
            return True
    stream = Terminal()
    progress = Progress("title", 120, start=20, stream=stream)
    progress.update(60, {"loss": 0.12346}, force=True)
    progress.update(120, {"loss": 0.1}, force=True)
    progress.close()
    assert "60/120" in stream.getvalue() and "loss 0.1235" in stream.getvalue()
    assert "120/120" in stream.getvalue() and stream.getvalue().count("\n") == 1


def test_seeds_of_steps_and_ranks_are_unrelated_and_batches_must_divide():
    seeds = {step_seed(seed, step, rank) for seed in range(3) for step in range(20) for rank in range(3)}
    assert len(seeds) == 180 and all(0 <= seed < 2 ** 63 for seed in seeds)
    one, same = StepContext.make(3, 0, 1, 2), StepContext.make(3, 0, 1, 2)
    assert torch.equal(torch.rand(4, generator=one.generator), torch.rand(4, generator=same.generator))
    assert one.share(6) == 3
    with pytest.raises(VideoLDMError, match="batch of 7 cannot be shared evenly by 2 processes"):
        one.share(7)


@pytest.mark.slow
@pytest.mark.skipif(not distributed.dist.is_available(), reason="this torch has no torch.distributed")
def test_two_processes_give_the_gradients_of_a_single_one(tmp_path):
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")} | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
               str(Path(training_worker.__file__)), str(tmp_path / "two"), "1"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    ranks = [load_file(tmp_path / "two" / f"gradients_{rank}.safetensors") for rank in (0, 1)]
    loss = training_worker.temporal_loss(batch=4)
    sum(loss(StepContext.make(0, 0, rank, 2))["loss"] for rank in (0, 1)).div(2).backward()
    single = {f"temporal.{name}": p.grad for name, p in loss.stack.named_parameters()}
    assert single.keys() == ranks[0].keys()
    for name, gradient in single.items():
        assert torch.equal(ranks[0][name], ranks[1][name])
        assert (ranks[0][name] - gradient).abs().max() <= 1e-6 * max(1.0, gradient.abs().max())
        assert gradient.abs().max() > 0
    rows = read_log(tmp_path / "two" / "log.jsonl")
    assert len(rows) == 1 and (tmp_path / "two" / "last.safetensors").exists()


def test_the_same_program_runs_in_one_process(tmp_path):
    loop = training_worker.train(tmp_path, 4)
    assert loop.step == 4 and distributed.world_size() == 1
    assert load_file(loop.checkpoint).keys() >= {f"model.{name}" for name in loop.parameters}
