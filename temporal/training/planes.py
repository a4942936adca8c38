"""The trainings of PVDM: its autoencoder in two stages, then the diffusion of its planes (PVDM, sections 3.1 and 3.2).

Stage one has no discriminators. Stage two goes on with them: `adversarial_from` is the step where it begins. The paper
weighs L1, perceptual and adversarial terms 1 : 1 : 0.25, the published code 4 : 4 : 1 with 4 for matched features.

The published code trains the autoencoder and the discriminators in turn, three batches each. Here both learn in the
same step, as in the other trainings of this pack. One backward pass serves both, and a run resumes by its step alone.

The published average of weights takes in every 25th step. Here it is the Loop's, which takes in every step. While the
decay warms up, the mean age of the weights in either average is a tenth of the training. The published training ends
within this warm-up. Ours leaves it after 90,000 steps with decay 0.9999. Then the mean age stays at 10,000 steps. So a
longer training sets `ema_decay` nearer to 1.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from ..diffusion import Diffusion
from ..errors import VideoLDMError
from ..pvdm import Autoencoder, PlaneShape
from .clips import as_frames
from .decoder import absolute_error, psnr
from .discriminator import judgement, require_networks, zero_terms
from .image import squared_error
from .loss_inputs import RecordableLoss
from .moving_pictures import below
from .temporal import freeze

BLACK = -1.0        # a frame that a video lacks: black pixels stand for it


class WeightedClips(NamedTuple):
    """A batch of clips."""

    frames: Tensor                      # (b t 3 H W) in -1..1
    weights: Tensor | None = None       # how much each pixel counts, (b t 1 H W); None: all alike


@dataclass(frozen=True)
class PlaneAutoencoderTerms:
    """The weight of each term. The defaults are the published ones."""

    pixels: float = 4.0             # of the mean absolute error
    perceptual: float = 4.0         # of the distance by the perceptual network, on a random frame of each clip
    adversarial: float = 1.0        # of each discriminator
    features: float = 4.0           # of feature matching in each discriminator, summed over its layers
    adversarial_from: int = 0       # the first step of the second stage


class PlaneAutoencoderLoss:
    """`loss(step)` for the Loop. `modules` is what the Loop trains.

    Args:
        autoencoder: what is trained.
        clips: StepContext -> WeightedClips.
        terms: the weights of the terms.
        clip_judge: a discriminator of clips (b 3 t h w), gives (answers, features).
        frame_judge: a discriminator of frames (n 3 h w). It sees the random frame of each clip.
        perceptual: the distance of pictures (n 3 h w) to pictures; frozen here.
        reconstruction: (frames, true frames, weights), all flat (n c h w) -> error.
        decoder_only: True keeps the encoder and the planes as they are. A diffusion model of these planes stays right.
    """

    def __init__(self, autoencoder: Autoencoder, clips: Callable[..., WeightedClips], terms: PlaneAutoencoderTerms,
                 clip_judge: nn.Module | None = None, frame_judge: nn.Module | None = None,
                 perceptual: nn.Module | None = None, reconstruction: Callable[..., Tensor] = absolute_error,
                 decoder_only: bool = False):
        require_networks(terms.perceptual, terms.adversarial + terms.features, perceptual,
                         (clip_judge, frame_judge))
        self.autoencoder, self.clips, self.terms = autoencoder, clips, terms
        self.judges = {name: judge for name, judge in (("clip_judge", clip_judge), ("frame_judge", frame_judge))
                       if judge is not None}
        self.perceptual, self.reconstruction = perceptual, reconstruction
        self.modules = {"autoencoder": autoencoder, **self.judges}
        if perceptual is not None:
            freeze(perceptual)
        for name, parameter in autoencoder.named_parameters():
            parameter.requires_grad_(decodes(name) or not decoder_only)

    def to(self, device):
        if self.perceptual is not None:
            self.perceptual.to(device)

    def __call__(self, step) -> dict[str, Tensor]:
        clips = self.clips(step)
        x = clips.frames.to(step.device)
        y = self.autoencoder(x.transpose(1, 2)).transpose(1, 2).float()
        weights = None if clips.weights is None else clips.weights.to(step.device).flatten(0, 1)
        loss = self.terms.pixels * self.reconstruction(y.flatten(0, 1), x.flatten(0, 1), weights)
        chosen = torch.randint(0, x.shape[1], (len(x),), generator=step.generator)
        frame, true_frame = (part[torch.arange(len(x)), chosen] for part in (y, x))
        if self.perceptual is not None and self.terms.perceptual:
            loss = loss + self.terms.perceptual * self.perceptual(frame, true_frame)
        figures = {"psnr": psnr(y, x), "reconstruction": loss.detach()}
        for name, judge in self.judges.items():
            pair = (y.transpose(1, 2), x.transpose(1, 2)) if name == "clip_judge" else (frame, true_frame)
            added = self.judge(name, judge, *pair) if step.step >= self.terms.adversarial_from else \
                zero_terms(name, loss)
            loss = loss + added.pop("loss")
            figures |= added
        return {"loss": loss, **figures}

    def judge(self, name: str, judge: nn.Module, y: Tensor, x: Tensor) -> dict[str, Tensor]:
        """What a discriminator adds: to the autoencoder's loss, and its own. Its weight is fixed."""
        found = judgement(judge, y, x)
        weight = torch.full_like(found.own, self.terms.adversarial).detach()
        return found.terms(name, weight, self.terms.adversarial, self.terms.features * len(found.features))


