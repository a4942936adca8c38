"""The kinds of noise that a clip begins with: their formulas, their orders, and Frame Noise as core's NOISE."""

import math

import comfy.sample
import pytest
import torch
from nodes import LatentFromBatch  # ComfyUI's

from video_ldm.nodes.host.frame_noise import FREE_NOISE, KINDS, MIXED, OF_WINDOWS, OWN, REPEATED, SHARED
from video_ldm.nodes.host.frame_noise import FrameNoise as Noise
from video_ldm.nodes.noise import FrameNoise
from video_ldm.nodes.sample import VideoLDMSampler
from video_ldm.nodes.windows import CONVOLUTION
from video_ldm.temporal.errors import VideoLDMError
from video_ldm.temporal.noise import free_noise_order, mix_weights, mixed_noise, repeated_order
from video_ldm.temporal.schedules import static_windows
from video_ldm.tests.windows_help import LENGTH, LONG, OVERLAP, models, text, windowed

assert models       # a fixture

SEED = 7
SIZE = 4, 2, 3      # of these latents; core's noise of one frame is the same in any batch only from 16 numbers on
ROUND = 4, 4, 4     # a whole number of 16: core draws frames one by one as it draws a batch


# The formulas

@pytest.mark.parametrize("mix, shared, own", [
    (0, 0, 1), (1, 1 / 2, 1 / 2), (2, 4 / 5, 1 / 5), (3, 9 / 10, 1 / 10), (math.inf, 1, 0)])
def test_the_parts_of_mixed_noise_have_the_powers_of_the_formula(mix, shared, own):
    assert [weight ** 2 for weight in mix_weights(mix)] == pytest.approx([shared, own])


@pytest.mark.parametrize("mix", [0, 0.5, 1, 2, math.inf])
def test_mixed_noise_has_variance_1_and_the_covariance_of_the_formula(mix):
    """3 clips of 4 frames with n numbers each: their mean square lies within 5 standard errors, sqrt(2 / n)."""
    n = 200_000
    generator = torch.Generator().manual_seed(0)
    own, shared = (torch.randn(count, 1, 1, n, generator=generator, dtype=torch.float64) for count in (12, 3))
    noise = mixed_noise(own, shared, mix).flatten(1)
    wanted = torch.eye(12, dtype=torch.float64)
    same_clip = torch.block_diag(*[torch.ones(4, 4)] * 3).bool()
    wanted[same_clip & ~wanted.bool()] = mix ** 2 / (1 + mix ** 2) if mix < math.inf else 1.0
    assert (noise @ noise.T / n - wanted).abs().max() < 5 * math.sqrt(2 / n)


def test_a_mix_of_0_is_each_frames_own_noise_and_an_infinite_one_is_the_clips():
    own, shared = torch.randn(4, *SIZE), torch.randn(2, *SIZE)
    assert torch.equal(mixed_noise(own, shared, 0), own)
    assert torch.equal(mixed_noise(own, shared, math.inf), shared[[0, 0, 1, 1]])


# The orders

def published_order(frames, length, stride, seed):
    """FreeNoise's own loop, with the shuffles of AnimateDiff-Evolved and of core: `torch.randperm` with the seed."""
    order, generator = torch.arange(frames), torch.Generator().manual_seed(seed)
    for frame in range(length, frames, stride):
        source = torch.arange(frame - length, frame - length + stride)[torch.randperm(stride, generator=generator)]
        order[frame:frame + stride] = order[source]
    return order.tolist()


@pytest.mark.parametrize("frames, length, overlap", [(64, 16, 12), (32, 16, 8), (24, 8, 4), (16, 8, 0), (17, 16, 15)])
def test_free_noise_has_the_published_order_where_the_windows_are_evenly_spaced(frames, length, overlap):
    order = free_noise_order(frames, length, overlap, SEED)
    assert order == published_order(frames, length, length - overlap, SEED)
    assert order[:length] == list(range(length))
    assert overlap == length - 1 or order != free_noise_order(frames, length, overlap, SEED + 1)


def test_free_noise_of_three_windows_by_hand():
    """Windows of 4 frames that share 2. torch.randperm(2) with seed 5 gives 1 0, then 0 1."""
    generator = torch.Generator().manual_seed(5)
    assert [torch.randperm(2, generator=generator).tolist() for _ in range(2)] == [[1, 0], [0, 1]]
    assert free_noise_order(8, 4, 2, 5) == [0, 1, 2, 3, 1, 0, 2, 3]


