"""The project's commands: `python run.py demo | test | ui | bench | train-demo`. Standard library only."""

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent
PACKAGE = "video_ldm"


def import_pack(host=None):
    """Register this checkout as the package `video_ldm`, whatever its folder is called, and return it.

    With `host`, the folder of a ComfyUI, its modules become importable too; without CUDA it is told to use the CPU.
    The checkout itself never goes on sys.path: ComfyUI owns top-level modules called `nodes`, `server`, `utils`.
    """
    if host is not None and str(host) not in sys.path:
        sys.path.insert(0, str(host))
        import comfy.options  # noqa: F401  parsing of our own argv stays off
        import comfy.cli_args
        import torch
        comfy.cli_args.args.cpu = not torch.cuda.is_available()
    if PACKAGE not in sys.modules:
        spec = importlib.util.spec_from_file_location(PACKAGE, ROOT / "__init__.py", submodule_search_locations=[str(ROOT)])
        module = importlib.util.module_from_spec(spec)
        sys.modules[PACKAGE] = module
        spec.loader.exec_module(module)
    return sys.modules[PACKAGE]
