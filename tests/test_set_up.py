"""Setting up a ComfyUI in .host: once, by one process at a time, and never over what a set-up did not make."""

import logging
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from video_ldm.tools import lock, quiet_log, setup_host
from video_ldm.tools.host_log_filter import NOTE, LeftOutPackages, is_server
from video_ldm.tools.paths import HostError, venv_python


@pytest.fixture
def set_up(tmp_path, monkeypatch):
    """set_up() into an empty folder with recorded steps in place of downloads. The steps in `failing` fail."""
    calls, failing = [], set()

    def step(name, effect=None):
        def action():
            calls.append(name)
            if name in failing:
                raise HostError(f"{name} failed")
            if effect is not None:
                effect()
        return action

    folder = tmp_path / ".host"
    monkeypatch.setattr(setup_host, "HOST_FOLDER", folder)
    for name, effect in (("make_venv", lambda: make_file(venv_python(folder / "venv"))), ("install_torch", None),
                         ("install_requirements", None), ("fit_torchvision", None),
                         ("install_comfyui", lambda: write_requirements(folder))):
        monkeypatch.setattr(setup_host, name, step(name, effect))

    def run():
        calls.clear()
        setup_host.set_up()
        return list(calls)
    run.failing, run.folder, run.calls = failing, folder, calls
    return run


def make_file(path, text=""):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def write_requirements(folder, text="av>=14\n"):
    make_file(folder / "ComfyUI" / "main.py")
    make_file(folder / "ComfyUI" / "requirements.txt", text)


def test_set_up_runs_once_and_goes_on_where_it_failed(set_up):
    set_up.failing.add("install_requirements")
    with pytest.raises(HostError):
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
    with pytest.raises(HostError, match="needs 3.10 to 3.14"):
        set_up()


def test_a_download_that_fails_leaves_no_half_made_comfyui(tmp_path, monkeypatch):
    def broken_download(*arguments, **options):
        (tmp_path / "downloads.part").mkdir()
        raise HostError("pip could not download")
    monkeypatch.setattr(setup_host, "HOST_FOLDER", tmp_path)
    monkeypatch.setattr(setup_host, "clone_release", lambda folder: False)
    monkeypatch.setattr(setup_host, "pip", broken_download)
    with pytest.raises(HostError):
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


# ---- why it begins again ------------------------------------------------------------------------------------------

def test_the_console_says_why_a_step_is_done_again(set_up, monkeypatch, capsys):
    set_up()
    assert "again:" not in capsys.readouterr().out
    write_requirements(set_up.folder, "av>=15\n")
    set_up()
    assert "again: The list of what is required has changed." in capsys.readouterr().out
    monkeypatch.setattr(setup_host, "TORCH", "9.9.9")
    assert set_up() == ["install_torch", "fit_torchvision"]
    assert "and '9.9.9 0.28.0 " in capsys.readouterr().out
    here = setup_host.platform.python_version()
    monkeypatch.setattr(setup_host.platform, "python_version", lambda: "3.99.0")
    set_up()
    assert f"again: It was made for Python {here}, and this is Python 3.99.0." in capsys.readouterr().out


def test_what_was_deleted_is_made_again(set_up, capsys):
    set_up()
    (set_up.folder / "ComfyUI" / "main.py").unlink()
    assert set_up() == ["install_comfyui"]
    venv_python(set_up.folder / "venv").unlink()
    assert set_up() == ["make_venv", "install_torch", "install_requirements", "fit_torchvision"]
    assert f"{venv_python(set_up.folder / 'venv')} is missing." in capsys.readouterr().out


def test_an_environment_that_was_interrupted_after_its_first_step_gets_everything_again(set_up, monkeypatch):
    set_up()
    monkeypatch.setattr(setup_host.platform, "python_version", lambda: "3.99.0")
    set_up.failing.add("install_torch")
    with pytest.raises(HostError):
        set_up()
    set_up.failing.clear()
    assert set_up() == ["install_torch", "install_requirements", "fit_torchvision"]


# ---- .host through a link -----------------------------------------------------------------------------------------

SCRIPT = """
import sys
sys.path.insert(0, sys.argv[1])
from tools import setup_host
for name in ("make_venv", "install_torch", "install_comfyui", "install_requirements", "fit_torchvision"):
    setattr(setup_host, name, lambda name=name: print("did", name))
setup_host.set_up()
"""


