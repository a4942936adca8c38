"""How much memory a piece of work takes beyond what is there before it: measured of a process, or counted in tensors.

`growth` measures what a process holds. `Tally` counts bytes of tensors. Tensors on torch's "meta" device count as
well: they have shapes and no contents, so a network of any size runs there without a GPU.
"""

import os
import threading
import weakref

import psutil
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def own_pages() -> dict:
    """The environment for a process that measures: every tensor gets memory pages of its own.

    glibc otherwise keeps what was freed before, and the work would use that without being seen.
    """
    return dict(os.environ, MALLOC_MMAP_THRESHOLD_="65536")


def growth(work) -> int:
    """Bytes of resident memory that `work()` takes at most, beyond what the process holds before it.

    The system's own high-water mark is of no use: earlier work may have raised it above what this work needs.
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
    """Counts bytes of the tensors that are made while it is open, by type of device.

    It does not see what is inside an operation, such as a convolution's workspace, nor what existed before.
    """

    def __init__(self):
        super().__init__()
        self.alive: dict[str, int] = {}     # bytes now, by device
        self.most: dict[str, int] = {}      # bytes at the fullest moment, by device
        self.counted: dict[int, weakref.ref] = {}     # the storages that are counted, by id
        self.lock = threading.RLock()       # the encoder of a video frees frames in a thread of its own

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for tensor in tensors_of((args, kwargs)):
            self.note(tensor, 0)
        out = func(*args, **(kwargs or {}))
        for tensor in tensors_of(out):
            self.note(tensor, tensor.untyped_storage().nbytes())
        return out

    def note(self, tensor: torch.Tensor, size: int):
        """Count a tensor's storage until it is freed. Views share one."""
        storage, device = tensor.untyped_storage(), tensor.device.type
        key = id(storage)
        with self.lock:
            if key in self.counted:
                return
            self.counted[key] = weakref.ref(storage, lambda _: self.forget(key, device, size))
            self.alive[device] = self.alive.get(device, 0) + size
            self.most[device] = max(self.most.get(device, 0), self.alive[device])

    def forget(self, key: int, device: str, size: int):
        with self.lock:
            del self.counted[key]
            self.alive[device] -= size


def tensors_of(values) -> list[torch.Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, torch.Tensor)]
