"""Any model file that the pack takes, as a safetensors file that says what it is.

The tensors are the file's own, to the bit, under the file's own names. Of a whole checkpoint the network alone is
written, and what stood beside it is reported. Memory holds one copy of the file at most. The metadata that the file
has stays, and these entries are added where they are known:

    video_ldm.conversion        the version of these entries
    video_ldm.kind, video_ldm.title     what the file is
    video_ldm.licence           as the authors of the weights state it
    video_ldm.base              the image model
    video_ldm.frames, video_ldm.fps     of the clips it was trained on
    video_ldm.source, video_ldm.source_sha256       the file that it was made from
"""

import hashlib
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .atomic import StrPath, write_atomically
from .errors import VideoLDMError
from .families import identify_keys, load_supported
from .families.sparsectrl import SparseControlFile
from .formats.contents import Contents, file_name, first_line
from .formats.files import TensorFile, open_contents, tensor_file
from .formats.metadata import shown
from .formats.safetensors_files import ENDINGS, NAMES, write_tensors
from .formats.temporal_file import Identified, dtype_name
from .formats.video_network import VideoNetwork

VERSION = "1"
MARK = "video_ldm."
NETWORK = "model.diffusion_model."      # in front of a network's names in a whole checkpoint
BLOCK = 2 ** 22                         # bytes that are hashed at a time
LARGEST_HEADER = 2 ** 20                # bytes on the disk that a file may need beside its tensors
LOADED, HASHED = 0.3, 0.6               # the share of the whole work that is done after loading, and after hashing

Told = Callable[[float], None]          # is told the share that is done, and may raise to cancel


@dataclass(frozen=True)
class Converted:
    """What was written."""

    path: Path
    found: Identified
    metadata: dict[str, str]
    tensors: int                        # how many were written
    left_out: dict[str, int]            # {first part of a name: tensors of such names that were left out}


def convert(source: StrPath, target: StrPath, told: Told = lambda share: None,
            check: Callable[[Any], None] = lambda loaded: None) -> Converted:
    """Write the content of a file to a new safetensors file, completely or not at all.

    Args:
        source: the file.
        target: the new file.
        told: is told the share that is done, from 0 to 1. It may raise an exception to cancel.
        check: is given what the file's loader makes of it, and raises VideoLDMError for what the pack cannot use.

    Raises VideoLDMError for a file that the pack does not take, for one that is such a safetensors file already, and
    for a target that exists.
    """
    source, target = Path(source), Path(target)
    check_target(target)
    contents = open_contents(source)
    refuse_converted(contents)
    file, used = recording(tensor_file(contents))
    found, about = facts_of(file, used, check)
    told(LOADED)
    keys = kept_keys(file, used, found)
    metadata = {**contents.metadata, **about, f"{MARK}source": source.name,
                f"{MARK}source_sha256": sha256_of(source, lambda share: told(LOADED + (HASHED - LOADED) * share))}
    check_same(file, keys, found, metadata)
    write(contents, keys, target, metadata, told)
    return Converted(target, found, metadata, len(keys), left_out(set(contents.shapes) - set(keys)))


# What is refused

def check_target(target: Path) -> None:
    """Raise VideoLDMError for a file that exists, and for one with another ending."""
    if target.suffix != ENDINGS[0]:
        raise VideoLDMError(f"The new file is named {file_name(target)}; its name must end in {ENDINGS[0]}.")
    if os.path.lexists(target):
        raise exists(target)


def exists(target: Path) -> VideoLDMError:
    return VideoLDMError(f"There is a file {file_name(target)} already, and nothing is written over it. Choose another "
                         "name, or delete that file.")


def refuse_converted(contents: Contents) -> None:
    """Raise VideoLDMError for a file that was converted before, and for one that this pack wrote."""
    metadata = contents.metadata
    if f"{MARK}conversion" in metadata or metadata.get("format", "").startswith("video_ldm"):
        raise VideoLDMError(f"{file_name(contents.path)} is a safetensors file with its metadata already. It needs no "
                            "conversion.")


# What the file is

def recording(file: TensorFile) -> tuple[TensorFile, set[str]]:
    """The file, and a set that holds the bare keys of all tensors that were read from it."""
    used: set[str] = set()

    def read(keys: Iterable[str]) -> dict[str, Tensor]:
        keys = list(keys)
        used.update(keys)
        return file.read(keys)
    return replace(file, read=read), used


