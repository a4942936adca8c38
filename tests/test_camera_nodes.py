"""Camera Motion on a MODEL: what it refuses, how it samples, and what it leaves as it was."""

from dataclasses import replace

import comfy.sample
import folder_paths
import pytest
import torch
from comfy.patcher_extension import WrappersMP

from video_ldm.nodes.camera_motion import CameraMotion
from video_ldm.nodes.host import camera
from video_ldm.nodes.host.options import layer_sets_in, transformer_options, with_clip_options
from video_ldm.nodes.interpolate import LatentInterpolate
from video_ldm.nodes.layer_strength import LayerStrength
from video_ldm.nodes.longer import ContextFrames, ExtendVideo
from video_ldm.nodes.reuse import ReuseTemporalLayers
from video_ldm.nodes.windows import FrameWindows
from video_ldm.temporal.camera import rays
from video_ldm.temporal.camera_control import CameraInCall
from video_ldm.temporal.camera_path import read_path
from video_ldm.temporal.errors import VideoLDMError
from video_ldm.tests import attach_help, sparse_help
from video_ldm.tests.attach_help import HEIGHT, WIDTH, load_model, partly_loaded, prediction, text, with_layers
from video_ldm.tests.camera_help import FILE, MOTION, RECORDED, v3_state, with_camera, write_for_unet
from video_ldm.tests.formats_help import adapter_names
from video_ldm.tests.host import checkpoints
from video_ldm.tests.host.checkpoints import FRAMES
from video_ldm.tests.small import relative_error

SIZE = HEIGHT // 8, WIDTH // 8
POSES = "0: pan 0\n-1: pan 30, forward 1"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """MODELs that share one network: "image", "video" with v3's layers, "camera", and some with other layers."""
    folder = tmp_path_factory.mktemp("camera")
    for kind in ("video_ldm", "video_ldm_sparse_control"):
        folder_paths.add_model_folder_path(kind, str(folder))
    checkpoints.save(folder / MOTION, v3_state())
    checkpoints.save(folder / "v1.safetensors", v3_state(positions=24))
    checkpoints.save(folder / "v2.safetensors", checkpoints.motion_state())
    checkpoints.save(folder / "learned.safetensors", v3_state(learned=True))
    checkpoints.save(folder / "adapter.safetensors", adapter_names(v3_state()))
    checkpoints.write_video_layers(folder / "video.safetensors")
    write_for_unet(folder / FILE)
    sparse_help.write_for_unet(folder / "rgb.safetensors", "rgb", gain=0.3)
    state = checkpoints.unet_state()
    image = load_model(state)
    video = with_layers(image, MOTION)
    yield {"image": image, "video": video, "folder": folder, "camera": with_camera(video),
           **{name: with_layers(image, f"{name}.safetensors") for name in ("v1", "v2", "learned", "adapter")},
           "both": with_layers(video, "video.safetensors"), "two": with_layers(video, MOTION)}
    attach_help.assert_untouched(image, state)


def settings_of(model) -> camera.CameraSettings:
    return model.model_options["transformer_options"][camera.KEY]


def sampled(model, clips=1, frames=FRAMES, steps=2, cfg=1.0, size=SIZE):
    latent = torch.zeros(clips * frames, 4, *size)
    return comfy.sample.sample(with_clip_options(model, frames), comfy.sample.prepare_noise(latent, 7), steps, cfg,
                               "euler", "normal", text(), text(12), latent, seed=7, disable_pbar=True)


def seen_by(monkeypatch) -> list:
    """A list of the frames that the encoder sees in each of its runs: their poses, relative to the first."""
    seen = []

    def note(cameras, height, width):
        seen.append((cameras.relative, (height, width)))
        return rays(cameras, height, width)
    monkeypatch.setattr("video_ldm.temporal.camera_control.rays", note)
    return seen


def windows_of(model, length=FRAMES, overlap=2, schedule="static"):
    return FrameWindows.execute(model, "windows", length, overlap, schedule, "pyramid", 8).result[0]


# What it refuses

