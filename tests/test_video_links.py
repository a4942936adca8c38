"""The video nodes with what links bring: numbers past the widgets' bounds, frames that are no pictures, long names.

In this process, with the host's real modules and no server.
"""

from datetime import datetime
from fractions import Fraction

import av
import numpy as np
import pytest
import torch

from video_ldm.temporal.errors import VideoLDMError
from video_ldm.temporal.video import open_video, read_audio, write_video
from video_ldm.tests.video_help import clip

NAN, INF = float("nan"), float("inf")


def load(file="clip.mp4", start_frame=0, frame_count=0, stride=1):
    from video_ldm.nodes.load_video import LoadVideoFrames
    return LoadVideoFrames.execute(file, start_frame, frame_count, stride).args


def save(images=None, **settings):
    from video_ldm.nodes.save_video import SaveVideoFile
    settings = {"filename_prefix": "clip", "format": "mp4", "fps": 8.0, "crf": 10, "contact_sheet": 4, **settings}
    if images is None and "video" not in settings:
        images = torch.from_numpy(np.array(clip())) / 255
    return SaveVideoFile.execute(images=images, **settings).args


def images(count=3, height=16, width=16, channels=3):
    return torch.full((count, height, width, channels), 0.5)


@pytest.mark.parametrize("name, values", [
    ("start_frame", (-1, 0.5, None, NAN, INF, "0", 10**10)), ("frame_count", (-5, 1.5, None, NAN)),
    ("stride", (0, -1, 2.5, None, INF))])
def test_load_refuses_frame_numbers_that_are_not_whole_or_out_of_bounds(folders, name, values):
    write_video(folders / "input" / "clip.mp4", clip(), 8)
    for value in values:
        with pytest.raises(VideoLDMError, match=rf"^Load Video Frames: {name} is .*, and it takes whole numbers from "):
            load(**{name: value})
    assert load(**{name: 1.0})[3] in (11, 1, 12), "a whole number that a link brings as a fraction is one"


@pytest.mark.parametrize("name, values", [
    ("fps", (NAN, INF, -1, None, 241, "8")), ("crf", (-1, 64, 1.5, None, NAN)), ("contact_sheet", (-1, 65, None, INF)),
    ("format", ("avi", None, 3)), ("filename_prefix", (None, 5, "a\0b"))])
def test_save_refuses_settings_past_the_widgets_bounds(folders, name, values):
    for value in values:
        with pytest.raises(VideoLDMError, match=name):
            save(**{name: value})
    assert list((folders / "output").rglob("*.*")) == []


@pytest.mark.parametrize("shape", [(3, 16, 16, 2), (3, 16, 16, 5), (3, 16, 16, 0), (16, 16, 3), (0, 16, 16, 3),
                                   (3, 0, 16, 3), (3, 16, 0, 3), (1, 20000, 2, 3), (1, 2, 20000, 3)])
@pytest.mark.parametrize("kind", ["images", "video"])
def test_save_refuses_images_that_are_no_pictures(folders, shape, kind):
    from video_ldm.nodes.host.api import InputImpl, Types
    frames = torch.zeros(shape)
    with pytest.raises(VideoLDMError, match="The images are a tensor of shape|There are no frames|The images have .* "
                                            "pixels|images (is of the size|is an empty batch|has pictures of)"):
        if kind == "images":
            save(frames)
        else:
            parts = Types.VideoComponents(images=frames, audio=None, frame_rate=Fraction(8))
            save(video=InputImpl.VideoFromComponents(parts))
    assert list((folders / "output").rglob("*.*")) == []


@pytest.mark.parametrize("channels", [1, 4])
def test_grey_and_transparent_images_are_saved(folders, channels):
    assert np.abs(open_video(save(images(channels=channels))[0]).read() - 0.5).max() < 0.02


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_frames_with_nan_are_written_black_there_and_remarked_on(folders, bad):
    frames = images(12)
    frames[4, :8] = bad
    frames[7:] = bad
    file, _, report = save(frames, format="webp", crf=0)
    read = open_video(file).read()
    remark = "frames 4, 7, 8, 9, 10 and 1 more hold values that are no numbers (NaN), which were written as black"
    assert remark in report
    assert read[4, :8].max() == 0 and abs(read[4, 8:] - 0.5).max() < 0.01 and read[7:].max() == 0
    assert "NaN" not in save(images(3))[2]


def test_dates_are_filled_in_as_the_page_does_for_cores_nodes(folders):
    from video_ldm.nodes.host.files import with_dates
    now = datetime(2026, 3, 4, 5, 6, 7)
    for text, expected in (("%date:yyyy-MM-dd%", "2026-03-04"), ("%date:d.M.yy%", "4.3.26"),
                           ("%date:hh-mm-ss%", "05-06-07"), ("%date:h_m_s%", "5_6_7"), ("%date:HHmm%", "0506"),
                           ("%date:yyyyMMdd%/a_%date:H%", "20260304/a_5"),
                           ("%date:yyy%", "yyy"), ("a%width%b", "a%width%b"), ("%date:%", "%date:%"), ("50%", "50%")):
        assert with_dates(text, now) == expected
    before, file, after = f"{datetime.now():%Y-%m-%d}", save(filename_prefix="v/%date:yyyy-MM-dd%_%width%")[0], \
        f"{datetime.now():%Y-%m-%d}"
    name = file.rsplit("output", 1)[1].replace("\\", "/")
    assert name in (f"/v/{before}_96_00001_.mp4", f"/v/{after}_96_00001_.mp4")


