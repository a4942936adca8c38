"""The files that Load Video Frames lists: those of every ending that opens, in folders too.

In this process, with the host's real modules and no server.
"""

from fractions import Fraction

import av
import numpy as np
import pytest

from video_ldm.temporal.video import write_video
from video_ldm.tests.video_help import clip


def load(file):
    from video_ldm.nodes.load_video import LoadVideoFrames
    return LoadVideoFrames.execute(file, 0, 0, 1).args


def listed():
    from video_ldm.nodes.host.input_videos import list_videos
    return list_videos()


def touch(folder, *names):
    for name in names:
        (folder / "input" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "input" / name).write_bytes(b"1")


def test_videos_in_folders_below_are_listed_and_open(folders):
    touch(folders, "a.mp4", "film/b.MTS", "film/day 1/c.ts", "film/notes.txt", "film/d.png", "z.webp")
    (folders / "input" / "empty.mp4").mkdir()
    assert listed() == ["a.mp4", "film/b.MTS", "film/day 1/c.ts", "z.webp"]
    write_video(folders / "input" / "film" / "clip.mp4", clip(), 8)
    assert "film/clip.mp4" in listed() and load("film/clip.mp4")[3] == 12
    from video_ldm.nodes.load_video import LoadVideoFrames
    assert LoadVideoFrames.define_schema().inputs[0].options == listed()
    assert LoadVideoFrames.validate_inputs("film/clip.mp4") is True
    assert "There is no file 'film/gone.mp4'" in LoadVideoFrames.validate_inputs("film/gone.mp4")
    assert "leads outside" in LoadVideoFrames.validate_inputs("film/../../clip.mp4")


def test_hidden_files_and_folders_are_not_listed(folders):
    touch(folders, ".a.mp4", ".trash/b.mp4", "film/.c/d.mp4", "film/._e.mov", "film/f.mov")
    assert listed() == ["film/f.mov"]


def test_links_are_followed_once_and_never_in_a_circle(folders):
    touch(folders, "film/a.mp4")
    elsewhere = folders / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "b.mp4").write_bytes(b"1")
    for link, goal in (("disk", elsewhere), ("film/up", folders / "input"), ("film/again", folders / "input" / "film"),
                       ("self", folders / "input" / "self"), ("gone.mp4", folders / "no.mp4"), ("zdisk", elsewhere)):
        (folders / "input" / link).symlink_to(goal)
    assert listed() == ["disk/b.mp4", "film/a.mp4"]


def test_of_a_huge_folder_the_first_videos_are_listed_and_the_log_says_so_once(folders, monkeypatch, caplog):
    from video_ldm.nodes.host import input_videos
    touch(folders, "top.mp4", "zoo/last.mp4", *(f"frames/{k:05}.mp4" for k in range(50)))
    monkeypatch.setattr(input_videos, "MOST_ENTRIES", 20)
    for _ in range(2):
        assert len(listed()) == 18 and "top.mp4" in listed() and "zoo/last.mp4" not in listed()
    assert caplog.text.count("holds 20 folders and videos or more") == 1
    monkeypatch.setattr(input_videos, "MOST_ENTRIES", 60)
    assert len(listed()) == 52


def test_files_that_are_no_videos_use_up_no_room_in_the_list(folders, monkeypatch, caplog):
    from video_ldm.nodes.host import input_videos
    touch(folders, "top.mp4", "zoo/last.mp4", *(f"frames/{k:05}.png" for k in range(50)))
    monkeypatch.setattr(input_videos, "MOST_ENTRIES", 20)
    assert listed() == ["top.mp4", "zoo/last.mp4"] and not caplog.text


def test_the_kinds_of_entries_are_told_by_the_listing_of_their_folder(folders, monkeypatch):
    """A question for each file takes long on network disks."""
    from video_ldm.nodes.host import input_videos
    touch(folders, "a.mp4", "film/b.mov", "film/c.png")
    asked = []
    with monkeypatch.context() as patched:
        for name in ("isdir", "isfile"):
            patched.setattr(input_videos.os.path, name, lambda path: asked.append(path))
        names = listed()
    assert (names, asked) == (["a.mp4", "film/b.mov"], [])


def test_a_folder_that_may_not_be_read_hides_no_other(folders, monkeypatch):
    from video_ldm.nodes.host import input_videos
    touch(folders, "a.mp4", "locked/b.mp4", "open/c.mp4")
    scandir = input_videos.os.scandir

    def locked(path):
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)
    monkeypatch.setattr(input_videos.os, "scandir", locked)
    assert listed() == ["a.mp4", "open/c.mp4"]


