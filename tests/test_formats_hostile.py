"""Model files that are made to do harm, or came out wrong: each is refused with one short sentence, and soon.

Metadata and weights are in test_formats_hostile_metadata.py, torch files in test_formats_hostile_torch.py.
"""

import json
import os
import pickle
import re
import socket
import stat
import struct
import warnings

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from video_ldm.nodes.host import files as host_files
from video_ldm.nodes.host import models
from video_ldm.temporal.errors import VideoLDMError
from video_ldm.temporal.families import identify, load_decoder, load_motion_lora, load_temporal
from video_ldm.tests import loader_help
from video_ldm.tests.formats_help import saved
from video_ldm.tests.loader_help import IMAGE, TEXT, VAE, alarm, fault_of, refused, rewritten

files, tensors = loader_help.files, loader_help.tensors       # fixtures


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


@pytest.mark.parametrize("name", ["motion", "lora", "vsr", "layers_1", "layers_2", "decoder", "upscaler", "scene"])
def test_a_tensor_under_a_second_name_is_refused_and_takes_the_place_of_none(files, tmp_path, name):
    file = files[f"{name}.safetensors"]

    def add(tensors, metadata):
        key = next(key for key in tensors if re.search(r"\.\d\.", key) and "temporal_transformer.norm" not in key)
        tensors[re.sub(r"\.(\d)\.", r".0\1.", key, count=1)] = tensors[key] + 1
    sentence = refused(file.load, rewritten(file, tmp_path, add))
    assert re.search(r"\.0\d\.|are the same tensor|is the same tensor|unknown tensor", sentence)
