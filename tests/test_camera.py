"""CameraCtrl's rays, network and files, against the published code: docs/papers.md#cameractrl."""

import math

import pytest
import torch

from video_ldm.temporal import camera_control
from video_ldm.temporal.camera import Cameras, rays
from video_ldm.temporal.camera_control import CameraControl, CameraInCall
from video_ldm.temporal.camera_path import PRESETS, preset_path, read_path
from video_ldm.temporal.errors import VideoLDMError
from video_ldm.temporal.families import load_camera, load_sparse_control, load_temporal
from video_ldm.temporal.layers import GivenCall, MotionParams
from video_ldm.temporal.layers.motion import MotionModule
from video_ldm.tests import camera_help
from video_ldm.tests.camera_help import RECORDED, flat, nested, recorded_file
from video_ldm.tests.formats_help import PUBLISHED, motion_shapes, motion_tensors, narrow, saved
from video_ldm.tests.small import relative_error
from video_ldm.tests.sparse_help import ones, weights

FRAMES, HEIGHT, WIDTH = 4, 32, 48
SIZE = HEIGHT // 8, WIDTH // 8


def network_of(folder, tensors: dict, name: str = "camera.safetensors") -> CameraControl:
    file = load_camera(saved(folder, name, tensors))
    network = CameraControl(file.params)
    network.load_state_dict(file.tensors)
    return network.requires_grad_(False)


def cameras() -> Cameras:
    path = read_path("https://example.org/video\n" + "\n".join(RECORDED["lines"]))
    return path.cameras(range(FRAMES), FRAMES)


def error_of(found: torch.Tensor, recorded: list) -> float:
    return relative_error(found.flatten()[::97], torch.tensor(recorded))


# The rays

def test_the_rays_are_those_of_the_published_code():
    found = rays(cameras(), HEIGHT, WIDTH)
    assert found.shape == (FRAMES, 6, HEIGHT, WIDTH) and found.dtype == torch.float32
    assert error_of(found, RECORDED["rays"]) < 1e-6


def test_a_ray_is_its_moment_and_its_direction_through_the_middle_of_a_pixel():
    """The first camera looks ahead from the middle: by hand, at a size where both sides fit 16:9."""
    poses = torch.eye(4, dtype=torch.float64).repeat(2, 1, 1)
    poses[1, :3, 3] = torch.tensor([1.0, 2.0, 3.0])
    lens = torch.tensor([[0.5, 0.5 * 16 / 9, 0.5, 0.5]], dtype=torch.float64).expand(2, -1)
    found = rays(Cameras(poses, lens), 9, 16).double()
    seen = torch.tensor([(3 + 0.5 - 8) / 8, (5 + 0.5 - 4.5) / 8, 1.0], dtype=torch.float64)
    seen /= seen.norm()
    assert torch.allclose(found[0, :, 5, 3], torch.cat([torch.zeros(3, dtype=torch.float64), seen]), atol=1e-6)
    moment = torch.linalg.cross(torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64), seen)
    assert torch.allclose(found[1, :, 5, 3], torch.cat([moment, seen]), atol=1e-6)


def test_poses_are_relative_to_the_first_of_the_frames_that_are_seen():
    path = read_path("\n".join(RECORDED["lines"]))
    part = path.cameras([2, 3], FRAMES).relative
    assert torch.allclose(part[0], torch.eye(4, dtype=torch.float64))
    poses = path.cameras(range(FRAMES), FRAMES).poses
    assert torch.allclose(part[1], torch.linalg.inv(poses[2]) @ poses[3])


@pytest.mark.parametrize("size, focal", [((256, 384), (0.5 * 256 * 16 / 9, 0.9 * 256)),
                                         ((180, 640), (0.5 * 640, 0.9 * 640 * 9 / 16))])
