"""The noise of clips as core's NOISE: an object with `seed` and `generate_noise(latent)`.

A frame's own noise is KSampler's for the same seed, drawn on the processor. The other kinds are made from it.
"""

from dataclasses import dataclass

import comfy.sample
import torch
from torch import Tensor

from ...temporal.errors import VideoLDMError
from ...temporal.noise import free_noise_order, mixed_noise, repeated_order
from .latents import check_frames, refuse_planes
from .options import clip_options
from .sockets import Latent, Model
from .windows import HANDLER, FrameWindows

OWN, SHARED, MIXED = "own for each frame", "one for all frames", "mixed"
FREE_NOISE, REPEATED = "FreeNoise", "repeated in each window"
FRAME_NOISE = "Frame Noise"         # the node whose widgets may set a window
KINDS = (OWN, SHARED, MIXED, FREE_NOISE, REPEATED)
OF_WINDOWS = (FREE_NOISE, REPEATED)
SEEDS = 2 ** 64                     # how many there are
SHARED_SEED = 0x5DEECE66D1234567    # the seed of the shared noise is the seed XOR this, far from what others take


@dataclass(frozen=True)
class FrameNoise:
    """Core's NOISE for clips."""

    seed: int
    kind: str = OWN                 # one of KINDS
    mix: float = 1.0                # for MIXED: how much the frames share, as in temporal.noise.mix_weights
    frames: int = 0                 # frames of a clip; 0: the whole latent is one clip
    length: int = 0                 # frames of a window, for those kinds that need windows
    overlap: int = 0                # frames that neighbouring windows share, for FREE_NOISE
    node: str = FRAME_NOISE         # the node that makes it, as error sentences name it

    def generate_noise(self, latent: Latent) -> Tensor:
        """Noise `(b t) c h w` for a LATENT. Core's samplers call this."""
        samples = latent["samples"]
        check(latent, self.node)
        frames, numbers = self.frames or len(samples), latent.get("batch_index")
        if len(samples) % frames:
            raise VideoLDMError(f"The latent has {len(samples)} frames, which do not divide into clips of {frames} "
                                f"for the noise. Set frames of {self.node} to the frames of one clip, or to 0.")
        clips = clip_numbers(len(samples), frames, numbers)
        mix = {SHARED: float("inf"), MIXED: self.mix}.get(self.kind, 0.0)
        shared = comfy.sample.prepare_noise(samples[::frames], self.seed ^ SHARED_SEED, clips) if mix else None
        own = comfy.sample.prepare_noise(samples, self.seed, numbers)       # last, as KSampler leaves torch's seed
        if shared is not None:
            return mixed_noise(own, shared, mix)
        return own[self.order(clips, frames)] if self.kind in OF_WINDOWS else own

    def order(self, clips: list[int], frames: int) -> list[int]:
        """For each frame of the latent, the frame whose noise it gets."""
        if self.kind == REPEATED:
            orders = [repeated_order(frames, self.length) for _ in clips]
        else:
            orders = [free_noise_order(frames, self.length, self.overlap, (self.seed + clip) % SEEDS)
                      for clip in clips]
        return [place * frames + frame for place, order in enumerate(orders) for frame in order]


def check(latent: Latent, node: str) -> None:
    """Refuse a latent that is no batch of frames. node: makes the noise for it."""
    samples = latent["samples"]
    if not isinstance(samples, torch.Tensor) or samples.is_nested:
        raise VideoLDMError(f"The latent that {node} makes noise for is of another kind of model, whose samples "
                            "are no frames. Use core's RandomNoise for it.")
    refuse_planes(latent, f"The latents that {node} makes noise for")
    check_frames(samples, f"The latents that {node} makes noise for")
    numbers = latent.get("batch_index")
    if numbers is not None and len(numbers) != len(samples):
        raise VideoLDMError(f"The latent has {len(samples)} frames and {len(numbers)} numbers of them (batch_index). A "
                            "node has changed only one of both. Remove it, or save and load the latent.")


def clip_numbers(images: int, frames: int, numbers: list[int] | None) -> list[int]:
    """The number of each clip. `numbers`: core's numbers of the frames, if the latent was cut from a longer batch."""
    return [number // frames for number in (numbers or range(images))[:images:frames]]


def frame_noise(seed: int, kind: str, mix: float, model: Model | None, frames: int = 0, length: int = 0,
                overlap: int = 0, node: str = FRAME_NOISE) -> FrameNoise:
    """The noise that a node's widgets describe. Raises VideoLDMError if the windows are missing or impossible.

    Args:
        seed: KSampler's.
        kind: one of KINDS.
        mix: as in FrameNoise.
        model: the MODEL whose clip length and Frame Windows count where frames or length is 0; may be None.
        frames, length, overlap, node: as in FrameNoise.
    """
    if model is not None:
        frames = frames or clip_options(model.model_options.get("transformer_options", {})).frames or 0
    if kind not in OF_WINDOWS:
        return FrameNoise(seed, kind, mix, frames, node=node)
    windows = model.model_options.get(HANDLER) if model is not None else None
    if not length and isinstance(windows, FrameWindows):
        length, overlap = windows.context_length, windows.context_overlap
    if not length:
        by_hand = ", or set window_length here" if node == FRAME_NOISE else ""
        raise VideoLDMError(f"The noise '{kind}' is made for windows, and none are known. Put Frame Windows on the "
                            f"MODEL{by_hand}.")
    if kind == FREE_NOISE and overlap >= length:
        raise VideoLDMError(f"Windows of {length} frames cannot overlap by {overlap}. Set overlap below {length}.")
    return FrameNoise(seed, kind, mix, frames, length, overlap, node)
