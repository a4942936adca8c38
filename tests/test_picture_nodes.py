"""Layers that move a given picture, under ComfyUI's own sampling in this process: ways in, windows, clips, refusals."""

import pytest
import torch

from video_ldm.nodes.interpolate import LatentInterpolate
from video_ldm.nodes.layer_strength import LayerStrength
from video_ldm.nodes.longer import ContextFrames, ExtendVideo
from video_ldm.nodes.picture_motion import PictureMotionNode
from video_ldm.nodes.windows import WINDOWS, FrameWindows
from video_ldm.temporal.errors import VideoLDMError
from video_ldm.tests import attach_help, picture_help
from video_ldm.tests.attach_help import HEIGHT, WIDTH, noise_of, partly_loaded, prediction, text, with_layers
from video_ldm.tests.formats_help import saved
from video_ldm.tests.host.checkpoints import FRAMES
from video_ldm.tests.small import relative_error

folder, state, image = attach_help.folder, attach_help.state, attach_help.image     # fixtures
PIA, I2V = "pia.safetensors", "i2v.safetensors"


@pytest.fixture(scope="module", autouse=True)
def files(folder):
    saved(folder, PIA, picture_help.pia_state())
    saved(folder, I2V, picture_help.i2v_state())


@pytest.fixture(scope="module")
def deep():
    """An image MODEL with two ResBlocks in its level."""
    found = picture_help.deep_unet_state()
    model = attach_help.load_model(found)
    yield model
    attach_help.assert_untouched(model, found)


