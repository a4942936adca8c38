"""Load Video Frames: the sound of the chosen frames, the files of its list, the lines of its report, what it shows.

In this process, with the host's real modules and no server.
"""

from fractions import Fraction

import av
import numpy as np
import pytest
import torch

from video_ldm.temporal.errors import VideoLDMError
from video_ldm.temporal.video import open_video, read_audio, write_video
from video_ldm.tests.video_help import clip, counting, numbers, write_exact, write_two_sizes

RATE = Fraction(30000, 1001)        # frames a second of `exact`
SOUND = 44100                       # samples a second of `exact`


def load(file, start_frame=0, frame_count=0, stride=1):
    from video_ldm.nodes.load_video import LoadVideoFrames
    return LoadVideoFrames.execute(file, start_frame, frame_count, stride).args


@pytest.fixture
def exact(folders):
    """Writes input/clip.mov: 90 numbered frames with sound of that many channels, bit for bit. Gives the samples."""
    def write(channels):
        wave = counting(channels, 150_000)
        write_exact(folders / "input" / "clip.mov", "pcm_s16le", wave, {1: "mono", 2: "stereo", 6: "5.1"}[channels])
        return wave
    return write


# Sound

@pytest.mark.parametrize("channels", [1, 2, 6])
def test_the_audio_is_that_of_the_chosen_frames_to_a_sample(exact, channels):
    """Frame n at r frames a second begins with sample round(n / r * 44100)."""
    wave = exact(channels)
    for start, count, stride, last in ((0, 0, 1, 90), (0, 0, 4, 92), (13, 10, 1, 23), (13, 10, 3, 43), (89, 1, 1, 90)):
        images, video, fps, frames, _, audio = load("clip.mov", start, count, stride)
        assert numbers(images.numpy()) == list(range(90))[start::stride][:count or None]
        expected = wave[:, round(start * SOUND / RATE):round(last * SOUND / RATE)]
        assert audio["sample_rate"] == SOUND and audio["waveform"].dtype == torch.float32
        assert np.array_equal(audio["waveform"][0] * 2**15, expected), (start, count, stride)
        assert abs(audio["waveform"].shape[2] / SOUND - frames / fps) < 1 / SOUND, "as long as the frames"
        parts = video.get_components()
        assert torch.equal(parts.audio["waveform"], audio["waveform"]) and parts.audio["sample_rate"] == SOUND
        assert torch.equal(parts.images, images) and parts.frame_rate == RATE / stride


def test_a_video_without_sound_gives_none_as_cores_nodes_do(folders):
    write_video(folders / "input" / "clip.mp4", clip(), 8)
    for stride in (1, 2):
        _, video, _, _, _, audio = load("clip.mp4", stride=stride)
        assert audio is None and video.get_components().audio is None


def test_where_the_sound_ends_before_the_frames_it_is_silent(folders):
    """1 second of sound in 2 seconds of frames. AAC ends with a packet of 1024 samples."""
    write_video(folders / "input" / "clip.mp4", clip(16), 8, audio=(np.full((2, 48000), 0.5, np.float32), 48000))
    audio = load("clip.mp4")[5]
    assert audio["waveform"].shape == (1, 2, 96000)
    assert audio["waveform"][..., 2000:46000].min() > 0.4 and not audio["waveform"][..., 48000 + 2048:].any()
    assert load("clip.mp4", 10)[5]["waveform"].shape == (1, 2, 36000) and not load("clip.mp4", 10)[5]["waveform"].any()


def test_frames_with_sound_that_do_not_fit_into_memory_are_refused_before_reading(exact, monkeypatch):
    from video_ldm.nodes.host import files
    wave, asked = exact(6), []

    def refuse(size, what, advice):
        asked.append(size)
        raise VideoLDMError(what)
    monkeypatch.setattr(files, "refuse_beyond_memory", refuse)
    with pytest.raises(VideoLDMError, match="^90 frames of 40x40 from clip.mov with their sound$"):
        load("clip.mov")
    assert asked == [90 * 40 * 40 * 12 + round(90 * SOUND / RATE) * len(wave) * 4]


