"""The limits of a clip's length, which four nodes and the model call ask for in one place."""

from types import SimpleNamespace

import pytest

from video_ldm.temporal.clip_length import check_clip_length, clip_limit
from video_ldm.temporal.errors import VideoLDMError


def layers(mix=1, table=0):
    return SimpleNamespace(family="test", mix_length=mix, table_length=table)


def test_layers_without_a_vector_or_a_table_run_clips_of_any_length():
    assert clip_limit(layers()) is None
    check_clip_length(layers(), 10 ** 6, "the clip has", "")


@pytest.mark.parametrize("params, right, wrong, sentence", [
    (layers(mix=4), [4], [1, 3, 5], "These test layers mix over time with a vector of 4 frames, so they take clips of "
                                    "exactly 4 frames, and a window has {}. Set length to 4."),
    (layers(table=32), [1, 32], [33], "These test layers have a learned table of 32 frame positions, so they take "
                                      "clips of up to 32 frames, and a window has {}. Set length to 32 or fewer."),
    (layers(mix=4, table=32), [4], [32], "These test layers mix over time with a vector of 4 frames, so they take "
                                         "clips of exactly 4 frames, and a window has {}. Set length to 4.")])
def test_a_limit_is_told_with_its_reason_and_what_to_set(params, right, wrong, sentence):
    for frames in right:
        check_clip_length(params, frames, "a window has", "Set length to {limit}.")
    for frames in wrong:
        with pytest.raises(VideoLDMError) as refused:
            check_clip_length(params, frames, "a window has", "Set length to {limit}.")
        assert str(refused.value) == sentence.format(frames)
