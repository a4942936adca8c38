"""Torch files that are made to do harm: each is refused with one short sentence, soon, and in little memory."""

import pickle
import zipfile

import pytest
import torch

from video_ldm.temporal.families import load_decoder, load_temporal
from video_ldm.tests import fuzz_files, loader_help, small_files
from video_ldm.tests.formats_help import random_tensors, saved
from video_ldm.tests.loader_help import KEY, peak, refused, resident

files, tensors = loader_help.files, loader_help.tensors       # fixtures


# Dictionaries of a torch file

def with_pickle(data: bytes, content: bytes) -> bytes:
    """A torch archive whose pickle is another one."""
    return fuzz_files.rewritten(data, lambda name, old: content if name.endswith("data.pkl") else old)


def test_a_dictionary_that_holds_itself_is_refused(tensors, tmp_path):
    for name in ("state_dict", "model", "ema"):
        content = dict(tensors)
        content[name] = content
        torch.save(content, tmp_path / "loop.ckpt")
        assert "in more than 8 dictionaries, or in themselves" in refused(load_temporal, tmp_path / "loop.ckpt")


@pytest.mark.parametrize("times", [9, 3000])
def test_dictionaries_nested_without_end_are_refused(tensors, tmp_path, times):
    # Written by hand: Python's pickle cannot write so deep a dictionary.
    path = saved(tmp_path, "deep.ckpt", fuzz_files.nested(tensors, 1))
    key = pickle.dumps("model", 2)[2:-3]       # without its own memo
    deep = b"\x80\x02" + (b"}" + key) * times + b"}" + b"s" * times + b"."
    path.write_bytes(with_pickle(path.read_bytes(), deep))
    assert "damaged" in refused(load_temporal, path) or "holds no named tensors" in refused(load_temporal, path)


def test_tensors_whose_name_is_not_text_are_left_out(tensors, tmp_path):
    more = torch.zeros(1)
    torch.save({**tensors, 7: more, (1, 2): more, None: more, b"x": {"a": more}}, tmp_path / "odd.ckpt")
    assert len(load_temporal(tmp_path / "odd.ckpt").tensors) == len(load_temporal(
        saved(tmp_path, "plain.ckpt", tensors)).tensors)


@pytest.mark.parametrize("name", ["long.ckpt", "long.safetensors"])
@pytest.mark.parametrize("key, words", [("k" * 1_000_000, "1000000 characters long"), ("a\nb", "cannot be printed"),
                                        ("a\x1b[2Jb", "cannot be printed")])
def test_names_that_are_too_long_or_cannot_be_printed_are_refused_and_not_quoted(tensors, tmp_path, name, key, words):
    sentence = refused(load_temporal, saved(tmp_path, name, {**tensors, key: torch.zeros(1)}))
    assert f"holds a tensor whose name {'is ' if 'long' in words else ''}{words}" in sentence and len(sentence) < 300


def test_a_key_that_takes_for_ever_to_hash_is_refused(tensors, tmp_path):
    """A tuple of twice a tuple of twice a tuple, and so on: 200 bytes, and 2 ** 60 steps."""
    path = saved(tmp_path, "hash.ckpt", tensors)
    twice = b"".join(b"q" + bytes([n]) + b"h" + bytes([n]) + b"\x86" for n in range(60))
    content = b"\x80\x02})" + twice + b"K\x01s."
    path.write_bytes(with_pickle(path.read_bytes(), content))
    assert "holds tuples nested more than 8 deep" in refused(load_temporal, path)
    path.write_bytes(content)
    assert "holds tuples nested more than 8 deep" in refused(load_temporal, path)


# Memory

@pytest.mark.parametrize("new", [True, False])
def test_a_small_file_of_repeated_numbers_is_refused_and_not_filled(tensors, tmp_path, new):
    large = {**tensors, KEY: tensors[KEY].reshape(-1)[:1].expand(64_000, 64_000)}
    for key in tensors:
        if key.endswith("pos_encoder.pe"):
            table = {**tensors, key: torch.zeros(1, 1, 32).expand(1, 100_000_000, 32)}
    for content in (large, table):
        torch.save(content, tmp_path / "repeated.ckpt", _use_new_zipfile_serialization=new)
        assert (tmp_path / "repeated.ckpt").stat().st_size < 500_000
        before = resident()
        assert "bytes that repeat" in refused(load_temporal, tmp_path / "repeated.ckpt")
        assert peak() - before < 500e6 or resident() - before < 100e6


