"""Opening one video file with PyAV. Files that it refers to are not opened. Errors of FFmpeg become sentences."""

import io
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import av

from ..errors import VideoLDMError

Source = str | os.PathLike[str] | io.BytesIO        # a video file, on disk or in memory

# FFmpeg's demuxers that read one file each. Playlists, manifests and lists (hls, dash, concat, imf) are left out,
# because they open the files that they name. Devices, networks and still images are left out too.
ONE_FILE_FORMATS = ("mov", "matroska", "avi", "mpegts", "mpeg", "mpegvideo", "flv", "asf", "ogg", "mxf", "nut", "rm",
                    "wtv", "dv", "ivf", "obu", "av1", "h264", "hevc", "vvc", "m4v", "vc1", "mjpeg", "yuv4mpegpipe",
                    "gif", "apng")
LARGEST_PICTURE = 2**26         # pixels: 8192 x 8192. Only damaged headers state more
# The first bytes of playlists and of still images
PLAYLISTS = (b"#EXTM3U", b"ffconcat", b"v=0", b"<MPD", b"[playlist]", b"<smil", b"[Reference]")
PICTURES = (b"\x89PNG", b"\xff\xd8\xff", b"BM", b"II*\0", b"MM\0*", b"RIFF")


def display_name(source: Source) -> str:
    """The name of a source in sentences: the file's name, or "The video" for a video in memory."""
    return "The video" if isinstance(source, io.BytesIO) else Path(source).name


def refuse_unreadable(path: Path) -> None:
    """Raise VideoLDMError for anything but a regular file with content. Opening a pipe would hang."""
    try:
        status = path.stat()
    except (OSError, ValueError) as error:
        raise VideoLDMError(f"There is no file {_short(path.name)} in {_short(str(path.parent))}.") from error
    if not stat.S_ISREG(status.st_mode):
        kind = "a folder" if stat.S_ISDIR(status.st_mode) else "a pipe, a device or another special file"
        raise VideoLDMError(f"{path.name} is {kind} and not a video file. Choose a file.")
    if status.st_size == 0:
        raise VideoLDMError(f"{path.name} is empty (0 bytes): its upload or download failed. Get it again.")


@contextmanager
def open_container(source: Source) -> Iterator[av.container.InputContainer]:
    """Open a path or BytesIO as a PyAV container. Every FFmpeg error inside the block becomes a VideoLDMError."""
    name = display_name(source)
    file: str | io.BytesIO
    if isinstance(source, io.BytesIO):
        # A reader of its own: pictures and sound are read at the same time, each at its place in the file.
        file, protocols = io.BytesIO(source.getvalue()), "none"
    else:
        file, protocols = f"file:{Path(source).absolute()}", "file"
    options = {"format_whitelist": ",".join(ONE_FILE_FORMATS), "protocol_whitelist": protocols}
    try:
        with av.open(file, mode="r", options=options, metadata_errors="replace") as container:
            yield container
    except av.FFmpegError as error:
        raise VideoLDMError(_reason(source, name, error.strerror)) from error


def picture_stream(container: av.container.InputContainer, name: str) -> av.VideoStream:
    """The first video stream that is not a cover picture. Raises VideoLDMError if there is none."""
    for stream in container.streams.video:
        if not stream.disposition & av.stream.Disposition.attached_pic:
            _refuse_undecodable(stream, name)
            stream.thread_type = "AUTO"
            stream.codec_context.options = {"max_pixels": str(LARGEST_PICTURE)}
            return stream
    kind = "sound" if container.streams.audio else "neither pictures nor sound"
    raise VideoLDMError(f"{name} has {kind} but no video in it. Choose a file with pictures.")


def sound_stream(container: av.container.InputContainer) -> av.AudioStream | None:
    """The first sound stream that can be decoded and written. None: there is none.

    FFmpeg can mix streams of more than eight channels only if they name their loudspeakers.
    """
    for stream in container.streams.audio:
        if stream.codec_context is not None and stream.rate:
            layout = stream.codec_context.layout
            if layout.nb_channels and (layout.nb_channels <= 8 or not unnamed(layout)):
                return stream
    return None


def unnamed(layout: av.AudioLayout) -> bool:
    """Whether the file does not name the loudspeakers of the channels."""
    return layout.name.endswith("channels") or layout.name.startswith("ambisonic")


def refuse_huge(name: str, width: int, height: int) -> None:
    """Raise VideoLDMError for a picture size that no intact file has, before memory is allocated for it."""
    if width < 1 or height < 1 or width * height > LARGEST_PICTURE:
        raise VideoLDMError(f"{name} says that its pictures are {width}x{height}; {LARGEST_PICTURE // 2**20} million "
                            "pixels (8192x8192) is the most that is read. It is damaged, or has to be scaled down "
                            "in another program first.")


def _refuse_undecodable(stream: av.VideoStream, name: str) -> None:
    if stream.codec_context is None:
        raise VideoLDMError(f"The pictures of {name} are in a code that this FFmpeg cannot decode. Convert it to MP4 "
                            "with H.264.")
    if stream.codec_context.width or stream.codec_context.height:
        refuse_huge(name, stream.codec_context.width, stream.codec_context.height)


def _reason(source: Source, name: str, strerror: str) -> str:
    """The sentence for a file that FFmpeg cannot read. Its first bytes tell what it is instead."""
    head = _head(source)
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n")
    if text.startswith(PLAYLISTS) or b"<MPD" in head:
        return (f"{name} is a playlist: it only names other files, and those are not opened. Choose the video file "
                "itself.")
    if head.startswith(PICTURES) and head[8:11] != b"AVI":
        return f"{name} is not a video but a picture. Pictures are read by the node Load Image."
    if isinstance(source, io.BytesIO):
        reason = "it is damaged, cut off or not a video"
    elif head[4:8] == b"ftyp":
        reason = "it is damaged or was cut off, as a video whose upload or download did not finish"
    elif text[:1] == b"<":
        reason = "it is a web page or an XML document saved under this name"
    else:
        reason = "it is damaged or not a video"
    return (f"{name} cannot be read as a video: {reason}. Get the file again, or convert it to MP4. "
            f"(FFmpeg says: {strerror})")


def _head(source: Source) -> bytes:
    if isinstance(source, io.BytesIO):
        return source.getvalue()[:512]
    with open(source, "rb") as file:
        return file.read(512)


def _short(text: str) -> str:
    return text if len(text) <= 200 else f"{text[:80]}... ({len(text)} characters)"
