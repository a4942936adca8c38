"""Conditioning with an item for each frame, in every node that samples a video in several calls."""

from dataclasses import replace

import comfy.conds
import pytest
import torch
from comfy.patcher_extension import WrappersMP

from video_ldm.nodes.host import frame_conditioning
from video_ldm.nodes.host.frame_conditioning import CallFrames, conditioning_of, frames_of_clip
from video_ldm.nodes.host.options import layer_sets_in, transformer_options
from video_ldm.nodes.sample import VideoLDMSampler
from video_ldm.tests import windows_help
from video_ldm.tests.attach_help import models_with_layers
from video_ldm.tests.longer_help import frames_of, run_extend, run_interpolate, write_known_frame_layers
from video_ldm.tests.windows_help import steered, text, windowed

controlnets = windows_help.controlnets      # fixture
LENGTH = 9              # of the video that is extended: clips of 4 at frames 0, 2, 4 and 6, the last one frame too long
CLIPS = [[0, 1, 2, 3], [2, 3, 4, 5], [4, 5, 6, 7], [6, 7, 8, 8]]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """MODELs by name. Strength 0: every frame is an image of its own, so that it shows its own conditioning alone."""
    yield from models_with_layers(tmp_path_factory, write_known_frame_layers)


def heard(model):
    """A clone that notes the texts of every call of its network, one number for each image, and the notes."""
    m, calls = model.clone(), []

    def note(executor, x, timesteps, context, *args, **kwargs):
        calls.append([round(number) for number in context[:, 0, 0].expand(len(x)).tolist()])
        return executor(x, timesteps, context, *args, **kwargs)
    m.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "test", note)
    return m, calls


def numbered(count):
    """A CONDITIONING of `count` texts, each full of its own number."""
    return [[torch.arange(float(count))[:, None, None].expand(count, 77, 768).clone(), {}]]


def pictures(count, seed=3):
    return torch.rand(count, 3, 16, 24, generator=torch.Generator().manual_seed(seed))


def extend(model, positive, negative=None, length=LENGTH, **changes):
    given = {"positive": positive, "negative": negative or text(12), "length": length}
    return run_extend(model, **{**given, **changes})[0]["samples"]


def interpolate(model, positive, keys=3, times=1, clips=1, windows=1, **changes):
    given = {"positive": positive, "times": times, "windows": windows}
    return run_interpolate(model, frames_of(clips * keys), clip_frames=keys, **{**given, **changes})[0]["samples"]


def silent(model):
    """The same MODEL with its layers at strength 0."""
    m = model.clone()
    options = transformer_options(m)
    options.update({key: replace(layers, strength=0.0) for key, layers in layer_sets_in(options).items()})
    return m


def changed(before, after):
    return [n for n, (one, other) in enumerate(zip(before, after, strict=True)) if not torch.equal(one, other)]


# Extend Video

def test_each_clip_of_extend_video_hears_the_texts_of_its_own_frames(models):
    model, calls = heard(models["prediction"])
    extend(model, numbered(LENGTH))
    assert calls == CLIPS


def test_fewer_texts_than_frames_are_repeated_over_the_video_and_a_single_text_is_for_all_frames(models):
    for count, expected in ((3, [[n % 3 for n in clip] for clip in CLIPS]), (1, [[0] * 4] * 4)):
        model, calls = heard(models["prediction"])
        extend(model, numbered(count))
        assert calls == expected


def test_a_text_of_one_frame_changes_that_frame_of_an_extended_video_alone(models):
    model, texts = silent(models["prediction"]), text(frames=LENGTH)
    before = extend(model, texts)
    for frame in (0, 3, 8):
        other = [[texts[0][0].clone(), {}]]
        other[0][0][frame] += 1
        assert changed(before, extend(model, other)) == [frame]


def test_a_controlnet_picture_of_one_frame_changes_that_frame_alone(models, controlnets):
    model = silent(models["prediction"])

    def made(hints):
        positive, negative = steered(controlnets, [hints], 11, 12)
        return extend(model, positive, negative, cfg=2.0)
    before = made(pictures(LENGTH))
    for frame in (1, 5, 8):
        hints = pictures(LENGTH)
        hints[frame] = 1 - hints[frame]
        assert changed(before, made(hints)) == [frame]


