"""The trainings of PVDM: its autoencoder in two stages, then the diffusion of its planes (PVDM, sections 3.1 and 3.2).

Stage one has no discriminators. Stage two resumes with them: `adversarial_from` is the step where it begins. The paper
weighs L1, perceptual and adversarial terms 1 : 1 : 0.25, the published code 4 : 4 : 1 with 4 for matched features.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from ..diffusion import Diffusion
from ..errors import VideoLDMError
from ..pvdm import Autoencoder, PlaneShape
from .decoder import absolute_error, psnr, zero_terms
from .discriminator import feature_distance, hinge_loss, judged
from .image import squared_error
from .loss_inputs import RecordableLoss
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
    features: float = 4.0           # of feature matching in each discriminator
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
        if terms.perceptual and perceptual is None:
            raise VideoLDMError(f"The perceptual term counts {terms.perceptual:g}, and no perceptual network is "
                                "given. Give one (temporal/training/perceptual.py), or set it to 0.")
        if (terms.adversarial or terms.features) and clip_judge is None and frame_judge is None:
            raise VideoLDMError("The adversarial and feature terms need a discriminator. Give one, or set both to 0.")
        self.autoencoder, self.clips, self.terms = autoencoder, clips, terms
        self.judges = {name: judge for name, judge in (("clip_judge", clip_judge), ("frame_judge", frame_judge))
                       if judge is not None}
        self.perceptual, self.reconstruction = perceptual, reconstruction
        self.modules = {"autoencoder": autoencoder, **self.judges}
        if perceptual is not None:
            freeze(perceptual)
        if decoder_only:
            for name, parameter in autoencoder.named_parameters():
                parameter.requires_grad_(decodes(name))

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
        answers, seen = judged(judge, y)
        real, features = judge(x)
        fake, _ = judge(y.detach())
        own = hinge_loss(real, fake)
        added = own - self.terms.adversarial * answers.float().mean()
        if self.terms.features:
            added = added + self.terms.features * feature_distance(seen, [part.detach() for part in features])
        return {"loss": added, f"{name}_loss": own.detach(),
                f"{name}_weight": torch.full_like(own, self.terms.adversarial).detach(),
                f"{name}_fooled": (fake.detach() > 0).float().mean()}


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
        videos: StepContext -> clips (b 2t 3 H W) in -1..1.
    """

    def __init__(self, autoencoder: Autoencoder, videos: Callable[..., Tensor]):
        self.autoencoder, self.videos = autoencoder, videos
        freeze(autoencoder)

    def to(self, device):
        self.autoencoder.to(device)

    def __call__(self, step, known: Tensor) -> PlanePairs:
        x = self.videos(step).to(step.device)
        frames = x.shape[1] // 2
        black = (x[:, :frames] == BLACK).flatten(1).all(1).cpu()
        starts = torch.randint(0, frames + 1, (len(x),), generator=step.generator)
        starts = torch.where(known | black, frames, starts)
        target = self.encode(torch.stack([video[start:start + frames] for video, start in zip(x, starts)]))
        has_before = (known & ~black).to(step.device)
        before = torch.zeros_like(target)
        if has_before.any():
            before[has_before] = self.encode(x[has_before, :frames])
        return PlanePairs(target, before)

    @torch.no_grad()
    def encode(self, clips: Tensor) -> Tensor:
        return self.autoencoder.encode(clips.transpose(1, 2)).float()


class StoredPlanes:
    """Draws from planes that were encoded before, (n k c l): of k windows of each video, the first and the last of
    which are its two halves."""

    def __init__(self, planes, batch: int):
        self.planes, self.batch = planes, batch

    def __call__(self, step, known: Tensor) -> PlanePairs:
        rows, windows = self.planes.shape[:2]
        drawn = torch.randint(0, rows, (len(known),), generator=step.generator)
        starts = torch.where(known, windows - 1, torch.randint(0, windows, (len(known),), generator=step.generator))
        target, first = (torch.stack([torch.as_tensor(self.planes[int(row), int(start)]) for row, start in
                                      zip(drawn, which)]).float() for which in (starts, torch.zeros_like(starts)))
        return PlanePairs(target, first * known[:, None, None])


class NoisyPlanes(NamedTuple):
    """What a step draws."""

    x: Tensor           # planes (b c l)
    before: Tensor      # like x
    tau: Tensor         # (b)
    noise: Tensor       # like x


class PlaneDiffusionLoss(RecordableLoss):
    """`loss(step)` for the Loop: || eps - eps_theta(z_tau, z_before, tau) ||^2 (PVDM, Eq. 9).

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
        self.network, self.source, self.shape = network, source, shape
        self.diffusion, self.batch, self.known = diffusion, batch, known

    def to(self, device):
        if hasattr(self.source, "to"):
            self.source.to(device)

    def draw(self, step) -> NoisyPlanes:
        known = torch.rand(step.share(self.batch), generator=step.generator) < self.known
        target, before = (part.to(step.device) for part in self.source(step, known))
        tau = self.diffusion.random_tau(len(target), step.generator, target.device)
        return NoisyPlanes(target, before, tau, self.diffusion.random_noise(target, step.generator))

    def compute(self, inputs: NoisyPlanes) -> dict[str, Tensor]:
        x, before, tau, noise = inputs
        output = self.network(self.diffusion.add_noise(x, tau, noise), tau, self.shape, before)
        return {"loss": squared_error(self.diffusion, output, x, noise, tau)}
