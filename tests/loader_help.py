"""How a loader takes a bad model file: with one sentence, soon, and in little memory.

Holds the small valid files as a fixture, the watch over a loader's time and memory, and a way to change a file.
"""

import os
import resource
import signal
import sys
import time
import warnings
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from video_ldm.temporal.errors import VideoLDMError
from video_ldm.tests import small_files
from video_ldm.tests.formats_help import motion_shapes, motion_tensors

SECONDS, MEGABYTES = 2.0, 500
PATIENCE = 20               # seconds of the clock until something hangs
LONGEST = 1_200             # characters of a sentence
NAMES = ["layers_1.safetensors", "layers_2.safetensors", "layers_3.safetensors", "layers_4.safetensors",
         "motion.safetensors", "motion.ckpt", "motion_old.ckpt", "lora.safetensors", "lora.ckpt", "vsr.safetensors",
         "vsr.ckpt", "svd.ckpt", "lavie.safetensors", "lavie.ckpt", "decoder.safetensors", "scene.safetensors",
         "small.safetensors", "small_autoencoder.safetensors", "pvdm.pth",
         "sparse.safetensors", "camera.safetensors", "upscaler.safetensors", "last.safetensors", "network.safetensors",
         "text.safetensors", "image.safetensors", "autoencoder.safetensors"]
TEXT, IMAGE, VAE = "text.safetensors", "image.safetensors", "autoencoder.safetensors"       # the parts of the demo
KEY = "mid_block.motion_modules.0.temporal_transformer.proj_in.weight"      # of a tensor in the fixture `tensors`


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """{name: file} of a valid file of every kind."""
    torch.manual_seed(0)
    found = {file.name: file for file in small_files.write_all(tmp_path_factory.mktemp("valid"))}
    assert sorted(found) == sorted(NAMES)
    return found


@pytest.fixture(scope="module")
def tensors():
    """The tensors of a small AnimateDiff file."""
    return motion_tensors(motion_shapes((32,)))


class Hanging(BaseException):
    """Not an Exception, so that no loader takes it for a fault of its file."""


@contextmanager
def alarm():
    """Ends what has not ended after PATIENCE seconds."""
    def ring(*_):
        raise Hanging
    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(PATIENCE)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def resident() -> int:
    """Bytes of memory in use now."""
    if not os.path.exists("/proc/self/statm"):
        return peak()
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def peak() -> int:
    """Bytes of memory in use at most, so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def fault_of(load, path) -> str | None:
    """What is wrong with how a loader takes a file, or None.

    On a busy machine the same work takes more seconds of the processor. Slow is a file that takes too long three times.
    """
    for _ in range(3):
        fault, seconds = measured(load, path)
        if fault or seconds <= SECONDS:
            return fault
    return f"takes {seconds:.1f} s"


def measured(load, path) -> tuple[str | None, float]:
    """What is wrong with how a loader takes a file, its time aside, or None; and the seconds of the processor."""
    before, peak_before, start = resident(), peak(), time.process_time()
    fault = outcome_of(load, path)
    seconds, growth = time.process_time() - start, peak() - before
    if fault is None and peak() > peak_before and growth > MEGABYTES * 1e6:
        fault = f"takes {growth / 1e6:.0f} MB"
    return fault, seconds


def outcome_of(load, path) -> str | None:
    """What is wrong with what a loader gives or says, or None."""
    try:
        with alarm(), warnings.catch_warnings():
            warnings.simplefilter("ignore")     # of the host's networks; torch.load's have a test of their own
            loaded = load(path)
        bad = [tensor for tensor in small_files.tensors_of(loaded)
               if tensor.is_floating_point() and not torch.isfinite(tensor.float()).all()]
        return f"loads with {len(bad)} tensors that are not finite" if bad else None
    except VideoLDMError as error:
        sentence = str(error)
        if len(sentence) > LONGEST or not sentence.isprintable() or not sentence.endswith("."):
            return f"is refused with no sentence, but: {sentence[:2000]!r}"
        return None if path.name in sentence else f"is refused without its name: {sentence}"
    except Hanging:
        return "hangs"
    except Exception as error:
        return f"raises {type(error).__name__}: {str(error)[:500]}"


def refused(load, path) -> str:
    """The sentence with which a loader refuses a file: short, on one line, within two seconds and 500 MB."""
    assert fault_of(load, path) is None
    with alarm(), pytest.raises(VideoLDMError) as caught:
        load(path)
    return str(caught.value)


def rewritten(file, folder, change) -> Path:
    """A copy of a safetensors file after `change(tensors, metadata)`."""
    with safe_open(str(file.path), framework="pt") as opened:
        header = dict(opened.metadata() or {})
    content = load_file(file.path)
    change(content, header)
    save_file(content, folder / file.name, metadata=header or None)
    return folder / file.name