def test_every_controlnet_picture_of_a_long_video_reaches_the_frames_that_see_it(models, controlnets):
    """As it was measured: of 20 pictures with clips of 8, numbers 8 to 19 changed no frame."""
    model = silent(models["prediction"])

    def made(hints):
        positive, = steered(controlnets, [hints], 11)
        return extend(model, positive, length=20, frames=8)
    hints = pictures(20)
    before = made(hints)
    hints[8:] = 1 - hints[8:]
    assert changed(before, made(hints)) == list(range(8, 20))


def test_positive_and_negative_still_share_a_controlnet_and_a_call(models, controlnets):
    model, calls = heard(models["prediction"])
    positive, negative = steered(controlnets, [pictures(LENGTH), pictures(LENGTH, 4)], 11, 12)
    extend(model, positive, negative, cfg=2.0)
    assert [len(call) for call in calls] == [8] * 4
    control = positive[0][1]["control"]
    assert torch.equal(control.cond_hint_original, pictures(LENGTH, 4)) and control.cond_hint is None


def test_the_temporal_prompt_of_each_frame_goes_with_its_clip(models, monkeypatch):
    given, real = [], frame_conditioning.with_clip_options

    def note(model, frames, texts, fps):
        given.append(texts[0][:, 0, 0].tolist())
        return real(model, frames, texts, fps)
    monkeypatch.setattr(frame_conditioning, "with_clip_options", note)
    extend(models["prediction"], text(), temporal_prompt=numbered(LENGTH))
    assert given == CLIPS


def test_a_temporal_prompt_for_each_frame_serves_every_clip_of_a_batch(models):
    widgets = (4, 24, 16, 2, 7, 1, 1.0, "euler", "normal", 1.0)
    four = text(13, frames=4)
    once, twice = (VideoLDMSampler.execute(models["prediction"], text(), text(12), *widgets, temporal_prompt=prompt)
                   .result[0]["samples"] for prompt in (four, [[four[0][0].repeat(2, 1, 1), {}]]))
    assert torch.equal(once, twice)


def test_other_packs_are_told_the_frames_of_each_call_as_animatediff_evolved_tells_them(models):
    for run, kind, total, expected in (
            (extend, "prediction", LENGTH, CLIPS),
            (interpolate, "between", 9, [[0, 1, 2, 3, 4], [4, 5, 6, 7, 8]])):
        model, told = models[kind].clone(), []

        def note(executor, x, timesteps, context, y, control, transformer_options, *, told=told, **kwargs):
            told.append(transformer_options["ad_params"])
            return executor(x, timesteps, context, y, control, transformer_options, **kwargs)
        model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "test", note)
        run(model, text())
        assert told == [{"full_length": total, "context_length": len(call), "sub_idxs": call} for call in expected]
        assert "ad_params" not in models[kind].model_options["transformer_options"]


# Several clips, and windows, in one call

def test_every_clip_of_a_batch_hears_the_texts_of_its_frames(models):
    model, calls = heard(models["prediction"])
    widgets = (4, 24, 16, 2, 7, 1, 1.0, "euler", "normal", 1.0)
    VideoLDMSampler.execute(model, numbered(4), text(12), *widgets)
    VideoLDMSampler.execute(model, numbered(8), text(12), *widgets)
    assert calls == [[0, 1, 2, 3] * 2, list(range(8))]


def test_windows_within_the_clips_of_extend_video_hear_the_texts_of_their_frames(models):
    model, calls = heard(windowed(models["prediction"], length=4, overlap=2))
    extend(model, numbered(10), length=10, frames=6)
    assert calls == [[0, 1, 2, 3], [2, 3, 4, 5], [4, 5, 6, 7], [6, 7, 8, 9]]


# Latent Interpolate x4

def test_interpolation_hears_one_text_for_each_frame_that_comes_out(models):
    for windows, expected in ((1, [[0, 1, 2, 3, 4], [4, 5, 6, 7, 8]]), (0, [[0, 1, 2, 3, 4, 4, 5, 6, 7, 8]])):
        model, calls = heard(models["between"])
        interpolate(model, numbered(9), windows=windows)
        assert calls == expected


def test_interpolation_hears_one_text_for_each_key_frame(models):
    model, calls = heard(models["between"])
    interpolate(model, numbered(3))
    assert calls == [[0, 0, 0, 0, 1], [1, 1, 1, 1, 2]]


def test_interpolation_repeats_any_other_number_of_texts(models):
    model, calls = heard(models["between"])
    interpolate(model, numbered(2))
    assert calls == [[0, 1, 0, 1, 0], [0, 1, 0, 1, 0]]


