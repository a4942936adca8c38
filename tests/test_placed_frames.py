"""Known frames in the input of the image model: MuseV's and makeavid-sd's layers with Context Frames."""

import comfy.samplers
import folder_paths
import pytest
import torch

from video_ldm.nodes.host.context import with_context_frames
from video_ldm.nodes.host.options import with_clip_options
from video_ldm.nodes.layer_strength import LayerStrength
from video_ldm.nodes.load import LoadTemporalLayers
from video_ldm.nodes.longer import ContextFrames, ExtendVideo
from video_ldm.nodes.windows import WINDOWS, FrameWindows
from video_ldm.temporal.errors import VideoLDMError
from video_ldm.tests.attach_help import (
    assert_untouched,
    load_model,
    noise_of,
    partly_loaded,
    prediction,
    text,
    with_layers,
)
from video_ldm.tests.host import checkpoints
from video_ldm.tests.host.checkpoints import FRAMES, INPAINTING
from video_ldm.tests.small import relative_error

SCALE = 0.18215         # from a LATENT to what the network sees
SIGMA = 2.0


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """{name: MODEL}: an image and an inpainting model without layers, and both with each file's layers."""
    folder = tmp_path_factory.mktemp("frozen")
    folder_paths.add_model_folder_path("video_ldm", str(folder))
    checkpoints.save(folder / "musev.safetensors", checkpoints.musev_state())
    checkpoints.save(folder / "makeavid.safetensors", checkpoints.makeavid_state())
    states = {"image": checkpoints.unet_state(), "inpainting": checkpoints.unet_state(in_channels=INPAINTING)}
    found = {name: load_model(state) for name, state in states.items()}
    plain = dict(found)
    for name, model in plain.items():
        for kind in ("musev", "makeavid"):
            found[f"{kind} on {name}"] = with_layers(model, f"{kind}.safetensors")
    yield found
    for name, model in plain.items():
        assert_untouched(model, states[name])


def known_latent(clips=1, seed=5):
    return torch.randn(clips, 4, 2, 3, generator=torch.Generator().manual_seed(seed))


def seen(model, clips=1, cfg=1.0, frames=FRAMES, steps=1):
    """(inputs of the network in a sampling, its noise, its result)."""
    inputs = []
    conv = model.model.diffusion_model.input_blocks[0][0]
    handle = conv.register_forward_pre_hook(lambda module, args: inputs.append(args[0].clone()))
    guider = comfy.samplers.CFGGuider(with_clip_options(model, frames))
    guider.set_conds(text(), text(12))
    guider.set_cfg(cfg)
    noise = noise_of(clips, frames)
    sigmas = torch.tensor([SIGMA, 1.0, 0.5, 0.0][-steps - 1:] if steps > 1 else [SIGMA, 0.0])
    try:
        result = guider.sample(noise, torch.zeros_like(noise), comfy.samplers.ksampler("euler"), sigmas,
                               disable_pbar=True, seed=0)
    finally:
        handle.remove()
    return inputs, noise * SIGMA / (SIGMA ** 2 + 1) ** 0.5, result


@pytest.mark.parametrize("clips, sets", [(1, 1), (2, 1), (2, 2)])
@pytest.mark.parametrize("cfg", [1.0, 3.0])
def test_musev_sees_the_first_frame_without_noise_at_its_place(models, clips, sets, cfg):
    known = known_latent(sets)
    (first, *_), noisy, result = seen(with_context_frames(models["musev on image"], known, (0,)), clips, cfg)
    for part in first.split(clips * FRAMES):
        by_clip, plain = part.unflatten(0, (clips, FRAMES)), noisy.unflatten(0, (clips, FRAMES))
        assert torch.equal(by_clip[:, 0], (known * SCALE).expand(clips, -1, -1, -1))
        assert relative_error(by_clip[:, 1:], plain[:, 1:]) < 1e-6
    assert torch.equal(result.unflatten(0, (clips, FRAMES))[:, 0], known.expand(clips, -1, -1, -1))


def test_musev_without_a_known_frame_sees_noise_alone_and_a_known_one_reaches_every_frame(models):
    (first,), noisy, plain = seen(models["musev on image"])
    assert relative_error(first, noisy) < 1e-6
    _, _, one = seen(with_context_frames(models["musev on image"], known_latent(), (0,)))
    _, _, other = seen(with_context_frames(models["musev on image"], known_latent(seed=6), (0,)))
    for frame in range(1, FRAMES):
        assert relative_error(one[frame], plain[frame]) > 1e-3 and relative_error(one[frame], other[frame]) > 1e-3


