"""What the tests of video files share: clips, how near frames are, and the sentence of a refusal."""

import numpy as np
import pytest

from video_ldm.temporal.errors import VideoLDMError
from video_ldm.temporal.video import open_video


def clip(count=12, height=64, width=96):
    """Smooth colours that differ in every frame."""
    across = np.tile(np.linspace(20, 230, width), (height, 1))
    down = np.tile(np.linspace(230, 30, height)[:, None], (1, width))
    return [np.stack([np.full_like(across, 40 + 180 * k / count), across, down], -1).astype(np.uint8)
            for k in range(count)]


def numbered(count, size=40):
    """Frames that carry their number as ten black or white columns, readable after lossy coding."""
    column = np.arange(size) * 10 // size
    return [np.repeat(np.tile((k >> column & 1) * 200 + 20, (size, 1))[..., None], 3, -1).astype(np.uint8)
            for k in range(count)]


def numbers(images):
    """The numbers that frames from `numbered` carry."""
    size = images.shape[2]
    middles = (np.arange(10) * 2 + 1) * size // 20
    bits = images.mean((1, 3))[:, middles] > 0.5
    return (bits << np.arange(10)).sum(1).tolist()


def psnr(images, frames):
    """Peak signal-to-noise ratio in decibels. `images` are in 0..1, `frames` are bytes."""
    return 10 * np.log10(255**2 / np.mean((images * 255 - np.array(frames))**2))


def refusal(path, **select):
    """The sentence with which a file is refused when it is opened and read, on one line."""
    with pytest.raises(VideoLDMError) as caught:
        video = open_video(path)
        video.read(video.select(**select))
    sentence = str(caught.value)
    assert "\n" not in sentence
    return sentence
