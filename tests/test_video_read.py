"""Reading of video files: ranges, uneven times and turned pictures. Bad files are refused in a sentence."""

import io
import struct
from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image

from video_ldm.temporal.errors import VideoLDMError
from video_ldm.temporal.video import open_video, write_video
from video_ldm.temporal.video.timing import DEFAULT_RATE, as_rate, even_clock
from video_ldm.tests import video_help
from video_ldm.tests.video_help import clip, numbered, numbers


@pytest.fixture(scope="module")
def long_video(tmp_path_factory):
    """300 numbered frames, a key frame every 50."""
    path = tmp_path_factory.mktemp("long") / "long.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width = stream.height = 40
        stream.pix_fmt, stream.options = "yuv420p", {"g": "50", "crf": "8", "bf": "3"}
        for frame in numbered(300):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
    return open_video(path)


# Ranges

@pytest.mark.parametrize("start, count, stride", [(0, 0, 1), (0, 7, 1), (5, 4, 3), (30, 0, 7), (299, 1, 1),
                                                  (121, 5, 1), (177, 20, 2), (260, 0, 13), (150, 3, 50)])
def test_a_range_equals_that_slice_of_the_whole_video(long_video, start, count, stride):
    whole = long_video.read()
    part = long_video.read(long_video.select(start, count, stride))
    expected = whole[start::stride][:count or None]
    assert np.array_equal(part, expected)
    assert numbers(part) == list(range(300))[start::stride][:count or None]


@pytest.mark.parametrize("start, count, stride", [(0, 0, 1), (3, 4, 2), (11, 1, 1)])
def test_a_range_of_an_animation_equals_that_slice(tmp_path, start, count, stride):
    write_video(tmp_path / "clip.webp", clip(), 8, "webp", crf=0)
    video = open_video(tmp_path / "clip.webp")
    assert np.array_equal(video.read(video.select(start, count, stride)),
                          (np.array(clip()) / np.float32(255))[start::stride][:count or None])


def test_a_range_outside_the_video_says_how_many_frames_there_are(long_video):
    with pytest.raises(VideoLDMError, match="long.mp4 has 300 frames, so start_frame can be at most 299; it is 300"):
        long_video.select(300)
    with pytest.raises(VideoLDMError, match="from frame 290 with stride 2 there are 5, and 6 were asked for"):
        long_video.select(290, 6, 2)


def test_progress_is_told_after_each_frame_and_can_stop_the_reading(long_video):
    told = []
    long_video.read(long_video.select(10, 5, 3), told.append)
    assert told == [1, 2, 3, 4, 5]

    def stop(done):
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        long_video.read(long_video.select(10, 5, 3), stop)


def test_a_video_in_memory_reads_like_a_file(long_video):
    held = open_video(io.BytesIO(long_video.source.read_bytes()))
    assert (held.frames, held.rate) == (300, 25)
    assert np.array_equal(held.read(held.select(200, 3)), long_video.read(long_video.select(200, 3)))


# Time

def test_even_times_stay_as_they_are_with_the_declared_rate():
    times = np.round(np.arange(30) * 1001 / 30000, 3)
    clock = even_clock(times, 0.033, Fraction(30000, 1001))
    assert np.array_equal(clock.shown, np.arange(30)) and clock.rate == Fraction(30000, 1001) and not clock.change
    assert abs(float(even_clock(times, 0.033, Fraction(60)).rate) - 29.97) < 0.05, "a wrong declaration is not believed"


def test_held_frames_are_repeated():
    clock = even_clock(np.array([0, 0.1, 0.4, 0.5]), 0.2)
    assert clock.shown.tolist() == [0, 1, 1, 1, 2, 3, 3] and clock.rate == 10 and "3 held frames" in clock.change


def clock_of(durations, declared=None, quantum=0.001, first=0.0):
    """The clock of frames that stay for these times."""
    starts = first + np.cumsum([0, *durations[:-1]])
    return even_clock(starts, durations[-1], declared, quantum)


def test_a_quarter_of_a_frames_time_is_even_and_more_is_not():
    even = clock_of([0.1, 0.12, 0.08, 0.1, 0.1])
    assert (even.shown.tolist(), even.rate, even.change) == ([0, 1, 2, 3, 4], 10, "")
    assert "varies" in clock_of([0.1, 0.13, 0.07, 0.1, 0.1]).change


