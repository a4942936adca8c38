"""The two outputs of a node that decodes: IMAGE holds all frames in memory, VIDEO is a stream of them."""

from typing import Any

import torch

from . import files, wiring
from .decoding import FrameSource
from .lazy_video import LazyVideo
from .sockets import Hidden

IMAGE_SLOT = 0      # number of the IMAGE among the node's outputs


def pictures_and_video(decoding: FrameSource, rate: Any, hidden: Hidden) -> tuple:
    """(IMAGE, VIDEO) of a decoding. All frames are decoded at once only if IMAGE is connected.

    Args:
        decoding: makes the frames.
        rate: frames per second.
        hidden: `cls.hidden` of the running node.
    """
    size = decoding.count, decoding.width, decoding.height, rate
    if not wiring.is_used(hidden, IMAGE_SLOT):
        blocked = wiring.blocked_output(f"The IMAGE of {decoding.node} was not connected when it ran. Run it again.")
        return blocked, LazyVideo(decoding.frames, *size)
    images = decode_all(decoding)
    return images, LazyVideo(lambda first, last: iter([images[first:last]]), *size)


def decode_all(decoding: FrameSource) -> torch.Tensor:
    """Every frame as one IMAGE, with progress."""
    files.refuse_beyond_memory(
        decoding.count * decoding.width * decoding.height * 12,
        f"{decoding.count} frames of {decoding.width}x{decoding.height}",
        "Connect only the VIDEO output, which streams to a file, or decode fewer frames.")
    images, done, pieces = None, 0, 0
    step = files.progress(decoding.steps())

    def on_piece() -> None:
        nonlocal pieces
        pieces += 1
        step(min(pieces, decoding.steps()))
    for piece in decoding.frames(on_piece=on_piece):
        if images is None:
            images = piece.new_empty(decoding.count, *piece.shape[1:])
        images[done:done + len(piece)] = piece
        done += len(piece)
    return images
