"""Context Frames, Extend Video and Latent Interpolate x4 under ComfyUI's own sampling, in this process."""

from types import SimpleNamespace

import comfy.model_management
import comfy.sample
import comfy.samplers
import pytest
import torch
from comfy.patcher_extension import WrappersMP
from nodes import LatentFromBatch  # ComfyUI's

from video_ldm.nodes.host import context, sampling
from video_ldm.nodes.host.options import with_clip_options
from video_ldm.nodes.longer import KEEP, ContextFrames, positions_of
from video_ldm.nodes.sample import VideoLDMSampler
from video_ldm.nodes.windows import FrameWindows
from video_ldm.temporal.errors import VideoLDMError
from video_ldm.temporal.rollout import Step, interpolated_length, plan_calls
from video_ldm.tests.attach_help import models_with_layers, text
from video_ldm.tests.host import checkpoints
from video_ldm.tests.host.checkpoints import FRAMES
from video_ldm.tests.longer_help import SIZE, frames_of, run_extend, run_interpolate, write_known_frame_layers
from video_ldm.tests.small import relative_error


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """MODELs with layers of every kind, by name."""
    def write(folder):
        checkpoints.write_video_layers(folder / "plain.safetensors")
        write_known_frame_layers(folder)
        checkpoints.save(folder / "motion_modules.safetensors", checkpoints.motion_state())
    yield from models_with_layers(tmp_path_factory, write)


def sample(model, frames=FRAMES, clips=1, cfg=2.0, steps=2, seed=7, latent=None):
    latent = torch.zeros(clips * frames, *SIZE) if latent is None else latent
    m = with_clip_options(model, frames)
    return sampling.ksample(m, seed, steps, cfg, "euler", "normal", text(), text(12), {"samples": latent}, 1.0)


def with_frames(model, count=1, positions="0", guidance=1.0, seed=5):
    return ContextFrames.execute(model, positions, guidance, latent={"samples": frames_of(count, seed)}).result[0]


# Context Frames

@pytest.mark.parametrize("kind", ["prediction", "plain", "motion_modules"])
def test_known_frames_come_back_exactly_and_change_the_others(models, kind):
    free, known = sample(models[kind]), sample(with_frames(models[kind], 2, "0, 1"))
    assert torch.equal(known[:2], frames_of(2))
    assert relative_error(known[2:], free[2:]) > 1e-3


def test_the_report_says_how_known_frames_enter(models):
    latent = {"samples": frames_of(1)}
    report = ContextFrames.execute(models["prediction"], "0", 1.5, latent=latent).result[1]
    assert "seen by the temporal layers" in report
    report = ContextFrames.execute(models["motion_modules"], "0", 1.5, latent=latent).result[1]
    assert "noise mask" in report and "guidance does nothing" in report


def test_core_ksampler_with_context_frames_equals_ours(models):
    m = with_frames(models["prediction"])
    latent = torch.zeros(FRAMES, *SIZE)
    noise = comfy.sample.prepare_noise(latent, 7)
    core = comfy.sample.sample(m, noise, 2, 2.0, "euler", "normal", text(), text(12), latent, seed=7, disable_pbar=True)
    assert torch.equal(core, sample(m))


def test_several_clips_have_their_own_context_or_share_one(models):
    own = frames_of(2)
    m = ContextFrames.execute(models["prediction"], "0", 1.0, latent={"samples": own}).result[0]
    clips = sample(m, clips=2).unflatten(0, (2, FRAMES))
    assert torch.equal(clips[:, 0], own)
    shared = sample(with_frames(models["prediction"]), clips=2).unflatten(0, (2, FRAMES))
    assert torch.equal(shared[0, 0], shared[1, 0]) and not torch.equal(shared[0, 1], shared[1, 1])


class Guider(comfy.samplers.CFGGuider):
    """Notes the first prediction of the noise, e = x - denoised up to a factor that is the same for all."""

    def predict_noise(self, x, timestep, model_options=None, seed=None):
        self.denoised = super().predict_noise(x, timestep, model_options, seed)
        return self.denoised


