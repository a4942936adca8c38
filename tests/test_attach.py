"""Temporal layers on a MODEL under ComfyUI's own sampling and memory management, in this process."""

import gc
import logging
import weakref

import comfy.model_management
import comfy.samplers
import pytest
import torch
from comfy.patcher_extension import WrappersMP

from video_ldm.nodes.host import attach, sampling
from video_ldm.nodes.host.options import layer_sets, with_clip_options
from video_ldm.nodes.load import AS_TRAINED
from video_ldm.temporal.errors import VideoLDMError
from video_ldm.tests import attach_help
from video_ldm.tests.attach_help import FirstPrediction, batches, noise_of, prediction, predictions, text, with_layers
from video_ldm.tests.host import checkpoints
from video_ldm.tests.host.checkpoints import FRAMES
from video_ldm.tests.small import relative_error

folder, state, image = attach_help.folder, attach_help.state, attach_help.image     # fixtures


# Clones

@pytest.mark.parametrize("file", ["video.safetensors", "motion.safetensors"])
def test_two_clones_of_one_model_with_different_strengths_run_in_turn_in_one_guider_without_interacting(
        image, folder, file):
    full, half = with_layers(image, file), with_layers(image, file, 0.5)
    plain, alone, weak = prediction(image), prediction(full), prediction(half)
    seen = predictions(full, others=[half, image])
    assert [torch.equal(*pair) for pair in zip(seen, (alone, weak, plain, alone))] == [True] * 4
    assert min(relative_error(alone, plain), relative_error(weak, plain), relative_error(alone, weak)) > 1e-3


def test_deleting_an_unused_clone_does_not_detach_the_layers_of_another(image, folder):
    live = with_layers(image, "video.safetensors")
    before = prediction(live)
    unused = [live.clone(), with_layers(image, "video.safetensors"), with_layers(live, "motion.safetensors")]
    ends = [weakref.ref(clone) for clone in unused]
    unused.clear()
    gc.collect()
    assert [end() for end in ends] == [None] * 3
    assert torch.equal(prediction(live), before)


def test_the_model_that_layers_are_loaded_onto_is_not_changed_and_nothing_is_complained_of(image, folder, caplog):
    options, keys = repr(image.model_options), set(image.model.state_dict())
    with caplog.at_level(logging.WARNING):
        video = with_layers(image, "video.safetensors", schedule=AS_TRAINED, frames_per_clip=FRAMES)
        prediction(video)
    assert caplog.text == ""
    assert repr(image.model_options) == options and not image.additional_models and not image.wrappers
    assert set(image.model.state_dict()) == keys == set(video.model_state_dict())


def test_models_that_use_one_file_share_its_weights_until_the_last_of_them_is_gone(image, folder, caplog):
    one, two = (with_layers(image, "video.safetensors", strength) for strength in (1.0, 0.5))
    stack = weakref.ref(one.get_nested_additional_models()[0].model)
    assert stack() is two.get_nested_additional_models()[0].model
    with caplog.at_level(logging.WARNING):
        prediction(one)
        del one
        gc.collect()
        prediction(two)
    assert "memory leak" not in caplog.text
    del two
    gc.collect()
    comfy.model_management.cleanup_models_gc()
    assert stack() is None


def test_strength_0_is_the_image_model_to_the_bit(image, folder):
    assert torch.equal(prediction(with_layers(image, "video.safetensors", 0.0)), prediction(image))


def test_two_chained_sets_both_act_in_either_order(image, folder):
    """Video LDM layers and AnimateDiff's sit at different places, so that their order is the network's."""
    first = with_layers(image, "video.safetensors", 0.5)
    both = with_layers(first, "motion.safetensors")
    swapped = with_layers(with_layers(image, "motion.safetensors"), "video.safetensors", 0.5)
    second = with_layers(image, "motion.safetensors")
    alone, other, chained = prediction(first), prediction(second), prediction(both)
    assert len(layer_sets(both)) == 2
    assert min(relative_error(chained, alone), relative_error(chained, other)) > 1e-4
    assert torch.equal(prediction(swapped), chained) and torch.equal(prediction(first), alone)


# Batches

