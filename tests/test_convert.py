"""Convert Temporal File: what the pack takes becomes a safetensors file with the same weights."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import folder_paths
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from video_ldm.nodes.convert import ConvertTemporalFile
from video_ldm.nodes.host import conversion
from video_ldm.temporal import convert as converter
from video_ldm.temporal.convert import convert
from video_ldm.temporal.errors import VideoLDMError
from video_ldm.temporal.families import identify, load_decoder, load_motion_lora, load_temporal, load_video_model
from video_ldm.temporal.formats import decoder as decoder_format
from video_ldm.tests import loader_help, small_files
from video_ldm.tests.formats_help import lora_shapes, motion_shapes, motion_tensors, random_tensors, saved
from video_ldm.tests.loader_help import NAMES
from video_ldm.tests.network_help import network_tensors
from video_ldm.tests.reference_videocrafter import VideoCrafter, checkpoint
from video_ldm.tests.small import randomise

files = loader_help.files       # fixture
FOREIGN = ("motion", "lora", "vsr", "svd", "lavie", "pvdm", "sparse", "camera")      # files of other authors
ROOT = Path(__file__).resolve().parent.parent


def own_names(path):
    """{name: tensor} of a file without its training wrappers."""
    if path.suffix == ".safetensors":
        return load_file(path)
    loaded = torch.load(path, weights_only=True)
    return next((loaded[wrapper] for wrapper in ("ema", "state_dict", "module") if wrapper in loaded), loaded)


def metadata_of(path):
    with safe_open(str(path), framework="pt") as file:
        return file.metadata()


@pytest.fixture
def motion(tmp_path):
    return saved(tmp_path, "mm_sd_v15_v2.ckpt", motion_tensors(motion_shapes((32,))))


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith(FOREIGN)])
def test_a_converted_file_has_the_same_tensors_and_loads_the_same(files, tmp_path, name):
    file, target = files[name], tmp_path / "new.safetensors"
    done = convert(file.path, target)
    before, after = own_names(file.path), load_file(target)
    assert list(sorted(after)) == sorted(before) and done.tensors == len(before) and done.left_out == {}
    assert all(torch.equal(after[key], before[key]) and after[key].dtype == before[key].dtype for key in before)
    assert identify(target) == identify(file.path)
    old, new = file.load(file.path), file.load(target)
    pairs = list(zip(small_files.tensors_of(old), small_files.tensors_of(new), strict=True))
    assert len(pairs) > 3 and all(torch.equal(one, other) for one, other in pairs)
    for entry in ("params", "schedule", "base", "licence", "title", "frames"):
        assert getattr(old, entry, None) == getattr(new, entry, None)


@pytest.mark.parametrize("name", [name for name in NAMES if not name.startswith(FOREIGN)])
def test_a_file_of_this_pack_needs_no_conversion(files, tmp_path, name):
    with pytest.raises(VideoLDMError, match=f"^{name} is a safetensors file with its metadata already. It needs no"):
        convert(files[name].path, tmp_path / "new.safetensors")
    assert os.listdir(tmp_path) == []


def test_the_metadata_says_what_the_file_is_and_where_it_comes_from(motion, tmp_path):
    metadata = metadata_of(convert(motion, tmp_path / "new.safetensors").path)
    assert metadata == {
        "video_ldm.conversion": "1", "video_ldm.kind": "animatediff_v2",
        "video_ldm.title": load_temporal(motion).title, "video_ldm.licence": load_temporal(motion).licence,
        "video_ldm.base": "Stable Diffusion 1.x", "video_ldm.frames": "16", "video_ldm.fps": "8",
        "video_ldm.source": "mm_sd_v15_v2.ckpt",
        "video_ldm.source_sha256": hashlib.sha256(motion.read_bytes()).hexdigest()}
    with pytest.raises(VideoLDMError, match="^new.safetensors is a safetensors file with its metadata already"):
        convert(tmp_path / "new.safetensors", tmp_path / "newer.safetensors")


def test_metadata_that_a_file_has_is_kept(tmp_path):
    path = saved(tmp_path, "a.safetensors", random_tensors(lora_shapes((32,))), {"author": "someone", "format": "pt"})
    metadata = metadata_of(convert(path, tmp_path / "b.safetensors").path)
    assert metadata["author"] == "someone" and metadata["format"] == "pt"
    assert metadata["video_ldm.kind"] == "motion_lora" and "video_ldm.licence" not in metadata
    assert load_motion_lora(tmp_path / "b.safetensors").metadata == metadata


def test_of_a_whole_checkpoint_the_network_alone_is_written(files, tmp_path):
    network = {f"model.diffusion_model.{key}": tensor for key, tensor in own_names(files["vsr.ckpt"].path).items()}
    beside = {"first_stage_model.decoder.conv_in.weight": torch.ones(4), "betas": torch.ones(3),
              "cond_stage_model.transformer.x": torch.ones(2), "cond_stage_model.transformer.y": torch.ones(2)}
    path = saved(tmp_path, "whole.ckpt", {"state_dict": beside | network})
    done = convert(path, tmp_path / "network.safetensors")
    assert set(load_file(done.path)) == set(network)
    assert done.left_out == {"betas": 1, "cond_stage_model": 2, "first_stage_model": 1}
    assert identify(done.path) == identify(path) == identify(files["vsr.ckpt"].path)


def test_a_whole_videocrafter_checkpoint_keeps_the_tables_of_its_noise_schedule(tmp_path):
    network = randomise(VideoCrafter("videocrafter2", channels=(64, 128), resblocks=1, attention=(True, False)))
    whole = checkpoint("videocrafter2", network.state_dict())
    path = saved(tmp_path, "model.ckpt", {"state_dict": whole})
    done = conversion.convert(path, tmp_path / "network.safetensors", lambda share: None)
    kept = {key for key in whole if key.startswith("model.diffusion_model.")}
    written = load_file(done.path)
    assert kept | {"betas", "scale_arr"} == set(written) and set(done.left_out) >= {"cond_stage_model",
                                                                                    "first_stage_model"}
    assert all(torch.equal(written[key], whole[key]) for key in written)
    before, after = load_video_model(path), load_video_model(done.path)
    assert (before.layers.schedule, before.layers.params) == (after.layers.schedule, after.layers.params)
    assert all(torch.equal(one, after.read_spatial()[name]) for name, one in before.read_spatial().items())


def test_of_svds_checkpoint_the_decoder_alone_is_written(tmp_path):
    small = random_tensors(decoder_format.shapes_of(small_files.DECODER))
    tensors = {f"first_stage_model.decoder.{key}": value for key, value in small.items()}
    beside = {"model.diffusion_model.input_blocks.0.0.weight": torch.ones(4, 4, 3, 3),
              "model.diffusion_model.out.2.weight": torch.ones(4), "conditioner.embedders.0.x": torch.ones(2)}
    done = convert(saved(tmp_path, "svd_small.safetensors", tensors | beside), tmp_path / "decoder.safetensors")
    assert set(load_file(done.path)) == set(tensors)
    assert done.left_out == {"conditioner": 1, "model": 2}
    assert load_decoder(done.path).licence == metadata_of(done.path)["video_ldm.licence"]
    report = conversion.report_of(done)
    assert "Left out, for this pack does not use it: conditioner (1 tensors), model (2 tensors)." in report


# What is refused

def test_an_existing_file_is_never_written_over(motion, tmp_path):
    target = tmp_path / "there.safetensors"
    target.write_bytes(b"mine")
    with pytest.raises(VideoLDMError, match="^There is a file there.safetensors already, and nothing is written over"):
        convert(motion, target)
    assert target.read_bytes() == b"mine"


def test_a_file_that_appears_during_the_work_is_not_written_over(motion, tmp_path):
    target = tmp_path / "there.safetensors"

    def told(share):
        if share > converter.HASHED:
            target.write_bytes(b"mine")
    with pytest.raises(VideoLDMError, match="^There is a file there.safetensors already"):
        convert(motion, target, told)
    assert target.read_bytes() == b"mine" and sorted(os.listdir(tmp_path)) == [motion.name, target.name]


@pytest.mark.parametrize("tensors, words", [
    ({"lora_unet_x.lora_down.weight": torch.ones(4, 4)}, "is a LoRA for an image model .* not a file that this pack "
                                                         "takes. Load it with core's Load LoRA"),
    ({"weight": torch.ones(3)}, "is a file of a kind that this pack does not know .* It takes .*Hotshot-XL"),
    ({**motion_tensors(motion_shapes((32,))), "module.mid_block.motion_modules.0.temporal_transformer.norm.bias":
      torch.ones(32)}, "holds mid_block.motion_modules.0.temporal_transformer.norm.bias and module.mid_block.* which "
                       "name the same tensor"),
])
@pytest.mark.parametrize("ending", [".ckpt", ".safetensors"])
def test_a_file_that_the_pack_does_not_take_is_refused(tmp_path, tensors, words, ending):
    path = saved(tmp_path, f"odd{ending}", tensors)
    with pytest.raises(VideoLDMError, match=f"^odd{ending} {words}"):
        convert(path, tmp_path / "new.safetensors")
    assert os.listdir(tmp_path) == [path.name]


def test_a_quantised_network_is_refused(tmp_path):
    tensors = network_tensors("lavie_base", dtype=torch.float16)
    tensors["conv_in.weight"] = tensors["conv_in.weight"].to(torch.int8)
    with pytest.raises(VideoLDMError, match="^odd.pt looks like .* holds conv_in.weight as int8, .* Quantised files"):
        convert(saved(tmp_path, "odd.pt", tensors), tmp_path / "new.safetensors")


def test_a_network_that_core_cannot_build_is_refused(tmp_path):
    tensors = network_tensors("lavie_base", dtype=torch.float16)
    tensors["conv_out.weight"] = tensors["conv_out.weight"][:3].clone()
    with pytest.raises(VideoLDMError, match="^odd.pt looks like .* but out.2.bias is .4. where .3. is due"):
        conversion.convert(saved(tmp_path, "odd.pt", tensors), tmp_path / "new.safetensors", lambda share: None)
    assert os.listdir(tmp_path) == ["odd.pt"]


# What fails halfway

class Cancelled(Exception):
    pass


@pytest.mark.parametrize("at", [0.2, 0.5, 0.7, 1.0])
def test_a_cancelled_conversion_leaves_nothing(motion, tmp_path, at):
    def told(share):
        if share >= at:
            raise Cancelled
    with pytest.raises(Cancelled):
        convert(motion, tmp_path / "sub" / "new.safetensors", told)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == [motion.name]


def test_the_share_that_is_done_grows_from_0_to_1(motion, tmp_path):
    shares = []
    convert(motion, tmp_path / "new.safetensors", shares.append)
    assert shares == sorted(shares) and 0 <= shares[0] and shares[-1] == pytest.approx(1) and len(shares) > 20


def test_not_a_number_anywhere_in_the_file_leaves_nothing(tmp_path):
    tensors = network_tensors("lavie_base", dtype=torch.float16)
    tensors["conv_in.weight"][0, 0, 0, 0] = float("nan")
    with pytest.raises(VideoLDMError, match="^bad.pt cannot be used: the tensor conv_in.weight holds NaN or infinity"):
        convert(saved(tmp_path, "bad.pt", tensors), tmp_path / "new.safetensors")
    assert os.listdir(tmp_path) == ["bad.pt"]


def test_a_disk_that_is_full_is_said_before_anything_is_written(motion, tmp_path, monkeypatch):
    usage = converter.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(converter.shutil, "disk_usage", lambda folder: usage._replace(free=1000))
    with pytest.raises(VideoLDMError, match="^new.safetensors will take 0.0 GB, and the disk has 0.0 GB free"):
        convert(motion, tmp_path / "new.safetensors")
    assert os.listdir(tmp_path) == [motion.name]


def test_a_disk_that_fails_is_a_sentence_and_leaves_nothing(motion, tmp_path, monkeypatch):
    def fail(path, *_):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(converter, "write_tensors", fail)
    with pytest.raises(VideoLDMError, match="^new.safetensors cannot be written .No space left on device"):
        convert(motion, tmp_path / "new.safetensors")
    assert os.listdir(tmp_path) == [motion.name]


# The node and the command

@pytest.fixture
def models(tmp_path, monkeypatch):
    """models/video_ldm with one motion module."""
    monkeypatch.setattr(folder_paths, "models_dir", str(tmp_path))
    for kind in ("video_ldm", "video_ldm_motion_lora"):
        monkeypatch.delitem(folder_paths.folder_names_and_paths, kind, raising=False)
        folder_paths.filename_list_cache.pop(kind, None)
    (tmp_path / "video_ldm").mkdir()
    saved(tmp_path / "video_ldm", "mm.ckpt", motion_tensors(motion_shapes((32,))))
    yield tmp_path / "video_ldm"
    for kind in ("video_ldm", "video_ldm_motion_lora"):
        folder_paths.filename_list_cache.pop(kind, None)


@pytest.mark.parametrize("name, written", [("", "mm"), ("mine", "mine"), ("mine.safetensors", "mine"),
                                           ("v1.5 two", "v1.5 two")])
def test_the_node_writes_to_its_folder_and_names_the_file(models, name, written):
    result, report = ConvertTemporalFile.execute("mm.ckpt", name).result
    assert result == f"{written}.safetensors" and sorted(os.listdir(models)) == sorted(["mm.ckpt", result])
    assert report.splitlines()[0].startswith(f"{result}: {load_temporal(models / 'mm.ckpt').title}, ")
    assert f"Licence: {load_temporal(models / 'mm.ckpt').licence}." in report
    assert hashlib.sha256((models / "mm.ckpt").read_bytes()).hexdigest() in report


@pytest.mark.parametrize("name", ["../out", "a/b", "a\\b", "/tmp/out", "C:out", "..", ".hidden", "a\nb", "end.", "?"])
def test_the_node_takes_names_and_no_paths(models, name):
    with pytest.raises(VideoLDMError, match="it takes the name of a file without folders"):
        ConvertTemporalFile.execute("mm.ckpt", name)
    assert os.listdir(models) == ["mm.ckpt"] and os.listdir(models.parent) == ["video_ldm"]


def test_a_name_that_is_too_long_and_a_file_that_is_gone_are_said(models):
    with pytest.raises(VideoLDMError, match="is too long: a file's name can have 220 bytes, and this has 300"):
        ConvertTemporalFile.execute("mm.ckpt", "x" * 300)
    with pytest.raises(VideoLDMError, match="^There is no file gone.ckpt in models/video_ldm"):
        ConvertTemporalFile.execute("gone.ckpt", "")


def test_the_list_begins_with_torch_files_and_has_motion_loras(models):
    (models.parent / "animatediff_motion_lora").mkdir()
    saved(models.parent / "animatediff_motion_lora", "zoom.safetensors", random_tensors(lora_shapes((32,))))
    combo = ConvertTemporalFile.define_schema().inputs[0]
    assert combo.default == combo.options[0] and "mm.ckpt" in combo.options and "zoom.safetensors" in combo.options
    first_safetensors = next(i for i, name in enumerate(combo.options) if name.endswith(".safetensors"))
    assert combo.options.index("mm.ckpt") < first_safetensors <= combo.options.index("zoom.safetensors")


@pytest.mark.slow
def test_the_command_converts_and_says_what_is_wrong(motion, tmp_path):
    def run(*paths):
        return subprocess.run([sys.executable, str(ROOT / "run.py"), "_inside", "nodes.host.conversion",
                               *map(str, paths)], capture_output=True, text=True)
    done = run(motion, tmp_path)
    assert done.returncode == 0 and "100 %" in done.stdout and "mm_sd_v15_v2.safetensors: " in done.stdout
    again = run(motion, tmp_path)
    assert again.returncode == 1 and "There is a file mm_sd_v15_v2.safetensors already" in again.stderr