def test_a_picture_of_another_shape_is_cut_out_of_one_of_16_to_9(size, focal):
    from video_ldm.temporal.camera import lens_in_pixels
    found = lens_in_pixels(torch.tensor([[0.5, 0.9, 0.5, 0.4]], dtype=torch.float64), *size)[0].tolist()
    assert found == pytest.approx([*focal, 0.5 * size[1], 0.4 * size[0]])


# The network

def test_the_features_are_those_of_the_published_code(tmp_path):
    features = network_of(tmp_path, recorded_file())(rays(cameras(), HEIGHT, WIDTH))
    for found, recorded in zip(features, RECORDED["features"], strict=True):
        assert error_of(found, recorded) < 1e-5


def module_of(channels: int) -> MotionModule:
    module = MotionModule(MotionParams(channels, 8), camera_control.TORCH)
    module.load_state_dict(weights({key: list(value.shape) for key, value in module.state_dict().items()}))
    return module.requires_grad_(False)


def merged(network, name: str, strength: float = 1.0):
    """(a motion module's output with the camera, without it)."""
    site, level = next((site, level) for site, level in network.params.merges if site.name == name)
    channels = network.params.channels[level]
    x = ones((2 * FRAMES, channels, SIZE[0] >> level, SIZE[1] >> level), 55)
    call = CameraInCall(network, strength, (("one", cameras),), SIZE, {})
    module = module_of(channels)
    return module(x, GivenCall(FRAMES, merge=call.at(site, x, FRAMES))), module(x, GivenCall(FRAMES))


@pytest.mark.parametrize("name", RECORDED["modules"])
def test_a_motion_module_with_the_camera_is_that_of_the_published_code(tmp_path, monkeypatch, name):
    network = network_of(tmp_path, recorded_file())
    found, without = merged(network, name)
    assert error_of(found, RECORDED["modules"][name]) < 1e-5 < 0.1 < error_of(without, RECORDED["modules"][name])
    monkeypatch.setattr("video_ldm.temporal.layers.motion.slice_length", lambda pixels: 5)      # in slices, as on a CPU
    assert error_of(merged(network, name)[0], RECORDED["modules"][name]) < 1e-5


def test_clips_with_cameras_of_their_own_get_them_in_each_condition(tmp_path):
    network = network_of(tmp_path, recorded_file())
    site, _ = network.params.merges[0]
    x = ones((4 * FRAMES, 32, *SIZE), 55)         # two conditions of two clips

    def features(*clips):
        return CameraInCall(network, 1.0, clips, SIZE, {}).at(site, x, FRAMES).features.unflatten(0, (4, -1))
    still = ("still", lambda: read_path("0: x 0").cameras(range(FRAMES), FRAMES))
    first, second = features(("one", cameras))[0], features(still)[0]
    assert relative_error(first, second) > 0.1
    for found, wanted in zip(features(("one", cameras), still), (first, second, first, second), strict=True):
        assert torch.equal(found, wanted)


def test_where_a_node_changes_the_size_of_a_blocks_features_the_cameras_follow(tmp_path):
    network = network_of(tmp_path, recorded_file())
    call = CameraInCall(network, 1.0, (("one", cameras),), SIZE, {})
    site, x = network.params.merges[0][0], ones((FRAMES, 32, 2, 3), 55)
    row = torch.tensor([[[[0.0, 1.0]]]])
    assert camera_control.resized(row, (1, 4)).tolist() == [[[[0.0, 0.25, 0.75, 1.0]]]]
    assert camera_control.resized(row, (1, 1)).item() == 0.5 and camera_control.resized(row, row.shape[2:]) is row
    assert call.at(site, x, FRAMES).features.shape == (2 * 3, FRAMES, 32)
    assert torch.isfinite(module_of(32)(x, GivenCall(FRAMES, merge=call.at(site, x, FRAMES)))).all()


def test_strength_zero_leaves_the_input_of_the_attention_as_it_is(tmp_path):
    network = network_of(tmp_path, recorded_file())
    found, without = merged(network, "input_1_post_attn_0", 0.0)
    assert torch.equal(found, without)


