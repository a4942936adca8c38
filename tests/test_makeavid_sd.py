"""makeavid-sd's layers against its formula, written again from the description (tests/reference_makeavid.py)."""

import pytest
import torch

from video_ldm.temporal.call import CallSettings, open_call
from video_ldm.temporal.errors import VideoLDMError
from video_ldm.temporal.families import identify_keys, load_temporal, load_video_model
from video_ldm.temporal.formats.temporal_file import Base, Schedule
from video_ldm.temporal.layers import FrameConv, FrameConvParams, GivenCall
from video_ldm.temporal.slots import Site, unet_sites
from video_ldm.temporal.stack import TemporalStack
from video_ldm.tests.formats_help import PUBLISHED, check_refused, saved
from video_ldm.tests.frozen_help import makeavid_file, makeavid_params
from video_ldm.tests.reference_makeavid import Network
from video_ldm.tests.small import SD15_SIZE, SMALL, batch, randomise, relative_error, unet_model

FRAMES = 3
INPAINTING = dict(SMALL, in_channels=9)


@pytest.fixture(scope="module")
def unet():
    return randomise(unet_model(INPAINTING))


@pytest.fixture(scope="module")
def tensors(unet):
    return makeavid_file(unet, randomise(TemporalStack(makeavid_params(unet)), 1))


@pytest.fixture(scope="module")
def loaded(tensors, tmp_path_factory):
    return load_temporal(saved(tmp_path_factory.mktemp("files"), "makeavid.safetensors", tensors))


@pytest.fixture(scope="module")
def stack(loaded):
    stack = TemporalStack(loaded.params)
    stack.load_state_dict(loaded.tensors)
    return stack.eval()


def inputs(clips=2, frames=FRAMES):
    x, steps, text = batch(clips, frames)
    return torch.cat([x, x.roll(1, 0), x[:, :1] * 0.3], 1), steps, text


@torch.no_grad()
def made(unet, stack, frames=FRAMES, clips=2, **settings):
    x, steps, text = inputs(clips, frames)
    with open_call(unet, [(stack, CallSettings(frames, **settings))], text):
        return unet(x, steps, text)


@torch.no_grad()
def expected(tensors, frames=FRAMES, clips=2, **options):
    x, steps, text = inputs(clips, frames)
    out = Network(tensors, **options)(x.unflatten(0, (clips, frames)).transpose(1, 2), steps[::frames], text)
    return out.transpose(1, 2).flatten(0, 1)


def test_the_network_with_its_layers_is_the_published_formula(unet, stack, tensors):
    assert relative_error(made(unet, stack), expected(tensors)) < 1e-5


@pytest.mark.parametrize("change", ["order", "sign", "no residual"])
def test_the_comparison_notices_layers_that_are_not_the_formulas(unet, stack, tensors, change):
    changed = dict(tensors)
    key = next(key for key in tensors if key.endswith("conv_shortcut.temporal_conv.weight"))
    if change == "order":
        changed[key] = tensors[key].flip(2)
    elif change == "sign":
        changed[key] = -tensors[key]
    else:
        changed["conv_out.temporal_conv.weight"] = tensors["conv_out.temporal_conv.weight"] + \
            torch.eye(4)[..., None] * torch.tensor([0.0, 1.0, 0.0])
    assert relative_error(made(unet, stack), expected(changed)) > 1e-3


def test_the_transformers_norms_have_the_published_eps(unet, stack, tensors):
    """With inputs near 0 the eps decides: Stable Diffusion's 1e-6 gives something else."""
    name = "down_blocks.0.resnets.0."
    quiet = dict(tensors)
    for key in tensors:
        if key.startswith((name + "conv2.temporal_conv", "conv_in.temporal_conv")):
            quiet[key] = tensors[key] * 1e-3
    small = TemporalStack(stack.params)
    small.load_state_dict({key: tensor.clone() for key, tensor in stack.state_dict().items()})
    for site in ("input_0_post_conv_in_0", "input_1_post_conv2_0"):
        for weight in small.layers[site].parameters():
            weight.data *= 1e-3
    assert relative_error(made(unet, small), expected(quiet)) < 1e-5
    assert relative_error(expected(quiet), expected(quiet, eps=1e-6)) > 1e-3


@torch.no_grad()
def test_one_frame_and_strength_0_are_the_inpainting_model_bit_for_bit(unet, stack):
    x, steps, text = inputs(1, 1)
    assert torch.equal(made(unet, stack, 1, 1), unet(x, steps, text))
    x, steps, text = inputs()
    assert torch.equal(made(unet, stack, strength=0.0), unet(x, steps, text))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in unet.modules())


