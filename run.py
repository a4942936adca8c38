"""The commands: `python run.py demo | test | lint | ui | bench | convert | train-demo | train-pvdm`.

They use the ComfyUI named by COMFYUI_PATH, else the one whose custom_nodes holds this checkout, else one that they set
up in .host/ the first time (tools/setup_host.py). What needs more than the standard library runs in the host's Python.
"""

import argparse
import importlib
import importlib.util
import os
import signal
import subprocess
import sys
import webbrowser
from pathlib import Path

ROOT = Path(__file__).resolve().parent
PACKAGE = "video_ldm"
STOPS_WITHIN = 30       # seconds that a command in the host's Python has for its end


def import_pack(host=None):
    """Register this checkout as the package `video_ldm`, whatever its folder is called, and return it.

    With `host`, the folder of a ComfyUI, its modules become importable too. Without CUDA it is told to use the CPU.
    The checkout itself never goes on sys.path: ComfyUI owns top-level modules called `nodes`, `server`, `utils`.
    """
    if host is not None and str(host) not in sys.path:
        sys.path.insert(0, str(host))
        import comfy.cli_args
        import comfy.options  # noqa: F401  parsing of our own argv stays off
        import torch
        comfy.cli_args.args.cpu = not torch.cuda.is_available()
    if PACKAGE not in sys.modules:
        spec = importlib.util.spec_from_file_location(PACKAGE, ROOT / "__init__.py",
                                                      submodule_search_locations=[str(ROOT)])
        module = importlib.util.module_from_spec(spec)
        sys.modules[PACKAGE] = module
        spec.loader.exec_module(module)
    return sys.modules[PACKAGE]


def main(argv):
    parser = argparse.ArgumentParser(prog="run.py", description=__doc__.split("\n\n")[1].replace("\n", " "))
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    demo_parser = commands.add_parser("demo", help="render a workflow in a real ComfyUI; leaves an MP4 in output/")
    demo_parser.add_argument("workflow", nargs="?", default="drive",
                             help="a name in workflows/api, or a file; default: drive")
    ui_parser = commands.add_parser("ui", help="open ComfyUI with the pack and the quickstart loaded")
    ui_parser.add_argument("--port", type=int, default=8188, help="default 8188; another where that is taken")
    ui_parser.add_argument("--no-browser", action="store_true", help="print the address, open nothing")
    convert_parser = commands.add_parser("convert", help="write a model file that the pack takes as a safetensors file "
                                                         "with metadata")
    convert_parser.add_argument("source", help="the file")
    convert_parser.add_argument("target", help="the new file, or a folder")
    for name, text in (("test", "run the tests; further arguments go to pytest"),
                       ("lint", "check style and types with ruff and mypy"),
                       ("bench", "measure speed; or: --quality of the demo models' frames, memory of --decode and "
                                 "--upscale, --card for the memory of a GPU, --load for that of loading, --pvdm for "
                                 "time and memory of PVDM, --pvdm-memory for that of a long video of it, --traffic "
                                 "for the bytes that a step moves, --profile for where its time goes, --ways for "
                                 "other ways to compute its parts, --per-frame for the time of a frame in decoding, "
                                 "upscaling and writing"),
                       ("train-demo", "train the bundled demo models again, from nothing"),
                       ("train-pvdm", "train PVDM on a folder of videos")):
        commands.add_parser(name, help=text, add_help=False)
    options, rest = parser.parse_known_args(argv)
    if rest and options.command in ("demo", "ui", "lint", "convert"):
        parser.error(f"{options.command} does not know {' '.join(rest)}")
    stop_on_signals()
    import_pack()
    return reported(lambda: COMMANDS[options.command](options, rest))


def find_host():
    """The host, set up if need be. The console says which one it is."""
    from video_ldm.tools import hosts
    host = hosts.find()
    torch = hosts.probe(host)
    print(f"ComfyUI: {host.folder}, {host.origin}; torch {torch['torch']}, "
          f"{'GPU' if torch['accelerator'] else 'CPU'}", flush=True)
    return host


def demo(options, rest):
    """Run a workflow in a real ComfyUI. The client runs in the host's Python, where aiohttp and tqdm are."""
    path = Path(options.workflow)
    if path.suffix != ".json":
        path = ROOT / "workflows" / "api" / f"{options.workflow}.json"
    if not path.is_file():
        print(f"There is no workflow {path}.", file=sys.stderr)
        return 2
    return inside(find_host(), "tools.demo", [str(path.resolve())])


