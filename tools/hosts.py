"""Which ComfyUI the commands use: the artist's own where there is one, else one set up under .host/."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from . import setup_host
from .paths import HOST_FOLDER, ROOT, HostError, is_comfyui, venv_python


@dataclass(frozen=True)
class Host:
    """A ComfyUI that the commands can run."""
    folder: Path   # holds main.py and comfy/
    python: Path   # the interpreter that runs it
    origin: str    # where it comes from, in words
    own: bool      # True for the one under .host/, which the commands may install things into


def find(set_up: bool = True) -> Host:
    """The host that the commands use.

    The order is COMFYUI_PATH, the ComfyUI whose custom_nodes holds this checkout, then .host/. With `set_up`, .host/ is
    set up first where that is needed.
    """
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
        setup_host.set_up()
    folder, python = HOST_FOLDER / "ComfyUI", venv_python(HOST_FOLDER / "venv")
    if not is_comfyui(folder) or not python.exists():
        raise HostError("No ComfyUI is set up yet. Run 'python run.py test' once, or set COMFYUI_PATH to one you have.")
    return Host(folder, python, "set up by run.py in .host", own=True)


def find_around() -> Path | None:
    """The ComfyUI folder whose custom_nodes holds this checkout, directly or as a link, or None."""
    for root in (ROOT, Path(sys.argv[0]).absolute().parent, Path(os.environ.get("PWD", ROOT))):
        is_here = root.exists() and root.resolve() == ROOT
        if is_here and root.parent.name == "custom_nodes" and is_comfyui(root.parent.parent):
            return root.parent.parent
    return None


def find_python(folder: Path) -> Path:
    """The interpreter of the ComfyUI at `folder`.

    The order is COMFYUI_PYTHON, a virtual environment in or beside the folder, that of the Windows portable build, then
    the one that runs this.
    """
    if os.environ.get("COMFYUI_PYTHON"):
        python = Path(os.environ["COMFYUI_PYTHON"]).expanduser()
        if not python.exists():
            raise HostError(f"COMFYUI_PYTHON is {python}, which does not exist. "
                            "Set it to the Python that runs your ComfyUI.")
        return python
    candidates = [venv_python(base / name) for base in (folder, folder.parent) for name in ("venv", ".venv")]
    candidates += [base / "python_embeded" / "python.exe" for base in (folder.parent, folder)]
    return next((python for python in candidates if python.exists()), Path(sys.executable))


def probe(host: Host) -> dict:
    """What the host's Python can do: {"torch": version, "accelerator": bool}. HostError where it has no torch."""
    code = ("import json, torch; a = torch.cuda.is_available() or torch.backends.mps.is_available() or "
            "(hasattr(torch, 'xpu') and torch.xpu.is_available()); "
            "print(json.dumps({'torch': torch.__version__, 'accelerator': bool(a)}))")
    try:
        done = subprocess.run([str(host.python), "-c", code], capture_output=True, text=True, stdin=subprocess.DEVNULL)
        return json.loads(done.stdout.strip().splitlines()[-1])
    except (OSError, ValueError, IndexError):
        raise HostError(f"ComfyUI at {host.folder} cannot run: {host.python} does not import torch. "
                        "Set COMFYUI_PYTHON to the Python that runs your ComfyUI.") from None
