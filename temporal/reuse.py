"""Reuse of what temporal layers add: a step keeps it, and the following steps add it again without running the layers.

Pyramid Attention Broadcast (Zhao et al. 2024) does this with the attention of video transformers: what a layer adds
changes little from step to step in the middle of a sampling. Here it is the residual of each temporal layer.

One KeptResiduals belongs to one sampling. It keeps the parts of a call apart: each is the frames of one condition in
one window. So no part ever gets another's residuals.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

from torch import Tensor, cat

MOST_REUSED = 3     # steps that may take over what one step has kept


@dataclass(frozen=True)
class ReusePlan:
    """In which steps residuals are used again."""

    steps: int              # how many following steps take over what a step has kept, 0 to MOST_REUSED
    first_sigma: float      # reuse begins at this noise level
    last_sigma: float       # and it ends below this one

    def covers(self, sigma: float) -> bool:
        """Whether a step of this noise level may use residuals again."""
        return self.last_sigma <= sigma <= self.first_sigma


@dataclass
class Kept:
    """The residuals of one part of a call."""

    step: int                                                       # the step that made them
    residuals: dict[Hashable, Tensor] = field(default_factory=dict)  # by site


class KeptResiduals:
    """The residuals that one sampling has kept.

    A step is a run of calls with the same noise level. Some samplers and guidance nodes call the network several times
    in a step with the same condition. Each of these calls keeps residuals of its own: its turn is a part of its key.
    """

    def __init__(self, plan: ReusePlan, on_cpu: bool = False) -> None:
        """on_cpu: the residuals wait in the computer's memory and not in that of the GPU."""
        self.plan, self.on_cpu = plan, on_cpu
        self.parts: dict[Hashable, Kept] = {}
        self.step, self.sigma = 0, float("nan")
        self.turns: dict[Hashable, int] = {}        # how often each key was seen in this step
        self.reused, self.ran = 0, 0                # calls

    def call(self, keys: Sequence[Hashable], sigma: float) -> "ReuseInCall | None":
        """Begin a call. None: it neither keeps nor uses residuals.

        Args:
            keys: one for each part of the call, in the order of the batch.
            sigma: the noise level.
        """
        if sigma != self.sigma:
            self.begin_step(sigma)
        turns = []
        for key in keys:
            self.turns[key] = self.turns.get(key, -1) + 1
            turns.append((key, self.turns[key]))
        if not self.plan.covers(sigma):
            self.parts.clear()
            return None
        again = all(turn in self.parts for turn in turns)
        if not again:
            self.parts.update({turn: Kept(self.step) for turn in turns})
        self.reused, self.ran = self.reused + again, self.ran + (not again)
        return ReuseInCall([self.parts[turn].residuals for turn in turns], again, self.on_cpu)

    def begin_step(self, sigma: float) -> None:
        """Begin a step, and drop what is too old for it: windows that move do not come back."""
        self.step, self.sigma, self.turns = self.step + 1, sigma, {}
        self.parts = {turn: kept for turn, kept in self.parts.items() if self.is_young(kept)}

    def is_young(self, kept: Kept) -> bool:
        return self.step - kept.step <= self.plan.steps

    @property
    def size(self) -> int:
        """Bytes of all residuals that are kept."""
        return sum(residual.numel() * residual.element_size()
                   for kept in self.parts.values() for residual in kept.residuals.values())


@dataclass(frozen=True)
class ReuseInCall:
    """What one call keeps, or uses again."""

    parts: list[dict[Hashable, Tensor]]     # the residuals of each part of the batch, by site
    again: bool                             # True: they are used. False: they are kept
    on_cpu: bool = False

    def residual(self, site: Hashable, x: Tensor) -> Tensor | None:
        """The residual of the layer at a site, for features x `(p b t) ...` of p parts. None: the layer has to run.

        It has to where the features have another size than in the step that kept them: deep shrink changes it.
        """
        if not self.again:
            return None
        found = [part.get(site) for part in self.parts]
        kept = [residual for residual in found if residual is not None]
        size = (len(x) // len(self.parts), *x.shape[1:])
        if len(kept) < len(found) or any(residual.shape != size for residual in kept):
            return None
        return cat([residual.to(x) for residual in kept])

    def keep(self, site: Hashable, residual: Tensor) -> None:
        """Keep the residual of the layer at a site."""
        for part, own in zip(self.parts, residual.chunk(len(self.parts)), strict=True):
            part[site] = own.to("cpu") if self.on_cpu else own
