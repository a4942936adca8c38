"""Layer Strength under ComfyUI's own sampling, in this process: windows, longer video, clips, clones and refusals."""

import logging
from dataclasses import replace

import pytest
import torch

from video_ldm.nodes.host import frame_conditioning
from video_ldm.nodes.host.layer_strength import strengths_in_call
from video_ldm.nodes.host.options import CallClips, LayerSet, layer_sets_in, with_clip_options
from video_ldm.nodes.layer_strength import LayerStrength
from video_ldm.nodes.load import AS_MODEL, LoadTemporalLayers
from video_ldm.temporal.errors import VideoLDMError
from video_ldm.tests import attach_help
from video_ldm.tests.attach_help import models_with_layers
from video_ldm.tests.host import checkpoints
from video_ldm.tests.longer_help import frames_of, run_extend, run_interpolate, write_known_frame_layers
from video_ldm.tests.network_help import ONE_LEVEL, network_model, network_tensors
from video_ldm.tests.small import relative_error
from video_ldm.tests.windows_help import LENGTH, LONG, by_hand, noise_of, notes, prediction, text, windowed

HEIGHT, WIDTH = 16, 24          # of a mask, in pixels: latents of 2 x 3


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """MODELs by name: with layers of both kinds, with layers for known frames, and the image model."""
    def write(folder):
        checkpoints.write_video_layers(folder / "video.safetensors")
        checkpoints.save(folder / "motion.safetensors", checkpoints.motion_state())
        write_known_frame_layers(folder)
    yield from models_with_layers(tmp_path_factory, write)


def strengths(model, curve="1", mask=None, interpolation="linear"):
    return LayerStrength.execute(model, curve, interpolation, mask).result[0]


def report(model, curve="1", mask=None, interpolation="linear"):
    return LayerStrength.execute(model, curve, interpolation, mask).result[1]


def with_strength(model, strength, file="video.safetensors"):
    return LoadTemporalLayers.execute(model, file, strength, AS_MODEL).result[0]


def maps(x, options):
    """What the layers of a call are told."""
    found, = layer_sets_in(options).values()
    return found.strengths


def greys(*values):
    """A mask of one grey for each frame."""
    return torch.tensor(values)[:, None, None].expand(-1, HEIGHT, WIDTH).contiguous()


def half(frames=1):
    """A mask that is white on its left third."""
    mask = torch.zeros(frames, HEIGHT, WIDTH)
    mask[:, :, :8] = 1
    return mask


# In one call

@pytest.mark.parametrize("file", ["video", "motion"])
def test_frames_of_strength_0_are_those_of_the_image_model_to_the_bit_with_two_prompts_too(models, file):
    noise = noise_of(LENGTH)
    image, full = (prediction(models[name], noise, cfg=2.0) for name in ("image", file))
    seen = prediction(strengths(models[file], "0 1 1 0"), noise, cfg=2.0)
    assert torch.equal(seen[[0, 3]], image[[0, 3]])
    assert relative_error(seen[1:3], image[1:3]) > 1e-3 < relative_error(seen[1:3], full[1:3])


def test_a_list_a_curve_and_a_grey_for_each_frame_are_the_same(models):
    model, noise = models["video"], noise_of(LENGTH)
    seen = prediction(strengths(model, "0 0.5 1 1"), noise)
    assert torch.equal(prediction(strengths(model, "0: 0, 2: 1"), noise), seen)
    assert torch.equal(prediction(strengths(model, "0: 0, 1: 0.5, 2: 1", interpolation="hold"), noise), seen)
    assert torch.equal(prediction(strengths(model, "", greys(0, 0.5, 1, 1)), noise), seen)
    assert torch.equal(prediction(strengths(strengths(model, "0 1"), "1 0.5 1"), noise), seen)       # they multiply


