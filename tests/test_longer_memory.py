"""Extend Video's working memory does not grow with the length of the video."""

import subprocess
import sys
from pathlib import Path

from video_ldm.benchmarks.memory import own_pages

ROOT = Path(__file__).resolve().parents[1]


def test_a_video_of_1000_frames_takes_the_memory_of_one_of_50():
    short, long = (int(subprocess.run(
        [sys.executable, str(ROOT / "run.py"), "_inside", "benchmarks.extend_memory", str(frames)], check=True,
        stdout=subprocess.PIPE, text=True, env=own_pages()).stdout.split()[-1]) for frames in (50, 1000))
    assert short > 1_000_000                    # the measure sees a clip at work
    assert long <= short * 1.05
