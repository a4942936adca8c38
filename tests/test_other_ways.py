"""bench --ways: every way gives the result of today's."""

import pytest
import torch

from video_ldm.benchmarks import other_ways
from video_ldm.benchmarks.other_ways import COMPILED, TODAY, Part, Row, Size, measure, parts

SMALL = Size(32, 4, 6, "cpu", torch.float32)
ON_CUDA_ALONE = {"one kernel", "CUDA graph", "strides, memory-efficient attention", "strides, cuDNN's attention"}


@pytest.fixture(scope="module")
def rows():
    return [row for part in parts(SMALL) for row in measure(part, 1, (COMPILED,))]


def test_each_way_gives_todays_result(rows):
    found = [row for row in rows if not row.missing]
    assert len({row.part for row in rows}) == 8
    assert all(row.difference < 1e-5 for row in found), [row for row in found if row.difference >= 1e-5]
    assert all(row.difference == 0 for row in found if row.way == TODAY)


def test_a_way_that_this_machine_lacks_is_listed_with_the_reason(rows):
    missing = {row.way for row in rows if row.missing}
    assert missing == (set() if torch.cuda.is_available() else ON_CUDA_ALONE)
    assert Row("mix", "one kernel", missing="needs CUDA").cells[-1] == "not here: needs CUDA"


def test_strides_move_less_than_copies(rows):
    moved = {row.way: row.bytes for row in rows if row.part == "attention over frames"}
    assert 0 < moved["strides, PyTorch's choice"] < moved[TODAY]


def test_a_wrong_result_is_seen():
    part = Part("sum", {TODAY: lambda: torch.ones(4), "off": lambda: torch.tensor([1.0, 1.0, 1.0, 1.5])})
    assert [row.difference for row in measure(part, 1)] == [0.0, 0.5]


def test_the_table_has_a_row_for_each_way(capsys):
    assert other_ways.main(["--size", "4", "--frames", "2", "--pairs", "1", "--no-compile"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("| mix |") for line in lines) == 2 * len(other_ways.LEVELS)
