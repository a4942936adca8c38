"""Sound of video files: what is heard during the frames, in its channels, and no more of it than was asked for."""

import tracemalloc
from fractions import Fraction
from types import SimpleNamespace

import av
import numpy as np
import pytest

from video_ldm.temporal.errors import VideoLDMError
from video_ldm.temporal.video import file_sound, held_sound, open_video, read_audio, samples_of, write_video
from video_ldm.temporal.video.containers import sound_stream
from video_ldm.tests.video_help import clip, counting, numbered, numbers, write_exact

RATE, FPS, FRAMES = 48000, 25, 50
FLASH = 30                  # the frame during which the click is heard


def flashing(size=64):
    """Black frames and one white one."""
    return [np.full((size, size, 3), 235 if k == FLASH else 16, np.uint8) for k in range(FRAMES)]


def clicking(channels=1, offset=0.0):
    """Silence with one click in the middle of the white frame. Sound begins `offset` seconds after the pictures."""
    wave = np.zeros((channels, round((FRAMES / FPS - min(offset, 0)) * RATE)), np.float32)
    middle = round(((FLASH + 0.5) / FPS - offset) * RATE)
    wave[:, middle:middle + 48] = 0.8
    return wave


def write_streams(path, video_at=0.0, sound_at=0.0, codecs=("mpeg2video", "mp2"), format=None, options=None, wave=None,
                  frames=None, rate=RATE, layout="mono", aspect=None):
    """A file whose pictures begin at `video_at` and whose sound begins at `sound_at`, seconds of its clock."""
    with av.open(str(path), "w", format=format, options=options or {}) as container:
        stream = container.add_stream(codecs[0], rate=FPS)
        frames = flashing() if frames is None else frames
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt, stream.bit_rate = "yuv420p", 2_000_000
        stream.codec_context.time_base = Fraction(1, FPS)
        sound = container.add_stream(codecs[1], rate=rate, layout=layout)
        wave = clicking(offset=sound_at - video_at) if wave is None else wave
        packets = []
        for number, frame in enumerate(frames):
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
            picture.pts, picture.time_base = number, Fraction(1, FPS)
            packets += stream.encode(picture)
        packets += stream.encode(None)
        moved = [(packet, video_at) for packet in packets]
        whole = av.AudioFrame.from_ndarray(wave, format="fltp", layout=layout)
        whole.sample_rate, whole.pts, whole.time_base = rate, 0, Fraction(1, rate)
        moved += [(packet, sound_at) for packet in [*sound.encode(whole), *sound.encode(None)]]
        for packet, seconds in moved:
            shift = round(seconds / packet.time_base)
            packet.pts, packet.dts = packet.pts + shift, packet.dts + shift
        for packet, _ in sorted(moved, key=lambda item: float(item[0].dts * item[0].time_base)):
            container.mux(packet)


def click(sound, rate):
    """Seconds at which the click is heard."""
    loud = np.abs(sound).max(0)
    return float(np.argmax(loud > 0.3)) / rate if loud.max() > 0.3 else None


CLOCKS = {
    "mpg_from_half_a_second": ("clip.mpg", 0.52, 0.52, {"codecs": ("mpeg2video", "mp2")}),
    "ts_from_1.5_seconds": ("clip.ts", 1.52, 1.52, {"codecs": ("mpeg2video", "mp2")}),
    "mkv_with_the_times_of_a_ts": ("clip.mkv", 1.52, 1.52, {"codecs": ("mpeg4", "pcm_s16le")}),
    "mkv_from_5_seconds": ("clip.mkv", 5.0, 5.0, {"codecs": ("mpeg4", "pcm_s16le")}),
    "mp4_from_1.5_seconds": ("clip.mp4", 1.52, 1.52, {"codecs": ("mpeg4", "aac")}),
    "pictures_0.7_seconds_late_mkv": ("clip.mkv", 0.72, 0.0, {"codecs": ("mpeg4", "pcm_s16le")}),
    "pictures_0.7_seconds_late_mp4": ("clip.mp4", 0.72, 0.0, {"codecs": ("mpeg4", "aac")}),
    "pictures_0.7_seconds_late_ts": ("clip.ts", 1.44, 0.72, {"codecs": ("mpeg2video", "mp2")}),
    "sound_0.5_seconds_late_mkv": ("clip.mkv", 0.0, 0.52, {"codecs": ("mpeg4", "pcm_s16le")}),
    "from_zero_mov": ("clip.mov", 0.0, 0.0, {"codecs": ("mpeg4", "pcm_s16le")}),
}


