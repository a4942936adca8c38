"""Exponential moving average of weights."""

import torch


class EMA:
    """A float32 running average of named parameters.

    The decay warms up as min(decay, (1 + n) / (10 + n)) over updates n. An early average so forgets the random start.
    n is the training step, so a resumed average equals an uninterrupted one.
    """

    def __init__(self, parameters: dict, decay: float):
        self.decay = decay
        self.average = {name: p.detach().to(torch.float32, copy=True) for name, p in parameters.items()}

    def decay_at(self, updates: int) -> float:
        """The decay of update number `updates`, counted from 0."""
        return min(self.decay, (1 + updates) / (10 + updates))

    @torch.no_grad()
    def update(self, parameters: dict, updates: int) -> None:
        """average += (1 - decay) * (parameter - average), for all parameters at once."""
        current = [parameters[name].detach().float() for name in self.average]
        torch._foreach_lerp_(list(self.average.values()), current, 1.0 - self.decay_at(updates))
