"""MuseV's layers against outputs of their published code.

tests/fixtures/musev.json holds outputs of the published modules with the weights of `filled`: what the convolutions and
the transformer add to `features()` (every 17th number), and what a small whole network predicts for `clips()`, without
a known frame and with frame 0 known (every 13th number). The network ran in float64.
"""

import json
from pathlib import Path

import pytest
import torch

from video_ldm.temporal.call import CallSettings, open_call
from video_ldm.temporal.errors import VideoLDMError
from video_ldm.temporal.families import identify_keys, load_temporal, load_video_model
from video_ldm.temporal.formats.temporal_file import Base, Schedule
from video_ldm.temporal.layers import (
    GivenCall,
    WeightedConv,
    WeightedConvParams,
    WeightedTransformer,
    WeightedTransformerParams,
)
from video_ldm.temporal.params import IN_PLACE, PlacedFramesParams
from video_ldm.temporal.stack import TemporalStack
from video_ldm.tests.formats_help import PUBLISHED, REFUSED, check_refused, saved
from video_ldm.tests.frozen_help import EMBEDDING, diffusers_name, musev_file, musev_params
from video_ldm.tests.small import SD15_SIZE, SMALL, relative_error, unet_model

RECORDED = json.loads((Path(__file__).parent / "fixtures" / "musev.json").read_text())
CHANNELS, FRAMES, CLIPS, HEIGHT, WIDTH = 64, 5, 2, 2, 3
OF_NETWORK = 4          # frames of a clip in the recorded calls of the network


