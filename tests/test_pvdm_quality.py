"""The figures of PVDM: what is compared with what, and what the two parts say of it."""

import math
from argparse import Namespace
from dataclasses import replace

import numpy as np
import pytest
import torch

from video_ldm.benchmarks import pvdm_parts as parts
from video_ldm.benchmarks import pvdm_quality as quality
from video_ldm.demo import pvdm, train, world
from video_ldm.demo import pvdm_small as small
from video_ldm.demo.features import features_of, load_network
from video_ldm.temporal.pvdm import Autoencoder
from video_ldm.tests import pvdm_help


def figures(distance):
    return quality.Figures(distance, distance, 1.0, 1.0, 1.0)


@pytest.mark.parametrize("first, last, said", [
    (10, 20, []), (10, 20.1, ["clip 8 (20.1) is more than 2 times"]), (90, 30, ["first clip (90.0) is not below"]),
    (math.nan, 10, ["first clip", "clip 8"])])
def test_the_last_clip_may_be_twice_as_far_as_the_first_and_no_further(first, last, said):
    rows = {quality.SHUFFLED: figures(80), quality.FIRST: figures(first), quality.LAST: figures(last)}
    failures = quality.verdict(rows)
    assert len(failures) == len(said)
    for text in said:
        assert any(text in line for line in failures)


def test_the_joint_is_measured_between_clips_and_nowhere_else():
    videos = np.zeros((2, 3, 4, 2, 2, 3), np.uint8)
    videos[:, 1], videos[:, 2] = 30, 40                 # steps of 30 and 10 at the joints
    videos[0, :, 1:3] += 100                            # motion within clips, back at their last frame
    assert quality.joint_ratio(videos, 10.0) == pytest.approx(2.0)


def test_real_clips_begin_as_the_windows_that_are_trained_on_and_the_last_ones_later():
    moments = [quality.moment(number) for number in range(300)]
    assert 0 <= min(moments) < 0.5 and 15.5 < max(moments) <= pvdm.LATEST + 2
    assert moments[4] == pvdm.start(4) and moments[5] == pvdm.start(5) + 2
    later = quality.real_clips(range(3, 5), quality.LATER)
    drive = world.clip(world.held_out_seed(4), 8, fps=4.0, start=moments[4] + 14)
    assert quality.LATER == 14 and (later[1] == drive.frames).all()


def test_every_second_frame_of_a_clip_is_what_is_rendered_for_the_metric():
    full = quality.world_clips(range(2), quality.moment, pvdm.AUTOENCODER.frames, pvdm.FPS)
    assert (full[:, ::quality.STRIDE] == quality.real_clips(range(2))).all()


@pytest.fixture
def model(monkeypatch):
    """A small random PVDM that notes the steps of its calls and whether they know a clip before."""
    made = quality.Model(pvdm_help.autoencoder().requires_grad_(False), pvdm_help.unet().requires_grad_(False))
    forward, made.calls = made.unet.forward, []

    def noted(x, tau, shape, cond=None):
        made.calls.append(None if cond is None else cond.clone())
        return forward(x, tau, shape, cond)
    monkeypatch.setattr(made.unet, "forward", noted)
    return made


def test_a_video_goes_on_from_its_own_clip_before_with_its_own_number_of_steps(model):
    planes = list(model.planes(range(3, 5), 3, (4, 2)))
    assert [call is not None for call in model.calls] == [False] * 4 + [True] * 4
    assert all(call.equal(planes[0]) for call in model.calls[4:6])
    assert all(call.equal(planes[1]) for call in model.calls[6:])


def test_videos_differ_by_their_number_and_fewer_clips_are_the_beginning_of_more(model):
    long, short = model.videos(range(3, 6), 3, (3, 2)), model.videos(range(3, 6), 1, (3, 2))
    assert long.shape == (3, 3, 8, 16, 32, 3) and (long[:, :1] == short).all()
    assert (long[0] != long[1]).any() and (long[:, 0] != long[:, 1]).any()


