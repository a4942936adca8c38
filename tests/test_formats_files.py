"""Opening files: what is wrong with one is said in a sentence, and nothing in it is ever run."""

import pickle
import zipfile

import pytest
import torch
from safetensors.torch import save_file

from video_ldm.temporal.errors import VideoLDMError
from video_ldm.temporal.families import identify, load_temporal
from video_ldm.temporal.formats.files import open_file
from video_ldm.tests.formats_help import motion_shapes, motion_tensors, saved

SHAPES = motion_shapes((32, 32))


@pytest.fixture(scope="module")
def tensors():
    return motion_tensors(SHAPES)


def refused(path) -> str:
    """The sentence with which a file is refused. Every entrance gives the same."""
    with pytest.raises(VideoLDMError) as caught:
        identify(path)
    with pytest.raises(VideoLDMError) as loading:
        load_temporal(path)
    sentence = str(caught.value)
    assert sentence == str(loading.value) and sentence.startswith(path.name if path.exists() else "There is no file")
    assert sentence.endswith(".") and "\n" not in sentence
    return sentence


def write(folder, name: str, content: bytes):
    path = folder / name
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("name", ["v2.safetensors", "v2.ckpt", "v2.pt", "v2.pth", "v2.bin"])
def test_a_file_opens_whatever_its_extension(tmp_path, tensors, name):
    file = open_file(saved(tmp_path, name, tensors))
    assert file.shapes == SHAPES
    key = next(iter(SHAPES))
    assert torch.equal(file.read([key])[key], tensors[key])


def test_legacy_torch_files_and_safetensors_named_ckpt_open_too(tmp_path, tensors):
    torch.save(tensors, tmp_path / "old.ckpt", _use_new_zipfile_serialization=False)
    assert identify(tmp_path / "old.ckpt").kind == "animatediff_v2"
    save_file(tensors, tmp_path / "renamed.ckpt")
    assert identify(tmp_path / "renamed.ckpt").kind == "animatediff_v2"


@pytest.mark.parametrize("wrap", [
    lambda t: {"state_dict": t, "epoch": 3, "global_step": 7},
    lambda t: {"ema": t, "state_dict": {"x": torch.zeros(1)}, "optimizer": {"lr": 1}},
    lambda t: {"state_dict": {f"module.{key}": tensor for key, tensor in t.items()}, "animatediff_config": {"a": 1}},
    lambda t: {"module": {f"_forward_module.{key}": tensor for key, tensor in t.items()}},
    lambda t: {f"model.diffusion_model.{key}": tensor for key, tensor in t.items()},
    lambda t: {f"unet._orig_mod.{key}": tensor for key, tensor in t.items()},
    lambda t: {"state_dict": {"module": t}},
    lambda t: {**t, "FancyVideo": "text"},
])
def test_what_training_scripts_wrap_around_weights_is_peeled(tmp_path, tensors, wrap):
    torch.save(wrap(tensors), tmp_path / "wrapped.ckpt")
    loaded = load_temporal(tmp_path / "wrapped.ckpt")
    bare = load_temporal(saved(tmp_path, "bare.safetensors", tensors))
    assert loaded.kind == "animatediff_v2" and loaded.params == bare.params
    assert all(torch.equal(loaded.tensors[key], bare.tensors[key]) for key in bare.tensors)


def test_a_missing_file_is_refused(tmp_path):
    assert "Refresh the list" in refused(tmp_path / "gone.safetensors")


def test_a_folder_is_refused(tmp_path):
    (tmp_path / "v2.ckpt").mkdir()
    assert "is a folder, not a model file" in refused(tmp_path / "v2.ckpt")


def test_an_unknown_extension_is_refused(tmp_path):
    assert "ends in .txt" in refused(write(tmp_path, "v2.txt", b"hello"))


@pytest.mark.parametrize("name", ["v2.safetensors", "v2.ckpt"])
def test_an_empty_file_is_refused(tmp_path, name):
    assert "is empty (0 bytes)" in refused(write(tmp_path, name, b""))


PAGES = [b"<!DOCTYPE html><html>Sign in</html>", b"\n  <html lang=en>", b"\xef\xbb\xbf<!doctype HTML>"]


@pytest.mark.parametrize("page", PAGES)
@pytest.mark.parametrize("name", ["v2.safetensors", "v2.ckpt"])
def test_a_web_page_is_refused(tmp_path, name, page):
    assert "is a web page saved under a model's name" in refused(write(tmp_path, name, page))


