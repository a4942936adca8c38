"""Files that are cut off, that lie about themselves, or that lead to other files: a sentence, at once."""

import io
import os
import struct
import threading

import av
import numpy as np
import pytest

from video_ldm.temporal.errors import VideoLDMError
from video_ldm.temporal.video import open_video, write_video
from video_ldm.tests.video_help import clip, numbered, numbers, refusal


def write_avi(path, frames, codec="mpeg4", **options):
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt, stream.options = "yuv420p", options
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))


def promising(data, held, promised):
    """An AVI whose headers count other frames than it holds."""
    main = data.index(b"avih") + 8 + 16
    own = data.index(b"strh") + 8 + 32
    assert struct.unpack("<I", data[main:main + 4])[0] == struct.unpack("<I", data[own:own + 4])[0] == held
    count = struct.pack("<I", promised)
    data = data[:main] + count + data[main + 4:]
    return data[:own] + count + data[own + 4:]


# Whole and cut files

@pytest.mark.parametrize("promised", [61, 59, 75])
def test_an_avi_that_is_whole_is_read_whatever_number_of_frames_its_header_says(tmp_path, promised):
    write_avi(tmp_path / "plain.avi", numbered(60))
    path = tmp_path / "clip.avi"
    path.write_bytes(promising((tmp_path / "plain.avi").read_bytes(), 60, promised))
    video = open_video(path)
    assert (video.frames, video.cut_off) == (60, False)
    assert numbers(video.read()) == list(range(60))


def noise(count):
    return [np.random.default_rng(k).integers(0, 255, (64, 64, 3), np.uint8) for k in range(count)]


@pytest.mark.parametrize("name", ["clip.avi", "clip.mp4", "clip.mkv"])
@pytest.mark.parametrize("share", [0.4, 0.63, 0.9])
def test_the_number_of_frames_that_a_cut_file_is_said_to_hold_can_be_read(tmp_path, name, share):
    """With B-frames, so that the last packets of a cut file are not the last frames."""
    whole, path = tmp_path / name, tmp_path / f"cut_{name}"
    if name.endswith("avi"):
        write_avi(whole, noise(40), bf="2", qscale="4")
    elif name.endswith("mkv"):
        write_avi(whole, noise(40), "libx264", bf="3", crf="20")
    else:
        write_video(whole, noise(40), 25)
    data = whole.read_bytes()
    path.write_bytes(data[:round(len(data) * share)])
    sentence = refusal(path)
    assert "is cut off" in sentence
    most = int(sentence.split("frame_count to at most ")[1].rstrip("."))
    with av.open(str(path)) as container:
        held = sum(packet.size > 0 and not packet.is_corrupt for packet in container.demux(video=0))
    assert held - 4 <= most <= held < 40
    video = open_video(path)
    assert np.array_equal(video.read(video.select(count=most)), open_video(whole).read()[:most])
    assert "were asked for" in refusal(path, count=most + 1)
    assert refusal(path, start=2, stride=2).endswith(f"at most {len(range(2, most, 2))}.")


@pytest.mark.parametrize("text", ["forever", "", "::", "00:00:-4", "00:99:00.5", "1e400:0:0", "00:00:nan"])
def test_an_impossible_duration_in_a_file_is_not_believed(tmp_path, text):
    path = tmp_path / "clip.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=8)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        for frame in clip():
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
    data = path.read_bytes()
    at = data.rindex(b"DURATION")
    place = data.index(b"00:00:01.5", at)
    filled = text.encode().ljust(18, b"\0")
    path.write_bytes(data[:place] + filled + data[place + 18:])
    video = open_video(path)
    assert video.frames == 12 and video.read().shape == (12, 64, 96, 3)


# One file, and nothing else

def quickly(action, seconds=5):
    """Run `action`. Fail if it hangs."""
    outcome = []

    def work():
        try:
            outcome.append(action())
        except BaseException as error:
            outcome.append(error)
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
    assert outcome, "it hangs"
    if isinstance(outcome[0], BaseException):
        raise outcome[0]
    return outcome[0]


LISTS = {
    "hls": "#EXTM3U\n#EXT-X-TARGETDURATION:5\n#EXTINF:1.5,\n{path}\n#EXT-X-ENDLIST\n",
    "hls_without_end": "#EXTM3U\n#EXT-X-TARGETDURATION:5\n#EXTINF:1.5,\n{path}\n",
    "concat": "ffconcat version 1.0\nfile {path}\n",
    "concat_uri": "ffconcat version 1.0\nfile 'file:{path}'\n",
    "dash": ('<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static"><Period><AdaptationSet>'
             '<Representation id="1" bandwidth="1"><BaseURL>{path}</BaseURL></Representation></AdaptationSet></Period>'
             '</MPD>'),
    "sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\n"
           "a=rtpmap:96 H264/90000\n",
    "asx": "[Reference]\nRef1=file:{path}\n",
}


