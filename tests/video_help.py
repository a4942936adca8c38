"""What the tests of video files share: clips, how near frames are, and the sentence of a refusal."""

from fractions import Fraction
from io import BytesIO
from pathlib import Path

import av
import numpy as np
import pytest
from av.video.reformatter import VideoReformatter

from video_ldm.temporal.errors import VideoLDMError
from video_ldm.temporal.video import open_video


def clip(count=12, height=64, width=96):
    """Smooth colours that differ in every frame."""
    across = np.tile(np.linspace(20, 230, width), (height, 1))
    down = np.tile(np.linspace(230, 30, height)[:, None], (1, width))
    return [np.stack([np.full_like(across, 40 + 180 * k / count), across, down], -1).astype(np.uint8)
            for k in range(count)]


def numbered(count, size=40):
    """Frames that carry their number as ten black or white columns, readable after lossy coding."""
    column = np.arange(size) * 10 // size
    return [np.repeat(np.tile((k >> column & 1) * 200 + 20, (size, 1))[..., None], 3, -1).astype(np.uint8)
            for k in range(count)]


def numbers(images):
    """The numbers that frames from `numbered` carry."""
    size = images.shape[2]
    middles = (np.arange(10) * 2 + 1) * size // 20
    bits = images.mean((1, 3))[:, middles] > 0.5
    return (bits << np.arange(10)).sum(1).tolist()


def psnr(images, frames):
    """Peak signal-to-noise ratio in decibels. `images` are in 0..1, `frames` are bytes."""
    return 10 * np.log10(255**2 / np.mean((images * 255 - np.array(frames))**2))


def refusal(path, **select):
    """The sentence with which a file is refused when it is opened and read, on one line."""
    with pytest.raises(VideoLDMError) as caught:
        video = open_video(path)
        video.read(video.select(**select))
    sentence = str(caught.value)
    assert "\n" not in sentence
    return sentence


def ramp(count=4, height=64, width=96, bits=16, alpha=False):
    """Smooth colours with steps far below one of 8 bits. Alpha falls from right to left and from bottom to top."""
    across = np.tile(np.linspace(0.3, 0.6, width), (height, 1))
    down = np.tile(np.linspace(0.6, 0.35, height)[:, None], (1, width))
    frames = []
    for k in range(count):
        channels = [np.full_like(across, 0.4 + 0.1 * k / count), across, down]
        channels += [np.clip(2 * across - down + 0.1, 0, 1)] if alpha else []
        whole = np.round(np.stack(channels, -1) * (2**bits - 1))
        frames.append(whole.astype(np.uint8 if bits == 8 else np.uint16))
    return frames


def decoded(path, decoder=None):
    """All frames of a video file as RGBA in 0..1, decoded with 16 bits. The file's declared colours are used.

    decoder: FFmpeg's name of one, where its usual decoder drops transparency.
    """
    exact = 4 | 0x40000 | 0x2000 | 0x4000
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        context = av.CodecContext.create(decoder, "r") if decoder else stream.codec_context
        frames = [frame for packet in container.demux(stream)
                  for frame in context.decode(packet if packet.size else None)]
        return np.array([VideoReformatter().reformat(
            frame, format="rgba64le", src_colorspace=frame.colorspace, dst_colorspace=5,
            src_color_range=frame.color_range, dst_color_range=2, interpolation=exact).to_ndarray()
            for frame in frames]) / 65535


def write_exact(path, codec, wave, layout, rate=44100, fps=Fraction(30000, 1001), frames=90):
    """Numbered frames with sound that begins with them and is stored bit for bit."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=fps)
        stream.width = stream.height = 40
        stream.pix_fmt, stream.bit_rate = "yuv420p", 4_000_000
        sound = container.add_stream(codec, rate=rate, layout=layout)
        for frame in numbered(frames):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
        for at in range(0, wave.shape[1], 1024):
            part = np.ascontiguousarray(wave[:, at:at + 1024].T).reshape(1, -1)
            piece = av.AudioFrame.from_ndarray(part, format="s16", layout=layout)
            piece.sample_rate, piece.pts, piece.time_base = rate, at, Fraction(1, rate)
            container.mux(sound.encode(piece))
        container.mux(sound.encode(None))


def counting(channels, samples):
    """Sound in which every sample differs from its neighbours, and every channel from the others."""
    return np.random.default_rng(channels).integers(-30000, 30000, (channels, samples), np.int16)


def write_two_sizes(path):
    """Raw MPEG-2: ten frames of 64x64, and after them ten of 96x96."""
    parts = []
    for size in (64, 96):
        part = BytesIO()
        with av.open(part, "w", format="mpeg2video") as container:
            stream = container.add_stream("mpeg2video", rate=25)
            stream.width = stream.height = size
            stream.pix_fmt = "yuv420p"
            for frame in clip(10, size, size):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            container.mux(stream.encode(None))
        parts.append(part.getvalue())
    Path(path).write_bytes(b"".join(parts))