def test_the_motion_modules_get_the_features_of_their_own_level(tmp_path):
    params = network_of(tmp_path, recorded_file()).params
    assert (params.channels, params.blocks, params.frames) == ((32, 64), 2, 16)
    assert {site.name.removesuffix("_post_attn_0"): level for site, level in params.merges} == {
        "input_1": 0, "input_3": 1, "output_0": 1, "output_1": 1, "output_2": 0, "output_3": 0}


def test_few_windows_are_kept_and_the_oldest_makes_room(tmp_path):
    network, kept = network_of(tmp_path, recorded_file()), {}
    made = []
    network.register_forward_hook(lambda *_: made.append(1))
    for name in (*"abca", *"de", "a"):
        CameraInCall(network, 1.0, ((name, cameras),), SIZE, kept).features(name, cameras, torch.zeros(1))
    assert len(made) == 6 and [key[0] for key in kept] == ["c", "d", "e", "a"]


# Files

@pytest.mark.parametrize("change", [
    dict, flat, lambda t: {f"module.{key}": value for key, value in t.items()},
    lambda t: {key.replace("dict.", "dict/", 1): value for key, value in t.items()},
    lambda t: {key.replace("dict.", "dict.module.", 1): value for key, value in t.items()},
    lambda t: t | camera_help.tables(),
], ids=["joined", "pruned", "module", "slash", "module inside", "tables"])
def test_a_file_is_read_in_every_published_form(tmp_path, change):
    features = network_of(tmp_path, change(recorded_file()))(rays(cameras(), HEIGHT, WIDTH))
    assert error_of(features[1], RECORDED["features"][1]) < 1e-5


def test_a_checkpoint_of_the_authors_form_is_read(tmp_path):
    path = tmp_path / "CameraCtrl.ckpt"
    torch.save(nested(recorded_file() | camera_help.tables()), path)
    network = CameraControl(load_camera(path).params)
    network.load_state_dict(load_camera(path).tensors)
    assert error_of(network(rays(cameras(), HEIGHT, WIDTH))[0], RECORDED["features"][0]) < 1e-5


def test_the_published_layout_is_accepted_whole(tmp_path):
    """With a tenth of the channels: four levels, and the 20 motion modules of AnimateDiff v3."""
    shapes = {key: [384 if size == 38 else size for size in shape]
              for key, shape in narrow(PUBLISHED["cameractrl_adv3"]).items() if not key.endswith(".pe")}
    file = load_camera(saved(tmp_path, "camera.safetensors", weights(shapes)))
    v3 = load_temporal(saved(tmp_path, "v3.safetensors", motion_tensors(
        {key: shape for key, shape in narrow(PUBLISHED["ad_v3_sd15_mm"]).items()})))
    assert file.params.channels == (32, 64, 128, 128) and len(file.params.merges) == 20
    assert file.misfit(v3.params) == ""


def without(tensors: dict, *parts: str) -> dict:
    return {key: value for key, value in tensors.items() if not any(part in key for part in parts)}


MERGE = ("attention_processor_state_dict.up_blocks.0.motion_modules.1.temporal_transformer.transformer_blocks.0."
         "attention_blocks.0.processor.qkv_merge.weight")


