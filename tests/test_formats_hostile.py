"""Model files that are made to do harm, or came out wrong: each is refused with one short sentence, and soon."""

import json
import os
import pickle
import socket
import stat
import struct
import warnings
import zipfile

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from video_ldm.nodes.host import files as host_files
from video_ldm.nodes.host import models
from video_ldm.temporal.errors import VideoLDMError
from video_ldm.temporal.families import identify, load_decoder, load_motion_lora, load_temporal
from video_ldm.temporal.formats import metadata
from video_ldm.tests import fuzz_files, small_files
from video_ldm.tests.formats_help import motion_shapes, motion_tensors, random_tensors, saved
from video_ldm.tests.test_fuzz_files import NAMES, alarm, fault_of, peak, resident

KEY = "mid_block.motion_modules.0.temporal_transformer.proj_in.weight"
SAFE = [name for name in NAMES if name.endswith(".safetensors")]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    torch.manual_seed(0)
    return {file.name: file for file in small_files.write_all(tmp_path_factory.mktemp("valid"))}


@pytest.fixture(scope="module")
def tensors():
    return motion_tensors(motion_shapes((32,)))


def refused(load, path) -> str:
    """The sentence with which a loader refuses a file: short, on one line, within two seconds and 500 MB."""
    assert fault_of(load, path) is None
    with alarm(), pytest.raises(VideoLDMError) as caught:
        load(path)
    return str(caught.value)


def rewritten(file, folder, change) -> object:
    """A copy of a safetensors file after `change(tensors, metadata)`."""
    with safe_open(str(file.path), framework="pt") as opened:
        header = dict(opened.metadata() or {})
    content = load_file(file.path)
    change(content, header)
    save_file(content, folder / file.name, metadata=header or None)
    return folder / file.name


# Numbers that are not finite

@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", SAFE)
def test_nan_and_infinity_are_refused_by_the_name_of_the_first_tensor_with_them(files, tmp_path, name, value):
    key = sorted(load_file(files[name].path))[-1]

    def change(content, _):
        content[key].view(-1)[-1] = value
    sentence = refused(files[name].load, rewritten(files[name], tmp_path, change))
    assert f"the tensor {key} holds NaN or infinity" in sentence and name in sentence


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn,
                                   torch.float8_e5m2])
@pytest.mark.parametrize("name", ["motion.safetensors", "motion.ckpt"])
def test_nan_is_found_in_weights_of_every_type(tensors, tmp_path, dtype, name):
    stored = {key: tensor.to(dtype) for key, tensor in tensors.items()}
    loaded = load_temporal(saved(tmp_path, name, stored))
    assert loaded.dtype == dtype
    stored[KEY] = tensors[KEY].clone().index_fill_(0, torch.tensor(3), float("nan")).to(dtype)
    assert f"the tensor {KEY} holds NaN or infinity" in refused(load_temporal, saved(tmp_path, name, stored))


def test_large_finite_numbers_whose_sum_is_infinite_are_taken(tensors, tmp_path):
    stored = {**tensors, KEY: torch.full_like(tensors[KEY], 3e38)}
    loaded = load_temporal(saved(tmp_path, "large.safetensors", stored))
    assert loaded.tensors["layers.middle_0_post_attn_0.temporal_transformer.proj_in.weight"].max() == torch.tensor(3e38)


# Metadata

