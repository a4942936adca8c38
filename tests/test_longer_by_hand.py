"""Extend Video, Latent Interpolate x4 and the sampler against the same videos made by hand.

By hand means call by call with core's sampler. Also what a LATENT says beside its frames: what the nodes keep of it,
and what they act on.
"""

import comfy.sample
import pytest
import torch
from comfy.patcher_extension import WrappersMP
from nodes import KSampler  # ComfyUI's

from video_ldm.nodes.host import sampling
from video_ldm.nodes.host.options import with_clip_options
from video_ldm.nodes.load import AS_MODEL, LoadTemporalLayers
from video_ldm.nodes.longer import ContextFrames
from video_ldm.nodes.sample import VideoLDMSampler
from video_ldm.temporal.errors import VideoLDMError
from video_ldm.tests.attach_help import models_with_layers, text
from video_ldm.tests.host import checkpoints
from video_ldm.tests.host.checkpoints import FRAMES
from video_ldm.tests.longer_help import (
    RATE,
    SIZE,
    frames_of,
    run_extend,
    run_interpolate,
    write_known_frame_layers,
)
from video_ldm.tests.small import relative_error
from video_ldm.tests.windows_help import LONG, by_hand, noise_of, prediction, windowed

SEED = 7


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """MODELs with layers of every kind, by name. "anywhere" was trained with known frames at either end and at both."""
    def write(folder):
        checkpoints.write_video_layers(folder / "plain.safetensors")
        write_known_frame_layers(folder)
        checkpoints.write_context_layers(folder / "anywhere.safetensors", ((), (0,), (-1,), (0, -1)))
        checkpoints.save(folder / "motion.safetensors", checkpoints.motion_state())
    yield from models_with_layers(tmp_path_factory, write)


def with_frames(model, known, positions, guidance=1.0):
    return ContextFrames.execute(model, positions, guidance, latent={"samples": known}).result[0]


def core(model, noise, seed, steps=1, cfg=1.0):
    """Core's own sampling of noise."""
    return comfy.sample.sample(model, noise, steps, cfg, "euler", "normal", text(), text(12), torch.zeros_like(noise),
                               seed=seed, disable_pbar=True)


def noise_for(frames, seed):
    return comfy.sample.prepare_noise(torch.zeros(frames, *SIZE), seed)


def answering(model, answer):
    """A clone whose network is never run: `answer(x, transformer_options)` is its output."""
    m = model.clone()

    def instead(executor, x, timesteps, context, y, control, transformer_options, **kwargs):
        return answer(x, transformer_options)
    m.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "test", instead)
    return m


def silent(model):
    return answering(model, lambda x, options: torch.zeros_like(x))


# Latent Interpolate x4

def interpolate(model, keys, times=1, **changes):
    return run_interpolate(model, keys, times=times, **{"seed": SEED, **changes})[0]


def interpolated(model, keys, seed, rate, texts=None):
    """Every pair of keys as a clip of 5 frames, whose ends are known and whose layers are told `rate`."""
    pairs = len(keys) - 1
    clips = with_frames(with_clip_options(model, 5, texts, rate), keys.repeat_interleave(2, 0)[1:-1], "0, -1")
    made = core(clips, noise_for(5 * pairs, seed), seed).unflatten(0, (pairs, 5))
    return torch.cat([*made[:, :4], keys[-1:]])


def test_each_turn_is_told_the_rate_of_the_frames_it_makes_and_has_noise_of_its_own(models):
    keys = frames_of(3)
    once = interpolated(models["between"], keys, SEED, 4 * RATE)
    assert relative_error(interpolate(models["between"], keys)["samples"], once) < 1e-5
    assert relative_error(interpolated(models["between"], keys, SEED, RATE), once) > 1e-4
    once = interpolated(models["between"], keys[:2], SEED, 4 * RATE)
    twice = interpolated(models["between"], once, SEED + 1, 16 * RATE)
    assert relative_error(interpolate(models["between"], keys[:2], times=2)["samples"], twice) < 1e-5


def noises(model, run):
    """What `run(model)` gives the network in its first step, one batch after another."""
    seen = []
    run(answering(model, lambda x, options: seen.append(x.clone()) or torch.zeros_like(x)))
    return seen


