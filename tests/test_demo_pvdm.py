"""The demo's PVDM: its stages of train-demo, and the two files that they end in."""

import dataclasses

import numpy as np
import pytest
import torch
from safetensors import safe_open

from video_ldm.demo import bundle, data, models, pvdm, pvdm_stages, train, world
from video_ldm.temporal.families import load_pvdm
from video_ldm.temporal.pvdm import Autoencoder, PlaneUNet
from video_ldm.temporal.pvdm import files as pvdm_files

SMALL = dataclasses.replace(pvdm.AUTOENCODER, patch=16, channels=32, depth=1, head_width=8, plane_channels=4,
                            plane_head_width=8, plane_hidden=32)
SMALL_UNET = dataclasses.replace(pvdm.UNET, channels=4, model_channels=32, channel_mult=(1, 1), attention_levels=(1,),
                                 row=SMALL.shape.length)
STAGES = ("pvdm-render", "pvdm-autoencoder", "pvdm-planes", "pvdm-diffusion")


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(pvdm, "CLIPS", 3)
    monkeypatch.setattr(pvdm, "AUTOENCODER", SMALL)
    monkeypatch.setattr(pvdm, "UNET", SMALL_UNET)
    for name in pvdm_stages.TRAINED:
        stage = models.STAGES[name]
        loop = dataclasses.replace(stage.loop, steps=2, save_every=1, log_every=1)
        monkeypatch.setitem(models.STAGES, name, dataclasses.replace(stage, batch=2, loop=loop))


def test_the_stages_end_in_two_files_that_belong_together_and_can_be_trained_on(small, tmp_path, capsys):
    work, made = tmp_path / "work", tmp_path / "bundle"
    for stage in STAGES:
        train.main(["--folder", str(work), "--stage", stage])
    printed = capsys.readouterr().out
    assert "pvdm-render: 3 videos of 32 frames, 128x64" in printed and "pvdm-diffusion: step 2" in printed
    files = data.Files(work)
    frames, planes = np.load(files.pvdm_frames), np.load(files.pvdm_planes)
    assert frames.shape == (3, 32, 64, 128, 3) and planes.shape == (3, 2, 4, SMALL.shape.length)
    made.mkdir()
    assert sum(pvdm_stages.write(files, made)) == sum(path.stat().st_size for path in made.iterdir())
    autoencoder, unet = (load_pvdm(made / pvdm_stages.FILES[stage], pvdm_stages.KINDS[stage])
                         for stage in pvdm_stages.TRAINED)
    pvdm_files.check_pair(autoencoder, unet)
    assert autoencoder.params == SMALL and unet.params == SMALL_UNET and unet.about.grid == SMALL.shape
    for stage, module in pvdm_stages.TRAINED.items():           # the way back, for --from-bundle
        name, weights = pvdm_stages.read(stage, made)
        trained = data.weights_of(files, stage, module)
        assert name == module and weights.keys() == trained.keys()
        assert all(torch.allclose(weights[key], trained[key], rtol=1e-3, atol=1e-4) for key in trained)


def test_the_stored_planes_are_those_of_the_windows_of_each_video():
    network = Autoencoder(dataclasses.replace(SMALL, height=16, width=32, patch=8)).requires_grad_(False)
    frames = np.random.default_rng(0).integers(0, 256, (9, 32, 16, 32, 3), np.uint8)     # more than go in one batch
    planes = pvdm_stages.planes_of(network, frames)
    assert planes.dtype == np.float16 and planes.shape[:2] == (9, 2)
    for video, (window, start) in ((0, (0, 0)), (4, (1, 16)), (8, (1, 16))):
        clip = torch.from_numpy(frames[video, start:start + 16]).movedim(-1, 0)[None] / 127.5 - 1
        assert np.abs(planes[video, window] - network.encode(clip)[0].numpy()).max() < 2e-3
    assert np.abs(planes[4, 1] - planes[4, 0]).max() > 0.02


def test_the_bundled_files_say_what_they_are_and_are_small(tmp_path):
    torch.manual_seed(0)
    weights = [network.state_dict() for network in (Autoencoder(pvdm.AUTOENCODER), PlaneUNet(pvdm.UNET))]
    assert sum(pvdm_stages.write_files(tmp_path, *weights)) <= 16_000_000
    for stage, state in zip(pvdm_stages.TRAINED, weights):
        path = tmp_path / pvdm_stages.FILES[stage]
        file = load_pvdm(path, pvdm_stages.KINDS[stage])
        assert file.fps == pvdm.FPS and file.licence == models.LICENCE and file.dtype == torch.float16
        assert file.about.title == f"Video LDM demo: {models.stage(stage).title}"
        assert all(tensor.equal(state[key].half()) for key, tensor in file.tensors.items())
        with safe_open(path, "pt") as stored:
            said = stored.metadata()
        assert said["trained_on"].endswith("seeds 0 to 2999") and said["steps"] == str(models.stage(stage).loop.steps)


def test_a_bundle_from_before_pvdm_leaves_its_stages_to_be_trained(tmp_path, monkeypatch):
    def restored(folder):
        files = data.Files(tmp_path / folder)
        files.folder.mkdir()
        files.latent_params.touch()
        bundle.restore(tmp_path / "bundle", files)
        return sorted(path.stem for path in files.folder.glob("*.safetensors"))
    monkeypatch.setattr(bundle, "READERS", {stage: bundle.READERS[stage] for stage in pvdm_stages.TRAINED})
    (tmp_path / "bundle").mkdir()
    assert restored("old") == []
    pvdm_stages.write_files(tmp_path / "bundle", Autoencoder(pvdm.AUTOENCODER).state_dict(),
                            PlaneUNet(pvdm.UNET).state_dict())
    assert restored("new") == ["pvdm-autoencoder", "pvdm-diffusion"]


def test_a_training_video_shows_two_clips_from_its_moment_of_the_drive():
    frames, boxes = pvdm.video(5)
    assert frames.shape == (32, 64, 128, 3) and boxes.shape == (32, 3, 4)
    begin = pvdm.start(5)
    assert 0 < begin < pvdm.LATEST
    later = world.clip(world.train_seed(5), 1, 64, 128, start=begin + 31 / pvdm.FPS)
    assert (frames[31] == later.frames[0]).all() and (boxes[31] == data.corners_of(later)[0]).all()
