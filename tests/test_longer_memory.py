"""Extend Video's working memory does not grow with the length of the video."""

import subprocess
import sys
from pathlib import Path

import pytest

from video_ldm.benchmarks.memory import own_pages

ROOT = Path(__file__).resolve().parents[1]


def most(*arguments: str) -> list[int]:
    """Bytes at the peak of videos of these lengths, one after another in a process of the benchmark's own."""
    done = subprocess.run([sys.executable, str(ROOT / "run.py"), "_inside", "benchmarks.extend_memory", *arguments],
                          check=True, stdout=subprocess.PIPE, text=True, env=own_pages())
    lengths = [argument for argument in arguments if argument.isdigit()]
    return [int(line) for line in done.stdout.split()[-len(lengths):]]


@pytest.mark.slow
def test_a_video_of_200_frames_takes_the_memory_of_one_of_26():
    short, long = most("26", "200")                         # beyond the latents
    assert long <= short * 1.05


def test_no_second_copy_of_the_latents_is_kept():
    short, long = most("count", "26", "50")
    assert short > 1_000_000                                # the count sees a clip at work
    assert long <= short * 1.01
