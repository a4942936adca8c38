"""LaVie's interpolation in Latent Interpolate x4: copies of key frames, all frames made anew, windows of 61."""

from dataclasses import replace

import comfy.model_management
import comfy.sample
import pytest
import torch
from comfy.patcher_extension import WrappersMP

from video_ldm.benchmarks.memory import Tally
from video_ldm.nodes.host import sampling
from video_ldm.nodes.host.options import layer_sets, transformer_options
from video_ldm.nodes.host.windows import HANDLER
from video_ldm.nodes.interpolate import LatentInterpolate
from video_ldm.nodes.longer import ContextFrames
from video_ldm.nodes.sample import VideoLDMSampler
from video_ldm.nodes.windows import CONVOLUTION
from video_ldm.temporal.conditioning import copies_input
from video_ldm.temporal.errors import VideoLDMError
from video_ldm.temporal.params import COPIES, InputFramesParams
from video_ldm.temporal.rollout import copied_key
from video_ldm.temporal.schedules import shifting_windows, static_windows, windows_between_keys
from video_ldm.tests import input_frames_help
from video_ldm.tests.input_frames_help import SCALE, SIZE, ddim, frames_of, inputs_of, text, with_input
from video_ldm.tests.longer_help import run_extend
from video_ldm.tests.small import relative_error
from video_ldm.tests.test_frame_conditioning import heard, numbered
from video_ldm.tests.windows_help import windowed

networks = input_frames_help.networks       # fixture

RATE = 8.0
LAVIE = "lavie_interpolation"


def interpolate(model, keys, clip_frames=None, **changes):
    latent = {"samples": keys, "frame_rate": RATE} | ({"clip_frames": clip_frames} if clip_frames else {})
    widgets = dict(positive=text(), negative=text(12), latent=latent, seed=7, steps=1, times=1, cfg=2.0,
                   sampler="euler", scheduler="ddim_uniform", fps=0.0, windows=0)
    return LatentInterpolate.execute(model=model, **{**widgets, **changes}).result


def noise_for(frames, seed=7, size=SIZE):
    return comfy.sample.prepare_noise(torch.zeros(frames, *size), seed)


# Which key frame each frame gets a copy of

def test_the_copies_are_each_key_frame_four_times_without_the_first_and_the_last_two():
    keys = torch.arange(16.0)
    published = keys.repeat_interleave(4)[1:-2]
    copies = copies_input(keys.view(1, 16, 1, 1, 1), range(61)).flatten()
    assert torch.equal(copies, published)
    between = [number for number in range(1, 15) for _ in range(4)]
    assert [copied_key(frame) for frame in range(61)] == [0] * 3 + between + [15] * 2


def test_every_frame_of_every_clip_sees_the_copy_of_its_key_frame(networks):
    m, seen = inputs_of(networks[LAVIE])
    keys = frames_of(8)
    interpolate(m, keys, clip_frames=4)
    assert [call.shape for call in seen] == [(2 * 13, 8, *SIZE[1:])] * 2
    for call, clip in zip(seen, SCALE * keys.view(2, 4, *SIZE)):
        copies = torch.cat([clip[:1]] * 3 + [clip[1:2]] * 4 + [clip[2:3]] * 4 + [clip[3:]] * 2)
        assert (call[:, 4:] - copies.repeat(2, 1, 1, 1)).abs().max() < 1e-6


# What comes out

def test_four_key_frames_are_interpolated_as_by_hand(networks):
    keys = frames_of(4)
    latent, fps = interpolate(networks[LAVIE], keys, steps=4, cfg=4.0)
    copies = SCALE * keys.repeat_interleave(4, 0)[1:-2]
    expected = ddim(networks[LAVIE], noise_for(13), copies, 13, 4, 4.0)
    assert relative_error(latent["samples"], expected) < 1e-5
    assert (fps, latent["frame_rate"], latent["clip_frames"]) == (4 * RATE, 4 * RATE, 13)