def test_positive_and_negative_give_the_same_whether_they_share_a_call_or_not(image, folder, monkeypatch):
    model, sizes = batches(with_layers(image, "video.safetensors"))
    together = prediction(model, cfg=3.0)
    monkeypatch.setattr(model.model, "memory_required", lambda *args, **kwargs: float("inf"))
    apart = prediction(model, cfg=3.0)
    assert sizes == [2 * FRAMES] + [FRAMES] * 2
    assert relative_error(apart, together) < 1e-5     # other batch sizes take other paths through the matrix products


def test_conditionings_of_different_lengths_run_apart_and_each_gives_what_it_gives_alone(image, folder):
    model, sizes = batches(with_layers(image, "video.safetensors"))
    short, long = text(11), checkpoints.conditioning(12, tokens=5)
    both = prediction(model, positive=short, negative=long, cfg=2.0)
    assert sizes == [FRAMES] * 2
    alone = [prediction(model, positive=cond) for cond in (short, long)]
    assert relative_error(both, alone[1] + 2.0 * (alone[0] - alone[1])) < 1e-5


@pytest.mark.parametrize("file", ["video.safetensors", "motion.safetensors"])
def test_three_clips_in_a_batch_each_come_out_as_alone(image, folder, file):
    model = with_layers(image, file, frames_per_clip=FRAMES)
    noise = noise_of(clips=3)
    together = prediction(model, noise=noise)
    alone = torch.cat([prediction(model, noise=clip) for clip in noise.split(FRAMES)])
    assert relative_error(together, alone) < 1e-5
    one_clip = prediction(with_layers(image, file), noise=noise)      # of 12 frames
    assert relative_error(one_clip, together) > 1e-4


def test_a_batch_that_is_no_whole_number_of_clips_is_refused_and_leaves_nothing(image, folder):
    model = with_layers(image, "video.safetensors", frames_per_clip=3)
    with pytest.raises(VideoLDMError, match="batch of 4 frames does not divide into clips of 3 frames"):
        prediction(model)
    assert not any(module._forward_hooks for module in image.model.modules())


def test_conditioning_over_a_part_of_the_picture_runs_at_that_size(image, folder):
    model = with_layers(image, "video.safetensors")
    part = [[text()[0][0], {"area": (2, 2, 0, 0), "strength": 1.0}]]
    seen, noise = prediction(model, positive=part), noise_of()
    assert relative_error(seen[..., :2, :2], prediction(model, noise=noise[..., :2, :2])) < 1e-5
    assert relative_error(seen[..., :2, :2], prediction(model)[..., :2, :2]) > 1e-3


# Text of the temporal layers

def test_a_temporal_prompt_is_heard_by_the_temporal_layers_alone(image, folder):
    model = with_layers(image, "video.safetensors")
    same, other = (with_clip_options(model, FRAMES, {0: text(seed)[0][0]}) for seed in (11, 13))
    usual = prediction(model)
    assert torch.equal(prediction(same), usual)
    assert relative_error(prediction(other), usual) > 1e-4
    silent = with_layers(image, "video.safetensors", 0.0)
    silent = with_clip_options(silent, FRAMES, {0: text(13)[0][0]})
    assert torch.equal(prediction(silent), prediction(image))


def test_swapping_spatial_and_temporal_text_changes_the_video_and_one_text_for_both_is_the_usual_video(image, folder):
    """docs/papers.md#v17. A DreamBooth prompt goes to the spatial layers, the same without its token to the temporal
    ones."""
    model = with_layers(image, "video.safetensors")

    def video(spatial, temporal):
        heard = with_clip_options(model, FRAMES, {0: text(temporal)[0][0]})
        return prediction(heard, positive=text(spatial))
    own, other = 11, 13
    four = [video(spatial, temporal) for spatial in (own, other) for temporal in (own, other)]
    assert torch.equal(four[0], prediction(model, positive=text(own)))
    assert torch.equal(four[3], prediction(model, positive=text(other)))
    assert min(relative_error(a, b) for i, a in enumerate(four) for b in four[:i]) > 1e-4


def test_a_temporal_prompt_of_another_length_and_a_negative_without_one_share_a_call(image, folder):
    model = with_layers(image, "video.safetensors")
    long = checkpoints.conditioning(13, tokens=14)[0][0]
    both = prediction(with_clip_options(model, FRAMES, {0: long}), cfg=2.0)
    positive = prediction(with_clip_options(model, FRAMES, {0: long}))
    negative = prediction(model, positive=text(12))
    assert relative_error(both, negative + 2.0 * (positive - negative)) < 1e-5