def denoised(model, cfg, positive=None):
    guider = Guider(model)
    guider.set_conds(positive or text(), text(12))
    guider.set_cfg(cfg)
    noise = frames_of(FRAMES, 3)
    guider.sample(noise, torch.zeros_like(noise), comfy.samplers.ksampler("euler"), torch.tensor([2.0, 0.0]),
                  disable_pbar=True, seed=0)
    return guider.denoised


def test_context_guidance_is_the_papers_formula_and_linear(models):
    base, s_t = models["prediction"], 3.0
    pos, both = denoised(with_frames(base), 1.0), denoised(with_frames(base), s_t)
    without = denoised(base, 1.0)
    for s_c in (0.0, 1.0, 2.5):
        guided = denoised(with_frames(base, guidance=s_c), s_t)
        assert relative_error(guided, both + (s_c - 1) * (pos - without)) < 1e-5
        alone = denoised(with_frames(base, guidance=s_c), 1.0)      # without text guidance: f + s (f(c_S) - f)
        assert relative_error(alone, without + s_c * (pos - without)) < 1e-5
    assert relative_error(pos, without) > 1e-3


def test_context_guidance_is_refused_for_layers_that_always_had_context_frames(models):
    with_frames(models["between"], 2, "0, -1")
    with pytest.raises(VideoLDMError, match="never trained without them. Set it to 1"):
        with_frames(models["between"], 2, "0, -1", guidance=2.0)


def test_context_guidance_of_1_calls_the_model_no_more_than_without(models):
    m = with_frames(models["prediction"], guidance=1.0)
    assert torch.equal(denoised(m, 3.0), denoised(with_frames(models["prediction"]), 3.0))
    assert not m.get_wrappers(WrappersMP.CALC_COND_BATCH, context.KEY)


def test_windows_beyond_the_known_frames_are_clips_from_noise(models):
    """Frame Windows and Context Frames together.

    The first window goes on from the known frame. Each other window goes on from the window before it.
    """
    base = FrameWindows.execute(models["prediction"], "windows", 4, 2, "static", "flat", 8).result[0]
    m = ContextFrames.execute(base, "0", 1.0, latent={"samples": frames_of(2)}).result[0]
    free = sample(base, frames=8, clips=2).unflatten(0, (2, 8))
    known = sample(m, frames=8, clips=2).unflatten(0, (2, 8))
    assert torch.equal(known[:, 0], frames_of(2))
    assert relative_error(known[:, 1:4], free[:, 1:4]) > 1e-3


def test_a_second_context_frames_node_replaces_the_first(models):
    once = with_frames(models["prediction"], seed=6)
    twice = with_frames(with_frames(models["prediction"], guidance=2.0), seed=6)
    assert torch.equal(sample(once), sample(twice))


def test_the_model_that_was_connected_stays_without_known_frames(models):
    before = sample(models["prediction"])
    with_frames(models["prediction"])
    assert torch.equal(before, sample(models["prediction"]))


@pytest.mark.parametrize("kind, positions, count, sentence", [
    ("image", "0", 1, "has no temporal layers"),
    ("prediction", "", 1, "is no list of frame numbers"),
    ("prediction", "first", 1, "is no list of frame numbers"),
    ("prediction", "0, 1", 1, "1 context frames were given for 2 positions"),
    ("prediction", "0, 2", 2, "trained for the context frames none; 0; 0, 1, not for 0, 2"),
    ("prediction", "9", 1, "Context frame 9 lies outside the clip"),
    ("between", "0", 1, "trained for the context frames 0, -1, not for 0")])
def test_context_that_cannot_work_is_refused_at_the_node(models, kind, positions, count, sentence):
    with pytest.raises(VideoLDMError, match=sentence):
        with_frames(models[kind], count, positions)