def test_the_key_frames_are_made_anew_or_put_back(networks):
    keys = frames_of(3)
    anew, kept = (interpolate(networks[LAVIE], keys, keep_key_frames=keep)[0]["samples"] for keep in (False, True))
    assert torch.equal(kept[::4], keys)
    assert all(relative_error(frame, key) > 1e-2 for frame, key in zip(anew[::4], keys))
    others = [n for n in range(9) if n % 4]
    assert torch.equal(kept[others], anew[others])


def test_two_pictures_become_five_frames_and_two_passes_make_seventeen(networks):
    keys = frames_of(2)
    once = interpolate(networks[LAVIE], keys)[0]["samples"]
    twice, fps = interpolate(networks[LAVIE], keys, times=2)
    assert len(once) == 5 and twice["samples"].shape == (17, *SIZE) and fps == 16 * RATE
    again = interpolate(networks[LAVIE], once, seed=8)[0]["samples"]        # the second pass has the next seed
    assert torch.equal(twice["samples"], again)


def test_two_clips_stay_apart_and_have_noise_of_their_own(networks):
    keys = frames_of(6)
    both = interpolate(networks[LAVIE], keys, clip_frames=3)[0]["samples"]
    for clip in range(2):
        own = interpolate(networks[LAVIE], keys[3 * clip:3 * clip + 3], seed=7 + 2 * clip)[0]["samples"]
        assert torch.equal(both[9 * clip:9 * clip + 9], own)


def test_latents_of_an_odd_size_come_out_whole(networks):
    keys = frames_of(2, size=(4, 5, 7))
    assert interpolate(networks[LAVIE], keys)[0]["samples"].shape == (5, 4, 5, 7)


# Windows

def test_windows_of_a_long_clip_begin_and_end_with_key_frames_and_leave_no_frame_out():
    assert windows_between_keys(static_windows, 61, 61, 13) == [list(range(61))]
    for schedule in (static_windows, shifting_windows):
        for keys in range(17, 60):
            for step in range(3):
                frames = 4 * (keys - 1) + 1
                windows = windows_between_keys(schedule, frames, 61, 13, step)
                assert all(len(window) == 61 and window[0] % 4 == 0 for window in windows)
                assert all(len(set(one) & set(other)) >= 13 for one, other in zip(windows, windows[1:]))
                assert sorted({n for window in windows for n in window}) == list(range(frames))


def test_a_clip_of_61_frames_is_one_call_and_a_longer_one_is_windows_of_61(networks):
    m, seen = inputs_of(networks[LAVIE])
    interpolate(m, frames_of(16), cfg=1.0)
    assert [len(call) for call in seen] == [61]
    seen.clear()
    interpolate(m, frames_of(40), cfg=1.0)
    assert [len(call) for call in seen] == [61] * 3        # key frames 0..15, 12..27 and 24..39
    noise = seen[0][:, :4], seen[1][:, :4]
    assert torch.equal(noise[0][48:], noise[1][:13])        # a frame's noise is the same in both windows
    keys = SCALE * frames_of(40)
    for call, first in zip(seen, (0, 12, 24)):
        copies = keys[first:first + 16].repeat_interleave(4, 0)[1:-2]
        assert (call[:, 4:] - copies).abs().max() < 1e-6


def short_windows(model, length=9, overlap=5, **changes):
    return windowed(model, length=length, overlap=overlap, **changes)


def test_windows_are_joined_as_by_hand_and_a_clip_of_one_window_is_one_call(networks):
    """9 frames with windows of 9; and 13 frames: 0..8 and 4..12 share 5, by the pyramid 5/6 to 1/6 of the first."""
    m, keys = networks[LAVIE], frames_of(4)
    assert torch.equal(interpolate(short_windows(m), keys[:3])[0]["samples"], interpolate(m, keys[:3])[0]["samples"])
    noise = noise_for(13)
    copies = SCALE * keys.repeat_interleave(4, 0)[1:-2]
    first, last = (ddim(m, noise[part], copies[part], 9, 1, 2.0) for part in (slice(0, 9), slice(4, 13)))
    expected = torch.zeros(13, *SIZE)
    share = torch.tensor([5, 4, 3, 2, 1]) / torch.tensor([6, 6, 6, 6, 6])
    share = torch.cat([torch.ones(4), share, torch.zeros(4)])[:, None, None, None]
    expected[:9] += share[:9] * first
    expected[4:] += (1 - share[4:]) * last
    assert relative_error(interpolate(short_windows(m), keys)[0]["samples"], expected) < 1e-5