def facts_of(file: TensorFile, used: set[str], check: Callable[[Any], None]) -> tuple[Identified, dict[str, str]]:
    """What the file is, and entries of the metadata. `used` is told about the spatial weights, which are not read."""
    found, loaded = load_supported(file)
    check(loaded)
    about = loaded
    if isinstance(loaded, VideoNetwork):
        used.update(loaded.spatial_names.values())
        about = loaded.layers
    elif isinstance(loaded, SparseControlFile):
        used.update(loaded.spatial_names.values())
    base, params = getattr(about, "base", None), getattr(about, "params", None)
    entries = {"conversion": VERSION, "kind": found.kind, "title": found.title,
               "licence": getattr(about, "licence", ""),
               "base": base.family if base else getattr(about, "latents", ""),
               "frames": getattr(params, "frames", None) or getattr(about, "frames", None),
               "fps": getattr(about, "fps", None)}
    return found, {MARK + entry: f"{value:g}" if isinstance(value, float) else str(value)
                   for entry, value in entries.items() if value}


def kept_keys(file: TensorFile, used: set[str], found: Identified) -> list[str]:
    """The file's own keys that are written: all, but of a whole checkpoint those of the network or of the decoder."""
    whole = any(raw.startswith(NETWORK) for raw in file.raw_keys)
    network = found.takes != "decoder"
    return [raw for key, raw in zip(file.shapes, file.raw_keys)
            if not whole or key in used or (network and raw.startswith(NETWORK))]


def check_same(file: TensorFile, keys: list[str], found: Identified, metadata: dict[str, str]) -> None:
    """Raise VideoLDMError if what is to be written would be taken for something else than the file."""
    shapes = file.raw_shapes
    kept = {key: shapes[key] for key in keys}
    again = identify_keys(kept, metadata)
    if found.takes != "decoder" and again != found:
        raise VideoLDMError(f"{file.name} is {found.title}, and without what stands beside its network it would be "
                            f"{again.title}. Use the file as it is.")


def left_out(keys: Iterable[str]) -> dict[str, int]:
    """{first part of a name: number of such names}."""
    parts = [key.split(".")[0] for key in keys]
    return {part: parts.count(part) for part in sorted(set(parts))}


def sha256_of(path: Path, told: Told) -> str:
    """The checksum of a file. told: as in `convert`, for this work alone."""
    digest, size, done = hashlib.sha256(), max(path.stat().st_size, 1), 0
    with open(path, "rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
            done += len(block)
            told(min(done / size, 1.0))
    return digest.hexdigest()


# Writing

def write(contents: Contents, keys: list[str], target: Path, metadata: dict[str, str], told: Told) -> None:
    """Write tensors of an open file, one after another.

    Args:
        contents: the open file.
        keys: the file's own keys.
        target, told: as in `convert`.
        metadata: of the new file.
    """
    kinds = {key: (dtype_of(contents, key), contents.shapes[key]) for key in keys}
    sizes = {key: dtype.itemsize * torch.Size(shape).numel() for key, (dtype, shape) in kinds.items()}
    total = max(sum(sizes.values()), 1)
    check_space(target, total)

    def tensors() -> Iterator[tuple[str, Tensor]]:
        done = 0
        for key, tensor in contents.each_finite(keys):
            yield key, tensor
            done += sizes[key]
            told(HASHED + (1 - HASHED) * done / total)

    def to(temporary: Path) -> None:
        write_tensors(temporary, kinds, tensors(), metadata)
        if os.path.lexists(target):         # it was made meanwhile
            raise exists(target)
    try:
        write_atomically(target, to)
    except VideoLDMError:
        raise
    except OSError as error:
        raise VideoLDMError(f"{file_name(target)} cannot be written ({error.strerror or first_line(error)}). Make room "
                            "on the disk, and check that ComfyUI may write there.") from error


def dtype_of(contents: Contents, key: str) -> torch.dtype:
    """The dtype of a tensor. Raises VideoLDMError for one that a safetensors file cannot hold."""
    dtype = contents.dtypes[key]
    if dtype is None or dtype not in NAMES:
        what = dtype_name(dtype) if dtype else "a type that this pack does not know"
        raise VideoLDMError(f"{file_name(contents.path)} holds {shown(key)} as {what}, which is no type of weights. "
                            "Use the original float16 or float32 file.")
    return dtype


def check_space(target: Path, size: int) -> None:
    """Raise VideoLDMError if the disk has less room than the file needs."""
    folder = next((folder for folder in target.resolve().parents if folder.is_dir()), None)
    free = shutil.disk_usage(folder).free if folder else 0
    if size + LARGEST_HEADER > free:
        raise VideoLDMError(f"{file_name(target)} will take {size / 1e9:.1f} GB, and the disk has {free / 1e9:.1f} GB "
                            "free. Make room on it.")