def test_context_of_other_sizes_or_kinds_is_refused(models):
    run = ContextFrames.execute
    with pytest.raises(VideoLDMError, match="8 latent channels, and this model's have 4"):
        run(models["prediction"], "0", 1.0, latent={"samples": torch.zeros(1, 8, 2, 3)})
    with pytest.raises(VideoLDMError, match="5 dimensions"):
        run(models["prediction"], "0", 1.0, latent={"samples": torch.zeros(1, 4, 1, 2, 3)})
    with pytest.raises(VideoLDMError, match="No context frames are connected"):
        run(models["prediction"], "0", 1.0)
    with pytest.raises(VideoLDMError, match="no VAE to encode it"):
        run(models["prediction"], "0", 1.0, image=torch.zeros(1, 16, 24, 3))
    with pytest.raises(VideoLDMError, match="Both a LATENT and an IMAGE"):
        run(models["prediction"], "0", 1.0, latent={"samples": frames_of(1)}, image=torch.zeros(1, 16, 24, 3))
    for kind in ("prediction", "motion_modules"):
        m = run(models[kind], "0", 1.0, latent={"samples": torch.ones(1, 4, 4, 3)}).result[0]
        with pytest.raises(VideoLDMError, match="context frames are 24x32 pixels and the clip is 24x16"):
            sample(m)
    m = run(models["motion_modules"], "6", 1.0, latent={"samples": frames_of(1)}).result[0]
    with pytest.raises(VideoLDMError, match="Context frame 6 lies outside the clip, whose frames are 0 to 3"):
        sample(m)
    m = run(models["prediction"], "0", 1.0, latent={"samples": frames_of(2)}).result[0]
    with pytest.raises(VideoLDMError, match="given for 2 clips, and 3 clips are sampled"):
        sample(m, clips=3)


def test_a_noise_mask_of_the_artist_is_kept_beside_the_context(models):
    m = with_frames(models["motion_modules"])
    latent = {"samples": frames_of(FRAMES, 9), "noise_mask": torch.ones(FRAMES, 16, 24)}
    latent["noise_mask"][2] = 0
    out = sampling.ksample(with_clip_options(m, FRAMES), 7, 2, 2.0, "euler", "normal", text(), text(12), latent, 1.0)
    assert torch.equal(out[0], frames_of(1)[0])
    assert relative_error(out[2], latent["samples"][2]) < 1e-5
    assert relative_error(out[1], latent["samples"][1]) > 1e-2


def test_a_noise_mask_counts_alike_raw_and_in_the_shape_of_the_noise(models):
    """ComfyUI 0.3 hands it to the wrapper as the artist made it, 0.33 expanded."""
    options = with_clip_options(with_frames(models["motion_modules"]), FRAMES).model_options
    noise, given = frames_of(FRAMES, 9), []

    class Sampling:
        class_obj = SimpleNamespace(model_options=options)

        def __call__(self, noise, latent_image, sampler, sigmas, denoise_mask):
            given.append(denoise_mask)
            return noise
    raw = torch.rand(FRAMES, *noise.shape[2:])
    for mask in (raw, raw[:, None].expand_as(noise)):
        context.sample_with_noise_mask(Sampling(), noise, torch.zeros_like(noise), None, None, mask)
    assert torch.equal(*given) and not given[0][0].any() and torch.equal(given[0][1:, 0], raw[1:])


# Extend Video

def test_the_plan_makes_no_frame_twice_and_begins_with_one_then_two():
    assert plan_calls(26, 10, 1) == [Step(0, 1), Step(8, 2), Step(16, 2)]
    assert plan_calls(8, 8, 0) == [Step(0, 0)]
    for given in (0, 1, 2, 5):
        steps, made = plan_calls(50, 8, given), list(range(given))
        for step in steps:
            assert step.start + step.known == len(made)         # nothing left out, nothing twice
            made += range(len(made), step.start + 8)
        assert len(made) >= 50 and steps[-1].start + 8 - 50 < 8
        assert all(step.known == 2 for step in steps[1:])


@pytest.mark.parametrize("arguments, sentence", [((1, 8, 1), "Set a length above 1"),
                                                 ((20, 2, 1), "more than 2 frames")])
def test_a_plan_that_makes_nothing_is_refused(arguments, sentence):
    with pytest.raises(VideoLDMError, match=sentence):
        plan_calls(*arguments)


def extend(model, length=9, given=1, seed=7, **changes):
    latent = {"latent": {"samples": frames_of(given)}} if given else {}
    return run_extend(model, length=length, seed=seed, **{"steps": 2, "cfg": 2.0, **latent, **changes})


