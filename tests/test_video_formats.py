"""Saving with more than 8 bits, with transparency, as pictures, forth and back, and a number of times."""

import dataclasses
import json

import av
import numpy as np
import pytest
from PIL import Image

from video_ldm.temporal.errors import VideoLDMError
from video_ldm.temporal.video import (
    FORMATS,
    KINDS,
    forth_and_back,
    frame_name,
    number_of_frames,
    open_video,
    preview_video,
    read_audio,
    write_video,
)
from video_ldm.temporal.video.pictures import GROUND, SQUARE, as_shown
from video_ldm.tests.video_help import clip, decoded, numbered, numbers, psnr, ramp

DEEP = ("mp4 10-bit", "webm 10-bit", "mov prores 422", "mov prores 4444")
CODED = [name for name, kind in KINDS.items() if kind.codec]
WORKFLOW = {"prompt": {"1": {"class_type": "X"}}, "workflow": {"nodes": [{"id": 1, "title": "a } brace"}]}}


def target(folder, format):
    return folder / f"clip{FORMATS[format]}"


def frames_for(format, count=4, height=64, width=96, alpha=False):
    return ramp(count, height, width, KINDS[format].frame_bits, alpha)


def deep_png(path):
    """A PNG of 16 bits as uint16 (h, w, c). Pillow has no such pictures, so FFmpeg decodes it."""
    with av.open(str(path)) as container:
        frame = next(container.decode(video=0))
    return frame.to_ndarray(format=frame.format.name)


# More than 8 bits

@pytest.mark.parametrize("format, most", [("mp4 10-bit", 0.18), ("webm 10-bit", 0.18), ("mov prores 422", 0.15),
                                          ("mov prores 4444", 0.15)])
