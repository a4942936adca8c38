"""What reading changes in a file's pictures, or leaves as it is where players change it, as words for a report."""

import av

from .pictures import Pictures

# FFmpeg's numbers
HDR_CURVES = {16: "PQ", 18: "HLG"}
BT2020 = 9
TRANSPARENCY = "its transparency was left out"


def picture_remarks(pictures: Pictures, frame: av.VideoFrame, stream: av.VideoStream) -> list[str]:
    """Remarks on the pictures of a file, from its first frame.

    Args:
        pictures: converts the file's frames.
        frame: the first frame.
        stream: the file's pictures. It has decoded the frame.
    """
    found = []
    turn = pictures.orientation.words()
    if turn:
        found.append(f"its pictures were {turn}, as the file says")
    if pictures.stretched:
        found.append(f"its pixels are not square: {frame.width}x{frame.height} became {pictures.square_width}x"
                     f"{frame.height}")
    found += _colour_remarks(stream.codec_context)
    parts = frame.format.components
    deepest = max((part.bits for part in parts), default=8)
    if deepest > 8:
        found.append(f"its {deepest} bits per colour became 8")
    if any(part.is_alpha for part in parts) or stream.metadata.get("alpha_mode") == "1":
        found.append(TRANSPARENCY)
    return found


def _colour_remarks(context: av.VideoCodecContext) -> list[str]:
    curve = HDR_CURVES.get(context.color_trc)
    if curve is not None:
        return [f"it is HDR ({curve}), and its colours were read as they are: they look pale. Convert it to SDR "
                "(BT.709) in another program for its true colours"]
    if context.color_primaries == BT2020:
        return ["its colours are those of BT.2020 and were read as they are: they look a little pale. Convert it to "
                "BT.709 in another program for its true colours"]
    return []


def interlaced_remark(interlaced: int, frames: int, deinterlaced: bool) -> str:
    """The remark on interlaced frames among those that were read. Empty if there are none."""
    if not interlaced:
        return ""
    which = "its frames are" if interlaced == frames else f"{interlaced} of these {frames} frames are"
    if deinterlaced:
        return f"{which} interlaced and were deinterlaced"
    return f"{which} interlaced and were read as they are: what moves has combs. Switch deinterlace on"
