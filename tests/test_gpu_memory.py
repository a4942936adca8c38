"""The benchmark of a graphics card's memory: its tables come about on a CPU, where nothing is measured."""

import re

import comfy.utils
import pytest
import torch

from video_ldm.benchmarks import gpu_memory


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about a machine without a GPU")
def test_without_a_graphics_card_the_benchmark_says_so(capsys):
    assert gpu_memory.main([]) == 1
    assert "no CUDA graphics card" in capsys.readouterr().out


def test_every_cell_of_the_benchmarks_tables_is_filled(capsys, monkeypatch):
    monkeypatch.setattr(comfy.utils, "PROGRESS_BAR_ENABLED", False)     # as the benchmark sets it; put back afterwards
    assert gpu_memory.main(["--device", "cpu", "--tiny"]) == 0
    text = capsys.readouterr().out
    cells = re.findall(r"\b(\S+) / (\d+)\b", text)
    assert len(cells) == 1 + 2 + 2 * 2 and "failed" not in text
    assert all(measured == "0" and int(counted) > 0 for measured, counted in cells)


def test_a_cell_that_fails_does_not_stop_the_others():
    def full():
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")
    assert gpu_memory.megabytes_or_failure(full) == "failed: OutOfMemoryError"
    assert gpu_memory.megabytes_or_failure(lambda: 3_400_000) == "3"