@pytest.mark.parametrize("model, options, sentence", [
    ("image", {}, "no temporal layers"),
    ("v1", {}, r"camera.safetensors steers AnimateDiff v3's motion modules, and the connected MODEL has v1.safetensors "
     r"\(an AnimateDiff v1 motion module\): their norms, .* Load v3_sd15_mm.ckpt with Load Temporal Layers, on"),
    ("v2", {}, r"has v2.safetensors \(an AnimateDiff v2 motion module\): they have a motion module in the middle"),
    ("learned", {}, "they are no AnimateDiff motion modules of v3's kind"),
    ("two", {}, "has two sets of AnimateDiff v3's layers"),
    ("camera", {}, "has a camera already"),
    ("video", {"file": MOTION}, "is an AnimateDiff v3 motion module, not a CameraCtrl file for AnimateDiff v3."),
    ("video", {"poses": "0: fly 3"}, "has 'fly 3' where a move is due"),
])
def test_what_would_go_wrong_is_refused_where_it_is_chosen(models, model, options, sentence):
    with pytest.raises(VideoLDMError, match=sentence):
        with_camera(models[model], **options)


def test_layers_of_a_whole_network_and_with_pooled_norms_are_refused(models):
    for change, words in (({"network": True}, "belong to a whole video network"), ({}, "what they change in the im")):
        m = models["video"].clone()
        options = transformer_options(m)
        for key, layers in layer_sets_in(options).items():
            params = layers.params if change else replace(layers.params, spatial=models_spatial(models))
            options[key] = replace(layers, params=params, **change)
        with pytest.raises(VideoLDMError, match=words):
            with_camera(m)


def models_spatial(models):
    layers, = layer_sets_in(models["v1"].model_options["transformer_options"]).values()
    return layers.params.spatial


def test_more_frames_than_it_knows_are_refused_in_a_clip_and_in_a_window(models):
    with pytest.raises(VideoLDMError, match=r"CameraCtrl \(camera.safetensors\) sees 16 frames at most, and 17 are"):
        sampled(models["camera"], frames=17, steps=1)
    with pytest.raises(VideoLDMError, match="16 frames at most, and 18 are sampled together. Connect Frame Windows in"):
        sampled(windows_of(models["camera"], 18), frames=20, steps=1)
    sampled(models["camera"], frames=16, steps=1)
    sampled(windows_of(models["camera"], 16), frames=18, steps=1)


def test_pose_lines_that_are_too_few_are_refused_and_further_ones_warned_of(models, caplog):
    lines = "\n".join(RECORDED["lines"])
    with pytest.raises(VideoLDMError, match="pose lines of the camera are for 4 frames, and the video has 6"):
        sampled(with_camera(models["video"], lines), frames=6, steps=1)
    sampled(with_camera(models["video"], lines), frames=3, steps=1)
    assert caplog.text.count("has 4 pose lines, and the video has 3 frames") == 1


def test_a_part_of_the_picture_is_refused(models):
    def tile(executor, x, timesteps, context, *args, **kwargs):
        return executor(x[..., :2], timesteps, context, *args, **kwargs)
    m = models["camera"].clone()
    wrappers = m.wrappers[WrappersMP.DIFFUSION_MODEL]
    m.wrappers = {**m.wrappers, WrappersMP.DIFFUSION_MODEL: {"outside": [tile], **wrappers}}
    with pytest.raises(VideoLDMError, match="A part of the picture is sampled by itself, and the camera sees the"):
        prediction(m)


def test_video_upscale_refuses_it(models):
    with pytest.raises(VideoLDMError, match="Video Upscale works on tiles .* Connect the MODEL without Camera Motion"):
        camera.refuse_camera(models["camera"], "Video Upscale")
    camera.refuse_camera(models["video"], "Video Upscale")


# How it samples

def test_the_camera_changes_the_clip_and_strength_zero_is_the_model_without_it_to_the_bit(models):
    plain = prediction(models["video"], cfg=2.0)
    found = prediction(models["camera"], cfg=2.0)
    assert relative_error(found, plain) > 1e-3
    assert torch.equal(prediction(with_camera(models["video"], strength=0.0), cfg=2.0), plain)
    assert torch.equal(prediction(models["video"], cfg=2.0), plain)
    half = prediction(with_camera(models["video"], strength=0.5), cfg=2.0)
    assert relative_error(half, plain) > 1e-4 and relative_error(half, found) > 1e-4
    other = prediction(with_camera(models["video"], "0: pan 0\n-1: pan -30, forward 1"), cfg=2.0)
    assert relative_error(other, found) > 1e-5