@pytest.mark.parametrize("kind", LISTS)
@pytest.mark.parametrize("name", ["clip.mp4", "clip.m3u8", "clip.mpd", "clip.ffconcat", "clip.sdp", "clip.mkv"])
def test_lists_of_other_files_are_refused_and_the_others_not_opened(tmp_path, kind, name):
    secret = tmp_path / "elsewhere" / "secret.ts"
    secret.parent.mkdir()
    write_avi(secret, clip(), "mpeg2video")
    assert open_video(secret).frames == 12
    path = tmp_path / "input" / name
    path.parent.mkdir()
    path.write_text(LISTS[kind].format(path=secret))
    accessed = os.stat(secret).st_atime_ns
    with pytest.raises(VideoLDMError, match="is a playlist: it only names other files|cannot be read"):
        quickly(lambda: open_video(path))
    with pytest.raises(VideoLDMError):
        quickly(lambda: open_video(io.BytesIO(path.read_bytes())))
    assert os.stat(secret).st_atime_ns == accessed


def test_a_mov_that_refers_to_another_file_does_not_show_it(tmp_path):
    """A data reference ('alis', 'url ') in place of pictures of its own."""
    write_video(tmp_path / "secret.mp4", clip(), 8)
    data = (tmp_path / "secret.mp4").read_bytes()
    at = data.index(b"url \x00\x00\x00\x01")
    external = data[:at + 4] + b"\0\0\0\0" + data[at + 8:]       # "not in this file"
    (tmp_path / "clip.mp4").write_bytes(external)
    assert open_video(tmp_path / "clip.mp4").frames == 12        # read as its own: references are never followed


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes")
@pytest.mark.parametrize("name", ["clip.mp4", "clip.gif"])
def test_a_pipe_or_a_device_or_a_folder_is_refused_at_once(tmp_path, name):
    os.mkfifo(tmp_path / name)
    with pytest.raises(VideoLDMError, match=f"{name} is a pipe, a device or another special file and not a video"):
        quickly(lambda: open_video(tmp_path / name))
    (tmp_path / "zero.mp4").symlink_to("/dev/zero")
    with pytest.raises(VideoLDMError, match="zero.mp4 is a pipe, a device"):
        quickly(lambda: open_video(tmp_path / "zero.mp4"))
    (tmp_path / "folder.mp4").mkdir()
    with pytest.raises(VideoLDMError, match="folder.mp4 is a folder"):
        quickly(lambda: open_video(tmp_path / "folder.mp4"))


def test_names_of_any_length_and_kind_are_read_or_refused(tmp_path):
    with pytest.raises(VideoLDMError, match=r"There is no file aaaa.*\(300 characters\)"):
        open_video(tmp_path / ("a" * 296 + ".mp4"))
    with pytest.raises(VideoLDMError, match="There is no file"):
        open_video(tmp_path / "a\0b.mp4")
    for name in ("http:video.mp4", "concat:a|b.mp4", "%d 100%.mp4", "pipe:0.mp4", "crypto:x.mp4", "\u00e9\u4e2d.mp4"):
        write_video(tmp_path / "plain.mp4", clip(), 8)
        os.rename(tmp_path / "plain.mp4", tmp_path / name)
        assert open_video(tmp_path / name).read().shape == (12, 64, 96, 3)


def test_a_name_that_is_too_long_for_the_disk_is_refused_on_saving(tmp_path):
    with pytest.raises(VideoLDMError, match="name is too long"):
        write_video(tmp_path / ("a" * 251 + ".mp4"), clip(), 8)


def test_frames_before_the_start_of_a_trimmed_mp4_are_neither_shown_nor_missed(tmp_path):
    write_video(tmp_path / "clip.mp4", numbered(12), 8)
    data = bytearray((tmp_path / "clip.mp4").read_bytes())
    edit, timescale = data.index(b"elst") + 12, struct.unpack(">I", data[(at := data.index(b"mdhd")) + 16:at + 20])[0]
    length, start = struct.unpack(">II", data[edit:edit + 8])
    data[edit:edit + 8] = struct.pack(">II", length * 9 // 12, start + 3 * timescale // 8)      # without 3 frames
    (tmp_path / "clip.mp4").write_bytes(data)
    video = open_video(tmp_path / "clip.mp4")
    assert (video.frames, video.rate, video.cut_off) == (9, 8, False)
    assert numbers(video.read()) == list(range(3, 12))