@pytest.mark.parametrize("case", CLOCKS)
def test_the_sound_of_a_range_is_what_is_heard_during_its_frames(tmp_path, case):
    name, video_at, sound_at, settings = CLOCKS[case]
    path = tmp_path / name
    write_streams(path, video_at, sound_at, **settings)
    video = open_video(path)
    bright = [k for k, frame in enumerate(video.iterate()) if frame.mean() > 128]
    assert video.frames == FRAMES and bright == [FLASH]
    during = FLASH / FPS, (FLASH + 1) / FPS
    assert during[0] < click(*read_audio(video)) < during[1], "of the whole file"
    part, rate = read_audio(video, start=20 / FPS, seconds=15 / FPS)
    assert part.shape[1] == 15 / FPS * RATE
    assert during[0] < 20 / FPS + click(part, rate) < during[1], "of frames 20 to 34"
    assert click(*read_audio(video, start=(FLASH + 1) / FPS, seconds=0.5)) is None
    assert click(*read_audio(video, start=0.0, seconds=FLASH / FPS)) is None


@pytest.mark.parametrize("case, alike", [
    ("mkv_from_5_seconds", True), ("from_zero_mov", True), ("pictures_0.7_seconds_late_mkv", False),
    ("sound_0.5_seconds_late_mkv", False)])
def test_a_file_is_handed_on_as_it_is_only_where_its_sound_begins_with_its_pictures(tmp_path, case, alike):
    """ComfyUI's own classes lay the first sample beside the first frame, whatever the file's clock says."""
    name, video_at, sound_at, settings = CLOCKS[case]
    write_streams(tmp_path / name, video_at, sound_at, **settings)
    assert open_video(tmp_path / name).as_stored == alike


def test_sound_far_into_a_file_is_sought_and_in_its_place(tmp_path):
    path, seconds = tmp_path / "long.mp4", 40
    time = np.arange(seconds * RATE) / RATE
    sweep = (0.5 * np.sin(2 * np.pi * (200 + 20 * np.floor(time)) * time)).astype(np.float32)[None]
    write_video(path, numbered(seconds * 4), 4, audio=(sweep, RATE))
    video = open_video(path)
    whole, _ = read_audio(video)
    for start in (5.0, 11.5, 33.25):
        part, _ = read_audio(video, start, 2.0)
        first = round(start * RATE)
        assert part.shape == (1, 2 * RATE)
        assert np.abs(part - whole[:, first:first + 2 * RATE]).max() < 0.02, start


@pytest.mark.parametrize("name, codec", [("clip.mov", "pcm_s16le"), ("clip.mkv", "flac"), ("clip.avi", "pcm_s16le")])
@pytest.mark.parametrize("layout, channels", [("stereo", 2), ("5.1", 6)])
def test_the_sound_of_chosen_frames_is_exact_to_a_sample(tmp_path, name, codec, layout, channels):
    """Frames n to m at r frames a second have samples round(n / r * 44100) to round(m / r * 44100), 1471.47 each."""
    wave, rate = counting(channels, 150_000), Fraction(30000, 1001)
    write_exact(tmp_path / name, codec, wave, layout)
    video = open_video(tmp_path / name)
    assert video.rate == rate
    for start, count, stride in ((0, 90, 1), (7, 20, 1), (13, 9, 5), (1, 1, 1), (89, 1, 3)):
        sound = file_sound(video, start / rate, count * stride / rate)
        first, last = round(start * 44100 / rate), round((start + count * stride) * 44100 / rate)
        expected = np.zeros((channels, last - first), np.float32)
        heard = wave[:, first:last] / np.float32(2**15)
        expected[:, :heard.shape[1]] = heard
        assert (sound.rate, sound.channels, sound.length) == (44100, channels, last - first)
        assert np.array_equal(samples_of(sound), expected), (start, count, stride)


