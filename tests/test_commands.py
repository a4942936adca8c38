"""What run.py does before there is a server: which ComfyUI it takes."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from video_ldm.tools import hosts, paths


def make_comfyui(folder):
    """The files by which a ComfyUI is recognised. Nothing of it runs."""
    (folder / "comfy").mkdir(parents=True)
    for name in ("main.py", "nodes.py"):
        (folder / name).touch()
    return folder


def make_python(path):
    path.parent.mkdir(parents=True)
    path.touch()
    return path


@pytest.fixture
def no_host_named(monkeypatch):
    for name in ("COMFYUI_PATH", "COMFYUI_PYTHON"):
        monkeypatch.delenv(name, raising=False)


def test_the_comfyui_that_is_named_comes_first_with_its_own_python(tmp_path, monkeypatch, no_host_named):
    folder = make_comfyui(tmp_path / "my comfy")
    python = make_python(paths.venv_python(folder / ".venv"))
    monkeypatch.setenv("COMFYUI_PATH", str(folder))
    found = hosts.find()
    assert (found.folder, found.python, found.own) == (folder, python, False)


def test_a_named_folder_without_comfyui_is_refused_by_name(tmp_path, monkeypatch, no_host_named):
    monkeypatch.setenv("COMFYUI_PATH", str(tmp_path))
    with pytest.raises(paths.HostError, match=f"COMFYUI_PATH is .*{tmp_path.name}, which holds no ComfyUI"):
        hosts.find()


def test_a_checkout_in_custom_nodes_uses_the_comfyui_around_it(tmp_path, monkeypatch, no_host_named):
    folder = make_comfyui(tmp_path / "ComfyUI")
    link = paths.link_pack(folder / "custom_nodes")
    monkeypatch.setattr(sys, "argv", [str(link / "run.py")])
    assert hosts.find().folder == folder


def test_windows_portable_brings_its_own_python(tmp_path, no_host_named):
    folder = make_comfyui(tmp_path / "ComfyUI")
    python = make_python(tmp_path / "python_embeded" / "python.exe")
    assert hosts.find_python(folder) == python


def test_a_python_without_torch_is_named(tmp_path):
    host = hosts.Host(tmp_path, tmp_path / "no python", "made up", own=False)
    with pytest.raises(paths.HostError, match="does not import torch. Set COMFYUI_PYTHON"):
        hosts.probe(host)


def test_the_pack_is_linked_once_and_never_over_somebodys_folder(tmp_path):
    link = paths.link_pack(tmp_path / "custom_nodes")
    assert paths.link_pack(tmp_path / "custom_nodes") == link and link.resolve() == paths.ROOT
    kept = tmp_path / "other" / paths.LINK_NAME / "file"
    make_python(kept)
    with pytest.raises(paths.HostError, match="could not be linked"):
        paths.link_pack(tmp_path / "other")
    assert kept.exists()


def test_the_pack_never_stands_on_the_path_where_it_would_hide_comfyuis_modules():
    import nodes
    assert Path(nodes.__file__).resolve().parent != paths.ROOT


@pytest.mark.parametrize("folder", ["benchmarks", "demo", "temporal"])
def test_comfyui_is_reached_through_nodes_host_alone(folder):
    host_modules = re.compile(r"^\s*(?:from|import)\s+(comfy\w*|folder_paths|server|execution|nodes)\b", re.MULTILINE)
    files = sorted((paths.ROOT / folder).rglob("*.py"))
    assert len(files) > 5
    assert [str(path) for path in files if host_modules.search(path.read_text(encoding="utf-8"))] == []


# ---- stopping -----------------------------------------------------------------------------------------------------

LOAD = """
import importlib.util, os, signal, sys, time
from pathlib import Path
spec = importlib.util.spec_from_file_location("run", {run!r})
run = importlib.util.module_from_spec(spec)
spec.loader.exec_module(run)
"""
CHILD = LOAD + """
run.stop_on_signals()
try:
    print("up", flush=True)
    time.sleep(60)
except KeyboardInterrupt:
    time.sleep(1)               # as long as a server takes to end
    Path("ended").touch()
"""
PARENT = LOAD + """
run.import_pack()
from video_ldm.tools.hosts import Host
run.ROOT = Path(".").resolve()
run.stop_on_signals()
host = Host(run.ROOT, Path(sys.executable), "made up", own=False)
sys.exit(run.reported(lambda: run.inside(host, "anything", [])))
"""


@pytest.mark.skipif(os.name == "nt", reason="Windows has no signal that only one process gets")
@pytest.mark.parametrize("to_all", [False, True], ids=["SIGTERM to run.py", "Ctrl-C to all processes"])
def test_a_stopped_command_lets_its_process_in_the_hosts_python_end_its_server(tmp_path, to_all):
    known = {"run": str(paths.ROOT / "run.py")}
    (tmp_path / "run.py").write_text(CHILD.format(**known))
    parent = subprocess.Popen([sys.executable, "-c", PARENT.format(**known)], cwd=tmp_path, stdout=subprocess.PIPE,
                              stderr=subprocess.PIPE, start_new_session=True)
    assert parent.stdout.readline() == b"up\n"
    if to_all:
        os.killpg(parent.pid, signal.SIGINT)
    else:
        parent.send_signal(signal.SIGTERM)
    _, shown = parent.communicate(timeout=60)
    assert (tmp_path / "ended").exists()
    assert parent.returncode == 130 and shown.decode().strip() == "stopped"
