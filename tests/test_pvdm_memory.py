"""A PVDM's working memory does not grow with the number of clips."""

import pytest

from video_ldm.benchmarks import pvdm_memory


@pytest.mark.slow
def test_a_video_of_2048_frames_takes_the_memory_of_one_of_64():
    (short, _), (long, _) = map(pvdm_memory.child, pvdm_memory.FRAMES)
    assert long <= short * 1.05                 # of the whole process
    # The work alone depends on what the allocator kept of the warm-up. The peak of the process does not.
    assert long - short < 16_000_000            # 1984 frames are 195 MB as IMAGE, and 49 MB as bytes