@pytest.mark.parametrize("kind", ["prediction", "motion_modules"])
@pytest.mark.parametrize("given", [0, 1, 3])
def test_a_video_is_extended_to_its_length_from_what_is_given(models, kind, given):
    latent, fps, report = extend(models[kind], given=given)
    assert latent["samples"].shape == (9, *SIZE) and latent["frame_rate"] == fps
    assert torch.equal(latent["samples"][:given], frames_of(given))
    assert len({tuple(frame.flatten().tolist()) for frame in latent["samples"]}) == 9
    assert ("noise mask" in report) == (kind == "motion_modules")


def test_each_clip_of_an_extended_video_equals_the_sampler_with_context_frames(models):
    video = extend(models["prediction"], length=6)[0]["samples"]
    first = sample(with_frames(models["prediction"]), seed=7)
    assert torch.equal(video[:FRAMES], first)
    m = ContextFrames.execute(models["prediction"], "0, 1", 1.0, latent={"samples": first[-2:]}).result[0]
    assert torch.equal(video[FRAMES:], sample(m, seed=8)[2:])


def test_rollouts_from_one_frame_differ_by_seed_and_repeat_by_seed(models):
    one, same, other = (extend(models["prediction"], seed=seed)[0]["samples"] for seed in (1, 1, 2))
    assert torch.equal(one, same) and torch.equal(one[0], other[0])
    assert relative_error(one[1:], other[1:]) > 1e-2


def cancel_in_clip(monkeypatch, number):
    """Interrupt as the button does, in the given clip."""
    finish, count = sampling.RolloutProgress.finish, []

    def press(self, frames):
        finish(self, frames)
        count.append(1)
        if len(count) == number - 1:
            comfy.model_management.interrupt_current_processing()
    monkeypatch.setattr(sampling.RolloutProgress, "finish", press)


def test_cancelling_stops_or_keeps_what_is_finished(models, monkeypatch):
    whole = extend(models["prediction"], length=12)[0]["samples"]
    cancel_in_clip(monkeypatch, 3)
    latent, _, report = extend(models["prediction"], length=12, on_cancel=KEEP)
    assert torch.equal(latent["samples"], whole[:6]) and "6 of 12 frames are finished" in report
    monkeypatch.undo()
    cancel_in_clip(monkeypatch, 3)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        extend(models["prediction"], length=12)
    monkeypatch.undo()
    comfy.model_management.interrupt_current_processing()
    with pytest.raises(comfy.model_management.InterruptProcessingException):    # nothing finished: nothing to keep
        extend(models["prediction"], length=12, on_cancel=KEEP)
    assert torch.equal(extend(models["prediction"], length=12)[0]["samples"], whole)


@pytest.mark.parametrize("kind, changes, sentence", [
    ("image", {}, "has no temporal layers"),
    ("prediction", {"length": 2, "latent": {"samples": frames_of(2)}}, "Set a length above 2"),
    ("prediction", {"frames": 2}, "more than 2 frames"),
    ("prediction", {"overlap": 3}, "trained for the context frames none; 0; 0, 1, not for 0, 1, 2"),
    ("prediction", {"latent": {"samples": frames_of(4), "clip_frames": 2}}, "holds 2 clips, and one video is extended"),
    ("between", {}, "trained for the context frames 0, -1")])
def test_an_extension_that_cannot_work_is_refused(models, kind, changes, sentence):
    with pytest.raises(VideoLDMError, match=sentence):
        extend(models[kind], **changes)


# Latent Interpolate x4

def interpolate(model, keys, times=1, seed=7, **changes):
    return run_interpolate(model, keys, times=times, seed=seed, **{"steps": 2, **changes})


def test_8_key_frames_become_29_and_113_and_stay_in_place():
    assert (interpolated_length(8), interpolated_length(interpolated_length(8))) == (29, 113)


def test_interpolation_keeps_key_frames_and_multiplies_the_rate(models):
    keys = frames_of(4)
    once, fps = interpolate(models["between"], keys)
    assert once["samples"].shape == (13, *SIZE) and torch.equal(once["samples"][::4], keys)
    assert fps == once["frame_rate"] == 8.0
    twice, fps = interpolate(models["between"], keys, times=2)
    assert twice["samples"].shape == (49, *SIZE) and fps == 32.0
    assert torch.equal(twice["samples"][::4], once["samples"])
    assert len({tuple(frame.flatten().tolist()) for frame in twice["samples"]}) == 49


