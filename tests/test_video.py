"""Video files: what is written comes back, at its rate, whole or not at all, with the workflow in it."""

import json
from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image

from video_ldm.temporal.atomic import replace_on_success
from video_ldm.temporal.errors import VideoLDMError
from video_ldm.temporal.video import Sheet, open_video, read_audio, write_sheet, write_video
from video_ldm.temporal.video.encode import even_size, picture_stream
from video_ldm.temporal.video.pictures import Encodable
from video_ldm.temporal.video.sheet import GAP, columns, grid, thumbnail
from video_ldm.temporal.video.timing import as_rate
from video_ldm.tests.video_help import clip, numbered, numbers, psnr

WORKFLOW = {"prompt": {"1": {"class_type": "X", "inputs": {"text": "a } brace, {and \" one\u00e9"}}},
            "workflow": {"nodes": [{"id": 1}], "extra": {"ds": [1, 2.5]}}}


# Encoding and decoding

@pytest.mark.parametrize("format, ending", [("mp4", ".mp4"), ("webm", ".webm")])
@pytest.mark.parametrize("rate", [8, Fraction(24000, 1001), 2.5])
def test_a_coded_video_comes_back_close_with_its_count_and_rate(tmp_path, format, ending, rate):
    path = tmp_path / f"clip{ending}"
    written = write_video(path, clip(), rate, format)
    video = open_video(path)
    assert (written.frames, written.width, written.height, written.padded) == (12, 96, 64, False)
    assert (video.frames, video.width, video.height, video.rate) == (12, 96, 64, as_rate(rate))
    images = video.read()
    assert images.dtype == np.float32 and 0 <= images.min() and images.max() <= 1
    assert psnr(images, clip()) > 38


def test_few_frames_are_held_back_by_the_encoder(tmp_path):
    """A stream keeps no more frames than these in memory. x264 by itself holds 40 and more."""
    frames = clip(64)
    with av.open(str(tmp_path / "clip.mp4"), mode="w") as container:
        stream = picture_stream(container, "mp4", Fraction(8), 18, frames[0])
        encodable = Encodable()
        held = next(count for count, frame in enumerate(frames) if stream.encode(encodable.frame(frame)))
    assert held < 20


def test_lower_crf_is_closer_and_larger(tmp_path):
    noise = [np.random.default_rng(k).integers(0, 255, (64, 64, 3), np.uint8) for k in range(4)]
    for format, ending in (("mp4", ".mp4"), ("webm", ".webm"), ("webp", ".webp")):
        for crf in (10, 40):
            write_video(tmp_path / f"{crf}{ending}", noise, 8, format, crf=crf)
        fine, coarse = tmp_path / f"10{ending}", tmp_path / f"40{ending}"
        assert fine.stat().st_size > coarse.stat().st_size
        assert psnr(open_video(fine).read(), noise) > psnr(open_video(coarse).read(), noise)


def test_colours_are_declared_and_not_shifted(tmp_path):
    patch = [np.full((64, 64, 3), colour, np.uint8) for colour in ((200, 30, 60), (30, 200, 60), (20, 60, 220))]
    for format, ending in (("mp4", ".mp4"), ("webm", ".webm")):
        path = tmp_path / f"clip{ending}"
        write_video(path, patch, 8, format, crf=4)
        assert np.abs(open_video(path).read() * 255 - np.array(patch)).max() <= 4
        with av.open(str(path)) as container:
            assert container.streams.video[0].codec_context.colorspace == 6
            assert container.streams.video[0].codec_context.pix_fmt == "yuv420p"
            plain = next(container.decode(video=0)).to_ndarray(format="rgb24")
        assert np.abs(plain.astype(int) - patch[0]).max() <= 4, "readers that ignore the declaration see the same"