@torch.no_grad()
def test_a_frame_of_strength_0_in_every_clip_stays_the_image_models(unet, stack):
    x, steps, text = inputs()
    strengths = torch.tensor([1.0, 0.0, 1.0] * 2)[:, None, None]
    mixed, plain = made(unet, stack, strengths=strengths), unet(x, steps, text)
    assert torch.equal(mixed[1::FRAMES], plain[1::FRAMES])
    assert relative_error(mixed[::FRAMES], plain[::FRAMES]) > 1e-2


@torch.no_grad()
def test_a_fresh_convolution_is_the_identity_and_strength_moves_to_its_result():
    conv = FrameConv(FrameConvParams(4))
    x = torch.randn(6, 4, 2, 3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(conv(x, GivenCall(3)), x)
    randomise(conv)
    whole = conv(x, GivenCall(3))
    assert relative_error(conv(x, GivenCall(3, 0.25)), 0.75 * x + 0.25 * whole) < 1e-6


def test_the_file_brings_its_facts(loaded):
    assert (loaded.kind, loaded.base, loaded.schedule) == (
        "makeavid_sd", Base("Stable Diffusion 1.x", 768), Schedule("linear", 0.00085, 0.012))
    assert (loaded.params.frames, loaded.params.positions, loaded.params.image_alone) == (24, None, True)
    assert loaded.licence.startswith("AGPL-3.0")


def test_the_published_file_has_244_temporal_tensors_of_241_million_numbers_at_the_sites_of_sd15():
    shapes = PUBLISHED["makeavid_sd"]
    unet = unet_model(dict(SD15_SIZE, in_channels=9), device="meta")
    with torch.device("meta"):
        stack = TemporalStack(makeavid_params(unet))
    expected = {key: tuple(tensor.shape) for key, tensor in makeavid_file(unet, stack, 2).items()}
    assert expected == {key: tuple(shape) for key, shape in shapes.items()}
    temporal = [torch.Size(shape).numel() for key, shape in shapes.items() if "temporal" in key]
    assert (len(temporal), round(sum(temporal) / 1e6, 1)) == (244, 241.0)
    assert sum(weight.numel() for weight in stack.parameters()) == sum(temporal)


def test_every_2d_convolution_outside_the_transformers_has_a_site(unet):
    convolutions = {name for name, module in unet.named_modules() if isinstance(module, torch.nn.Conv2d)
                    and "proj_" not in name}
    slots = {"post_conv_in", "post_conv_out", "post_conv1", "post_conv2", "post_shortcut", "post_resampler"}
    modules = [attachment.module for site, attachment in unet_sites(unet).items() if site.slot in slots]
    inside = {name for name, module in unet.named_modules() for found in modules
              if module is found or getattr(found, "op", None) is module or
              (hasattr(found, "use_conv") and getattr(found, "conv", None) is module)}
    assert convolutions <= inside and len(modules) == len(convolutions)


DAMAGED = {
    "surplus": (lambda tensors: tensors.update({"more.weight": torch.zeros(2)}), "1 tensors that it does not have"),
    "a lost convolution": (lambda tensors: [tensors.pop(f"mid_block.resnets.1.conv2.temporal_conv.{kind}")
                                            for kind in ("weight", "bias")],
                           "its temporal layer middle_0_post_conv2_1 is missing"),
    "a lost last convolution": (lambda tensors: [tensors.pop(f"conv_out.temporal_conv.{kind}")
                                                 for kind in ("weight", "bias")],
                                "its temporal layer output_3_post_conv_out_0 is missing"),
    "a lost weight": (lambda tensors: tensors.pop("conv_out.temporal_conv.weight"),
                      "temporal_conv.weight of its temporal layer output_3_post_conv_out_0 is missing"),
    "a lost bias": (lambda tensors: tensors.pop("conv_out.temporal_conv.bias"), "incomplete"),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_file_is_refused_with_one_sentence(tensors, tmp_path, damage):
    check_refused(tensors, tmp_path, *DAMAGED[damage])


def test_load_video_model_names_the_node_that_takes_it(tensors, tmp_path):
    with pytest.raises(VideoLDMError, match="is a makeavid-sd UNet .*Load it with Load Temporal Layers"):
        load_video_model(saved(tmp_path, "makeavid.safetensors", tensors))
    assert identify_keys(PUBLISHED["makeavid_sd"]).takes == "temporal"


def test_the_layers_run_in_the_order_of_their_sites(stack):
    assert stack.params.bricks[0][0] == Site("input", 0, "post_conv_in")
    assert stack.params.bricks[-1][0].slot == "post_conv_out"