def test_a_git_lfs_pointer_is_refused(tmp_path):
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    assert "git-lfs pointer" in refused(write(tmp_path, "v2.ckpt", pointer))


def test_a_gguf_file_is_refused(tmp_path):
    assert "GGUF" in refused(write(tmp_path, "v2.bin", b"GGUF\x03\x00\x00\x00" + bytes(40)))


@pytest.mark.parametrize("share", [0.0003, 0.01, 0.5, 0.999])
@pytest.mark.parametrize("name", ["v2.safetensors", "v2.ckpt"])
def test_a_truncated_download_is_refused(tmp_path, tensors, name, share):
    path = saved(tmp_path, name, tensors)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    assert "damaged or only partly downloaded" in refused(path)


def test_a_truncated_legacy_torch_file_is_refused(tmp_path, tensors):
    path = tmp_path / "old.ckpt"
    torch.save(tensors, path, _use_new_zipfile_serialization=False)
    for share in (0.0005, 0.3, 0.9):
        content = path.read_bytes()
        cut = write(tmp_path, "cut.ckpt", content[: int(len(content) * share)])
        assert "damaged or only partly downloaded" in refused(cut)


def test_a_safetensors_file_with_a_broken_header_or_a_tail_is_refused(tmp_path, tensors):
    content = saved(tmp_path, "v2.safetensors", tensors).read_bytes()
    assert "header that cannot be read" in refused(write(tmp_path, "a.safetensors", content[:9] + b"#" + content[10:]))
    assert "header announces" in refused(write(tmp_path, "b.safetensors", content + b"tail"))


class Evil:
    """A pickle that would run a command when opened."""

    def __init__(self, mark):
        self.mark = str(mark)

    def __reduce__(self):
        import os
        return os.mkdir, (self.mark,)


@pytest.mark.parametrize("new", [True, False])
def test_a_pickle_with_code_in_it_is_refused_and_not_run(tmp_path, tensors, new):
    mark = tmp_path / "was run"
    path = tmp_path / "evil.ckpt"
    torch.save({"state_dict": tensors, "callback": Evil(mark)}, path, _use_new_zipfile_serialization=new)
    sentence = refused(path)
    assert "needs Python code to be opened" in sentence and "mkdir" in sentence and not mark.exists()


def test_a_bare_pickle_with_code_in_it_is_refused_and_not_run(tmp_path):
    mark = tmp_path / "was run"
    path = write(tmp_path, "evil.pt", pickle.dumps(Evil(mark)))
    assert "this pack runs no code" in refused(path) and not mark.exists()


def test_a_whole_module_in_a_pickle_is_refused(tmp_path):
    torch.save(torch.nn.Linear(2, 2), tmp_path / "module.pt")
    assert "needs Python code to be opened (torch.nn.modules.linear.Linear)" in refused(tmp_path / "module.pt")


def test_a_torchscript_program_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "model.pt", "w") as archive:
        archive.writestr("model/constants.pkl", b"")
        archive.writestr("model/data.pkl", b"")
    assert "TorchScript" in refused(tmp_path / "model.pt")


def test_a_zip_of_other_files_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "models.ckpt", "w") as archive:
        archive.writestr("mm_sd_v15_v2.ckpt", b"weights")
    assert "zip archive of other files" in refused(tmp_path / "models.ckpt")


def test_other_bytes_under_a_models_name_are_refused(tmp_path):
    assert "neither a torch file nor a safetensors file" in refused(write(tmp_path, "v2.ckpt", b"\x1f\x8b" + bytes(99)))
    assert "does not begin as a safetensors file does" in refused(write(tmp_path, "v2.safetensors", bytes(99)))


def test_a_torch_file_named_safetensors_is_refused(tmp_path, tensors):
    torch.save(tensors, tmp_path / "v2.safetensors")
    assert "Rename it to end in .ckpt" in refused(tmp_path / "v2.safetensors")


@pytest.mark.parametrize("content", [[1, 2, 3], {"epoch": 3}, 7])
def test_a_torch_file_without_tensors_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "log.pt")
    assert "holds no named tensors" in refused(tmp_path / "log.pt")


def test_an_embedding_is_named_though_its_tensors_are_nested(tmp_path):
    torch.save({"string_to_token": {"*": 265}, "string_to_param": {"*": torch.zeros(2, 768)}}, tmp_path / "style.pt")
    assert identify(tmp_path / "style.pt").kind == "embedding"
    with pytest.raises(VideoLDMError, match="style.pt is a textual-inversion embedding, not .* models/embeddings"):
        load_temporal(tmp_path / "style.pt")