# torch.compile

def test_a_compiled_model_is_refused_whether_it_was_compiled_before_or_after(image, folder):
    from comfy_api.torch_helpers import set_torch_compile_wrapper
    compiled = image.clone()
    set_torch_compile_wrapper(model=compiled, backend="eager")
    with pytest.raises(VideoLDMError, match="compiled by TorchCompileModel"):
        with_layers(compiled, "video.safetensors")
    video = with_layers(image, "video.safetensors").clone()
    set_torch_compile_wrapper(model=video, backend="eager")
    with pytest.raises(VideoLDMError, match="compiled by TorchCompileModel"):
        prediction(video)


# EasyCache

def test_easy_cache_skips_steps_whole_on_either_side_of_load_temporal_layers(image, folder):
    from comfy_extras.nodes_easycache import EasyCacheNode

    def cached(model):
        return EasyCacheNode.execute(model, 3.0, 0.0, 1.0, False).result[0]

    def sampled(model):
        latent = {"samples": torch.zeros_like(noise_of())}
        return sampling.ksample(model, 3, 6, 2.0, "euler", "normal", text(), text(12), latent, 1.0)
    before, sizes = batches(with_layers(cached(image), "video.safetensors"))
    after = cached(with_layers(with_layers(image, "video.safetensors", 0.5), "motion.safetensors"))
    frames = sampled(before)
    assert 0 < len(sizes) < 6 and frames.isfinite().all()
    assert torch.equal(sampled(cached(with_layers(image, "video.safetensors"))), frames)
    assert relative_error(sampled(with_layers(image, "video.safetensors")), frames) > 1e-3
    inside = with_layers(with_layers(cached(image), "video.safetensors", 0.5), "motion.safetensors")
    assert torch.equal(sampled(after), sampled(inside))


def test_a_network_that_runs_without_its_layers_is_noticed(image, folder):
    model = with_layers(image, "video.safetensors")
    model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "bare", unhooked)
    with pytest.raises(VideoLDMError, match="temporal layers were not reached"):
        prediction(model)


def unhooked(executor, *args, **kwargs):
    """The network, every hook on it silenced."""
    parts = [part for part in executor.class_obj.modules() if part._forward_hooks]
    kept = [part._forward_hooks.copy() for part in parts]
    for part in parts:
        part._forward_hooks.clear()
    try:
        return executor(*args, **kwargs)
    finally:
        for part, hooks in zip(parts, kept):
            part._forward_hooks.update(hooks)


@pytest.mark.parametrize("name", ["positive", "negative"])
def test_core_samplers_refuse_a_text_of_another_models_encoder_with_both_widths(image, folder, name):
    other = checkpoints.conditioning(1, width=1024)
    with pytest.raises(VideoLDMError, match=f"text of {name} has a width of 1024, .*Stable Diffusion 1.x. takes 768"):
        prediction(with_layers(image, "video.safetensors"), **{name: other})


# Memory

def test_core_is_told_that_a_clip_with_temporal_layers_takes_more_memory_once_however_many_sets_there_are(
        image, folder):
    def estimate(model):
        asked = []
        guider = FirstPrediction(model)
        guider.set_conds(text(), text(12))
        guider.set_cfg(1.0)
        original = model.model.memory_required
        model.model.memory_required = lambda shape, **kwargs: asked.append(shape[0]) or original(shape, **kwargs)
        try:
            guider.sample(noise_of(), torch.zeros_like(noise_of()), comfy.samplers.ksampler("euler"),
                          torch.tensor([1.0, 0.0]), disable_pbar=True, seed=0)
        finally:
            del model.model.memory_required
        return max(asked)
    once = with_layers(image, "video.safetensors")
    assert estimate(image) == 2 * FRAMES
    assert estimate(once) == estimate(with_layers(once, "motion.safetensors")) == 2 * FRAMES * attach.ACTIVATIONS


def test_a_warning_for_more_frames_than_positions_comes_once(image, folder, caplog):
    model = with_layers(image, "motion.safetensors")
    with caplog.at_level(logging.WARNING):
        predictions(model, noise=noise_of(frames=33))
    assert caplog.text.count("33 frames exceed the 32 positions") == 1