def by_hand(models, poses, numbers, length):
    """A clone of the MODEL with v3's layers whose motion modules merge the features of these cameras."""
    path, m = read_path(poses), models["video"].clone()
    control = settings_of(models["camera"]).control
    call = CameraInCall(control, 1.0, (("hand", lambda: path.cameras(numbers, length)),), SIZE, {})

    def steer(executor, x, *args, **kwargs):
        """Replaces what the layers' wrapper would give them."""
        from video_ldm.nodes.host import camera
        given, camera.camera_in_call = camera.camera_in_call, lambda *_: call
        try:
            return executor(x, *args, **kwargs)
        finally:
            camera.camera_in_call = given
    wrappers = m.wrappers[WrappersMP.DIFFUSION_MODEL]
    m.wrappers = {**m.wrappers, WrappersMP.DIFFUSION_MODEL: {"outside": [steer], **wrappers}}
    return m


def test_the_layers_get_the_cameras_of_their_frames_for_each_condition_and_clip(models):
    expected = sampled(by_hand(models, POSES, range(FRAMES), FRAMES), clips=2, cfg=3.0)
    assert torch.equal(sampled(models["camera"], clips=2, cfg=3.0), expected)
    assert relative_error(sampled(models["video"], clips=2, cfg=3.0), expected) > 1e-3
    one = sampled(models["camera"], cfg=3.0)
    assert relative_error(expected[:FRAMES], one) < 1e-3


def test_the_encoder_runs_once_for_a_sampling_and_at_the_size_of_the_picture(models, monkeypatch):
    seen = seen_by(monkeypatch)
    sampled(models["camera"], steps=3, cfg=2.0)
    (poses, size), = seen
    expected = read_path(POSES).cameras(range(FRAMES), FRAMES).relative
    assert size == (HEIGHT, WIDTH) and torch.allclose(poses, expected)
    sampled(models["camera"], steps=1)
    assert len(seen) == 2 and not settings_of(models["camera"]).kept


def test_a_window_gets_the_poses_of_its_frames_relative_to_its_first(models, monkeypatch):
    seen = seen_by(monkeypatch)
    sampled(windows_of(models["camera"]), frames=8, steps=2)
    path = read_path(POSES)
    expected = [path.cameras(range(first, first + FRAMES), 8).relative for first in (0, 2, 4)]
    assert len(seen) == 3 and all(torch.allclose(poses, wanted) for (poses, _), wanted in zip(seen, expected))
    assert relative_error(seen[1][0], read_path(POSES).cameras(range(2, 6), 8).poses) > 1e-3


def test_looped_windows_and_two_clips_of_a_batch_go_together(models):
    found = sampled(windows_of(models["camera"], schedule="looped"), clips=2, frames=6, steps=1)
    assert len(found) == 12 and torch.isfinite(found).all()


def test_odd_sizes_of_latents_and_levels_fit(models):
    found = sampled(models["camera"], steps=1, size=(3, 5))
    assert torch.isfinite(found).all()


def test_layer_strength_zero_in_a_frame_leaves_it_the_image_models(models):
    image = prediction(models["image"])
    weak = LayerStrength.execute(models["camera"], "0 1 1 1", "linear").result[0]
    found = prediction(weak)
    assert torch.equal(found[0], image[0]) and relative_error(found[1:], image[1:]) > 1e-3
    full = LayerStrength.execute(models["camera"], "1", "linear").result[0]
    assert torch.equal(prediction(full), prediction(models["camera"]))


def test_reused_layers_keep_what_the_camera_made(models):
    reused = ReuseTemporalLayers.execute(models["camera"], 1, 0.0, 1.0).result[0]
    plain = ReuseTemporalLayers.execute(models["video"], 1, 0.0, 1.0).result[0]
    assert relative_error(sampled(reused, steps=4), sampled(plain, steps=4)) > 1e-3
    assert torch.equal(sampled(ReuseTemporalLayers.execute(models["camera"], 0, 0.0, 1.0).result[0]),
                       sampled(models["camera"]))


def test_other_layers_on_the_model_are_left_as_they_are(models):
    steered = with_camera(models["both"])
    assert relative_error(prediction(steered), prediction(models["both"])) > 1e-3
    late = with_layers(models["camera"], "video.safetensors")
    assert torch.equal(prediction(late), prediction(steered))


def test_v3s_layers_in_diffusers_naming_are_steered_alike(models):
    steered = CameraMotion.execute(models["adapter"], FILE, "still", 1.0, 1.0, POSES)
    assert torch.equal(prediction(steered.result[0]), prediction(models["camera"]))
    assert steered.result[1].split("\n")[2] == ("It steers adapter.safetensors. It was trained with AnimateDiff v3's "
                                                "layers.")


def latents(count=1, seed=5):
    return {"samples": torch.randn(count, 4, *SIZE, generator=torch.Generator().manual_seed(seed))}


def with_sparse_camera(models):
    return with_camera(sparse_help.with_sparse(models["video"]))


