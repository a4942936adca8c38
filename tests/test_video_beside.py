"""The encoder of a video runs beside the making of its frames: order, errors, Cancel, and how many frames wait."""

import errno
import threading

import av
import numpy as np
import pytest
import torch

from video_ldm.nodes.host.lazy_video import LazyVideo
from video_ldm.temporal.errors import VideoLDMError
from video_ldm.temporal.video import FORMATS, beside, encode, open_video, write, write_video
from video_ldm.tests.video_help import clip, numbered, numbers

SECONDS = 20        # after which a thread that waits for the other is taken to wait for ever
ENCODER = "video_ldm encoder"


@pytest.fixture(autouse=True)
def no_thread_survives():
    yield
    assert ENCODER not in {thread.name for thread in threading.enumerate()}


class Making:
    """A generator of frames that says how many it has begun, and whether it was closed."""

    def __init__(self, frames, before=lambda number: None):
        self.begun, self.closed, self.threads = 0, False, set()
        self.frames = self.make(frames, before)

    def make(self, frames, before):
        try:
            for number, frame in enumerate(frames):
                self.begun = number + 1
                self.threads.add(threading.current_thread())
                before(number)
                yield frame
        finally:
            self.closed = True


def in_one_thread(frames, work, on_done=None):
    """What `beside` does, one after the other."""
    return work(iter(list(frames)))


@pytest.mark.parametrize("format", list(FORMATS))
def test_the_file_is_what_one_thread_writes_to_the_bit(tmp_path, monkeypatch, format):
    sound = 0.3 * np.random.default_rng(0).standard_normal((2, 44100)).astype(np.float32), 44100
    audio = sound if write.KINDS[format].sound else None
    frames = np.random.default_rng(1).integers(0, 256, (40, 32, 48, 3), np.uint8)

    def contents(name):
        path = tmp_path / name / f"clip{FORMATS[format]}"
        path.parent.mkdir()
        write_video(path, iter(frames), 20, format, metadata={"prompt": {"1": 2}}, audio=audio)
        files = sorted(path.iterdir()) if path.is_dir() else [path]
        if path.suffix == ".webm":      # the container has a random number of its own
            return [open_video(path).read().tobytes()]
        return [file.read_bytes() for file in files]
    made = contents("beside")
    monkeypatch.setattr(write, "beside", in_one_thread)
    assert made == contents("after")


def test_the_next_frames_are_made_while_the_first_is_encoded_in_another_thread(tmp_path):
    third, encoders = threading.Event(), set()
    making = Making(numbered(6), lambda number: number == 2 and third.set())

    def watch(frame):
        encoders.add(threading.current_thread())
        assert third.wait(SECONDS), "the third frame is not made before the first is encoded"
    write_video(tmp_path / "a.mp4", making.frames, 8, crf=0, watch=watch)
    assert numbers(open_video(tmp_path / "a.mp4").read()) == list(range(6))
    assert making.threads == {threading.current_thread()} and making.closed
    assert {thread.name for thread in encoders} == {ENCODER} and len(encoders) == 1


@pytest.mark.parametrize("most, size, waiting", [(3, 2**30, 3), (100, 5 * 40 * 40 * 3, 5), (100, 1, 1)])
def test_no_more_frames_wait_than_their_number_and_bytes_allow(tmp_path, monkeypatch, most, size, waiting):
    """One more is being encoded, and one more has been made and finds no room. A frame of any size may wait alone."""
    monkeypatch.setattr(beside, "MOST_FRAMES", most)
    monkeypatch.setattr(beside, "MOST_BYTES", size)
    full, seen = threading.Event(), []
    making = Making(numbered(20), lambda number: number + 1 == waiting + 2 and full.set())

    def watch(frame):
        if not seen:
            assert full.wait(SECONDS)
            full.clear()
            assert not full.wait(0.05) and making.begun == waiting + 2
        seen.append(making.begun)
        assert making.begun <= len(seen) + waiting + 1
    write_video(tmp_path / "a.mp4", making.frames, 8, watch=watch)
    assert len(seen) == making.begun == 20


