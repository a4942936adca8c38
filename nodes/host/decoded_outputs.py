"""The two outputs of a node that decodes: IMAGE holds all frames in memory, VIDEO is a stream of them."""

from fractions import Fraction
from typing import Any

import torch

from ...temporal.video import DEFAULT_RATE, as_rate
from . import files, notes, wiring
from .decoding import FrameSource
from .lazy_video import LazyVideo
from .sockets import Audio, Hidden
from .sounds import part_of

IMAGE_SLOT = 0      # number of the IMAGE among the node's outputs


def pictures_and_video(decoding: FrameSource, rate: Any, hidden: Hidden, audio: Audio | None = None) -> tuple:
    """(IMAGE, VIDEO) of a decoding. All frames are decoded at once only if IMAGE is connected.

    Args:
        decoding: makes the frames.
        rate: frames per second.
        hidden: `cls.hidden` of the running node.
        audio: the sound of the VIDEO. It ends with the frames.
    """
    size = decoding.count, decoding.width, decoding.height, rate
    audio = part_of(audio, Fraction(0), decoding.count / as_rate(rate))
    if not wiring.is_used(hidden, IMAGE_SLOT):
        blocked = wiring.blocked_output(f"The IMAGE of {decoding.node} was not connected when it ran. Run it again.")
        return blocked, LazyVideo(decoding.frames, *size, audio=audio)
    images = decode_all(decoding)
    return images, LazyVideo(lambda first, last: iter([images[first:last]]), *size, audio=audio)


def chosen_rate(*rates: Any) -> Any:
    """The first rate that is known, of several frame rates. Where none is, DEFAULT_RATE, with a warning.

    rates: 0 or None is unknown.
    """
    known = next((rate for rate in rates if rate), None)
    if known is None:
        notes.warn(f"Nothing says the frame rate, so {DEFAULT_RATE} frames per second are assumed. Set fps.")
    return known or DEFAULT_RATE


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
