"""A VIDEO that is a file of which every frame was read, unchanged."""

from fractions import Fraction
from typing import Any

import torch

from .api import InputImpl, Types
from .sockets import Audio


class FileVideo(InputImpl.VideoFromFile):
    """A VIDEO that is a whole file. Saving it copies the file. Its frames and its sound are in memory already.

    Core's class would decode the file once more, with other colours, and it cannot read the sound of some files.
    """

    def __init__(self, file: Any, images: torch.Tensor, rate: Fraction, audio: Audio | None) -> None:
        super().__init__(file)
        self._components = Types.VideoComponents(images=images, audio=audio, frame_rate=rate)

    def get_components(self) -> Any:
        return self._components
