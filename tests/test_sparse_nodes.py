"""Load SparseCtrl, and the nodes that give it known frames: what they refuse, report and sample."""

from dataclasses import replace

import folder_paths
import pytest
import torch

from video_ldm.nodes.host.options import clip_options, layer_sets_in, transformer_options
from video_ldm.nodes.interpolate import LatentInterpolate
from video_ldm.nodes.longer import ContextFrames, ExtendVideo
from video_ldm.nodes.sparse_control import LoadSparseControl
from video_ldm.temporal.errors import VideoLDMError
from video_ldm.temporal.families import load_sparse_control
from video_ldm.tests.attach_help import HEIGHT, WIDTH, load_model, text, with_layers
from video_ldm.tests.host import checkpoints
from video_ldm.tests.sparse_help import with_known, with_sparse, write_for_unet
from video_ldm.tests.test_sparse_model import latents, noted, sampled, sketches


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sparse_nodes")
    for kind in ("video_ldm", "video_ldm_sparse_control"):
        folder_paths.add_model_folder_path(kind, str(folder))
    checkpoints.save(folder / "motion.safetensors", checkpoints.motion_state())
    checkpoints.write_context_layers(folder / "prediction.safetensors")
    write_for_unet(folder / "rgb.safetensors", "rgb", gain=0.3)
    write_for_unet(folder / "scribble.safetensors", "scribble", gain=0.3)
    image = load_model(checkpoints.unet_state())
    video = with_layers(image, "motion.safetensors")
    return {"image": image, "video": video, "rgb": with_sparse(video),
            "scribble": with_sparse(video, "scribble.safetensors"),
            "prediction": with_layers(image, "prediction.safetensors"), "context": with_known(video, latent=latents())}


@pytest.mark.parametrize("model, file, options, sentence", [
    ("image", "rgb", {}, "no temporal layers, so its frames would be unrelated images"),
    ("prediction", "rgb", {}, "take context frames as an input of their own, and rgb.safetensors is a second way"),
    ("rgb", "scribble", {}, "has a SparseCtrl already"),
    ("context", "rgb", {}, "has its context frames already"),
    ("video", "motion", {}, "^motion.safetensors is an AnimateDiff v2 motion module, not a SparseCtrl file. Load it"),
    ("video", "rgb", {"curve": "0: 3"}, "strengths go from 0, no SparseCtrl at all, to 2"),
    ("video", "rgb", {"curve": "x"}, "'x' in the curve is no strength"),
    ("video", "rgb", {"start_percent": 0.5, "end_percent": 0.5}, "would begin at 0.5 of the sampling and end at 0.5"),
])
def test_load_sparsectrl_refuses_what_would_go_wrong_where_it_is_chosen(models, model, file, options, sentence):
    with pytest.raises(VideoLDMError, match=sentence):
        LoadSparseControl.execute(models[model], f"{file}.safetensors", 1.0, **options)


@pytest.mark.parametrize("channels, width, sentence", [
    ((320, 320, 320), 1024, "and the connected MODEL is SD20: its text has a width of 1024 instead of 768. Connect"),
    ((320, 640), 768, r"is SD20, whose blocks have other channels \(320, 640, where this file has 320, 320, 320\)"),
])
def test_a_model_of_another_kind_is_refused_by_its_text_or_its_channels(models, channels, width, sentence):
    file = load_sparse_control(folder_paths.get_full_path("video_ldm_sparse_control", "rgb.safetensors"))
    with pytest.raises(VideoLDMError, match=sentence):
        file.check_base(channels, width, "SD20")
    file.check_base((320, 320, 320), 768, "SD15")


def test_a_whole_video_network_is_refused(models):
    m = models["video"].clone()
    options = transformer_options(m)
    options.update({key: replace(layers, network=True) for key, layers in layer_sets_in(options).items()})
    with pytest.raises(VideoLDMError, match="is a whole video network, and rgb.safetensors is made for an image model"):
        with_sparse(m)


def test_a_sampling_without_known_frames_is_refused(models):
    for kind in ("rgb", "scribble"):
        with pytest.raises(VideoLDMError, match=f"{kind}.safetensors on this MODEL is to see known frames, and none"):
            sampled(models[kind])


def test_sketches_are_taken_as_pictures_of_the_videos_size_alone(models):
    with pytest.raises(VideoLDMError, match="sees sketches as pictures, and a LATENT is connected"):
        with_known(models["scribble"], latent=latents())
    with pytest.raises(VideoLDMError, match="No sketches are connected"):
        with_known(models["scribble"])
    small = sketches()[:, :8]
    with pytest.raises(VideoLDMError, match=f"context frames are {WIDTH}x8 pixels and the clip is {WIDTH}x{HEIGHT}"):
        sampled(with_known(models["scribble"], image=small))
    odd = sketches().repeat(1, 2, 2, 1)[:, :HEIGHT, :WIDTH + 1]
    with pytest.raises(VideoLDMError, match=f"{WIDTH + 1}x{HEIGHT} pixels and the clip"):
        sampled(with_known(models["scribble"], image=odd))


def test_pictures_of_another_size_than_the_clip_are_refused(models):
    with pytest.raises(VideoLDMError, match="The context frames are 24x8 pixels and the clip is 24x16"):
        sampled(with_known(models["rgb"], latent={"samples": latents()["samples"][:, :, :1]}))


def test_frames_of_the_video_are_refused_for_a_file_that_sees_sketches(models):
    for sample in (extended, interpolated):
        with pytest.raises(VideoLDMError, match="sees sketches, and .* gives it frames of the video itself"):
            sample(models["scribble"])