@pytest.mark.skipif(os.name == "nt", reason="symbolic links need an administrator on Windows")
def test_a_complete_host_behind_a_link_is_used_as_it_is(tmp_path):
    """The stamps are those that set-ups have always written."""
    real, checkout = tmp_path / "elsewhere" / ".host", tmp_path / "checkout"
    write_requirements(real)
    make_file(venv_python(real / "venv"))
    make_file(checkout / "requirements.txt", "imageio\n")
    shutil.copytree(Path(setup_host.__file__).parent, checkout / "tools")
    build = "with CUDA" if setup_host.has_nvidia() else "the CPU build where there is one"
    both = f"{setup_host.TORCH} {setup_host.TORCHVISION}"
    for name, text in {
            "venv": f"{setup_host.platform.python_version()} {real}", "torch": f"{both} {build}", "torchvision": both,
            "comfyui": f"{setup_host.COMFYUI_TAG} {setup_host.COMFYUI_WHEEL}",
            "requirements": setup_host.digest(real / "ComfyUI" / "requirements.txt", checkout / "requirements.txt"),
            }.items():
        make_file(real / "steps" / name, text)
    (checkout / ".host").symlink_to(real)
    done = subprocess.run([sys.executable, "-c", SCRIPT, str(checkout)], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "" and venv_python(real / "venv").exists()
    make_file(real / "steps" / "venv", f"{setup_host.platform.python_version()} {checkout / '.host'}")
    again = subprocess.run([sys.executable, "-c", SCRIPT, str(checkout)], capture_output=True, text=True, cwd=tmp_path)
    assert (again.returncode, again.stdout) == (0, "")      # an environment that was made through the link


# ---- folders that are not ours ------------------------------------------------------------------------------------

def fill_venv(folder, with_pip):
    make_file(venv_python(folder), "new")


def test_a_folder_that_no_set_up_made_is_refused_and_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(setup_host, "HOST_FOLDER", tmp_path)
    monkeypatch.setattr(setup_host.venv, "create", fill_venv)
    monkeypatch.setattr(setup_host, "clone_release", lambda folder: pytest.fail("downloaded in vain"))
    for name, action in (("venv", setup_host.make_venv), ("ComfyUI", setup_host.install_comfyui)):
        make_file(tmp_path / name / "mine", "kept")
        with pytest.raises(HostError, match=f"{name} is there, and no finished set-up made it"):
            action()
        assert (tmp_path / name / "mine").read_text() == "kept"


@pytest.mark.skipif(os.name == "nt", reason="symbolic links need an administrator on Windows")
def test_a_linked_environment_is_refused_and_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(setup_host, "HOST_FOLDER", tmp_path / ".host")
    monkeypatch.setattr(setup_host.venv, "create", fill_venv)
    make_file(tmp_path / "somebody" / "mine", "kept")
    (tmp_path / ".host").mkdir()
    (tmp_path / ".host" / "venv").symlink_to(tmp_path / "somebody")
    with pytest.raises(HostError, match="no finished set-up made it"):
        setup_host.make_venv()
    assert (tmp_path / "somebody" / "mine").read_text() == "kept"


@pytest.mark.parametrize("failure", [OSError("no ensurepip"), KeyboardInterrupt()])
def test_the_environment_before_stays_until_the_new_one_is_there(tmp_path, monkeypatch, failure):
    def fail(folder, with_pip):
        make_file(venv_python(folder), "half")
        raise failure
    monkeypatch.setattr(setup_host, "HOST_FOLDER", tmp_path)
    make_file(venv_python(tmp_path / "venv"), "before")
    make_file(tmp_path / "steps" / "venv", "3.0.0 elsewhere")       # as a set-up left it that knew no marker
    monkeypatch.setattr(setup_host.venv, "create", fail)
    with pytest.raises(HostError if isinstance(failure, OSError) else KeyboardInterrupt):
        setup_host.make_venv()
    assert venv_python(tmp_path / "venv").read_text() == "before"
    monkeypatch.setattr(setup_host.venv, "create", fill_venv)
    setup_host.make_venv()
    assert venv_python(tmp_path / "venv").read_text() == "new"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["steps", "venv"]
    (tmp_path / "steps" / "venv").unlink()      # interrupted before the stamp was written: the marker says whose it is
    setup_host.make_venv()


def test_comfyui_is_replaced_when_the_new_one_is_complete(tmp_path, monkeypatch):
    def clone(folder):
        for name in ("main.py", "nodes.py", "comfy/sd.py"):
            make_file(folder / name, "new")
        return True
    monkeypatch.setattr(setup_host, "HOST_FOLDER", tmp_path)
    make_file(tmp_path / "ComfyUI" / "main.py", "before")
    make_file(tmp_path / "steps" / "comfyui", "v0.0.1 something")
    monkeypatch.setattr(setup_host, "clone_release", lambda folder: bool(make_file(folder / "README")) or True)
    with pytest.raises(HostError, match="is no ComfyUI"):
        setup_host.install_comfyui()
    assert (tmp_path / "ComfyUI" / "main.py").read_text() == "before"
    monkeypatch.setattr(setup_host, "clone_release", clone)
    setup_host.install_comfyui()
    assert (tmp_path / "ComfyUI" / "main.py").read_text() == "new"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ComfyUI", "steps"]


# ---- two at once --------------------------------------------------------------------------------------------------

def test_a_second_set_up_waits_and_finds_everything_done(set_up, monkeypatch):
    """Two threads stand for two processes here. The lock keeps them apart in the same way."""
    monkeypatch.setattr(lock, "POLL", 0.01)
    inside, waits, may_go_on = (threading.Event() for _ in range(3))
    said = []

    def say(text, **how):
        said.append(text)
        waits.set()
    monkeypatch.setattr(lock, "print", say, raising=False)
    install = setup_host.install_torch

    def slow():
        inside.set()
        assert may_go_on.wait(30)
        install()
    monkeypatch.setattr(setup_host, "install_torch", slow)
    first, second = (threading.Thread(target=setup_host.set_up) for _ in range(2))
    first.start()
    assert inside.wait(30)
    second.start()
    assert waits.wait(30)
    may_go_on.set()
    first.join(30), second.join(30)
    assert said == [f"Process {os.getpid()} sets up a ComfyUI in the same folder. Waiting for it to end."]
    assert set_up.calls == ["make_venv", "install_torch", "install_comfyui", "install_requirements", "fit_torchvision"]


HOLDER = """
import sys, time
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from tools.lock import Lock
with Lock(Path(sys.argv[2]), "works"):
    print("inside", flush=True)
    time.sleep(600)
"""


def test_the_lock_of_a_process_that_died_is_free(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(lock, "POLL", 0.01)
    path = tmp_path / "set-up.lock"
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(setup_host.ROOT), str(path)], stdout=subprocess.PIPE)
    try:
        assert holder.stdout.readline() == b"inside\n"
        timer = threading.Timer(0.3, holder.kill)
        timer.start()
        with lock.Lock(path, "works"):
            assert holder.wait(30) != 0 and path.read_text() == str(os.getpid())
        assert capsys.readouterr().out == f"Process {holder.pid} works. Waiting for it to end.\n"
    finally:
        holder.kill()
        holder.stdout.close()