def test_strength_1_is_the_model_without_the_node_to_the_bit(models):
    noise = noise_of(LENGTH)
    for file in ("video", "motion"):
        plain = prediction(models[file], noise)
        assert torch.equal(prediction(strengths(models[file]), noise), plain)
        assert torch.equal(prediction(strengths(models[file], "", half() + 1 - half()), noise), plain)


def test_it_multiplies_with_the_strength_of_the_loader(models):
    noise = noise_of(LENGTH)
    seen = prediction(strengths(with_strength(models["image"], 0.8), "0.5"), noise)
    assert relative_error(seen, prediction(with_strength(models["image"], 0.4), noise)) < 1e-5
    nothing = prediction(strengths(with_strength(models["image"], 0.0), "2"), noise)
    assert torch.equal(nothing, prediction(models["image"], noise))


def test_one_mask_serves_all_frames_and_each_place_has_its_own(models):
    model, noise = models["video"], noise_of(LENGTH)
    model, seen = notes(strengths(model, "1 0.5", half()), maps)
    one = prediction(model, noise)
    assert seen[0][:2].tolist() == [[[1, 0, 0]] * 2, [[0.5, 0, 0]] * 2]
    assert torch.equal(prediction(strengths(models["video"], "1 0.5", half(LENGTH)), noise), one)
    assert relative_error(prediction(strengths(models["video"], "1 0.5", 1 - half()), noise), one) > 1e-3
    assert relative_error(prediction(strengths(models["video"], "1 0.5"), noise), one) > 1e-3


def test_all_sets_on_the_model_get_it_and_those_loaded_later_do_not(models):
    noise = noise_of(LENGTH)
    both = with_strength(models["motion"], 1.0)
    seen = prediction(strengths(both, "0 1 1 1"), noise)
    assert torch.equal(seen[:1], prediction(models["image"], noise)[:1])
    later = prediction(with_strength(strengths(models["motion"], "0 1 1 1"), 1.0), noise)
    assert relative_error(later[0], seen[0]) > 1e-3
    assert relative_error(later, prediction(both, noise)) > 1e-3


def test_clones_with_other_strengths_run_in_turn_without_interacting(models):
    noise = noise_of(LENGTH)
    clones = [strengths(models["video"], "0 1"), strengths(models["video"], "1 0", half()), models["video"]]
    alone = [attach_help.prediction(clone, noise=noise) for clone in clones]
    seen = attach_help.predictions(clones[0], others=clones[1:], noise=noise)
    assert [torch.equal(*pair) for pair in zip(seen, [*alone, alone[0]], strict=True)] == [True] * 4
    assert min(relative_error(alone[0], other) for other in alone[1:]) > 1e-4
    assert all(layers.by_frame == () for layers in layer_sets_in(models["video"].model_options["transformer_options"])
               .values())


def test_each_clip_of_a_batch_has_the_whole_curve_and_all_masks(models):
    model = strengths(models["video"], "0 1 0.5 0.25", torch.cat([half(2), greys(1, 0.5)]))
    batch, seen = notes(with_clip_options(model, LENGTH), maps)
    noise = noise_of(2 * LENGTH)
    together = prediction(batch, noise, cfg=2.0)
    assert torch.equal(seen[0][:LENGTH], seen[0][LENGTH:]) and seen[0].shape == (2 * LENGTH, 2, 3)
    for clip, own in zip(noise.split(LENGTH), together.split(LENGTH)):
        assert relative_error(own, prediction(model, clip, cfg=2.0)) < 1e-5
    assert torch.equal(together[::LENGTH], prediction(with_clip_options(with_strength(models["image"], 0.0), LENGTH),
                                                      noise, cfg=2.0)[::LENGTH])