LAYERS, UPSCALER = "layers_2.safetensors", "upscaler.safetensors"
DECODER, SCENE = "decoder.safetensors", "scene.safetensors"
TEXT, IMAGE, VAE, TRAINING = "text.safetensors", "image.safetensors", "autoencoder.safetensors", "last.safetensors"
DEEP = "[" * 1000 + "]" * 1000
ENTRIES = [
    *((LAYERS, entry, value, entry) for entry in ("linear_start", "linear_end")
      for value in ("-0.1", "0", "1", "1.5", "nan", "inf", "1e999", "\u0661")),
    (LAYERS, "linear_start", "0.5", "linear_start is 0.5 and linear_end is 0.012"),
    *((LAYERS, "fps", value, f"fps is {value}") for value in ("nan", "inf", "-8", "0", "1e30")),
    *((LAYERS, "frames", value, f"frames is {value}") for value in ("1.5", "-3", "1" + "0" * 30, "true", "\u0666")),
    (LAYERS, "layers", "1000000000", "layers is 1000000000"), (LAYERS, "positions", "-1", "positions is -1"),
    (LAYERS, "mix_length", "-1", "mix_length is -1"), (LAYERS, "base_context_dim", "-48", "base_context_dim is -48"),
    (LAYERS, "heads", DEEP, "heads is"), (LAYERS, "heads", "[1]", "heads is [1], where a dictionary"),
    *((LAYERS, "heads", f'{{"input_blocks.1.1": {value}}}', "heads of input_blocks.1.1 is")
      for value in ("true", "0", "-2", "1.5", "1e999", "[2]", "null", '"2"', "1" + "0" * 30)),
    *((LAYERS, "context_positions", value, "no list of lists") for value in (
        DEEP, "[[1e999]]", "[[true]]", "[[8]]", "[[-9]]", "[[1000000000]]", '{"a": 1}', "[1]", "7", '["12"]')),
    (LAYERS, "family", "x" * 20_000, "family is"), (LAYERS, "version", "9" * 5000, "version 999"),
    *((DECODER, "fps", value, f"fps is {value}") for value in ("nan", "inf", "-1")),
    *((DECODER, "frames", value, f"frames is {value}") for value in ("1.5", "0", "1" + "0" * 30)),
    *((UPSCALER, "unet", value, "unet is") for value in (DEEP, "[1]", "7", "")),
    *((UPSCALER, entry, value, entry) for entry in ("augmentation_start", "linear_end", "details")
      for value in ("-0.1", "nan", "1e999")),
    (UPSCALER, "most_noise", "1e999", "most_noise is 1e999"),
    *((SCENE, "params", value, "params is") for value in (DEEP, "[]", "null", "{")),
    (SCENE, "base_context_dim", "-1", "base_context_dim is -1"),
    *((part, "params", value, "params is") for part in (TEXT, IMAGE, VAE) for value in (DEEP, "[]", "7", "")),
    (TRAINING, "state", DEEP, "its state is"), (TRAINING, "state", "[]", "its state is"),
    (TRAINING, "state", "{}", "its state lacks step, seconds, settings"),
]
VALUES = [      # of one place within an entry of JSON
    *((UPSCALER, "unet", name, value, name) for name in ("model_channels", "head_channels", "latent_channels")
      for value in (-1, 0, 10 ** 9, True, 1.5, "32", None, [32])),
    *((UPSCALER, "unet", name, value, name) for name in ("channel_mult", "num_res_blocks", "transformer_depth")
      for value in ([10 ** 9, 1], [1] * 10 ** 5, [-1, 1], [1.5, 1], [[1], 1], 3, [], {"a": 1})),
    (UPSCALER, "unet", "num_res_blocks", [1], "not of one length"), (UPSCALER, "unet", "more", 1, "unknown entry more"),
    (UPSCALER, "unet", "self_attention", 1, "self_attention"),
    *((SCENE, "params", name, value, name) for name in ("layers", "width", "heads", "frequencies")
      for value in (-1, 10 ** 9, True, 2.5, "3", None)),
    (SCENE, "params", "heads", 3, "16 does not divide into 3 heads"),
    (SCENE, "params", "sites", [[0, 32]] * 10 ** 5, "sites"),
    *((SCENE, "params", "sites", value, "site") for value in ([[0]], [[0, 32], [0, 32]], 7, [["a", 32]])),
    *((SCENE, "params", "labels", value, "label") for value in ([["light", 7]], [[1, ["day"]]], [["light"]], {})),
    *((SCENE, "params", "colours", value, "colours") for value in ([1, 2], "red", None)),
    *((TEXT, "params", name, value, name) for name in ("width", "layers", "heads")
      for value in (-1, 0, 10 ** 9, True, 1.5, "2", None)),
    *((TEXT, "params", "tokens", value, "token") for value in (
        [5, 7, 49406, 49408], [-1, 5, 7, 9], [5, 5, 7, 9], [1e999, 5, 7, 9], list(range(49409)), 7, None,
        [True, 5, 7, 9])),
    *((IMAGE, "params", name, value, name) for name in ("linear_start", "linear_end")
      for value in (-0.1, 0, 1, float("nan"), float("inf"), True, None, [1])),
    (IMAGE, "params", "prediction", "x", "prediction"), (IMAGE, "params", "latent", {}, "latent lacks"),
    (IMAGE, "params", "unet", [], "unet is"),
    *((VAE, "params", "channel_mult", value, "channel_mult") for value in ([10 ** 9], [1] * 10 ** 5, [], 7, [-1, 1])),
    *((VAE, "params", "channels", value, "channels") for value in (-32, 0, 10 ** 9, True, "32")),
    *((TRAINING, "state", "step", value, "its step is") for value in (-1, 1.5, True, None, "7", 10 ** 30)),
    *((TRAINING, "state", "seconds", value, "seconds is") for value in (float("nan"), None, [])),
    (TRAINING, "state", "settings", [], "its settings is"),
]