def test_a_file_whose_tensors_all_share_one_memory_is_refused(tmp_path):
    whole = torch.randn(3, 64, 64)
    decoder = {f"decoder.{key}": whole.reshape(-1)[: torch.Size(shape).numel()].reshape(shape)
               for key, shape in small_files.decoder_format.shapes_of(small_files.DECODER).items()
               if torch.Size(shape).numel() <= whole.numel()}
    rest = random_tensors({f"decoder.{key}": shape for key, shape in small_files.decoder_format.shapes_of(
        small_files.DECODER).items() if f"decoder.{key}" not in decoder})
    assert not rest or max(tensor.numel() for tensor in rest.values()) < 10 * whole.numel()
    torch.save(decoder | {key: whole.reshape(-1)[:1].expand(tensor.shape) for key, tensor in rest.items()},
               tmp_path / "shared.ckpt")
    assert "bytes that repeat" in refused(load_decoder, tmp_path / "shared.ckpt") or \
        "share them would take" in refused(load_decoder, tmp_path / "shared.ckpt")


def odd_tensor(tensor, kind: str):
    return {"sparse": lambda: tensor.to_sparse(), "meta": lambda: tensor.to("meta"), "bool": lambda: tensor > 0,
            "quantised": lambda: torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8),
            "complex": lambda: tensor.to(torch.complex64), "int": lambda: tensor.to(torch.int32),
            "nested": lambda: torch.nested.as_nested_tensor([tensor, tensor])}[kind]()


@pytest.mark.parametrize("kind, words", [
    ("sparse", "as a sparse tensor"), ("quantised", "as a quantised tensor"), ("meta", "as a tensor without values"),
    ("nested", "as a nested tensor"), ("complex", "not a floating-point type"), ("bool", "not a floating-point type"),
    ("int", "not a floating-point type")])
@pytest.mark.parametrize("file", ["motion.ckpt", "lora.ckpt", "vsr.ckpt", "svd.ckpt"])
@pytest.mark.filterwarnings("ignore")       # of torch, while the test makes such tensors
def test_a_tensor_that_is_no_plain_array_of_numbers_is_refused(files, tmp_path, file, kind, words):
    content = torch.load(files[file].path, weights_only=True)
    key = next(key for key, tensor in content.items() if tensor.ndim == 2 or file == "svd.ckpt" and tensor.ndim == 1)
    torch.save({**content, key: odd_tensor(content[key], kind)}, tmp_path / file)
    assert words in refused(files[file].load, tmp_path / file)


def test_a_parameter_and_shared_weights_load_as_plain_tensors(tensors, tmp_path):
    content = {key: torch.nn.Parameter(tensor) for key, tensor in tensors.items()}
    one, other = (f"mid_block.motion_modules.0.temporal_transformer.proj_{side}.weight" for side in ("in", "out"))
    content[one] = content[other]
    loaded = load_temporal(saved(tmp_path, "parameters.ckpt", content))
    assert {type(tensor) for tensor in loaded.tensors.values()} == {torch.Tensor}
    assert not any(tensor.requires_grad for tensor in loaded.tensors.values())


def test_a_compressed_archive_is_refused_and_not_unpacked(tensors, tmp_path):
    path = saved(tmp_path, "packed.ckpt", tensors)
    def larger(name, content):
        return content + b"\x00" * 300_000_000 if name.endswith("data.pkl") else content
    path.write_bytes(fuzz_files.rewritten(path.read_bytes(), larger, zipfile.ZIP_DEFLATED))
    assert path.stat().st_size < 2_000_000
    assert "torch archive that was compressed afterwards" in refused(load_temporal, path)


def test_an_archive_with_two_pickles_is_refused(tensors, tmp_path):
    path = saved(tmp_path, "two.ckpt", tensors)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(archive.namelist()[0].upper(), b"other")
    assert "parts overlap" in refused(load_temporal, path)
