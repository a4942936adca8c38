"""Load Video Frames with a stride that is larger than the video. In this process, without a server."""

from dataclasses import replace
from fractions import Fraction

import pytest

from video_ldm.temporal.errors import VideoLDMError
from video_ldm.temporal.video import open_video, write_video
from video_ldm.tests.video_help import clip


def test_a_stride_beyond_the_video_counts_as_its_number_of_frames(folders):
    from video_ldm.nodes.load_video import LoadVideoFrames
    write_video(folders / "input" / "clip.mp4", clip(), 8)
    images, video, fps, count, report, _ = LoadVideoFrames.execute("clip.mp4", 0, 0, 10**6).args
    assert (len(images), count, fps, video.get_frame_rate()) == (1, 1, 8 / 12, Fraction(8, 12))
    assert "stride 1000000 counted as 12, because the video has no more frames" in report
    assert "stride" not in LoadVideoFrames.execute("clip.mp4", 0, 0, 12).args[4]


def test_a_frame_that_would_last_too_long_is_refused_before_reading(folders, monkeypatch):
    from video_ldm.nodes import load_video
    write_video(folders / "input" / "clip.mp4", clip(), 8)
    video = open_video(folders / "input" / "clip.mp4")
    slow = replace(video, clock=replace(video.clock, rate=Fraction(1, 100)))
    monkeypatch.setattr(load_video, "open_video", lambda *args: slow)
    monkeypatch.setattr(load_video, "_sound", None)
    with pytest.raises(VideoLDMError, match="clip.mp4: with stride 12 a frame lasts 1200 seconds, and 1000 are the "
                                            "most. Lower stride"):
        load_video.LoadVideoFrames.execute("clip.mp4", 0, 0, 12)