def test_context_frames_of_sparsectrl_and_the_camera_act_together(models):
    both = ContextFrames.execute(with_sparse_camera(models), "0", 1.0, latents()).result[0]
    known = ContextFrames.execute(sparse_help.with_sparse(models["video"]), "0", 1.0, latents()).result[0]
    found = sampled(both)
    assert relative_error(found, sampled(known)) > 1e-3 and relative_error(found, sampled(models["camera"])) > 1e-3


def test_extend_video_takes_the_poses_of_its_frames_in_the_whole_video(models, monkeypatch):
    seen = seen_by(monkeypatch)
    ExtendVideo.execute(with_sparse_camera(models), text(), text(12), frames=4, width=WIDTH, height=HEIGHT, seed=7,
                        steps=1, cfg=1.0, sampler="euler", scheduler="normal", length=6, context_guidance=1.0,
                        overlap=2, on_cancel="stop")
    path = read_path(POSES)
    expected = [path.cameras(numbers, 6).relative for numbers in ([0, 1, 2, 3], [2, 3, 4, 5])]
    assert len(seen) == 2 and all(torch.allclose(poses, wanted) for (poses, _), wanted in zip(seen, expected))


def test_latent_interpolate_takes_the_poses_of_the_frames_it_makes(models, monkeypatch):
    seen = seen_by(monkeypatch)
    made = LatentInterpolate.execute(with_sparse_camera(models), text(), text(12), latents(3), seed=7, steps=1, times=1,
                                     cfg=1.0, sampler="euler", scheduler="normal", fps=8.0, windows=0).result[0]
    assert len(made["samples"]) == 9
    wanted = read_path(POSES).cameras(range(9), 9).relative
    assert len(seen) == 1 and torch.allclose(seen[0][0], wanted)


# The weights

@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_follows_single_precision(models, dtype):
    write_for_unet(models["folder"] / "half.safetensors", dtype)
    half = with_layers(load_model(checkpoints.as_type(checkpoints.unet_state(), dtype), dtype), MOTION)
    steered = with_camera(half, file="half.safetensors")
    assert {weight.dtype for weight in settings_of(steered).control.parameters()} == {dtype}
    expected, plain = prediction(models["camera"]), prediction(models["video"])
    assert relative_error(prediction(steered).float(), expected) < 0.1 * relative_error(plain, expected)


def test_models_of_one_file_share_its_weights_and_core_counts_and_loads_them_in_part(models):
    one, two = models["camera"], with_camera(models["video"], strength=0.5)
    control = settings_of(one).control
    assert settings_of(two).control is control
    patcher, = (part for part in one.get_nested_additional_models() if part.model is control)
    assert patcher.model_size() == sum(weight.nbytes for weight in control.parameters())
    expected = prediction(one)
    with partly_loaded([patcher], patcher.model_size() // 3):
        assert 0 < patcher.loaded_size() < patcher.model_size()
        assert torch.equal(prediction(one), expected)
    assert torch.equal(prediction(one), expected)


def test_a_deep_copy_of_the_options_copies_no_weights(models):
    import copy
    copied = copy.deepcopy(models["camera"].model_options["transformer_options"])
    assert copied[camera.KEY].control is settings_of(models["camera"]).control


def test_the_report_says_what_was_loaded_and_how_the_camera_moves(models):
    def report(**changes):
        given = {"file": FILE, "move": "pan left", "amount": 0.5, "strength": 1.0, **changes}
        return CameraMotion.execute(models["video"], **given).result[1].split("\n")
    assert report() == [
        "camera.safetensors: a CameraCtrl file (camera moves for AnimateDiff v3), on Stable Diffusion 1.x.",
        "Camera: pan left (0: pan 0; -1: pan -15).",
        "Strength 1. Its authors sample 16 frames of 384x256 with cfg 14 and 25 steps.",
        "At most 16 frames in one call: more need Frame Windows with that length.",
        "Licence: Apache-2.0."]
    assert report(poses="0: right 1\n3: zoom 2", strength=0.0)[1:4] == [
        "Camera: 0: right 1; 3: zoom 2.",
        "The lens changes. In its training clips it never did: forward and back are surer.",
        "Off: strength is 0."]
    both = CameraMotion.execute(models["both"], FILE, "still", 1.0, 1.0).result[1].split("\n")
    assert both[2] == "It steers motion_v3.safetensors alone, and not video.safetensors."
    assert report(poses="\n".join(RECORDED["lines"]))[1] == "Camera: 4 pose lines, one for each frame."