@pytest.mark.parametrize("clips, sets", [(1, 1), (2, 1), (2, 2)])
@pytest.mark.parametrize("cfg", [1.0, 3.0])
def test_makeavid_sees_the_first_frame_in_every_frame_and_a_mask_of_0(models, clips, sets, cfg):
    known = known_latent(sets)
    model = with_context_frames(models["makeavid on inpainting"], known, (0,))
    (first, *_), noisy, result = seen(model, clips, cfg)
    for part in first.split(clips * FRAMES):
        assert relative_error(part[:, :4], noisy) < 1e-6
        assert torch.equal(part[:, 4:5], torch.zeros_like(part[:, :1]))
        assert torch.equal(part[:, 5:].unflatten(0, (clips, FRAMES)),
                           (known * SCALE)[:, None].expand(sets, FRAMES, -1, -1, -1).expand(clips, -1, -1, -1, -1))
    assert torch.equal(result.unflatten(0, (clips, FRAMES))[:, 0], known.expand(clips, -1, -1, -1))


def test_makeavid_without_a_known_frame_sees_what_an_inpainting_model_sees(models):
    (ours,), _, _ = seen(models["makeavid on inpainting"])
    (theirs,), _, _ = seen(models["inpainting"])
    assert torch.equal(ours, theirs)


def test_makeavid_on_a_model_of_four_channels_holds_a_known_frame_by_a_noise_mask(models):
    model = models["makeavid on image"]
    held, report = ContextFrames.execute(model, "0", 1.0, {"samples": known_latent()}).result
    assert report.startswith("Frame 0: held in place by ComfyUI's noise mask")
    (first, *_), _, result = seen(held)
    assert first.shape[1] == 4 and relative_error(result[:1], known_latent()) < 1e-6
    assert relative_error(prediction(model), prediction(models["image"])) > 1e-3


@pytest.mark.parametrize("file, name, words", [
    ("makeavid.safetensors", "inpainting", ["This MODEL is an inpainting model. Give it the first frame",
                                            "ModelMergeSubtract", "AGPL-3.0"]),
    ("makeavid.safetensors", "image", ["This MODEL is no inpainting model.", "in training it always did"]),
    ("musev.safetensors", "image", ["non-commercial research only", "give it one with Context Frames, frames 0",
                                    "Its authors exchange the checkpoint in the same way."]),
])
def test_the_report_says_what_the_layers_were_trained_with(models, file, name, words):
    report = LoadTemporalLayers.execute(models[name], file, 1.0, "as trained").result[1]
    assert all(part in report for part in words)
    assert ("This MODEL is" in report) == file.startswith("makeavid")


@pytest.mark.parametrize("kind, words", [
    ("musev on image", "Frame 0: seen by the temporal layers, which were trained with context frames."),
    ("makeavid on inpainting", "Frame 0: seen in every frame through the inpainting model's input by the temporal "
                               "layers, which were trained with context frames."),
])
def test_context_frames_says_how_the_frame_enters(models, kind, words):
    assert ContextFrames.execute(models[kind], "0", 1.0, {"samples": known_latent()}).result[1] == words


@pytest.mark.parametrize("kind", ["musev on image", "makeavid on inpainting"])
def test_other_frames_and_context_guidance_are_refused(models, kind):
    with pytest.raises(VideoLDMError, match="were trained for the context frames 0, not for 1"):
        ContextFrames.execute(models[kind], "1", 1.0, {"samples": known_latent()})
    with pytest.raises(VideoLDMError, match="were never trained without them. Set it to 1"):
        ContextFrames.execute(models[kind], "0", 2.0, {"samples": known_latent()})


@pytest.mark.parametrize("kind, position", [("musev on image", -12), ("makeavid on inpainting", -24)])
def test_a_number_from_the_end_that_is_the_first_frame_of_training_s_length_alone_is_refused_when_sampled(
        models, kind, position):
    """The clip has one frame more, so the number is its second frame."""
    model = with_context_frames(models[kind], known_latent(), (position,))
    with pytest.raises(VideoLDMError, match="were trained for the context frames 0, not for 1"):
        seen(model, frames=1 - position)


@pytest.mark.parametrize("kind, plain", [("musev on image", "image"), ("makeavid on inpainting", "inpainting")])
def test_strength_0_with_a_known_frame_is_the_image_model(models, kind, plain):
    file = f"{kind.split()[0]}.safetensors"
    model = with_context_frames(with_layers(models[plain], file, strength=0.0), known_latent(), (0,))
    (ours,), _, _ = seen(model)
    (theirs,), _, _ = seen(models[plain])
    assert torch.equal(ours, theirs)
    assert torch.equal(prediction(model), prediction(models[plain]))