# ---- the log of a server ------------------------------------------------------------------------------------------

def said(*messages):
    """What of these messages a server's log shows, with its levels."""
    logger, shown = logging.Logger("as the root logger"), []
    handler = logging.Handler()
    handler.emit = lambda record: shown.append((record.levelname, record.getMessage()))
    logger.addHandler(handler)
    logger.addFilter(LeftOutPackages())
    for message in messages:
        logger.warning(message)
    return shown


SUMMARY = ("WARNING: some comfy_extras/ nodes did not import correctly. This may be because ...\n",
           "IMPORT FAILED: nodes_audio.py", "\nThis issue might be caused by new missing dependencies added ...",
           "Please do a: pip install -r requirements.txt")
AUDIO = ("torchaudio missing, ACE model will be broken",
         "Traceback ...\n  File \".../comfy_extras/nodes_audio.py\"\nModuleNotFoundError: No module named 'torchaudio'",
         "Cannot import /comfy_extras/nodes_audio.py module for custom nodes: No module named 'torchaudio'")


def test_complaints_about_packages_that_are_left_out_become_one_line():
    templates = "********** ERROR ***********\n\ncomfyui-workflow-templates is not installed.\n"
    assert said(*AUDIO, *SUMMARY, templates, "Starting server") == [("INFO", NOTE), ("WARNING", "Starting server")]


def test_other_failures_stay_in_the_log_with_their_summary():
    other = ("Cannot import /comfy_extras/nodes_video.py module for custom nodes: No module named 'av'",
             "Cannot import /custom_nodes/sound module for custom nodes: No module named 'torchaudio'")
    for failure in other:
        shown = [message for _, message in said(*AUDIO, failure, *SUMMARY)]
        assert shown == [NOTE, failure, *SUMMARY]


def test_the_filter_is_written_once_and_works_in_servers_alone(tmp_path, set_up):
    packages = setup_host.HOST_FOLDER / "venv" / "lib" / "python3.11" / "site-packages"
    packages.mkdir(parents=True)
    set_up()
    module = packages / "video_ldm_log_filter.py"
    assert module.read_text(encoding="utf-8") == quiet_log.SOURCE.read_text(encoding="utf-8")
    os.utime(module, (1, 1))
    set_up()
    assert module.stat().st_mtime == 1
    assert is_server(["python", "-u", "main.py", "--port", "1"]) and is_server(["python", "C:\\ComfyUI\\main.py"])
    assert not is_server(["python", "-m", "pip", "install", "x"]) and not is_server(["python", "run.py"])