def test_names_that_are_too_long_are_refused_and_the_longest_is_written(folders):
    assert open_video(save(filename_prefix="a" * 220)[0]).frames == 12
    for prefix in ("b" * 221, "\u00e9" * 111, "b" * 5000, "folder/" + "b" * 250):
        with pytest.raises(VideoLDMError, match="filename_prefix 'b*.* is too long: a file's name can have 220 bytes"):
            save(filename_prefix=prefix)
    with pytest.raises(VideoLDMError, match="The folder of filename_prefix 'ccc.*cannot be made"):
        save(filename_prefix="c" * 300 + "/clip")
    (folders / "output" / "taken").write_text("a file")
    with pytest.raises(VideoLDMError, match="The folder of filename_prefix 'taken/clip' cannot be made"):
        save(filename_prefix="taken/clip")


def test_a_prefix_on_another_drive_leads_outside_the_output_folder(folders, monkeypatch):
    """What Python says on Windows, where core compares the two paths."""
    from video_ldm.nodes.host import files

    def compare(*args):
        raise ValueError("Paths don't have the same drive")
    monkeypatch.setattr(files.folder_paths, "get_save_image_path", compare)
    with pytest.raises(VideoLDMError, match="^filename_prefix 'D:/clip' leads outside ComfyUI's output folder"):
        save(filename_prefix="D:/clip")


@pytest.mark.parametrize("prefix, letter", [("clip_%date:HH:mm%", ":"), ("a:b", ":"), ("what?", r"\?"), ("a/b*", r"\*"),
                                            ("C:/out/a|b", r"\|"), ("a\tb", r"\\t")])
def test_letters_that_windows_takes_in_no_name_are_refused_there_before_any_work(folders, monkeypatch, prefix, letter):
    from video_ldm.nodes.host import files
    from video_ldm.nodes.save_video import SaveVideoFile
    assert SaveVideoFile.validate_inputs(prefix, images=None) is True, "other systems take it"
    monkeypatch.setattr(files, "ON_WINDOWS", True)
    with pytest.raises(VideoLDMError, match=f"^filename_prefix .* gives a name with '{letter}', which Windows takes"):
        files.check_prefix(prefix)
    assert "which Windows takes in no name" in SaveVideoFile.validate_inputs(prefix, images=None)
    with pytest.raises(VideoLDMError, match="which Windows takes in no name"):
        save(filename_prefix=prefix)
    assert list((folders / "output").iterdir()) == []


def test_drives_folders_and_dates_are_no_forbidden_letters(host, monkeypatch):
    from video_ldm.nodes.host import files
    monkeypatch.setattr(files, "ON_WINDOWS", True)
    for prefix in ("C:\\ComfyUI\\output\\clip", "c:/out/clip", "video/%date:yyyy-MM-dd%_%width%", "video\\clip"):
        files.check_prefix(prefix)


@pytest.mark.parametrize("file, sentence", [
    ("../secret.mp4", "leads outside ComfyUI's input folder"), ("a/../../secret.mp4", "leads outside"),
    ("x" * 5000, "There is no file"), (None, "takes the name of a file"), (7, "takes the name of a file"),
    ("", "takes the name of a file"), ("a\0.mp4", "must be the name of a file"), (".", "leads outside"),
    ("folder", "is a folder")])
def test_input_files_outside_the_folder_or_of_no_name_are_refused(folders, file, sentence):
    from video_ldm.nodes.load_video import LoadVideoFrames
    write_video(folders / "secret.mp4", clip(), 8)
    (folders / "input" / "folder").mkdir()
    with pytest.raises(VideoLDMError, match=sentence):
        load(file)
    if file is not None:
        assert sentence == "is a folder" or LoadVideoFrames.validate_inputs(file) is not True
    assert not LoadVideoFrames.fingerprint_inputs(file) or sentence == "is a folder"


def test_files_with_their_folder_are_found(folders):
    write_video(folders / "output" / "made.mp4", clip(), 8)
    assert load("made.mp4 [output]")[3] == 12


# VIDEO with surround sound

def surround(seconds=1.5, rate=48000):
    time = np.arange(int(seconds * rate)) / rate
    waves = np.stack([0.4 * np.sin(2 * np.pi * f * time) for f in (400, 500, 600, 60, 700, 800)])
    return waves.astype(np.float32), rate


