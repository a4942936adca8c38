"""Damaged model files of every kind: each is refused with a sentence, or what is loaded is finite; soon, and in little
memory.

The damage is drawn by seeds, so that every run sees the same files. A failure names the kind of file, the damage and
its number: `damaged(file, damage, number)` gives the bytes again.
"""

import os
import random
import resource
import signal
import sys
import time
import warnings
from contextlib import contextmanager

import pytest
import torch

from video_ldm.temporal.errors import VideoLDMError
from video_ldm.tests import fuzz_files, small_files

FILES = 1_650               # damaged files of all kinds together, at least
SECONDS, MEGABYTES = 2.0, 500
PATIENCE = 20               # seconds of the clock until something hangs
LONGEST = 1_200             # characters of a sentence
NAMES = ["layers_1.safetensors", "layers_2.safetensors", "layers_3.safetensors", "layers_4.safetensors",
         "motion.safetensors", "motion.ckpt", "motion_old.ckpt", "lora.safetensors", "lora.ckpt", "vsr.safetensors",
         "vsr.ckpt", "svd.ckpt", "decoder.safetensors", "scene.safetensors", "upscaler.safetensors",
         "last.safetensors", "text.safetensors", "image.safetensors", "autoencoder.safetensors"]
EACH = -(-FILES // len(NAMES))

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="the peak of memory is measured as Unix tells it")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    torch.manual_seed(0)
    found = {file.name: file for file in small_files.write_all(tmp_path_factory.mktemp("valid"))}
    assert sorted(found) == sorted(NAMES)
    return found


def damaged(file, number: int) -> tuple[str, bytes]:
    """The name of a damage, and a file's bytes with it."""
    draw = random.Random(f"{file.name} {number}")
    kinds = fuzz_files.damages(file)
    damage = kinds[number % len(kinds)]
    return damage.__name__, damage(file.path.read_bytes(), draw)


class Hanging(BaseException):
    """Not an Exception, so that no loader takes it for a fault of its file."""


@contextmanager
def alarm():
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
    """What is wrong with how a loader takes a file; None where nothing is."""
    before, peak_before, start = resident(), peak(), time.process_time()
    try:
        with alarm(), warnings.catch_warnings():
            warnings.simplefilter("ignore")     # of the host's networks; torch.load's have a test of their own
            loaded = load(path)
        bad = [tensor for tensor in small_files.tensors_of(loaded)
               if tensor.is_floating_point() and not torch.isfinite(tensor.float()).all()]
        if bad:
            return f"loads with {len(bad)} tensors that are not finite"
    except VideoLDMError as error:
        sentence = str(error)
        if len(sentence) > LONGEST or not sentence.isprintable() or not sentence.endswith("."):
            return f"is refused with no sentence, but: {sentence[:2000]!r}"
        if path.name not in sentence:
            return f"is refused without its name: {sentence}"
    except Hanging:
        return "hangs"
    except Exception as error:
        return f"raises {type(error).__name__}: {str(error)[:500]}"
    seconds, growth = time.process_time() - start, peak() - before
    if seconds > SECONDS:
        return f"takes {seconds:.1f} s"
    if peak() > peak_before and growth > MEGABYTES * 1e6:
        return f"takes {growth / 1e6:.0f} MB"
    return None


@pytest.mark.parametrize("name", NAMES)
def test_damaged_files_are_refused_in_a_sentence_or_load_finite(files, tmp_path, name):
    file = files[name]
    assert fault_of(file.load, file.path) is None and len(small_files.tensors_of(file.load(file.path))) > 3
    faults, path = [], tmp_path / f"damaged_{name}"
    for number in range(EACH):
        damage, content = damaged(file, number)
        path.write_bytes(content)
        fault = fault_of(file.load, path)
        if fault:
            faults.append(f"{number} {damage}: {fault}")
    assert not faults, "\n".join(faults)
