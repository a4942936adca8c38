"""Pictures of video files: their colours stay through many savings, square pixels, upright, of one size."""

import struct
from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image, ImageDraw

from video_ldm.temporal.errors import VideoLDMError
from video_ldm.temporal.video import open_video, write_video
from video_ldm.temporal.video.pictures import square_width
from video_ldm.tests.video_help import clip, write_two_sizes

SATURATED = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (0, 255, 255), (255, 0, 255), (200, 30, 60),
             (20, 60, 220), (255, 255, 255), (0, 0, 0), (128, 128, 128), (90, 160, 10)]


def patches(height=96, width=128):
    """Large areas of one colour each."""
    frame = np.zeros((height, width, 3), np.uint8)
    for k, colour in enumerate(SATURATED):
        row, column = divmod(k, 4)
        frame[row * height // 3:(row + 1) * height // 3, column * width // 4:(column + 1) * width // 4] = colour
    return frame


def soft(seed, count=3, height=96, width=128):
    """Smooth colour fields that move a little, as out-of-focus pictures have them."""
    rng = np.random.default_rng(seed)
    fields, moves = rng.uniform(20, 235, (5, 7, 3)), rng.uniform(-20, 20, (5, 7, 3))

    def enlarged(values):
        return np.asarray(Image.fromarray(values.astype(np.float32)).resize((width, height), Image.Resampling.BICUBIC))
    return [np.stack([enlarged(fields[..., c] + moves[..., c] * k / count) for c in range(3)], -1)
            .clip(0, 255).round().astype(np.uint8) for k in range(count)]


def after_five_generations(folder, frames, format, crf):
    """What five savings and loadings add to the frames, in 1/255."""
    images = np.array(frames) / 255
    for generation in range(5):
        path = folder / f"{generation}.{format}"
        write_video(path, [np.round(image * 255).astype(np.uint8) for image in images], 8, format, crf=crf)
        images = open_video(path).read()
    return images * 255 - np.array(frames, float)


@pytest.mark.parametrize("crf", [4, 18])
@pytest.mark.parametrize("frames", [soft(0), soft(1), clip(3, 96, 128), [patches()] * 3],
                         ids=["soft", "other", "gradient", "saturated"])
def test_five_generations_neither_darken_nor_brighten(tmp_path, frames, crf):
    errors = after_five_generations(tmp_path, frames, "webm", crf)
    assert abs(errors.mean()) <= 0.2


@pytest.mark.parametrize("seed", range(3))
def test_five_generations_of_mp4_neither_darken_nor_brighten(tmp_path, seed):
    """Of brightness, for x264 itself moves the mean of a colour by up to 1, in no one direction."""
    errors = after_five_generations(tmp_path, soft(seed), "mp4", 10).mean((0, 1, 2))
    assert abs(errors @ (0.299, 0.587, 0.114)) <= 0.2


def test_one_generation_is_within_a_step_of_rounding(tmp_path):
    """H.264 at its best quality, on grey, which has no colour to lose: 220 of 256 levels are stored."""
    ramp = np.repeat(np.tile(np.arange(256, dtype=np.uint8), (64, 1))[..., None], 3, -1)
    write_video(tmp_path / "ramp.mp4", [ramp] * 2, 8, crf=1)
    errors = open_video(tmp_path / "ramp.mp4").read() * 255 - ramp
    assert np.abs(errors).max() <= 2 and abs(errors.mean()) < 0.1


# Pixels that are not square

def write_anamorphic(path, frames, aspect, codec="libx264"):
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=8)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        stream.codec_context.sample_aspect_ratio = aspect
        if codec == "libx264":
            stream.options = {"crf": "4"}
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))


