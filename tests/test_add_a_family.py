"""A family of temporal layers is one file: this one is a family, and nothing else in the pack knows it.

Its layer adds the clip's mean to the first convolution's output, times a vector of weights. Its change of the spatial
network adds a vector to the timestep embedding. Neither is like anything published.
"""

from dataclasses import dataclass

import pytest
import torch
from einops import rearrange
from torch import nn

from video_ldm.temporal import families
from video_ldm.temporal.call import CallSettings, open_call
from video_ldm.temporal.errors import VideoLDMError
from video_ldm.temporal.families.family import Facts, Family
from video_ldm.temporal.formats.temporal_file import Base, Schedule
from video_ldm.temporal.slots import Site
from video_ldm.temporal.stack import TemporalStack
from video_ldm.tests import attach_help
from video_ldm.tests.attach_help import noise_of, prediction, with_layers
from video_ldm.tests.formats_help import saved
from video_ldm.tests.host import checkpoints
from video_ldm.tests.host.checkpoints import FRAMES
from video_ldm.tests.small import relative_error

state, image, folder = attach_help.state, attach_help.image, attach_help.folder     # fixtures


# The family

@dataclass(frozen=True)
class MeanParams:
    channels: int

    def build(self, make):
        return Mean(self, make)


class Mean(nn.Module):
    def __init__(self, params, make):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(params.channels, **make.weights))

    def forward(self, x, call):
        clips = rearrange(x, "(b t) c h w -> b t c h w", t=call.frames)
        mean = clips.mean(1, keepdim=True).expand_as(clips).flatten(0, 1)
        return x + call.strength * mean * self.weight.to(x)[:, None, None]


@dataclass(frozen=True)
class ShiftedEmbedding:
    width: int
    note, by_frame = "The timestep embedding is shifted.", False

    def build(self, make):
        shift = nn.Module()
        shift.vector = nn.Parameter(torch.zeros(self.width, **make.weights))
        return shift

    def attach(self, call, unet, weights):
        def hook(module, args, output):
            return output + weights.vector.to(output) if call.acting else None
        return [unet.time_embed.register_forward_hook(hook)]


def facts(width):
    return Facts("Mean", "a set of Mean layers", Base("Stable Diffusion 1.x", 768),
                 Schedule("linear", 0.00085, 0.012, "eps"), FRAMES, "none", fps=5.0,
                 spatial=(ShiftedEmbedding(width),), notes=("A family of the tests.",))


def detect(keys, metadata):
    return facts(0).identified("mean") if keys.all(r"mean\.|shift$") else None


def load(file, found):
    own = facts(file.shapes["shift"][0])
    bricks = ((Site("input", 0, "post_conv_in"), MeanParams(file.shapes["mean.weight"][0])),)
    tensors = file.read(file.shapes)
    renamed = {"layers.input_0_post_conv_in_0.weight": tensors["mean.weight"], "spatial.0.vector": tensors["shift"]}
    return own.temporal_file(file, found.kind, own.stack_params(bricks, None), renamed)


FAMILY = Family("Mean layers for Stable Diffusion 1.x", "temporal", detect, load)


# What it needs

@pytest.fixture
def listed(monkeypatch):
    """The family's one line in the one list."""
    monkeypatch.setattr(families, "FAMILIES", (*families.FAMILIES, FAMILY))


def weights(channels=320, width=checkpoints.EMB_DIM, seed=4):
    generator = torch.Generator().manual_seed(seed)
    return {"mean.weight": torch.randn(channels, generator=generator),
            "shift": torch.randn(width, generator=generator)}


def by_hand(state, tensors, strength):
    """The image MODEL whose own weights do what the layers do. The latents of a clip are one latent here."""
    changed = dict(state)
    # The mean of equal frames is each of them, so the layer multiplies the first convolution's output.
    factor = 1 + strength * tensors["mean.weight"]
    changed["input_blocks.0.0.weight"] = state["input_blocks.0.0.weight"] * factor[:, None, None, None]
    changed["input_blocks.0.0.bias"] = state["input_blocks.0.0.bias"] * factor
    changed["time_embed.2.bias"] = state["time_embed.2.bias"] + tensors["shift"]
    return attach_help.load_model(changed)


@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_a_family_in_one_file_loads_attaches_and_samples(listed, image, state, folder, strength):
    tensors = weights()
    saved(folder, "mean.safetensors", tensors)
    assert families.identify(folder / "mean.safetensors").kind == "mean"
    video = with_layers(image, "mean.safetensors", strength)
    noise = noise_of(1, 1).expand(FRAMES, -1, -1, -1).contiguous()
    expected = prediction(by_hand(state, tensors, strength), noise=noise)
    assert relative_error(prediction(video, noise=noise), expected) < 1e-5
    assert relative_error(prediction(video, noise=noise), prediction(image, noise=noise)) > 1e-2


def test_the_familys_facts_reach_the_report_the_list_and_the_refusals(listed, image, folder, tmp_path):
    from video_ldm.nodes.load import AS_TRAINED, LoadTemporalLayers
    saved(folder, "mean.safetensors", weights())
    report = LoadTemporalLayers.execute(image, "mean.safetensors", 1.0, AS_TRAINED).result[1]
    assert "mean.safetensors: a set of Mean layers, 1 temporal layers." in report and "A family of the tests." in report
    assert "Trained on clips of 4 frames at 5 frames per second." in report
    unknown = saved(tmp_path, "x.safetensors", {"fc.weight": torch.zeros(2)})
    with pytest.raises(VideoLDMError, match="Load Temporal Layers takes .*; Mean layers for Stable Diffusion 1.x"):
        families.load_temporal(unknown)
    other = saved(folder, "narrow.safetensors", weights(channels=64))
    with pytest.raises(VideoLDMError, match="320 channels instead of 64 at the layer input_0_post_conv_in_0"):
        with_layers(image, other.name)


def test_nothing_of_the_family_is_left_on_the_network(listed, image, folder):
    saved(folder, "mean.safetensors", weights())
    plain = prediction(image)
    prediction(with_layers(image, "mean.safetensors"))
    assert torch.equal(prediction(image), plain)
    assert torch.equal(prediction(with_layers(image, "mean.safetensors", 0.0)), plain)


def test_a_layer_behind_the_first_convolution_changes_the_first_skip_too(listed, tmp_path):
    """The published families with this slot (ModelScope, VideoCrafter) change both."""
    file = families.load_temporal(saved(tmp_path, "mean.safetensors", weights()))
    stack = TemporalStack(file.params)
    stack.load_state_dict(file.tensors)
    unet = checkpoints.unet_model(checkpoints.UNET)
    unet.load_state_dict(checkpoints.unet_state())
    seen = {}
    unet.input_blocks[1][0].register_forward_pre_hook(lambda module, args: seen.update(main=args[0]))
    unet.output_blocks[1][0].register_forward_pre_hook(lambda module, args: seen.update(skip=args[0][:, -320:]))
    x, text = torch.randn(FRAMES, 4, 2, 3), torch.randn(FRAMES, 7, 768)
    with torch.no_grad(), open_call(unet, [(stack, CallSettings(FRAMES))], text):
        unet(x, torch.full((FRAMES,), 500.0), context=text)
        plain = unet.input_blocks[0][0]
    handle = plain.weight, plain.bias
    expected = torch.nn.functional.conv2d(x, *handle, padding=1)
    expected = expected + expected.mean(0) * file.tensors["layers.input_0_post_conv_in_0.weight"][:, None, None]
    assert relative_error(seen["main"], expected) < 1e-5
    assert torch.equal(seen["main"], seen["skip"])
