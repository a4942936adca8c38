"""What run.py does before there is a server: which ComfyUI it takes, a set-up that survives failures, its websocket."""

import queue
import socket
import struct
import sys
import threading
from pathlib import Path

import pytest

from video_ldm.tools import hosts, setup_host, websocket


def make_comfyui(folder):
    """The files by which a ComfyUI is recognised; nothing of it runs."""
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
    python = make_python(hosts.venv_python(folder / ".venv"))
    monkeypatch.setenv("COMFYUI_PATH", str(folder))
    found = hosts.find()
    assert (found.folder, found.python, found.own) == (folder, python, False)


def test_a_named_folder_without_comfyui_is_refused_by_name(tmp_path, monkeypatch, no_host_named):
    monkeypatch.setenv("COMFYUI_PATH", str(tmp_path))
    with pytest.raises(hosts.HostError, match=f"COMFYUI_PATH is .*{tmp_path.name}, which holds no ComfyUI"):
        hosts.find()


def test_a_checkout_in_custom_nodes_uses_the_comfyui_around_it(tmp_path, monkeypatch, no_host_named):
    folder = make_comfyui(tmp_path / "ComfyUI")
    link = hosts.link_pack(folder / "custom_nodes")
    monkeypatch.setattr(sys, "argv", [str(link / "run.py")])
    assert hosts.find().folder == folder


def test_windows_portable_brings_its_own_python(tmp_path, no_host_named):
    folder = make_comfyui(tmp_path / "ComfyUI")
    python = make_python(tmp_path / "python_embeded" / "python.exe")
    assert hosts.find_python(folder) == python


def test_a_python_without_torch_is_named(tmp_path):
    host = hosts.Host(tmp_path, tmp_path / "no python", "made up", own=False)
    with pytest.raises(hosts.HostError, match="does not import torch. Set COMFYUI_PYTHON"):
        hosts.probe(host)


def test_the_pack_is_linked_once_and_never_over_somebodys_folder(tmp_path):
    link = hosts.link_pack(tmp_path / "custom_nodes")
    assert hosts.link_pack(tmp_path / "custom_nodes") == link and link.resolve() == hosts.ROOT
    kept = tmp_path / "other" / hosts.LINK_NAME / "file"
    make_python(kept)
    with pytest.raises(hosts.HostError, match="could not be linked"):
        hosts.link_pack(tmp_path / "other")
    assert kept.exists()


# ---- setting up ---------------------------------------------------------------------------------------------------

@pytest.fixture
def set_up(tmp_path, monkeypatch):
    """set_up() into an empty folder with recorded steps in place of downloads; `failing` holds those to fail."""
    calls, failing = [], set()

    def step(name, effect=None):
        def action():
            calls.append(name)
            if name in failing:
                raise hosts.HostError(f"{name} failed")
            if effect is not None:
                effect()
        return action

    folder = tmp_path / ".host"
    monkeypatch.setattr(setup_host, "HOST_FOLDER", folder)
    for name, effect in (("make_venv", None), ("install_torch", None), ("install_requirements", None),
                         ("fit_torchvision", None), ("install_comfyui", lambda: write_requirements(folder))):
        monkeypatch.setattr(setup_host, name, step(name, effect))

    def run():
        calls.clear()
        setup_host.set_up()
        return list(calls)
    run.failing, run.folder, run.calls = failing, folder, calls
    return run


def write_requirements(folder, text="av>=14\n"):
    (folder / "ComfyUI").mkdir(parents=True, exist_ok=True)
    (folder / "ComfyUI" / "requirements.txt").write_text(text)


def test_set_up_runs_once_and_goes_on_where_it_failed(set_up):
    set_up.failing.add("install_requirements")
    with pytest.raises(hosts.HostError):
        set_up()
    assert set_up.calls == ["make_venv", "install_torch", "install_comfyui", "install_requirements"]
    set_up.failing.clear()
    assert set_up() == ["install_requirements", "fit_torchvision"]
    assert set_up() == []


def test_changed_requirements_are_installed_again_and_a_new_environment_gets_everything(set_up, monkeypatch):
    set_up()
    write_requirements(set_up.folder, "av>=15\n")
    assert set_up() == ["install_requirements"]
    monkeypatch.setattr(setup_host.platform, "python_version", lambda: "3.99.0")
    assert set_up() == ["make_venv", "install_torch", "install_requirements", "fit_torchvision"]


