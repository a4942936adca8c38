"""Frame Windows under ComfyUI's own sampling, in this process."""

import comfy.conds
import comfy.model_management
import pytest
import torch

from video_ldm.nodes.host import attach, sampling
from video_ldm.nodes.host.options import with_clip_options
from video_ldm.nodes.host.windows import ClipWindow, windowed_value
from video_ldm.nodes.load import AS_MODEL, LoadTemporalLayers
from video_ldm.nodes.sample import VideoLDMSampler
from video_ldm.temporal.errors import VideoLDMError
from video_ldm.tests import windows_help
from video_ldm.tests.small import relative_error
from video_ldm.tests.windows_help import (
    BOTH,
    LENGTH,
    LONG,
    by_hand,
    noise_of,
    notes,
    pictures,
    prediction,
    predictions,
    steered,
    text,
    windowed,
)

models, controlnets = windows_help.models, windows_help.controlnets     # fixtures


# Windows of one clip

@BOTH
@pytest.mark.parametrize("frames", [3, LENGTH])
def test_a_clip_of_one_window_is_the_clip_without_windows_to_the_bit(models, file, frames):
    assert torch.equal(prediction(windowed(models[file]), noise_of(frames)), prediction(models[file], noise_of(frames)))


def test_joining_a_single_window_changes_nothing_to_the_bit(models, monkeypatch):
    model = windowed(models["video"])
    monkeypatch.setattr(model.model_options["context_handler"], "divides", lambda frames: True)
    model, windows = notes(model, lambda x, options: options.get("context_window"))
    plain = prediction(models["video"], noise_of(LENGTH), cfg=2.0)
    assert torch.equal(prediction(model, noise_of(LENGTH), cfg=2.0), plain) and None not in windows


@BOTH
def test_every_window_is_a_clip_of_its_own_whose_positions_begin_at_0(models, file):
    seen = prediction(windowed(models[file]), cfg=2.0)
    assert relative_error(seen, by_hand(lambda noise, _: prediction(models[file], noise, cfg=2.0))) < 1e-5
    assert relative_error(seen, prediction(models[file], cfg=2.0)) > 1e-3
    assert torch.equal(seen[:2], prediction(models[file], noise_of()[:4], cfg=2.0)[:2])     # frames of one window alone


def test_a_vector_over_time_mixes_every_window_as_it_was_trained(models):
    seen = prediction(windowed(models["vector"]))
    assert relative_error(seen, by_hand(lambda noise, _: prediction(models["vector"], noise))) < 1e-5
    with pytest.raises(VideoLDMError, match="clips of exactly 4 frames, and the clip has 6"):
        prediction(models["vector"])


def test_length_0_means_the_length_of_the_shortest_clips_the_layers_were_trained_on(models):
    both = LoadTemporalLayers.execute(models["motion"], "video.safetensors", 1.0, AS_MODEL).result[0]
    assert torch.equal(prediction(windowed(models["video"], length=0)), prediction(windowed(models["video"])))
    assert [windowed(model, length=0).model_options["context_handler"].context_length
            for model in (models["motion"], both)] == [16, 4]


def test_shifting_windows_move_from_step_to_step_and_stay_for_the_steps_in_between(models):
    model, seen = notes(windowed(models["video"], schedule="shifting",
                                 overlap=1), lambda x, options: options["context_window"].index_list[0])
    sigmas = (8.0, 4.0, 2.0, 0.0)
    predictions(model, noise_of(10), sigmas=sigmas)
    assert seen == [0, 3, 6] + [0, 1, 4, 6] + [0, 3, 6]
    handler = model.model_options["context_handler"]
    for sigma, step in ((8.0, 0), (5.0, 0), (4.0, 1), (3.9999, 1), (2.1, 1), (2.0, 2), (0.5, 2), (9.0, 0)):
        handler.set_step(torch.tensor([sigma] * 3), {"transformer_options": {"sample_sigmas": torch.tensor(sigmas)}})
        assert handler._step == step, sigma


def test_looped_windows_run_from_the_last_frame_to_the_first(models):
    whole = windowed(models["video"], schedule="looped")
    model, seen = notes(whole, lambda x, options: options["context_window"].index_list)
    prediction(model)
    assert seen == [[0, 1, 2, 3], [2, 3, 4, 5], [4, 5, 0, 1]]
    turned = torch.roll(noise_of(), 2, 0)       # in a loop no frame is the first
    assert relative_error(prediction(whole, turned), torch.roll(prediction(whole), 2, 0)) < 1e-5