def test_windows_are_as_long_as_the_clips_that_the_network_was_trained_on(networks):
    """Of 7 key frames: windows of 4, which share 1; windows of 2; and 2 are the fewest."""
    for trained, windows in ((13, [13] * 2), (5, [5] * 6), (3, [5] * 6)):
        m, seen = inputs_of(with_input(networks[LAVIE], InputFramesParams(COPIES), frames=trained))
        interpolate(m, frames_of(7), cfg=1.0)
        assert [len(call) for call in seen] == windows


def test_frame_windows_on_the_model_sets_the_windows(networks):
    m, seen = inputs_of(short_windows(networks[LAVIE], length=12, overlap=2))
    interpolate(m, frames_of(7), cfg=1.0)
    assert [len(call) for call in seen] == [9] * 5          # three key frames each, two of them shared
    with pytest.raises(VideoLDMError, match="looped windows.*static or shifting"):
        interpolate(short_windows(networks[LAVIE], schedule="looped"), frames_of(7))
    with pytest.raises(VideoLDMError, match="windows of 4 frames.*Set length to 5 or more"):
        interpolate(short_windows(networks[LAVIE], length=4, overlap=1), frames_of(7))
    assert HANDLER not in networks[LAVIE].model_options
    whole, seen = inputs_of(short_windows(networks[LAVIE], mode=CONVOLUTION))
    interpolate(whole, frames_of(17), cfg=1.0)
    assert [len(call) for call in seen] == [65]             # convolution in time: all frames at once


def test_the_memory_of_an_interpolation_does_not_grow_with_the_clip(networks):
    """Beyond the latents themselves, of which a few copies are held. What the network itself takes is one window's."""
    (m, seen), size = inputs_of(short_windows(networks[LAVIE], overlap=1)), (4, 32, 32)
    m.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "forget",
                           lambda executor, *args, **options: (seen.clear(), executor(*args, **options))[1])
    most = []
    for count in (5, 65):
        keys = frames_of(count, size=size)
        with torch.no_grad(), Tally() as tally:
            interpolate(m, keys, cfg=1.0)
        most.append(sum(tally.most.values()))
    latents = 240 * 4 * 4 * 32 * 32         # bytes of the 240 frames more
    assert latents < most[1] - most[0] < 8 * latents


def test_core_reserves_memory_for_one_window(networks, monkeypatch):
    asked = []
    m = networks[LAVIE].clone()
    monkeypatch.setattr(m.model, "memory_required", lambda shape, **options: asked.append(shape) or 1.0)
    m, _ = inputs_of(m)
    interpolate(m, frames_of(40), cfg=1.0)
    assert max(shape[0] for shape in asked) == 2 * 92       # 61 frames of both conditions, times 1.5 for the layers


# What goes with the frames

def test_each_frame_hears_the_text_of_its_own_or_of_its_key_frame(networks):
    copies = [0] * 4 + [1] * 4 + [2] * 4 + [3]
    for count, expected in ((13, list(range(13))), (4, copies), (1, [0] * 13)):
        m, calls = heard(networks[LAVIE])
        interpolate(m, frames_of(4), positive=numbered(count), cfg=1.0)
        assert calls == [expected]
    m, calls = heard(short_windows(networks[LAVIE]))
    interpolate(m, frames_of(4), positive=numbered(13), cfg=1.0)
    assert calls == [list(range(9)), list(range(4, 13))]
    m, calls = heard(networks[LAVIE])
    interpolate(m, frames_of(2), positive=numbered(17), cfg=1.0, times=2)
    assert calls == [[0, 4, 8, 12, 16], list(range(17))]


def test_progress_counts_the_steps_of_each_clip_and_pass(networks, monkeypatch):
    shown = []
    monkeypatch.setattr(sampling.RolloutProgress, "show", lambda self, value, pictures: shown.append(value))
    m, _ = inputs_of(networks[LAVIE])
    interpolate(m, frames_of(4), clip_frames=2, times=2, steps=3)
    assert shown == [1, 2, 3, 3, 4, 5, 6, 6, 7, 8, 9, 9, 10, 11, 12, 12]