@pytest.mark.parametrize("name, entry, value, words", ENTRIES)
def test_an_entry_of_the_metadata_that_cannot_be_is_refused_by_its_name(files, tmp_path, name, entry, value, words):
    def change(_, header):
        header[entry] = value
    assert words in refused(files[name].load, rewritten(files[name], tmp_path, change))


@pytest.mark.parametrize("name, entry, place, value, words", VALUES)
def test_a_value_within_the_metadata_that_cannot_be_is_refused_by_its_name(files, tmp_path, name, entry, place, value,
                                                                           words):
    def change(_, header):
        header[entry] = json.dumps({**json.loads(header[entry]), place: value})
    assert words in refused(files[name].load, rewritten(files[name], tmp_path, change))


def test_json_is_read_to_a_depth_and_a_length():
    assert metadata.parsed_json('{"a": [[1, 2.5, "x", null]]}', "it") == {"a": [[1, 2.5, "x", None]]}
    assert metadata.parsed_json("[" * 8 + "]" * 8, "it") == [[[[[[[[]]]]]]]]
    for text, words in (("[" * 9 + "]" * 9, "it is nested more than 8 deep"), (DEEP * 300, "is nested|no.* JSON"),
                        (f'"{"x" * 1_000_001}"', "it is 1000003 characters long"), ("{", "is not JSON")):
        with pytest.raises(metadata.MetadataError, match=words):
            metadata.parsed_json(text, "it")


def test_numbers_are_read_as_they_are_written():
    assert [metadata.whole(value, "it", -5, 20, text=True) for value in ("16", "-5", "+7")] == [16, -5, 7]
    assert metadata.whole(16, "it", -5, 20) == 16 and metadata.number(0.5, "it", 0, 1) == 0.5
    assert [metadata.number(value, "it", 0, 1, text=True) for value in ("0.5", "5e-1")] == [0.5] * 2
    assert metadata.betas_of({"linear_start": "0.00085", "linear_end": "0.012"}) == (0.00085, 0.012)
    assert metadata.fps_of({"fps": "23.976"}) == 23.976 and metadata.fps_of({}) is None
    for value, text in ((True, False), (1.0, False), ("1.0", True), ("", True), (" 1", True), (None, False),
                        (21, False), ("21", True), ("\uff11", True), (10 ** 5000, False), ([1], False), ("7", False)):
        with pytest.raises(metadata.MetadataError, match="^it is .*a whole number from -5 to 20 is due$"):
            metadata.whole(value, "it", -5, 20, text)
    for value, text in ((True, False), ("", True), ("x", True), (0, False), (1, False), ("nan", True), ("0.5", False),
                        (float("inf"), False), (None, False), (10 ** 400, False), ("\uff11", True), ([0.5], False)):
        with pytest.raises(metadata.MetadataError, match="^it is .*a number between 0 and 1 is due$"):
            metadata.number(value, "it", 0, 1, text)


# What is no file of bytes

def special(folder, kind: str):
    path = folder / "model.safetensors"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        socket.socket(socket.AF_UNIX).bind(str(path))
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.mkdir()
    return path


KINDS = {"pipe": "is a named pipe", "socket": "is a socket", "device": "is a device", "folder": "is a folder"}


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="Windows has no named pipes in folders")
@pytest.mark.parametrize("kind", KINDS)
def test_a_pipe_a_socket_a_device_or_a_folder_is_refused_and_never_opened(files, tmp_path_factory, kind):
    folder = tmp_path_factory.mktemp("k")      # a short path, as the name of a socket must have
    path = special(folder, kind)
    for load in {file.load for file in files.values()} | {identify}:
        with alarm(), pytest.raises(VideoLDMError, match=f"model.safetensors.* {KINDS[kind]}|is missing"):
            load(path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="Windows has no named pipes in folders")
def test_a_node_says_what_lies_under_a_models_name(tmp_path):
    import folder_paths
    folder_paths.add_model_folder_path("video_ldm", str(tmp_path))
    special(tmp_path, "pipe")
    for resolve in (host_files.resolve, host_files.resolve_decoder, host_files.fingerprint):
        with alarm(), pytest.raises(VideoLDMError, match="model.safetensors is a named pipe, not a model file"):
            resolve("model.safetensors")
    with pytest.raises(VideoLDMError, match="There is no file gone.safetensors"):
        host_files.resolve("gone.safetensors")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read_is_refused(files, tmp_path):
    path = saved(tmp_path, "secret.safetensors", {"a": torch.zeros(1)})
    path.chmod(stat.S_IWUSR)
    assert "secret.safetensors cannot be opened (Permission denied)" in refused(load_temporal, path)


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