def test_ten_bits_come_back_nearer_than_eight_bits_can_be(tmp_path, format, most):
    """Rounding to 8 bits alone errs by 0.25 of 255 on average. H.264 with 8 bits errs by 0.67 here."""
    exact = ramp()
    errors = []
    for frames in (exact, [frame // 257 * 257 for frame in exact]):
        write_video(target(tmp_path, format), frames, 8, format, crf=1)
        back = decoded(target(tmp_path, format))[..., :3]
        assert back.shape == (4, 64, 96, 3)
        errors.append(np.abs(back - np.array(exact) / 65535).mean() * 255)
    assert errors[0] < most < errors[1], "frames that went through 8 bits are noticed"


def test_colours_of_ten_bit_mp4_lie_where_the_file_says(tmp_path):
    """On a ramp a colour that is half a pixel off is a mean shift: 0.3 of 255 here."""
    frames = ramp()
    write_video(tmp_path / "clip.mp4", frames, 8, "mp4 10-bit", crf=1)
    shift = (decoded(tmp_path / "clip.mp4")[..., :3] - np.array(frames) / 65535).mean((0, 1, 2)) * 255
    assert np.abs(shift).max() < 0.06


@pytest.mark.parametrize("format, pixels, profile", [
    ("mp4", "yuv420p", "High"), ("mp4 10-bit", "yuv420p10le", "High 10"), ("webm 10-bit", "yuv420p10le", "Main"),
    ("mov prores 422", "yuv422p10le", "HQ"), ("mov prores 4444", "yuv444p12le", "4444")])
def test_a_file_states_its_pixels_profile_and_colours(tmp_path, format, pixels, profile):
    write_video(target(tmp_path, format), frames_for(format), 24, format)
    with av.open(str(target(tmp_path, format))) as container:
        stream = container.streams.video[0]
        context = stream.codec_context
        assert (context.pix_fmt, context.profile, stream.average_rate) == (pixels, profile, 24)
        assert (context.color_primaries, context.color_trc, context.color_range) == (1, 1, 1)
        assert context.colorspace == (6 if format == "mp4" else 1)


@pytest.mark.parametrize("format", DEEP)
def test_saturated_colours_come_back_through_the_declared_matrix(tmp_path, format):
    """With BT.601 in place of BT.709 red would be off by 20 of 255."""
    colours = np.array([(200, 30, 60), (30, 200, 60), (20, 60, 220)])
    patches = [np.full((64, 64, 3), colour * 257, np.uint16) for colour in colours]
    write_video(target(tmp_path, format), patches, 8, format, crf=2)
    back = decoded(target(tmp_path, format))[..., :3] * 255
    assert np.abs(back - colours[:, None, None]).max() < 2.5
    assert np.abs(open_video(target(tmp_path, format)).read() * 255 - colours[:, None, None]).max() < 3.5


def test_sixteen_bits_are_refused_where_only_eight_are_kept(tmp_path):
    for format in ("mp4", "webm", "webp", "gif", "png"):
        with pytest.raises(VideoLDMError, match="keeps 8 bits per colour"):
            write_video(target(tmp_path, format), ramp(), 8, format)
    assert list(tmp_path.iterdir()) == []


# Transparency

def test_webm_keeps_transparency(tmp_path):
    frames = ramp(4, bits=8, alpha=True)
    write_video(tmp_path / "clip.webm", frames, 8, "webm", crf=4)
    back, wanted = decoded(tmp_path / "clip.webm", "libvpx-vp9") * 255, np.array(frames)
    assert np.abs(back - wanted)[..., 3].mean() < 0.6 and np.abs(back - wanted)[..., 3].max() < 4
    assert np.abs(back - wanted)[..., :3].mean() < 1
    with av.open(str(tmp_path / "clip.webm")) as container:
        assert container.streams.video[0].metadata["alpha_mode"] == "1", "players look at this"


def test_prores_4444_keeps_transparency_with_more_than_eight_bits(tmp_path):
    frames = ramp(4, alpha=True)
    write_video(tmp_path / "clip.mov", frames, 8, "mov prores 4444")
    error = np.abs(decoded(tmp_path / "clip.mov") - np.array(frames) / 65535) * 255
    assert error[..., 3].mean() < 0.2 and error[..., 3].max() < 0.5 and error[..., :3].mean() < 0.15


def test_lossless_webp_keeps_transparency_exactly_and_the_colours_that_are_seen(tmp_path):
    frames = [np.random.default_rng(k).integers(0, 256, (33, 47, 4), np.uint8) for k in range(3)]
    for frame in frames:
        frame[:10, :, 3], frame[10:20, :, 3] = 0, 255
    write_video(tmp_path / "clip.webp", frames, 8, "webp", crf=0)
    with Image.open(tmp_path / "clip.webp") as image:
        assert (image.mode, image.n_frames) == ("RGBA", 3)
        for number, frame in enumerate(frames):
            image.seek(number)
            back, seen = np.asarray(image), frame[..., 3] > 0
            assert np.array_equal(back[..., 3], frame[..., 3]) and np.array_equal(back[seen], frame[seen])


def test_transparency_is_refused_where_it_would_be_lost(tmp_path):
    for format in ("mp4", "gif", "mp4 10-bit", "webm 10-bit", "mov prores 422"):
        with pytest.raises(VideoLDMError, match="no transparency. Choose one of webm, webp, mov prores 4444, png"):
            write_video(target(tmp_path, format), frames_for(format, alpha=True), 8, format)
    assert list(tmp_path.iterdir()) == []


def test_transparent_parts_are_looked_at_before_chequers():
    frame = np.zeros((16, 16, 4), np.uint8)
    frame[..., 0], frame[:, 8:, 3] = 200, 255
    shown = as_shown(frame)
    assert shown[0, 0].tolist() == [GROUND[1]] * 3 and shown[SQUARE, 0].tolist() == [GROUND[0]] * 3
    assert (shown[:, 8:] == [200, 0, 0]).all()
    assert np.array_equal(as_shown(frame.astype(np.uint16) * 257), shown)
    levels = np.arange(65536, dtype=np.uint16).reshape(256, 256, 1).repeat(3, 2)
    assert np.array_equal(as_shown(levels), np.round(levels / 257).astype(np.uint8))


# Pictures

@pytest.mark.parametrize("alpha", [False, True])
@pytest.mark.parametrize("format, bits", [("png", 8), ("png 16-bit", 16)])
def test_pictures_are_exact_to_the_bit_one_for_each_frame(tmp_path, format, bits, alpha):
    shape = (33, 47, 4 if alpha else 3)
    frames = [np.random.default_rng(k).integers(0, 2**bits, shape, f"uint{bits}") for k in range(3)]
    written = write_video(tmp_path / "clip_frames", frames, 8, format, metadata=WORKFLOW)
    assert (written.frames, written.width, written.height, written.padded) == (3, 47, 33, False)
    files = sorted((tmp_path / "clip_frames").iterdir())
    assert [file.name for file in files] == ["frame_00000.png", "frame_00001.png", "frame_00002.png"]
    assert [entry.name for entry in tmp_path.iterdir()] == ["clip_frames"]
    for file, frame in zip(files, frames):
        assert np.array_equal(deep_png(file), frame)
        with Image.open(file) as image:
            image.load()
            assert image.size == (47, 33)
            texts = {key: json.loads(text) for key, text in image.text.items()}
            assert texts == (WORKFLOW if file.name == frame_name(0) else {})
            assert bits == 16 or np.array_equal(np.asarray(image), frame)


# How often, and in which order

@pytest.mark.parametrize("plays", [0, 1, 2, 7])
def test_the_number_of_times_that_an_animation_plays_is_in_the_file(tmp_path, plays):
    """GIF counts the times after the first. Without a count it plays once."""
    for format in ("webp", "gif"):
        write_video(target(tmp_path, format), clip(3), 8, format, plays=plays)
    assert Image.open(tmp_path / "clip.webp").info["loop"] == plays
    assert Image.open(tmp_path / "clip.gif").info.get("loop") == {0: 0, 1: None, 2: 1, 7: 6}[plays]


@pytest.mark.parametrize("count, order", [(0, []), (1, [0]), (2, [0, 1]), (3, [0, 1, 2, 1]),
                                          (6, [0, 1, 2, 3, 4, 5, 4, 3, 2, 1])])
def test_forth_and_back_repeats_neither_end(count, order):
    frames = numbered(count)
    back = list(forth_and_back(iter(frames)))
    assert [next(k for k, frame in enumerate(frames) if frame is found) for found in back] == order
    assert number_of_frames(count) == len(order)


@pytest.mark.parametrize("format", ["mp4", "webp", "gif"])
def test_a_file_that_goes_forth_and_back_has_its_frames_in_that_order(tmp_path, format):
    written = write_video(target(tmp_path, format), forth_and_back(numbered(5)), 8, format, crf=1)
    assert written.frames == 8
    assert numbers(open_video(target(tmp_path, format)).read()) == [0, 1, 2, 3, 4, 3, 2, 1]


# Every format

@pytest.mark.parametrize("format", list(KINDS))
def test_odd_sides_and_a_single_frame_are_saved_in_every_format(tmp_path, format):
    frames = frames_for(format, 1, 65, 97)
    written = write_video(target(tmp_path, format), frames, 8, format)
    padded = bool(KINDS[format].codec)
    assert (written.frames, written.width, written.height) == (1, 98 if padded else 97, 66 if padded else 65)
    assert written.padded == padded and target(tmp_path, format).exists()
    if padded:
        assert decoded(target(tmp_path, format)).shape == (1, 66, 98, 4)


@pytest.mark.parametrize("format", DEEP + ("png", "png 16-bit"))
def test_a_failure_leaves_nothing_in_the_new_formats_either(tmp_path, format):
    def frames():
        yield from frames_for(format, 3)
        raise RuntimeError("out of luck")

    with pytest.raises(RuntimeError, match="out of luck"):
        write_video(target(tmp_path, format), frames(), 8, format)
    with pytest.raises(VideoLDMError, match="no frames to save"):
        write_video(target(tmp_path, format), [], 8, format)
    two_sizes = frames_for(format, 1) + frames_for(format, 1, 32)
    with pytest.raises(VideoLDMError, match="frame 2 is 96x32, the first 96x64"):
        write_video(target(tmp_path, format), two_sizes, 8, format)
    assert list(tmp_path.iterdir()) == []


def test_an_encoder_that_refuses_the_frames_leaves_a_sentence_and_no_file(tmp_path):
    with pytest.raises(VideoLDMError, match="cannot be saved as 'webm 10-bit': .* Choose another format") as caught:
        write_video(tmp_path / "clip.webm", ramp(2, 2, 2), 8, "webm 10-bit")
    assert "\n" not in str(caught.value) and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("change, words", [({"codec": "libnone"}, "needs the encoder libnone, which this version"),
                                           ({"pixels": "yuv411p"}, "needs yuv411p, which the encoder libx264")])
def test_an_encoder_that_pyav_lacks_is_named_and_no_file_is_left(tmp_path, monkeypatch, change, words):
    monkeypatch.setitem(KINDS, "mp4", dataclasses.replace(KINDS["mp4"], **change))
    with pytest.raises(VideoLDMError, match=words):
        write_video(tmp_path / "clip.mp4", clip(2), 8, "mp4")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("format", DEEP)
def test_the_workflow_is_in_the_new_formats_too(tmp_path, format):
    write_video(target(tmp_path, format), ramp(), 8, format, metadata=WORKFLOW)
    with av.open(str(target(tmp_path, format))) as container:
        texts = {key.lower(): text for key, text in container.metadata.items()}
    assert {key: json.loads(texts[key]) for key in WORKFLOW} == WORKFLOW


# Sound in the new containers

@pytest.mark.parametrize("channels", [1, 2, 6])
def test_prores_has_sound_with_24_bits_in_sync_with_its_channels(tmp_path, channels):
    """A click on each channel at a sample of its own. The sound is longer than the pictures and ends with them."""
    wave = np.zeros((channels, 3 * 44100), np.float32)
    places = [5000 + 1000 * channel for channel in range(channels)]
    wave[np.arange(channels), places] = 0.5
    write_video(tmp_path / "clip.mov", ramp(12), 8, "mov prores 422", audio=(wave, 44100))
    sound, rate = read_audio(open_video(tmp_path / "clip.mov"))
    assert (sound.shape, rate) == ((channels, round(1.5 * 44100)), 44100)
    assert np.abs(sound - wave[:, :sound.shape[1]]).max() < 2**-22


@pytest.mark.parametrize("format", ["mp4", "webm", "mp4 10-bit", "webm 10-bit"])
@pytest.mark.parametrize("channels", [2, 6])
def test_sound_stays_in_sync_with_its_channels_in_coded_formats(tmp_path, format, channels):
    """Each channel is loud in a tenth of a second of its own."""
    wave = np.zeros((channels, 48000), np.float32)
    for channel in range(channels):
        begin = 4800 * (channel + 2)
        wave[channel, begin:begin + 4800] = 0.5 * np.sin(np.arange(4800) * (0.01 if channel == 3 else 0.1))
    write_video(target(tmp_path, format), frames_for(format, 8), 8, format, audio=(wave, 48000))
    sound, rate = read_audio(open_video(target(tmp_path, format)))
    assert (sound.shape[0], rate) == (channels, 48000) and abs(sound.shape[1] - 48000) < 100
    for channel in range(channels):
        loud = np.flatnonzero(np.abs(sound[channel]) > 0.1)
        assert abs(loud[0] - 4800 * (channel + 2)) < 480 and abs(loud[-1] - 4800 * (channel + 3)) < 480


# The preview of what a page cannot play

def test_a_preview_is_a_small_mp4_with_the_frames_and_the_sound(tmp_path):
    wave = np.sin(np.arange(24000) / 10).astype(np.float32)[None]
    frames = ramp(8, 600, 1000)
    with preview_video(tmp_path / "small.mp4", 8, (wave, 16000)) as player:
        for frame in frames:
            player.add(frame)
        assert not (tmp_path / "small.mp4").exists()
    video = open_video(tmp_path / "small.mp4")
    assert (video.frames, video.width, video.height, video.rate) == (8, 512, 308, 8)
    small = [np.asarray(Image.fromarray(as_shown(frame)).resize((512, 307))) for frame in frames]
    assert psnr(video.read()[:, :307], small) > 35
    assert abs(read_audio(video)[0].shape[1] - 16000) < 1200


def test_a_preview_of_a_failed_file_is_not_kept(tmp_path):
    with pytest.raises(RuntimeError), preview_video(tmp_path / "small.mp4", 8) as player:
        player.add(clip(1)[0])
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
