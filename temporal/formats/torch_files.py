"""Opening files of `torch.save` that hold weights and plain containers only. No code from a file is run.

`torch.load` runs with `weights_only`. A hostile file can still make it work without end or fill the memory. So the
pickle is checked before it is loaded, and the tensors are checked after it.
"""

import io
import pickle
import pickletools
import re
import struct
import tarfile
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import VideoLDMError
from .contents import LONGEST_NAME, Contents, Stamp, damaged, file_name, first_line
from .metadata import shown

ENDINGS = (".ckpt", ".pt", ".pth", ".bin")
WRAPPERS = ("ema", "ema_model", "model_ema", "state_dict", "module", "model_state_dict", "params_ema", "params",
            "model")
DEEPEST = 8                     # nested dictionaries around the weights, and nested tuples
LARGEST_PICKLE = 16_000_000     # bytes of names and sizes; those of published files are below a million
LEGACY_PICKLES = 5              # magic number, protocol, system, weights, keys of the storages
SMALLEST_PART, PARTS = 2 ** 25, 32      # a file is read in parts of these bytes at least, and in so many at most
SHARED = 4                      # tensors that share memory may together be this many times as large as the file


def open_torch(path: Path, head: bytes) -> Contents:
    """Open a file. head: its first bytes. Raises VideoLDMError if it is damaged or needs code."""
    zipped = is_archive(path, head)
    stamp = Stamp(path)
    check_pickles(path, archived_pickle(path) if zipped else legacy_pickles(path))
    reader = Reader(path, zipped, stamp)
    return Contents(path, {key: size.shape for key, size in reader.sizes.items()},
                    {key: size.dtype for key, size in reader.sizes.items()}, {}, reader.each)


@dataclass(frozen=True)
class Size:
    """The size of a tensor in the file."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    nbytes: int     # of its elements
    stored: int     # bytes of the storage that holds them. Other tensors may have the same storage


class Reader:
    """Reads tensors from a file whose pickles have been checked.

    An archive is mapped, which takes no memory for what is not read. What is read stays in memory while the file is
    mapped. So the file is mapped anew for each part. A file in torch's older format is read as a whole. What was
    given away of it is read again when it is asked for a second time.
    """

    def __init__(self, path: Path, zipped: bool, stamp: Stamp) -> None:
        self.path, self.zipped, self.stamp = path, zipped, stamp
        self.part = max(SMALLEST_PART, stamp.seen[1] // PARTS)
        self.kept: dict[str, Tensor] = {}       # of a file in the older format: what was not given away
        self.alone: set[str] = set()            # of such a file: tensors that have their storage for themselves
        found = self.load()
        if not found:
            raise VideoLDMError(f"{file_name(path)} holds no named tensors, so it is no model file of any kind that "
                                "this pack knows.")
        for key, tensor in found.items():
            check_plain(path, key, tensor)
        self.sizes = {key: Size(tuple(tensor.shape), tensor.dtype, tensor.nbytes, tensor.untyped_storage().nbytes())
                      for key, tensor in found.items()}
        if not zipped:
            users = Counter(tensor.untyped_storage().data_ptr() for tensor in found.values())
            self.alone = {key for key, tensor in found.items() if tensor.is_contiguous()
                          and users[tensor.untyped_storage().data_ptr()] == 1
                          and tensor.nbytes == tensor.untyped_storage().nbytes()}
            self.kept = found

    def load(self) -> dict[str, Tensor]:
        """All tensors. Those of an archive are views of the mapped file."""
        return flat_tensors(self.path, load_weights(self.path, self.zipped))

    def each(self, keys: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """Read tensors, as in Contents."""
        keys = list(keys)
        check_sizes(self.path, {key: self.sizes[key] for key in keys})
        for part in self.parts(keys) if self.zipped else [keys]:
            yield from self.each_of_part(part)

    def each_of_part(self, keys: list[str]) -> Iterator[tuple[str, Tensor]]:
        """Read tensors with the file mapped once."""
        self.stamp.check()
        if self.zipped:
            found = self.load()
        else:
            if not all(key in self.kept for key in keys):
                self.kept.clear()       # before, so that memory never holds two copies
                self.kept = self.load()
            found = self.kept
        for key in keys:
            tensor = found.pop(key).detach()
            yield key, tensor if key in self.alone else tensor.clone(memory_format=torch.contiguous_format)

    def parts(self, keys: list[str]) -> Iterator[list[str]]:
        """The keys in groups whose tensors take about `part` bytes."""
        group: list[str] = []
        size = 0
        for key in keys:
            if group and size + self.sizes[key].nbytes > self.part:
                yield group
                group, size = [], 0
            group.append(key)
            size += self.sizes[key].nbytes
        if group:
            yield group


def is_archive(path: Path, head: bytes) -> bool:
    """Whether a file is an archive, and not in torch's older format. Raises VideoLDMError if it is neither."""
    zipped = head.startswith(b"PK\x03\x04")
    if not zipped and not head.startswith(b"\x80"):
        raise VideoLDMError(f"{file_name(path)} is neither a torch file nor a safetensors file: it begins with "
                            f"{head[:8]!r}. Download it again, and check what the link leads to.")
    return zipped