@pytest.mark.parametrize("frames, length, overlap", [(24, 8, 4), (26, 8, 4), (25, 8, 3), (100, 16, 5), (9, 8, 2)])
def test_every_window_of_free_noise_has_each_noise_of_the_first_one_once(frames, length, overlap):
    order = free_noise_order(frames, length, overlap, SEED)
    assert len(order) == frames
    for window in static_windows(frames, length, overlap):
        assert sorted(order[frame] for frame in window) == list(range(length))


def test_repeated_noise_begins_again_after_each_window():
    assert repeated_order(10, 4) == [0, 1, 2, 3, 0, 1, 2, 3, 0, 1]


@pytest.mark.parametrize("frames", [1, 3, 8])
def test_a_clip_that_fits_one_window_keeps_its_order(frames):
    assert free_noise_order(frames, 8, 4, SEED) == repeated_order(frames, 8) == list(range(frames))


# Core's NOISE

def zeros(frames, size=SIZE, **entries):
    return {"samples": torch.zeros(frames, *size), **entries}


def own(frames, size=SIZE):
    return comfy.sample.prepare_noise(torch.zeros(frames, *size), SEED)


def test_own_noise_and_a_mix_of_0_are_ksamplers_bit_for_bit():
    for noise in (Noise(SEED), Noise(SEED, MIXED, mix=0.0)):
        assert noise.seed == SEED and torch.equal(noise.generate_noise(zeros(6)), own(6))


@pytest.mark.parametrize("kind, mix", [(OWN, 1.0), (SHARED, 1.0), (MIXED, 1.0), (FREE_NOISE, 1.0)])
def test_torchs_seed_is_left_as_ksampler_leaves_it(kind, mix):
    """Some samplers of core's draw from it."""
    own(6)
    wanted = torch.rand(3)
    Noise(SEED, kind, mix, length=4, overlap=2).generate_noise(zeros(6))
    assert torch.equal(torch.rand(3), wanted)


def test_the_shared_noise_is_one_for_a_clip_and_no_frames_own():
    shared = Noise(SEED, SHARED, frames=3).generate_noise(zeros(6))
    assert torch.equal(shared, shared[[0, 0, 0, 3, 3, 3]]) and not torch.equal(shared[0], shared[3])
    assert not any(torch.equal(frame, other) for frame in shared for other in own(6))
    assert torch.equal(Noise(SEED, SHARED, frames=3).generate_noise(zeros(3)), shared[:3])     # fewer clips


def test_mixed_noise_is_the_formula_of_the_own_and_the_shared_noise():
    shared = Noise(SEED, SHARED).generate_noise(zeros(6))
    mixed = Noise(SEED, MIXED, 2.0).generate_noise(zeros(6))
    assert torch.allclose(mixed, math.sqrt(4 / 5) * shared + math.sqrt(1 / 5) * own(6), atol=1e-6)


def test_the_clips_of_a_batch_have_orders_and_noise_of_their_own():
    drawn = own(24, ROUND)
    free = Noise(SEED, FREE_NOISE, frames=12, length=6, overlap=0).generate_noise(zeros(24, ROUND))
    orders = [free_noise_order(12, 6, 0, SEED + clip) for clip in (0, 1)]
    assert torch.equal(free, drawn[orders[0] + [12 + frame for frame in orders[1]]]) and orders[0] != orders[1]
    repeated = Noise(SEED, REPEATED, frames=8, length=3).generate_noise(zeros(16, ROUND))
    assert torch.equal(repeated, drawn[[0, 1, 2, 0, 1, 2, 0, 1, 8, 9, 10, 8, 9, 10, 8, 9]])


@pytest.mark.parametrize("kind", KINDS)
def test_a_clip_that_was_cut_from_a_batch_has_the_noise_that_it_has_there(kind):
    """Latent From Batch leaves the frames' numbers, and core draws the noise of these numbers."""
    noise = Noise(SEED, kind, frames=8, length=4, overlap=2)
    cut, = LatentFromBatch().frombatch(zeros(16, ROUND), 8, 8)
    assert torch.equal(noise.generate_noise(cut), noise.generate_noise(zeros(16, ROUND))[8:])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", [0, 2 ** 64 - 1])
def test_every_kind_takes_the_first_and_the_last_seed(kind, seed):
    noise = Noise(seed, kind, frames=8, length=4, overlap=2).generate_noise(zeros(16))
    assert noise.shape == (16, *SIZE) and abs(noise.std() - 1) < 0.2


