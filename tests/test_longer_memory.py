"""Extend Video's working memory does not grow with the length of the video."""

import subprocess
import sys
from pathlib import Path

import pytest

from video_ldm.benchmarks.memory import own_pages

ROOT = Path(__file__).resolve().parents[1]


def most(*arguments: str) -> int:
    """Bytes at the peak of one run of the benchmark, in a process of its own."""
    done = subprocess.run([sys.executable, str(ROOT / "run.py"), "_inside", "benchmarks.extend_memory", *arguments],
                          check=True, stdout=subprocess.PIPE, text=True, env=own_pages())
    return int(done.stdout.split()[-1])


@pytest.mark.slow
def test_a_video_of_400_frames_takes_the_memory_of_one_of_50():
    assert most("400") <= most("50") * 1.05                # beyond the latents


def test_no_second_copy_of_the_latents_is_kept():
    short, long = most("26", "count"), most("50", "count")
    assert short > 1_000_000                                # the count sees a clip at work
    assert long <= short * 1.01
