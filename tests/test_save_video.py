"""Save Video File with sound of its own, transparency, more than 8 bits, loops and previews.

In this process, with the host's real modules and no server.
"""

from io import BytesIO
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from video_ldm.temporal.errors import VideoLDMError
from video_ldm.temporal.video import KINDS, open_video, read_audio, write_video
from video_ldm.tests.video_help import clip, decoded, numbered, numbers, psnr, ramp

RATE = 44100
PREVIEWED = ("mp4 10-bit", "mov prores 422", "mov prores 4444", "png", "png 16-bit")


@pytest.fixture
def folders(host, tmp_path, monkeypatch):
    """ComfyUI's input, output and temporary folders, empty."""
    import folder_paths
    for name in ("input", "output", "temp"):
        (tmp_path / name).mkdir()
        monkeypatch.setattr(folder_paths, f"{name}_directory", str(tmp_path / name))
    return tmp_path


def run(images=None, **settings):
    """The node's file, report and what the page gets."""
    from video_ldm.nodes.save_video import SaveVideoFile
    settings = {"filename_prefix": "clip", "format": "mp4", "fps": 8.0, "crf": 4, "contact_sheet": 4, **settings}
    output = SaveVideoFile.execute(images=images, **settings)
    file, sheet, report = output.args
    assert sheet.ndim == 4 and sheet.shape[3] == 3 and "\n" not in report
    return Path(file), report, output.ui


def shown(folders, entry):
    return folders / entry["type"] / entry["subfolder"] / entry["filename"]


def bytes_of(frames):
    return torch.from_numpy(np.array(frames)) / 255


def exact(frames):
    """An IMAGE of the values that 16 bits stand for."""
    return torch.from_numpy(np.array(frames).astype(np.float64) / 65535).float()


def tone(seconds, channels=2, pitch=440, rate=RATE):
    wave = 0.5 * np.sin(2 * np.pi * pitch * np.arange(round(seconds * rate)) / rate)
    return {"waveform": torch.from_numpy(wave.astype(np.float32)).expand(1, channels, -1), "sample_rate": rate}


