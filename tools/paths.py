"""Where this checkout and its own ComfyUI lie, and how they are recognised. The other modules build on this one."""

from __future__ import annotations

import os
import sys
from pathlib import Path

if sys.platform == "win32":
    import _winapi

ROOT = Path(__file__).resolve().parent.parent
HOST_FOLDER = (ROOT / ".host").resolve()    # resolved: .host may be a link to a folder that several checkouts share
LINK_NAME = "video-ldm"


class HostError(Exception):
    """No usable ComfyUI. The message is one sentence that says what to do about it."""


def is_comfyui(folder: Path) -> bool:
    """Whether the folder holds ComfyUI's code."""
    return (folder / "main.py").is_file() and (folder / "comfy").is_dir() and (folder / "nodes.py").is_file()


def venv_python(venv: Path) -> Path:
    """The interpreter inside a virtual environment, by platform. It need not exist."""
    return venv / "Scripts" / "python.exe" if os.name == "nt" else venv / "bin" / "python"


def link_pack(custom_nodes: Path) -> Path:
    """Link this checkout into the folder `custom_nodes` under its registered name, and return the link."""
    return link_folder(custom_nodes / LINK_NAME)


def link_folder(link: Path) -> Path:
    """Make `link` a link to this checkout, and return it.

    It is a symbolic link. On Windows it is a directory junction, which needs no administrator. It is never a copy,
    because a copy goes stale.
    """
    if link.exists() and link.resolve() == ROOT:
        return link
    link.parent.mkdir(parents=True, exist_ok=True)
    try:
        if os.path.lexists(link):
            os.rmdir(link) if os.name == "nt" else link.unlink()     # a junction or link, never what it points to
        if sys.platform == "win32":
            _winapi.CreateJunction(str(ROOT), str(link))
        else:
            link.symlink_to(ROOT, target_is_directory=True)
    except OSError as error:
        raise HostError(f"{link} could not be linked to this checkout ({error}). Remove what is there, or keep the "
                        "checkout on a disk that allows links.") from error
    return link
