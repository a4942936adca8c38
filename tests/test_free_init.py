"""FreeInit: its filters and frequencies, and what it makes of a sampling."""

import math

import comfy.model_management
import comfy.sample
import comfy.samplers
import pytest
import torch
from comfy.model_sampling import CONST, IMG_TO_IMG, ModelSamplingDiscrete
from comfy.patcher_extension import WrappersMP

from video_ldm.nodes.free_init import FreeInit
from video_ldm.nodes.host import free_init as host
from video_ldm.nodes.host import sampling
from video_ldm.nodes.host.free_init import NEW_SEED, RUN_BITS, in_run, noised
from video_ldm.nodes.host.noise_schedule import schedule_of
from video_ldm.nodes.longer import ContextFrames
from video_ldm.nodes.sample import VideoLDMSampler
from video_ldm.temporal.errors import VideoLDMError
from video_ldm.temporal.free_init import FILTERS, join_frequencies, low_pass
from video_ldm.tests.attach_help import models_with_layers, text
from video_ldm.tests.host import checkpoints
from video_ldm.tests.host.checkpoints import FRAMES
from video_ldm.tests.longer_help import frames_of, run_extend, run_interpolate, write_known_frame_layers
from video_ldm.tests.small import relative_error

SEED, SIZE = 7, (4, 2, 3)       # latents of 24 x 16 pixels


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """MODELs with layers of every kind, by name."""
    def write(folder):
        write_known_frame_layers(folder)
        checkpoints.save(folder / "motion.safetensors", checkpoints.motion_state())
    yield from models_with_layers(tmp_path_factory, write)


# The filters

def published(kind, shape, d_s, d_t, n):
    """The authors' formulas, frequency by frequency, with the zero frequency in the middle."""
    frames, height, width = shape
    mask = torch.zeros(shape)
    for t in range(frames):
        for h in range(height):
            for w in range(width):
                squared = (d_s / d_t * (2 * t / frames - 1)) ** 2 + (2 * h / height - 1) ** 2 + (2 * w / width - 1) ** 2
                mask[t, h, w] = {"butterworth": 1 / (1 + (squared / d_s ** 2) ** n),
                                 "gaussian": math.exp(-squared / (2 * d_s ** 2)),
                                 "ideal": float(squared <= d_s ** 2)}[kind]
    return mask


@pytest.mark.parametrize("kind", FILTERS)
@pytest.mark.parametrize("d_s, d_t, n", [(0.25, 0.25, 4), (0.5, 0.25, 2), (0.3, 1.0, 1)])
def test_the_filters_are_the_published_ones(kind, d_s, d_t, n):
    """Sizes are even here: where one is odd, the published middle is half a frequency away from zero."""
    wanted = published(kind, (16, 8, 6), d_s, d_t, n)
    kept = torch.fft.fftshift(low_pass(kind, (16, 8, 6), d_s, d_t, n), dim=(0, 2, 3))[:, 0]
    assert torch.allclose(kept, wanted, atol=1e-6)
    assert 0.005 < wanted.mean() < 0.9      # it keeps some frequencies


@pytest.mark.parametrize("kind", FILTERS)
@pytest.mark.parametrize("shape", [(16, 8, 8), (15, 7, 9), (1, 8, 8)])
def test_a_filter_keeps_the_mean_and_is_the_same_for_both_directions(kind, shape):
    kept = low_pass(kind, shape, 0.25, 0.25, 4)
    assert kept[0, 0, 0, 0] == 1
    backwards = torch.roll(kept.flip((0, 2, 3)), (1, 1, 1), (0, 2, 3))
    assert torch.equal(kept, backwards)


@pytest.mark.parametrize("kind", FILTERS)
@pytest.mark.parametrize("d_s, d_t", [(0.0, 0.25), (0.25, 0.0)])
def test_a_stop_frequency_of_0_keeps_nothing(kind, d_s, d_t):
    assert not low_pass(kind, (4, 2, 2), d_s, d_t, 4).count_nonzero()


# The frequencies

def clips(seed, frames=8):
    return torch.randn(2, frames, *SIZE, generator=torch.Generator().manual_seed(seed))


def test_a_filter_of_1_gives_the_one_and_a_filter_of_0_the_other():
    low, high = clips(1), clips(2)
    ones = torch.ones(8, 1, *SIZE[1:])
    assert relative_error(join_frequencies(low, high, ones), low) < 1e-6
    assert torch.equal(join_frequencies(low, high, 0 * ones), high)


