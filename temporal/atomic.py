"""Files that are written whole or not at all."""

import os
import secrets
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replace_on_success(path):
    """A temporary path beside `path`, flushed to the disk and renamed to it on success, removed on failure or cancel."""
    path = Path(path)
    temporary = path.with_name(f".{path.stem}.{secrets.token_hex(4)}.part{path.suffix}")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_atomically(path, write):
    """Call `write(temporary path)`, then rename that file to `path`; makes the folder."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with replace_on_success(path) as temporary:
        write(temporary)


def write_text(path, text):
    """Write a text file whole, in UTF-8."""
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
