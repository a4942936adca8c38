"""A PVDM's working memory does not grow with the number of clips."""

import pytest

from video_ldm.benchmarks import pvdm_memory


@pytest.mark.slow
def test_a_video_of_2048_frames_takes_the_memory_of_one_of_64():
    (short, little), (long, much) = map(pvdm_memory.child, pvdm_memory.FRAMES)
    assert long <= short * 1.05                 # of the whole process
    assert little > 1_000_000                   # the measure sees a clip at work
    assert much - little < 8_000_000            # 1984 frames are 195 MB as IMAGE, and 49 MB as bytes
