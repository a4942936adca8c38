"""The texts of Prompt Travel in every node that samples: each frame hears its own, and other numbers are refused."""

from types import SimpleNamespace

import pytest
import torch
from comfy.patcher_extension import WrappersMP

from video_ldm.nodes.host.frame_conditioning import conditioning_of, frames_of_clip
from video_ldm.nodes.host.made_for import MADE_FOR, checked_for_video
from video_ldm.nodes.host.options import with_clip_options
from video_ldm.nodes.host.prompt_encoding import encode_texts
from video_ldm.nodes.host.sampling import SamplerSettings, sample
from video_ldm.nodes.host.windows import FrameWindows, with_windows
from video_ldm.nodes.sample import VideoLDMSampler
from video_ldm.temporal.errors import VideoLDMError
from video_ldm.temporal.prompt_travel import HOLD, LINEAR, KeyFrame, texts_of_frames
from video_ldm.tests.attach_help import load_model, models_with_layers
from video_ldm.tests.host import checkpoints
from video_ldm.tests.longer_help import write_known_frame_layers
from video_ldm.tests.test_frame_conditioning import CLIPS, LENGTH, extend, heard, interpolate
from video_ldm.tests.windows_help import text, windowed

REFUSED = r"Prompt Travel made a text for each of {made} frames, and {what} has {has} frames{more}\. Set frames of "


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    yield from models_with_layers(tmp_path_factory, write_known_frame_layers)


@pytest.fixture(scope="module")
def sdxl():
    return load_model(checkpoints.sdxl_state())


def numbers_clip(width=768, pooled=0):
    """A CLIP that reads a number, and gives tokens and pooled text full of it. A second word makes it longer."""
    def encode(words):
        number = torch.full((1, 77 * len(words), width), float(words[0]))
        return [[number, {"pooled_output": torch.full((1, pooled), float(words[0])) if pooled else None}]]
    return SimpleNamespace(tokenize=str.split, encode_from_tokens_scheduled=encode)


def travel(frames, start=0, clip=None):
    """Prompt Travel from the number of the first frame to that of the last: frame n has text full of start + n."""
    keys = [KeyFrame(0, str(start)), KeyFrame(max(frames - 1, 1), str(start + max(frames - 1, 1)))]
    return encode_texts(clip or numbers_clip(), texts_of_frames(keys, frames, LINEAR))


def ours(model, positive, negative=None, frames=4, clips=1, cfg=1.0, **optional):
    return VideoLDMSampler.execute(model, positive, negative or text(12), frames, 24, 16, clips, 7, 1, cfg, "euler",
                                   "normal", 1.0, **optional).result[0]["samples"]


def core(model, positive, negative=None, images=4, cfg=1.0):
    settings = SamplerSettings(1, cfg, "euler", "normal", positive, negative or text(12))
    return sample(model, 7, settings, torch.zeros(images, 4, 2, 3))


def refusal(made, has, what="a clip", more=""):
    return pytest.raises(VideoLDMError, match=REFUSED.format(made=made, has=has, what=what, more=more))


# Each frame hears its own text

def test_each_frame_of_each_clip_hears_its_own_text_in_both_samplers(models):
    model, calls = heard(models["prediction"])
    ours(model, travel(4))
    ours(model, travel(4), clips=2)
    core(model, travel(8), images=8)
    core(with_clip_options(model, 4), travel(4), images=8)
    assert calls == [[0, 1, 2, 3], [0, 1, 2, 3] * 2, list(range(8)), [0, 1, 2, 3] * 2]


def test_both_clips_of_a_batch_of_eight_frames_travel(models):
    """The layers take clips of 4; two clips of 8 run in windows, and each window holds the same frames of both."""
    model, calls = heard(windowed(models["prediction"], length=4, overlap=0))
    ours(model, travel(8), frames=8, clips=2)
    assert calls == [[0, 1, 2, 3] * 2, [4, 5, 6, 7] * 2]


