"""Puts host_log_filter.py into the environment under .host/, so that a server's log does not open with known errors."""

from __future__ import annotations

import os
from pathlib import Path

SOURCE = Path(__file__).resolve().parent / "host_log_filter.py"
MODULE = "video_ldm_log_filter"


def write(venv: Path) -> None:
    """Copy the filter into a virtual environment. Nothing is written where it is there already."""
    for packages in site_packages(venv):
        write_changed(packages / f"{MODULE}.py", SOURCE.read_text(encoding="utf-8"))
        write_changed(packages / f"{MODULE}.pth", f"import {MODULE}\n")


def site_packages(venv: Path) -> list[Path]:
    """The folders of a virtual environment that Python imports packages from: one, or none where there is no such."""
    return [*venv.glob("lib/python3*/site-packages"), *venv.glob("Lib/site-packages")][:1]


def write_changed(path: Path, text: str) -> None:
    """Write a file whole, unless it holds this text."""
    if path.is_file() and path.read_text(encoding="utf-8") == text:
        return
    part = path.with_suffix(path.suffix + ".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)