def test_the_usual_bounds_hold_a_window_of_large_frames_and_no_more_than_64_mb():
    large = 2048 * 1280 * 3
    assert beside.MOST_BYTES == 64 * 2**20 and 8 * large <= beside.MOST_BYTES < 9 * large
    assert beside.MOST_FRAMES >= 16


def test_progress_is_told_in_the_callers_thread_once_for_each_frame_that_is_encoded(tmp_path):
    told, encoded, threads = [], [], set()

    def on_frame(done):
        told.append(done)
        threads.add(threading.current_thread())
        assert done <= len(encoded)
    write_video(tmp_path / "a.mp4", numbered(50), 8, on_frame=on_frame, watch=lambda frame: encoded.append(1))
    assert told == list(range(1, 51)) and threads == {threading.current_thread()}


@pytest.mark.parametrize("error, sentence", [
    (OSError(errno.ENOSPC, "No space left on device"), r"^There is no room for a\.\w+.* in .*Free some space"),
    (av.error.ExternalError(errno.EINVAL, "generic error"), "^These frames cannot be saved as .*Choose another"),
    (VideoLDMError("The sound has 9 channels."), "^The sound has 9 channels.$")])
def test_an_error_of_the_encoder_arrives_as_a_sentence_and_leaves_nothing(tmp_path, monkeypatch, error, sentence):
    making, add, calls = Making(numbered(60)), encode.VideoWriter.add, []

    def failing(self, frame):
        calls.append(1)
        if len(calls) == 3:
            raise error
        add(self, frame)
    monkeypatch.setattr(encode.VideoWriter, "add", failing)
    with pytest.raises(VideoLDMError, match=sentence) as caught:
        write_video(tmp_path / "a.mp4", making.frames, 8)
    assert "\n" not in str(caught.value) and list(tmp_path.iterdir()) == []
    assert making.closed and len(calls) == 3 and making.begun <= 3 + beside.MOST_FRAMES + 1


@pytest.mark.parametrize("format", ["mp4", "gif", "png", "mov prores 422"])
@pytest.mark.parametrize("where", ["between", "at the end", "in a frame"])
def test_cancel_stops_both_and_leaves_nothing(tmp_path, format, where):
    """Between: the encoder is slow, and frames wait. At the end: all frames are made, and some are not encoded."""
    encoded = []

    def before(number):
        if where == "in a frame" and number == 5:
            raise KeyboardInterrupt
    making = Making(numbered(80 if where == "between" else 6), before)

    def cancel(done):
        if done == 2:
            raise KeyboardInterrupt

    def watch(frame):
        encoded.append(1)
        if where == "at the end" and len(encoded) == 1:
            assert wait_for(lambda: making.closed)
    with pytest.raises(KeyboardInterrupt):
        write_video(tmp_path / "clip", making.frames, 8, format, on_frame=cancel if where != "in a frame" else None,
                    watch=watch)
    assert making.closed and list(tmp_path.iterdir()) == []
    assert making.begun == 6 or where == "between" and making.begun < 80


def wait_for(condition):
    """Whether a condition comes true in time."""
    step = threading.Event()
    return any(condition() or step.wait(0.01) for _ in range(100 * SECONDS))


def test_frames_of_a_stream_are_made_in_the_nodes_thread_with_its_modes(tmp_path):
    """torch's modes and ComfyUI's running node belong to a thread."""
    modes = []

    def make(first, last):
        for number in range(first, last):
            modes.append((threading.current_thread(), torch.is_inference_mode_enabled()))
            yield torch.full((1, 32, 32, 3), number / last)
    with torch.inference_mode():
        LazyVideo(make, 5, 32, 32, 8).save_to(str(tmp_path / "a.mp4"))
    assert modes == [(threading.current_thread(), True)] * 5
    assert open_video(tmp_path / "a.mp4").frames == 5


def test_work_that_takes_no_more_frames_ends_the_making():
    making = Making(clip(50))
    assert beside.beside(making.frames, lambda frames: next(frames).shape) == (64, 96, 3)
    assert making.closed and making.begun <= beside.MOST_FRAMES + 2