def load_weights(path: Path, zipped: bool) -> Any:
    """What `torch.load` returns for a file. Raises VideoLDMError if it is damaged or needs code."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except pickle.UnpicklingError as error:
        raise needs_code(path, str(error)) from None
    except Exception as error:          # damaged files make torch raise errors of any class
        raise damaged(path, f"breaks off or cannot be read ({first_line(error)})") from None


def needs_code(path: Path, message: str) -> VideoLDMError:
    """The error for a pickle that needs code. message: torch's, which names the class."""
    wanted = re.search(r"GLOBAL ([\w.]+)", message) or re.search(r"class ([\w.]+)", message)
    what = f" ({shown(wanted.group(1))})" if wanted else ""
    if not wanted and "truncated" in message:
        return damaged(path, "breaks off")
    return VideoLDMError(f"{file_name(path)} is a pickle that needs Python code to be opened{what}, and this pack runs "
                         "no code from a model file. Use a .safetensors file of the same weights, or convert it where "
                         "you trust it.")


# Before torch.load

def archived_pickle(path: Path) -> bytes:
    """The pickle of a torch archive. Raises VideoLDMError for other zip files and for damaged ones."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, OSError, ValueError, struct.error, OverflowError, MemoryError):
        raise damaged(path, "is an archive without an end") from None
    names = [member.filename.lower() for member in members]     # torch ignores case
    if any(name.endswith("constants.pkl") for name in names):
        raise VideoLDMError(f"{file_name(path)} is a TorchScript program, not a file of weights. This pack runs no "
                            "code from a model file: use the plain weights.")
    pickles = [member for member, name in zip(members, names) if name.endswith("data.pkl")]
    if not pickles:
        raise VideoLDMError(f"{file_name(path)} is a zip archive of other files, not a torch file. Unpack it and "
                            "choose the model file inside.")
    check_members(path, members, names)
    return stored_bytes(path, pickles[0])


def check_members(path: Path, members: list[zipfile.ZipInfo], names: list[str]) -> None:
    """Raise VideoLDMError for compressed or overlapping members, which could expand to any size.

    torch.save never writes such archives.
    """
    packed = next((member for member in members if member.compress_type != zipfile.ZIP_STORED), None)
    if packed is not None:
        raise VideoLDMError(f"{file_name(path)} is a torch archive that was compressed afterwards "
                            f"({shown(packed.filename)}), which torch.save does not do. Use the original file.")
    if len(set(names)) < len(names) or sum(member.file_size for member in members) > path.stat().st_size:
        raise damaged(path, "is an archive whose parts overlap")


def stored_bytes(path: Path, member: zipfile.ZipInfo) -> bytes:
    """The bytes of a member. ZipFile.read would check the checksum, which torch may leave out."""
    if member.file_size > LARGEST_PICKLE:
        raise too_many_names(path)
    with open(path, "rb") as file:
        file.seek(max(member.header_offset, 0))
        head = file.read(30)
        if len(head) < 30 or member.header_offset < 0:
            raise damaged(path, "is an archive whose parts are not where it says")
        file.seek(sum(struct.unpack("<HH", head[26:30])), io.SEEK_CUR)
        return file.read(member.file_size)


def legacy_pickles(path: Path) -> bytes:
    """The beginning of a file in torch's format before 1.6, which is pickles followed by weights."""
    try:
        tarfile.open(path, mode="r:").close()
    except (tarfile.TarError, OSError, ValueError):
        with open(path, "rb") as file:
            return file.read(LARGEST_PICKLE)
    raise VideoLDMError(f"{file_name(path)} is a tar archive, torch's form before version 0.1.10, which this pack does "
                        "not open. Load and save it with a newer torch.")


def too_many_names(path: Path) -> VideoLDMError:
    """The error for a file with an oversized pickle."""
    return VideoLDMError(f"{file_name(path)} has more than {LARGEST_PICKLE // 1_000_000} MB of names and sizes beside "
                         "its weights, more than any model that this pack knows. Choose another file.")