def ui(options, rest):
    """Start ComfyUI with the pack and stay until Ctrl-C; the address opens the quickstart."""
    from video_ldm.tools.paths import HOST_FOLDER
    from video_ldm.tools.server import Server, free_port, is_free, pack_folder_name, skip_first_run_dialog
    host = find_host()
    port = options.port if is_free(options.port) else free_port()
    base, output = (HOST_FOLDER / "base", ROOT / "output") if host.own else (None, None)
    if base is not None:
        skip_first_run_dialog(base)
    print("Starting ComfyUI ...", flush=True)
    with Server(host, base, output=output, port=port, arguments=("--preview-method", "auto")) as server:
        url = f"http://{server.address}/?template=quickstart&source={pack_folder_name(server)}"
        print(f"\nComfyUI with Video LDM: {url}\nPut models into {(base or host.folder) / 'models'}; "
              f"its log is {server.log}. Ctrl-C stops it.", flush=True)
        if not options.no_browser:
            webbrowser.open(url)
        return server.process.wait()


def test(options, rest):
    """pytest inside the host's Python: the fast tests, then tests/host/ against a real server."""
    return inside(host_with_test_packages("pytest, pytest_timeout, diffusers, imageio"), "pytest", rest)


def lint(options, rest):
    """ruff and mypy, with the host's Python."""
    from video_ldm.tools import lint as linters
    return linters.check(host_with_test_packages("ruff, mypy").python)


def host_with_test_packages(modules):
    """The host, with the packages of tests/requirements.txt. An artist's own ComfyUI needs these modules only."""
    from video_ldm.tools import setup_host
    from video_ldm.tools.paths import HostError
    host, requirements = find_host(), ROOT / "tests" / "requirements.txt"
    if host.own:
        setup_host.install_extras(requirements, "tests")
    elif subprocess.run([str(host.python), "-c", f"import {modules}"], capture_output=True,
                        stdin=subprocess.DEVNULL).returncode:
        raise HostError(f"This needs more packages in your ComfyUI's Python. Install them yourself: "
                        f'"{host.python}" -m pip install -r "{requirements}"')
    return host


BENCHMARKS = {"--quality": "quality", "--decode": "decode", "--upscale": "upscale", "--card": "gpu_memory",
              "--load": "load_memory", "--pvdm": "pvdm", "--pvdm-memory": "pvdm_memory", "--traffic": "traffic",
              "--profile": "step_profile", "--ways": "other_ways", "--per-frame": "per_frame"}


def bench(options, rest):
    """Run the benchmark that a flag names, else the one of speed."""
    name = next((name for flag, name in BENCHMARKS.items() if flag in rest), "speed")
    return inside(find_host(), f"benchmarks.{name}", [argument for argument in rest if argument not in BENCHMARKS])


def convert(options, rest):
    """Write a model file as safetensors. It runs in the host's Python, where torch is."""
    return inside(find_host(), "nodes.host.conversion",
                  [str(Path(path).absolute()) for path in (options.source, options.target)])


def train_demo(options, rest):
    return inside(find_host(), "demo.train", rest)


def train_pvdm(options, rest):
    return inside(find_host(), "demo.pvdm_videos", [*rest, "--from", os.getcwd()])


def inside(host, target, arguments):
    """Run `target` of the pack (or pytest) in the host's Python, with ComfyUI importable; its exit status."""
    environment = dict(os.environ, COMFYUI_PATH=str(host.folder), COMFYUI_PYTHON=str(host.python),
                       HF_HUB_OFFLINE="1", PYTHONIOENCODING="utf-8")
    command = [str(host.python), "-u", str(ROOT / "run.py"), "_inside", target, *arguments]
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL)
    try:
        return process.wait()
    except KeyboardInterrupt:
        if os.name != "nt":
            process.terminate()     # Ctrl-C reached it as well, but a signal to this process alone did not
        try:
            process.wait(STOPS_WITHIN)
        except subprocess.TimeoutExpired:
            process.kill()
        raise


def stop_once(signal_number, frame):
    """A signal handler that stops the command once: what it started, such as a server, is then ended undisturbed."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


def stop_on_signals():
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop_once)


def run_inside(target, arguments):
    """The other end of `inside`. The checkout leaves sys.path, where its `nodes` would hide ComfyUI's."""
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT]
    stop_on_signals()
    if target == "pytest":
        import pytest
        return pytest.main(["--rootdir", str(ROOT), "-c", str(ROOT / "pyproject.toml"), *arguments])
    import_pack(None if target.startswith("tools.") else os.environ["COMFYUI_PATH"])
    return reported(lambda: importlib.import_module(f"{PACKAGE}.{target}").main(arguments))


def reported(command):
    """The exit status of `command()`. What a user has to know of a failure is printed as a sentence."""
    from video_ldm.tools.paths import HostError
    try:
        return command()
    except HostError as error:
        print(f"\n{error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return 130


COMMANDS = {"demo": demo, "ui": ui, "test": test, "lint": lint, "bench": bench, "convert": convert,
            "train-demo": train_demo, "train-pvdm": train_pvdm}

if __name__ == "__main__":
    if sys.argv[1:2] == ["_inside"]:
        sys.exit(run_inside(sys.argv[2], sys.argv[3:]))
    sys.exit(main(sys.argv[1:]))
