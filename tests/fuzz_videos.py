"""Damaged video files: seeded variants of small whole ones that are written here."""

import struct
from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np

from video_ldm.temporal.video import write_video
from video_ldm.tests.video_help import clip

RATE = 16000
NUMBERS = (0, 1, 0x7F, 0xFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 0x80000000)


def whole_files(folder: Path) -> list[Path]:
    """One small file of each kind, some with sound."""
    tone = np.sin(np.arange(RATE * 3 // 2) / 9).astype(np.float32)[None] * 0.5
    paths = []
    for name, format in (("a.mp4", "mp4"), ("a.webm", "webm"), ("a.gif", "gif"), ("a.webp", "webp")):
        write_video(folder / name, clip(12, 32, 48), 8, format, crf=20,
                    metadata={"prompt": {"1": {"class_type": "X"}}},
                    audio=(tone, RATE) if format in ("mp4", "webm") else None)
        paths.append(folder / name)
    for name, codec, sound in (("a.mkv", "libx264", "flac"), ("a.avi", "mpeg4", "mp2"), ("a.ts", "mpeg2video", "mp2"),
                               ("a.mov", "mjpeg", "pcm_s16le"), ("a.mpg", "mpeg2video", "mp2")):
        _write(folder / name, codec, sound, tone)
        paths.append(folder / name)
    return paths


def damaged(data: bytes, seed: int, variants: int) -> Iterator[tuple[str, bytes]]:
    """(what was done, damaged bytes), the same for the same seed."""
    kinds = (_flips, _cut, _zeros, _swapped, _header_number, _header_flips, _repeated, _random_tail)
    for number in range(variants):
        rng = np.random.default_rng((seed, number))
        kind = kinds[number % len(kinds)]
        yield f"{kind.__name__.strip('_')} {seed}.{number}", kind(bytearray(data), rng)


def _flips(data, rng):
    """Bits anywhere."""
    for at in rng.integers(0, len(data), rng.integers(1, 40)):
        data[at] ^= 1 << rng.integers(8)
    return bytes(data)


def _cut(data, rng):
    """A download that stopped."""
    return bytes(data[:rng.integers(1, len(data))])


def _zeros(data, rng):
    """A block that was never written."""
    start = rng.integers(0, len(data))
    length = min(int(rng.integers(1, max(2, len(data) // 4))), len(data) - start)
    data[start:start + length] = bytes(length)
    return bytes(data)


def _swapped(data, rng):
    """Two blocks exchanged."""
    size = max(1, len(data) // 16)
    first, second = sorted(rng.integers(0, 15, 2) * size)
    data[first:first + size], data[second:second + size] = data[second:second + size], data[first:first + size]
    return bytes(data)


def _header_number(data, rng):
    """A field of the header that says something absurd."""
    at = int(rng.integers(0, min(len(data) - 4, 800)))
    data[at:at + 4] = struct.pack(rng.choice(("<I", ">I")), int(rng.choice(NUMBERS)))
    return bytes(data)


def _header_flips(data, rng):
    """Bits at the beginning, where the structure is."""
    for at in rng.integers(0, min(len(data), 800), rng.integers(1, 10)):
        data[at] ^= 1 << rng.integers(8)
    return bytes(data)


def _repeated(data, rng):
    """A block that comes twice."""
    start = int(rng.integers(0, len(data)))
    return bytes(data[:start] + data[max(0, start - 500):start] + data[start:])


def _random_tail(data, rng):
    """Something else after a good beginning."""
    keep = int(rng.integers(1, len(data)))
    return bytes(data[:keep]) + rng.bytes(len(data) - keep)


def _write(path, codec, sound_codec, tone):
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25 if codec == "mpeg2video" else 8)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuvj420p" if codec == "mjpeg" else "yuv420p"
        sound = container.add_stream(sound_codec, rate=RATE, layout="mono")
        for frame in clip(12, 32, 48):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
        frame = av.AudioFrame.from_ndarray(tone, format="flt", layout="mono")
        frame.sample_rate = RATE
        for packet in [*sound.encode(frame), *sound.encode(None)]:
            if packet.size:
                container.mux(packet)
