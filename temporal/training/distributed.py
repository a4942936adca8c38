"""One process or several: what the training loop needs of torch.distributed, and nothing when there is one process."""

import os
from contextlib import contextmanager

import torch
import torch.distributed as dist


def active() -> bool:
    """True inside an initialised process group."""
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    return dist.get_rank() if active() else 0


def world_size() -> int:
    return dist.get_world_size() if active() else 1


def pick_device(name: str = "auto") -> torch.device:
    """The torch.device that this process trains on: its own GPU under torchrun, else the first one, else the CPU."""
    if name != "auto":
        return torch.device(name)
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())


@contextmanager
def process_group(device: torch.device):
    """Join the processes that torchrun started: nccl on GPUs, gloo on CPUs. The group is left only if joined here."""
    join = "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", 1)) > 1 and not active()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if join:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield
    finally:
        if join:
            dist.destroy_process_group()


def mean(tensor: torch.Tensor) -> torch.Tensor:
    """The mean of a tensor over all processes."""
    if active():
        tensor = tensor / world_size()
        dist.all_reduce(tensor)
    return tensor


def first_says(flag: bool, device: torch.device) -> bool:
    """The flag of the first process, in every process."""
    if not active():
        return bool(flag)
    tensor = torch.tensor([int(bool(flag))], device=device)
    dist.broadcast(tensor, src=0)
    return bool(tensor.item())


def barrier() -> None:
    if active():
        dist.barrier()