@pytest.mark.parametrize("frames", [7, 8])
@pytest.mark.parametrize("kind", FILTERS)
def test_the_low_and_the_high_frequencies_of_one_clip_are_that_clip(kind, frames):
    whole = clips(1, frames)
    kept = low_pass(kind, (frames, *SIZE[1:]), 0.5, 0.5, 4)
    assert torch.equal(join_frequencies(whole, whole, kept), whole)
    low, high = (join_frequencies(*pair, kept) for pair in ((whole, 0 * whole), (0 * whole, whole)))
    assert relative_error(low + high, whole) < 1e-6 and relative_error(low, whole) > 0.1


def test_waves_below_the_stop_frequency_come_from_the_one_and_above_it_from_the_other():
    """One wave in time over 16 frames has the frequency 1/8 of the highest, four waves have 1/2."""
    time = 2 * math.pi * torch.arange(16) / 16
    slow, fast = ((n * time).cos().view(1, 16, 1, 1, 1).expand(1, 16, *SIZE) for n in (1, 4))
    kept = low_pass("ideal", (16, *SIZE[1:]), 0.25, 0.25, 4)
    joined = join_frequencies(slow + fast, torch.zeros(1, 16, *SIZE), kept)
    assert torch.allclose(joined, slow, atol=1e-5)
    assert torch.allclose(join_frequencies(torch.zeros(1, 16, *SIZE), slow + fast, kept), fast, atol=1e-5)


# The noise level

@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
@pytest.mark.parametrize("zsnr", [False, True])
def test_results_go_back_to_the_highest_noise_level_as_in_the_authors_program(prediction, zsnr):
    """sqrt(a) z + sqrt(1 - a) eps, with a of the last step of training."""
    sampling = schedule_of("linear", 0.00085, 0.012, prediction, zsnr)
    latents, noise = torch.randn(2, *SIZE), torch.randn(2, *SIZE)
    a = 1 / (1 + sampling.sigma_max ** 2)
    if not zsnr:
        betas = torch.linspace(0.00085 ** 0.5, 0.012 ** 0.5, 1000, dtype=torch.float64) ** 2
        assert float(a) == pytest.approx(float((1 - betas).prod()), rel=1e-4)
    assert torch.allclose(noised(sampling, latents, noise), a.sqrt() * latents + (1 - a).sqrt() * noise, atol=1e-6)


# A sampling

def free_init(model, runs=2, kind="butterworth", space=0.25, time=0.25, order=4):
    return FreeInit.execute(model, runs, kind, space, time, order).result[0]


def sampled(model, frames=FRAMES, clips=1, sampler="euler", scheduler="normal", denoise=1.0, latent=None, steps=2):
    return VideoLDMSampler.execute(model, text(), text(12), frames, 24, 16, clips, SEED, steps, 2.0, sampler, scheduler,
                                   denoise, latent).result[0]["samples"]


def starts(model, **options):
    """The latents that each run of a sampling begins with, as core's samplers have them, and the video."""
    seen = []

    class Sampler(comfy.samplers.KSAMPLER):
        def sample(self, model_wrap, sigmas, extra_args, callback, noise, latent_image=None, *args, **kwargs):
            seen.append((noise.clone(), latent_image.clone()))
            return super().sample(model_wrap, sigmas, extra_args, callback, noise, latent_image, *args, **kwargs)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comfy.samplers, "KSAMPLER", Sampler)
        return seen, sampled(model, **options)


@pytest.mark.parametrize("sampler", ["euler", "euler_ancestral"])
def test_one_iteration_is_a_sampling_without_it(models, sampler):
    before = sampled(models["motion"], sampler=sampler)
    assert torch.equal(sampled(free_init(models["motion"], 1), sampler=sampler), before)
    again = free_init(free_init(models["motion"], 3), 1)        # it takes the first one's place
    assert torch.equal(sampled(again, sampler=sampler), before)


