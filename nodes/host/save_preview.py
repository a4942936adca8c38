"""The small video that the page plays in place of a saved file that pages cannot play."""

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from fractions import Fraction
from types import TracebackType

import comfy.model_management
import numpy as np

from ...temporal.video import Sound, preview_video
from ...temporal.video.encode import VideoWriter
from . import files


class SavePreview:
    """Writes the preview while the file is written. Its first error is logged and ends it, and the file is saved.

    Cancel goes on to the caller.
    """

    def __init__(self, rate: Fraction, sound: Sound | None) -> None:
        """rate: frames per second. sound: that of the file."""
        self.target: files.Target | None = None         # where it is. None: there is none
        self._player: VideoWriter | None = None
        self._open = ExitStack()
        with self._tolerant():
            target = files.temporary_target()
            self._player = self._open.enter_context(preview_video(target.path(".mp4"), rate, sound))
            self.target = target

    def __enter__(self) -> "SavePreview":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        if error is not None:
            self._drop(error)
            return
        with self._tolerant():
            self._open.close()

    def add(self, frame: np.ndarray) -> None:
        if self._player is not None:
            with self._tolerant():
                self._player.add(frame)

    @contextmanager
    def _tolerant(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:      # a full disk, a missing encoder
            self._drop(error)
            if isinstance(error, comfy.model_management.InterruptProcessingException):
                raise
            logging.warning("[Video LDM] Save Video File cannot show its file in the node: %s", error)

    def _drop(self, error: BaseException) -> None:
        """Leave nothing of the preview."""
        self.target = self._player = None
        with suppress(Exception):       # the first error is the one that is told
            self._open.__exit__(type(error), error, error.__traceback__)
