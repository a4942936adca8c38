"""The whole training of the demo cascade, a step or two of each stage: it ends in files that the nodes load."""

import dataclasses
import json

import numpy as np
import pytest
import torch

from video_ldm.demo import bundle, data, decoder, models, pvdm, scene_layout_stage, train, upscaler, world
from video_ldm.nodes.host import models as host
from video_ldm.temporal.families import load_decoder, load_layout, load_temporal, load_upscaler
from video_ldm.temporal.params import BOTH_ENDS, FIRST_FRAMES

FASTEST = "float32"     # of the precisions, on most processors; the loop's own tests try the others


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(models, "TRAIN_CLIPS", 3)
    monkeypatch.setattr(data, "TRAIN_CLIPS", 3)
    monkeypatch.setattr(models, "UNET", dataclasses.replace(models.UNET, model_channels=32, channel_mult=(1, 1, 1)))
    monkeypatch.setattr(upscaler, "CLIPS", 2)
    monkeypatch.setattr(pvdm, "CLIPS", 3)
    monkeypatch.setattr(upscaler, "UNET", dataclasses.replace(upscaler.UNET, channel_mult=(1, 1, 1)))
    for name, stage in models.STAGES.items():
        loop = dataclasses.replace(stage.loop, steps=2, save_every=1, log_every=1, precision=FASTEST)
        monkeypatch.setitem(models.STAGES, name, dataclasses.replace(stage, batch=2, loop=loop))


@pytest.mark.slow
def test_the_demo_is_trained_from_nothing_stage_by_stage_and_resumes(small, tmp_path, capsys):
    arguments = ["--folder", str(tmp_path / "work"), "--output", str(tmp_path / "bundle")]
    with pytest.raises(SystemExit, match="stopped at step 1 of 2; run again"):
        train.main([*arguments, "--max-minutes", "0"])
    train.main(arguments)
    printed = capsys.readouterr().out
    assert all(f"{name}: " in printed for name in train.STEPS)
    made = tmp_path / "bundle"
    model, clip, vae = host.load_demo(made)
    layers, between = load_temporal(made / bundle.LAYERS_FILE), load_temporal(made / bundle.INTERPOLATION_FILE)
    assert layers.params.frames == models.FRAMES and layers.params.context.positions == FIRST_FRAMES
    assert between.params.frames == 5 and between.params.context.positions == BOTH_ENDS and between.params.fps_width
    assert load_decoder(made / bundle.DECODER_FILE).frames == 6
    assert load_layout(made / bundle.LAYOUT_FILE).params == scene_layout_stage.params(models.UNET)
    assert load_upscaler(made / bundle.UPSCALER_FILE).params == upscaler.file_params("Video LDM demo: upscaler")
    layers = load_temporal(made / bundle.UPSCALER_LAYERS_FILE).params
    assert layers.takes_small_frames and layers.shared_noise
    seconds = json.loads((tmp_path / "work" / "image" / "last.json").read_text())["seconds"]
    train.main(arguments)               # everything is finished: nothing is trained again
    assert json.loads((tmp_path / "work" / "image" / "last.json").read_text())["seconds"] == seconds


@pytest.mark.parametrize("stage, missing", [
    ("autoencoder", "render"), ("latents", "autoencoder"), ("image", "latents"), ("temporal", "image"),
    ("features", "render"), ("prediction", "latents"), ("interpolation", "latents"),
    ("temporal-decoder", "autoencoder"), ("layout", "image"),
    ("upscaler", "latents"), ("upscaler-temporal", "upscaler"), ("pvdm-autoencoder", "pvdm-render"),
    ("pvdm-planes", "pvdm-autoencoder"), ("pvdm-diffusion", "pvdm-planes"), ("bundle", "latents")])
def test_a_stage_before_its_time_says_which_one_is_missing(small, tmp_path, stage, missing):
    if stage == "latents":
        train.main(["--folder", str(tmp_path), "--stage", "render"])
    with pytest.raises(SystemExit, match=f"The stage '{missing}' has not been done yet"):
        train.main(["--folder", str(tmp_path), "--output", str(tmp_path), "--stage", stage])


