"""What .ci/run does with the tools that it finds, which are played here by scripts that write down their calls."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from video_ldm.tests.host.page import BROWSERS

SCRIPT = Path(__file__).resolve().parent.parent / ".ci" / "run"
LINT, TEST = "python3 run.py lint", "python3 run.py test -n 2 --dist loadfile --no-loadscope-reorder"
INSTALL = ["apt-get -o Acquire::Retries=3 update -q",
           "apt-get -o Acquire::Retries=3 install -q -y --no-install-recommends chromium"]

pytestmark = pytest.mark.skipif(os.name == "nt" or not shutil.which("bash"), reason="needs bash")


def calls(folder, *tools, user=0):
    """What was called, in order, where these tools are there."""
    log = folder / "calls"
    for name in ("python3", "apt-get", *tools):
        more = ' && "$@"' if name == "sudo" else ""
        write(folder / name, f'echo "{name} $*" >>"{log}"{more}')
    write(folder / "id", f"echo {user}")
    for name in ("dirname", "env"):
        (folder / name).symlink_to(shutil.which(name))
    subprocess.run([shutil.which("bash"), str(SCRIPT)], env={"PATH": str(folder)}, check=True, timeout=60)
    return log.read_text(encoding="utf-8").splitlines()


def write(path, command):
    path.write_text(f"#!{shutil.which('bash')}\n{command}\n", encoding="utf-8")
    path.chmod(0o755)


@pytest.mark.parametrize("browser", BROWSERS)
def test_nothing_is_installed_where_a_browser_is_there(tmp_path, browser):
    assert calls(tmp_path, browser) == [LINT, TEST]


def test_root_and_a_machine_without_sudo_install_a_browser_after_lint(tmp_path):
    (tmp_path / "root").mkdir()
    (tmp_path / "user").mkdir()
    assert calls(tmp_path / "root", "sudo") == [LINT, *INSTALL, TEST]
    assert calls(tmp_path / "user", user=1000) == [LINT, *INSTALL, TEST]


def test_another_user_installs_a_browser_with_sudo(tmp_path):
    found = calls(tmp_path, "sudo", user=1000)
    assert [line for line in found if not line.startswith("sudo")] == [LINT, *INSTALL, TEST]
    assert sum(line.startswith("sudo") for line in found) == 2
