"""A lock between processes: one works in a folder, the others wait and say for whom.

The operating system holds the lock for the open file. It frees the lock of a process that died at once.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

FAR = 1 << 20       # the byte that Windows locks: beyond the text, which others can then still read
POLL = 0.5          # seconds between two attempts


class Lock:
    """`with Lock(path, doing):` waits until no other process is inside, and prints once that it waits."""

    def __init__(self, path: Path, doing: str):
        self.path = path        # of the file that is locked; it stays
        self.doing = doing      # what the holder does, for the message: "sets up a ComfyUI in the same folder"
        self.file: int | None = None

    def __enter__(self) -> Lock:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            self.wait(file)
        except BaseException:
            os.close(file)
            raise
        self.file = file
        os.ftruncate(file, 0)
        os.lseek(file, 0, os.SEEK_SET)
        os.write(file, str(os.getpid()).encode())
        return self

    def __exit__(self, *error) -> None:
        if self.file is not None:
            os.ftruncate(self.file, 0)
            release(self.file)
            os.close(self.file)
        self.file = None

    def wait(self, file: int) -> None:
        """Return once this process has the lock."""
        announced = False
        while not acquire(file):
            if not announced:
                print(f"Process {self.holder() or 'unknown'} {self.doing}. Waiting for it to end.", flush=True)
                announced = True
            time.sleep(POLL)

    def holder(self) -> str:
        """The number of the process that has the lock, empty where it has not written it yet."""
        try:
            return self.path.read_text(encoding="utf-8").strip()
        except OSError:
            return ""


def acquire(file: int) -> bool:
    """Take the lock of an open file if it is free."""
    try:
        if sys.platform == "win32":
            os.lseek(file, FAR, os.SEEK_SET)
            msvcrt.locking(file, msvcrt.LK_NBLCK, 1)
        else:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def release(file: int) -> None:
    if sys.platform == "win32":
        os.lseek(file, FAR, os.SEEK_SET)
        msvcrt.locking(file, msvcrt.LK_UNLCK, 1)
    else:
        fcntl.flock(file, fcntl.LOCK_UN)
