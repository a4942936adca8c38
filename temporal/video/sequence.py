"""A clip as a folder of PNG files, one for each frame, with 8 or 16 bits per colour."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any
from zlib import crc32

import av
import numpy as np

from .texts import png_text

HEAD = 33           # bytes of a PNG before its second chunk: the signature and the header
FORMATS = {(1, 3): "rgb24", (1, 4): "rgba", (2, 3): "rgb48be", (2, 4): "rgba64be"}      # (bytes, channels) -> FFmpeg's


def frame_name(number: int) -> str:
    """The name of a frame's file. Frames are numbered from 0."""
    return f"frame_{number:05}.png"


def write_frames(folder: Path, frames: Iterable[np.ndarray], metadata: Mapping[str, Any]) -> tuple[int, int, int]:
    """Write each frame to a file in a folder that exists. The first file carries the workflow.

    frames: uint8 or uint16 (h, w, 3 or 4). Returns the number of frames, their width and their height.
    """
    count, height, width = 0, 0, 0
    for frame in frames:
        height, width = frame.shape[:2]
        (folder / frame_name(count)).write_bytes(_png(frame, metadata if not count else {}))
        count += 1
    return count, width, height


def _png(frame: np.ndarray, metadata: Mapping[str, Any]) -> bytes:
    """A PNG file. FFmpeg encodes it, because Pillow has no colour pictures of 16 bits."""
    pixels = FORMATS[frame.dtype.itemsize, frame.shape[2]]
    context = av.CodecContext.create("png", "w")
    context.height, context.width = frame.shape[:2]
    context.pix_fmt, context.thread_count, context.time_base = pixels, 1, 1
    context.options = {"pred": "mixed", "compression_level": "4"}
    picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format=pixels)
    data = b"".join(bytes(packet) for packet in [*context.encode(picture), *context.encode(None)])
    texts = b"".join(_chunk(name, content) for name, content, *_ in png_text(metadata).chunks)
    return data[:HEAD] + texts + data[HEAD:]


def _chunk(name: bytes, content: bytes) -> bytes:
    return len(content).to_bytes(4, "big") + name + content + crc32(name + content).to_bytes(4, "big")
