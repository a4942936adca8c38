"""Opening a safetensors file. Its header is checked against the file before any tensor is read."""

import json
import math
import struct
from collections.abc import Iterable, Iterator, Mapping
from io import BufferedReader
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from .contents import Contents, Stamp, damaged, first_line

ENDINGS = (".safetensors", ".sft")
LARGEST_HEADER = 16_000_000     # bytes; headers of published files are below a million
MOST_SIZES = 16                 # dimensions of a tensor
BITS = {"BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "I16": 16, "U16": 16, "F16": 16,
        "BF16": 16, "I32": 32, "U32": 32, "F32": 32, "I64": 64, "U64": 64, "F64": 64, "C64": 64}
TYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
         "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I64": torch.int64, "I32": torch.int32,
         "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8}      # the library reads the others
STORED = TYPES | {"BOOL": torch.bool}
NAMES = {dtype: name for name, dtype in STORED.items()}


def is_safetensors(head: bytes) -> bool:
    """Whether a file begins as a safetensors file. head: its first bytes."""
    return len(head) > 8 and head[8:9] == b"{" and 2 <= struct.unpack("<Q", head[:8])[0] <= LARGEST_HEADER


def open_safetensors(path: Path) -> Contents:
    """Open a file. Raises VideoLDMError if it is damaged."""
    stamp = Stamp(path)
    entries, start = header_of(path)
    metadata = entries.pop("__metadata__", {})

    def each(keys: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        stamp.check()
        with open(path, "rb") as file:
            for key in keys:
                known = entries[key]["dtype"] in TYPES
                yield key, read_tensor(path, file, entries[key], start) if known else read_by_library(path, key)

    return Contents(path, {key: tuple(entry["shape"]) for key, entry in entries.items()},
                    {key: STORED.get(entry["dtype"]) for key, entry in entries.items()}, metadata, each)


def read_tensor(path: Path, file: BufferedReader, entry: dict, start: int) -> Tensor:
    """The tensor of an entry. The library would map the file, and its pages would count beside what is made of them.

    Args:
        path: of the file, for the message.
        file: the open file.
        entry: the tensor's entry of the header.
        start: where the tensors begin in the file.
    """
    first, last = entry["data_offsets"]
    content = torch.empty(last - first, dtype=torch.uint8)
    file.seek(start + first)
    if file.readinto(content.numpy()) != last - first:
        raise damaged(path, "breaks off while it is read")
    return content.view(TYPES[entry["dtype"]]).reshape(entry["shape"])


def read_by_library(path: Path, key: str) -> Tensor:
    """A tensor of a dtype that read_tensor does not know."""
    try:
        with safe_open(str(path), framework="pt", device="cpu") as file:
            return file.get_tensor(key).clone()
    except Exception as error:      # safetensors raises its own class, which has moved between versions
        raise damaged(path, f"cannot be read ({first_line(error)})") from None


def header_of(path: Path) -> tuple[dict, int]:
    """The entries of the header, and where the tensors begin.

    Raises VideoLDMError unless the tensors fill the file exactly.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = struct.unpack("<Q", file.read(8))[0]
        header = file.read(min(length, LARGEST_HEADER))
    if len(header) < length:
        raise damaged(path, f"has {size} bytes, fewer than its own header")
    entries = parsed_header(header)
    if entries is None:
        raise damaged(path, "has a header that cannot be read")
    due = 8 + length + last_byte(path, {key: entry for key, entry in entries.items() if key != "__metadata__"})
    if size != due:
        raise damaged(path, f"has {size} bytes where its header announces {due}")
    return entries, 8 + length


def parsed_header(header: bytes) -> dict | None:
    """The entries of a header. None: it does not follow the format."""
    try:
        entries = json.loads(header, object_pairs_hook=without_repeats)
    except (ValueError, RecursionError):
        return None
    if not isinstance(entries, dict):
        return None
    tensors = [entry for key, entry in entries.items() if key != "__metadata__"]
    metadata = entries.get("__metadata__", {})
    plain = isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())
    return entries if plain and all(map(describes_tensor, tensors)) else None


def without_repeats(pairs: list[tuple]) -> dict:
    """A dictionary of the pairs. Raises ValueError if a name occurs twice."""
    entries = dict(pairs)
    if len(entries) < len(pairs):
        raise ValueError("a name occurs twice")
    return entries


def describes_tensor(entry: Any) -> bool:
    """Whether an entry of the header describes a tensor."""
    if not isinstance(entry, dict) or not isinstance(entry.get("dtype"), str):
        return False
    shape, offsets = entry.get("shape"), entry.get("data_offsets")
    if not (isinstance(shape, list) and isinstance(offsets, list) and len(offsets) == 2 and len(shape) <= MOST_SIZES):
        return False
    return all(type(number) is int and 0 <= number < 2 ** 48 for number in shape + offsets)


def last_byte(path: Path, entries: dict) -> int:
    """The offset at which the tensors end.

    Raises VideoLDMError if there are gaps or overlaps, or if a tensor is not as long as its shape says.
    """
    end = 0
    for key, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
        first, last = entry["data_offsets"]
        bits = BITS.get(entry["dtype"])     # the library checks dtypes that are newer than this list
        if first != end or last < first:
            raise damaged(path, f"has a gap or an overlap in front of the tensor {first_line(key)}")
        if bits and bits * math.prod(entry["shape"]) != 8 * (last - first):
            raise damaged(path, f"has {last - first} bytes for the tensor {first_line(key)} of shape {entry['shape']} "
                                f"and type {first_line(entry['dtype'])}")
        end = last
    return end


# Writing

def write_tensors(path: Path, kinds: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
                  tensors: Iterable[tuple[str, Tensor]], metadata: Mapping[str, str]) -> None:
    """Write a file tensor by tensor. Memory holds one of them at a time. The library's function needs all at once.

    Args:
        path: of the file.
        kinds: {name: (dtype, shape)} of the tensors.
        tensors: the same tensors by name, in any order.
        metadata: of the file.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    # Wide types come first, so that each tensor begins at a multiple of its element's size.
    for name in sorted(kinds, key=lambda name: -kinds[name][0].itemsize):
        dtype, shape = kinds[name]
        first, end = end, end + dtype.itemsize * math.prod(shape)
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [first, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, tensor in tensors:
            file.seek(8 + len(text) + header[name]["data_offsets"][0])
            file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
        file.truncate(8 + len(text) + end)