def test_the_first_of_two_turns_hears_every_fourth_of_the_texts_of_all_frames(models):
    model, calls = heard(models["between"])
    interpolate(model, numbered(17), keys=2, times=2)
    assert calls == [[0, 4, 8, 12, 16], [0, 1, 2, 3, 4], [4, 5, 6, 7, 8], [8, 9, 10, 11, 12], [12, 13, 14, 15, 16]]
    model, calls = heard(models["between"])
    interpolate(model, numbered(2), keys=2, times=2)
    assert calls == [[0, 0, 0, 0, 1], [0] * 5, [0] * 5, [0] * 5, [0, 0, 0, 0, 1]]


def test_texts_for_all_clips_or_for_one_go_with_each_clip_that_is_interpolated(models):
    first, second = [0, 1, 2, 3, 4], [5, 6, 7, 8, 9]
    for count, expected in ((10, [first, second]), (5, [first, first]), (4, [[0, 0, 0, 0, 1], [2, 2, 2, 2, 3]]),
                            (2, [[0, 0, 0, 0, 1]] * 2)):
        model, calls = heard(models["between"])
        interpolate(model, numbered(count), keys=2, clips=2)
        assert calls == expected


def test_a_text_changes_the_interpolated_frame_it_belongs_to_alone(models):
    """As it was measured: of 29 texts, zeroing numbers 20 to 28 changed frames 17 to 19 and 21 to 23."""
    model, texts = silent(models["between"]), text(frames=29)
    before = interpolate(model, texts, keys=8, windows=0)
    other = [[texts[0][0].clone(), {}]]
    other[0][0][20:] = 0
    assert changed(before, interpolate(model, other, keys=8, windows=0)) == [21, 22, 23, 25, 26, 27]


def test_the_temporal_prompt_goes_with_the_interpolated_frames(models):
    prompts = text(13, frames=9)
    before = interpolate(models["between"], text(), temporal_prompt=prompts)
    other = [[prompts[0][0].clone(), {}]]
    other[0][0][4] += 1                     # the layers hear the first frame of a window
    assert changed(before, interpolate(models["between"], text(), temporal_prompt=other)) == [5, 6, 7]


# Everything that a CONDITIONING may say for each frame

def test_all_that_core_reads_for_each_image_is_cut_and_the_rest_stays():
    four = torch.arange(4.0)
    one_mask = torch.rand(4, 6)
    options = {"pooled_output": four[:, None], "mask": four[:, None, None],
               "concat_latent_image": four[:, None, None, None],
               "cross_attn_controlnet": four[:, None, None], "strength": 0.5, "area": (2, 2, 0, 0), "hooks": None,
               "model_conds": {"c_concat": comfy.conds.CONDNoiseShape(four), "all": comfy.conds.CONDConstant(3)},
               "another_pack": four, "three_things": torch.arange(3.0)}
    (cut_text, cut), = conditioning_of([[four[:, None, None], options]], frames_of_clip(2, 3, 4), {})
    expected = [2.0, 3.0, 3.0]              # beyond the end the last item stays
    assert cut_text.flatten().tolist() == expected
    for name in ("pooled_output", "mask", "concat_latent_image", "cross_attn_controlnet", "another_pack"):
        assert cut[name].flatten().tolist() == expected and cut[name].ndim == options[name].ndim
    assert cut["model_conds"]["c_concat"].cond.tolist() == expected
    assert cut["model_conds"]["all"] is options["model_conds"]["all"]
    assert cut["three_things"] is options["three_things"] and cut["area"] == (2, 2, 0, 0) and cut["strength"] == 0.5
    (_, flat), = conditioning_of([[None, {"mask": one_mask}]], frames_of_clip(2, 3, 4), {})
    assert flat["mask"] is one_mask         # one mask for all, by its two dimensions
    assert options["mask"].shape == (4, 1, 1)


def test_masks_that_go_with_controlnet_pictures_follow_the_key_frames_too(controlnets):
    (cond,), = steered(controlnets, [pictures(3)], 11)
    cond[1]["control"].extra_concat_orig = [torch.arange(3.0)[:, None, None, None]]
    (_, cut), = conditioning_of([cond], CallFrames((3, 4, 8), 9, 9, 4), {})
    assert torch.equal(cut["control"].cond_hint_original, pictures(3)[[0, 1, 2]])
    assert cut["control"].extra_concat_orig[0].flatten().tolist() == [0, 1, 2]