def test_a_declared_rate_is_believed_within_1_percent():
    seconds = [1 / 24] * 48
    assert clock_of(seconds, Fraction(242, 10)).rate == as_rate(24.2)       # 0.8 % off
    assert clock_of(seconds, Fraction(245, 10)).rate == 24                  # 2 %
    assert clock_of([0.04], Fraction(30)).rate == 30 and clock_of([0.04]).rate == 25    # of one frame, always
    assert clock_of([0.0]).rate == DEFAULT_RATE


def test_the_last_frame_may_be_held_too():
    clock = clock_of([0.1, 0.1, 0.3])
    assert (clock.shown.tolist(), clock.rate) == ([0, 1, 2, 2, 2], 10) and "2 held frames" in clock.change


def test_a_file_grows_by_held_frames_to_four_times_its_length_at_most():
    held, averaged = clock_of([0.1, 0.1, 0.1, 1.3]), clock_of([0.1, 0.1, 0.1, 1.4])
    assert len(held.shown) == 16 and "12 held frames" in held.change
    assert len(averaged.shown) == 4 and "varies" in averaged.change


def test_held_frames_are_not_repeated_beyond_240_a_second():
    assert clock_of([0.005, 0.005, 0.01], quantum=1e-6).rate == 200
    assert "varies" in clock_of([0.004, 0.004, 0.008], quantum=1e-6).change


@pytest.mark.parametrize("first", [0.0, 5.0])
def test_an_uneven_file_shows_at_each_step_what_it_shows_at_the_middle_of_the_step(first):
    """Frames at 0, 0.1, 0.13 and 0.5 of 0.6 seconds: the steps' middles are 0.075, 0.225, 0.375 and 0.525."""
    clock = clock_of([0.1, 0.03, 0.37, 0.1], first=first)
    assert (clock.shown.tolist(), clock.rate) == ([0, 2, 2, 3], Fraction(20, 3))
    assert "repeating 1 and dropping 1" in clock.change


@pytest.mark.parametrize("count, seconds", [(5, 0.417), (30, 1.002), (7, 0.2917), (100, 4.171)])
def test_a_measured_rate_gives_the_length_of_the_file_to_a_rounding(count, seconds):
    rate = clock_of([seconds / count] * count).rate
    assert abs(count / rate - seconds) <= 0.001
    assert count != 5 or rate == 12         # the simplest such, not 5000/417


def test_a_varying_rate_becomes_its_average_and_motion_keeps_its_speed():
    times = np.cumsum(np.random.default_rng(0).uniform(0.02, 0.06, 200))
    clock = even_clock(times, 0.04)
    assert len(clock.shown) == 200 and "varies" in clock.change
    assert abs(200 / float(clock.rate) - (times[-1] - times[0] + 0.04)) < 0.2
    shown_at = (np.arange(200) + 0.5) / float(clock.rate)
    seen = times[clock.shown] - times[0]
    assert np.all(seen <= shown_at + 0.01) and np.all(shown_at - seen < 0.08)


def test_a_file_with_a_varying_rate_is_read_evenly(tmp_path):
    path, places = tmp_path / "varying.mkv", [0, 40, 80, 240, 280, 320, 360, 480]
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width = stream.height = 40
        stream.pix_fmt, stream.options, stream.time_base = "yuv420p", {"crf": "8"}, Fraction(1, 1000)
        stream.codec_context.time_base = Fraction(1, 1000)
        for frame, place in zip(numbered(8), places):
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
            picture.pts, picture.time_base = place, Fraction(1, 1000)
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))
    video = open_video(path)
    assert video.rate == 25 and "held frames were repeated" in video.clock.change
    assert numbers(video.read())[:13] == [0, 1, 2, 2, 2, 2, 3, 4, 5, 6, 6, 6, 7]


# Files as phones write them, and as failed downloads leave them

def turned(data, degrees):
    """An MP4's track header with a rotation in it, clockwise, as a phone held upright writes it."""
    at = data.index(b"tkhd") + 4 + 40
    one = 1 << 16
    a, b, c, d = {90: (0, one, -one, 0), 180: (-one, 0, 0, -one), 270: (0, -one, one, 0)}[degrees]
    return data[:at] + struct.pack(">8i", a, b, 0, c, d, 0, 0, 0) + data[at + 32:]