@pytest.mark.parametrize("kind", FILTERS)
def test_each_run_begins_with_the_low_frequencies_of_the_last_one_and_new_noise(models, kind):
    model = models["motion"]
    seen, video = starts(free_init(model, 2, kind, 0.5, 0.5), clips=2)
    _, first = starts(model, clips=2)
    assert len(seen) == 2 and relative_error(video, first) > 1e-3
    noise, sigma = seen[0][0], model.get_model_object("model_sampling").sigma_max
    back = (model.model.process_latent_in(first) + sigma * noise) / (1 + sigma ** 2) ** 0.5
    new = comfy.sample.prepare_noise(noise, SEED ^ NEW_SEED ^ 1 << RUN_BITS)
    kept = low_pass(kind, (FRAMES, *SIZE[1:]), 0.5, 0.5, 4)
    wanted = join_frequencies(*(part.unflatten(0, (2, FRAMES)) for part in (back, new)), kept).flatten(0, 1)
    assert relative_error(seen[1][0], wanted) < 1e-5 and relative_error(seen[1][0], new) > 0.01


def test_with_a_filter_of_0_the_next_run_is_one_with_new_noise_of_its_own(models):
    seen, video = starts(free_init(models["motion"], 3, space=0.0))
    noises = [noise for noise, _ in seen]
    assert all(relative_error(a, b) > 0.1 for place, a in enumerate(noises) for b in noises[:place])
    assert torch.equal(video, starts(free_init(models["motion"], 3, time=0.0))[1])


def test_with_a_filter_of_1_the_next_run_begins_with_the_last_result_and_the_first_noise(models, monkeypatch):
    monkeypatch.setattr(host, "low_pass", lambda kind, shape, *settings: torch.ones(shape[0], 1, *shape[1:]))
    model = models["motion"]
    seen, _ = starts(free_init(model, 3))
    back = noised(model.get_model_object("model_sampling"), model.model.process_latent_in(sampled(model)), seen[0][0])
    assert relative_error(seen[1][0], back) < 1e-5 and relative_error(seen[2][0], back) > 1e-3


def test_clips_of_a_batch_come_out_as_alone(models):
    both, first = (sampled(free_init(models["motion"]), clips=count) for count in (2, 1))
    assert relative_error(both[:FRAMES], first) < 1e-5 and relative_error(both[FRAMES:], first) > 1e-2


def test_neighbouring_seeds_share_no_new_noise():
    """Extend Video's clips have neighbouring seeds."""
    seeds = {host.seed_of_run(seed, run) for seed in (*range(8), 2**64 - 1) for run in range(1, 20)}
    assert len({seed % 2**32 for seed in seeds}) == 9 * 19          # what torch's generator reads
    assert all(0 <= seed < 2**64 for seed in seeds)


def test_frames_between_key_frames_are_not_made_with_it(models):
    """Their noise is drawn for all pairs at once, and FreeInit would draw it for those pairs that fit into memory."""
    with pytest.raises(VideoLDMError, match="Latent Interpolate x4 does not take FreeInit. .* from before FreeInit"):
        run_interpolate(free_init(models["between"], 2), frames_of(3))


def test_the_same_seed_gives_the_same_video(models):
    model = free_init(models["motion"], 3)
    assert torch.equal(sampled(model), sampled(model))


# Masks and known frames

@pytest.mark.parametrize("kind", ["motion", "prediction"])
@pytest.mark.parametrize("known_first", [True, False])
def test_context_frames_come_out_as_they_went_in(models, kind, known_first):
    def known(model):
        return ContextFrames.execute(model, "0", 1.0, latent={"samples": frames_of(1)}).result[0]
    model = models[kind]
    without = sampled(known(model))
    both = free_init(known(model)) if known_first else known(free_init(model))
    video = sampled(both)
    assert torch.equal(video[:1], frames_of(1)) and relative_error(video[1:], without[1:]) > 1e-3
    other = known(free_init(model)) if known_first else free_init(known(model))
    assert torch.equal(sampled(other), video)


def test_what_a_mask_holds_keeps_the_first_noise_and_the_latent(models):
    """There the frames must have the noise that the sampler adds to the held latent at every step."""
    mask = torch.ones(FRAMES, 2, 3)
    mask[:2, :, 0] = 0
    mask[2, 1] = 0.5
    held = (mask < 1)[:, None].expand(FRAMES, *SIZE)
    latent = {"samples": frames_of(FRAMES), "noise_mask": mask}
    seen, video = starts(free_init(models["motion"], 3), latent=latent)
    for noise, start in seen[1:]:
        assert torch.equal(noise[held], seen[0][0][held]) and torch.equal(start[held], seen[0][1][held])
        assert not torch.equal(noise[~held], seen[0][0][~held]) and not start[~held].count_nonzero()
    fully = (mask == 0)[:, None].expand_as(held)
    assert relative_error(video[fully], latent["samples"][fully]) < 1e-5