def test_every_window_clip_and_turn_of_an_interpolation_starts_from_other_noise(models):
    keys = frames_of(6)
    latent = {"samples": keys, "frame_rate": RATE, "clip_frames": 3}
    seen = torch.cat(noises(models["between"], lambda m: interpolate(m, keys, 2, latent=latent, windows=1)))
    frames = seen.flatten(1)
    assert len(frames) == 5 * (2 * 2 + 2 * 8)
    assert len(frames.unique(dim=0)) == len(frames)
    first = torch.cat(noises(models["between"], lambda m: interpolate(m, keys[:3], windows=1)))
    second = torch.cat(noises(models["between"], lambda m: interpolate(m, keys[3:], windows=1, seed=SEED + 2)))
    assert torch.equal(seen[:20], torch.cat([first, second]))       # clips are two seeds apart, one for each turn


def test_a_temporal_prompt_of_an_interpolation_is_heard_by_its_layers(models):
    keys, prompt = frames_of(2), text(13)
    seen = interpolate(models["between"], keys, temporal_prompt=prompt)
    expected = interpolated(models["between"], keys, SEED, 4 * RATE, {0: prompt[0][0]})
    assert relative_error(seen["samples"], expected) < 1e-5
    assert relative_error(seen["samples"], interpolate(models["between"], keys)["samples"]) > 1e-4


def test_the_frame_rate_widget_counts_before_that_of_the_latent(models):
    m = silent(models["between"])
    assert interpolate(m, frames_of(2))["frame_rate"] == 4 * RATE
    assert interpolate(m, frames_of(2), fps=3.0)["frame_rate"] == 12.0


# Extend Video

def extend(model, given, length=FRAMES, **changes):
    latent = {"samples": given} if given is not None else None
    return run_extend(model, length=length, seed=SEED, **{"cfg": 2.0, "latent": latent, **changes})


def test_context_guidance_acts_in_every_clip_of_an_extended_video(models):
    given, base = frames_of(1), models["prediction"]
    clip = with_clip_options(base, FRAMES)
    first = core(with_frames(clip, given, "0", 2.5), noise_for(FRAMES, SEED), SEED, cfg=2.0)
    second = core(with_frames(clip, first[-2:], "0, 1", 2.5), noise_for(FRAMES, SEED + 1), SEED + 1, cfg=2.0)
    expected = torch.cat([first, second[2:]])
    video = extend(base, given, 6, context_guidance=2.5)[0]["samples"]
    assert relative_error(video, expected) < 1e-5
    assert relative_error(extend(base, given, 6)[0]["samples"][1:], expected[1:]) > 1e-3


def test_a_temporal_prompt_is_heard_by_the_layers_of_an_extended_video(models):
    given, prompt = frames_of(1), text(13)
    told = with_clip_options(models["prediction"], FRAMES, {0: prompt[0][0]})
    expected = core(with_frames(told, given, "0"), noise_for(FRAMES, SEED), SEED, cfg=2.0)
    seen = extend(models["prediction"], given, temporal_prompt=prompt)[0]["samples"]
    assert relative_error(seen, expected) < 1e-5
    assert relative_error(seen, extend(models["prediction"], given)[0]["samples"]) > 1e-4


def test_the_sampler_hears_its_temporal_prompt_too(models):
    prompt = text(13)
    told = with_clip_options(models["plain"], FRAMES, {0: prompt[0][0]})
    expected = core(told, noise_for(FRAMES, SEED), SEED, cfg=2.0)
    assert relative_error(sampler(models["plain"], temporal_prompt=prompt)["samples"], expected) < 1e-5
    assert relative_error(sampler(models["plain"])["samples"], expected) > 1e-4


def test_clips_of_an_extended_video_have_seeds_one_apart(models):
    seen = noises(models["prediction"], lambda m: extend(m, frames_of(1), 8, cfg=1.0))
    assert len(seen) == 3
    scale = [batch[0] / noise_for(FRAMES, SEED + number)[0] for number, batch in enumerate(seen)]
    assert all(relative_error(part, scale[0].mean().expand_as(part)) < 1e-4 for part in scale)


