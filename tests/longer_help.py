"""What the tests of longer videos share: layers that take known frames, latent frames, and runs of the nodes.

The nodes are Extend Video, Latent Interpolate x4 and Context Frames.
"""

import torch

from video_ldm.nodes.interpolate import LatentInterpolate
from video_ldm.nodes.longer import STOP, ExtendVideo
from video_ldm.tests.attach_help import text
from video_ldm.tests.host import checkpoints
from video_ldm.tests.host.checkpoints import FRAMES

SIZE = (4, 2, 3)        # of a latent frame
RATE = 2.0              # frames a second of the key frames


def write_known_frame_layers(folder):
    """Layers that go on from first frames, and layers that fill in between two frames."""
    checkpoints.write_context_layers(folder / "prediction.safetensors")
    checkpoints.write_interpolation_layers(folder / "between.safetensors")


def frames_of(count, seed=5):
    return torch.randn(count, *SIZE, generator=torch.Generator().manual_seed(seed))


def run_extend(model, **changes):
    """Extend Video with small widgets. `changes` are other values of its inputs."""
    widgets = dict(positive=text(), negative=text(12), frames=FRAMES, width=24, height=16, seed=7, steps=1, cfg=1.0,
                   sampler="euler", scheduler="normal", context_guidance=1.0, overlap=2, on_cancel=STOP)
    return ExtendVideo.execute(model=model, **{**widgets, **changes}).result


def run_interpolate(model, keys, clip_frames=None, **changes):
    """Latent Interpolate x4 on these key frames with small widgets. `changes` are other values of its inputs."""
    latent = {"samples": keys, "frame_rate": RATE} | ({"clip_frames": clip_frames} if clip_frames else {})
    widgets = dict(positive=text(), negative=text(12), latent=latent, seed=7, steps=1, times=1, cfg=1.0,
                   sampler="euler", scheduler="normal", fps=0.0, windows=0)
    return LatentInterpolate.execute(model=model, **{**widgets, **changes}).result
