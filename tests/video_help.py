"""Clips whose frames are told apart, shared by the tests of video files."""

import numpy as np


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
    size = images.shape[2]
    middles = (np.arange(10) * 2 + 1) * size // 20
    bits = images.mean((1, 3))[:, middles] > 0.5
    return (bits << np.arange(10)).sum(1).tolist()


def psnr(images, frames):
    return 10 * np.log10(255**2 / np.mean((images * 255 - np.array(frames))**2))
