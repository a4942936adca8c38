"""Layers that move a given picture, on a bare network: PIA's channels and AnimateLCM's picture encoder.

Both were compared with their published code at full size once. Here their formulas are written a second time.
"""

import copy

import pytest
import torch
from torch.nn import functional as F

from video_ldm.temporal import picture_input
from video_ldm.temporal.call import CallSettings, open_call
from video_ldm.temporal.errors import VideoLDMError
from video_ldm.temporal.families import load_temporal
from video_ldm.temporal.norms import CHOICES, EACH_FRAME, IN_IMAGE_MODEL, IN_LAYERS, USUAL, with_norms
from video_ldm.temporal.picture_input import AFFINITIES, GivenPicture, PictureMotion, affinities
from video_ldm.temporal.slots import Site, unet_sites
from video_ldm.temporal.spatial_changes import POOLED_NORMS
from video_ldm.temporal.stack import TemporalStack
from video_ldm.tests import picture_help
from video_ldm.tests.formats_help import adapter_names, saved
from video_ldm.tests.picture_help import LISTS, by_distance
from video_ldm.tests.small import SD15, batch, randomise, relative_error, unet_model
from video_ldm.tests.test_formats_parity import CONFIGS as PARITY
from video_ldm.tests.test_formats_parity import TEXT, animatediff_names, diffusers_unet, image_unet

FRAMES, HEIGHT, WIDTH = 16, 5, 6        # sides of the latents: the second level halves 5 rows
CHANNELS = {"pia": (64,), "i2v": (64, 64, 128)}     # where two levels have the same channels, there is no in_conv
CONFIGS = {"pia": dict(SD15, model_channels=64, num_res_blocks=[1], channel_mult=(1,), transformer_depth=[0],
                       transformer_depth_output=[0, 0]),
           "i2v": dict(SD15, model_channels=64, num_res_blocks=[2, 2, 2], channel_mult=(1, 1, 2),
                       transformer_depth=[1, 1, 1, 1, 0, 0], transformer_depth_output=[0] * 9)}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """{name: (state, file)} of both families."""
    folder = tmp_path_factory.mktemp("pictures")
    states = {"pia": picture_help.pia_state(CHANNELS["pia"]), "i2v": picture_help.i2v_state(CHANNELS["i2v"])}
    return {name: (state, load_temporal(saved(folder, f"{name}.safetensors", state)))
            for name, state in states.items()}


@pytest.fixture(scope="module")
def unets():
    """{name: a network for the layers}"""
    return {name: randomise(unet_model(config)).eval() for name, config in CONFIGS.items()}


def stack_of(file) -> TemporalStack:
    stack = TemporalStack(file.params).eval()
    stack.load_state_dict(file.tensors)
    return stack