def test_windows_sampled_together_or_one_by_one_agree(models):
    keys = frames_of(5)
    together, alone = (interpolate(models["between"], keys, windows=count)[0]["samples"] for count in (0, 1))
    assert relative_error(together, alone) < 1e-5


def test_a_window_depends_on_its_own_two_key_frames_alone(models):
    keys = frames_of(4)
    other = keys.clone()
    other[3] += 1
    first, second = (interpolate(models["between"], k, windows=1)[0]["samples"] for k in (keys, other))
    assert torch.equal(first[:9], second[:9]) and relative_error(first[9:12], second[9:12]) > 1e-3


def test_clips_of_one_latent_stay_apart(models):
    keys = frames_of(6)
    both = interpolate(models["between"], keys, latent={"samples": keys, "frame_rate": 2.0, "clip_frames": 3})[0]
    assert both["samples"].shape == (18, *SIZE) and both["clip_frames"] == 9
    assert torch.equal(both["samples"][:9], interpolate(models["between"], keys[:3])[0]["samples"])
    assert torch.equal(both["samples"][9::4], keys[3:])
    with pytest.raises(VideoLDMError, match="do not divide"):
        interpolate(models["between"], keys, latent={"samples": keys, "frame_rate": 2.0, "clip_frames": 4})


def test_a_clip_cut_out_of_a_batch_counts_as_one_clip(models):
    """Core's Latent From Batch keeps what else the LATENT says."""
    whole = VideoLDMSampler.execute(models["plain"], text(), text(12), 4, 24, 16, 2, 7, 2, 2.0, "euler", "normal", 1.0)
    cut = LatentFromBatch().frombatch(whole.result[0], 4, 4)[0]
    assert extend(models["prediction"], latent=cut)[0]["samples"].shape == (9, *SIZE)
    assert len(interpolate(models["between"], None, latent=cut)[0]["samples"]) == 13
    assert len(interpolate(models["between"], None, latent=whole.result[0])[0]["samples"]) == 26


def test_the_frame_rate_that_interpolation_is_told_changes_the_frames(models):
    slow, fast = (interpolate(models["between"], frames_of(2), fps=fps)[0]["samples"] for fps in (1.875, 7.5))
    assert relative_error(slow, fast) > 1e-4


@pytest.mark.parametrize("kind, keys, changes, sentence", [
    ("image", frames_of(3), {}, "has no temporal layers"),
    ("plain", frames_of(3), {}, "make key frames, not the frames between them"),
    ("prediction", frames_of(3), {}, "make key frames, not the frames between them"),
    ("between", frames_of(1), {}, "There is one key frame"),
    ("between", torch.zeros(3, 4, 1, 2, 3), {}, "5 dimensions"),
    ("between", torch.zeros(3, 8, 2, 3), {}, "8 latent channels, and this model's have 4"),
    ("between", frames_of(3), {"latent": {"samples": frames_of(3)}}, "does not say its frame rate")])
def test_an_interpolation_that_cannot_work_is_refused(models, kind, keys, changes, sentence):
    with pytest.raises(VideoLDMError, match=sentence):
        interpolate(models[kind], keys, **changes)


def test_interpolation_layers_in_the_place_of_key_frame_layers_are_refused(models):
    with pytest.raises(VideoLDMError, match="make the frames between context frames"):
        VideoLDMSampler.execute(models["between"], text(), text(12), 5, 24, 16, 1, 7, 2, 2.0, "euler", "normal", 1.0)
    with pytest.raises(VideoLDMError, match="make the frames between context frames"):
        sample(models["between"], frames=5)


@pytest.mark.parametrize("written, positions", [("0", (0,)), ("0, 1", (0, 1)), (" 0 -1 ", (0, -1)), ("+2,3", (2, 3))])
def test_positions_are_read_however_people_write_them(written, positions):
    assert positions_of(written) == positions