def test_a_python_that_torch_has_no_build_for_is_refused(set_up, monkeypatch):
    monkeypatch.setattr(setup_host.sys, "version_info", (3, 9, 1))
    with pytest.raises(hosts.HostError, match="needs 3.10 to 3.14"):
        set_up()


def test_a_download_that_fails_leaves_no_half_made_comfyui(tmp_path, monkeypatch):
    def broken_download(*arguments, **options):
        (tmp_path / "downloads.part").mkdir()
        raise hosts.HostError("pip could not download")
    monkeypatch.setattr(setup_host, "HOST_FOLDER", tmp_path)
    monkeypatch.setattr(setup_host, "clone_release", lambda folder: False)
    monkeypatch.setattr(setup_host, "pip", broken_download)
    with pytest.raises(hosts.HostError):
        setup_host.install_comfyui()
    assert not (tmp_path / "ComfyUI").exists()


def test_the_requirements_that_are_installed_leave_torch_alone(tmp_path, monkeypatch):
    write_requirements(tmp_path, "torch\ntorchsde\ntorchvision\ntorchaudio\nav>=14.2.0\n\n# a comment\npydantic~=2.0\n")
    monkeypatch.setattr(setup_host, "HOST_FOLDER", tmp_path)
    monkeypatch.setattr(setup_host, "pip", lambda *arguments: None)
    setup_host.install_requirements()
    listed = (tmp_path / "requirements.txt").read_text().split()
    assert {"torchsde", "av>=14.2.0", "pydantic~=2.0"} <= set(listed)
    assert not {"torch", "torchvision", "torchaudio"} & set(listed)


# ---- the websocket ------------------------------------------------------------------------------------------------

def frame(payload, opcode, final=True):
    """An unmasked frame, as servers send them."""
    size = len(payload)
    length = bytes([size]) if size < 126 else b"\x7e" + struct.pack("!H", size) if size < 65536 else \
        b"\x7f" + struct.pack("!Q", size)
    return bytes([opcode | (0x80 if final else 0)]) + length + payload


@pytest.fixture
def serve():
    """serve(data): the address of a server that accepts one websocket, sends `data`, and gives what it then reads."""
    listener = socket.create_server(("127.0.0.1", 0))
    received = queue.Queue()

    def answer(data):
        def run():
            connection, _ = listener.accept()
            request = b""
            while b"\r\n\r\n" not in request:
                request += connection.recv(4096)
            connection.sendall(b"HTTP/1.1 101 Switching Protocols\r\n\r\n" + data)
            received.put(connection.recv(4096))
            connection.close()
        threading.Thread(target=run, daemon=True).start()
        return f"127.0.0.1:{listener.getsockname()[1]}"
    yield answer, received
    listener.close()


def test_messages_of_every_size_arrive_whole_and_pings_are_answered(serve):
    answer, received = serve
    sizes = (5, 200, 70000)
    data = b"".join(frame(bytes([65 + i]) * size, websocket.TEXT) for i, size in enumerate(sizes))
    data += frame(b"spl", websocket.TEXT, final=False) + frame(b"hi", websocket.PING) + frame(b"it", 0)
    data += frame(b"\x00\x01", websocket.BINARY) + frame(b"", websocket.CLOSE)
    client = websocket.WebSocket(answer(data), "/ws", timeout=10)
    assert [len(client.receive(10)) for _ in sizes] == list(sizes)
    assert client.receive(10) == "split"
    assert client.receive(10) == b"\x00\x01"
    with pytest.raises(ConnectionError):
        client.receive(10)
    client.close()
    pong = received.get(timeout=10)
    assert pong[0] == 0x80 | websocket.PONG and bytes(b ^ pong[2 + i] for i, b in enumerate(pong[6:8])) == b"hi"


def test_a_silent_server_times_out(serve):
    answer, _ = serve
    client = websocket.WebSocket(answer(b""), "/ws", timeout=10)
    with pytest.raises(TimeoutError):
        client.receive(0.05)
    client.close()


def test_the_pack_never_stands_on_the_path_where_it_would_hide_comfyuis_modules():
    import nodes
    assert Path(nodes.__file__).resolve().parent != hosts.ROOT
