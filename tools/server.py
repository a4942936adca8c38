"""A real ComfyUI as a child process: started on a free port, watched until it answers, stopped again."""

from __future__ import annotations

import os
import socket
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path

from .hosts import Host, probe
from .paths import HOST_FOLDER, LINK_NAME, ROOT, HostError, link_pack

STARTS_WITHIN = 900     # seconds; ten are usual, but a busy machine takes minutes


class Server:
    """`with Server(host, base) as server:` runs a ComfyUI until the block ends.

    Args:
        host: which ComfyUI.
        base: the folder that its models, input, output and custom_nodes lie under. None: the host keeps its own
            folders, and is told of the pack by a file of extra paths if it does not have it yet.
        output: the folder for outputs, if it is another than base's.
        port: a free one by default.
        arguments: more arguments of ComfyUI.
        log: the path of its log; by default server.log in base or in .host.
    """

    def __init__(self, host: Host, base: Path | None = None, output: Path | None = None, port: int | None = None,
                 arguments=(), log: Path | None = None):
        self.host, self.base = host, base
        self.port = port or free_port()
        self.address = f"127.0.0.1:{self.port}"
        self.log = Path(log or (base or HOST_FOLDER) / "server.log")
        self.process: subprocess.Popen | None = None
        self.command = [str(host.python), "-u", "main.py", "--port", str(self.port), "--disable-auto-launch"]
        self.command += ["--cpu"] if not probe(host)["accelerator"] else []
        self.command += base_arguments(base) if base is not None else guest_arguments(host)
        self.command += ["--output-directory", str(output)] if output is not None else []
        self.command += list(arguments)
        for folder in (output, self.log.parent):
            if folder is not None:
                Path(folder).mkdir(parents=True, exist_ok=True)

    def __enter__(self):
        return self.start()

    def __exit__(self, *exception):
        self.stop()

    def start(self) -> Server:
        """Start and wait until it answers. HostError with the end of the log if it does not."""
        environment = dict(os.environ, PYTHONUNBUFFERED="1", PYTHONIOENCODING="utf-8")
        environment.pop("PYTHONPATH", None)      # a checkout on it would hide ComfyUI's own modules
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(self.command, cwd=self.host.folder, stdin=subprocess.DEVNULL, stdout=log,
                                            stderr=subprocess.STDOUT, env=environment)
        deadline = time.monotonic() + STARTS_WITHIN
        while not self.answers():
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.stop()
                raise HostError(f"ComfyUI at {self.host.folder} did not start. The end of {self.log}:\n"
                                + "\n".join(self.log_text().splitlines()[-25:]))
            time.sleep(0.3)
        return self

    def answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://{self.address}/system_stats", timeout=5):
                return True
        except (urllib.error.URLError, OSError):
            return False

    def stop(self) -> None:
        if self.process is None or self.process.poll() is not None:
            return
        self.process.terminate()
        try:
            self.process.wait(15)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def log_text(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")


def base_arguments(base: Path) -> list[str]:
    """ComfyUI's arguments for reading and writing under `base` only, with this pack as the only custom node."""
    for name in ("models", "input", "output", "temp", "user"):
        (base / name).mkdir(parents=True, exist_ok=True)
    link_pack(base / "custom_nodes")
    return ["--base-directory", str(base), "--database-url", f"sqlite:///{(base / 'user' / 'comfyui.db').as_posix()}"]


def guest_arguments(host: Host) -> list[str]:
    """ComfyUI's arguments that add this pack to a host with folders of its own. None where it has the pack already."""
    installed = host.folder / "custom_nodes"
    if any(entry.resolve() == ROOT for entry in installed.iterdir() if entry.is_dir()):
        return []
    beside = HOST_FOLDER / "guest"
    link_pack(beside / "custom_nodes")
    config = beside / "extra_paths.yaml"
    config.write_text(f'video_ldm:\n  custom_nodes: "{(beside / "custom_nodes").as_posix()}"\n', encoding="utf-8")
    return ["--extra-model-paths-config", str(config)]


def skip_first_run_dialog(base: Path) -> None:
    """Tell ComfyUI's page that its user is no newcomer. For newcomers it opens templates over the loaded workflow."""
    settings = base / "user" / "default" / "comfy.settings.json"
    if not settings.exists():
        settings.parent.mkdir(parents=True, exist_ok=True)
        settings.write_text('{"Comfy.TutorialCompleted": true}', encoding="utf-8")


def pack_folder_name(server: Server) -> str:
    """The name of this pack in the running ComfyUI. Addresses of templates and help contain it."""
    if server.base is None:
        for entry in (server.host.folder / "custom_nodes").iterdir():
            if entry.is_dir() and entry.resolve() == ROOT:
                return entry.name
    return LINK_NAME


def is_free(port: int) -> bool:
    """Whether nothing on this machine listens on the port."""
    with socket.socket() as attempt:
        attempt.settimeout(1)
        return attempt.connect_ex(("127.0.0.1", port)) != 0


def free_port() -> int:
    with socket.socket() as probe_socket:
        probe_socket.bind(("127.0.0.1", 0))
        return probe_socket.getsockname()[1]