# The nodes

def node(kind, model=None, mix=1.0, frames=0, length=0, overlap=4):
    return FrameNoise.execute(SEED, kind, mix, frames, length, overlap, model).result[0]


def sampled(model, kind, frames=LONG, clips=1, mix=1.0):
    return VideoLDMSampler.execute(model, text(), text(12), frames, 24, 16, clips, SEED, 2, 2.0, "euler", "normal", 1.0,
                                   noise=kind, noise_mix=mix).result[0]["samples"]


def test_frame_noise_takes_windows_and_clips_from_the_model_where_they_are_0(models):
    model = windowed(models["motion"])
    assert node(FREE_NOISE, model) == Noise(SEED, FREE_NOISE, 1.0, 0, LENGTH, OVERLAP)
    assert node(FREE_NOISE, model, length=6, overlap=1) == Noise(SEED, FREE_NOISE, 1.0, 0, 6, 1)
    assert node(REPEATED, length=6) == Noise(SEED, REPEATED, 1.0, 0, 6, 4)
    assert node(MIXED, model, 3.0, frames=5) == Noise(SEED, MIXED, 3.0, 5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_sampler_starts_from_the_noise_of_frame_noise(models, kind, monkeypatch):
    started, sample = [], comfy.sample.sample

    def note(model, noise, *args, **kwargs):
        started.append(noise)
        return sample(model, noise, *args, **kwargs)
    monkeypatch.setattr(comfy.sample, "sample", note)
    model = windowed(models["motion"])
    sampled(model, kind, clips=2)
    assert torch.equal(started[0], node(kind, model, frames=LONG).generate_noise(zeros(2 * LONG)))


def test_each_kind_makes_another_video_and_the_default_is_the_old_one(models):
    model = windowed(models["motion"])
    videos = [sampled(model, kind) for kind in KINDS]
    before = VideoLDMSampler.execute(model, text(), text(12), LONG, 24, 16, 1, SEED, 2, 2.0, "euler", "normal", 1.0)
    assert torch.equal(videos[0], before.result[0]["samples"])
    assert torch.equal(videos[0], sampled(model, MIXED, mix=0.0))
    assert all((a - b).abs().max() > 1e-3 for place, a in enumerate(videos) for b in videos[:place])


# What is refused

@pytest.mark.parametrize("kind", OF_WINDOWS)
def test_noise_for_windows_is_refused_where_there_are_none(models, kind):
    for model in (models["motion"], windowed(models["motion"], CONVOLUTION), None):
        with pytest.raises(VideoLDMError, match=f"noise '{kind}' is made for windows, .*Put Frame Windows on "):
            node(kind, model)
    with pytest.raises(VideoLDMError, match="is made for windows, and none are known"):
        sampled(models["motion"], kind)


def test_impossible_windows_and_clips_are_refused():
    with pytest.raises(VideoLDMError, match="Windows of 4 frames cannot overlap by 4. Set overlap below 4"):
        node(FREE_NOISE, length=4)
    with pytest.raises(VideoLDMError, match="The latent has 6 frames, which do not divide into clips of 4"):
        node(SHARED, frames=4).generate_noise(zeros(6))


@pytest.mark.parametrize("latent, sentence", [
    ({"samples": torch.zeros(1, 16, 5, 4, 4)}, "have 5 dimensions"),
    ({"samples": torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)])}, "is of another kind of model"),
    ({"samples": torch.zeros(1, 4, 1, 60), "latent_kind": "PVDM planes"}, "are planes of a PVDM"),
    ({"samples": torch.zeros(4, *SIZE), "batch_index": [0, 1]}, "has 4 frames and 2 numbers of them")])
def test_a_latent_that_is_no_batch_of_frames_is_refused(latent, sentence):
    with pytest.raises(VideoLDMError, match=sentence):
        Noise(SEED).generate_noise(latent)


@pytest.mark.parametrize("wrong, sentence", [
    (("pink", 1.0), "Frame Noise: noise is 'pink', and it takes one of these"),
    ((MIXED, -1.0), "Frame Noise: noise_mix is -1.0, and it takes numbers from 0 to 1000"),
    ((MIXED, math.nan), "Frame Noise: noise_mix is nan")])
def test_wrong_widgets_are_refused(wrong, sentence):
    with pytest.raises(VideoLDMError, match=sentence):
        FrameNoise.execute(SEED, *wrong, 0, 0, 4)