def test_each_window_hears_the_texts_of_its_own_frames(models):
    model, calls = heard(windowed(models["prediction"], length=4, overlap=2))
    ours(model, travel(8), frames=8)
    core(model, travel(8), images=8)
    assert calls == [[0, 1, 2, 3], [2, 3, 4, 5], [4, 5, 6, 7]] * 2


def test_each_clip_of_extend_video_hears_the_texts_of_its_own_frames(models):
    model, calls = heard(models["prediction"])
    extend(model, travel(LENGTH), temporal_prompt=travel(LENGTH))
    assert calls == CLIPS


def test_windows_within_the_clips_of_extend_video_hear_theirs(models):
    model, calls = heard(windowed(models["prediction"], length=4, overlap=2))
    extend(model, travel(10), length=10, frames=6)
    assert calls == [[0, 1, 2, 3], [2, 3, 4, 5], [4, 5, 6, 7], [6, 7, 8, 9]]


def test_interpolation_hears_the_texts_of_the_frames_that_come_out_or_of_the_key_frames(models):
    for frames, expected in ((9, [[0, 1, 2, 3, 4], [4, 5, 6, 7, 8]]), (3, [[0, 0, 0, 0, 1], [1, 1, 1, 1, 2]])):
        model, calls = heard(models["between"])
        interpolate(model, travel(frames))
        assert calls == expected
    for frames, expected in ((5, [0, 1, 2, 3, 4]), (2, [0, 0, 0, 0, 1])):       # each of two clips travels
        model, calls = heard(models["between"])
        interpolate(model, travel(frames), keys=2, clips=2)
        assert calls == [expected] * 2


def test_a_second_interpolation_hears_the_texts_of_all_frames(models):
    model, calls = heard(models["between"])
    interpolate(model, travel(17), keys=2, times=2)
    assert calls[0] == [0, 4, 8, 12, 16] and calls[1:] == [list(range(n, n + 5)) for n in (0, 4, 8, 12)]


# Positive and negative in one call

def in_one_call(model, positive, negative, **changes):
    """(the frames, the one call's texts) of a sampling with both sides in one call."""
    m, seen = model.clone(), []

    def note(executor, x, timesteps, context, *args, **kwargs):
        seen.append(context)
        return executor(x, timesteps, context, *args, **kwargs)
    m.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "test", note)
    made = ours(m, positive, negative, cfg=2.0, **changes)
    assert len(seen) == 1
    return made, seen[0]


@pytest.mark.parametrize("long, other", [("5 5", "6"), ("5", "6 6"), ("5 5", "6 6 6")])
def test_texts_of_different_lengths_for_positive_and_negative_share_a_call(models, long, other):
    """Core repeats the shorter text of a call. Core puts the last condition first, so the negative is in front."""
    clip = numbers_clip()
    keys = [KeyFrame(0, long), KeyFrame(3, "9")]
    positive = encode_texts(clip, texts_of_frames(keys, 4, HOLD))
    negative = clip.encode_from_tokens_scheduled(other.split())
    _, texts = in_one_call(models["prediction"], positive, negative)
    assert texts.shape[0] == 8 and texts.shape[1] % (77 * len(other.split())) == 0
    assert texts[:, :, 0].eq(texts[:, :1, 0]).all()
    assert sorted(texts[:, 0, 0].tolist()) == [5, 5, 5, 6, 6, 6, 6, 9]


def test_a_negative_of_many_texts_goes_with_its_frames_beside_a_single_positive(models):
    single = numbers_clip().encode_from_tokens_scheduled(["50"])
    _, texts = in_one_call(models["prediction"], single, travel(4, 10))
    assert sorted(texts[:, 0, 0].tolist()) == [10, 11, 12, 13, 50, 50, 50, 50]
    _, texts = in_one_call(models["prediction"], travel(4, 20), travel(4, 10))
    assert sorted(texts[:, 0, 0].tolist()) == [10, 11, 12, 13, 20, 21, 22, 23]