def circle(width, height, radius):
    """A white circle, as it should be seen, drawn into width x height square pixels."""
    picture = Image.new("RGB", (width, height), (16, 16, 16))
    box = (width // 2 - radius, height // 2 - radius, width // 2 + radius, height // 2 + radius)
    ImageDraw.Draw(picture).ellipse(box, fill=(235, 235, 235))
    return picture


@pytest.mark.parametrize("name", ["clip.mp4", "clip.mkv"])
@pytest.mark.parametrize("aspect, width", [(Fraction(8, 9), 640), (Fraction(32, 27), 854), (Fraction(16, 15), 768),
                                           (Fraction(1), 720)])
def test_pictures_come_in_square_pixels(tmp_path, name, aspect, width):
    stored = np.asarray(circle(width, 480, 150).resize((720, 480), Image.Resampling.BICUBIC))
    write_anamorphic(tmp_path / name, [stored] * 3, aspect)
    video = open_video(tmp_path / name)
    assert (video.width, video.height) == (width, 480)
    bright = video.read()[1].mean(-1) > 0.5
    across, down = bright[240].sum(), bright[:, width // 2].sum()
    assert abs(across - 301) <= 3 and abs(down - 301) <= 3, "a circle is round"
    assert ("pixels are not square: 720x480 became" in video.change) == (aspect != 1)
    assert video.as_stored == (aspect == 1)


def test_a_video_that_was_read_is_written_in_square_pixels(tmp_path):
    write_anamorphic(tmp_path / "in.mp4", clip(3, 96, 144), Fraction(8, 9))
    video = open_video(tmp_path / "in.mp4")
    write_video(tmp_path / "out.mp4", video.iterate(), video.rate)
    with av.open(str(tmp_path / "out.mp4")) as container:
        stream = container.streams.video[0]
        assert (stream.width, stream.height) == (128, 96) and stream.sample_aspect_ratio in (None, 0, 1)


def test_an_absurd_pixel_is_refused_and_a_nearly_square_one_left(tmp_path):
    assert square_width("clip", 720, Fraction(1081, 1080)) == 720
    write_anamorphic(tmp_path / "clip.mp4", clip(3), Fraction(20))
    with pytest.raises(VideoLDMError, match="its pixels are 20 times as wide as high"):
        open_video(tmp_path / "clip.mp4")


# Turned and mirrored pictures

def with_matrix(data, a, b, c, d):
    """An MP4's track header with a display matrix in it: (x, y) is shown at (a x + c y, b x + d y)."""
    at, one = data.index(b"tkhd") + 4 + 40, 1 << 16
    return data[:at] + struct.pack(">8i", a * one, b * one, 0, c * one, d * one, 0, 0, 0) + data[at + 32:]


@pytest.mark.parametrize("matrix, expected", [
    ((1, 0, 0, 1), lambda array: array),
    ((-1, 0, 0, 1), lambda array: array[:, :, ::-1]),
    ((1, 0, 0, -1), lambda array: array[:, ::-1]),
    ((-1, 0, 0, -1), lambda array: array[:, ::-1, ::-1]),
    ((0, 1, -1, 0), lambda array: np.rot90(array, -1, (1, 2))),
    ((0, -1, 1, 0), lambda array: np.rot90(array, 1, (1, 2))),
    ((0, 1, 1, 0), lambda array: array.transpose(0, 2, 1, 3)),
    ((0, -1, -1, 0), lambda array: np.rot90(array.transpose(0, 2, 1, 3), 2, (1, 2)))])
def test_turned_and_mirrored_pictures_come_as_players_show_them(tmp_path, matrix, expected):
    write_video(tmp_path / "plain.mp4", clip(3), 8)
    plain = open_video(tmp_path / "plain.mp4").read()
    (tmp_path / "turned.mp4").write_bytes(with_matrix((tmp_path / "plain.mp4").read_bytes(), *matrix))
    video = open_video(tmp_path / "turned.mp4")
    images = video.read()
    assert images.shape[1:3] == (video.height, video.width)
    assert np.array_equal(images, expected(plain))
    assert video.as_stored == (matrix == (1, 0, 0, 1))


def test_pixels_are_made_square_before_the_picture_is_turned(tmp_path):
    write_anamorphic(tmp_path / "plain.mp4", clip(3, 96, 144), Fraction(8, 9))
    (tmp_path / "turned.mp4").write_bytes(with_matrix((tmp_path / "plain.mp4").read_bytes(), 0, 1, -1, 0))
    video = open_video(tmp_path / "turned.mp4")
    assert (video.width, video.height) == (96, 128)
    assert np.array_equal(video.read(), np.rot90(open_video(tmp_path / "plain.mp4").read(), -1, (1, 2)))


# Sizes

def test_a_picture_size_that_changes_in_the_middle_is_refused_with_the_frames_before_it(tmp_path):
    path = tmp_path / "both.m2v"
    write_two_sizes(path)
    video = open_video(path)
    with pytest.raises(VideoLDMError, match="changes its picture size from 64x64 to 96x96.*frame_count to at most 9"):
        video.read()
    assert video.read(video.select(count=9)).shape == (9, 64, 64, 3)


@pytest.mark.parametrize("name", ["huge.gif", "huge.webp"])
def test_animations_beyond_any_sensible_size_are_refused_before_memory_is_taken(tmp_path, name, recwarn):
    write_video(tmp_path / "a.gif", clip(3), 8, "gif")
    write_video(tmp_path / "a.webp", clip(3), 8, "webp")
    data = bytearray((tmp_path / ("a" + name[4:])).read_bytes())
    if name.endswith("gif"):
        data[6:10] = struct.pack("<HH", 60000, 60000)
    else:
        data[24:30] = (16382).to_bytes(3, "little") * 2
    (tmp_path / name).write_bytes(data)
    with pytest.raises(VideoLDMError, match=rf"{name} says that its pictures are (60000x60000|16383x16383)"):
        open_video(tmp_path / name)
    assert not recwarn.list


def test_a_gif_whose_frame_is_larger_than_its_canvas_is_refused(tmp_path):
    """Pillow's own limit of pixels."""
    write_video(tmp_path / "a.gif", clip(3), 8, "gif")
    data = (tmp_path / "a.gif").read_bytes()
    at = data.rindex(b"\x2c", 0, data.rindex(b"\x21\xf9") + 20)
    (tmp_path / "b.gif").write_bytes(data[:at + 5] + struct.pack("<HH", 65535, 65535) + data[at + 9:])
    with pytest.raises(VideoLDMError, match="b.gif (has pictures that are too large|cannot be read|says)"):
        open_video(tmp_path / "b.gif")


@pytest.mark.parametrize("width, height", [(0, 16), (16, 0), (20000, 16), (16, 20000)])
@pytest.mark.parametrize("format", ["mp4", "webm", "webp", "gif"])
def test_frames_of_no_size_or_of_twenty_thousand_pixels_are_refused(tmp_path, format, width, height):
    refusal = f"The frames are {width}x{height} pixels; a side of a video has 1 to 16383"
    with pytest.raises(VideoLDMError, match=refusal):
        write_video(tmp_path / f"clip.{format}", [np.zeros((height, width, 3), np.uint8)], 8, format)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("format", ["mp4", "webm", "webp", "gif"])
@pytest.mark.parametrize("width, height", [(1, 1), (16383, 2)])
def test_the_smallest_and_the_longest_frames_are_written(tmp_path, format, width, height):
    path = tmp_path / f"clip.{format}"
    frames = [np.full((height, width, 3), 60 + 60 * k, np.uint8) for k in range(2)]
    write_video(path, frames, 8, format, crf=10)
    images = open_video(path).read()
    assert images.shape[0] == 2 and np.abs(images[:, :height, :width] * 255 - np.array(frames)).max() <= 4


@pytest.mark.parametrize("rate", [float("nan"), float("inf"), 0, -8, 1e-5, None])
def test_a_frame_rate_that_is_no_number_above_0_is_refused(tmp_path, rate):
    with pytest.raises(VideoLDMError, match=r"The frame rate is .* it must be a number above 0"):
        write_video(tmp_path / "clip.mp4", clip(), rate)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("declared, shown", [(1, 255), (2, 235)])
def test_numbers_of_full_range_are_the_pictures_own_and_others_are_stretched(tmp_path, declared, shown):
    with av.open(str(tmp_path / "clip.mp4"), "w", options={}) as container:
        stream = container.add_stream("libx264", rate=8, options={"crf": "1"})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.codec_context.color_range = declared
        for _ in range(2):
            frame = av.VideoFrame.from_ndarray(np.concatenate([np.full((48, 64), 235, np.uint8),
                                                               np.full((24, 64), 128, np.uint8)]), format="yuv420p")
            frame.color_range = declared
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    assert np.abs(open_video(tmp_path / "clip.mp4").read() * 255 - shown).max() <= 1.5