def check_pickles(path: Path, content: bytes) -> None:
    """Raise VideoLDMError for pickles that break off, that torch does not read, or with deeply nested tuples."""
    stream = io.BytesIO(content)
    for _ in range(LEGACY_PICKLES):
        if stream.tell() == len(content):
            return
        try:
            check_tuples(path, stream)
        except (ValueError, IndexError, KeyError, struct.error, OverflowError, UnicodeDecodeError) as error:
            if isinstance(error, VideoLDMError):
                raise
            if len(content) == LARGEST_PICKLE:
                raise too_many_names(path) from None
            raise damaged(path, f"breaks off or cannot be read ({first_line(error)})") from None


def check_tuples(path: Path, stream: io.BytesIO) -> None:
    """Raise VideoLDMError for deeply nested tuples in one pickle.

    A tuple of two equal tuples of two equal tuples, and so on, takes few bytes. torch.load would hash it without end
    where it is the key of a dictionary.

    The pickle's stack is followed with depths in place of values. Anything but a tuple has depth 0. A tuple is one
    deeper than its deepest part.
    """
    stack: list[int] = []
    marks: list[int] = []
    memo: dict[Any, int] = {}
    for code, value, _ in pickletools.genops(stream):
        if code.name == "PROTO" and value not in (2, 3):
            raise needs_code(path, "")          # torch does not know the instructions of newer protocols
        if code.name in ("GLOBAL", "INST") and len(str(value)) > LONGEST_NAME:
            raise needs_code(path, f"GLOBAL {value}")       # torch would search its own message without end
        if code.name == "MARK":
            marks.append(len(stack))
        elif code.name in ("BINPUT", "LONG_BINPUT"):
            memo[value] = stack[-1]
        elif code.name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[value])
        elif code.name in ("TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"):
            start = marks.pop() if code.name == "TUPLE" else len(stack) - int(code.name[-1])
            stack[start:] = [1 + max(stack[start:], default=0)]
            if stack[-1] > DEEPEST:
                raise damaged(path, f"holds tuples nested more than {DEEPEST} deep")
        else:
            taken = code.stack_before
            if pickletools.markobject in taken:
                del stack[marks.pop():]
                taken = taken[: taken.index(pickletools.markobject)]
            stack[len(stack) - len(taken):] = [0] * len(code.stack_after)


# After torch.load

def flat_tensors(path: Path, loaded: Any) -> dict[str, Tensor]:
    """{name: tensor} of a loaded file, without the dictionaries around them (docs/formats.md#opening-a-file).

    Everything else in the file is dropped. Raises VideoLDMError for too many dictionaries around the weights.
    """
    for _ in range(DEEPEST):
        wrapper = next((w for w in WRAPPERS if isinstance(loaded, dict) and isinstance(loaded.get(w), dict)), None)
        if wrapper is None:
            break
        loaded = loaded[wrapper]
    else:
        raise damaged(path, f"wraps its weights in more than {DEEPEST} dictionaries, or in themselves")
    if not isinstance(loaded, dict):
        return {}
    flat = {}
    for key, value in loaded.items():
        if isinstance(key, str) and isinstance(value, Tensor):
            flat[key] = value
        elif isinstance(key, str) and isinstance(value, dict):  # as in embeddings: {"string_to_param": {"*": ...}}
            flat.update({f"{key}.{name}": inner for name, inner in value.items()
                         if isinstance(name, str) and isinstance(inner, Tensor)})
    return flat


def check_plain(path: Path, key: str, tensor: Tensor) -> None:
    """Raise VideoLDMError for anything but a plain dense tensor. On others most operations can fail."""
    kind = next((kind for kind, applies in (
        (f"a {type(tensor).__name__}", type(tensor) not in (Tensor, nn.Parameter)),
        ("a nested tensor", tensor.is_nested), ("a quantised tensor", tensor.is_quantized),
        ("a sparse tensor", tensor.layout != torch.strided), ("a tensor without values", tensor.device.type != "cpu"),
        ("a conjugate or negative view", tensor.is_conj() or tensor.is_neg()),
    ) if applies), None)
    if kind is not None:
        raise VideoLDMError(f"{file_name(path)} holds {shown(key)} as {kind}, and this pack takes plain tensors alone. "
                            "Use the original float16 or float32 file.")


def check_sizes(path: Path, sizes: dict[str, Size]) -> None:
    """Raise VideoLDMError for tensors larger than their bytes in the file. Strides can repeat bytes to any size."""
    for key, size in sizes.items():
        if size.nbytes > size.stored:
            raise damaged(path, f"holds {key} of shape {list(size.shape)} as {size.stored} bytes that repeat, where "
                                f"{size.nbytes} are due")
    together = sum(size.nbytes for size in sizes.values())
    if together > SHARED * path.stat().st_size:
        raise damaged(path, f"has {path.stat().st_size} bytes, and the tensors that share them would take {together}")
