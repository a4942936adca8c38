"""Makes the pack importable as `video_ldm`, with a real ComfyUI's modules beside it. `python run.py test` uses it."""

import importlib.util
import os
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def load_run():
    spec = importlib.util.spec_from_file_location("video_ldm_run", ROOT / "run.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def find_host():
    from video_ldm.tools import hosts, paths
    try:
        return hosts.find(set_up=False)
    except paths.HostError as error:
        raise pytest.UsageError(str(error)) from None


os.environ.setdefault("HF_HUB_OFFLINE", "1")
# `python -m pytest` puts the checkout on sys.path, where its `nodes` would hide ComfyUI's.
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT]
run = load_run()
run.import_pack()
HOST = find_host()
run.import_pack(HOST.folder)


def pytest_configure(config):
    import torch
    processes = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))
    threads = max(1, min(torch.get_num_threads(), os.cpu_count() or 1, 4) // processes)
    torch.set_num_threads(threads)
    if processes > 1:       # servers and commands that the tests start get their share too, or all wait for each other
        os.environ["OMP_NUM_THREADS"] = str(threads)


def pytest_collection_modifyitems(items):
    """In one process the tests that need a server come last, so that a plain mistake shows within seconds.

    In several processes the files with many slow tests come first, so that none of them is left to one process.
    """
    if "PYTEST_XDIST_WORKER" in os.environ:
        slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
        items.sort(key=lambda item: -slow[item.path])
    else:
        items.sort(key=lambda item: "host" in Path(item.path).relative_to(ROOT / "tests").parts)


@pytest.fixture(scope="module", autouse=True)
def module_folders():
    """The model folders that a module adds are gone after it: the next one may write a file of the same name."""
    yield from restored_folders()


@pytest.fixture(autouse=True)
def test_folders():
    """Likewise those that one test adds."""
    yield from restored_folders()


@pytest.fixture
def folders(host, tmp_path, monkeypatch):
    """ComfyUI's input, output and temp folders, empty, in the folder that this gives."""
    import folder_paths
    for name in ("input", "output", "temp"):
        (tmp_path / name).mkdir()
        monkeypatch.setattr(folder_paths, f"{name}_directory", str(tmp_path / name))
    return tmp_path


def restored_folders():
    import folder_paths
    table = folder_paths.folder_names_and_paths
    before = {kind: (list(folders), endings) for kind, (folders, endings) in table.items()}
    yield
    table.clear()
    table.update(before)
    folder_paths.filename_list_cache.clear()


@pytest.fixture(scope="session")
def host():
    """The ComfyUI that the tests import and start: folder, python, origin."""
    return HOST
