"""How much memory a piece of work takes on the CPU beyond what its process holds already."""

import os
import threading

import psutil


def own_pages() -> dict:
    """The environment for a process that measures: glibc keeps what was freed before, and the work would take that
    unseen, so every tensor gets pages of its own."""
    return dict(os.environ, MALLOC_MMAP_THRESHOLD_="65536")


def growth(work) -> int:
    """Bytes of resident memory that `work()` takes at most, beyond what the process holds before it.

    The high-water mark that the system keeps would not do: what was done before raises it above what the work needs.
    """
    process, finished = psutil.Process(), threading.Event()
    before = most = process.memory_info().rss

    def watch():
        nonlocal most
        while not finished.wait(0.002):
            most = max(most, process.memory_info().rss)
    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        work()
    finally:
        finished.set()
        watcher.join()
    return most - before