def test_the_overlap_is_what_each_clip_takes_over_from_the_one_before(models):
    masked = silent(models["motion"])
    video = extend(masked, frames_of(3), 7, overlap=3)[0]["samples"]
    assert len(video) == 7 and torch.equal(video[:3], frames_of(3))
    for overlap, count in ((3, 4), (1, 2)):     # calls that make one new frame each, and three
        calls = noises(models["motion"],
                       lambda m, overlap=overlap: extend(m, frames_of(3), 7, overlap=overlap, cfg=1.0))
        assert [len(batch) for batch in calls] == [FRAMES] * count


# Known frames in windows

def test_known_frames_of_a_later_window_stand_at_the_windows_own_numbers(models):
    """A clip of 6 in windows 0..3 and 2..5, its first and last frame known: each window knows one, at its own end."""
    known, base = frames_of(2), models["anywhere"]
    seen = prediction(with_frames(windowed(base), known, "0, -1"))
    ends = {0: with_frames(base, known[:1], "0"), 2: with_frames(base, known[1:], "-1")}
    assert relative_error(seen, by_hand(lambda noise, places: prediction(ends[places.start], noise))) < 1e-5
    assert relative_error(seen, prediction(windowed(base))) > 1e-3


def test_known_frames_of_several_clips_in_windows_stay_with_their_clips(models):
    known, noise = frames_of(4), noise_of(2 * LONG)
    model = with_clip_options(windowed(models["anywhere"]), LONG)
    both = prediction(with_frames(model, known, "0, -1"), noise)
    for clip in (0, 1):
        own = with_frames(model, known[2 * clip:2 * clip + 2], "0, -1")
        alone = prediction(own, noise[clip * LONG:(clip + 1) * LONG])
        assert relative_error(both[clip * LONG:(clip + 1) * LONG], alone) < 1e-5


def test_windows_whose_known_frames_stand_where_none_were_trained_are_refused(models):
    """Looped windows of 4 in a clip of 6: the last is 4, 5, 0, 1, where the known first frame is number 2."""
    looped = with_frames(windowed(models["prediction"], schedule="looped"), frames_of(1), "0")
    with pytest.raises(VideoLDMError, match="In a window of 4 frames the context frames are 2.*none; 0; 0, 1. Set the"):
        prediction(looped)


# What a LATENT says beside its frames

def sampler(model, frames=FRAMES, **changes):
    widgets = dict(positive=text(), negative=text(12), frames=frames, width=24, height=16, clips=1, seed=SEED, steps=1,
                   cfg=2.0, sampler="euler", scheduler="normal", denoise=1.0)
    return VideoLDMSampler.execute(model=model, **{**widgets, **changes}).result[0]


def test_the_noise_follows_the_batch_index_of_a_latent_as_core_ksampler_has_it(models, monkeypatch):
    """Latent From Batch notes which images of a batch it took: they get the noise that they would have had there."""
    drawn = []
    monkeypatch.setattr(comfy.sample, "sample", lambda model, noise, *args, **kwargs: drawn.append(noise) or noise)
    latent = {"samples": torch.zeros(FRAMES, *SIZE), "batch_index": [3, 4, 6, 7]}
    sampler(models["plain"], latent=latent)
    KSampler().sample(models["plain"], SEED, 1, 2.0, "euler", "normal", text(), text(12), latent, 1.0)
    sampler(models["plain"], latent={"samples": latent["samples"]})
    ours, cores, unindexed = drawn
    assert torch.equal(ours, cores)
    assert torch.equal(ours, comfy.sample.prepare_noise(latent["samples"], SEED, [3, 4, 6, 7]))
    assert not torch.equal(ours, unindexed)


@pytest.mark.parametrize("make", ["interpolation", "extension"])
def test_what_belongs_to_other_frames_is_not_kept_beside_new_ones(models, make):
    latent = {"samples": frames_of(3), "frame_rate": RATE, "noise_mask": torch.ones(3, 16, 24),
              "batch_index": [4, 5, 6], "note": "kept"}
    if make == "interpolation":
        made, clip = interpolate(silent(models["between"]), None, latent=latent), 9
    else:
        made, clip = extend(silent(models["prediction"]), None, 6, latent=latent)[0], 6
    assert set(made) == {"samples", "frame_rate", "clip_frames", "latent_kind", "note"}
    assert (len(made["samples"]), made["clip_frames"], made["note"]) == (clip, clip, "kept")


