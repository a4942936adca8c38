"""Losses in two parts: what a step draws and reads, and what is computed from it.

A GPU can then record the second part once and play it again for every step (cuda_graph.py); the first is the CPU's.
"""

from dataclasses import fields, is_dataclass

from torch import Tensor


class RecordableLoss:
    """`loss(step)` for the Loop, of two methods.

    draw(step): all that is random or read, as tensors on the step's device, and whole numbers: in a tuple, NamedTuple,
    dict or dataclass, or None. compute(drawn): the figures, tensors all of them, from nothing but that and the weights;
    it draws nothing (dropout aside) and changes nothing.
    """

    def __call__(self, step):
        return self.compute(self.draw(step))


def tensors_of(drawn) -> list[Tensor]:
    """All tensors of what was drawn, in order."""
    found = []
    map_tensors(drawn, found.append)
    return found


def map_tensors(drawn, change):
    """The same structure with `change(tensor)` for each tensor."""
    if isinstance(drawn, Tensor):
        return change(drawn)
    if drawn is None or isinstance(drawn, int):
        return drawn
    if isinstance(drawn, dict):
        return {key: map_tensors(value, change) for key, value in drawn.items()}
    if is_dataclass(drawn):
        return type(drawn)(**{part.name: map_tensors(getattr(drawn, part.name), change) for part in fields(drawn)})
    if isinstance(drawn, tuple):
        values = [map_tensors(value, change) for value in drawn]
        return type(drawn)(*values) if hasattr(drawn, "_fields") else tuple(values)
    raise TypeError(f"a loss drew a {type(drawn).__name__}, which is neither a tensor nor made of some")
