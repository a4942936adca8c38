"""Go through a file once, without decoding: when its frames appear, and whether it was cut off."""

import io
import os
import re
from collections.abc import Callable
from dataclasses import dataclass

import av
import numpy as np

from ..errors import VideoLDMError
from .containers import display_name, open_container, picture_stream


@dataclass(frozen=True)
class Scan:
    """What the packets of a file say."""

    times: tuple        # seconds at which its frames appear, in order; of a cut file those before the first gap
    last: float         # how long the last one stays, seconds
    cut_off: bool       # the file is shorter than it says


def scan(source: object, on_packet: Callable[[], None] | None = None) -> Scan:
    """Look at every packet of the pictures; `on_packet()` is called for each, and may raise."""
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
            # A frame that is missing would have been decoded, and shown, after the last one that is there.
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
    lengths: dict               # how long a frame stays, by the time at which it appears, in the stream's unit
    untimed: int = 0            # frames without a time
    hidden: int = 0             # frames before the start of a trimmed MP4: in the file, not in the video
    decoded: int | None = None  # when the last packet is decoded


def _packets(container, stream, on_packet):
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


def _cut_off(source, container, stream, count, end):
    """Whether a file is shorter than it says. Kinds of files say it in different ways, and some not at all."""
    kind = container.format.name
    if "mov" in kind:
        return stream.frames > count        # an index of every frame
    if kind == "avi":
        return _riff_is_cut(source)         # its count of frames is often one too many, its size in bytes is exact
    if "matroska" in kind:
        return _ends_early(container, stream, end)
    return False


def _ends_early(container, stream, end):
    """A Matroska or WebM file states how long it lasts, which a cut file does not reach."""
    stated = _stated_duration(container, stream)
    if not stated or not stream.average_rate:
        return False
    return end < stated - max(3 / float(stream.average_rate), 0.05 * stated)


def _stated_duration(container, stream):
    text = re.fullmatch(r"(\d+):([0-5]?\d):([0-5]?\d(?:\.\d+)?)", stream.metadata.get("DURATION", "").strip("\0 "))
    if text:
        hours, minutes, seconds = text.groups()
        return int(hours) * 3600 + int(minutes) * 60 + float(seconds)
    alone = len(container.streams) == 1     # otherwise the longest of the streams
    return container.duration / av.time_base if alone and container.duration else None


def _riff_is_cut(source):
    """Whether one of an AVI's outermost chunks says that it is longer than the file."""
    if isinstance(source, io.BytesIO):
        return _walk_riff(io.BytesIO(source.getvalue()), len(source.getvalue()))
    with open(source, "rb") as file:
        return _walk_riff(file, os.fstat(file.fileno()).st_size)


def _walk_riff(file, size):
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
            return False        # a recorder that never filled it in
    return False