def test_a_node_that_repeats_the_batch_for_tiles_gets_the_strengths_for_each(models):
    """Such nodes call the network with the clips of every tile, one tile after the other."""
    def tiled(executor, x, timesteps, context, *args, **kwargs):
        return executor(x.repeat(2, 1, 1, 1), timesteps.repeat(2), context.repeat(2, 1, 1), *args, **kwargs)[:len(x)]
    noise = noise_of(LENGTH)

    def seen(model):
        m = model.clone()
        m.wrappers = {kind: {"tiles": [tiled], **keyed} if kind == "diffusion_model" else keyed
                      for kind, keyed in m.wrappers.items()}
        return prediction(m, noise)
    plain = prediction(strengths(models["video"], "0 1 0.5", half()), noise)
    assert relative_error(seen(strengths(models["video"], "0 1 0.5", half())), plain) < 1e-5


# Windows

def test_every_window_gets_the_strengths_of_its_own_frames(models):
    values, mask = [0.0, 0.5, 1.0, 0.25, 0.0, 2.0], torch.cat([half(3), 1 - half(3)])
    curve = " ".join(map(str, values))
    for masks in (None, mask):
        def alone(noise, places, masks=masks):
            own = strengths(models["video"], " ".join(map(str, values[places])), None if masks is None else
                            masks[places])
            return prediction(own, noise, cfg=2.0)
        seen = prediction(windowed(strengths(models["video"], curve, masks)), cfg=2.0)
        assert relative_error(seen, by_hand(alone)) < 1e-5
        assert torch.equal(prediction(strengths(windowed(models["video"]), curve, masks), cfg=2.0), seen)
        assert relative_error(seen, prediction(windowed(models["video"]), cfg=2.0)) > 1e-3


def test_frames_of_strength_0_are_the_image_models_in_windows_to_the_bit_in_several_clips_too(models):
    curve, noise = "0 1 1 0 0 0.5", noise_of(2 * LONG)
    seen, image = (prediction(with_clip_options(windowed(model), LONG), noise) for model in
                   (strengths(models["motion"], curve), with_strength(models["image"], 0.0, "motion.safetensors")))
    still = [0, 3, 4, LONG, LONG + 3, LONG + 4]
    assert torch.equal(seen[still], image[still])
    moving = sorted({*range(2 * LONG)} - {*still})
    assert min(relative_error(seen[n], image[n]) for n in moving) > 1e-4


def test_a_window_without_strength_is_the_image_models(models):
    curve = "0 0 0 0 1 1"
    seen, image = prediction(windowed(strengths(models["video"], curve))), prediction(windowed(
        with_strength(models["image"], 0.0)))
    assert torch.equal(seen[:4], image[:4]) and relative_error(seen[4:], image[4:]) > 1e-3


def test_cores_own_windows_are_refused(models):
    from comfy_extras.nodes_context_windows import ContextWindowsManualNode

    def core(model):
        return ContextWindowsManualNode.execute(model, LENGTH, 2, "standard_static", 1, False, "pyramid", 0).result[0]
    with pytest.raises(VideoLDMError, match="Context Windows over frames .dim 0. .*Use Frame Windows instead"):
        prediction(core(strengths(models["video"], "0 1")))


# Longer video

def test_frames_are_those_of_the_whole_video_in_extend_video(models):
    values = torch.tensor([0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8])
    masks = greys(*(1 - values / 2).tolist())
    model, calls = notes(strengths(models["prediction"], "0: 0, 8: 0.8", masks), maps)
    run_extend(model, length=9)
    wanted = values * (1 - values / 2)
    for seen, frames in zip(calls, [[0, 1, 2, 3], [2, 3, 4, 5], [4, 5, 6, 7], [6, 7, 8, 8]], strict=True):
        assert seen.shape == (4, 2, 3) and relative_error(seen, wanted[frames][:, None, None].expand(4, 2, 3)) < 1e-6


def test_only_the_frames_with_strength_change_in_an_extended_video(models):
    """No frame of a clip hears another where the layers have no strength, so the last clip alone differs."""
    curve = "0: 0, 6: 0, 7: 1"
    seen, image = (run_extend(model, length=9)[0]["samples"] for model in
                   (strengths(models["prediction"], curve), strengths(models["prediction"], "0")))
    assert torch.equal(seen[:7], image[:7])
    assert min(relative_error(seen[n], image[n]) for n in (7, 8)) > 1e-4


