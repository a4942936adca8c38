"""Whole video networks in a graph with other nodes: the result is right, or one sentence says what is wrong."""

import comfy.sample
import comfy.sd
import folder_paths
import pytest
import torch
from comfy_extras.nodes_model_advanced import ModelSamplingContinuousEDM, ModelSamplingDiscrete
from comfy_extras.nodes_model_merging import ModelMergeSimple
from comfy_extras.nodes_model_merging_model_specific import ModelMergeSD1
from safetensors.torch import save_file

from video_ldm.nodes.host.context import with_context_frames
from video_ldm.nodes.host.noise_schedule import with_trained_betas
from video_ldm.nodes.load import AS_MODEL, AS_TRAINED, LoadTemporalLayers, LoadVideoModel
from video_ldm.temporal.errors import VideoLDMError
from video_ldm.tests import input_frames_help
from video_ldm.tests.formats_help import motion_shapes, motion_tensors
from video_ldm.tests.input_frames_help import frames_of, sampled, text
from video_ldm.tests.network_help import network_tensors
from video_ldm.tests.small import relative_error

networks = input_frames_help.networks       # fixture
LEVELS = (32, 64, 128, 128)                 # channels of the small networks
FRAMES = 3


@pytest.fixture(scope="module")
def motion(tmp_path_factory):
    """The name of a file of AnimateDiff v2's layers that fit the small networks."""
    folder = tmp_path_factory.mktemp("motion")
    folder_paths.add_model_folder_path("video_ldm", str(folder))
    save_file(motion_tensors(motion_shapes(LEVELS, 2)), folder / "mm.safetensors")
    return "mm.safetensors"


def schedule(model):
    return model.get_model_object("model_sampling").sigmas


# The noise schedule

def test_other_layers_do_not_bring_their_schedule_to_a_network(networks, motion):
    base = networks["lavie_base"]
    with pytest.raises(VideoLDMError, match=r"^The network of lavie_base.safetensors was trained with another noise "
                                            r"schedule \(sqrt_linear 0.0001 to 0.02\) than mm.safetensors "
                                            r"\(sqrt_linear 0.00085 to 0.012\). Set schedule on Load "
                                            r"Temporal Layers to the model's own.$"):
        LoadTemporalLayers.execute(base, motion, 1.0, AS_TRAINED)
    model, report = LoadTemporalLayers.execute(base, motion, 1.0, AS_MODEL).result
    assert torch.equal(schedule(model), schedule(base))
    assert "the model's own, which is that of lavie_base.safetensors (sqrt_linear 0.0001 to 0.02)" in report
    assert relative_error(sampled(model, FRAMES), sampled(base, FRAMES)) > 1e-3


def test_a_node_that_has_other_betas_does_not_change_a_networks(networks):
    base = networks["lavie_base"]
    other = base.clone()        # a node of another pack, which takes the betas of Stable Diffusion
    kind = type(base.get_model_object("model_sampling"))
    other.add_object_patch("model_sampling", kind(None))
    assert not torch.equal(schedule(other), schedule(base))
    assert torch.equal(schedule(with_trained_betas(other)), schedule(base))
    assert relative_error(sampled(other, FRAMES), sampled(base, FRAMES)) < 1e-5
    assert relative_error(sampled(ModelSamplingDiscrete().patch(base, "eps", False)[0], FRAMES),
                          sampled(base, FRAMES)) < 1e-5
    continuous, = ModelSamplingContinuousEDM().patch(base, "eps", 120.0, 0.002)
    with pytest.raises(VideoLDMError, match="no place for the betas that lavie_base.safetensors was trained on. Remove "
                                            "the node that set it.$"):
        sampled(continuous, FRAMES)


# The same layers twice

@pytest.mark.parametrize("kind", ["lavie_base", "seine"])
def test_a_networks_own_layers_are_not_added_to_it_once_more(networks, kind):
    with pytest.raises(VideoLDMError, match="^lavie_base.safetensors holds the same temporal layers as the connected "
                                            "MODEL .*these act on it already. Connect the MODEL to the sampler"):
        LoadTemporalLayers.execute(networks[kind], "lavie_base.safetensors", 1.0, AS_MODEL)


# Core's nodes that merge and save MODELs

def test_a_merge_with_a_network_of_other_input_channels_is_refused_where_core_would_leave_it_half_done(
        networks, tmp_path):
    seine, base = networks["a4"], networks["lavie_base"]
    halved, = ModelMergeSimple().merge(seine, base, 0.5)
    with pytest.raises(VideoLDMError, match=r"with one of another kind: input_blocks.0.0.weight is \[32, 9, 3, 3\] in "
                                            r"this one and \[32, 4, 3, 3\] in that one. .*ModelMergeSD1 leaves this "
                                            r"one as it is where input_blocks.0. is 1.$"):
        sampled(halved, FRAMES)


def test_a_merge_that_leaves_the_input_is_that_of_the_weights(networks, tmp_path):
    own, other = network_tensors("seine"), network_tensors("lavie_base", 4)
    save_file(other, tmp_path / "other.safetensors")
    temporal = ("attn_temp", "norm_temp", "conv_in")
    save_file({key: value if any(part in key for part in temporal) else 0.25 * value + 0.75 * other[key]
               for key, value in own.items()}, tmp_path / "merged.safetensors")
    folder_paths.add_model_folder_path("video_ldm", str(tmp_path))
    second, wanted = (LoadVideoModel.execute(f"{name}.safetensors").result[0] for name in ("other", "merged"))
    parts = {name: 0.25 for name in ModelMergeSD1.INPUT_TYPES()["required"] if name.endswith(".")}
    merged, = ModelMergeSD1().merge(networks["seine"], second, **{**parts, "input_blocks.0.": 1.0})
    known = frames_of(1)
    found, wanted = (sampled(with_context_frames(model, known, (0,), grey=known[0]), FRAMES)
                     for model in (merged, wanted))
    assert relative_error(found, wanted) < 1e-4


@pytest.mark.parametrize("kind", ["lavie_base", "seine"])
def test_saving_the_spatial_layers_alone_is_refused(networks, tmp_path, kind):
    path = tmp_path / "saved.safetensors"
    with pytest.raises(VideoLDMError, match=f"^Core's nodes would save the spatial layers of {kind}.safetensors alone, "
                                            "without its temporal layers and its noise schedule. .*Load Video Model.$"):
        comfy.sd.save_checkpoint(str(path), networks[kind])
    assert not path.exists()


# Latents

@pytest.mark.parametrize("shape, words", [((FRAMES, 16, 2, 3), "have 16 latent channels, and this model's have 4"),
                                          ((1, 4, FRAMES, 2, 3), "have 5 dimensions; frames of Stable Diffusion")])
def test_latents_of_other_models_are_refused_in_every_sampler(networks, shape, words):
    latent = torch.ones(shape)
    with pytest.raises(VideoLDMError, match=f"^The latents to sample {words}"):
        comfy.sample.sample(networks["lavie_base"], torch.zeros(shape), 1, 1.0, "euler", "normal", text(), text(12),
                            latent, disable_pbar=True)