@pytest.mark.parametrize("change, sentence", [
    (lambda t: without(t, "encoder_conv_in.bias"), r"1 of its .* tensors are missing \(the first: conv_in.bias\)"),
    (lambda t: without(t, "up_blocks.0.motion_modules.1"), r"2 of its .* \(the first: merges.output_1_post_attn_0"),
    (lambda t: t | {"pose.weight": torch.zeros(3)}, r"holds 1 tensors that it does not have \(the first: pose.weight"),
    (lambda t: t | {MERGE: torch.zeros(64, 8)}, r"merges.output_1_post_attn_0.weight has shape \[64, 8\]"),
    (lambda t: t | {MERGE: torch.zeros(64, 64, dtype=torch.int8)}, "as int8, which is not"),
    (lambda t: t | camera_help.tables(0.5), "table of frame positions .* is not the one that AnimateDiff computes"),
    (lambda t: t | {"pose_encoder_state_dict.encoder_down_conv_blocks.900000000.0.block1.weight": torch.zeros(3)},
     "its names number more layers than it holds"),
    (lambda t: t | {"encoder_conv_in.bias": torch.zeros(32)}, "are the same tensor"),
    (lambda t: t | {"pose_encoder_state_dict.encoder_down_conv_blocks.0.0.block1.weight": torch.zeros(33, 33, 3, 3)},
     r"no network has its sizes \(its levels have \(33, 64\) channels"),
], ids=["no bias", "no merge", "more", "shape", "quantised", "table", "huge", "twice", "channels"])
def test_damaged_files_are_refused_by_what_is_wrong(tmp_path, change, sentence):
    path = saved(tmp_path, "bad.safetensors", change(recorded_file()))
    with pytest.raises(VideoLDMError, match=sentence) as caught:
        load_camera(path)
    assert str(caught.value).startswith("bad.safetensors looks like a CameraCtrl file (camera moves for") or (
        "int8" in sentence)
    assert str(caught.value).endswith(".")


def test_a_file_in_the_wrong_slot_is_sent_to_its_own_in_both_directions(tmp_path):
    camera = saved(tmp_path, "CameraCtrl.safetensors", recorded_file())
    motion = saved(tmp_path, "v3_sd15_mm.safetensors", motion_tensors(motion_shapes((32,), middle=False)))
    for load in (load_temporal, load_sparse_control):
        with pytest.raises(VideoLDMError, match=r"^CameraCtrl.safetensors is a CameraCtrl file \(camera moves for "
                                                r"AnimateDiff v3\), not .* Load it with Camera Motion.$"):
            load(camera)
    with pytest.raises(VideoLDMError, match="^v3_sd15_mm.safetensors is an AnimateDiff v3 motion module, not a "
                                            "CameraCtrl file for AnimateDiff v3. Load it with Load Temporal Layers.$"):
        load_camera(motion)


def test_the_file_for_stable_video_diffusion_is_refused_by_name(tmp_path):
    tensors = {key.replace("motion_modules.", "attentions."): value for key, value in recorded_file().items()}
    with pytest.raises(VideoLDMError, match=r"is a CameraCtrl file for another model than AnimateDiff .* not a"):
        load_camera(saved(tmp_path, "CameraCtrl_svd.safetensors", tensors))


# The path

def ahead(pose: torch.Tensor) -> list[float]:
    """The direction in which a camera looks: right, down, ahead."""
    return [round(value, 4) for value in (pose[:3, 2] + 0.0).tolist()]


@pytest.mark.parametrize("line, place, direction", [
    ("pan 90", (0, 0, 0), (1, 0, 0)), ("tilt 90", (0, 0, 0), (0, -1, 0)), ("roll 90", (0, 0, 0), (0, 0, 1)),
    ("right 1, up 2, forward 3", (1, -2, 3), (0, 0, 1)), ("left 1, down 2, back 3", (-1, 2, -3), (0, 0, 1)),
    ("x 1, y 2, z 3", (1, -2, 3), (0, 0, 1)), ("orbit 90", (2, 0, 2), (-1, 0, 0)),
    ("pan 90, forward 1", (0, 0, 1), (1, 0, 0)),
])
def test_each_word_turns_or_moves_the_camera_the_way_it_says(line, place, direction):
    pose = read_path(f"0: {line}").cameras([0], 1).poses[0]
    assert torch.allclose(pose[:3, 3], torch.tensor(place, dtype=torch.float64), atol=1e-9)
    assert ahead(pose) == [round(value, 4) + 0.0 for value in direction]


def test_roll_is_clockwise_and_zoom_multiplies_the_lens():
    found = read_path("0: roll 90, zoom 2").cameras([0], 1)
    assert torch.allclose(found.poses[0, :3, 0], torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64), atol=1e-9)
    assert found.lenses[0].tolist() == pytest.approx([0.96, 0.96 * 16 / 9, 0.5, 0.5])


