"""Which ComfyUI the commands use: the artist's own where there is one, else one set up under .host/."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HOST_FOLDER = ROOT / ".host"
LINK_NAME = "video-ldm"


class HostError(Exception):
    """No usable ComfyUI; the message is one sentence that says what to do about it."""


@dataclass(frozen=True)
class Host:
    folder: Path   # holds main.py and comfy/
    python: Path   # the interpreter that runs it
    origin: str    # where it comes from, in words
    own: bool      # True for the one under .host/, which the commands may install things into


def find(set_up=True):
    """The host in DESIGN's order: COMFYUI_PATH, the ComfyUI around this checkout, .host/ (set up here if allowed)."""
    if os.environ.get("COMFYUI_PATH"):
        folder = Path(os.environ["COMFYUI_PATH"]).expanduser().resolve()
        if not is_comfyui(folder):
            raise HostError(f"COMFYUI_PATH is {folder}, which holds no ComfyUI (no main.py beside a comfy folder). "
                            "Point it at the folder that main.py lies in, or unset it.")
        return Host(folder, find_python(folder), "from COMFYUI_PATH", own=False)
    around = find_around()
    if around is not None:
        return Host(around, find_python(around), "the one whose custom_nodes holds this checkout", own=False)
    if set_up:
        from . import setup_host
        setup_host.set_up()
    folder, python = HOST_FOLDER / "ComfyUI", venv_python(HOST_FOLDER / "venv")
    if not is_comfyui(folder) or not python.exists():
        raise HostError("No ComfyUI is set up yet. Run 'python run.py test' once, or set COMFYUI_PATH to one you have.")
    return Host(folder, python, "set up by run.py in .host", own=True)


def find_around():
    """The ComfyUI folder whose custom_nodes holds this checkout, directly or as a link, or None."""
    for root in (ROOT, Path(sys.argv[0]).absolute().parent, Path(os.environ.get("PWD", ROOT))):
        is_here = root.exists() and root.resolve() == ROOT
        if is_here and root.parent.name == "custom_nodes" and is_comfyui(root.parent.parent):
            return root.parent.parent
    return None


def find_python(folder):
    """The interpreter of a ComfyUI at `folder`: COMFYUI_PYTHON, its virtual environment, Windows portable, ours."""
    if os.environ.get("COMFYUI_PYTHON"):
        python = Path(os.environ["COMFYUI_PYTHON"]).expanduser()
        if not python.exists():
            raise HostError(f"COMFYUI_PYTHON is {python}, which does not exist. "
                            "Set it to the Python that runs your ComfyUI.")
        return python
    candidates = [venv_python(base / name) for base in (folder, folder.parent) for name in ("venv", ".venv")]
    candidates += [base / "python_embeded" / "python.exe" for base in (folder.parent, folder)]
    return next((python for python in candidates if python.exists()), Path(sys.executable))


def is_comfyui(folder):
    return (folder / "main.py").is_file() and (folder / "comfy").is_dir() and (folder / "nodes.py").is_file()


def venv_python(venv):
    """The interpreter inside a virtual environment, by platform; it need not exist."""
    return venv / "Scripts" / "python.exe" if os.name == "nt" else venv / "bin" / "python"


def probe(host):
    """What the host's Python can do: {"torch": version, "accelerator": bool}; HostError where it has no torch."""
    code = ("import json, torch; a = torch.cuda.is_available() or torch.backends.mps.is_available() or "
            "(hasattr(torch, 'xpu') and torch.xpu.is_available()); "
            "print(json.dumps({'torch': torch.__version__, 'accelerator': bool(a)}))")
    try:
        done = subprocess.run([str(host.python), "-c", code], capture_output=True, text=True, stdin=subprocess.DEVNULL)
        return json.loads(done.stdout.strip().splitlines()[-1])
    except (OSError, ValueError, IndexError):
        raise HostError(f"ComfyUI at {host.folder} cannot run: {host.python} does not import torch. "
                        "Set COMFYUI_PYTHON to the Python that runs your ComfyUI.") from None


def link_pack(custom_nodes):
    """Link this checkout into the folder `custom_nodes` under its registered name; returns the link.

    A symbolic link, on Windows a directory junction, which needs no administrator. Never a copy: a copy goes stale.
    """
    link = custom_nodes / LINK_NAME
    if link.exists() and link.resolve() == ROOT:
        return link
    custom_nodes.mkdir(parents=True, exist_ok=True)
    try:
        if os.path.lexists(link):
            os.rmdir(link) if os.name == "nt" else link.unlink()     # a junction or link, never what it points to
        if os.name == "nt":
            import _winapi
            _winapi.CreateJunction(str(ROOT), str(link))
        else:
            link.symlink_to(ROOT, target_is_directory=True)
    except OSError as error:
        raise HostError(f"{link} could not be linked to this checkout ({error}). Remove what is there, or keep the "
                        "checkout on a disk that allows links.") from error
    return link
