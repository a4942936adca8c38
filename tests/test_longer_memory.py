"""Extend Video's working memory does not grow with the length of the video."""

import subprocess
import sys
from pathlib import Path

import pytest

from video_ldm.benchmarks.memory import own_pages

ROOT = Path(__file__).resolve().parents[1]


LATENT = 4 * 8 * 16 * 4     # bytes of a frame's


@pytest.mark.slow
def test_a_video_of_1000_frames_takes_the_memory_of_one_of_50():
    (short, little), (long, much) = ([int(size) for size in subprocess.run(
        [sys.executable, str(ROOT / "run.py"), "_inside", "benchmarks.extend_memory", str(frames)], check=True,
        stdout=subprocess.PIPE, text=True, env=own_pages()).stdout.split()[-2:]] for frames in (50, 1000))
    assert long <= short * 1.05                 # beyond the latents
    assert little > 1_000_000                   # the measure sees a clip at work
    assert much - little < 950 * LATENT         # not even a second copy of the latents is kept
