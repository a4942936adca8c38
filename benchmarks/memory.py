"""How much memory a piece of work takes beyond what is there before it: measured of a process, or counted in tensors.

`growth` measures what a process holds. `Tally` counts bytes of tensors, and tensors on torch's "meta" device, which
have shapes and no contents, count like others: a network runs there at its real size, on no hardware, in no time.
"""

import os
import threading
import weakref

import psutil
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def own_pages() -> dict:
    """The environment for a process that measures: glibc keeps what was freed before, and the work would take that
    unseen, so every tensor gets pages of its own."""
    return dict(os.environ, MALLOC_MMAP_THRESHOLD_="65536")


def growth(work) -> int:
    """Bytes of resident memory that `work()` takes at most, beyond what the process holds before it.

    The high-water mark that the system keeps would not do: what was done before raises it above what the work needs.
    """
    process, finished = psutil.Process(), threading.Event()
    before = most = process.memory_info().rss

    def watch():
        nonlocal most
        while not finished.wait(0.002):
            most = max(most, process.memory_info().rss)
    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        work()
    finally:
        finished.set()
        watcher.join()
    return most - before


class Tally(TorchDispatchMode):
    """Bytes of the tensors made while it is open, by type of device: alive now, and at the fullest moment.

    What is inside an operation, such as a convolution's workspace, is not seen; nor is what existed before.
    """

    def __init__(self):
        super().__init__()
        self.alive, self.most, self.known = {}, {}, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for tensor in tensors_of((args, kwargs)):
            self.note(tensor, 0)
        out = func(*args, **(kwargs or {}))
        for tensor in tensors_of(out):
            self.note(tensor, tensor.untyped_storage().nbytes())
        return out

    def note(self, tensor: torch.Tensor, size: int):
        """Know a tensor's memory from now on until it is freed; views share one."""
        storage, device = tensor.untyped_storage(), tensor.device.type
        place = id(storage)
        if place in self.known:
            return
        self.known[place] = weakref.ref(storage, lambda _: self.forget(place, device, size))
        self.alive[device] = self.alive.get(device, 0) + size
        self.most[device] = max(self.most.get(device, 0), self.alive[device])

    def forget(self, place: int, device: str, size: int):
        del self.known[place]
        self.alive[device] -= size


def tensors_of(values) -> list[torch.Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, torch.Tensor)]