def decodes(name: str) -> bool:
    """Whether a weight of the autoencoder stands behind the planes."""
    return name.startswith(("decoder.", "to_pixel.", "post_"))


class PlanePairs(NamedTuple):
    """Planes of clips and of the clips before them."""

    target: Tensor      # (b c l)
    before: Tensor      # (b c l); zeros where there is none


class PlaneSource(Protocol):
    """Draws the planes of a step."""

    def __call__(self, step, known: Tensor) -> PlanePairs:
        """`known` (b): True where the clip before is to be known. There it is zeros if the video has no such clip."""
        ...


class EncodedVideos:
    """Encodes videos of two clips while it draws, as the published training does.

    A pair is the second clip of a video with the first one before it, or a window from anywhere in the video with none.
    A video shorter than two clips has a black first half. Then the second half is drawn, with no clip before it.

    Args:
        autoencoder: frozen here.
        videos: StepContext -> clips (b 2t 3 H W) in -1..1, b being this process's share of the batch.
    """

    def __init__(self, autoencoder: Autoencoder, videos: Callable[..., Tensor]):
        self.autoencoder, self.videos = autoencoder, videos
        freeze(autoencoder)

    def to(self, device):
        self.autoencoder.to(device)

    def __call__(self, step, known: Tensor) -> PlanePairs:
        x = self.videos(step)
        if x.ndim != 5 or x.shape[1] % 2 or len(x) != len(known):
            raise VideoLDMError(f"A step takes {len(known)} videos of two clips, 'b 2t 3 H W'. These are "
                                f"{' x '.join(map(str, x.shape))}.")
        frames = x.shape[1] // 2
        black = (x[:, :frames] == BLACK).flatten(1).all(1).cpu()
        starts = torch.randint(0, frames + 1, (len(x),), generator=step.generator)
        starts = torch.where(known | black, frames, starts)
        target = encode(self.autoencoder, torch.stack([video[start:start + frames]
                                                            for video, start in zip(x, starts)]))
        before, has_before = torch.zeros_like(target), known & ~black
        if has_before.any():
            before[has_before] = encode(self.autoencoder, x[has_before, :frames])
        return PlanePairs(target, before)


@torch.no_grad()
def encode(autoencoder: Autoencoder, clips: Tensor) -> Tensor:
    """The planes `b c l` of clips `b t 3 H W`, on the autoencoder's device.

    They are float32 also in mixed precision, because the diffusion learns to make exactly these.
    """
    device = next(autoencoder.parameters()).device
    with torch.autocast(device.type, enabled=False):
        return autoencoder.encode(clips.to(device, torch.float32).transpose(1, 2))


def encode_windows(autoencoder: Autoencoder, video, every: int = 1, batch: int = 8) -> Tensor:
    """The planes (k c l) of the windows of a video that begin at every `every`-th frame, on the CPU.

    Args:
        autoencoder: frozen.
        video: uint8 frames (t, h, w, 3), or a tensor (t, 3, h, w) in -1..1, of a clip or longer.
        every: the distance of two windows. It divides a clip, so that the clip behind a window is a window too.
        batch: windows that are encoded together.
    """
    frames = autoencoder.params.frames
    if every < 1 or frames % every:
        raise VideoLDMError(f"The distance of two windows has to divide a clip of {frames} frames, and {every} does "
                            "not.")
    if len(video) < frames:
        raise VideoLDMError(f"A clip has {frames} frames, and this video {len(video)}.")
    starts = range(0, len(video) - frames + 1, every)
    parts = []
    for first in range(0, len(starts), batch):
        clips = torch.stack([as_frames(video[start:start + frames]) for start in starts[first:first + batch]])
        parts.append(encode(autoencoder, clips).cpu())
    return torch.cat(parts)


