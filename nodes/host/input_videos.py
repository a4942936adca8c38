"""The videos in ComfyUI's input folder and in the folders below it."""

import itertools
import logging
import os
from collections import deque
from functools import lru_cache

import folder_paths

# Endings of files that open. ComfyUI asks the operating system what an ending means, and systems know different ones:
# to Linux .ts is a translation, and it does not know .m2ts.
ENDINGS = frozenset((
    ".mp4", ".m4v", ".mov", ".qt", ".3gp", ".3g2", ".f4v",                      # QuickTime and its kin
    ".mkv", ".mk3d", ".webm", ".avi", ".divx", ".flv", ".wmv", ".asf",
    ".mpg", ".mpeg", ".mpe", ".mpv", ".m1v", ".m2v", ".vob", ".mod", ".tod",    # MPEG, DVDs and camcorders
    ".ts", ".mts", ".m2ts", ".m2t", ".tp", ".trp",                              # MPEG transport streams
    ".ogv", ".ogm", ".mxf", ".dv", ".rm", ".rmvb", ".wtv", ".nut", ".ivf", ".y4m", ".mjpeg", ".mjpg",
    ".h264", ".264", ".hevc", ".h265", ".265", ".obu",
    ".gif", ".webp", ".apng"))
MOST_ENTRIES = 20_000       # folders and videos that are listed. The list is made whenever the page asks for nodes


def list_videos() -> list[str]:
    """Names for the node's list, sorted: `clip.mp4`, and `folder/clip.mp4` for a file in a folder.

    Hidden files and folders are left out. A folder that several links lead to is listed once.
    """
    top = folder_paths.get_input_directory()
    names: list[str] = []
    waiting, left = deque([""]), MOST_ENTRIES
    seen: set[str] = set()      # folders, without links, so that a link to a folder above makes no endless list
    while waiting:
        folder = waiting.popleft()      # folders near the top come first, so a huge one hides none of those
        real = os.path.realpath(os.path.join(top, folder))
        if real in seen:
            continue
        seen.add(real)
        found = _entries(os.path.join(top, folder), left)
        left -= len(found)
        for own, is_folder in found:
            name = f"{folder}/{own}" if folder else own
            (waiting if is_folder else names).append(name)
        if left <= 0:
            _warn_once(top, MOST_ENTRIES)
            break
    return sorted(names)


def _entries(folder: str, most: int) -> list[tuple[str, bool]]:
    """(name, whether it is a folder) of the folders and videos in a folder, at most `most`, sorted.

    Hidden ones are left out. Nothing if the folder may not be read.
    """
    try:
        with os.scandir(folder) as found:
            kinds = ((entry.name, _is_folder(entry)) for entry in found if not entry.name.startswith("."))
            return sorted(itertools.islice(((name, kind) for name, kind in kinds if kind is not None), most))
    except OSError:
        return []


def _is_folder(entry: os.DirEntry) -> bool | None:
    """True for a folder, False for a video, None for anything else.

    The listing of a folder tells the kinds of its entries. Asking for each file takes long on network disks.
    """
    try:
        if entry.is_dir():
            return True
        return False if _is_video(entry.name) and entry.is_file() else None
    except OSError:         # a link to itself
        return None


@lru_cache(maxsize=64)
def _warn_once(top: str, most: int) -> None:
    logging.warning("[Video LDM] ComfyUI's input folder %s holds %d folders and videos or more. Load Video Frames "
                    "lists the first of them, those near the top before others.", top, most)


def _is_video(name: str) -> bool:
    known = folder_paths.filter_files_content_types([name], ["video"])
    return bool(known) or os.path.splitext(name)[1].lower() in ENDINGS
