"""Deinterlacing: from two half pictures of different moments to one whole picture, with FFmpeg's bwdif.

An interlaced frame holds the odd lines of one moment and the even lines of the next. Where something moves, the lines
stand apart like the teeth of a comb.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from fractions import Fraction
from typing import Any

import av
from av.filter import Graph, filters_available

from ..errors import VideoLDMError

FILTER = "bwdif"
UNSTATED = 2, 0         # FFmpeg's numbers of an unknown colour matrix and an unknown range
Numbered = tuple[int, av.VideoFrame]        # a frame with its number in the file


def deinterlaced(frames: Iterable[Numbered], name: str) -> Iterator[Numbered]:
    """Yield the frames, as many as before. Those marked as interlaced are deinterlaced, the others stay bit for bit.

    The filter looks at the frame before and after each.

    frames: decoded, in order, each with its number. name: of the file, for messages.
    """
    if FILTER not in filters_available:
        raise VideoLDMError(f"{name} cannot be deinterlaced: this version of PyAV ({av.__version__}) has no filter "
                            f"{FILTER}. Update the Python package av, or switch deinterlace off.")
    graph, waiting = None, deque[Numbered]()
    other: Numbered | None = None
    for number, frame in frames:
        size = frame.width, frame.height, frame.format.name
        if graph is None:
            graph, first = _graph(frame), size
        if size != first:       # The filter takes one size. The caller refuses this frame.
            other = number, frame
            break
        waiting.append((number, frame))
        _push(graph, number, frame)
        yield from _ready(graph, waiting)
    if graph is not None:
        graph.push(None)
        yield from _ready(graph, waiting)
    if other is not None:
        yield other


def _graph(frame: av.VideoFrame) -> Graph:
    graph = Graph()
    source = graph.add_buffer(width=frame.width, height=frame.height, format=frame.format, time_base=Fraction(1))
    filtering = graph.add(FILTER, "mode=send_frame:deint=interlaced")
    sink = graph.add("buffersink")
    source.link_to(filtering)
    filtering.link_to(sink)
    graph.configure()
    return graph


def _push(graph: Graph, number: int, frame: av.VideoFrame) -> None:
    """Give a frame to the filter, without the tags of its colours.

    The filter takes planes of one colour each, and FFmpeg converts other formats (uyvy422, nv12, rgb24) in front of it.
    With tags it would convert the colours too.
    """
    tags = frame.colorspace, frame.color_range
    frame.colorspace, frame.color_range = UNSTATED
    frame.pts, frame.time_base = number, Fraction(1)
    graph.push(frame)
    frame.colorspace, frame.color_range = tags


def _ready(graph: Graph, waiting: deque[Numbered]) -> Iterator[Numbered]:
    """Yield the frames that the filter has finished. A frame that is not interlaced comes out as it went in."""
    while waiting:
        try:
            filtered: Any = graph.pull()        # a frame of pictures: the graph has no sound
        except (av.error.BlockingIOError, av.error.EOFError):
            return
        number, frame = waiting.popleft()
        if not frame.interlaced_frame:
            yield number, frame
            continue
        filtered.colorspace, filtered.color_range = frame.colorspace, frame.color_range
        yield number, filtered