# Clips of a batch

@BOTH
def test_each_clip_of_a_batch_has_windows_along_its_own_frames(models, file):
    model = with_clip_options(windowed(models[file]), LONG)
    noise = noise_of(2 * LONG)
    together = prediction(model, noise)
    for clip, own in zip(noise.split(LONG), together.split(LONG)):
        assert relative_error(own, prediction(windowed(models[file]), clip)) < 1e-5
    noise[LONG:] = noise_of(LONG, seed=5)
    assert torch.equal(prediction(model, noise)[:LONG], together[:LONG])


def test_a_batch_that_is_no_whole_number_of_clips_is_refused_in_windows_too(models):
    with pytest.raises(VideoLDMError, match="batch of 8 frames does not divide into clips of 6"):
        prediction(with_clip_options(windowed(models["video"]), LONG), noise_of(8))


# What goes with the frames

@BOTH
def test_the_text_of_each_frame_follows_the_window(models, file):
    positive, negative = text(frames=LONG), text(12)
    seen = prediction(windowed(models[file]), positive=positive, negative=negative, cfg=2.0)
    reference = by_hand(lambda noise, places: prediction(models[file], noise, positive=[[positive[0][0][places], {}]],
                                                         negative=negative, cfg=2.0))
    assert relative_error(seen, reference) < 1e-5
    assert relative_error(seen, prediction(windowed(models[file]), positive=text(), negative=negative, cfg=2.0)) > 1e-3


def test_texts_of_one_clip_are_those_of_every_clip(models):
    model = with_clip_options(windowed(models["video"]), LONG)
    twice = [[text(frames=LONG)[0][0].repeat(2, 1, 1), {}]]
    once = prediction(model, noise_of(2 * LONG), positive=text(frames=LONG))
    assert torch.equal(once, prediction(model, noise_of(2 * LONG), positive=twice))


def test_a_temporal_prompt_follows_the_window_too(models):
    prompt = text(13, frames=LONG)[0][0]
    seen = prediction(with_clip_options(windowed(models["video"]), LONG, {0: prompt}))


    def alone(noise, places):
        return prediction(with_clip_options(models["video"], LENGTH, {0: prompt[places]}), noise)
    assert relative_error(seen, by_hand(alone)) < 1e-5
    one = with_clip_options(windowed(models["video"]), LONG, {0: prompt[:1]})
    assert relative_error(seen, prediction(one)) > 1e-4


@pytest.mark.parametrize("count", [1, 2])
def test_the_pictures_of_controlnets_follow_the_window(models, controlnets, count):
    hints = [pictures(seed=3), pictures(seed=4)][:count]

    def predict(model, noise, places=slice(None)):
        positive, negative = steered(controlnets, [hint[places] for hint in hints], 11, 12)
        return prediction(model, noise, positive=positive, negative=negative, cfg=2.0)
    model, sizes = notes(windowed(models["video"]), lambda x, options: len(x))
    seen = predict(model, noise_of())
    assert sizes == [2 * LENGTH] * 2        # both conditions share a call as they do without windows
    assert relative_error(seen, by_hand(lambda noise, places: predict(models["video"], noise, places))) < 1e-5
    hints[0][LENGTH:] = hints[0][:LONG - LENGTH]
    assert relative_error(seen[LENGTH:], predict(windowed(models["video"]), noise_of())[LENGTH:]) > 1e-4


def test_one_picture_and_one_for_each_frame_of_every_clip_go_with_the_window(models, controlnets):
    model = with_clip_options(windowed(models["video"]), LONG)

    def predict(hint):
        return prediction(model, noise_of(2 * LONG), positive=steered(controlnets, [hint], 11)[0])
    one, many = pictures(1), pictures()
    assert relative_error(predict(one), predict(one.expand(2 * LONG, -1, -1, -1))) < 1e-5      # a batch of other size
    assert torch.equal(predict(many), predict(many.repeat(2, 1, 1, 1)))


def test_the_controlnet_of_a_conditioning_is_not_changed(models, controlnets):
    positive, = steered(controlnets, [pictures()], 11)
    control = positive[0][1]["control"]
    prediction(windowed(models["video"]), positive=positive)
    assert torch.equal(control.cond_hint_original, pictures()) and control.cond_hint is None