def test_between_its_lines_the_camera_moves_evenly_and_each_word_by_itself():
    path = read_path("4: pan 40\n8: forward 2\n# a comment\n-1: pan 0")
    found = path.cameras(range(11), 11)
    pans = [math.degrees(math.atan2(pose[0, 2], pose[2, 2])) for pose in found.poses]
    assert pans == pytest.approx([0, 10, 20, 30, 40, 40 * 5 / 6, 40 * 4 / 6, 20, 40 * 2 / 6, 40 / 6, 0], abs=1e-6)
    assert found.poses[:, 2, 3].tolist() == pytest.approx([0, 0.25, 0.5, 0.75, 1, 1.25, 1.5, 1.75, 2, 2, 2])


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_goes_from_rest_to_its_end_in_the_last_frame(name):
    path = preset_path(name, 0.5)
    found = path.cameras(range(9), 9)
    assert torch.equal(found.poses[0], torch.eye(4, dtype=torch.float64))
    moved = (found.poses - found.poses[0]).abs().amax((1, 2)) + (found.lenses - found.lenses[0]).abs().amax(1)
    assert bool((moved[1:] > moved[:-1]).all()) != (name == "still")
    assert path.check(9) == "" and torch.equal(read_path(path.in_words).cameras([8], 9).poses, found.poses[8:])


@pytest.mark.parametrize("text, sentence", [
    ("pan 3", "Line 1 of the camera, 'pan 3', does not begin with a frame number"),
    ("0: pan", "has 'pan' where a move is due"), ("0: fly 3", "has 'fly 3' where a move is due: one of pan"),
    ("0: pan 3 tilt 4", "has 'pan 3 tilt 4' where a move is due"), ("0: right 1, left 2", "has left beside another"),
    ("0:", "names no move"), ("0: zoom 0", "has zoom 0, and it goes from 0.1 to 10"),
    ("0: pan 1e9", "has pan 1e9, and it goes from -3600"), ("0: x 1e999", "goes from -1000"),
    ("1 2 3", "is no line of a RealEstate10K pose file: such a line has 19 numbers, and this one 3 words"),
    (" ".join(["1"] * 19), "has a matrix that is no turn of a camera"),
    (RECORDED["lines"][0].replace("0.500000000", "640", 1), "has the lens 640, .* shares of the picture's width"),
    (RECORDED["lines"][0] + "\n3: pan 4", "Line 2 of the camera, '3: pan 4', is no line of a RealEstate10K"),
    (RECORDED["lines"][0].rsplit(" ", 1)[0] + " nan", "is no line of a RealEstate10K pose file"),
])
def test_a_text_that_is_no_path_is_refused_by_its_line(text, sentence):
    with pytest.raises(VideoLDMError, match=sentence) as caught:
        read_path(text)
    assert str(caught.value).endswith(".")


@pytest.mark.parametrize("text, length, sentence", [
    ("-9: pan 3", 8, "is for frame -9, and the video has 8 frames: -1 is the last, and -8 is the first"),
    ("7: pan 3\n-1: pan 4", 8, "Two lines of the camera, .* are for frame 7"),
    ("\n".join(RECORDED["lines"]), 5, "pose lines of the camera are for 4 frames, and the video has 5"),
])
def test_a_path_that_does_not_fit_the_video_is_refused(text, length, sentence):
    with pytest.raises(VideoLDMError, match=sentence):
        read_path(text).check(length)


def test_what_lies_behind_the_end_is_warned_of():
    assert "name frame 20, and the last frame of the video is 7" in read_path("20: pan 30").check(8)
    assert "has 4 pose lines, and the video has 3 frames" in read_path("\n".join(RECORDED["lines"])).check(3)
    assert read_path("\n".join(RECORDED["lines"])).check(4) == "" and read_path("\n \n") is None