def test_a_frame_of_strength_0_gets_no_hint(models):
    model = with_context_frames(models["makeavid on inpainting"], known_latent(), (0,))
    model = LayerStrength.execute(model, "1, 0, 1, 1", "linear").result[0]
    assert torch.equal(prediction(model)[1], prediction(models["inpainting"])[1])
    assert relative_error(prediction(model)[2], prediction(models["inpainting"])[2]) > 1e-3


def test_musev_refuses_frames_of_strength_0_beside_a_known_frame_alone(models):
    weak = LayerStrength.execute(models["musev on image"], "1, 0, 1, 1", "linear").result
    assert "With Context Frames every frame needs a strength above 0." in weak[1]
    assert torch.equal(prediction(weak[0])[1], prediction(models["image"])[1])
    with pytest.raises(VideoLDMError, match="Give every frame a strength above 0"):
        prediction(with_context_frames(weak[0], known_latent(), (0,)))


def test_windows_get_the_hint_too_and_musev_refuses_windows_without_its_first_frame(models):
    def windowed(kind):
        model = FrameWindows.execute(models[kind], WINDOWS, FRAMES, 2, "static", "pyramid", 8).result[0]
        return with_context_frames(model, known_latent(), (0,))
    inputs, _, result = seen(windowed("makeavid on inpainting"), frames=2 * FRAMES - 2)
    assert len(inputs) > 1 and torch.equal(result[:1], known_latent())
    for part in inputs:
        assert torch.equal(part[:, 5:], (known_latent() * SCALE).expand(len(part), -1, -1, -1))
    with pytest.raises(VideoLDMError, match="the context frames are none, and the temporal layers were trained for 0. "
                                            "Sample the clip in one window, or make a longer video with Extend"):
        seen(windowed("musev on image"), frames=2 * FRAMES - 2)


def test_extend_video_goes_on_from_one_frame_and_refuses_two(models):
    def extended(kind, overlap):
        return ExtendVideo.execute(models[kind], text(), text(12), FRAMES, 24, 16, 1, 1, 2.0, "euler", "normal", 7, 1.0,
                                   overlap, "stop", {"samples": known_latent()}).result
    for kind in ("musev on image", "makeavid on inpainting"):
        latent, _, report = extended(kind, 1)
        assert latent["samples"].shape == (7, 4, 2, 3) and torch.equal(latent["samples"][:1], known_latent())
        assert "seen " in report
        with pytest.raises(VideoLDMError, match="were trained for the context frames 0, not for 0, 1"):
            extended(kind, 2)


# Weights

@pytest.fixture(scope="module")
def own_models(models):
    """MODELs of their own, to be loaded in part."""
    return {"musev": load_model(checkpoints.unet_state()),
            "makeavid": load_model(checkpoints.unet_state(in_channels=INPAINTING))}


@pytest.mark.parametrize("kind", ["musev", "makeavid"])
def test_partly_loaded_models_give_what_fully_loaded_ones_give(own_models, kind):
    video = with_context_frames(with_layers(own_models[kind], f"{kind}.safetensors"), known_latent(), (0,))
    reference = prediction(video)
    patchers = [video, *video.get_nested_additional_models()]
    with partly_loaded(patchers, 0.1):
        assert relative_error(prediction(video), reference) < 1e-5
    assert relative_error(prediction(video), reference) < 1e-6


@pytest.mark.parametrize("kind, dtype, error", [("musev", torch.float16, 0.02), ("makeavid", torch.float16, 0.02),
                                                ("musev", torch.bfloat16, 0.15), ("makeavid", torch.bfloat16, 0.15)])
def test_in_half_precision_the_layers_have_the_models_dtype_and_predict_nearly_the_same(own_models, kind, dtype, error):
    options = {"in_channels": INPAINTING} if kind == "makeavid" else {}
    narrow = with_layers(load_model(checkpoints.unet_state(**options), dtype), f"{kind}.safetensors")
    weights = narrow.get_nested_additional_models()[0].model.state_dict().values()
    assert {weight.dtype for weight in weights} == {dtype}
    ours = prediction(with_context_frames(narrow, known_latent(), (0,)))
    wide = with_context_frames(with_layers(own_models[kind], f"{kind}.safetensors"), known_latent(), (0,))
    assert ours.isfinite().all() and relative_error(ours.float(), prediction(wide)) < error