def test_masks_and_areas_of_conditioning_follow_the_window(models):
    masks = (torch.rand(LONG, 2, 3, generator=torch.Generator().manual_seed(1)) > 0.5).float()
    area = {"area": (2, 2, 0, 0), "strength": 0.5}

    def conds(places=slice(None)):
        return text(11) + [[text(14)[0][0], {"mask": masks[places], "mask_strength": 1.0}], [text(15)[0][0], area]]
    seen = prediction(windowed(models["video"]), positive=conds())
    reference = by_hand(lambda noise, places: prediction(models["video"], noise, positive=conds(places)))
    assert relative_error(seen, reference) < 1e-5
    assert relative_error(seen, prediction(windowed(models["video"]), positive=conds(slice(0, 1)))) > 1e-4


def test_conditioning_of_every_kind_is_spread_over_the_batch_and_then_taken_for_the_window():
    window = ClipWindow([1, 2], 3, 6)       # of two clips of three frames
    assert window.index_list == [1, 2, 4, 5]
    six, three, one = torch.arange(6.0), torch.arange(3.0), torch.ones(1)
    for full, expected in ((six, [1, 2, 4, 5]), (three, [1, 2, 1, 2]), (one, [1])):
        for value in (comfy.conds.CONDRegular(full), comfy.conds.CONDNoiseShape(full), comfy.conds.CONDCrossAttn(full)):
            part = windowed_value(value, window)
            assert type(part) is type(value) and part.cond.tolist() == expected
    parts = windowed_value(comfy.conds.CONDList([six, one]), window).cond
    assert [part.tolist() for part in parts] == [[1, 2, 4, 5], [1]]
    constant = comfy.conds.CONDConstant(7)
    assert windowed_value(constant, window) is constant


def test_a_noise_mask_keeps_its_frames_whatever_the_windows(models):
    latent = noise_of(seed=9)
    mask = torch.ones(LONG, 1, 2, 3)
    mask[[0, 5]] = 0
    sample = sampling.ksample(windowed(models["video"]), 7, 2, 1.0, "euler", "normal", text(), text(12),
                              {"samples": latent, "noise_mask": mask}, 1.0)
    # Not to the bit: core scales latents on their way in, and back.
    assert relative_error(sample[[0, 5]], latent[[0, 5]]) < 1e-6 and relative_error(sample[1:5], latent[1:5]) > 0.1


# Sampling

def sampled(model, frames=LONG, clips=1):
    result = VideoLDMSampler.execute(model, text(), text(12), frames=frames, width=24, height=16, clips=clips, seed=5,
                                     steps=2, cfg=2.0, sampler="euler", scheduler="normal", denoise=1.0).result
    return result[0]["samples"]


def test_the_video_ldm_sampler_takes_more_frames_than_a_window_as_core_samplers_do(models):
    model = windowed(models["video"])
    core = sampling.ksample(model, 5, 2, 2.0, "euler", "normal", text(), text(12),
                            {"samples": torch.zeros(LONG, 4, 2, 3)}, 1.0)
    assert torch.equal(sampled(model), core) and relative_error(core, sampled(models["video"])) > 1e-3
    assert sampled(model, clips=2).shape == (2 * LONG, 4, 2, 3)


def test_cancelling_acts_between_windows(models):
    def cancel(x, options):
        comfy.model_management.interrupt_current_processing(True)
    model, calls = notes(windowed(models["video"]), cancel)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        prediction(model)
    assert len(calls) == 1


def test_core_is_told_the_memory_of_a_window_of_every_clip(models, monkeypatch):
    def estimate(model, frames, clips):
        asked = []
        original = model.model.memory_required
        monkeypatch.setattr(model.model, "memory_required",
                            lambda shape, **more: asked.append(shape[0]) or original(shape, **more))
        prediction(with_clip_options(model, frames), noise_of(frames * clips))
        monkeypatch.undo()
        return max(asked)
    video = models["video"]
    assert estimate(windowed(video), LONG, 2) == estimate(video, LENGTH, 2) == 2 * 2 * LENGTH * attach.ACTIVATIONS
    assert estimate(windowed(video), 3, 2) == estimate(video, 3, 2)


def test_the_model_it_is_put_on_is_not_changed_and_two_settings_do_not_interact(models):
    before, options = prediction(models["video"]), repr(models["video"].model_options)
    pyramid, flat = windowed(models["video"]), windowed(models["video"], fuse="flat")
    seen = prediction(pyramid), prediction(flat)
    assert torch.equal(prediction(pyramid), seen[0]) and torch.equal(prediction(models["video"]), before)
    assert relative_error(*seen) > 1e-4 and repr(models["video"].model_options) == options
    assert torch.equal(prediction(windowed(flat)), seen[0])     # the last of two nodes counts
