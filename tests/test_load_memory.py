"""Loading a whole video network holds its weights once."""

import sys

import pytest
import torch

from video_ldm.benchmarks import load_memory
from video_ldm.nodes.host.video_network import load_video_network
from video_ldm.temporal.errors import VideoLDMError
from video_ldm.temporal.families import load_temporal, load_video_model
from video_ldm.temporal.formats import torch_files
from video_ldm.temporal.formats.files import open_file
from video_ldm.tests.formats_help import saved
from video_ldm.tests.network_help import network_tensors

unix = pytest.mark.skipif(sys.platform == "win32", reason="it measures mapped pages as Unix counts them")


@pytest.fixture(scope="module")
def ratios(tmp_path_factory):
    """{ending: {what was loaded: peak of memory by the file's size}} of files of 150 MB."""
    files = load_memory.write_files(tmp_path_factory.mktemp("files"), divisor=5)
    assert all(file.stat().st_size > 1.4e8 for file in files)
    return {file.suffix: found for file, found in zip(files, load_memory.ratios_of(files))}


@unix
@pytest.mark.parametrize("ending, bound", load_memory.BOUNDS.items())
def test_a_whole_network_is_held_once(ratios, ending, bound):
    assert 0.95 < ratios[ending]["Load Video Model"] <= bound


@unix
@pytest.mark.parametrize("ending", load_memory.BOUNDS)
def test_the_temporal_layers_alone_are_read_where_they_alone_are_wanted(ratios, ending):
    assert 0 < ratios[ending]["Load Temporal Layers"] < 0.4     # they are 6 % of the file, and it is read in parts


@unix
@pytest.mark.parametrize("ending", load_memory.BOUNDS)
def test_a_conversion_holds_the_temporal_layers_or_one_tensor(ratios, ending):
    assert 0 < ratios[ending]["Convert Temporal File"] < 0.4


@pytest.fixture(scope="module")
def tensors():
    return network_tensors("lavie_base")


@pytest.mark.parametrize("name", ["lavie.safetensors", "lavie.pt"])
def test_the_model_has_the_files_weights_and_nothing_without_values(tmp_path, tensors, name):
    network = load_video_model(saved(tmp_path, name, tensors))
    model = load_video_network(network).model
    weights = model.diffusion_model.state_dict()
    assert set(weights) == set(network.spatial_names)
    assert all(torch.equal(weights[name], tensors[key]) for name, key in network.spatial_names.items())
    assert all(tensor.device.type == "cpu" for tensor in model.state_dict().values())
    assert model.device == torch.device("cpu") and not any(w.requires_grad for w in load_temporal_stack(network))


def load_temporal_stack(network):
    from video_ldm.nodes.host.layer_weights import build_stack
    layers = load_temporal(network.file.path)
    return build_stack(layers.params, layers.tensors, torch.float32).parameters()


@pytest.mark.parametrize("old", [False, True])
def test_a_torch_file_that_is_read_in_parts_gives_its_own_tensors(tmp_path, tensors, monkeypatch, old):
    monkeypatch.setattr(torch_files, "SMALLEST_PART", 1)
    path = tmp_path / "lavie.pt"
    torch.save(tensors, path, _use_new_zipfile_serialization=not old)
    file = open_file(path)
    for keys in (list(tensors)[:40], list(tensors)[20:60], list(tensors)):     # some of them twice
        read = file.read(keys)
        assert list(read) == keys and all(torch.equal(read[key], tensors[key]) for key in keys)
    assert all(tensor.nbytes == tensor.untyped_storage().nbytes() for tensor in read.values())


@pytest.mark.parametrize("old", [False, True])
def test_tensors_that_share_memory_in_a_file_have_memory_of_their_own_when_they_are_read(tmp_path, old):
    both = torch.arange(8.0).reshape(2, 4)
    torch.save({"a": both, "b": both.t(), "c": both[1]}, tmp_path / "x.ckpt", _use_new_zipfile_serialization=not old)
    read = open_file(tmp_path / "x.ckpt").read("abc")
    read["a"].zero_()
    assert torch.equal(read["b"], both.t()) and torch.equal(read["c"], both[1]) and read["b"].is_contiguous()


@pytest.mark.parametrize("name", ["x.safetensors", "x.ckpt"])
def test_a_file_that_is_replaced_between_two_reads_is_refused(tmp_path, name):
    file = open_file(saved(tmp_path, name, {"a": torch.zeros(4), "b": torch.zeros(4)}))
    file.read("a")
    saved(tmp_path, name, {"a": torch.ones(4), "b": torch.ones(6)})
    with pytest.raises(VideoLDMError, match=f"^{name} changed while it was read"):
        file.read("b")
