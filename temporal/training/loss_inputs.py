"""Losses in two parts: the CPU draws and reads the inputs of a step, then the loss is computed from them.

A GPU can record the second part once and replay it for every step (cuda_graph.py).
"""

from collections.abc import Callable
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor


class RecordableLoss:
    """`loss(step)` for the Loop, in two methods that a subclass defines."""

    def draw(self, step) -> Any:
        """All that is random or read, as tensors on the step's device and whole numbers.

        They come in a tuple, NamedTuple, dict or dataclass. None may stand for a tensor.
        """
        raise NotImplementedError

    def compute(self, inputs: Any) -> dict[str, Tensor]:
        """The figures, from nothing but the inputs and the weights. It draws nothing, except for dropout."""
        raise NotImplementedError

    def __call__(self, step) -> dict[str, Tensor]:
        return self.compute(self.draw(step))


def tensors_of(inputs) -> list[Tensor]:
    """All tensors of the inputs, in order."""
    found: list[Tensor] = []
    map_tensors(inputs, found.append)
    return found


def map_tensors(inputs: Any, change: Callable[[Tensor], Any]) -> Any:
    """The same structure with `change(tensor)` for each tensor."""
    if isinstance(inputs, Tensor):
        return change(inputs)
    if inputs is None or isinstance(inputs, int):
        return inputs
    if isinstance(inputs, dict):
        return {key: map_tensors(value, change) for key, value in inputs.items()}
    if is_dataclass(inputs):
        record: Any = type(inputs)
        return record(**{part.name: map_tensors(getattr(inputs, part.name), change) for part in fields(inputs)})
    if isinstance(inputs, tuple):
        values = [map_tensors(value, change) for value in inputs]
        return type(inputs)(*values) if hasattr(inputs, "_fields") else tuple(values)
    raise TypeError(f"a loss drew a {type(inputs).__name__}, which is neither a tensor nor made of some")