def wave(shape: tuple, number: int) -> torch.Tensor:
    """Numbers that every machine computes alike, spread as weights of this shape are."""
    count = torch.Size(shape).numel()
    values = torch.sin(torch.arange(count, dtype=torch.float64) * 0.7548776662466927 * (number + 1) + number)
    return values.reshape(shape) * ((count // shape[0]) ** -0.5 * 1.4 if len(shape) > 1 else 0.2)


def filled(shapes: dict) -> dict:
    """Weights of these names and shapes. Every second `temporal_weight` is negative."""
    found = {}
    for number, key in enumerate(sorted(shapes)):
        norm = key.endswith("weight") and ("norm" in key or key.endswith(tuple(f"conv{n}.0.weight" for n in "1234")))
        found[key] = (wave(tuple(shapes[key]), number) + norm).float()
        if key.endswith("temporal_weight"):
            found[key].fill_(0.7 if number % 2 else -0.7)
    return found


def published_shapes(brick) -> dict:
    return {key: (*tensor.shape, 1) if tensor.ndim == 4 else tuple(tensor.shape)
            for key, tensor in brick.state_dict().items()}


def loaded_brick(brick):
    weights = filled(published_shapes(brick))
    brick.load_state_dict({key: tensor[..., 0] if tensor.ndim == 5 else tensor for key, tensor in weights.items()})
    return brick.eval()


def features():
    size = CLIPS * FRAMES, CHANNELS, HEIGHT, WIDTH
    return wave(size, 99).float() * 3 * (CHANNELS * HEIGHT * WIDTH) ** 0.5 / 1.4


def numbers_of_frames():
    return wave((FRAMES, EMBEDDING), 98).float() * 5


BRICKS = {"conv": lambda: WeightedConv(WeightedConvParams(CHANNELS)),
          "transformer": lambda: WeightedTransformer(WeightedTransformerParams(CHANNELS, 8, EMBEDDING))}


@pytest.mark.parametrize("kind", BRICKS)
@torch.no_grad()
def test_a_layer_adds_what_the_published_code_adds(kind):
    brick = loaded_brick(BRICKS[kind]())

    def added(strength=1.0, numbers=None):
        call = GivenCall(FRAMES, strength, frame_embedding=numbers_of_frames() if numbers is None else numbers)
        return (brick(features(), call) - features()).flatten()[::17]
    recorded = torch.tensor(RECORDED[kind])
    assert relative_error(added(), recorded) < 1e-5
    assert relative_error(added(0.5), recorded / 2) < 1e-5
    if kind == "transformer":
        assert relative_error(added(numbers=numbers_of_frames().flip(0)), recorded) > 1e-2
    brick.temporal_weight.abs_()
    assert relative_error(added(), recorded) < 1e-5       # its sign does not count
    brick.temporal_weight *= 2
    assert relative_error(added(), recorded * 2) < 1e-5


# A whole network

@pytest.fixture(scope="module")
def tensors():
    unet = unet_model(SMALL, device="meta")
    with torch.device("meta"):
        stack = TemporalStack(musev_params(unet))
    return filled({key: tuple(tensor.shape) for key, tensor in musev_file(unet, stack).items()})


@pytest.fixture(scope="module")
def unet(tensors):
    unet = unet_model(SMALL)
    unet.load_state_dict({key: tensors[diffusers_name(key)] for key in unet.state_dict()})
    return unet.double()


@pytest.fixture(scope="module")
def loaded(tensors, tmp_path_factory):
    return load_temporal(saved(tmp_path_factory.mktemp("files"), "musev.bin", tensors))


@pytest.fixture(scope="module")
def stack(loaded):
    stack = TemporalStack(loaded.params)
    stack.load_state_dict(loaded.tensors)
    return stack.double().eval()


def clips():
    x = wave((2 * OF_NETWORK, 4, 8, 12), 97) * 12 * 1.5
    text = wave((2, 7, 768), 96) * 60
    return x, torch.full((len(x),), 3.0), text.repeat_interleave(OF_NETWORK, 0)


@torch.no_grad()
def made(unet, stack, **settings):
    x, steps, text = clips()
    with open_call(unet, [(stack, CallSettings(OF_NETWORK, **settings))], text):
        return unet(x, steps, text)


@pytest.mark.parametrize("known, recorded", [((), "network"), ((0,), "network_known")])
def test_a_network_with_its_layers_predicts_what_the_published_one_predicts(unet, stack, known, recorded):
    ours = made(unet, stack, known_places=known).flatten()[::13]
    # The two image networks alone, without a temporal layer, differ by 1.7e-5.
    assert relative_error(ours, torch.tensor(RECORDED[recorded])) < 1e-4
    other = RECORDED["network" if known else "network_known"]
    assert relative_error(ours, torch.tensor(other)) > 1e-3


@torch.no_grad()
def test_strength_0_is_the_image_model_also_with_a_known_frame(unet, stack):
    x, steps, text = clips()
    plain = unet(x, steps, text)
    assert torch.equal(made(unet, stack, strength=0.0, known_places=(0,)), plain)
    strengths = torch.tensor([1.0, 0.0, 1.0, 1.0] * 2)[:, None, None]
    assert torch.equal(made(unet, stack, strengths=strengths)[1::4], plain[1::4])
    with pytest.raises(VideoLDMError, match="sees that frame too. So single frames cannot stay the image model's"):
        made(unet, stack, strengths=strengths, known_places=(0,))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in unet.modules())


# Files

def test_the_file_brings_its_facts(loaded):
    assert (loaded.kind, loaded.base, loaded.schedule) == (
        "musev", Base("Stable Diffusion 1.x", 768), Schedule("linear", 0.00085, 0.012))
    params = loaded.params
    assert (params.frames, params.positions, params.image_alone, params.frame_width) == (12, None, False, EMBEDDING)
    assert params.placed_frames == PlacedFramesParams(IN_PLACE, ((0,),))
    assert "non-commercial research" in loaded.licence


def test_the_published_file_is_sd15_with_these_layers():
    shapes = PUBLISHED["musev"]
    unet = unet_model(SD15_SIZE, device="meta")
    params = musev_params(unet)
    with torch.device("meta"):
        stack = TemporalStack(params)
    names = musev_file(unet, stack, 2)
    assert set(names) == set(shapes)
    assert all(tuple(names[key].shape) == tuple(shapes[key]) for key in names if "frame_e" not in key)
    # The published .bin has 5.68 GB in float32
    assert round(sum(torch.Size(shape).numel() for shape in shapes.values()) * 4 / 1e9, 2) == 5.68


def test_files_for_the_reference_network_are_refused_by_name():
    found = identify_keys(REFUSED["musev_referencenet"])
    assert (found.kind, found.takes) == ("musev_referencenet", None)
    assert "Use the file of the folder motion/musev" in found.advice


DAMAGED = {
    "surplus": (lambda tensors: tensors.update({"more.weight": torch.zeros(2)}), "1 tensors that it does not have"),
    "a lost layer": (lambda tensors: [tensors.pop(key) for key in list(tensors)
                                      if key.startswith("mid_block.temp_attentions.0.")],
                     "its temporal layer middle_0_post_attn_0 is missing"),
    "no frame numbers": (lambda tensors: [tensors.pop(key) for key in list(tensors)
                                          if key.startswith("frame_embedding.")],
                         "frame_embedding.linear_2.weight is missing"),
    "half the frame numbers": (lambda tensors: tensors.pop("frame_embedding.linear_1.bias"), "missing"),
    "a lost weight": (lambda tensors: tensors.pop("mid_block.temp_attentions.0.temporal_weight"), "missing"),
    "a lost projection": (lambda tensors: tensors.pop("transformer_in.proj_in.weight"),
                          "proj_in.weight of its temporal layer input_0_post_conv_in_0 is missing"),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_file_is_refused_with_one_sentence(tensors, tmp_path, damage):
    check_refused(tensors, tmp_path, *DAMAGED[damage])


def test_load_video_model_names_the_node_that_takes_it(tensors, tmp_path):
    with pytest.raises(VideoLDMError, match="is a MuseV UNet .*Load it with Load Temporal Layers"):
        load_video_model(saved(tmp_path, "musev.safetensors", tensors))
