"""Opening a model file without running what is in it: names, shapes and metadata first, tensors when asked for.

Every way in which a file can be the wrong thing is refused with one sentence.
"""

import json
import pickle
import re
import struct
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Iterable

import torch
from safetensors import safe_open
from torch import Tensor

from ..errors import VideoLDMError
from .tensor_names import bare_names

SAFETENSORS = (".safetensors", ".sft")
TORCH = (".ckpt", ".pt", ".pth", ".bin")
WRAPPERS = ("ema", "state_dict", "module", "model_state_dict", "params_ema", "params", "model")
HEADER_LIMIT = 100_000_000      # safetensors' own
PROBE = 512                     # bytes that tell a web page or a pointer from weights


@dataclass
class TensorFile:
    """An open file: shapes and metadata by bare key; `tensors` reads those that are asked for."""

    path: Path
    shapes: dict[str, tuple[int, ...]]
    metadata: dict[str, str]
    raw_keys: tuple[str, ...]
    read: Callable[[Iterable[str]], dict[str, Tensor]]

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def raw_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes under the names that the file itself uses, which tell a whole checkpoint from its UNet."""
        return dict(zip(self.raw_keys, self.shapes.values()))


def open_file(path) -> TensorFile:
    """Open a `.safetensors` or torch file; raises VideoLDMError for whatever is neither."""
    path = Path(path)
    head = probe(path)
    if is_safetensors(head):
        return open_safetensors(path)
    if path.suffix.lower() in SAFETENSORS:
        raise VideoLDMError(wrong_safetensors(path, head))
    return open_torch(path, head)


def probe(path: Path) -> bytes:
    """First bytes of a file that may hold weights, or a refusal."""
    if path.is_dir():
        raise VideoLDMError(f"{path.name} is a folder, not a model file. Choose the .safetensors or .ckpt file "
                            "inside it.")
    if not path.exists():
        raise VideoLDMError(f"There is no file {path.name} at {path}. Refresh the list of files, or put it back.")
    if path.suffix.lower() not in SAFETENSORS + TORCH:
        raise VideoLDMError(f"{path.name} ends in {path.suffix or 'nothing'}, which is no model file that this pack "
                            f"opens. It takes {', '.join(SAFETENSORS[:1] + TORCH)}.")
    with open(path, "rb") as file:
        head = file.read(PROBE)
    if not head:
        raise VideoLDMError(f"{path.name} is empty (0 bytes): its download did not happen. Download it again.")
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith((b"<!doctype", b"<html", b"<head", b"<?xml")):
        raise VideoLDMError(f"{path.name} is a web page saved under a model's name, not weights: the link led to a "
                            "page. Download the file itself (a page may ask you to log in or to accept a licence "
                            "first).")
    if head.startswith(b"version https://git-lfs"):
        raise VideoLDMError(f"{path.name} is a git-lfs pointer of a few lines, not the weights it points to. Run "
                            "'git lfs pull' in its repository, or download the file from the repository's page.")
    if head.startswith(b"GGUF"):
        raise VideoLDMError(f"{path.name} is a GGUF file (quantised weights), which this pack does not take. Use the "
                            "original .safetensors or .ckpt file.")
    return head


# safetensors

def is_safetensors(head: bytes) -> bool:
    return len(head) > 8 and head[8:9] == b"{" and 2 <= struct.unpack("<Q", head[:8])[0] <= HEADER_LIMIT


def wrong_safetensors(path: Path, head: bytes) -> str:
    if head.startswith((b"PK\x03\x04", b"\x80")):
        return (f"{path.name} is named .safetensors but is a torch (pickle) file. Rename it to end in .ckpt if you "
                "trust where it comes from.")
    return damaged(path, "does not begin as a safetensors file does")


def damaged(path: Path, why: str) -> str:
    return f"{path.name} is damaged or only partly downloaded: it {why}. Download it again."


def safetensors_header(path: Path) -> dict:
    """Header of a safetensors file, checked against the file's size."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = struct.unpack("<Q", file.read(8))[0]
        header = file.read(length)
    if len(header) < length:
        raise VideoLDMError(damaged(path, f"has {size} bytes, fewer than its own header"))
    entries = parsed_header(header)
    if entries is None:
        raise VideoLDMError(damaged(path, "has a header that cannot be read"))
    due = 8 + length + max((e["data_offsets"][1] for k, e in entries.items() if k != "__metadata__"), default=0)
    if size != due:
        raise VideoLDMError(damaged(path, f"has {size} bytes where its header announces {due}"))
    return entries


