"""Whole video networks that are damaged or made to do harm: both nodes that take one refuse it with one sentence."""

import pytest
import torch

from video_ldm.temporal.families import load_decoder, load_layout, load_motion_lora, load_temporal, load_upscaler
from video_ldm.tests.formats_help import saved
from video_ldm.tests.loader_help import refused
from video_ldm.tests.network_help import network_tensors
from video_ldm.tests.small_files import load_network

NODES = {"Load Video Model": load_network, "Load Temporal Layers": load_temporal}
both_nodes = pytest.mark.parametrize("load", NODES.values(), ids=NODES)
ATTENTION = "down_blocks.0.attentions.0.transformer_blocks.0.attn_temp.to_q.weight"
CONV = "down_blocks.0.resnets.0.conv1.weight"


@pytest.fixture(scope="module")
def tensors():
    return network_tensors("lavie_base", dtype=torch.float16)


@pytest.mark.parametrize("load, words", [
    (load_motion_lora, "not a Motion LoRA. Load it with Load Video Model."),
    (load_decoder, "not a temporal decoder. Load it with Load Video Model."),
    (load_layout, "not a scene layout file. Load it with Load Video Model."),
    (load_upscaler, "not an upscaler. Load it with Load Video Model."),
])
def test_a_node_for_other_files_names_the_network_and_its_node(tmp_path, tensors, load, words):
    sentence = refused(load, saved(tmp_path, "lavie.pt", tensors))
    assert sentence.startswith("lavie.pt is LaVie's base text-to-video network, ") and sentence.endswith(words)


@both_nodes
@pytest.mark.parametrize("name", ["lavie.pt", "lavie.safetensors"])
@pytest.mark.parametrize("share", [0.001, 0.3, 0.9, 0.999])
def test_a_file_that_breaks_off_is_refused(tmp_path, tensors, load, name, share):
    path = saved(tmp_path, name, tensors)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    assert refused(load, path).startswith(f"{name} is damaged or only partly downloaded: ")


@both_nodes
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_number_that_is_none_is_refused_where_it_is_read(tmp_path, tensors, load, value):
    tensors = {**tensors, ATTENTION: torch.full_like(tensors[ATTENTION], value)}
    assert f"the tensor {ATTENTION} holds NaN or infinity" in refused(load, saved(tmp_path, "lavie.pt", tensors))


def test_a_number_that_is_none_in_a_spatial_weight_is_refused_by_the_node_that_reads_it(tmp_path, tensors):
    bad = tensors[CONV].clone()
    bad[3, 2, 1, 0] = float("nan")
    path = saved(tmp_path, "lavie.pt", {**tensors, CONV: bad})
    assert f"the tensor {CONV} holds NaN or infinity" in refused(load_network, path)
    assert load_temporal(path).tensors


@both_nodes
@pytest.mark.parametrize("key", [CONV, ATTENTION])
@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32, torch.bool])
def test_quantised_weights_are_refused(tmp_path, tensors, load, key, dtype):
    sentence = refused(load, saved(tmp_path, "lavie.safetensors", {**tensors, key: (tensors[key] > 0).to(dtype)}))
    assert f" as {str(dtype).removeprefix('torch.')}, " in sentence and "Quantised files are not taken" in sentence
    assert key.rpartition(".attn_temp.")[2].split(".")[0] in sentence


@both_nodes
def test_a_tensor_whose_bytes_repeat_is_refused(tmp_path, tensors, load):
    shape = tensors[ATTENTION].shape
    repeated = torch.zeros(1, dtype=torch.float16).expand(shape)
    sentence = refused(load, saved(tmp_path, "lavie.pt", {**tensors, ATTENTION: repeated}))
    assert f"holds {ATTENTION} of shape {list(shape)} as 2 bytes that repeat" in sentence


RENAMES = {     # old part, new part
    "a level without end": ("down_blocks.1.", "down_blocks.99999999."),
    "a level of 200 digits": ("down_blocks.1.", f"down_blocks.{'7' * 200}."),
    "a level too many": ("up_blocks.3.", "up_blocks.4."),
    "an attention without end": ("down_blocks.0.attentions.1.", "down_blocks.0.attentions.99999999."),
    "a ResBlock without end": ("down_blocks.0.resnets.1.", "down_blocks.0.resnets.99999999."),
    "a block without end": ("attentions.0.transformer_blocks.0.", "attentions.0.transformer_blocks.99999999."),
    "a middle without end": ("mid_block.resnets.1.", "mid_block.resnets.99999999."),
    "an upsampler of no level": ("up_blocks.0.upsamplers", "up_blocks.9.upsamplers"),
    "levels the wrong way round": ("down_blocks.", "up_blocks."),
    "a level less": ("down_blocks.0.", "other.0."),
    "no middle": ("mid_block.", "middle."),
    "no input": ("conv_in.", "conv_into."),
}


@both_nodes
@pytest.mark.parametrize("case", RENAMES)
def test_names_of_places_that_no_network_has_are_refused(tmp_path, tensors, load, case):
    old, new = RENAMES[case]
    renamed = {key.replace(old, new): tensor for key, tensor in tensors.items()}
    assert set(renamed) != set(tensors)
    path = saved(tmp_path, "lavie.safetensors", renamed)
    assert refused(load, path).startswith("lavie.safetensors ")


@both_nodes
@pytest.mark.parametrize("key, other", [
    (ATTENTION, ATTENTION.replace("down_blocks.0.", "down_blocks.00.")),
    ("mid_block.attentions.0.transformer_blocks.0.norm_temp.bias",
     "mid_block.attentions.1.transformer_blocks.0.norm_temp.bias"),
    (CONV, CONV.replace("resnets.0", "resnets.00")),
    (CONV, f"module.{CONV}"), (ATTENTION, f"unet.{ATTENTION}"),
])
def test_two_names_for_one_tensor_are_refused(tmp_path, tensors, load, key, other):
    sentence = refused(load, saved(tmp_path, "lavie.safetensors", {**tensors, other: tensors[key] + 1}))
    assert other.removeprefix("module.").removeprefix("unet.") in sentence or key in sentence