def test_the_colours_that_another_programs_file_declares_are_honoured(tmp_path):
    path, colour = tmp_path / "bt709.mp4", (200, 30, 60)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=8)
        stream.width = stream.height = 64
        stream.pix_fmt, stream.options = "yuv420p", {"crf": "4"}
        stream.codec_context.colorspace, stream.codec_context.color_range = 1, 1
        frame = av.VideoFrame.from_ndarray(np.full((64, 64, 3), colour, np.uint8), format="rgb24")
        frame = frame.reformat(format="yuv420p", dst_colorspace=1, dst_color_range=1)
        frame.colorspace, frame.color_range = 1, 1
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    assert np.abs(open_video(path).read()[0] * 255 - colour).max() <= 4


def test_lossless_webp_is_exact_and_loops_forever(tmp_path):
    noise = [np.random.default_rng(k).integers(0, 255, (33, 47, 3), np.uint8) for k in range(5)]
    write_video(tmp_path / "clip.webp", noise, 12, "webp", crf=0)
    video = open_video(tmp_path / "clip.webp")
    assert (video.frames, video.rate, video.width, video.height) == (5, 12, 47, 33)
    assert np.array_equal(np.round(video.read() * 255), np.array(noise))
    assert Image.open(tmp_path / "clip.webp").info["loop"] == 0


def test_gif_is_exact_within_its_256_colours_and_close_beyond(tmp_path):
    palette = np.random.default_rng(0).integers(0, 255, (200, 3), np.uint8)
    few = [palette[np.random.default_rng(k).integers(0, 200, (40, 40))] for k in range(1, 6)]
    write_video(tmp_path / "few.gif", few, 10, "gif")
    assert np.array_equal(np.round(open_video(tmp_path / "few.gif").read() * 255), np.array(few))
    write_video(tmp_path / "many.gif", clip(), 10, "gif")
    assert psnr(open_video(tmp_path / "many.gif").read(), clip()) > 30
    assert Image.open(tmp_path / "many.gif").info["loop"] == 0


@pytest.mark.parametrize("format, rate", [("gif", 8), ("gif", 30), ("webp", 24), ("webp", Fraction(30000, 1001))])
def test_an_animation_keeps_its_rate_although_its_times_are_rounded(tmp_path, format, rate):
    write_video(tmp_path / f"clip.{format}", clip(30, 16, 16), rate, format)
    video = open_video(tmp_path / f"clip.{format}")
    assert video.frames == 30 and video.clock.change == ""
    assert abs(float(video.rate / rate) - 1) < 0.01


@pytest.mark.parametrize("format", ["gif", "webp"])
def test_frames_that_an_animation_merges_because_they_are_equal_are_repeated_on_reading(tmp_path, format):
    frames = [numbered(8)[k] for k in (0, 1, 1, 1, 4, 5, 5, 7)]
    write_video(tmp_path / f"clip.{format}", frames, 8, format, crf=0)
    video = open_video(tmp_path / f"clip.{format}")
    assert (video.frames, video.rate) == (8, 8)
    assert numbers(video.read()) == [0, 1, 1, 1, 4, 5, 5, 7]


def test_gif_refuses_rates_that_browsers_slow_down(tmp_path):
    with pytest.raises(VideoLDMError, match="GIF cannot play 60 frames"):
        write_video(tmp_path / "clip.gif", clip(), 60, "gif")


def test_odd_sizes_are_padded_by_repeating_the_edge(tmp_path):
    frame = np.random.default_rng(0).integers(0, 255, (5, 7, 3), np.uint8)
    padded = even_size(frame)
    assert padded.shape == (6, 8, 3)
    assert np.array_equal(padded[:5, :7], frame)
    assert np.array_equal(padded[5, :7], frame[4]) and np.array_equal(padded[:5, 7], frame[:, 6])
    assert even_size(padded) is padded
    for format, ending in (("mp4", ".mp4"), ("webm", ".webm")):
        written = write_video(tmp_path / f"odd{ending}", clip(3, 63, 95), 8, format)
        assert written.padded and (written.width, written.height) == (96, 64)
        images = open_video(tmp_path / f"odd{ending}").read()
        assert images.shape == (3, 64, 96, 3) and psnr(images[:, :63, :95], clip(3, 63, 95)) > 38


