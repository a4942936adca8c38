"""`python run.py lint`: ruff over everything, mypy over all but the tests, as pyproject.toml sets them up."""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path

from .paths import ROOT, link_folder

CONFIG = ROOT / "pyproject.toml"
PACKAGE = "video_ldm"
CHECKED = ("temporal", "nodes", "demo", "benchmarks", "tools")     # what mypy checks


def check(python: Path) -> int:
    """Run both with this interpreter. The exit status of the first that complains; both run in any case."""
    statuses = [subprocess.run([str(python), "-m", "ruff", "check", "."], cwd=ROOT,
                               stdin=subprocess.DEVNULL).returncode,
                check_types(python)]
    return next((status for status in statuses if status), 0)


def check_types(python: Path) -> int:
    """mypy has to know the checkout as the package that it is, whatever its folder is called: through a link."""
    with tempfile.TemporaryDirectory() as folder:
        link = link_folder(Path(folder) / PACKAGE)
        try:
            command = [str(python), "-m", "mypy", "--config-file", str(CONFIG),
                       "--cache-dir", str(ROOT / ".mypy_cache")]
            command += [part for name in CHECKED for part in ("-p", f"{PACKAGE}.{name}")]
            return subprocess.run(command, cwd=folder, stdin=subprocess.DEVNULL).returncode
        finally:
            link.unlink() if link.is_symlink() else link.rmdir()       # the link, never the checkout behind it