def pitch_of(path):
    sound, rate = read_audio(open_video(path))
    middle = sound[0, rate // 10:rate // 10 + rate // 2]
    return np.abs(np.fft.rfft(middle)).argmax() * rate / len(middle)


def everything_in(folder):
    return [path for path in folder.rglob("*") if path.is_file()]


# Sound

@pytest.mark.parametrize("format", ["mp4", "webm", "mp4 10-bit", "webm 10-bit", "mov prores 422"])
def test_connected_sound_is_written_with_its_channels(folders, format):
    file, report, _ = run(bytes_of(clip(12)), format=format, audio=tone(1.5, channels=6))
    sound, rate = read_audio(open_video(file))
    assert sound.shape[0] == 6 and abs(sound.shape[1] / rate - 1.5) < 0.03 and abs(pitch_of(file) - 440) < 3
    assert "sound" not in report


def test_connected_sound_stands_in_for_the_sound_of_the_video(folders):
    from video_ldm.nodes.host.api import InputImpl
    path = folders / "input" / "clip.mp4"
    write_video(path, clip(12), 8, audio=(tone(1.5, pitch=1000)["waveform"][0].numpy(), RATE))
    video = InputImpl.VideoFromFile(str(path))
    assert abs(pitch_of(run(video=video, fps=0.0)[0]) - 1000) < 3
    assert abs(pitch_of(run(video=video, fps=0.0, audio=tone(1.5))[0]) - 440) < 3
    file, report, _ = run(video=video, fps=16.0, audio=tone(0.75))
    assert open_video(file).has_audio and "left out" not in report, "it does not belong to the video's own rate"


@pytest.mark.parametrize("format", ["mp4", "mov prores 422"])
def test_a_video_in_memory_is_saved_as_the_same_file_on_disk_is(folders, format):
    """Pictures and sound are read in turns, from a file that is larger than FFmpeg's buffers."""
    from video_ldm.nodes.host.api import InputImpl
    path = folders / "input" / "clip.mp4"
    frames = np.random.default_rng(0).integers(0, 256, (24, 96, 96, 3), np.uint8)
    write_video(path, frames, 12, crf=18, audio=(tone(2.0, pitch=1000)["waveform"][0].numpy(), RATE))
    assert path.stat().st_size > 2**17
    disk, memory = (open_video(run(video=InputImpl.VideoFromFile(source), fps=0.0, format=format)[0])
                    for source in (str(path), BytesIO(path.read_bytes())))
    assert (memory.frames, memory.rate) == (24, 12) and np.array_equal(memory.read(), disk.read())
    (sound, rate), (expected, _) = read_audio(memory), read_audio(disk)
    assert rate == RATE and np.array_equal(sound, expected) and abs(sound.shape[1] / rate - 2) < 0.03
    assert abs(pitch_of(memory.source) - 1000) < 3


@pytest.mark.parametrize("seconds, heard, words", [
    (3.0, 1.5, "the sound of 3.00 s was cut where the pictures end, after 1.50 s"),
    (0.5, 0.5, "the sound ends after 0.50 s, and the pictures after 1.50 s"), (1.52, 1.5, None), (1.48, 1.48, None)])
def test_longer_sound_is_cut_and_shorter_sound_ends_earlier(folders, seconds, heard, words):
    file, report, _ = run(bytes_of(clip(12)), format="mov prores 422", audio=tone(seconds))
    sound, rate = read_audio(open_video(file))
    assert (sound.shape[1], rate) == (round(heard * RATE), RATE)
    assert np.abs(sound - tone(seconds)["waveform"][0, :, :sound.shape[1]].numpy()).max() < 2**-22
    assert (words in report) if words else ("sound" not in report)


@pytest.mark.parametrize("settings, words", [
    ({"format": "webp"}, "webp has no sound, so it was left out"), ({"format": "png"}, "png has no sound"),
    ({"ping_pong": True}, "its sound was left out, because the frames go forth and back")])
def test_sound_that_is_left_out_is_named(folders, settings, words):
    file, report, _ = run(bytes_of(clip(4)), audio=tone(0.5), **settings)
    assert words in report
    assert file.is_dir() or not open_video(file).has_audio


@pytest.mark.parametrize("audio, words", [
    ({}, "dict without a waveform and a sample rate"), ({"waveform": torch.zeros(1, 1, 9)}, "without a waveform and"),
    ([], "list without a waveform"), ("a.wav", "str without a waveform"), (5, "int without a waveform"),
    ({"waveform": [[[0.0]]], "sample_rate": RATE}, "waveform of the sound is a list"),
    ({"waveform": torch.zeros(1, 1, 9, dtype=torch.int16), "sample_rate": RATE}, "is a tensor of torch.int16"),
    ({"waveform": torch.zeros(1, 9), "sample_rate": RATE}, r"shape \(1, 9\)"),
    ({"waveform": torch.zeros(2, 1, 9), "sample_rate": RATE}, r"shape \(2, 1, 9\); one sound .* Choose one of several"),
    ({"waveform": torch.zeros(1, 9, 9), "sample_rate": RATE}, r"shape \(1, 9, 9\); one sound of 1 to 8"),
    ({"waveform": torch.full((1, 1, 9), float("nan")), "sample_rate": RATE}, "no numbers"),
    ({"waveform": torch.zeros(1, 1, 9), "sample_rate": "44100"}, "'44100' samples a second"),
    ({"waveform": torch.zeros(1, 1, 9), "sample_rate": None}, "None samples a second"),
    ({"waveform": torch.zeros(1, 1, 9), "sample_rate": 0}, "0 samples a second; it must be a number such as 44100")])
def test_what_is_no_sound_is_refused_in_one_sentence(folders, audio, words):
    with pytest.raises(VideoLDMError, match=words) as caught:
        run(bytes_of(clip(2)), audio=audio)
    assert "\n" not in str(caught.value) and everything_in(folders) == []


@pytest.mark.parametrize("kind", ["HeldVideo", "VideoFromComponents"])
@pytest.mark.parametrize("settings, words", [
    ({"format": "gif"}, "gif has no sound"), ({"format": "png"}, "png has no sound"), ({"ping_pong": True}, "forth"),
    ({"fps": 16.0}, "it belongs to 8 fps"), ({"audio": tone(0.5)}, "8 fps")])
def test_sound_that_cannot_be_written_matters_only_where_it_would_be(folders, kind, settings, words):
    from video_ldm.nodes.host.api import InputImpl, Types
    from video_ldm.nodes.host.lazy_video import HeldVideo
    frames, nine = bytes_of(clip(4)), {"waveform": torch.zeros(1, 9, 100), "sample_rate": RATE}
    parts = Types.VideoComponents(images=frames, audio=nine, frame_rate=8)
    video = HeldVideo(frames, 8, nine) if kind == "HeldVideo" else InputImpl.VideoFromComponents(parts)
    assert words in run(video=video, **{"fps": 0.0, **settings})[1]
    with pytest.raises(VideoLDMError, match=r"shape \(1, 9, 100\); one sound of 1 to 8"):
        run(video=video, fps=0.0)


def test_sound_without_samples_makes_a_silent_video_with_a_remark(folders):
    file, report, _ = run(bytes_of(clip(2)), audio={"waveform": torch.zeros(1, 2, 0), "sample_rate": RATE})
    assert "the sound has no samples" in report and not open_video(file).has_audio


# Transparency and bits

def test_transparency_is_kept_or_said_to_be_lost(folders):
    for format, kind in KINDS.items():
        frames = ramp(2, bits=kind.frame_bits, alpha=True)
        images = torch.from_numpy(np.array(frames).astype(np.float64) / (2**kind.frame_bits - 1)).float()
        file, report, _ = run(images, format=format)
        assert ("alpha was lost" in report) == (not kind.alpha), format
        if kind.alpha and kind.codec:
            back = decoded(file, "libvpx-vp9" if format == "webm" else None)[..., 3]
            assert np.abs(back - images[..., 3].numpy()).max() * 255 < 4, format
        elif format == "webp":
            assert np.array_equal(np.asarray(Image.open(file))[..., 3], frames[0][..., 3])
    assert "webm, webp, mov prores 4444, png, png 16-bit keep it" in run(images)[1]


def test_colours_without_transparency_are_what_they_were_before_it_was_kept(folders):
    images = torch.cat([bytes_of(clip(3)), torch.rand(3, 64, 96, 1)], -1)
    assert run(images)[0].read_bytes() == run(images[..., :3])[0].read_bytes()


def test_frames_become_16_bits_without_a_stop_at_8(folders):
    """From images, and from a video of the pack whose frames are made one by one."""
    from video_ldm.nodes.host.lazy_video import LazyVideo
    frames = ramp(3, 32, 48)
    images = exact(frames)
    video = LazyVideo(lambda first, last: (images[k:k + 1] for k in range(first, last)), 3, 48, 32, 8)
    for settings in ({"images": images}, {"video": video}):
        folder, report, _ = run(format="png 16-bit", **settings)
        for file, frame in zip(sorted(folder.iterdir()), frames, strict=True):
            with av.open(str(file)) as container:
                decoded_frame = next(container.decode(video=0))
            assert np.array_equal(decoded_frame.to_ndarray(format="rgb48be"), frame)
        assert "bits" not in report


def test_a_video_file_of_8_bits_gains_none_and_the_report_says_so(folders):
    from video_ldm.nodes.host.api import InputImpl
    path = folders / "input" / "clip.webp"
    write_video(path, clip(3), 8, "webp", crf=0)
    write_video(folders / "input" / "clip.mp4", clip(3), 8, crf=4)
    video = InputImpl.VideoFromFile(str(folders / "input" / "clip.mp4"))
    folder, report, _ = run(video=video, format="png 16-bit")
    assert "the video was read with 8 bits per colour, so png 16-bit has no finer steps" in report
    with av.open(str(folder / "frame_00000.png")) as container:
        values = next(container.decode(video=0)).to_ndarray(format="rgb48be")
    assert (values % 257 == 0).all()
    assert np.array_equal(values // 257, next(open_video(folders / "input" / "clip.mp4").iterate()))


def test_what_reading_a_video_file_changed_is_in_the_report(folders):
    from video_ldm.nodes.host.api import InputImpl
    path = folders / "input" / "clip.mov"
    write_video(path, ramp(3, alpha=True), 8, "mov prores 4444")
    report = run(video=InputImpl.VideoFromFile(str(path)), format="png 16-bit")[1]
    assert open_video(path).change and open_video(path).change in report
    assert "bits per colour became 8; its transparency was left out; the video was read with 8 bits" in report


def test_broken_values_are_black_and_opaque_with_16_bits_and_transparency(folders):
    from video_ldm.nodes.host.pixels import frame_bytes
    broken = []
    image = torch.tensor([[[float("nan"), 0.5, 2.0, float("nan")]]])
    assert frame_bytes(image, 3, broken, 16, True).tolist() == [[[0, 32768, 65535, 65535]]]
    assert broken == [3]
    images = torch.full((2, 16, 16, 4), 0.5)
    images[1, 0, 0, 0] = float("nan")
    assert "frame 1 holds values that are no numbers" in run(images, format="png 16-bit")[1]


# Loops

def test_forth_and_back_is_written_and_the_sheet_shows_each_frame_once(folders):
    file, report, ui = run(bytes_of(numbered(5)), format="webp", crf=0, ping_pong=True, contact_sheet=16)
    assert numbers(open_video(file).read()) == [0, 1, 2, 3, 4, 3, 2, 1] and "8 frames" in report
    once = run(bytes_of(numbered(5)), format="webp", crf=0, contact_sheet=16)[2]
    sheets = [np.asarray(Image.open(shown(folders, part["contact_sheet"][0]))) for part in (ui, once)]
    assert np.array_equal(*sheets)


def test_forth_and_back_beyond_the_memory_is_refused(folders, monkeypatch):
    from video_ldm.nodes.host import files
    monkeypatch.setattr(files.comfy.model_management, "get_free_memory", lambda device: 5 * 40 * 40 * 3 - 1)
    with pytest.raises(VideoLDMError, match="5 frames of 40x40 forth and back need .* Switch ping_pong off"):
        run(bytes_of(numbered(5)), ping_pong=True)
    run(bytes_of(numbered(5)))
    monkeypatch.setattr(files.comfy.model_management, "get_free_memory", lambda device: 5 * 40 * 40 * 3)
    run(bytes_of(numbered(5)), ping_pong=True)


def test_loop_count_reaches_the_file_and_other_formats_say_that_they_ignore_it(folders):
    images = bytes_of(clip(3))
    assert Image.open(run(images, format="webp", loop_count=3)[0]).info["loop"] == 3
    assert Image.open(run(images, format="gif", loop_count=3)[0]).info["loop"] == 2
    assert "loop_count is for webp and gif, and mp4 ignores it" in run(images, loop_count=3)[1]
    assert "loop_count" not in run(images)[1]


@pytest.mark.parametrize("settings", [{"loop_count": -1}, {"loop_count": 1001}, {"loop_count": 1.5},
                                      {"loop_count": "2"}, {"ping_pong": "yes"}, {"ping_pong": 1}])
def test_new_settings_past_their_bounds_are_refused(folders, settings):
    with pytest.raises(VideoLDMError, match=next(iter(settings))):
        run(bytes_of(clip(2)), **settings)
    assert everything_in(folders) == []


def test_nothing_at_the_new_inputs_is_what_they_are_by_default(folders):
    for format in ("webp", "gif", "mp4"):
        given = run(bytes_of(clip(3)), format=format, loop_count=None, ping_pong=None, audio=None)[0]
        assert given.read_bytes() == run(bytes_of(clip(3)), format=format)[0].read_bytes()


# What the page shows

@pytest.mark.parametrize("format", list(KINDS))
def test_the_page_gets_a_file_that_it_can_play(folders, format):
    frames = clip(6)
    file, report, ui = run(bytes_of(frames), format=format, audio=tone(0.75))
    [entry] = ui["images"]
    path = shown(folders, entry)
    assert path.suffix in (".mp4", ".webm", ".webp", ".gif") and ui["animated"] == (format != "gif",)
    assert psnr(open_video(path).read(), frames) > 30 and open_video(path).frames == 6
    assert (entry["type"] == "temp") == (format in PREVIEWED)
    if format in PREVIEWED:
        [saved] = ui["files"]
        assert shown(folders, saved) == (file / "frame_00000.png" if file.is_dir() else file)
        assert open_video(path).has_audio == bool(KINDS[format].sound)
    else:
        assert path == file and "files" not in ui
    assert f"{file.name}: 6 frames, 96x64, 8 fps" in report


def test_two_folders_of_pictures_have_numbers_of_their_own(folders):
    names = [run(bytes_of(clip(2)), format="png")[0].name for _ in range(2)]
    assert names == ["clip_00001_frames", "clip_00002_frames"]
    assert len(everything_in(folders / "output")) == 2 * (2 + 1)


@pytest.mark.parametrize("where", ["add", "finish"])
@pytest.mark.parametrize("format", ["mov prores 422", "png"])
def test_a_preview_that_fails_is_logged_and_the_file_is_saved(folders, monkeypatch, caplog, format, where):
    from video_ldm.temporal.video import encode
    calls = []

    def full(*args):
        calls.append(args)
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(encode._PreviewWriter, where, full)
    file, _, ui = run(bytes_of(clip(4)), format=format)
    assert len(calls) == 1 and caplog.text.count("cannot show its file in the node: [Errno 28]") == 1
    assert "images" not in ui and len(ui["files"]) == 1 and list((folders / "temp").iterdir()) == []
    assert len(list(file.iterdir())) == 4 if file.is_dir() else open_video(file).frames == 4


def test_cancel_in_a_preview_cancels_the_save(folders, monkeypatch):
    import comfy.model_management as management

    from video_ldm.temporal.video import encode

    def cancel(*args):
        raise management.InterruptProcessingException
    monkeypatch.setattr(encode._PreviewWriter, "add", cancel)
    with pytest.raises(management.InterruptProcessingException):
        run(bytes_of(clip(4)), format="mov prores 422")
    assert everything_in(folders) == []


@pytest.mark.parametrize("format", PREVIEWED)
def test_a_failure_leaves_neither_file_nor_preview(folders, format):
    from video_ldm.nodes.host.lazy_video import LazyVideo

    def make(first, last):
        yield torch.zeros(1, 32, 32, 3)
        raise RuntimeError("out of luck")

    with pytest.raises(RuntimeError, match="out of luck"):
        run(video=LazyVideo(make, 5, 32, 32, 8), format=format)
    assert everything_in(folders) == [] and list((folders / "output").iterdir()) == []