def test_a_stage_can_be_trained_anew_on_the_bundled_models(tmp_path, capsys, monkeypatch):
    """All others are taken from the bundle, to the half precision in which it holds them."""
    monkeypatch.setattr(models, "TRAIN_CLIPS", 3)
    monkeypatch.setattr(data, "TRAIN_CLIPS", 3)
    monkeypatch.setattr(train, "CLIP_BATCH", 2)
    for name in ("features", "layout", "interpolation"):
        stage = models.STAGES[name]
        monkeypatch.setitem(models.STAGES, name, dataclasses.replace(
            stage, batch=2, loop=dataclasses.replace(stage.loop, steps=1, precision=FASTEST)))
    arguments = ["--folder", str(tmp_path / "work"), "--output", str(tmp_path / "bundle"), "--from-bundle"]
    needed = {"features": ["render"], "layout": ["latents"], "interpolation": ["interpolation-data"]}
    for name, prepared in needed.items():
        train.main([*arguments, "--stage", name])              # with the data that it needs and that is not there yet
        done = [line.split(":")[0] for line in capsys.readouterr().out.splitlines()]
        assert done == [*prepared, name]
    train.main([*arguments, "--stage", "features"])            # finished: as any stage that has a checkpoint
    assert "features: step 1" in capsys.readouterr().out
    files = data.Files(tmp_path / "work")
    scale = json.loads(files.latent_params.read_text())["scale_factor"]
    assert scale == host.read_part(train.BUNDLE / "image.safetensors", "image")[1]["latent"]["scale_factor"]
    deviation = np.load(files.latents).std()
    assert deviation == pytest.approx(1, abs=0.2) and deviation != pytest.approx(1, abs=1e-4)     # the bundle's scale
    original = load_temporal(train.BUNDLE / bundle.LAYERS_FILE).tensors
    back = data.weights_of(data.Files(tmp_path / "work"), "prediction", "temporal")
    assert back.keys() == original.keys() and all(back[key].equal(original[key].float()) for key in back)


def test_the_smaller_a_car_the_more_each_of_its_pixels_counts():
    """Near cars 4 times as much as the ground, far ones up to 19 times, and no box, or one outside, nothing more."""
    boxes = np.array([[[0, 0, 0.5, 0.5], [0.75, 0.5, 0.8125, 0.625], [0, 0, 0, 0]],     # 64x32 pixels, 8x8
                      [[0.75, 0.5, 0.765625, 0.515625], [0, 0, 0, 0], [1.5, 0, 2, 1]]], np.float32)   # 2x1 pixels
    weights = data.car_weights(boxes, 64, 128)
    assert weights.shape == (2, 1, 64, 128) and weights.dtype == np.float32
    assert weights[0, 0, 0, 0] == 4 and weights[0, 0, 63, 0] == 1
    np.testing.assert_allclose(weights[0, 0, 33, 97], 1 + 3 * (512 / 64) ** 0.5, rtol=1e-6)
    assert weights[1].max() == 1 + 3 * 6 and (weights[1] > 1).sum() == 2
    overlapping = data.car_weights(boxes[:1, [0, 0]] * [[1, 1, 1, 1], [1, 1, 0.125, 0.125]], 64, 128)
    assert overlapping[0, 0, 0, 0] > 4 and overlapping[0, 0, 31, 63] == 4      # the far one counts where both are


def test_the_temporal_decoders_error_counts_the_far_road_and_lasting_errors_more():
    """An error all over the far road counts more than one in the sky. An error that stays counts more than one that
    flickers. An error that its neighbours cancel counts no more than it did for the autoencoder."""
    frames, shape = decoder.FRAMES, (models.HEIGHT, models.WIDTH)
    x, weights = torch.zeros(frames, 3, *shape), torch.ones(frames, 1, *shape)
    far = decoder.far_road(*shape)[0, 0]
    row, column = divmod(int(far.argmax()), models.WIDTH)
    assert far.max() == pytest.approx(decoder.FAR, rel=0.01) and far[0].max() < 0.01
    assert 0 < row / models.HEIGHT - world.HORIZON < 0.15 and column in (63, 64)

    def added(error):
        """Beyond the autoencoder's own error of the same pictures, by the same weights."""
        return float(decoder.error_from_afar(x + error, x, weights)
                     - decoder.reconstruction_error(x + error, x, weights + decoder.far_road(*shape)))

    def patch(row, column, size=8):
        error = torch.zeros(1, 1, *shape)
        error[..., row:row + size, column:column + size] = 0.1
        return error

    there, sky = patch(row // 4 * 4, column // 4 * 4), patch(4, 4)       # on the grid of the smaller pictures
    flickers = there * torch.tensor([1.0, -1.0] * (frames // 2))[:, None, None, None]
    checks = 0.1 * (-1.0) ** (torch.arange(models.HEIGHT)[:, None] + torch.arange(models.WIDTH))
    scale_sum = sum(scale ** 2 for scale in decoder.SCALES)
    assert added(sky) == pytest.approx(scale_sum * (1 + frames / 2) * 0.01 * 64 / far.numel(), rel=0.01)
    assert added(there) == pytest.approx((1 + float(far[there[0, 0] > 0].mean())) * added(sky), rel=0.01)
    assert added(there) == pytest.approx((1 + frames / 2) * added(flickers), rel=1e-4)
    assert added(checks) == pytest.approx(0, abs=1e-6)
