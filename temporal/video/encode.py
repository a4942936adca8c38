"""Encoding frames and their sound into a container of PyAV, one frame at a time."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from fractions import Fraction
from typing import Any

import av
import numpy as np

from ..atomic import StrPath, replace_on_success
from ..errors import VideoLDMError
from .kinds import KINDS, Kind
from .pictures import Encodable, declare_colours
from .sheet import thumbnail
from .sound import Sound, SoundWriter, held_sound
from .texts import metadata_text

Audio = Sound | tuple[np.ndarray, int]      # sound, or its samples (channels, samples) and samples per second
PREVIEW_CRF = 23                            # constant rate factor of a preview; it is small and is looked at once


def even_size(frame: np.ndarray) -> np.ndarray:
    """The frame with even sides, as H.264 and VP9 with 4:2:0 colour need them. The last column or row is repeated."""
    height, width = frame.shape[:2]
    return np.pad(frame, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge") if height % 2 or width % 2 else frame


class VideoWriter:
    """Writes frames and sound in step into an open container."""

    def __init__(self, container: av.container.OutputContainer, format: str, rate: Fraction, crf: int,
                 audio: Audio | None) -> None:
        """Prepare for the first frame.

        Args:
            container: where to write. It has its metadata.
            format: a key of KINDS with a codec.
            rate: frames per second.
            crf: constant rate factor.
            audio: the sound, None for none.
        """
        self.container, self.format, self.rate, self.crf, self.audio = container, format, rate, crf, audio
        self.written, self.padded = 0, False
        self.width = self.height = 0        # pixels, as encoded
        self._sound: SoundWriter | None = None

    def add(self, frame: np.ndarray) -> None:
        """Write the next frame, uint8 or uint16 (h, w, 3 or 4)."""
        even = even_size(frame)
        if not self.written:
            self._begin(even)
            self.padded = even.shape != frame.shape
        self.container.mux(self._stream.encode(self._encodable.frame(even)))
        self.written += 1
        if self._sound is not None:
            self._sound.until(self.written)

    def finish(self) -> None:
        """Write what the encoders still hold."""
        self.container.mux(self._stream.encode(None))
        if self._sound is not None:
            self._sound.finish()

    def _begin(self, frame: np.ndarray) -> None:
        kind = KINDS[self.format]
        self.height, self.width = frame.shape[:2]
        self._stream = picture_stream(self.container, self.format, self.rate, self.crf, frame)
        self._encodable = Encodable(self._stream.pix_fmt, kind.matrix)
        if self.audio is not None:
            sound = self.audio if isinstance(self.audio, Sound) else held_sound(*self.audio)
            self._sound = SoundWriter(self.container, kind.sound, sound, self.rate)


def picture_stream(container: av.container.OutputContainer, format: str, rate: Fraction, crf: int,
                   frame: np.ndarray) -> av.VideoStream:
    """Add a stream for frames like `frame` to a container.

    Args:
        container: where to write.
        format: a key of KINDS with a codec.
        rate: frames per second.
        crf: constant rate factor.
        frame: the first frame, with even sides. If it has alpha, alpha is encoded.
    """
    kind, alpha = KINDS[format], frame.shape[2] == 4
    pixels = kind.alpha_pixels if alpha else kind.pixels
    _refuse_missing_encoder(format, kind, pixels)
    stream = container.add_stream(kind.codec, rate=rate)
    stream.height, stream.width = frame.shape[:2]
    stream.pix_fmt = pixels
    stream.bit_rate = 0
    stream.options = kind.options(crf) | (dict(kind.alpha_options) if alpha else {})
    declare_colours(stream.codec_context, kind.matrix)
    return stream


def open_output(path: StrPath, format: str, metadata: Mapping[str, Any]) -> av.container.OutputContainer:
    """A container to write to, with the workflow in its metadata."""
    kind = KINDS[format]
    # faststart writes the index of an MP4 to its front, so browsers start to play at once. ComfyUI's page reads only
    # the beginning of a dropped file, and finds the workflow there.
    options = {"movflags": "use_metadata_tags+faststart"} if kind.container in ("mp4", "mov") else {}
    container = av.open(str(path), mode="w", format=kind.container, options=options)
    for key, text in metadata_text(metadata).items():
        container.metadata[key] = _plain_braces(text) if kind.container == "webm" else text
    return container


@contextmanager
def preview_video(path: StrPath, rate: Fraction, audio: Audio | None = None) -> Iterator[VideoWriter]:
    """Write a small MP4 beside a file that pages cannot play. `add` every frame to what this yields.

    The preview appears when the block ends without an error. A page plays it in the file's place.
    """
    with replace_on_success(path) as temporary, open_output(temporary, "mp4", {}) as container:
        writer = _PreviewWriter(container, "mp4", rate, PREVIEW_CRF, audio)
        yield writer
        writer.finish()


class _PreviewWriter(VideoWriter):
    """Reduces frames first, and shows transparency as a chequered ground."""

    def add(self, frame: np.ndarray) -> None:
        super().add(thumbnail(frame))


def _refuse_missing_encoder(format: str, kind: Kind, pixels: str) -> None:
    try:
        codec = av.codec.Codec(kind.codec, "w")
    except av.codec.codec.UnknownCodecError as error:
        raise VideoLDMError(f"'{format}' needs the encoder {kind.codec}, which this version of PyAV ({av.__version__}) "
                            "does not have. Update the Python package av, or choose another format.") from error
    known = [entry.name for entry in codec.video_formats or []]
    if known and pixels not in known:
        raise VideoLDMError(f"'{format}' needs {pixels}, which the encoder {kind.codec} of this version of PyAV "
                            f"({av.__version__}) does not write. Update the Python package av, or choose another "
                            "format.")


def _plain_braces(text: str) -> str:
    """JSON with escaped braces inside its strings.

    ComfyUI's page finds the end of WebM metadata by counting braces. A brace in a prompt's text would end it early.
    """
    pieces = json.JSONEncoder().iterencode(json.loads(text)) if text[:1] in "{[" else [text]
    return "".join(piece.replace("{", "\\u007b").replace("}", "\\u007d") if piece.startswith('"') else piece
                   for piece in pieces)