def test_the_sounds_of_neighbouring_ranges_join_without_a_gap(tmp_path):
    wave, rate = counting(2, 132_432), Fraction(30000, 1001)
    write_exact(tmp_path / "clip.mov", "pcm_s16le", wave, "stereo")
    video = open_video(tmp_path / "clip.mov")
    parts = [samples_of(file_sound(video, n / rate, 1 / rate)) for n in range(30)]
    assert {part.shape[1] for part in parts} == {1471, 1472}
    whole = np.concatenate(parts, 1)
    assert whole.shape[1] == round(30 * 44100 / rate) and np.array_equal(whole * 2**15, wave[:, :whole.shape[1]])


# Channels

TONES = {3: ("3.0", (400, 500, 600)), 6: ("5.1", (400, 500, 600, 60, 700, 800)),
         8: ("7.1", (400, 500, 600, 60, 700, 800, 900, 1000)),
         4: ("quad", (400, 500, 600, 700))}


def tones(frequencies, seconds=2.0):
    time = np.arange(int(seconds * RATE)) / RATE
    return np.stack([0.4 * np.sin(2 * np.pi * frequency * time) for frequency in frequencies]).astype(np.float32)


def pitches(sound, rate):
    """The loudest frequency of each channel, Hz, over its middle second."""
    middle = sound[:, rate // 2:rate // 2 + rate]
    return np.abs(np.fft.rfft(middle, axis=1)).argmax(1).tolist()


@pytest.mark.parametrize("format", ["mp4", "webm"])
@pytest.mark.parametrize("channels", TONES)
def test_surround_sound_keeps_its_channels_in_their_order(tmp_path, format, channels):
    layout, frequencies = TONES[channels]
    path = tmp_path / f"clip.{format}"
    write_video(path, clip(16), 8, format, audio=(tones(frequencies), RATE))
    with av.open(str(path)) as container:
        assert container.streams.audio[0].layout.nb_channels == channels
        assert layout in container.streams.audio[0].layout.name
    sound, rate = read_audio(open_video(path))
    assert sound.shape[0] == channels and pitches(sound, rate) == list(frequencies)
    assert np.all(np.abs(sound[:, rate // 2:rate]).max(1) > 0.3), "as loud as it was"


@pytest.mark.parametrize("format", ["mp4", "webm"])
@pytest.mark.parametrize("channels, stored", [(5, 6), (7, 8)])
def test_uncommon_layouts_are_saved_with_one_more_loudspeaker(tmp_path, format, channels, stored):
    """FFmpeg's Opus encoder exchanges the channels of 5.0 and 6.1."""
    frequencies = [400 + 100 * k for k in range(channels)]
    write_video(tmp_path / f"clip.{format}", clip(16), 8, format, audio=(tones(frequencies), RATE))
    sound, rate = read_audio(open_video(tmp_path / f"clip.{format}"))
    assert sound.shape[0] == stored
    assert pitches(sound, rate)[:3] == frequencies[:3] and set(frequencies[4:]) <= set(pitches(sound, rate))


def write_coded(path, codec, wave, layout):
    """A clip of 2 seconds with sound in any codec."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=8)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        sound = container.add_stream(codec, rate=RATE, layout=layout)
        for frame in clip(16):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(wave.T).reshape(1, -1), format="flt", layout=layout)
        frame.sample_rate = RATE
        for packet in [*sound.encode(frame), *sound.encode(None)]:
            container.mux(packet)


@pytest.mark.parametrize("codec, name, layout, frequencies", [
    ("ac3", "clip.mkv", "5.1(side)", (400, 500, 600, 60, 700, 800)),
    ("aac", "clip.mp4", "6.1", (400, 500, 600, 60, 700, 800, 900))])
def test_loudspeakers_of_another_name_or_none_keep_their_order(tmp_path, codec, name, layout, frequencies):
    write_coded(tmp_path / name, codec, tones(frequencies), layout)
    sound, rate = read_audio(open_video(tmp_path / name))
    assert pitches(sound, rate) == list(frequencies)
    assert np.abs(sound[:, rate // 2:rate]).max(1).min() > 0.3


def test_sound_of_nine_channels_or_of_no_rate_is_refused(tmp_path):
    with pytest.raises(VideoLDMError, match="The sound has 9 channels; 1 to 8 can be saved"):
        write_video(tmp_path / "clip.mp4", clip(), 8, audio=(np.zeros((9, 100), np.float32), RATE))
    with pytest.raises(VideoLDMError, match="0 samples a second"):
        write_video(tmp_path / "clip.mp4", clip(), 8, audio=(np.zeros((1, 100), np.float32), 0))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("rate", [11025, 44100, 37800, 192000])
def test_sound_of_any_sample_rate_is_written_at_its_pitch(tmp_path, rate):
    time = np.arange(2 * rate) / rate
    tone = (0.5 * np.sin(2 * np.pi * 440 * time)).astype(np.float32)[None]
    write_video(tmp_path / "clip.mp4", clip(16), 8, audio=(tone, rate))
    sound, stored = read_audio(open_video(tmp_path / "clip.mp4"))
    assert pitches(sound, stored) == [440] and abs(sound.shape[1] / stored - 2) < 0.01


def test_sound_with_nan_is_silent_there(tmp_path):
    tone = tones((440,))
    tone[:, RATE // 2:RATE // 2 + 4800] = np.nan
    write_video(tmp_path / "clip.mp4", clip(16), 8, audio=(tone, RATE))
    sound, rate = read_audio(open_video(tmp_path / "clip.mp4"))
    assert np.isfinite(sound).all() and np.abs(sound[:, rate * 3 // 2:]).max() > 0.4


# Memory

def test_sound_is_written_as_it_is_made_and_ends_with_the_pictures(tmp_path):
    asked = []

    def pieces():
        for k in range(10**6):
            asked.append(k)
            yield np.zeros((2, RATE), np.float32)
    sound = held_sound(np.zeros((2, 1), np.float32), RATE)
    write_video(tmp_path / "clip.mp4", clip(16), 8, audio=type(sound)(RATE, 2, pieces, 10**6 * RATE))
    assert asked == [0, 1]
    assert read_audio(open_video(tmp_path / "clip.mp4"))[0].shape[1] <= 2 * RATE


def write_long_sound(path, seconds, begin=0.0):
    """20 frames at 25 fps, and sound of so many seconds that begins at `begin`."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.width = stream.height = 40
        stream.pix_fmt = "yuv420p"
        sound = container.add_stream("pcm_u8", rate=8000, layout="mono")
        for frame in numbered(20):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
        for second in range(seconds):
            frame = av.AudioFrame.from_ndarray(np.full((1, 8000), 128, np.uint8), format="u8", layout="mono")
            frame.sample_rate, frame.pts, frame.time_base = 8000, second * 8000, Fraction(1, 8000)
            for packet in sound.encode(frame):
                shift = round(begin / packet.time_base)
                packet.pts, packet.dts = packet.pts + shift, packet.dts + shift
                container.mux(packet)


def test_hours_of_sound_after_the_pictures_take_no_memory(tmp_path):
    """An hour at 8 kHz is 115 MB as float32. What is heard during 20 frames is 25 KB."""
    path = tmp_path / "hours.mkv"
    write_long_sound(path, 3600)
    video = open_video(path)
    tracemalloc.start()
    sound, rate = read_audio(video)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert sound.shape == (1, 6400) and rate == 8000 and video.frames == 20
    assert peak < 5 * 2**20


def test_sound_that_begins_after_a_million_seconds_is_not_waited_for(tmp_path):
    path = tmp_path / "late.mkv"
    write_long_sound(path, 2, begin=1_000_000.0)
    video = open_video(path)
    sound = read_audio(video)
    assert sound is None or sound[0].shape[1] <= 6400
    assert numbers(video.read()) == list(range(20))


def test_sound_is_read_in_pieces_that_can_be_stopped(tmp_path):
    path = tmp_path / "clip.mp4"
    write_coded(path, "aac", tones((440, 660)), "stereo")
    told = []
    sound, _ = read_audio(open_video(path), on_samples=told.append)
    assert told[-1] == sound.shape[1] and len(told) > 50 and told == sorted(told)

    def stop(total):
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        read_audio(open_video(path), on_samples=stop)


@pytest.mark.parametrize("channels, name, taken", [
    (8, "7.1", True), (8, "8 channels", True), (9, "9 channels", False), (16, "9.1.6", True),
    (9, "ambisonic 2", False)])
def test_sound_is_taken_of_up_to_eight_channels_and_of_more_whose_loudspeakers_are_known(channels, name, taken):
    layout = SimpleNamespace(nb_channels=channels, name=name)
    stream = SimpleNamespace(codec_context=SimpleNamespace(layout=layout), rate=48000)
    found = sound_stream(SimpleNamespace(streams=SimpleNamespace(audio=[stream])))
    assert found is (stream if taken else None)