def extended(model, start=None, **changes):
    widgets = dict(frames=4, width=WIDTH, height=HEIGHT, seed=7, steps=1, cfg=1.0, sampler="euler", scheduler="normal",
                   length=6, context_guidance=1.0, overlap=2, on_cancel="stop")
    return ExtendVideo.execute(model, text(), text(12), **{**widgets, **changes}, latent=start).result


def interpolated(model, keys=3, **changes):
    widgets = dict(seed=7, steps=1, times=1, cfg=1.0, sampler="euler", scheduler="normal", fps=8.0, windows=0)
    return LatentInterpolate.execute(model, text(), text(12), latents(keys), **{**widgets, **changes}).result


def known_of_calls(model):
    """A clone that notes the known frames of each call, and the notes: their positions in the clip."""
    m, seen = model.clone(), []

    def note(executor, x, timesteps, context, y, control, options, **kwargs):
        known = clip_options(options).context
        seen.append((known.positions, known.latents.clone(), control is not None))
        return executor(x, timesteps, context, y, control, options, **kwargs)
    m.add_wrapper_with_key("diffusion_model", "test", note)
    return m, seen


def test_extend_video_shows_each_clip_the_last_frames_of_the_one_before(models):
    given = latents()
    model, seen = known_of_calls(models["rgb"])
    made, fps, report = extended(model, given)
    video = made["samples"]
    assert len(video) == 6 and torch.equal(video[:1], given["samples"])
    assert [positions for positions, _, _ in seen] == [(0,), (0, 1)] and all(acts for _, _, acts in seen)
    assert torch.equal(seen[0][1], given["samples"]) and torch.equal(seen[1][1], video[2:4])
    assert "seen by SparseCtrl" in report


def test_extend_video_from_noise_makes_its_first_clip_without_sparsectrl(models):
    model, seen = known_of_calls(models["rgb"])
    video = extended(model)[0]["samples"]
    assert [(positions, acts) for positions, _, acts in seen] == [((), False), ((0, 1), True)]
    assert torch.equal(video[:4], extended(models["video"])[0]["samples"][:4])


def test_latent_interpolate_shows_all_key_frames_and_makes_them_anew_unless_told(models):
    keys = latents(3)["samples"]
    model, seen = known_of_calls(models["rgb"])
    made = interpolated(model)[0]["samples"]
    assert len(made) == 9 and seen[0][0] == (0, 4, 8) and torch.equal(seen[0][1], keys) and seen[0][2]
    assert not torch.equal(made[::4], keys)
    kept = interpolated(models["rgb"], keep_key_frames=True)[0]["samples"]
    assert torch.equal(kept[::4], keys) and torch.equal(kept[1::4], made[1::4])


def test_the_layers_alone_still_do_not_interpolate(models):
    with pytest.raises(VideoLDMError, match="make key frames, not the frames between them"):
        interpolated(models["video"])


def test_the_reports_say_what_was_loaded_and_that_the_frames_are_made_anew(models):
    report = LoadSparseControl.execute(models["video"], "rgb.safetensors", 0.5, "0: 1, 3: 0.5", 0.0, 0.6).result[1]
    assert report.split("\n") == [
        "rgb.safetensors: an AnimateDiff SparseCtrl file for pictures (RGB), on Stable Diffusion 1.x.",
        "Trained with AnimateDiff v3's layers, on clips of 16 frames.",
        "This MODEL has layers of AnimateDiff v2: they run, and may follow the frames less.",
        "It sees pictures. Those that this checkpoint made itself work best.",
        "The frames that it sees are made anew with the others: close to them, and not the same.",
        "Strength: 0.5, times 1 at frame 0, falling to 0.5 at frame 3, and the same in all later frames.",
        "It acts from 0 to 0.6 of the sampling.",
        "Licence: Apache-2.0."]
    shown = ContextFrames.execute(models["rgb"], "0, -1", 2.0, latents(2)).result[1]
    assert shown == ("Frames 0, -1: seen by SparseCtrl (rgb.safetensors) at every step. The video's own frames there "
                     "are made anew with the others: close to what it sees, and not the same. Context guidance 2.")


def test_a_curve_that_names_a_frame_behind_the_end_is_warned_of(models, caplog):
    sparse = with_sparse(models["video"], curve="0: 1, 20: 0")
    sampled(with_known(sparse, latent=latents()), steps=1)
    assert caplog.text.count("The strengths of SparseCtrl name frame 20, and the last frame of the video is 3") == 1


def test_deep_shrink_is_refused(models):
    from comfy_extras.nodes_model_downscale import PatchModelAddDownscale
    shrunk = PatchModelAddDownscale.execute if hasattr(PatchModelAddDownscale, "execute") else \
        PatchModelAddDownscale().patch
    model = shrunk(with_known(models["rgb"], latent=latents()), 1, 2.0, 0.0, 0.35, True, "bicubic", "bicubic")
    model = getattr(model, "result", model)[0]
    with pytest.raises(VideoLDMError, match="PatchModelAddDownscale runs blocks of this MODEL at another size"):
        sampled(model)


def test_settings_travel_with_the_model_and_two_do_not_see_each_other(models):
    first, seen = noted(with_known(with_sparse(models["video"], strength=0.5), latent=latents()))
    second, others = noted(with_known(models["rgb"], latent=latents()))
    sampled(first, steps=1)
    sampled(second, steps=1)
    assert torch.equal(seen[0][2]["middle"][0], others[0][2]["middle"][0] * 0.5)
    assert "video_ldm_sparse_control" not in transformer_options(models["video"].clone())