def test_a_models_folder_without_a_pvdm_is_a_failure_in_a_sentence(tmp_path):
    text, failures = quality.quality(Namespace(models=tmp_path, clips=8, quick=True))
    assert text == "" and len(failures) == 1 and failures[0].startswith("FAILED: PVDM was not measured: ")


# In small

def test_one_plane_restores_a_frozen_clip_and_three_planes_a_moving_one():
    torch.manual_seed(0)
    clips = np.random.default_rng(0).integers(0, 256, (2, small.FRAMES, small.HEIGHT, small.WIDTH, 3), np.uint8)
    three, one = Autoencoder(small.PARAMS), small.OnePlane(small.PARAMS)
    one.load_state_dict(three.state_dict())
    moving, frozen = (network.decode(network.encode(torch.from_numpy(clips).movedim(-1, 1) / 127.5 - 1)).detach()
                      for network in (three, one))
    assert (frozen - frozen[:, :, :1]).abs().max() < 1e-5 < 1e-2 < (moving - moving[:, :, :1]).abs().max()
    kept, given = (network.params.shape.split(network.encode(torch.ones(1, 3, 8, 32, 64))) for network in (one, three))
    assert kept[0].equal(given[0]) and not kept[1].any() and not kept[2].any() and given[1].any()


def test_the_joint_of_two_clips_is_the_end_of_one_and_the_beginning_of_the_other():
    first, second = np.arange(8)[None, :, None], 10 + np.arange(8)[None, :, None]
    assert parts.across(first, second).ravel().tolist() == [4, 5, 6, 7, 10, 11, 12, 13]


def test_enlarged_clips_are_to_the_video_network_what_the_small_ones_are_after_its_halving():
    network = load_network(train.BUNDLE / "features.safetensors")
    clips = parts.films(range(2), small.FRAMES)
    from torch.nn.functional import avg_pool3d
    halved = avg_pool3d(torch.from_numpy(parts.enlarged(clips)).float().permute(0, 4, 1, 2, 3), (1, 2, 2))
    assert halved.permute(0, 2, 3, 4, 1).numpy() == pytest.approx(clips, abs=1e-3)
    assert features_of(network, parts.enlarged(clips)).shape == (2, 64)


def test_the_networks_are_trained_once_kept_and_begin_alike(tmp_path, monkeypatch):
    monkeypatch.setattr(small, "render_clips", lambda render, count: [render(n) for n in range(count)])
    trainings = small.Trainings(tmp_path, replace(small.QUICK, videos=2, steps=1, diffusion_steps=1))
    three, one = (trainings.autoencoder(arm) for arm in (small.THREE, small.ALONE_XY))
    assert type(one) is small.OnePlane and type(three) is Autoencoder
    joint, alone = (trainings.unet(arm, three) for arm in (small.JOINT, small.UNCONDITIONAL))
    inputs = [network.input_blocks[0][0].weight[:, small.UNET.channels:] for network in (joint, alone)]
    assert inputs[0].shape == inputs[1].shape       # the inputs of the clip before
    monkeypatch.setattr(small, "Loop", None)        # a second time nothing is trained
    assert trainings.unet(small.JOINT, three).state_dict().keys() == joint.state_dict().keys()


@pytest.mark.parametrize("three, alone, joint, other, said", [
    (20, 18, (9, 5, 2), (9, 8, 9), []), (18, 18, (9, 5, 2), (9, 8, 9), ["three planes"]),
    (20, 18, (9, 8, 2), (9, 8, 9), ["distance across"]), (20, 18, (9, 5, 9), (9, 8, 9), ["motion at"])])
def test_three_planes_restore_more_and_joint_training_goes_on(three, alone, joint, other, said):
    failures = parts.verdict({small.THREE: (three, 1), small.ALONE_XY: (alone, 0)},
                             {small.JOINT: joint, small.UNCONDITIONAL: other})
    assert len(failures) == len(said) and all(text in line for text, line in zip(said, failures))