@pytest.mark.parametrize("stride", [1, 3])
def test_the_video_and_the_sound_stay_together_when_saved(exact, folders, stride):
    from video_ldm.nodes.save_video import SaveVideoFile
    exact(6)
    _, video, fps, frames, _, audio = load("clip.mov", 9, 20, stride)
    path = SaveVideoFile.execute("clip", "mp4", 0.0, 10, 0, video=video).args[0]
    saved = open_video(path)
    sound, rate = read_audio(saved)
    assert (saved.frames, saved.rate, rate, len(sound)) == (20, RATE / stride, SOUND, 6)
    assert abs(sound.shape[1] - audio["waveform"].shape[2]) <= 1


# Lines of the report

def report_of(file, **settings):
    return load(file, **settings)[4]


def write_coded(path, codec, pixels, pictures, colours=(), **options):
    """Pictures, each a list of planes as arrays, in any code. colours: FFmpeg's numbers of primaries, curve, matrix."""
    path.parent.mkdir(exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25, options=options)
        stream.height, stream.width = pictures[0][0].shape
        stream.pix_fmt = pixels
        context = stream.codec_context
        context.color_range = 1
        if colours:
            context.color_primaries, context.color_trc, context.colorspace = colours
        for planes in pictures:
            frame = av.VideoFrame(stream.width, stream.height, pixels)
            for plane, values in zip(frame.planes, planes):
                room = plane.line_size // values.itemsize
                rows = np.zeros((values.shape[0], room), values.dtype)
                rows[:, :values.shape[1]] = values
                plane.update(rows.tobytes())
            if colours:
                frame.colorspace = colours[2]
            frame.color_range = 1
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def flat(levels, kind=np.uint8):
    """One flat picture of 64x48, 4:2:0."""
    return [np.full((48, 64) if k == 0 else (24, 32), level, kind) for k, level in enumerate(levels)]


@pytest.mark.parametrize("curve, words", [(16, "it is HDR (PQ)"), (18, "it is HDR (HLG)"),
                                          (14, "its colours are those of BT.2020")])
@pytest.mark.parametrize("name", ["clip.mp4", "clip.mkv"])
def test_hdr_is_read_by_its_matrix_and_the_report_says_that_colours_stay_as_they_are(folders, curve, words, name):
    """Y 600, Cb 400, Cr 640 of 10 bits are y 0.612, u -0.125, v 0.143 by BT.2020's matrix."""
    path = folders / "input" / name
    options = {"x265-params": "log-level=none:lossless=1"}
    write_coded(path, "libx265", "yuv420p10le", [flat((600, 400, 640), np.uint16)] * 3, (9, curve, 9), **options)
    images, _, _, _, report, _ = load(name)
    y, u, v = (600 - 64) / 876, (400 - 512) / 896, (640 - 512) / 896
    expected = torch.tensor([y + 1.4746 * v, y - 0.16455 * u - 0.57135 * v, y + 1.8814 * u])
    assert (images - expected).abs().max() < 1.5 / 255
    assert words in report and "read as they are" in report and "its 10 bits per colour became 8" in report


def test_an_ordinary_video_has_no_such_lines(folders):
    write_video(folders / "input" / "clip.mp4", clip(), 8)
    assert report_of("clip.mp4") == "clip.mp4: 12 of 12 frames, 96x64, 8 fps"


def combed(count=8):
    """Frames with a bright bar that moves 4 pixels in each half picture: even lines first."""
    pictures = []
    for k in range(count):
        light = np.full((48, 64), 60, np.uint8)
        for field in (0, 1):
            left = 8 * k % 40 + 4 * field
            light[field::2, left:left + 12] = 200
        pictures.append([light, np.full((24, 32), 128, np.uint8), np.full((24, 32), 128, np.uint8)])
    return pictures


def combs(images):
    """How far, in 0..1, a line differs from the mean of its neighbours, the mean over the frames."""
    grey = images.mean(-1)
    return float((grey[:, 1:-1] - (grey[:, :-2] + grey[:, 2:]) / 2).abs().mean())


@pytest.mark.parametrize("name, codec, options", [
    ("clip.mpg", "mpeg2video", {"flags": "+ildct+ilme", "qscale": "2", "top": "1"}),
    ("clip.mp4", "libx264", {"x264-params": "tff=1", "crf": "4"})])
