"""Reading a file once without decoding it: when its frames appear, and whether the file was cut off."""

import io
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import BinaryIO

import av
import numpy as np

from ..errors import VideoLDMError
from .containers import Source, display_name, open_container, picture_stream


@dataclass(frozen=True)
class Scan:
    """The times of a file's frames, from its packets."""

    times: tuple[float, ...]    # seconds at which its frames appear, in order. In a cut file: up to the first gap
    last: float                 # seconds that the last frame stays
    cut_off: bool               # True: the file is shorter than it states


def scan(source: Source, on_packet: Callable[[], None] | None = None) -> Scan:
    """Read every packet of the pictures. `on_packet()` is called for each packet and may raise.

    Raises VideoLDMError for broken time stamps.
    """
    name = display_name(source)
    with open_container(source) as container:
        stream = picture_stream(container, name)
        usual = float(1 / stream.average_rate) if stream.average_rate else 0.0
        packets = _packets(container, stream, on_packet)
        if packets.untimed or not packets.lengths:
            count = packets.untimed + len(packets.lengths)
            times, last, complete = [k * usual for k in range(count)], usual, count
        else:
            stamps = sorted(packets.lengths)
            times = [float(stamp * stream.time_base) for stamp in stamps]
            last = float((packets.lengths[stamps[-1]] or 0) * stream.time_base) or usual
            # Missing frames would be decoded after the last packet. So they are shown later than its decoding time.
            complete = len(times)
            if packets.decoded is not None:
                complete = int(np.searchsorted(stamps, packets.decoded, "right"))
        if not np.isfinite(times).all() or not np.isfinite(last):
            raise VideoLDMError(f"{name} has broken time stamps. Convert it to MP4 in another program.")
        if not _cut_off(source, container, stream, len(times) + packets.hidden, times[-1] + last if times else 0.0):
            return Scan(tuple(times), last, False)
        return Scan(tuple(times[:complete]), last, True)


@dataclass
class _Packets:
    """The packets of the pictures. Times are in the stream's unit."""

    lengths: dict[int, int | None]      # {time at which a frame appears: how long it stays}
    untimed: int = 0                    # number of frames without a time
    hidden: int = 0                     # number of frames in front of the start of a trimmed MP4; they are not shown
    decoded: int | None = None          # the time at which the last packet is decoded


def _packets(container: av.container.InputContainer, stream: av.VideoStream,
             on_packet: Callable[[], None] | None) -> _Packets:
    found = _Packets({})
    for packet in container.demux(stream):
        if on_packet is not None:
            on_packet()
        if not packet.size or packet.is_corrupt:
            continue
        if packet.is_discard:
            found.hidden += 1
        elif packet.pts is None:
            found.untimed += 1
        else:
            found.lengths[packet.pts] = packet.duration
            found.decoded = found.decoded if packet.dts is None else packet.dts
    return found


def _cut_off(source: Source, container: av.container.InputContainer, stream: av.VideoStream, count: int,
             end: float) -> bool:
    """Whether a file is shorter than it states. Some formats do not state their length.

    count: frames found. end: seconds at which the last one ends.
    """
    kind = container.format.name
    if "mov" in kind:
        return stream.frames > count        # the index lists every frame
    if kind == "avi":
        return _riff_is_cut(source)         # its size in bytes is exact; its count of frames is often one too many
    if "matroska" in kind:
        return _ends_early(container, stream, end)
    return False


def _ends_early(container: av.container.InputContainer, stream: av.VideoStream, end: float) -> bool:
    """Whether a Matroska or WebM file ends before the duration that it states."""
    stated = _stated_duration(container, stream)
    if not stated or not stream.average_rate:
        return False
    return end < stated - max(3 / float(stream.average_rate), 0.05 * stated)


def _stated_duration(container: av.container.InputContainer, stream: av.VideoStream) -> float | None:
    """The seconds that a file states for its pictures. None: it does not state them."""
    text = re.fullmatch(r"(\d+):([0-5]?\d):([0-5]?\d(?:\.\d+)?)", stream.metadata.get("DURATION", "").strip("\0 "))
    if text:
        hours, minutes, seconds = text.groups()
        return int(hours) * 3600 + int(minutes) * 60 + float(seconds)
    alone = len(container.streams) == 1     # with several streams the duration is that of the longest
    return container.duration / av.time_base if alone and container.duration else None


def _riff_is_cut(source: Source) -> bool:
    """Whether an outermost chunk of an AVI states more bytes than the file has."""
    if isinstance(source, io.BytesIO):
        return _walk_riff(io.BytesIO(source.getvalue()), len(source.getvalue()))
    with open(source, "rb") as file:
        return _walk_riff(file, os.fstat(file.fileno()).st_size)


def _walk_riff(file: BinaryIO, size: int) -> bool:
    """Whether an outermost chunk reaches beyond `size` bytes."""
    position = 0
    while position + 8 <= size:
        file.seek(position)
        head = file.read(8)
        if head[:4] != b"RIFF":
            return False        # padding after the last chunk
        length = int.from_bytes(head[4:], "little")
        position += 8 + length + length % 2
        if length and position > size + 1:
            return True
        if not length:
            return False        # some recorders never fill in the length
    return False