class StoredPlanes:
    """Draws from planes that were encoded before. It draws as EncodedVideos does, and encodes nothing.

    Args:
        videos: for each video the planes of windows at even distances, in order, (k c l).
        apart: how many windows after a window the clip behind it begins. A video with fewer windows than that is
            shorter than two clips: none of its windows has a clip before it.
    """

    def __init__(self, videos, *, apart: int):
        if apart < 1:
            raise VideoLDMError(f"The clip behind a window begins 1 window or more after it, not {apart}.")
        if len(videos) == 0 or min(len(video) for video in videos) == 0:
            raise VideoLDMError("There are no planes to draw from, or a video without any.")
        self.videos, self.apart = videos, apart

    def __call__(self, step, known: Tensor) -> PlanePairs:
        pairs = [self.draw(step.generator, bool(one)) for one in known]
        target, before = (torch.stack(part) for part in zip(*pairs))
        return PlanePairs(target, before)

    def draw(self, generator: torch.Generator, known: bool) -> tuple[Tensor, Tensor]:
        video = self.videos[below(len(self.videos), generator)]
        has_before = len(video) > self.apart
        first = below(max(len(video) - self.apart, 1), generator)       # a video of two clips begins here
        window = below(min(self.apart + 1, len(video)), generator)
        target = planes_of(video[first + self.apart if known and has_before else first + window])
        return target, planes_of(video[first]) if known and has_before else torch.zeros_like(target)


def planes_of(stored) -> Tensor:
    """Stored planes in float32. They may lie on a disk."""
    return (stored if isinstance(stored, Tensor) else torch.from_numpy(np.array(stored))).float()


class NoisyPlanes(NamedTuple):
    """What a step draws."""

    x: Tensor           # planes (b c l)
    before: Tensor      # like x
    tau: Tensor         # (b)
    noise: Tensor       # like x


class PlaneDiffusionLoss(RecordableLoss):
    """`loss(step)` for the Loop: || eps - eps_theta(z_tau, z_before, tau) ||^2 (PVDM, Eq. 9).

    `modules` is what the Loop trains.

    The published training decides for a whole batch whether the clip before is known. Here each clip decides for
    itself, which gives the same mean.

    Args:
        network: a PlaneUNet.
        source: draws the planes.
        shape: the grid of the planes.
        diffusion: the noise schedule.
        batch: clips of a step, over all processes.
        known: the probability that a clip knows the one before it; 0 trains without condition.
    """

    def __init__(self, network: nn.Module, source: PlaneSource, shape: PlaneShape, diffusion: Diffusion, batch: int,
                 known: float = 0.3):
        if not 0 <= known <= 1:
            raise VideoLDMError(f"The share of clips that know the clip before is from 0 to 1, not {known}.")
        if known and not network.params.conditional:
            raise VideoLDMError("This network has no input for the clip before. Train it with known=0, or make one "
                                "with conditional=True.")
        self.network, self.source, self.shape = network, source, shape
        self.diffusion, self.batch, self.known = diffusion, batch, known
        self.modules = {"unet": network}

    def to(self, device):
        if hasattr(self.source, "to"):
            self.source.to(device)

    def draw(self, step) -> NoisyPlanes:
        known = torch.rand(step.share(self.batch), generator=step.generator) < self.known
        target, before = (part.to(step.device) for part in self.source(step, known))
        due = (len(known), self.network.params.channels, self.shape.length)
        if target.shape != due or before.shape != due:
            raise VideoLDMError(f"A step takes planes of {' x '.join(map(str, due))} numbers: clips, channels and "
                                f"positions of {self.shape}. These are {' x '.join(map(str, target.shape))}.")
        tau = self.diffusion.random_tau(len(target), step.generator, target.device)
        return NoisyPlanes(target, before, tau, self.diffusion.random_noise(target, step.generator))

    def compute(self, inputs: NoisyPlanes) -> dict[str, Tensor]:
        x, before, tau, noise = inputs
        output = self.network(self.diffusion.add_noise(x, tau, noise), tau, self.shape, before)
        return {"loss": squared_error(self.diffusion, output, x, noise, tau)}