@pytest.mark.parametrize("times, wanted", [
    (1, [[0, 1, 2, 3, 4, 4, 5, 6, 7, 8]]),
    (2, [[4 * n for n in (0, 1, 2, 3, 4, 4, 5, 6, 7, 8)],
         [4 * pair + n for pair in range(8) for n in range(5)]])])
def test_frames_are_those_of_the_finished_video_in_latent_interpolate(models, times, wanted):
    length = 9 if times == 1 else 33
    model, calls = notes(strengths(models["between"], f"0: 0, {length - 1}: 1"), maps)
    run_interpolate(model, frames_of(6), clip_frames=3, times=times, windows=8)
    for seen, frames in zip(calls, [clip for clip in wanted for _ in range(2)], strict=True):
        assert relative_error(seen.flatten(), torch.tensor(frames) / (length - 1)) < 1e-6


def test_a_mask_for_each_frame_that_is_none_of_the_finished_video_is_refused(models):
    with pytest.raises(VideoLDMError, match="has 3 masks, and the video has 9 frames"):
        run_interpolate(strengths(models["between"], "1", half(3)), frames_of(3))
    with pytest.raises(VideoLDMError, match="has 4 masks, and the video has 9 frames"):
        run_extend(strengths(models["prediction"], "1", half(4)), length=9)


def test_the_clone_for_one_clip_of_a_video_leaves_the_model_as_it_was(models):
    model = strengths(models["video"], "0 1")
    before = dict(model.model_options["transformer_options"])
    frame_conditioning.model_of(model, 4, None, 8.0, frame_conditioning.frames_of_clip(2, 4, 9))
    assert model.model_options["transformer_options"] == before


# What is said and refused

@pytest.mark.parametrize("curve, interpolation, words", [
    ("0: 0.2, 15: 1", "linear", "0.2 at frame 0, rising to 1 at frame 15, and the same in all later frames."),
    ("2: 1, 9: 1, 12: 0", "linear", "1 up to frame 2, the same up to frame 9, falling to 0 at frame 12, and the same"),
    ("0: 1, 7: 0, 8: 1", "hold", "1 at frame 0, 0 from frame 7, 1 from frame 8 on."),
    ("0 0.2 1", "linear", "0, 0.2, 1 in frames 0 to 2, and 1 in all later frames."),
    ("0.5", "linear", "0.5 in every frame."),
    (" ".join(["1"] * 40), "hold", "1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, ... in frames 0 to 39")])
def test_the_report_says_the_strength_of_each_frame(models, curve, interpolation, words):
    assert f"Strength: {words}" in report(models["video"], curve, None, interpolation)


def test_the_report_says_what_the_mask_is_and_what_it_multiplies_with(models):
    found = report(strengths(with_strength(models["image"], 0.8), "0.5"), "", half())
    assert "Mask: one picture for all frames, 24x16, 33 % white" in found
    assert "strength 0.8 of video.safetensors and with an earlier Layer Strength" in found
    assert "attention still mixes regions" in found and "Strength:" not in found
    assert "own pictures" in report(models["video"], "0 1") and "own pictures" not in report(models["video"], "1 2")


def test_a_curve_beyond_the_end_of_the_clip_is_warned_of_once(models, caplog):
    with caplog.at_level(logging.WARNING):
        prediction(strengths(models["video"], "0: 0, 3: 1"), noise_of(LENGTH))
        assert caplog.text == ""
        prediction(strengths(models["video"], "0: 0, 4: 1"), noise_of(LENGTH))
    assert caplog.text.count("Layer Strength names frame 4, and the last frame of the video is 3") == 1
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        run_extend(strengths(models["prediction"], "0: 0, 20: 1"), length=9)
    assert caplog.text.count("Layer Strength names frame 20, and the last frame of the video is 8") == 1