def test_what_has_no_name_of_text_is_no_tensor_of_the_file(tensors, tmp_path):
    more = torch.zeros(1)
    torch.save({**tensors, 7: more, (1, 2): more, None: more, b"x": {"a": more}}, tmp_path / "odd.ckpt")
    assert len(load_temporal(tmp_path / "odd.ckpt").tensors) == len(load_temporal(
        saved(tmp_path, "plain.ckpt", tensors)).tensors)


@pytest.mark.parametrize("name", ["long.ckpt", "long.safetensors"])
@pytest.mark.parametrize("key, words", [("k" * 1_000_000, "1000000 characters long"), ("a\nb", "cannot be printed"),
                                        ("a\x1b[2Jb", "cannot be printed")])
def test_names_that_no_sentence_can_hold_are_refused_without_them(tensors, tmp_path, name, key, words):
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
def test_what_is_no_plain_array_of_numbers_is_refused(files, tmp_path, file, kind, words):
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


# safetensors headers

def header_of(**entries) -> bytes:
    """Header text for two float32 tensors a and b of 2 numbers, with changes."""
    plain = {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
             "b": {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]}}
    return json.dumps(plain | entries).encode()


def entry(shape, start, end, dtype="F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


@pytest.mark.parametrize("header, words", [
    (header_of(b=entry([2], 4, 16)), "a gap or an overlap in front of the tensor b"),
    (header_of(b=entry([1], 12, 16)), "a gap or an overlap in front of the tensor b"),
    (header_of(b=entry([4], 0, 16)), "a gap or an overlap in front of the tensor b"),
    (header_of(b=entry([3], 8, 16)), "8 bytes for the tensor b of shape [3] and type F32"),
    (header_of(b=entry([2], 8, 16, "F64")), "8 bytes for the tensor b of shape [2] and type F64"),
    (header_of(b=entry([2], 16, 8)), "a gap or an overlap in front of the tensor b"),
    (header_of(b=entry([2], 8, 24)), "16 bytes for the tensor b of shape [2]"),
    (header_of(b=entry([4], 8, 24)), "announces"), (header_of(b=entry([-2], 8, 16)), "header that cannot be read"),
    (header_of(b=entry([2.0], 8, 16)), "header that cannot be read"),
    (header_of(b=entry([True, 2], 8, 16)), "header that cannot be read"),
    (header_of(b=entry([10 ** 30, 0], 8, 16)), "header that cannot be read"),
    (header_of(b=entry([1] * 10_000 + [2], 8, 16)), "header that cannot be read"),
    (header_of(b=7), "header that cannot be read"), (header_of(__metadata__={"a": 1}), "header that cannot be read"),
    (header_of().replace(b'"b"', b'"a"'), "header that cannot be read"),
    (b'{"a":' * 50_000 + b"1" + b"}" * 50_000, "header that cannot be read"),
])
def test_a_header_that_does_not_describe_its_file_is_refused(tmp_path, header, words):
    path = tmp_path / "header.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(16))
    for load in (identify, load_temporal, load_motion_lora):
        assert words in refused(load, path)


# Numbers in names

@pytest.mark.parametrize("number", ["999", "99999999", "9" * 250])
def test_a_large_number_in_a_name_builds_nothing(files, tensors, tmp_path, number):
    def numbered(content: dict, old: str, new: str) -> dict:
        key = next(key for key in content if old in key)
        return {**content, key.replace(old, new): content[key]}
    vsr = torch.load(files["vsr.ckpt"].path, weights_only=True)
    lora = torch.load(files["lora.ckpt"].path, weights_only=True)
    decoder = torch.load(files["svd.ckpt"].path, weights_only=True)
    for load, content, old in (
            (load_temporal, tensors, "motion_modules.0"), (load_temporal, tensors, "transformer_blocks.0"),
            (load_temporal, tensors, "attention_blocks.0"), (load_temporal, tensors, "down_blocks.0"),
            (load_temporal, vsr, "down_temporal_blocks.0"), (load_temporal, vsr, "attentions.0"),
            (load_temporal, vsr, "transformer_blocks.0"), (load_motion_lora, lora, "motion_modules.0"),
            (load_decoder, decoder, "up.0"), (load_decoder, decoder, "block.0")):
        changed = numbered(content, old, f"{old.rsplit('.', 1)[0]}.{number}")
        assert fault_of(load, saved(tmp_path, "numbered.ckpt", changed)) is None


def test_many_modules_that_each_claim_many_blocks_build_nothing(tmp_path):
    content = {f"{side}_blocks.{level}.motion_modules.0.temporal_transformer.transformer_blocks.400.norms.0.weight":
               torch.zeros(0) for side in ("down", "up") for level in range(400)}
    content |= {f"{side}_blocks.{level}.motion_modules.{module}.temporal_transformer.norm.weight": torch.zeros(32)
                for side, modules in (("down", 1), ("up", 2)) for level in range(400) for module in range(modules)}
    assert "its names number" in refused(load_temporal, saved(tmp_path, "many.safetensors", content))


# Demo parts and checkpoints of a training

@pytest.mark.parametrize("name", [TEXT, IMAGE, VAE])
def test_a_demo_part_whose_tensors_have_other_shapes_is_refused_before_it_is_built(files, tmp_path, name):
    def change(content, _):
        key = next(key for key in content if content[key].ndim >= 2)
        content[key] = content[key][:-1].contiguous()
    sentence = refused(files[name].load, rewritten(files[name], tmp_path, change))
    assert "has shape" in sentence and "is due" in sentence and "Install the pack again" in sentence


def test_a_demo_part_without_params_is_refused(files, tmp_path):
    for name in (TEXT, IMAGE, VAE):
        path = rewritten(files[name], tmp_path, lambda content, header: header.pop("params"))
        assert "is damaged (params is ''" in refused(files[name].load, path)


def test_a_checkpoint_that_lacks_the_state_of_the_optimizer_is_refused(tmp_path):
    from video_ldm.tests.test_training_loop import make_loop
    make_loop(tmp_path).run(on_step=lambda step, steps: step == 11)
    path = tmp_path / "last.safetensors"
    with safe_open(str(path), framework="pt") as opened:
        header = opened.metadata()
    whole = load_file(path)
    for key, value in (("optimizer.net.first.weight.exp_avg", None), ("optimizer.net.first.weight.exp_avg_sq",
                                                                     torch.zeros(3))):
        content = {name: tensor for name, tensor in whole.items() if name != key}
        save_file(content | ({key: value} if value is not None else {}), path, metadata=header)
        with pytest.raises(VideoLDMError, match=f"another model: its '{key}' is missing or has another shape"):
            make_loop(tmp_path)


# Sentences

def test_torch_files_are_read_and_refused_without_a_warning(files, tensors, tmp_path):
    paths = [file.path for file in files.values() if not file.safetensors]
    for protocol in (2, 4, 5):
        paths.append(tmp_path / f"protocol_{protocol}.ckpt")
        torch.save(tensors, paths[-1], pickle_protocol=protocol)
    paths.append(tmp_path / "pickle.pt")
    paths[-1].write_bytes(pickle.dumps({"a": [1, 2]}, protocol=5))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for path in paths:
            try:
                identify(path)
            except VideoLDMError as error:
                assert path.name.startswith(("protocol", "pickle")) and "this pack runs no code" in str(error)


def test_the_name_of_code_in_a_pickle_is_cut_in_the_sentence(tmp_path):
    name = b"os." + b"x" * 1_000_000
    (tmp_path / "long.pt").write_bytes(b"\x80\x02cos\n" + name + b"\n.")
    sentence = refused(load_temporal, tmp_path / "long.pt")
    assert "needs Python code to be opened" in sentence and len(sentence) < 400


def test_a_tar_archive_is_refused_whatever_it_is_named(tmp_path):
    import tarfile
    (tmp_path / "inside").write_bytes(b"x" * 100)
    for name in ("sys_info", "\x80\x02pickle"):
        with tarfile.open(tmp_path / "old.pt", "w", format=tarfile.PAX_FORMAT, encoding="latin-1") as archive:
            archive.add(tmp_path / "inside", name)
        assert "is a tar archive" in refused(load_temporal, tmp_path / "old.pt") or \
            "is neither a torch file" in refused(load_temporal, tmp_path / "old.pt")


def test_a_name_with_an_end_of_line_is_shown_on_one_line(tmp_path):
    path = tmp_path / "a\nb.safetensors"
    path.write_bytes(b"")
    with pytest.raises(VideoLDMError, match=r"^a b\.safetensors is empty"):
        load_temporal(path)


def test_the_bundled_demo_files_still_load():
    folder = host_files.DEMO_FOLDER
    assert models.read_part(folder / "text.safetensors", "text")[1]["tokens"][-1] == models.END
    for name in ("video_ldm_driving", "video_ldm_driving_x4", "video_ldm_driving_upscaler_layers"):
        assert load_temporal(folder / f"{name}.safetensors").tensors