def parsed_header(header: bytes) -> dict | None:
    """The header's entries, None where they are not what the format says."""
    try:
        entries = json.loads(header)
    except (ValueError, RecursionError):
        return None
    if not isinstance(entries, dict):
        return None
    tensors = [entry for key, entry in entries.items() if key != "__metadata__"]
    metadata = entries.get("__metadata__", {})
    plain = isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())
    return entries if plain and all(map(describes_tensor, tensors)) else None


def describes_tensor(entry) -> bool:
    if not isinstance(entry, dict) or not isinstance(entry.get("dtype"), str):
        return False
    shape, offsets = entry.get("shape"), entry.get("data_offsets")
    if not (isinstance(shape, list) and isinstance(offsets, list) and len(offsets) == 2):
        return False
    return all(type(number) is int and number >= 0 for number in shape + offsets)


def open_safetensors(path: Path) -> TensorFile:
    entries = safetensors_header(path)
    metadata = entries.pop("__metadata__", {})
    names = bare_names(entries)

    def read(keys: Iterable[str]) -> dict[str, Tensor]:
        try:
            with safe_open(str(path), framework="pt", device="cpu") as file:
                return {key: file.get_tensor(names[key]) for key in keys}
        except Exception as error:      # safetensors raises its own class, which has moved between versions
            raise VideoLDMError(damaged(path, f"cannot be read ({error})")) from None

    shapes = {key: tuple(entries[raw]["shape"]) for key, raw in names.items()}
    return TensorFile(path, shapes, metadata, tuple(names.values()), read)


# torch files

def open_torch(path: Path, head: bytes) -> TensorFile:
    found = flat_tensors(load_weights(path, head))
    if not found:
        raise VideoLDMError(f"{path.name} holds no named tensors, so it is no model file of any kind that this pack "
                            "knows.")
    names = bare_names(found)
    shapes = {key: tuple(found[raw].shape) for key, raw in names.items()}
    return TensorFile(path, shapes, {}, tuple(names.values()), lambda keys: {key: found[names[key]] for key in keys})


def load_weights(path: Path, head: bytes):
    """What `torch.save` wrote, with weights and plain containers only: a pickle that needs code is not run."""
    zipped = head.startswith(b"PK\x03\x04")
    if zipped:
        check_archive(path)
    elif not head.startswith(b"\x80"):
        raise VideoLDMError(f"{path.name} is neither a torch file nor a safetensors file: it begins with "
                            f"{head[:8]!r}. Download it again, and check what the link leads to.")
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except pickle.UnpicklingError as error:
        raise VideoLDMError(needs_code(path, str(error))) from None
    except (EOFError, RuntimeError, ValueError, OSError, KeyError, IndexError, AttributeError, TypeError,
            AssertionError, UnicodeDecodeError, struct.error, OverflowError, MemoryError) as error:
        raise VideoLDMError(damaged(path, f"breaks off or cannot be read ({first_line(error)})")) from None


def check_archive(path: Path):
    """Tell a torch archive from other zip files and from one that breaks off (its directory is at its end)."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.namelist()
    except (zipfile.BadZipFile, NotImplementedError, OSError, ValueError):
        raise VideoLDMError(damaged(path, "is an archive without an end")) from None
    if any(member.endswith("constants.pkl") for member in members):
        raise VideoLDMError(f"{path.name} is a TorchScript program, not a file of weights. This pack runs no code "
                            "from a model file: use the plain weights.")
    if not any(member.endswith("data.pkl") for member in members):
        raise VideoLDMError(f"{path.name} is a zip archive of other files, not a torch file. Unpack it and choose "
                            "the model file inside.")


def needs_code(path: Path, message: str) -> str:
    wanted = re.search(r"GLOBAL ([\w.]+)", message) or re.search(r"class ([\w.]+)", message)
    what = f" ({wanted.group(1)})" if wanted else ""
    if not wanted and "truncated" in message:
        return damaged(path, "breaks off")
    return (f"{path.name} is a pickle that needs Python code to be opened{what}, and this pack runs no code from a "
            "model file. Use a .safetensors file of the same weights, or convert it where you trust it.")


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]


def flat_tensors(loaded) -> dict[str, Tensor]:
    """Peel the dictionaries that training scripts wrap weights in (formats.md, 1.5), and drop what is no tensor."""
    while isinstance(loaded, dict):
        wrapper = next((w for w in WRAPPERS if isinstance(loaded.get(w), dict)), None)
        if wrapper is None:
            break
        loaded = loaded[wrapper]
    if not isinstance(loaded, dict):
        return {}
    flat = {}
    for key, value in loaded.items():
        if isinstance(value, Tensor):
            flat[str(key)] = value
        elif isinstance(value, dict):   # as in embeddings: {"string_to_param": {"*": ...}}
            flat.update({f"{key}.{name}": inner for name, inner in value.items() if isinstance(inner, Tensor)})
    return flat