@pytest.mark.parametrize("curve, mask, words", [
    ("", None, "an empty curve and no mask. Write a curve"),
    ("1 x", None, "'x' in the curve is no strength"),
    ("3", None, "gives frame 0 the strength 3"),
    ("1", torch.zeros(2, 16, 24), "is black everywhere"),
    ("1", torch.full((1, 16, 24), 255.0), "mask has values beyond 0 .black. and 1 .white."),
    ("1", torch.full((1, 16, 24), -1.0), "mask has values beyond 0"),
    ("1", torch.full((1, 16, 24), float("nan")), "mask has values beyond 0"),
    ("1", torch.ones(1, 16, 24, 3), "mask is of the size 1x16x24x3"),
    ("1", torch.ones(0, 16, 24), "mask is of the size 0x16x24"),
    ("1", "mask", "mask was given something of the type str"),
])
def test_bad_inputs_are_refused_at_the_node(models, curve, mask, words):
    with pytest.raises(VideoLDMError, match=words) as caught:
        strengths(models["video"], curve, mask)
    assert str(caught.value).endswith(".")


def test_a_mask_that_a_node_left_without_a_batch_or_a_little_beyond_white_is_taken(models):
    noise = noise_of(LENGTH)
    wanted = prediction(strengths(models["video"], "1", half()), noise)
    assert torch.equal(prediction(strengths(models["video"], "1", half()[0] * 1.001), noise), wanted)


@pytest.mark.parametrize("mask, words", [
    (half(3), "has 3 masks, and the video has 4 frames"),
    (torch.ones(1, 64, 64), "is 64x64 pixels, and the frames have other proportions")])
def test_masks_that_do_not_fit_the_clip_are_refused_when_sampling_starts(models, mask, words):
    with pytest.raises(VideoLDMError, match=words):
        prediction(strengths(models["video"], "1", mask), noise_of(LENGTH))


def test_a_part_of_the_picture_that_is_sampled_by_itself_is_refused_with_a_mask_and_taken_with_a_curve(models):
    conds = text() + [[text(15)[0][0], {"area": (2, 2, 0, 0), "strength": 0.5}]]
    with pytest.raises(VideoLDMError, match="has a mask of the whole picture. Remove that area"):
        prediction(strengths(models["video"], "1", half()), noise_of(LENGTH), positive=conds)
    seen, image = (prediction(model, noise_of(LENGTH), positive=conds) for model in
                   (strengths(models["video"], "0 1"), models["image"]))
    assert torch.equal(seen[0], image[0]) and relative_error(seen[1:], image[1:]) > 1e-3


def test_a_call_with_a_part_of_the_images_of_a_sampling_is_refused(models):
    """Another pack's node may sample a batch clip by clip. The map has a row for each image of all clips."""
    layers, = layer_sets_in(strengths(models["video"], "0 1").model_options["transformer_options"]).values()
    layers = replace(layers, strengths=torch.ones(8, 1, 1))
    with pytest.raises(VideoLDMError, match="strengths for 8 images, and a node of the graph samples 4 of them"):
        strengths_in_call(layers, torch.zeros(4, 4, 2, 3), CallClips(1, (0,), 1, 4), {})


def test_models_without_layers_and_whole_networks_are_refused(models, tmp_path):
    with pytest.raises(VideoLDMError, match="has no temporal layers, so there is nothing to weaken"):
        strengths(models["image"])
    network = network_model(tmp_path, "lavie_base", network_tensors("lavie_base", size=ONE_LEVEL))
    with pytest.raises(VideoLDMError, match="is a whole video network. .* no image model that a frame could stay"):
        strengths(network)


def test_what_a_call_is_told_does_not_make_two_records_differ():
    record = LayerSet(params=None)
    assert record == LayerSet(params=None, strengths=torch.ones(1, 1, 1)) and record != LayerSet(None, strength=0.5)