def test_frames_of_two_sizes_or_none_at_all_are_refused(tmp_path):
    with pytest.raises(VideoLDMError, match="frame 2 is 96x32, the first 96x64"):
        write_video(tmp_path / "clip.mp4", [clip()[0], clip(1, 32, 96)[0]], 8)
    for format in ("mp4", "webm", "gif", "webp"):
        with pytest.raises(VideoLDMError, match="no frames to save"):
            write_video(tmp_path / f"clip.{format}", [], 8, format)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("format", ["mp4", "webm"])
def test_sound_comes_back_at_its_pitch_place_and_length(tmp_path, format):
    rate, seconds = 44100, 1.5
    time = np.arange(int(rate * seconds)) / rate
    tone = np.where(time > 0.75, np.sin(2 * np.pi * 440 * time), 0).astype(np.float32)
    write_video(tmp_path / f"clip.{format}", clip(12), 8, format, audio=(np.stack([tone, tone]), rate))
    video = open_video(tmp_path / f"clip.{format}")
    assert video.has_audio and video.frames == 12
    sound, rate = read_audio(video)
    assert sound.shape[0] == 2 and abs(sound.shape[1] / rate - seconds) < 0.05
    half = int(0.75 * rate)
    assert np.abs(sound[:, :half - 2000]).max() < 0.05 < 0.5 < np.abs(sound[:, half + 2000:half + 20000]).max()
    spectrum = np.abs(np.fft.rfft(sound[0, half:half + rate // 2]))
    assert abs(spectrum.argmax() * 2 - 440) <= 4
    part, rate = read_audio(video, start=0.5, seconds=0.5)
    assert abs(part.shape[1] / rate - 0.5) < 0.001
    assert np.allclose(part, sound[:, round(0.5 * rate):round(0.5 * rate) + part.shape[1]])


# The workflow in the file

def stored(path):
    """prompt and workflow as any reader of the container finds them."""
    if path.suffix in (".png", ".webp"):
        image = Image.open(path)
        texts = image.text if path.suffix == ".png" else dict(
            text.split(":", 1) for text in image.getexif().values() if isinstance(text, str))
    else:
        with av.open(str(path)) as container:
            texts = {key.lower(): text for key, text in container.metadata.items()}
    return {key: json.loads(texts[key]) for key in ("prompt", "workflow")}


@pytest.mark.parametrize("format", ["mp4", "webm", "webp"])
def test_the_workflow_can_be_read_back(tmp_path, format):
    write_video(tmp_path / f"clip.{format}", clip(), 8, format, metadata=WORKFLOW)
    assert stored(tmp_path / f"clip.{format}") == WORKFLOW


def test_the_contact_sheet_carries_the_workflow_too(tmp_path):
    write_sheet(tmp_path / "sheet.png", clip()[0], WORKFLOW)
    assert stored(tmp_path / "sheet.png") == WORKFLOW


def test_nan_in_a_prompt_is_stored_as_null_because_browsers_refuse_it(tmp_path):
    write_video(tmp_path / "clip.mp4", clip(), 8, metadata={"prompt": {"1": {"is_changed": [float("nan")]}},
                                                            "workflow": {}})
    assert stored(tmp_path / "clip.mp4")["prompt"] == {"1": {"is_changed": [None]}}


def test_mp4_has_its_index_and_workflow_before_the_pictures(tmp_path):
    write_video(tmp_path / "clip.mp4", clip(), 8, metadata=WORKFLOW)
    data = (tmp_path / "clip.mp4").read_bytes()
    assert data.index(b"moov") < data.index(b"workflow") < data.index(b"mdat")


def test_webm_metadata_survives_a_reader_that_counts_braces(tmp_path):
    """ComfyUI's page takes the text up to the brace that closes the first one, strings or not."""
    write_video(tmp_path / "clip.webm", clip(), 8, "webm", metadata=WORKFLOW)
    data = (tmp_path / "clip.webm").read_bytes()
    start = data.index(b"{", data.index(b"PROMPT"))
    depth, end = 1, start + 1
    while depth:
        depth += (data[end:end + 1] == b"{") - (data[end:end + 1] == b"}")
        end += 1
    assert json.loads(data[start:end]) == WORKFLOW["prompt"]
    assert start < 2 * 2**20


# Whole or not at all

@pytest.mark.parametrize("format", ["mp4", "webm", "gif", "webp"])
@pytest.mark.parametrize("failing", ["frames", "cancel"])
def test_a_failure_or_cancel_leaves_the_folder_as_it_was(tmp_path, format, failing):
    path = tmp_path / f"clip.{format}"
    path.write_bytes(b"the earlier file")

    def frames():
        yield from clip(3)
        if failing == "frames":
            raise RuntimeError("out of luck")
        yield from clip(3)

    def cancel(done):
        if failing == "cancel" and done == 4:
            raise KeyboardInterrupt

    with pytest.raises(RuntimeError if failing == "frames" else KeyboardInterrupt):
        write_video(path, frames(), 8, format, on_frame=cancel)
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
    assert path.read_bytes() == b"the earlier file"


def test_the_final_name_appears_only_when_the_file_is_complete(tmp_path):
    with replace_on_success(tmp_path / "a.mp4") as temporary:
        assert temporary.parent == tmp_path and temporary.suffix == ".mp4"
        temporary.write_bytes(b"x")
        assert not (tmp_path / "a.mp4").exists()
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.mp4"]


# Contact sheets

def test_the_sheet_takes_all_frames_of_a_short_clip_and_even_steps_of_a_long_one():
    for count, expected in ((1, [0]), (5, [0, 1, 2, 3, 4]), (8, list(range(8))), (15, [0, 2, 4, 6, 8, 10, 12, 14])):
        sheet = Sheet(8)
        for frame in numbered(count, 8):
            sheet.add(frame)
        assert sheet.numbers() == expected
    for count in (16, 100, 1000):
        sheet = Sheet(8)
        for frame in numbered(count, 8):
            sheet.add(frame)
        chosen = sheet.numbers()
        assert len(chosen) == 8 and chosen[0] == 0 and chosen[-1] >= 0.85 * (count - 1)
        steps = np.diff(chosen)
        assert steps.max() <= 2 * steps.min() and len(sheet.kept) < 16


def test_the_sheet_lays_frames_out_in_reading_order():
    frames = numbered(6, 20)
    sheet = grid(frames)
    across = columns(6, 20, 20)
    assert (across, sheet.shape) == (2, (3 * 24 + GAP, 2 * 24 + GAP, 3)) or across == 3
    for k, frame in enumerate(frames):
        top, left = GAP + k // across * 24, GAP + k % across * 24
        assert np.array_equal(sheet[top:top + 20, left:left + 20], frame)


def test_sheets_are_roughly_square_and_large_frames_are_reduced():
    assert columns(8, 256, 128) == 2 and columns(16, 512, 512) == 4 and columns(1, 10, 10) == 1
    assert thumbnail(np.zeros((1280, 2048, 3), np.uint8)).shape == (320, 512, 3)
    assert thumbnail(np.zeros((100, 200, 3), np.uint8)).shape == (100, 200, 3)


def test_an_animation_keeps_the_workflow_with_more_beside_it(tmp_path):
    said = {**WORKFLOW, "first": {"a": 1}, "second": {"b": 2}}
    write_video(tmp_path / "clip.webp", clip(), 8, "webp", metadata=said)
    assert stored(tmp_path / "clip.webp") == WORKFLOW
    texts = [text for text in Image.open(tmp_path / "clip.webp").getexif().values() if isinstance(text, str)]
    assert sorted(text.split(":", 1)[0] for text in texts) == ["first", "prompt", "second", "workflow"]