def test_the_frame_rate_of_a_file_goes_from_its_layers_to_the_latent(models):
    """The files say 4 (the video layers), 8 (AnimateDiff) and nothing (interpolation): the last that says counts."""
    plain, motion = models["plain"], models["motion"]
    both = [LoadTemporalLayers.execute(first, f"{name}.safetensors", 1.0, AS_MODEL).result[0]
            for first, name in ((plain, "motion"), (motion, "plain"))]
    for model, rate in ((plain, 4.0), (motion, 8.0), (both[0], 8.0), (both[1], 4.0)):
        assert sampler(silent(model))["frame_rate"] == rate
        latent, fps, _ = extend(silent(model), None, 6)
        assert (latent["frame_rate"], fps) == (rate, rate)
    report = LoadTemporalLayers.execute(models["image"], "plain.safetensors", 1.0, AS_MODEL).result[1]
    assert "Trained on clips of 4 frames at 4 frames per second." in report


def test_the_sampler_says_how_long_its_clips_are(models):
    made = sampler(silent(models["plain"]), clips=3)
    assert (len(made["samples"]), made["clip_frames"]) == (3 * FRAMES, FRAMES)


def test_the_sampler_asks_of_core_what_core_ksampler_asks(models, monkeypatch):
    """Every widget at a value of its own, a latent with a noise mask to start from."""
    asked = []
    monkeypatch.setattr(comfy.sample, "sample",
                        lambda model, *args, **options: asked.append((args, options)) or args[0])
    latent = {"samples": frames_of(FRAMES), "noise_mask": torch.rand(FRAMES, 16, 24)}
    widgets = dict(seed=3, steps=9, cfg=4.5, sampler="heun", scheduler="karras", denoise=0.6)
    sampler(models["plain"], latent=latent, **widgets)
    KSampler().sample(models["plain"], *list(widgets.values())[:5], text(), text(12), latent, 0.6)
    (ours, our_options), (cores, core_options) = asked
    assert torch.equal(ours[0], cores[0]) and torch.equal(ours[7], cores[7]) and torch.equal(ours[7], latent["samples"])
    assert ours[1:5] == cores[1:5] == (9, 4.5, "heun", "karras")
    assert [torch.equal(*(args[n][0][0] for args in (ours, cores))) for n in (5, 6)] == [True] * 2
    assert torch.equal(our_options["noise_mask"], latent["noise_mask"])
    assert (our_options["denoise"], our_options["seed"]) == (core_options["denoise"], core_options["seed"]) == (0.6, 3)


def test_without_a_latent_clips_have_the_size_of_the_widgets(models):
    m = silent(models["plain"])
    assert sampler(m, clips=2, width=48, height=16)["samples"].shape == (2 * FRAMES, 4, 2, 6)
    assert extend(silent(models["prediction"]), None, 6, width=48)[0]["samples"].shape == (6, 4, 2, 6)


def test_as_many_windows_are_sampled_at_once_as_the_widget_says_and_each_counts_for_the_progress(models, monkeypatch):
    shown, keys = [], frames_of(6)
    monkeypatch.setattr(sampling.RolloutProgress, "show", lambda self, value, pictures: shown.append(value))
    seen = noises(models["between"], lambda m: interpolate(m, keys, windows=2))
    assert [len(batch) for batch in seen] == [10, 10, 5]
    assert shown == sorted(shown) and shown[-1] == 5        # pairs, of one step each
    shown.clear()
    noises(models["between"], lambda m: interpolate(m, keys[:2], 2, steps=3))
    assert shown == sorted(shown) and shown[-1] == 3 * (1 + 4)


def test_one_key_frame_a_clip_is_refused_however_many_clips_there_are(models):
    with pytest.raises(VideoLDMError, match="There is one key frame"):
        interpolate(models["between"], None, latent={"samples": frames_of(3), "frame_rate": RATE, "clip_frames": 1})