def test_interlaced_frames_are_reported_and_deinterlaced_on_request(folders, name, codec, options):
    from video_ldm.nodes.host.lazy_video import HeldVideo
    from video_ldm.nodes.load_video import LoadVideoFrames
    write_coded(folders / "input" / name, codec, "yuv420p", combed(), **options)
    images, _, _, count, report, _ = load(name)
    assert "its frames are interlaced and were read as they are" in report and combs(images) > 0.05
    whole = LoadVideoFrames.execute(name, 0, 0, 1, True).args
    assert "its frames are interlaced and were deinterlaced" in whole[4] and whole[3] == count
    assert combs(whole[0]) < combs(images) / 4
    assert torch.equal(whole[1].get_components().images, whole[0])
    assert isinstance(whole[1], HeldVideo) and whole[1].get_frame_count() == count, "not the interlaced file itself"
    part = LoadVideoFrames.execute(name, 3, 2, 2, True).args
    assert torch.equal(part[0], whole[0][3:7:2]), "a range is that slice of the whole"


def test_a_range_far_into_an_interlaced_file_is_that_slice_of_the_whole(folders):
    """The frame before the first is decoded too, where the first is a key frame."""
    write_coded(folders / "input" / "long.mp4", "libx264", "yuv420p", combed(260),
                **{"x264-params": "tff=1", "crf": "8", "g": "10", "bf": "0"})
    video = open_video(folders / "input" / "long.mp4")
    whole = video.read(deinterlace=True)
    for start in (150, 155, 250):
        part = video.read(video.select(start, 3), deinterlace=True)
        assert np.array_equal(part, whole[start:start + 3]), start


def test_deinterlacing_changes_nothing_in_other_files(folders):
    write_video(folders / "input" / "clip.mp4", clip(), 8)
    write_video(folders / "input" / "clip.webp", clip(), 8, "webp")
    for name in ("clip.mp4", "clip.webp"):
        video = open_video(folders / "input" / name)
        assert np.array_equal(video.read(deinterlace=True), video.read())


@pytest.mark.parametrize("pixels", ["uyvy422", "nv12", "rgb24", "yuv420p"])
@pytest.mark.parametrize("colours", [(1, 1), (1, 2), (6, 1)])
def test_frames_that_are_not_interlaced_come_out_as_they_went_in(pixels, colours):
    from video_ldm.temporal.video.deinterlace import deinterlaced
    frames = [av.VideoFrame.from_ndarray(frame, format="rgb24").reformat(format=pixels) for frame in clip(5)]
    for frame in frames:
        frame.colorspace, frame.color_range = colours
    found = list(deinterlaced(enumerate(frames, 7), "clip.mov"))
    assert [number for number, _ in found] == [7, 8, 9, 10, 11]
    assert all(made is frame for (_, made), frame in zip(found, frames))
    assert {(frame.colorspace, frame.color_range) for frame in frames} == {colours}


@pytest.mark.parametrize("colours", [(1, 1), (1, 2), (6, 1)])
def test_a_packed_format_is_deinterlaced_in_its_own_colours(folders, colours):
    """Packed and in planes the same pictures give the same frames, and their tags stay."""
    from video_ldm.temporal.video.deinterlace import deinterlaced
    write_coded(folders / "clip.mpg", "mpeg2video", "yuv420p", combed(), flags="+ildct+ilme", qscale="2", top="1")
    found = {}
    for pixels in ("uyvy422", "yuv422p"):
        with av.open(str(folders / "clip.mpg")) as container:
            frames = [frame.reformat(format=pixels) for frame in container.decode(video=0)]
        for frame in frames:
            assert frame.interlaced_frame
            frame.colorspace, frame.color_range = colours
        made = [frame for _, frame in deinterlaced(enumerate(frames), "clip.mov")]
        assert {(frame.colorspace, frame.color_range) for frame in made} == {colours}
        found[pixels] = np.array([frame.to_ndarray() for frame in made])
    assert np.array_equal(found["uyvy422"], found["yuv422p"])


def test_some_interlaced_frames_are_counted():
    from video_ldm.temporal.video.remarks import interlaced_remark
    assert interlaced_remark(2, 8, False).startswith("2 of these 8 frames are interlaced and were read as they are")
    assert interlaced_remark(2, 8, True) == "2 of these 8 frames are interlaced and were deinterlaced"
    assert interlaced_remark(0, 8, True) == ""


