"""Opening a model file without running code from it.

Opening reads names, shapes and metadata. Tensors are read later, when they are needed. Every kind of wrong file is
refused with one sentence.
"""

import os
import stat
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from ..atomic import StrPath
from ..errors import VideoLDMError
from . import safetensors_files, torch_files
from .contents import Contents, check_names, damaged, file_name, first_line
from .metadata import shown
from .tensor_names import bare, bare_names

PROBE = 512                     # first bytes of a file that are searched for web pages and other mistakes
KINDS = {stat.S_IFIFO: "a named pipe", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"}


@dataclass
class TensorFile:
    """An open file. Tensors have bare keys (tensor_names.py)."""

    path: Path
    shapes: dict[str, tuple[int, ...]]                      # by bare key
    metadata: dict[str, str]
    raw_keys: tuple[str, ...]                               # the file's own keys, in the order of `shapes`
    read: Callable[[Iterable[str]], dict[str, Tensor]]      # reads the tensors of these bare keys; refuses NaN
    # By bare key. None: a type that no weights have. Empty: not known
    dtypes: dict[str, torch.dtype | None] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return file_name(self.path)

    @property
    def raw_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes by the file's own keys. Their prefixes tell a whole checkpoint from a UNet."""
        return dict(zip(self.raw_keys, self.shapes.values()))


def open_file(path: StrPath) -> TensorFile:
    """Open a `.safetensors` or torch file. Raises VideoLDMError for any other file."""
    return tensor_file(open_contents(path))


def tensor_file(contents: Contents) -> TensorFile:
    """An open file by bare keys. Raises VideoLDMError if two of its keys are the same without their prefixes."""
    names = bare_names(contents.shapes)
    if len(names) < len(contents.shapes):
        kept = set(names.values())
        second = next(key for key in contents.shapes if key not in kept)
        raise VideoLDMError(f"{file_name(contents.path)} holds {shown(names[bare(second)], 120)} and "
                            f"{shown(second, 120)}, which name the same tensor. It was put together from two files: "
                            "use one of these.")

    def read(keys: Iterable[str]) -> dict[str, Tensor]:
        keys = list(keys)
        found = contents.read_finite(names[key] for key in keys)
        return {key: found[names[key]] for key in keys}
    shapes = {key: contents.shapes[raw] for key, raw in names.items()}
    dtypes = {key: contents.dtypes[raw] for key, raw in names.items()}
    return TensorFile(contents.path, shapes, contents.metadata, tuple(names.values()), read, dtypes)


def open_contents(path: StrPath) -> Contents:
    """Open a file like `open_file`, with the file's own keys."""
    path = Path(path)
    head = probe(path)
    try:
        contents = open_by_kind(path, head)
    except OSError as error:            # the disk failed while the file was read
        raise unopened(path, error) from None
    check_names(path, contents.shapes)
    return contents


def open_by_kind(path: Path, head: bytes) -> Contents:
    """Open a file as the kind that its first bytes show."""
    if safetensors_files.is_safetensors(head):
        return safetensors_files.open_safetensors(path)
    if path.suffix.lower() in safetensors_files.ENDINGS:
        raise wrong_safetensors(path, head)
    return torch_files.open_torch(path, head)


def check_regular(path: Path) -> None:
    """Raise VideoLDMError for anything but a regular file. Opening a pipe would wait for ever."""
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        raise VideoLDMError(f"There is no file {file_name(path)} at {path}. Refresh the list of files, or put it "
                            "back.") from None
    except (OSError, ValueError) as error:
        raise unopened(path, error) from None
    if stat.S_ISDIR(mode):
        raise VideoLDMError(f"{file_name(path)} is a folder, not a model file. Choose the .safetensors or .ckpt file "
                            "inside it.")
    if not stat.S_ISREG(mode):
        kind = KINDS.get(stat.S_IFMT(mode), "no regular file")
        raise VideoLDMError(f"{file_name(path)} is {kind}, not a model file. Choose another file.")


def unopened(path: Path, error: Exception) -> VideoLDMError:
    """The error for a file that the system cannot open."""
    reason = getattr(error, "strerror", None) or first_line(error)
    return VideoLDMError(f"{file_name(path)} cannot be opened ({reason}). Check its name, and that ComfyUI may "
                        "read it.")


def probe(path: Path) -> bytes:
    """The first bytes of a file. Raises VideoLDMError if it cannot be a model file."""
    check_regular(path)
    endings = safetensors_files.ENDINGS[:1] + torch_files.ENDINGS
    if path.suffix.lower() not in safetensors_files.ENDINGS + torch_files.ENDINGS:
        raise VideoLDMError(f"{file_name(path)} ends in {path.suffix or 'nothing'}, which is no model file that this "
                            f"pack opens. It takes {', '.join(endings)}.")
    try:
        with open(path, "rb") as file:
            head = file.read(PROBE)
    except OSError as error:
        raise unopened(path, error) from None
    if not head:
        raise VideoLDMError(f"{file_name(path)} is empty (0 bytes): its download did not happen. Download it again.")
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith((b"<!doctype", b"<html", b"<head", b"<?xml")):
        raise VideoLDMError(f"{file_name(path)} is a web page saved under a model's name, not weights: the link led to "
                            "a page. Download the file itself (a page may ask you to log in or to accept a licence "
                            "first).")
    if head.startswith(b"version https://git-lfs"):
        raise VideoLDMError(f"{file_name(path)} is a git-lfs pointer of a few lines, not the weights it points to. Run "
                            "'git lfs pull' in its repository, or download the file from the repository's page.")
    if head.startswith(b"GGUF"):
        raise VideoLDMError(f"{file_name(path)} is a GGUF file (quantised weights), which this pack does not take. Use "
                            "the original .safetensors or .ckpt file.")
    return head


def wrong_safetensors(path: Path, head: bytes) -> VideoLDMError:
    """The error for a file that is named .safetensors and is none."""
    if head.startswith((b"PK\x03\x04", b"\x80")):
        return VideoLDMError(f"{file_name(path)} is named .safetensors but is a torch (pickle) file. Rename it to end "
                             "in .ckpt if you trust where it comes from.")
    return damaged(path, "does not begin as a safetensors file does")