def pictures(count=1, seed=3):
    return torch.randn(count, 4, HEIGHT // 8, WIDTH // 8, generator=torch.Generator().manual_seed(seed))


def shown(model, picture=None, frames="0", guidance=1.0):
    latent = {"samples": pictures() if picture is None else picture}
    return ContextFrames.execute(model, frames, guidance, latent).result[0]


def moved(model, amount="small", motion_scale=0.8):
    return PictureMotionNode.execute(model, amount, motion_scale).result[0]


def test_pia_sees_the_picture_scaled_as_the_model_has_it_in_both_prompts(image, state):
    """Against the same layers without a picture, on an image MODEL whose first convolution adds PIA's channels."""
    picture, noise = pictures(), noise_of()
    found = prediction(shown(moved(with_layers(image, PIA), "new style, large"), picture, "-1"), noise=noise, cfg=3.0)
    affinity = torch.tensor([0.2, 0.2, 0.2, 0.5])[:, None, None, None].expand(-1, 1, *picture.shape[2:])
    further = torch.cat([affinity, 0.18215 * picture.expand(FRAMES, -1, -1, -1)], dim=1)
    added = torch.nn.functional.conv2d(further, picture_help.pia_state()["conv_in.weight"][:, 4:], padding=1)
    other = attach_help.load_model(state)
    other.model.diffusion_model.input_blocks[0][0].register_forward_hook(
        lambda module, args, output: output + added.repeat(len(output) // FRAMES, 1, 1, 1))
    assert relative_error(found, prediction(hidden(with_layers(other, PIA)), noise=noise, cfg=3.0)) < 1e-5
    assert relative_error(found, prediction(hidden(with_layers(image, PIA)), noise=noise, cfg=3.0)) > 1e-2


def hidden(model):
    """A clone that hides its picture, as context guidance does."""
    from video_ldm.nodes.host.options import set_clip_options
    m = shown(model, torch.zeros(1, 4, HEIGHT // 8, WIDTH // 8))
    set_clip_options(m, hide_context=True)
    return m


def test_a_set_of_pictures_is_one_for_each_clip(image):
    video, noise = with_layers(image, PIA, frames_per_clip=FRAMES), noise_of(2)
    both = prediction(shown(video, pictures(2)), noise=noise)
    each = [prediction(shown(video, pictures(2)[n:n + 1]), noise=noise) for n in (0, 1)]
    assert relative_error(both[:FRAMES], each[0][:FRAMES]) < 1e-5
    assert relative_error(both[FRAMES:], each[1][FRAMES:]) < 1e-5
    assert relative_error(each[0], each[1]) > 1e-2


@pytest.mark.parametrize("name", [PIA, I2V])
def test_in_windows_the_frames_are_those_of_the_whole_clip(image, deep, name):
    base = image if name == PIA else deep
    video = moved(with_layers(base, name), "large")
    parts = FrameWindows.execute(video, WINDOWS, FRAMES, 0, "static", "flat", 8).result[0]
    noise = noise_of(frames=2 * FRAMES)
    found = prediction(shown(parts), noise=noise)
    second = shown(parts)
    assert torch.equal(found, prediction(second, noise=noise))
    alone = prediction(shown(video), noise=noise[FRAMES:])
    first = prediction(shown(video), noise=noise[:FRAMES])
    assert relative_error(found[:FRAMES], first) < 1e-5
    assert relative_error(found[FRAMES:], alone) > 1e-4         # frames 4 to 7, not 0 to 3


def test_settings_travel_with_the_model_and_the_default_is_small(image, deep):
    video = with_layers(image, PIA)
    small, large = prediction(shown(moved(video))), prediction(shown(moved(video, "large")))
    assert torch.equal(prediction(shown(video)), small) and relative_error(large, small) > 1e-4
    video = with_layers(deep, I2V)
    usual, still = prediction(shown(moved(video))), prediction(shown(moved(video, motion_scale=0.0)))
    assert torch.equal(prediction(shown(video)), usual) and relative_error(still, usual) > 1e-4


@pytest.mark.parametrize("name", [PIA, I2V])
def test_frames_of_strength_0_are_the_image_models_and_strength_0_needs_no_picture(image, deep, name):
    base = image if name == PIA else deep
    alone = prediction(with_layers(base, name, 0.0))
    assert torch.equal(alone, prediction(base))
    weak = LayerStrength.execute(with_layers(base, name), "1 0 1 0", "hold").result
    found = prediction(shown(weak[0]))
    assert torch.equal(found[[1, 3]], alone[[1, 3]]) and relative_error(found[[0, 2]], alone[[0, 2]]) > 1e-3
    assert "also see the given picture" in weak[1]


def test_context_guidance_hides_the_picture_from_pia_and_is_refused_by_animatelcm(image, deep):
    video = with_layers(image, PIA)
    seen, without = prediction(shown(video)), prediction(hidden(video))
    guided = prediction(shown(video, guidance=2.0))
    assert relative_error(guided, 2 * seen - without) < 1e-4
    with pytest.raises(VideoLDMError, match="were never trained without them. Set it to 1"):
        shown(with_layers(deep, I2V), guidance=2.0)


def test_the_report_says_that_the_pictures_own_frame_is_made_anew(image):
    latent = {"samples": pictures()}
    report = ContextFrames.execute(with_layers(image, PIA), "-1", 1.0, latent).result[1]
    assert report == ("Frame -1: seen by further channels of the image model's first convolution. Every frame of the "
                      "clip is made anew, this one too, so it is close to the picture and not equal to it.")
    told = PictureMotionNode.execute(with_layers(image, PIA), "large", 0.8).result[1]
    assert told == ("pia.safetensors: amount 'large'. Affinity to the picture by the distance in frames: 1, 0.8, 0.7, "
                    "0.7, 0.7, 0.7, 0.7, 0.7, 0.7, 0.7, 0.6, 0.5.")


def extended(model, overlap=1, **start):
    return ExtendVideo.execute(model, text(), text(12), FRAMES, WIDTH, HEIGHT, 1, 1, 1.0, "euler", "normal", 7, 1.0,
                               overlap, "stop", **start).result


@pytest.mark.parametrize("name", [PIA, I2V])
def test_extend_video_goes_on_from_one_picture(image, deep, name):
    video, start = with_layers(image if name == PIA else deep, name), pictures()
    latent, _, report = extended(video, latent={"samples": start})
    assert latent["samples"].shape[0] == 7 and torch.equal(latent["samples"][:1], start)
    assert "go" in report and "seen " in report
    other = extended(video, latent={"samples": pictures(seed=9)})[0]
    assert relative_error(other["samples"][1:], latent["samples"][1:]) > 1e-3


@pytest.mark.parametrize("name, act, words", [
    (PIA, lambda model: prediction(model), "a PIA file .* move a given picture, and none is connected"),
    (I2V, lambda model: prediction(model), "move a given picture, and none is connected. Connect Context Frames"),
    (PIA, lambda model: shown(model, pictures(2), "0, 1"), "one picture, as any frame of the clip, and frames 0, 1"),
    (I2V, lambda model: shown(model, frames="1"), "move one picture, as frame 0, and frame 1 is given"),
    (PIA, lambda model: extended(model, 2, latent={"samples": pictures()}), "In Extend Video set overlap to 1"),
    (PIA, lambda model: extended(model), "or a picture to Extend Video"),
    (PIA, lambda model: prediction(shown(moved(model, "loop, small"))), "Picture Motion is set to 'loop, small'"),
    (PIA, lambda model: prediction(shown(model, frames="9")), "Context frame 9 lies outside the clip"),
    (PIA, lambda model: prediction(shown(model, torch.zeros(1, 4, 4, 4))), "are 32x32 pixels and the clip is 24x16"),
    (PIA, lambda model: LatentInterpolate.execute(model, text(), text(), {"samples": pictures(2)}, 1, 1, 1, 1.0,
                                                  "euler", "normal", 8.0, 0), "make key frames"),
])
def test_wrong_use_is_refused_in_one_sentence(image, deep, name, act, words):
    with pytest.raises(VideoLDMError, match=words):
        act(with_layers(image if name == PIA else deep, name))


def test_picture_motion_is_refused_by_layers_that_move_no_picture(image):
    with pytest.raises(VideoLDMError, match="no temporal layers that move a given picture"):
        moved(with_layers(image, "motion.safetensors"))


def test_a_loop_of_16_frames_runs(image):
    assert prediction(shown(moved(with_layers(image, PIA), "loop, large")), noise=noise_of(frames=16)).isfinite().all()


def test_animatelcms_layers_are_refused_by_a_model_without_a_second_layer(image):
    with pytest.raises(VideoLDMError, match="has no place for the layer input_2_post_attn_0"):
        with_layers(image, I2V)


def test_the_report_of_animatelcm_names_its_sampling(deep):
    from video_ldm.nodes.load import AS_TRAINED, LoadTemporalLayers
    report = LoadTemporalLayers.execute(deep, I2V, 1.0, AS_TRAINED).result[1]
    for words in ("Sample with lcm and ModelSamplingDiscrete set to lcm, cfg 1 to 2, 2 to 4 steps.", "0.014",
                  "AnimateLCM_sd15_i2v_lora", "connect Context Frames with one picture"):
        assert words in report


def test_the_files_are_refused_when_they_are_damaged(folder):
    from video_ldm.temporal.families import load_temporal
    whole, encoder = picture_help.pia_state(), picture_help.i2v_state()
    for name, state, words in (
            ("a.safetensors", {**whole, "conv_in.more": torch.zeros(3)}, "holds conv_in.more"),
            ("b.safetensors", {key: value for key, value in whole.items() if "up_blocks.0.motion_modules.1" not in key},
             "lacks up_blocks.0.motion_modules.1"),
            ("c.safetensors", {**whole, "conv_in.weight": torch.zeros(320, 9)}, "has a conv_in.weight of shape"),
            ("d.safetensors", {key: value for key, value in encoder.items() if "body.1.block1" not in key},
             "do not make whole levels"),
            ("e.safetensors", {key: value for key, value in encoder.items() if "body.1.block2.bias" not in key},
             "tensors are missing"),
            ("f.safetensors", {**encoder, "img_encoder.body.1.skep.weight": torch.zeros(3)}, "such layers do not have"),
            ("g.safetensors", picture_help.scaled({**encoder, **{key: torch.randn(shape) for key, shape in
                                                   picture_help.encoder_shapes((64,)).items()}}),
             "gives 64 channels to the motion module input_2_post_attn_0, which has 320")):
        with pytest.raises(VideoLDMError, match=f"^{name} looks like .*{words}"):
            load_temporal(saved(folder, name, state))


@pytest.mark.parametrize("name", [PIA, I2V])
def test_partly_loaded_layers_give_what_fully_loaded_ones_give(state, folder, name):
    """The changes' weights stay where they are and are cast for each call, as those of the modules are."""
    model = attach_help.load_model(state if name == PIA else picture_help.deep_unet_state())
    video = shown(with_layers(model, name))
    reference = prediction(video)
    patchers = [video, *video.get_nested_additional_models()]
    with partly_loaded(patchers, 0.1):
        assert relative_error(prediction(video), reference) < 1e-5


@pytest.mark.parametrize("name", [PIA, I2V])
def test_weights_in_half_precision_give_what_their_rounded_values_give(state, folder, name):
    """Also in the half-precision file of an artist: the weights of the changes have the type of the others."""
    state = state if name == PIA else picture_help.deep_unet_state()
    half = {key: value.half() for key, value in state.items()}
    narrow = with_layers(attach_help.load_model(half, torch.float16), name)
    assert {weight.dtype for weight in narrow.get_nested_additional_models()[0].model.state_dict().values()} == {
        torch.float16}
    exact = shown(with_layers(attach_help.load_model({key: value.float() for key, value in half.items()}), name))
    assert relative_error(prediction(shown(narrow)), prediction(exact)) < 1e-2