def test_a_size_that_changes_is_refused_where_it_is_deinterlaced_too(folders):
    path = folders / "input" / "both.m2v"
    write_two_sizes(path)
    with pytest.raises(VideoLDMError, match="changes its picture size from 64x64 to 96x96"):
        open_video(path).read(deinterlace=True)


@pytest.mark.parametrize("name, codec, pixels", [
    ("clip.mov", "prores_ks", "yuva444p10le"), ("clip.mkv", "ffv1", "bgra"), ("clip.webm", "libvpx-vp9", "yuva420p"),
    ("clip.apng", "apng", "rgba")])
def test_transparency_is_left_out_and_the_report_says_so(folders, name, codec, pixels):
    path = folders / "input" / name
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, pixels
        for _ in range(3):
            rgba = np.full((48, 64, 4), 128, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(rgba, format="rgba").reformat(format=pixels)))
        container.mux(stream.encode(None))
    assert "its transparency was left out" in report_of(name)


@pytest.mark.parametrize("name", ["clip.gif", "clip.webp"])
@pytest.mark.parametrize("alpha", [0, 255])
def test_transparent_animations_are_reported_and_others_not(folders, name, alpha):
    from PIL import Image
    pictures = []
    for k in range(3):
        rgba = np.full((48, 64, 4), 60 + 60 * k, np.uint8)
        rgba[..., 3] = 255
        rgba[:10, :10, 3] = alpha
        pictures.append(Image.fromarray(rgba))
    pictures[0].save(folders / "input" / name, save_all=True, append_images=pictures[1:], duration=100)
    assert ("its transparency was left out" in report_of(name)) == (alpha == 0)


# What the node shows

def shown(file, **settings):
    """The preview of the chosen frames, opened, and the entry that the page gets."""
    import folder_paths

    from video_ldm.nodes.load_video import LoadVideoFrames
    ui = LoadVideoFrames.execute(file, **{"start_frame": 0, "frame_count": 0, "stride": 1, **settings}).ui
    assert ui["animated"] == (True,) and ui["images"][0]["type"] == "temp" and len(ui["images"]) == 1
    return open_video(f"{folder_paths.temp_directory}/{ui['images'][0]['filename']}")


def test_the_node_shows_the_chosen_frames_at_their_rate(exact):
    exact(2)
    video = shown("clip.mov", start_frame=13, frame_count=9, stride=5)
    assert (video.frames, video.rate, video.width) == (9, RATE / 5, 40) and not video.has_audio
    assert numbers(video.read()) == list(range(13, 13 + 45, 5))


def test_of_many_frames_the_node_shows_sixty_four_that_last_as_long(folders):
    write_video(folders / "input" / "clip.webp", [np.full((8, 8, 3), k, np.uint8) for k in range(201)], 25, "webp",
                crf=0)
    video = shown("clip.webp")
    levels = video.read().mean((1, 2, 3)) * 255
    assert video.frames == 64 and abs(float(video.frames / video.rate) - 201 / 25) < 0.01
    assert np.abs(levels - np.linspace(0, 200, 64).round()).max() < 3


@pytest.mark.parametrize("size, expected", [((700, 1400), (512, 256)), ((2200, 1100), (256, 512)),
                                            ((31, 17), (18, 32))])
def test_large_frames_are_shown_small(folders, size, expected):
    frames = [np.full((*size, 3), 100, np.uint8)] * 2
    write_video(folders / "input" / "clip.webp", frames, 8, "webp")
    assert (shown("clip.webp").width, shown("clip.webp").height) == expected


def test_a_preview_that_cannot_be_written_fails_nothing(folders, monkeypatch, caplog):
    from video_ldm.nodes.host import range_preview
    from video_ldm.nodes.load_video import LoadVideoFrames

    def full(*args):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(range_preview, "preview_video", full)
    write_video(folders / "input" / "clip.mp4", clip(), 8)
    made = LoadVideoFrames.execute("clip.mp4", 0, 0, 1)
    assert len(made.args[0]) == 12 and set(made.ui) == {"text"}
    assert "cannot show its frames in the node: [Errno 28] No space left on device" in caplog.text
