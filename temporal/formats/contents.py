"""The content of an open model file, and the faults that every kind of file can have."""

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..errors import VideoLDMError
from .metadata import shown

MOST_TENSORS = 50_000           # ten times as many as the largest published file holds
LONGEST_NAME = 300              # characters; the longest published name has 125
WEIGHT_TYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2,
                torch.float8_e4m3fnuz, torch.float8_e5m2fnuz)
EIGHT_BITS = WEIGHT_TYPES[4:]   # torch cannot compute with these
PART = 2 ** 22                  # elements of an 8-bit tensor that are checked at a time


class FileFault(VideoLDMError):
    """A fault of the file itself."""

    def __init__(self, sentence: str, fault: str) -> None:
        """sentence: the whole message. fault: what is wrong, without the file's name, for a loader's own message."""
        super().__init__(sentence)
        self.fault = fault


def fault_of(error: ValueError) -> str:
    """What is wrong, without the file's name, for a loader's own message."""
    return getattr(error, "fault", str(error))


@dataclass
class Contents:
    """An open file. Tensors have the file's own names."""

    path: Path
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, torch.dtype | None]       # None: a type that no weights have
    metadata: dict[str, str]
    # Reads the tensors of these names one after another. Each has memory of its own: a view of the file would keep
    # the file in memory beside its copies, and Windows cannot replace a file that has views.
    each: Callable[[Iterable[str]], Iterator[tuple[str, Tensor]]]

    def read_all(self) -> dict[str, Tensor]:
        """Read all tensors. Raises VideoLDMError if one holds NaN or infinity."""
        return self.read_finite(self.shapes)

    def read_finite(self, keys: Iterable[str]) -> dict[str, Tensor]:
        """Read tensors. Raises VideoLDMError if one holds NaN or infinity."""
        return dict(self.each_finite(keys))

    def each_finite(self, keys: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """Read tensors one after another. Raises VideoLDMError if one holds NaN or infinity."""
        for key, tensor in self.each(keys):
            if not is_finite(tensor):
                raise not_finite(self.path, key)
            yield key, tensor


class Stamp:
    """Notices when a file changes between two reads."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.seen = self.now()

    def now(self) -> tuple[int, int, int]:
        status = os.stat(self.path)
        return status.st_mtime_ns, status.st_size, status.st_ino

    def check(self) -> None:
        """Raise VideoLDMError if the file is gone or another one."""
        try:
            same = self.now() == self.seen
        except OSError:
            same = False
        if not same:
            raise VideoLDMError(f"{file_name(self.path)} changed while it was read. Wait until its download or copy is "
                                "complete, and run again.")


def file_name(path: Path) -> str:
    """A file's name in a sentence."""
    return shown(path.name, 255)


def first_line(error: object) -> str:
    """The first line of an error's text, cut where it is long."""
    return shown((str(error).strip().splitlines() or [type(error).__name__])[0], 160)


def damaged(path: Path, why: str) -> FileFault:
    """The error for a damaged file. why: what is wrong, as in "breaks off"."""
    fault = f"it {why}"
    return FileFault(f"{file_name(path)} is damaged or only partly downloaded: {fault}. Download it again.", fault)


def not_finite(path: Path, key: str) -> FileFault:
    """The error for a tensor with NaN or infinity."""
    fault = f"the tensor {key} holds NaN or infinity"
    return FileFault(f"{file_name(path)} cannot be used: {fault}. Its training failed, or it was converted wrongly or "
                     "damaged: use another copy of the file.", fault)


def is_finite(tensor: Tensor) -> bool:
    """Whether all numbers are finite. True for dtypes that have only finite numbers."""
    if not tensor.numel() or tensor.dtype not in WEIGHT_TYPES:
        return True
    if tensor.dtype in EIGHT_BITS:
        return all(map(is_finite, (part.float() for part in tensor.flatten().split(PART))))
    # If the tensor holds NaN, minimum and maximum are NaN. Unlike isfinite on the tensor this needs no memory.
    return bool(torch.isfinite(torch.stack(torch.aminmax(tensor))).all())


def check_names(path: Path, names: Iterable[str]) -> None:
    """Raise VideoLDMError for more names than any model has, and for names that a message cannot show."""
    names = list(names)
    if len(names) > MOST_TENSORS:
        raise VideoLDMError(f"{file_name(path)} holds {len(names)} tensors, more than any model that this pack knows. "
                            "Choose another file.")
    for name in names:
        if len(name) > LONGEST_NAME or not name.isprintable():
            what = f"is {len(name)} characters long" if len(name) > LONGEST_NAME else "cannot be printed"
            raise damaged(path, f"holds a tensor whose name {what} ({shown(name)})")