# Progress

def test_the_steps_of_all_runs_are_counted_on_one_bar():
    seen = []
    for run in range(3):
        count = in_run(lambda step, x0, x, steps: seen.append((step + 1, steps)), run, 3)
        for step in range(2):
            count(step, None, None, 2)
    assert seen == [(1, 6), (2, 6), (3, 6), (4, 6), (5, 6), (6, 6)] and in_run(None, 0, 3) is None


def test_the_bar_of_extend_video_moves_in_every_run_and_ends_where_it_ends_without(models, monkeypatch):
    """2 clips of 2 steps: each of the 2 x 3 steps of a clip is a third of a step on the bar."""
    shown = []
    monkeypatch.setattr(sampling.RolloutProgress, "show", lambda self, value, pictures: shown.append(value))
    run_extend(free_init(models["motion"], 3), length=2 * FRAMES - 2, steps=2)
    assert shown == [0, 0, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 4, 4]


def test_what_other_nodes_begin_anew_in_a_sampling_begins_anew_in_each_run(models):
    """Caches do so: each run has their wrapper, wherever their node stands."""
    begun = []

    def cache(executor, noise, *args, **kwargs):
        begun.append(noise.clone())
        return executor(noise, *args, **kwargs)
    before = models["motion"].clone()
    before.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, "cache", cache)
    sampled(free_init(before, 3))
    assert len(begun) == 3 and not torch.equal(begun[0], begun[1])


def test_cancel_ends_all_runs(models):
    model, steps = models["motion"].clone(), []

    def press(executor, *args, **kwargs):
        steps.append(1)
        if len(steps) == 3:                 # the first step of the second run
            comfy.model_management.interrupt_current_processing()
        return executor(*args, **kwargs)
    model.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, "test", press)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        sampled(free_init(model, 4))
    assert len(steps) == 3
    assert torch.equal(sampled(models["motion"]), sampled(free_init(models["motion"], 1)))


# What is refused

def test_a_model_without_layers_is_refused(models):
    with pytest.raises(VideoLDMError, match="has no temporal layers"):
        free_init(models["image"])


def test_a_sampling_that_keeps_part_of_a_latent_is_refused(models):
    latent = {"samples": frames_of(FRAMES)}
    with pytest.raises(VideoLDMError, match="noise alone, and this sampling keeps part .* level 1.48, and the highest"):
        sampled(free_init(models["motion"]), denoise=0.5, latent=latent, steps=10)
    # With denoise 1 the latent is drowned in noise, as in a sampling without FreeInit.
    assert sampled(free_init(models["motion"]), latent=latent).shape == (FRAMES, *SIZE)


def guided(model, sigmas, noise):
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(text(), text(12))
    return guider.sample(noise, torch.zeros_like(noise), comfy.samplers.ksampler("euler"), torch.tensor(sigmas), seed=0)


def test_a_sampling_without_noise_or_without_an_end_is_refused(models):
    model = free_init(models["motion"])
    with pytest.raises(VideoLDMError, match="this sampling adds none"):
        guided(model, [14.6, 0.0], torch.zeros(FRAMES, *SIZE))
    with pytest.raises(VideoLDMError, match="ends at the noise level 2"):
        guided(model, [14.6, 2.0], torch.ones(FRAMES, *SIZE))


def test_flows_and_models_that_start_from_pictures_are_refused(models):
    for kind in (CONST, IMG_TO_IMG):
        other = free_init(models["motion"])
        other.add_object_patch("model_sampling", type("Other", (ModelSamplingDiscrete, kind), {})())
        with pytest.raises(VideoLDMError, match=rf"models that predict noise or v, .* another way \({kind.__name__}\)"):
            guided(other, [14.6, 0.0], torch.ones(FRAMES, *SIZE))


@pytest.mark.parametrize("place, value, sentence", [
    (1, 0, "iterations is 0, and it takes whole numbers from 1 to 20"), (2, "box", "filter is 'box'"),
    (3, 1.5, "stop_space is 1.5"), (4, -0.5, "stop_time is -0.5"), (5, 0, "order is 0")])
def test_wrong_widgets_are_refused(models, place, value, sentence):
    inputs = [models["motion"], 3, "ideal", 0.25, 0.25, 4]
    inputs[place] = value
    with pytest.raises(VideoLDMError, match=f"FreeInit: {sentence}"):
        FreeInit.execute(*inputs)