def test_a_cancel_ends_the_interpolation_within_a_step(networks):
    m, seen = inputs_of(short_windows(networks[LAVIE], overlap=1))

    def cancel(executor, *args, **kwargs):
        comfy.model_management.interrupt_current_processing()
        return executor(*args, **kwargs)
    m.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "cancel", cancel)
    with pytest.raises(sampling.Cancelled):
        interpolate(m, frames_of(7), cfg=1.0)
    assert len(seen) == 1


# The wrong model, and key frames that cannot be used

def test_key_frame_models_are_refused_in_latent_interpolate(networks):
    with pytest.raises(VideoLDMError, match="LaVie's base text-to-video network.*make key frames.*Load Video Model"):
        interpolate(networks["lavie_base"], frames_of(3))


def test_other_layers_on_the_model_of_lavies_interpolation_are_refused(networks):
    m = networks[LAVIE].clone()
    transformer_options(m)["video_ldm/other"] = replace(layer_sets(networks["a4"])[0], title="other layers")
    with pytest.raises(VideoLDMError, match="frame interpolation.*also has other temporal layers .other layers"):
        interpolate(m, frames_of(3))


def test_lavies_interpolation_is_sent_to_its_own_node_by_all_others(networks):
    m, sentence = networks[LAVIE], "LaVie's frame interpolation network.*Latent Interpolate x4 alone"
    latent = {"samples": frames_of(1)}
    with pytest.raises(VideoLDMError, match=sentence):
        ContextFrames.execute(m, "0", 1.0, latent=latent)
    with pytest.raises(VideoLDMError, match=sentence):
        run_extend(m, length=6, latent=latent)
    with pytest.raises(VideoLDMError, match=sentence):
        VideoLDMSampler.execute(m, text(), text(12), 5, 24, 16, 1, 7, 1, 1.0, "euler", "normal", 1.0)
    with pytest.raises(VideoLDMError, match=sentence):
        comfy.sample.sample(m, noise_for(5), 1, 1.0, "euler", "normal", text(), text(12), torch.zeros(5, *SIZE),
                            disable_pbar=True)


@pytest.mark.parametrize("latent, sentence", [
    ({"samples": frames_of(1), "frame_rate": RATE}, "There is one key frame"),
    ({"samples": frames_of(3)}, "does not say its frame rate"),
    ({"samples": torch.zeros(3, 16, 2, 3), "frame_rate": RATE}, "The key frames have 16 latent channels"),
    ({"samples": frames_of(3), "frame_rate": RATE, "latent_kind": "SDXL"}, "another kind of model .SDXL.*Decode them"),
    ({"samples": torch.zeros(3, 4, 1, 2, 3), "frame_rate": RATE}, "The key frames have 5 dimensions")])
def test_key_frames_that_cannot_be_interpolated_are_refused(networks, latent, sentence):
    with pytest.raises(VideoLDMError, match=sentence):
        interpolate(networks[LAVIE], None, latent=latent)


def test_a_clip_says_of_what_kind_its_latents_are_and_another_kind_is_refused(networks):
    base = networks["lavie_base"]
    made = VideoLDMSampler.execute(base, text(), text(12), 4, 24, 16, 1, 7, 1, 1.0, "euler", "normal", 1.0).result[0]
    assert made["latent_kind"] == "SD15" == interpolate(networks[LAVIE], None, latent=made)[0]["latent_kind"]
    of_sdxl = {"samples": frames_of(4), "latent_kind": "SDXL"}
    for run in (lambda: ContextFrames.execute(base, "0, 1, 2, 3", 1.0, latent=of_sdxl),
                lambda: run_extend(base, length=9, latent=of_sdxl),
                lambda: VideoLDMSampler.execute(base, text(), text(12), 4, 24, 16, 1, 7, 1, 1.0, "euler", "normal",
                                                0.5, of_sdxl)):
        with pytest.raises(VideoLDMError, match="latents of another kind of model .SDXL.*takes those of SD15"):
            run()
