"""The VIDEO of Temporal VAE Decode: core's interface, streaming, and what it holds in memory."""

import gc
import subprocess
import sys
from fractions import Fraction
from io import BytesIO

import pytest
import torch

from video_ldm.nodes.host import api, temporal_vae
from video_ldm.nodes.host.decoding import DecodeSettings, Decoding
from video_ldm.nodes.host.lazy_video import LazyVideo
from video_ldm.temporal.errors import VideoLDMError
from video_ldm.temporal.families import load_decoder
from video_ldm.temporal.video import open_video
from video_ldm.tests.decoder_help import latents, small_vae, write_decoder


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A small random VAE with a random temporal decoder."""
    file = write_decoder(tmp_path_factory.mktemp("files") / "mine.safetensors")
    return temporal_vae.with_temporal_decoder(small_vae(), load_decoder(file))


def stream(vae, count=12, **settings):
    z = latents(count)
    decoding = Decoding(vae, z, DecodeSettings(**{"window": 4, "overlap": 2, "tile": 0, "clips": 1, **settings}))
    return LazyVideo(decoding.frames, count, decoding.width, decoding.height, 8), decoding


def test_the_video_answers_what_core_asks_of_one_without_decoding(made, monkeypatch):
    video, decoding = stream(made)
    monkeypatch.setattr(Decoding, "decode_piece", None)
    assert isinstance(video, api.Input.Video) and not getattr(type(video), "__abstractmethods__", None)
    assert (video.get_dimensions(), video.get_frame_count(), video.get_frame_rate()) == ((64, 48), 12, Fraction(8))
    assert video.get_duration() == 1.5 and video.get_container_format() == "mp4"


def test_the_video_streams_to_a_file_one_window_at_a_time(made, tmp_path):
    video, _ = stream(made)
    video.save_to(str(tmp_path / "clip.mp4"), format="auto", codec="auto", metadata={"prompt": {"1": 2}})
    file = open_video(tmp_path / "clip.mp4")
    assert (file.frames, file.rate, file.width, file.height) == (12, 8, 64, 48)
    assert video.get_stream_source().getvalue()[4:8] == b"ftyp"     # into memory, where core asks for that
    stored = BytesIO()
    video.save_to(stored, format="webm")
    assert stored.getvalue()[:4] == b"\x1a\x45\xdf\xa3"
    images = video.get_components().images
    assert images.shape == (12, 48, 64, 3)
    ours = torch.stack([torch.from_numpy(frame) for frame in video.iterate_frames()])
    assert torch.equal(ours, (images * 255).round().to(torch.uint8))


def test_a_trimmed_video_is_that_part_of_it(made):
    video, _ = stream(made)
    images = video.get_components().images
    expected = {(0.5, 0.5): (4, 8), (0, 0): (0, 12), (-0.5, None): (8, 12), (1.0, 9): (8, 12)}
    for (start, duration), (first, last) in expected.items():
        part = video.as_trimmed(start, duration)
        assert part.get_frame_count() == last - first and torch.equal(part.get_components().images, images[first:last])
    assert video.as_trimmed(2.0) is None and video.as_trimmed(1.0, 9, strict_duration=True) is None
    assert video.as_trimmed(0.5).as_trimmed(0.5).get_frame_count() == 4


@pytest.mark.parametrize("settings", [
    {"format": "mkv"}, {"format": "mp4", "codec": "av1"}, {"color_space": "HDR"}, {"bit_depth": 10}])
def test_formats_that_cannot_be_streamed_are_refused_in_a_sentence_and_leave_no_file(made, tmp_path, settings):
    with pytest.raises(VideoLDMError, match="Save Video"):
        stream(made)[0].save_to(str(tmp_path / "x.mp4"), **settings)
    assert not list(tmp_path.iterdir())


def pictures_alive() -> dict:
    """Bytes of every piece of memory that holds pictures, by address. Views of one piece count once."""
    tensors = [x for x in gc.get_objects() if type(x) is torch.Tensor and x.ndim == 4]
    kept = [x.untyped_storage() for x in tensors if x.shape[1:] in ((3, 48, 64), (48, 64, 3))]
    return {storage.data_ptr(): storage.nbytes() for storage in kept}


def most_alive(vae, frames) -> int:
    """Bytes of pictures at the fullest moment of streaming that many frames."""
    gc.collect()
    (video, _), before, alive = stream(vae, frames), pictures_alive(), []
    for piece in video.pieces():
        assert len(piece) <= 4
        alive.append(sum(size for place, size in pictures_alive().items() if place not in before))
    return max(alive)


@pytest.mark.filterwarnings("ignore")       # gc meets objects that complain of being looked at
def test_streaming_keeps_a_window_in_memory_and_not_the_clip(made):
    window = 4 * 3 * 48 * 64 * 4
    short = most_alive(made, 8)
    assert 0 < short <= 4 * window          # what the next one changes, this one, both joined, the piece handed out
    assert most_alive(made, 24) <= short


FULL_DISK = """
import resource, signal, sys
sys.path.insert(0, {root!r})
from run import import_pack
import_pack({host!r})
import numpy as np
from video_ldm.nodes.host.lazy_video import LazyVideo
import torch
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (30000, 30000))
frames = torch.rand(60, 64, 96, 3)
video = LazyVideo(lambda first, last: iter(frames[first:last].split(4)), 60, 96, 64, 8)
try:
    video.save_to({path!r})
except Exception as error:
    print(type(error).__name__, error)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no limit on file sizes there")
def test_a_full_disk_while_streaming_is_told_in_a_sentence_and_leaves_no_file(host, tmp_path):
    from video_ldm.tests.conftest import ROOT
    script = FULL_DISK.format(root=str(ROOT), host=str(host.folder), path=str(tmp_path / "clip.mp4"))
    answer = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path)
    assert "VideoLDMError There is no room for clip.mp4 in" in answer.stdout, answer.stderr[-2000:]
    assert not list(tmp_path.iterdir())