@pytest.mark.parametrize("degrees, turns", [(90, -1), (180, 2), (270, 1)])
def test_rotated_videos_come_upright(tmp_path, degrees, turns):
    plain, path = tmp_path / "plain.mp4", tmp_path / "turned.mp4"
    write_video(plain, clip(3), 8)
    path.write_bytes(turned(plain.read_bytes(), degrees))
    video = open_video(path)
    assert not video.as_stored and (video.width, video.height) == ((96, 64) if degrees == 180 else (64, 96))
    assert np.array_equal(video.read(), np.rot90(open_video(plain).read(), turns, axes=(1, 2)))
    side = {90: "by a quarter to the right", 180: "upside down", 270: "by a quarter to the left"}[degrees]
    assert video.change == f"its pictures were turned {side}, as the file says"


def refusal(path, **select):
    """The sentence with which a file is refused by its name."""
    sentence = video_help.refusal(path, **select)
    assert path.name in sentence
    return sentence


def test_files_that_are_no_videos_are_refused_by_name(tmp_path):
    path = tmp_path / "clip.mp4"
    assert "There is no file" in refusal(path)
    path.write_bytes(b"")
    assert "is empty (0 bytes)" in refusal(path)
    path.write_text("<!DOCTYPE html><html><body>404</body></html>")
    assert "a web page" in refusal(path)
    path.write_bytes(np.random.default_rng(0).bytes(5000))
    assert "damaged or not a video" in refusal(path)
    Image.new("RGB", (8, 8)).save(tmp_path / "still.png")
    assert "Load Image" in refusal(tmp_path / "still.png")
    (tmp_path / "notes.txt").write_text("Just some text.\n" * 50)
    refusal(tmp_path / "notes.txt")
    (tmp_path / "bad.gif").write_bytes(b"GIF89a\x10\0\x10\0 and then nothing")
    assert "as an animation" in refusal(tmp_path / "bad.gif")


def test_sound_alone_is_refused(tmp_path):
    with av.open(str(tmp_path / "song.m4a"), "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=44100, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 44100), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 44100
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    assert "has sound but no video in it" in refusal(tmp_path / "song.m4a")


def test_a_cut_off_mp4_without_its_index_is_refused(tmp_path, long_video):
    path = tmp_path / "cut.mp4"
    path.write_bytes(long_video.source.read_bytes()[:3000])
    assert "was cut off" in refusal(path)


@pytest.mark.parametrize("format", ["mp4", "webm", "webp", "gif"])
def test_a_cut_off_file_is_not_taken_for_a_shorter_one(tmp_path, format):
    noise = [np.random.default_rng(k).integers(0, 255, (64, 64, 3), np.uint8) for k in range(24)]
    whole, path = tmp_path / f"whole.{format}", tmp_path / f"cut.{format}"
    write_video(whole, noise, 8, format)
    data = whole.read_bytes()
    path.write_bytes(data[:len(data) // 2])
    sentence = refusal(path)
    assert "cut off" in sentence
    if format in ("mp4", "webm"):
        video = open_video(path)
        assert np.array_equal(video.read(video.select(count=4)), open_video(whole).read()[:4])


def test_the_cover_picture_of_a_song_is_no_video(tmp_path):
    with av.open(str(tmp_path / "song.m4a"), "w", format="mp4") as container:
        cover, sound = container.add_stream("mjpeg", rate=1), container.add_stream("aac", rate=8000, layout="mono")
        cover.width, cover.height, cover.pix_fmt = 32, 32, "yuvj420p"
        cover.disposition = av.stream.Disposition.attached_pic
        picture = av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), format="rgb24")
        samples = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.float32), format="fltp", layout="mono")
        samples.sample_rate = 8000
        for stream, frame in ((cover, picture.reformat(format="yuvj420p")), (sound, samples)):
            container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
    assert "has sound but no video in it" in refusal(tmp_path / "song.m4a")


def test_gif_frames_of_a_hundredth_of_a_second_stay_for_a_tenth_as_in_browsers(tmp_path):
    for length, rate in ((10, 10), (20, 50)):
        pictures = [Image.fromarray(frame) for frame in numbered(4)]
        pictures[0].save(tmp_path / "clip.gif", save_all=True, append_images=pictures[1:], duration=length)
        assert open_video(tmp_path / "clip.gif").rate == rate