def write_kind(path, format, codec, sound_codec):
    """Twelve frames of 64x48 at 25 a second, from dark to bright, with half a second of a tone in stereo."""
    path.parent.mkdir(exist_ok=True)
    with av.open(str(path), "w", format=format) as container:
        stream = container.add_stream(codec, rate=25)
        stream.width, stream.height = 64, 48
        stream.pix_fmt = {"mjpeg": "yuvj420p", "apng": "rgb24", "gif": "rgb8"}.get(codec, "yuv420p")
        sound = sound_codec and container.add_stream(sound_codec, rate=48000, layout="stereo")
        if sound_codec:
            sound.bit_rate = 128_000
        frames = [np.full((48, 64, 3), 40 + 15 * k, np.uint8) for k in range(12)]
        packets = []
        for number, frame in enumerate(frames):
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24").reformat(format=stream.pix_fmt)
            picture.pts, picture.time_base = number, Fraction(1, 25)
            packets += stream.encode(picture)
        packets += stream.encode(None)
        if sound_codec:
            wave = np.sin(np.arange(24000) / 20).astype(np.float32)[None].repeat(2, 0) * 0.5
            piece = av.AudioFrame.from_ndarray(np.ascontiguousarray(wave.T).reshape(1, -1), format="flt",
                                               layout="stereo")
            piece.sample_rate, piece.pts, piece.time_base = 48000, 0, Fraction(1, 48000)
            packets += [*sound.encode(piece), *sound.encode(None)]
        for packet in sorted(packets, key=lambda packet: float(packet.dts * packet.time_base)):
            container.mux(packet)


# {ending: (FFmpeg's format, codec of pictures, codec of sound)}; those that PyAV can write
WRITABLE = {
    ".mp4": ("mp4", "libx264", "aac"), ".m4v": ("mp4", "mpeg4", "aac"), ".mov": ("mov", "mpeg4", "pcm_s16le"),
    ".qt": ("mov", "mpeg4", "aac"), ".3gp": ("3gp", "mpeg4", "aac"), ".3g2": ("3g2", "mpeg4", "aac"),
    ".f4v": ("f4v", "libx264", "aac"), ".mkv": ("matroska", "mpeg4", "flac"), ".mk3d": ("matroska", "mpeg4", "aac"),
    ".webm": ("webm", "libvpx-vp9", "libopus"), ".avi": ("avi", "mpeg4", "pcm_s16le"),
    ".divx": ("avi", "mpeg4", "pcm_s16le"), ".flv": ("flv", "libx264", "aac"), ".wmv": ("asf", "wmv2", "wmav2"),
    ".asf": ("asf", "wmv2", "wmav2"), ".mpg": ("mpeg", "mpeg2video", "mp2"), ".mpeg": ("mpeg", "mpeg2video", "mp2"),
    ".mpe": ("mpeg", "mpeg2video", "mp2"), ".vob": ("vob", "mpeg2video", "ac3"), ".mod": ("vob", "mpeg2video", "ac3"),
    ".ts": ("mpegts", "libx264", "aac"), ".mts": ("mpegts", "libx264", "ac3"), ".m2ts": ("mpegts", "libx264", "ac3"),
    ".m2t": ("mpegts", "mpeg2video", "mp2"), ".tp": ("mpegts", "mpeg2video", "mp2"),
    ".trp": ("mpegts", "mpeg2video", "mp2"), ".tod": ("mpegts", "mpeg2video", "mp2"),
    ".ogv": ("ogv", "libvpx", "libopus"), ".ogm": ("ogg", "libvpx", "flac"), ".mxf": ("mxf", "mpeg2video", "pcm_s16le"),
    ".rm": ("rm", "rv10", "ac3"), ".nut": ("nut", "mpeg4", "pcm_s16le"), ".m1v": ("mpeg1video", "mpeg1video", None),
    ".m2v": ("mpeg2video", "mpeg2video", None), ".mpv": ("mpeg2video", "mpeg2video", None),
    ".ivf": ("ivf", "libvpx-vp9", None), ".mjpeg": ("mjpeg", "mjpeg", None), ".mjpg": ("mjpeg", "mjpeg", None),
    ".h264": ("h264", "libx264", None), ".264": ("h264", "libx264", None), ".hevc": ("hevc", "libx265", None),
    ".h265": ("hevc", "libx265", None), ".265": ("hevc", "libx265", None), ".apng": ("apng", "apng", None),
    ".y4m": ("yuv4mpegpipe", "wrapped_avframe", None), ".gif": ("gif", "gif", None)}


@pytest.mark.parametrize("ending", WRITABLE)
def test_every_listed_ending_opens_with_its_sound(folders, ending):
    """Twelve grey frames that become brighter, as this kind of file holds them."""
    write_kind(folders / "input" / "folder" / f"clip{ending}", *WRITABLE[ending])
    assert listed() == [f"folder/clip{ending}"]
    images, _, fps, count, _, audio = load(f"folder/clip{ending}")
    assert count in (11, 12, 13) and fps > 0
    bright = images.mean((1, 2, 3))
    assert (bright[1:] > bright[:-1] - 0.01).all() and bright[-1] - bright[0] > 0.4
    if WRITABLE[ending][2] is not None:
        assert audio["waveform"].shape[1] == 2 and audio["waveform"].abs().max() > 0.2
