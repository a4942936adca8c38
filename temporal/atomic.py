"""Writing files completely or not at all."""

import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

StrPath = str | os.PathLike[str]


@contextmanager
def replace_on_success(path: StrPath) -> Iterator[Path]:
    """Yield a temporary path beside `path`. The caller writes the file there.

    On success the file is flushed to the disk and renamed to `path`. On failure or cancel it is removed.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.stem}.{secrets.token_hex(4)}.part{path.suffix}")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def folder_on_success(path: StrPath) -> Iterator[Path]:
    """Yield a new, empty folder beside `path`. The caller fills it.

    On success it is renamed to `path`, which must not exist. On failure or cancel it is removed with its files.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    temporary.mkdir()
    try:
        yield temporary
        os.rename(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_atomically(path: StrPath, write: Callable[[Path], object]) -> None:
    """Call `write(temporary path)`, then rename that file to `path`. The folder is created."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with replace_on_success(path) as temporary:
        write(temporary)


def write_text(path: StrPath, text: str) -> None:
    """Write a text file in UTF-8, completely or not at all."""
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
