"""Where a camera stands and looks in each frame, and the rays through its pixels (docs/papers.md#cameractrl).

Axes are those of the published pose files: x to the right, y down, z ahead. A pose is a matrix `4 4` from the camera's
axes to those of the scene.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

RATIO = 16 / 9          # width by height of the videos whose lenses the pose files state


@dataclass(frozen=True)
class Cameras:
    """The cameras of some frames."""

    poses: Tensor       # `t 4 4`, float64
    # `t 4`, float64: focal lengths along x and y and the middle's x and y, as shares of a picture of 16:9
    lenses: Tensor

    @property
    def relative(self) -> Tensor:
        """The poses as the first of these frames sees them, `t 4 4`. So the first one is the identity."""
        return torch.linalg.inv(self.poses[0]) @ self.poses


class CameraPath(Protocol):
    """A camera that moves along a video."""

    def cameras(self, numbers: Sequence[int], length: int) -> Cameras:
        """The cameras of the frames with these numbers. length: frames of the video."""

    def check(self, length: int) -> str:
        """A warning for a video of this length, or "". Raises VideoLDMError where the path does not fit it."""


def lens_in_pixels(lenses: Tensor, height: int, width: int) -> Tensor:
    """Lenses `t 4` for a picture of this size. It is cut out of the middle of one of 16:9."""
    whole = torch.tensor([max(width, height * RATIO), max(height, width / RATIO), width, height], dtype=lenses.dtype)
    return lenses * whole


def rays(cameras: Cameras, height: int, width: int) -> Tensor:
    """Pluecker coordinates of the ray through the middle of each pixel, `t 6 h w`, float32.

    They are `[o x d, d]`, with the camera's place o and the direction d of length 1, as the first frame sees them.
    """
    lenses = lens_in_pixels(cameras.lenses, height, width)
    frames = zip(cameras.relative, lenses, strict=True)
    return torch.stack([rays_of_frame(pose, lens, height, width) for pose, lens in frames])    # one by one for memory


def rays_of_frame(pose: Tensor, lens: Tensor, height: int, width: int) -> Tensor:
    """The same for one camera, `6 h w`. pose: `4 4`, as the first frame sees it. lens: in pixels."""
    fx, fy, cx, cy = lens
    x = (torch.arange(width, dtype=torch.float64) + 0.5 - cx) / fx
    y = (torch.arange(height, dtype=torch.float64) + 0.5 - cy) / fy
    seen = torch.stack([x.expand(height, width), y[:, None].expand(height, width), x.new_ones(height, width)], dim=-1)
    directions = (seen / seen.norm(dim=-1, keepdim=True)) @ pose[:3, :3].T
    moments = torch.linalg.cross(pose[:3, 3].expand_as(directions), directions, dim=-1)
    return torch.cat([moments, directions], dim=-1).movedim(-1, 0).float()