def image(clips=1, height=HEIGHT, width=WIDTH):
    return torch.randn(clips, 4, height, width, generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def run(unet, stack, settings, x=None, clips=1):
    found, t, text = batch(clips, settings.frames, height=HEIGHT, width=WIDTH)
    with open_call(unet, [(stack, settings)], text):
        return unet(found if x is None else x, t, context=text)


def given(picture, frame=0, frames=FRAMES, numbers=None, length=None, **motion):
    numbers = tuple(range(frames)) if numbers is None else numbers
    return GivenPicture(picture, frame, numbers, length or frames, PictureMotion(**motion))


# PIA

@pytest.mark.parametrize("amount", LISTS)
def test_the_affinities_are_those_that_pias_authors_print(amount):
    assert list(AFFINITIES) == list(LISTS)
    for frame, frames in ((0, 16),) if "loop" in amount else ((0, 16), (5, 16), (15, 16), (0, 24), (3, 4)):
        found = affinities(amount, frame, range(frames), frames)
        assert torch.equal(found, torch.tensor(by_distance(amount, frame, frames)))


def test_a_window_has_the_affinities_of_its_frames_in_the_whole_clip():
    whole = affinities("large", 3, range(24), 24)
    assert torch.equal(affinities("large", 3, (8, 9, 12, 23), 24), whole[[8, 9, 12, 23]])


@pytest.mark.parametrize("frame, length, words", [
    (0, 24, "made for clips of 16 frames, and the clip has 24"), (3, 16, "the picture is frame 3")])
def test_a_loop_is_refused_where_it_would_not_come_back_to_the_picture(frame, length, words):
    with pytest.raises(VideoLDMError, match=words):
        affinities("loop, small", frame, range(length), length)


@pytest.mark.parametrize("amount, frame", [("small", 0), ("moderate", 5), ("large", 15), ("loop, moderate", 0),
                                           ("new style, large", 3)])
def test_pia_is_a_network_of_nine_input_channels(files, unets, amount, frame):
    """As on a personalised checkpoint by its authors: that one's own four channels and bias, and PIA's last five."""
    (state, file), unet = files["pia"], unets["pia"]
    stack = stack_of(file)
    nine = unet_model(dict(CONFIGS["pia"], in_channels=9)).eval()
    own = unet.state_dict()
    first = torch.cat([own["input_blocks.0.0.weight"], state["conv_in.weight"][:, 4:]], dim=1)
    nine.load_state_dict({**own, "input_blocks.0.0.weight": first})
    pictures = image(2)
    x, _, _ = batch(2, FRAMES, height=HEIGHT, width=WIDTH)
    values = torch.tensor(by_distance(amount, frame, FRAMES)).repeat(2)
    affinity = values[:, None, None, None].expand(-1, 1, HEIGHT, WIDTH)
    further = torch.cat([affinity, pictures.repeat_interleave(FRAMES, 0)], dim=1)
    without = CallSettings(FRAMES)
    expected = run(nine, stack, without, torch.cat([x, further], dim=1), clips=2)
    found = run(unet, stack, CallSettings(FRAMES, picture=given(pictures, frame, amount=amount)), clips=2)
    assert relative_error(found, expected) < 1e-5
    assert relative_error(run(unet, stack, without, clips=2), expected) > 1e-2


def test_affinity_0_and_a_picture_of_zeros_are_the_layers_without_a_picture(files, unets, monkeypatch):
    stack, unet = stack_of(files["pia"][1]), unets["pia"]
    monkeypatch.setitem(picture_input.AFFINITIES, "small", (0.0,))
    nothing = run(unet, stack, CallSettings(FRAMES, picture=given(torch.zeros(1, 4, HEIGHT, WIDTH))))
    assert torch.equal(nothing, run(unet, stack, CallSettings(FRAMES)))


def test_pia_pools_the_image_models_norms_and_not_its_own(files):
    params = files["pia"][1].params
    assert POOLED_NORMS in params.spatial and params.positions == 32
    assert {brick.norm_pooled for _, brick in params.bricks} == {False}


def test_pia_in_diffusers_naming_is_the_same_layers(files, tmp_path):
    state, file = files["pia"]
    adapter = load_temporal(saved(tmp_path, "diffusion_pytorch_model.safetensors", adapter_names(state)))
    assert adapter.params == file.params and adapter.tensors.keys() == file.tensors.keys()
    assert all(torch.equal(tensor, file.tensors[key]) for key, tensor in adapter.tensors.items())


class OtherNorms:
    """The norms of diffusers' whole network as one choice of `norms` has them: `in_layers` and `in_image_model` say
    which see all frames of a clip of `t c h w`. As diffusers has it, those in the layers do alone."""

    def __init__(self, unet, in_layers: bool, in_image_model: bool):
        for name, module in unet.named_modules():
            if isinstance(module, torch.nn.GroupNorm):
                if ".motion_modules." in name and not in_layers:
                    module.forward = self.of_each_frame(module)
                elif ".resnets." in name or name == "conv_norm_out":
                    module.forward = self.of_all_frames(module) if in_image_model else module.forward

    @staticmethod
    def of_each_frame(norm):
        """For a norm that is given clips `b c t h w`."""
        return lambda x: torch.stack([F.group_norm(frame, norm.num_groups, norm.weight, norm.bias, norm.eps)
                                      for frame in x.unbind(2)], dim=2)

    @staticmethod
    def of_all_frames(norm):
        """For a norm that is given the frames of one clip."""
        def pooled(x):
            groups = x.unflatten(1, (norm.num_groups, -1))
            variance, mean = torch.var_mean(groups, dim=(0, 2, 3, 4), keepdim=True, correction=0)
            normed = ((groups - mean) / (variance + norm.eps).sqrt()).flatten(1, 2)
            return normed * norm.weight[:, None, None] + norm.bias[:, None, None]
        return pooled


# {choice of `norms`: (norms in the layers, and in the image model, see all frames)}
CHOSEN = {USUAL: (False, True), EACH_FRAME: (False, False), IN_LAYERS: (True, False), IN_IMAGE_MODEL: (False, True)}


@torch.no_grad()
def test_each_choice_of_norms_is_diffusers_network_of_nine_channels_with_those_norms(tmp_path):
    """The usual ones are PIA's own: pooled in the image model. Every other choice gives other frames."""
    config = dict(SD15, model_channels=64, **PARITY["one ResBlock, with middle"]) | {"context_dim": TEXT}
    theirs = diffusers_unet(config, middle=False, in_channels=9)
    weights = theirs.state_dict()
    own = image_unet(config, {**weights, "conv_in.weight": weights["conv_in.weight"][:, :4]})
    parts = {**animatediff_names(weights), "conv_in.weight": weights["conv_in.weight"],
             "conv_in.bias": weights["conv_in.bias"]}
    file = load_temporal(saved(tmp_path, "pia.safetensors", parts))
    frames, frame, picture = 4, 1, image(height=4, width=6)
    x, t, text = batch(1, frames, height=4, width=6, text=TEXT)
    affinity = torch.tensor(by_distance("large", frame, frames))[:, None, None, None].expand(-1, 1, 4, 6)
    nine = torch.cat([x, affinity, picture.expand(frames, -1, -1, -1)], dim=1)
    settings = CallSettings(frames, picture=given(picture, frame, frames, amount="large"))
    expected, found = {}, {}
    assert set(CHOSEN) == set(CHOICES)
    for choice, pooled in CHOSEN.items():
        network = copy.deepcopy(theirs)
        OtherNorms(network, *pooled)
        expected[choice] = network(nine.transpose(0, 1)[None], t[0], text).sample[0].transpose(0, 1)
        with open_call(own, [(stack_of(with_norms(file, choice)), settings)], text):
            found[choice] = own(x, t, context=text)
        assert relative_error(found[choice], expected[choice]) < 1e-5
    assert torch.equal(found[USUAL], found[IN_IMAGE_MODEL])
    different = (USUAL, EACH_FRAME, IN_LAYERS)
    assert all(relative_error(found[one], expected[other]) > 1e-3
               for one in different for other in different if one != other)


# AnimateLCM image-to-video

@pytest.mark.parametrize("motion_scale", [0.8, 0.0, 1.5])
@pytest.mark.parametrize("numbers", [(0, 1, 2, 3), (20, 21, 22, 23)])
@torch.no_grad()
def test_the_encoders_features_are_added_before_the_motion_modules_of_the_second_layers(files, unets, numbers,
                                                                                       motion_scale):
    """They reach the skip connections, and nothing else of the network: each is the difference to a call without."""
    (state, file), unet = files["i2v"], unets["i2v"]
    stack, picture = stack_of(file), image()
    sites = [Site("input", index, "post_attn").name for index in (2, 5, 8)]
    settings = CallSettings(4, picture=given(picture, frames=4, numbers=numbers, length=24, motion_scale=motion_scale))
    before = inputs_of_motion_modules(unet, stack, settings)
    for level, feature in enumerate(picture_help.encoded(state, picture[0], list(numbers), motion_scale)):
        spatial, seen = before[sites[level]]
        assert relative_error(seen - spatial, feature) < 1e-4
    assert all(torch.equal(*pair) for name, pair in before.items() if name not in sites)


def inputs_of_motion_modules(unet, stack, settings):
    """{site: (what the image model itself made there, what the motion module got)} of one call, on the input side."""
    made, got = {}, {}
    modules = {site.name: attachment.module for site, attachment in unet_sites(unet).items()
               if site.part == "input" and site.slot == "post_attn"}
    for name, module in modules.items():    # not by hooks: those of the change run before any other
        def noting(*args, forward=module.forward, name=name, **more):
            made[name] = forward(*args, **more)
            return made[name]
        module.forward = noting
    for name in modules:
        stack.layers[name].register_forward_pre_hook(lambda module, args, name=name: got.update({name: args[0]}))
    try:
        run(unet, stack, settings)
    finally:
        for module in modules.values():
            del module.forward
    return {name: (made[name], got[name]) for name in modules}


# Both

@pytest.mark.parametrize("name", ["pia", "i2v"])
def test_frames_of_strength_0_stay_the_image_models_and_others_see_the_picture(files, unets, name):
    stack, unet = stack_of(files[name][1]), unets[name]
    picture, strengths = given(image(), frames=4), torch.tensor([1.0, 0.0, 1.0, 0.0])[:, None, None]
    found = run(unet, stack, CallSettings(4, picture=picture, strengths=strengths))
    plain = run(unet, stack, CallSettings(4, strength=0.0, picture=picture))
    without = run(unet, stack, CallSettings(4, strengths=strengths))
    assert torch.equal(found[[1, 3]], plain[[1, 3]])
    assert all(relative_error(found[n], without[n]) > 1e-4 for n in (0, 2))


@pytest.mark.parametrize("name", ["pia", "i2v"])
def test_nothing_stays_on_the_network(files, unets, name):
    stack, unet = stack_of(files[name][1]), unets[name]
    none = CallSettings(4, strength=0.0)
    plain = run(unet, stack, none)
    run(unet, stack, CallSettings(4, picture=given(image(), frames=4)))
    assert torch.equal(run(unet, stack, none), plain)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in unet.modules())