# SDXL

def pooled_of_calls(model):
    """A clone that notes the pooled text and the token text of every image of every call."""
    m, calls = model.clone(), []

    def note(executor, x, timesteps, context, y, *args, **kwargs):
        assert y.shape == (len(x), 2816) and y[:, :1280].eq(y[:, :1]).all()
        calls.append([(round(pooled), round(token)) for pooled, token in zip(y[:, 0].tolist(),
                                                                             context[:, 0, 0].tolist())])
        return executor(x, timesteps, context, y, *args, **kwargs)
    m.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "test", note)
    return m, calls


def twice(*numbers):
    return [(number, number) for number in numbers]


def test_the_pooled_text_of_each_frame_reaches_sdxl_with_its_tokens_in_windows_too(sdxl):
    clip = numbers_clip(2048, 1280)
    negative = clip.encode_from_tokens_scheduled(["90"])
    model, calls = pooled_of_calls(sdxl)
    core(model, travel(6, clip=clip), negative, images=6)
    core(model, travel(6, clip=clip), negative, images=6, cfg=2.0)
    both = calls.pop()
    assert calls == [twice(0, 1, 2, 3, 4, 5)] and sorted(both) == twice(0, 1, 2, 3, 4, 5) + twice(90) * 6
    model, calls = pooled_of_calls(with_windows(sdxl, FrameWindows(4, 2, "static", "pyramid")))
    core(model, travel(6, clip=clip), negative, images=6)
    assert calls == [twice(0, 1, 2, 3), twice(2, 3, 4, 5)]


def test_the_pooled_text_is_cut_for_a_clip_with_the_tokens():
    (cut_text, options), = conditioning_of(travel(6, clip=numbers_clip(8, 4)), frames_of_clip(2, 3, 6), {})
    assert cut_text[:, 0, 0].tolist() == options["pooled_output"][:, 0].tolist() == [2, 3, 4]
    assert MADE_FOR not in options


# Another number of frames

def test_the_samplers_refuse_texts_for_another_number_of_frames(models):
    model = models["prediction"]
    for side in ({"positive": travel(8)}, {"positive": text(), "negative": travel(8)},
                 {"positive": text(), "temporal_prompt": travel(8)}):
        what = "the video" if "temporal_prompt" in side else "a clip"
        with refusal(8, 4, what):
            ours(model, **side)
    with refusal(8, 4):
        ours(model, travel(8), clips=2)
    with refusal(4, 8):
        ours(windowed(model), travel(4), frames=8)
    with refusal(4, 8):
        core(model, travel(4), images=8)
    with refusal(8, 4):
        core(with_clip_options(model, 4), travel(8), images=8)


def test_extend_video_and_interpolation_refuse_them_too(models):
    for side in ({"positive": travel(4)}, {"positive": text(), "negative": travel(4)},
                 {"positive": text(), "temporal_prompt": travel(4)}):
        with refusal(4, LENGTH, "the video"):
            extend(models["prediction"], **side)
        with refusal(4, 9, "the video", ", made from 3 key frames"):
            interpolate(models["between"], **side)


def test_video_upscale_takes_the_frames_of_the_video_alone():
    (tokens, options), = checked_for_video(travel(5), 5)
    assert tokens[:, 0, 0].tolist() == [0, 1, 2, 3, 4] and MADE_FOR not in options
    with refusal(5, 6, "the video"):
        checked_for_video(travel(5), 6)


def test_one_text_is_for_any_number_of_frames_and_items_that_another_node_cut_are_not_counted(models):
    model, calls = heard(models["prediction"])
    ours(model, travel(1))
    (tokens, options), = travel(8)
    ours(model, [[tokens[:1], options]])
    assert calls == [[0, 0, 0, 0]] * 2
