"""A real ComfyUI as a child process: started on a free port, watched until it answers, stopped again."""

import os
import socket
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path

from .hosts import probe
from .paths import LINK_NAME, ROOT, HostError, link_pack

STARTS_WITHIN = 900     # seconds; ten are usual, but a machine that is busy otherwise takes minutes


class Server:
    """`with Server(host, base) as server:` a ComfyUI whose models, input, output and custom_nodes lie under `base`.

    With base None the host keeps its own folders, and the pack is linked in from beside it if it is not there yet.
    Attributes: address ("127.0.0.1:8188"), base, log (path), process.
    """

    def __init__(self, host, base=None, output=None, port=None, arguments=(), log=None, environment=None):
        self.host, self.base = host, base
        self.port = port or free_port()
        self.address = f"127.0.0.1:{self.port}"
        self.log = Path(log or (base or ROOT / ".host") / "server.log")
        self.environment = environment or {}
        self.process = None
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

    def start(self):
        """Start and wait until it answers; HostError with the end of the log if it does not."""
        environment = dict(os.environ, PYTHONUNBUFFERED="1", PYTHONIOENCODING="utf-8", **self.environment)
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

    def answers(self):
        try:
            with urllib.request.urlopen(f"http://{self.address}/system_stats", timeout=5):
                return True
        except (urllib.error.URLError, OSError):
            return False

    def stop(self):
        if self.process is None or self.process.poll() is not None:
            return
        self.process.terminate()
        try:
            self.process.wait(15)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def log_text(self):
        return self.log.read_text(encoding="utf-8", errors="replace")


def base_arguments(base):
    """ComfyUI arguments that keep everything it reads and writes under `base`, with this pack the only custom node."""
    for name in ("models", "input", "output", "temp", "user"):
        (base / name).mkdir(parents=True, exist_ok=True)
    link_pack(base / "custom_nodes")
    return ["--base-directory", str(base), "--database-url", f"sqlite:///{(base / 'user' / 'comfyui.db').as_posix()}"]


def guest_arguments(host):
    """ComfyUI arguments that add this pack to a host that keeps its own folders; none where it already has it."""
    installed = host.folder / "custom_nodes"
    if any(entry.resolve() == ROOT for entry in installed.iterdir() if entry.is_dir()):
        return []
    beside = ROOT / ".host" / "guest"
    link_pack(beside / "custom_nodes")
    config = beside / "extra_paths.yaml"
    config.write_text(f'video_ldm:\n  custom_nodes: "{(beside / "custom_nodes").as_posix()}"\n', encoding="utf-8")
    return ["--extra-model-paths-config", str(config)]


def skip_first_run_dialog(base):
    """Tell ComfyUI's page that its user is no newcomer: else its list of templates opens over the loaded workflow."""
    settings = base / "user" / "default" / "comfy.settings.json"
    if not settings.exists():
        settings.parent.mkdir(parents=True, exist_ok=True)
        settings.write_text('{"Comfy.TutorialCompleted": true}', encoding="utf-8")


def pack_folder_name(server):
    """The name under which the running ComfyUI knows this pack, which its template and help addresses contain."""
    if server.base is None:
        for entry in (server.host.folder / "custom_nodes").iterdir():
            if entry.is_dir() and entry.resolve() == ROOT:
                return entry.name
    return LINK_NAME


def is_free(port):
    """Whether nothing on this machine listens on the port."""
    with socket.socket() as attempt:
        attempt.settimeout(1)
        return attempt.connect_ex(("127.0.0.1", port)) != 0


def free_port():
    with socket.socket() as probe_socket:
        probe_socket.bind(("127.0.0.1", 0))
        return probe_socket.getsockname()[1]
