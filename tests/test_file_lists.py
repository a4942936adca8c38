"""The lists of the loaders.

All files are in them. Files that the loader takes come first, so the first is one of these.
"""

import os
import shutil

import folder_paths
import pytest
import torch

from video_ldm.nodes import convert, decode, load, pvdm, scene_layout
from video_ldm.nodes.host import files
from video_ldm.temporal.errors import VideoLDMError
from video_ldm.tests.formats_help import lora_shapes, random_tensors, saved
from video_ldm.tests.network_help import network_tensors

NODES = {load.LoadTemporalLayers: "video_ldm_driving.safetensors",
         scene_layout.SceneLayout: "video_ldm_driving_layout.safetensors",
         decode.LoadTemporalDecoder: "video_ldm_driving_decoder.safetensors",
         load.LoadVideoModel: "video_ldm_driving_upscaler.safetensors"}


def listed(node, name="file"):
    """(options, default) of a loader's list."""
    combo = next(entry for entry in node.define_schema().inputs if entry.id == name)
    return combo.options, combo.default


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder of models with a damaged file, a torch file, a pipe and the demo's layout under a name of its own."""
    monkeypatch.setattr(folder_paths, "models_dir", str(tmp_path))
    for kind in (files.LAYERS, files.MOTION_LORA):
        monkeypatch.delitem(folder_paths.folder_names_and_paths, kind, raising=False)
        folder_paths.filename_list_cache.pop(kind, None)
    own = tmp_path / "video_ldm"
    own.mkdir()
    (own / "a_damaged.safetensors").write_bytes(b"12345")
    torch.save({"weight": torch.zeros(3)}, own / "b_torch.ckpt")
    shutil.copy(files.DEMO_FOLDER / "video_ldm_driving_layout.safetensors", own / "c_layout.safetensors")
    os.mkfifo(own / "d_pipe.safetensors")
    yield own
    folder_paths.filename_list_cache.pop(files.LAYERS, None)
    folder_paths.filename_list_cache.pop(files.MOTION_LORA, None)


@pytest.mark.parametrize("node, demo", NODES.items())
def test_a_fresh_loader_holds_the_demos_file(folder, node, demo):
    options, default = listed(node)
    assert default == demo
    assert {"a_damaged.safetensors", "b_torch.ckpt", "c_layout.safetensors", *NODES.values()} <= set(options)


def test_files_that_a_loader_takes_come_first_then_files_that_must_be_read_to_be_known(folder):
    options, _ = listed(scene_layout.SceneLayout)
    assert options[:3] == ["c_layout.safetensors", "video_ldm_driving_layout.safetensors", "b_torch.ckpt"]
    options, _ = listed(load.LoadVideoModel)
    assert options[:2] == ["video_ldm_driving_upscaler.safetensors", "b_torch.ckpt"]


def test_without_the_demos_file_a_list_begins_with_one_that_may_be_taken(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "DEMO_FOLDER", tmp_path / "none")
    assert listed(scene_layout.SceneLayout)[1] == "c_layout.safetensors"
    assert listed(load.LoadVideoModel)[1] == "b_torch.ckpt"


def test_a_file_is_looked_at_again_only_when_it_changed(folder, monkeypatch):
    looked = []
    monkeypatch.setattr(files, "known_as", lambda path: looked.append(path) or frozenset())
    listed(scene_layout.SceneLayout)
    once = [path for path in looked if path.endswith("a_damaged.safetensors")]
    listed(scene_layout.SceneLayout)
    assert once and [path for path in looked if path.endswith("a_damaged.safetensors")] == once
    (folder / "a_damaged.safetensors").write_bytes(b"123456")
    listed(scene_layout.SceneLayout)
    assert len([path for path in looked if path.endswith("a_damaged.safetensors")]) == 2


def test_whole_networks_come_first_where_they_or_their_layers_are_taken(folder):
    saved(folder, "e_base.safetensors", network_tensors("lavie_base", dtype=torch.float16))
    saved(folder, "e_interpolation.safetensors", network_tensors("lavie_interpolation", dtype=torch.float16))
    saved(folder, "e_base.pt", {"weight": torch.zeros(3)})
    whole, alone = (listed(node)[0] for node in (load.LoadVideoModel, load.LoadTemporalLayers))
    assert whole[:3] == ["e_base.safetensors", "e_interpolation.safetensors", "video_ldm_driving_upscaler.safetensors"]
    assert whole[3:5] == ["b_torch.ckpt", "e_base.pt"]          # torch files must be read to be known
    assert alone[0] == "e_base.safetensors" and alone.index("e_interpolation.safetensors") > alone.index("e_base.pt")


def test_each_list_of_load_pvdm_begins_with_its_own_kind(folder):
    names = ["video_ldm_driving_pvdm.safetensors", "video_ldm_driving_pvdm_autoencoder.safetensors"]
    for number, name in enumerate(names):
        shutil.copy(files.DEMO_FOLDER / name, folder / f"e_{number}.safetensors")
    for number, name in enumerate(("diffusion", "autoencoder")):
        options, default = listed(pvdm.LoadPVDM, name)
        assert options[:3] == [f"e_{number}.safetensors", names[number], "b_torch.ckpt"] and default == names[number]


def test_motion_lora_begins_with_one_of_its_files(folder):
    saved(folder, "z_lora.safetensors", random_tensors(lora_shapes((32,))))
    options, default = listed(load.MotionLoRA)
    assert options[:2] == [default, "b_torch.ckpt"] and default == "z_lora.safetensors"
    assert {"a_damaged.safetensors", "c_layout.safetensors"} <= set(options)


def test_files_that_a_loader_does_not_take_can_be_chosen_and_are_refused(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "DEMO_FOLDER", tmp_path / "none")
    for name in ("a_damaged.safetensors", "b_torch.ckpt", "d_pipe.safetensors"):
        (folder / name).unlink()
    loaders = (load.LoadTemporalLayers, load.LoadVideoModel, load.MotionLoRA, decode.LoadTemporalDecoder)
    for node in loaders:
        assert listed(node) == (["c_layout.safetensors"], "c_layout.safetensors")
    with pytest.raises(VideoLDMError, match="Choose it in Scene Layout"):
        load.LoadVideoModel.execute("c_layout.safetensors")
    with pytest.raises(VideoLDMError, match="Choose it in Scene Layout"):
        load.MotionLoRA.execute("c_layout.safetensors", 1.0)
    (folder / "c_layout.safetensors").unlink()
    for node in (*loaders, convert.ConvertTemporalFile, scene_layout.SceneLayout):
        assert listed(node) == ([], None)           # the page says that the list is empty