def pitches(sound, rate):
    spectrum = np.abs(np.fft.rfft(sound[:, rate // 4:rate // 4 + rate // 2], axis=1))
    return (spectrum.argmax(1) * 2).tolist()


@pytest.mark.parametrize("how", ["ours", "cores_save", "cores_parts", "trimmed"])
def test_the_video_of_a_range_keeps_its_channels_wherever_it_is_saved(folders, how):
    from video_ldm.nodes.host.api import InputImpl
    write_video(folders / "input" / "clip.mp4", clip(16), 8, audio=surround(2.0))
    video = load(start_frame=2)[1]
    if how == "ours":
        path = save(video=video, fps=0.0)[0]
    elif how == "cores_save":
        path = folders / "core.mp4"
        video.save_to(str(path), format="auto", codec="auto")
    elif how == "trimmed":
        path = folders / "core.mp4"
        video = video.as_trimmed(0.25, 1.5)
        video.save_to(str(path))
    else:
        video = InputImpl.VideoFromComponents(video.get_components())
        path = save(video=video, fps=0.0)[0]
    sound, rate = read_audio(open_video(path))
    assert pitches(sound, rate) == [400, 500, 600, 60, 700, 800]
    assert abs(sound.shape[1] / rate - (1.5 if how == "trimmed" else 1.75)) < 0.01
    assert open_video(path).frames == (12 if how == "trimmed" else 14)


def test_the_video_of_a_range_is_as_bright_in_cores_save_as_it_was(folders):
    write_video(folders / "input" / "clip.mp4", clip(16), 8, crf=4)
    frames, video = load(start_frame=2)[:2]
    video.save_to(str(folders / "core.mp4"))
    assert abs((open_video(folders / "core.mp4").read() - frames.numpy()).mean()) * 255 < 0.2


def test_sound_that_is_no_sound_is_refused(folders):
    from video_ldm.nodes.host.api import InputImpl, Types
    for wave in (torch.zeros(1, 9, 100), torch.zeros(2, 100), torch.zeros(0, 1, 100)):
        parts = Types.VideoComponents(images=images(), audio={"waveform": wave, "sample_rate": 8000},
                                      frame_rate=Fraction(8))
        with pytest.raises(VideoLDMError, match="The sound is a tensor of shape"):
            save(video=InputImpl.VideoFromComponents(parts), fps=0.0)


def test_a_file_whose_pixels_are_not_square_says_so_in_the_report(folders):
    with av.open(str(folders / "input" / "clip.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=8)
        stream.width, stream.height, stream.pix_fmt = 144, 96, "yuv420p"
        stream.codec_context.sample_aspect_ratio = Fraction(8, 9)
        for frame in clip(3, 96, 144):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
    frames, video, _, _, report, _ = load()
    assert frames.shape == (3, 96, 128, 3) and video.get_dimensions() == (128, 96)
    assert "128x96" in report and "its pixels are not square: 144x96 became 128x96" in report


# LazyVideo

def lazy(count=12, rate=8):
    from video_ldm.nodes.host.lazy_video import LazyVideo
    frames = torch.from_numpy(np.array(clip(count))) / 255
    return LazyVideo(lambda first, last: iter([frames[first:last]]), count, 96, 64, rate)


@pytest.mark.parametrize("rate", [NAN, INF, 0, -8, None])
def test_a_lazy_video_of_no_rate_is_refused(host, rate):
    with pytest.raises(VideoLDMError, match="The frame rate is"):
        lazy(rate=rate)


@pytest.mark.parametrize("settings", [{"start_time": NAN}, {"start_time": INF}, {"duration": NAN}, {"start_time": "1"}])
def test_trimming_by_no_number_is_refused(host, settings):
    with pytest.raises(VideoLDMError, match=f"{next(iter(settings))} is .* seconds; it must be a number"):
        lazy().as_trimmed(**settings)


def test_trimming_by_a_negative_duration_is_refused(host):
    with pytest.raises(VideoLDMError, match="duration is -1 seconds"):
        lazy().as_trimmed(0.0, -1.0)


@pytest.mark.parametrize("crf", [NAN, -1, 52, "18"])
def test_a_quality_that_the_codec_does_not_have_is_refused(host, tmp_path, crf):
    with pytest.raises(VideoLDMError, match="crf is .*; for mp4 it must be a number from 0 to 51"):
        lazy().save_to(str(tmp_path / "clip.mp4"), crf=crf)
    assert list(tmp_path.iterdir()) == []


def test_frames_of_a_lazy_video_with_nan_are_remarked_on(folders):
    from video_ldm.nodes.host.lazy_video import LazyVideo
    frames = images(6)
    frames[2] = NAN
    video = LazyVideo(lambda first, last: iter([frames[first:last]]), 6, 16, 16, 8)
    assert "frame 2 holds values that are no numbers" in save(video=video, fps=0.0)[2]


def test_a_video_of_another_pack_is_not_known_by_the_names_of_its_methods(folders):
    from video_ldm.nodes.host.api import InputImpl, Types

    class Other(InputImpl.VideoFromComponents):
        def get_audio(self, track):
            raise AssertionError("means something else there")

        iterate_frames = get_audio

    parts = Types.VideoComponents(images=images(5), audio=None, frame_rate=Fraction(6))
    saved = open_video(save(video=Other(parts), fps=0.0)[0])
    assert (saved.frames, saved.rate) == (5, 6)
