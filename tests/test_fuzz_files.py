"""Damaged model files of every kind.

Each is refused with a sentence, or what is loaded is finite. Either is soon done and takes little memory. The damage is
drawn by seeds, so that every run sees the same files. A failure names the kind of file, the damage and its number.
`damaged(file, number)` gives the bytes again.
"""

import random
import sys

import pytest

from video_ldm.tests import fuzz_files, loader_help, small_files
from video_ldm.tests.loader_help import NAMES, fault_of

files = loader_help.files       # fixture
FILES = 1_650               # damaged files of all kinds together, at least
EACH = -(-FILES // len(NAMES))

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="the peak of memory is measured as Unix tells it")


def damaged(file, number: int) -> tuple[str, bytes]:
    """The name of a damage, and a file's bytes with it."""
    draw = random.Random(f"{file.name} {number}")
    kinds = fuzz_files.damages(file)
    damage = kinds[number % len(kinds)]
    return damage.__name__, damage(file.path.read_bytes(), draw)


@pytest.mark.slow
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
