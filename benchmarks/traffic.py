"""Memory traffic of a step with temporal layers: `python run.py bench --traffic`.

On a graphics card a step is often as slow as its memory and not as its arithmetic. This counts the bytes that each
operation reads and writes, with and without layers, and the most that a step holds at once. Nothing is computed: the
network is on torch's "meta" device, at the size of Stable Diffusion 1.5, in bfloat16. So the figures are exact and the
same on every machine. A view is free. An operation that torch runs as one, such as attention or a norm, counts once.
"""

import argparse
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from ..nodes.host import for_benchmarks
from ..nodes.host.layer_weights import build_stack
from ..temporal.layers import Factory
from ..temporal.stack import TemporalStack
from .memory import tensors_of
from .speed import SD15, SETS, Case, build_control, gigabytes, params_of, step
from .tensor_memory import CARD, count_bytes

IMAGE_MODEL = "image model"
COLUMNS = ("layers", "GB without", "GB with", "traffic ratio", "FLOP ratio", "traffic / FLOPs", "peak without",
           "peak with")
FREE = ("empty", "empty_like", "empty_strided", "new_empty")       # they touch no memory
LISTED = 8          # kinds of operations in the list of a set


class Traffic(TorchDispatchMode):
    """Counts the bytes that operations read and write while it is open."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[tuple[str, str]] = Counter()        # by (part, operation)
        self.part = IMAGE_MODEL                                 # what runs

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given, made = tensors_of((args, kwargs)), tensors_of(out)
        if func.overloadpacket.__name__ not in FREE and not is_view(func, given, made):
            self.bytes[self.part, func.overloadpacket.__name__] += sum(map(size_of, given)) + sum(map(size_of, made))
        return out

    @property
    def total(self) -> int:
        return sum(self.bytes.values())

    def of(self, part: str | None = None) -> Counter[str]:
        """Bytes by operation. part: of one part alone; None: of all temporal layers."""
        found: Counter[str] = Counter()
        for (own, operation), count in self.bytes.items():
            if own == part or part is None and own != IMAGE_MODEL:
                found[operation] += count
        return found

    def begin(self, kind: str) -> None:
        """What runs from now on is a layer of this kind."""
        self.part = kind

    def end(self) -> None:
        self.part = IMAGE_MODEL


@contextmanager
def each_layer(stack: TemporalStack, begin: Callable[[str], None], end: Callable[[], None]) -> Iterator[None]:
    """While open, `begin(kind)` and `end()` are called before and after each layer of the stack runs."""
    handles: list = []
    for layer in stack.layers.values():
        handles += [layer.register_forward_pre_hook(lambda module, args: begin(type(module).__name__)),
                    layer.register_forward_hook(lambda module, args, output: end())]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class FusedAttention(TorchFunctionMode):
    """While open, attention reads its inputs and writes its result, as on a card. Without it "meta" takes it apart."""

    def __init__(self, traffic: Traffic) -> None:
        super().__init__()
        self.traffic = traffic

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is not scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        out = torch.empty_like(args[0])     # in the layout of the queries; values are as wide as they are
        given = tensors_of((args, kwargs))
        self.traffic.bytes[self.traffic.part, "attention"] += sum(map(size_of, [*given, out]))
        return out


def is_view(func: Any, given: list[Tensor], made: list[Tensor]) -> bool:
    """Whether an operation moves nothing: what it gives shares the memory of what it was given."""
    storages = {id(tensor.untyped_storage()) for tensor in given}
    shared = bool(made) and all(id(tensor.untyped_storage()) in storages for tensor in made)
    return shared and not func._schema.is_mutable


def size_of(tensor: Tensor) -> int:
    """Bytes of a tensor in memory. Items that an expanded tensor repeats are there once."""
    numbers = 1
    for size, stride in zip(tensor.shape, tensor.stride()):
        numbers *= size if stride else 1
    return numbers * tensor.element_size()


def network(case: Case) -> nn.Module:
    """The UNet on the meta device."""
    return for_benchmarks.unet_of(SD15, case.dtype, case.device).requires_grad_(False).eval()


def layers_of(unet: nn.Module, name: str, case: Case) -> TemporalStack:
    """A set of temporal layers on the meta device, as Load Temporal Layers builds it."""
    params = params_of(unet, name, case.frames)
    weights = TemporalStack(params, Factory(dtype=case.dtype, device=case.device)).state_dict()
    return build_stack(params, dict(weights), case.dtype)


def inputs_of(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    options = {"device": case.device, "dtype": case.dtype}
    return (torch.empty(case.frames, 4, case.size, case.size, **options),
            torch.empty(case.frames, device=case.device), torch.empty(case.frames, 77, 768, **options))


def counted(unet: nn.Module, stack: TemporalStack | None, case: Case,
            control: nn.Module | None = None) -> tuple[Traffic, int]:
    """(traffic, FLOPs) of one step. stack None: the image model. control: SparseCtrl's network."""
    inputs = inputs_of(case)
    traffic = Traffic()
    with for_benchmarks.ample_memory_and_plain_attention():
        with FlopCounterMode(display=False) as flops:
            step(unet, stack, inputs, case, control)
        with each_layer(stack, traffic.begin, traffic.end) if stack is not None else nullcontext(), traffic, \
                FusedAttention(traffic):
            step(unet, stack, inputs, case, control)
    return traffic, flops.get_total_flops()


def peak(unet: nn.Module, stack: TemporalStack | None, case: Case, control: nn.Module | None = None) -> int:
    """The most bytes of tensors that a step holds beside the weights and its inputs. Arguments as in `counted`."""
    inputs = inputs_of(case)
    return count_bytes(lambda: step(unet, stack, inputs, case, control))[CARD]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="run.py bench --traffic", description=__doc__.split("\n\n")[1])
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--size", type=int, default=64, help="height and width of the latents")
    parser.add_argument("--sets", nargs="+", choices=SETS, default=SETS, metavar="SET", help=f"of {SETS}")
    options = parser.parse_args(argv)
    case = Case("meta", torch.bfloat16, options.size, options.frames)
    print(f"\n{case.frames} frames, {8 * case.size}x{8 * case.size} pixels, bfloat16, one condition; counted\n")
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}")
    unet = network(case)
    base, base_flops = counted(unet, None, case)
    base_peak = peak(unet, None, case)
    found = {}
    for name in options.sets:
        stack, control = layers_of(unet, name, case), build_control(name, case)
        found[name], flops = counted(unet, stack, case, control)
        ratio, flop_ratio = found[name].total / base.total, flops / base_flops
        most = peak(unet, stack, case, control)
        row = (name, f"{base.total / 1e9:.1f}", f"{found[name].total / 1e9:.1f}", f"{ratio:.2f}", f"{flop_ratio:.2f}",
               f"{ratio / flop_ratio:.2f}", gigabytes(base_peak), gigabytes(most))
        print(f"| {' | '.join(row)} |", flush=True)
    for name, traffic in found.items():
        print(f"\n{name}: " + "; ".join(parts_of(traffic)))
    return 0


def parts_of(traffic: Traffic) -> list[str]:
    """What the layers of each kind move, as text."""
    kinds = dict.fromkeys(part for part, _ in traffic.bytes if part != IMAGE_MODEL)
    return [f"{kind} {sum(traffic.of(kind).values()) / 1e9:.1f} GB ("
            + ", ".join(f"{operation} {count / 1e9:.1f}" for operation, count in traffic.of(kind).most_common(LISTED))
            + ")" for kind in kinds]
