"""The class by which the pack knows its own VIDEOs that make their frames one by one."""

from collections.abc import Iterator

import numpy as np

from .api import Input
from .sockets import Audio


class StreamedVideo(Input.Video):
    """A VIDEO of the pack. Save Video File writes it frame by frame; of other packs' classes it asks all at once.

    Other packs may give methods of these names another meaning, so no VIDEO is known by its methods.
    """

    def iterate_frames(self, broken: list[int] | None = None, bits: int = 8) -> Iterator[np.ndarray]:
        """Frames as uint8 or uint16 (h w 3), in order.

        broken: a list to which the numbers of frames with NaN are added. bits: 8 or 16.
        """
        raise NotImplementedError

    def get_audio(self) -> Audio | None:
        """ComfyUI's AUDIO. None if there is no sound."""
        return None
