"""AnimateDiff v3's domain adapter in core's Load LoRA: every patch is taken, by the published rule."""

import comfy.lora
import comfy.model_patcher
import pytest
import torch
from comfy.utils import unet_to_diffusers
from torch import nn

from video_ldm.temporal.errors import VideoLDMError
from video_ldm.temporal.families import load_motion_lora, load_temporal
from video_ldm.tests.formats_help import PUBLISHED, motion_shapes, motion_tensors, narrow, saved
from video_ldm.tests.small import SD15_SIZE, relative_error, unet_model

KEYS = PUBLISHED["ad_v3_sd15_adapter"]


class Model(nn.Module):
    """What core asks of a MODEL's model when it matches the names of a LoRA."""

    def __init__(self) -> None:
        super().__init__()
        self.diffusion_model = unet_model(SD15_SIZE, device="meta")
        self.model_config = type("Config", (), {"unet_config": SD15_SIZE})()


@pytest.fixture(scope="module")
def names():
    """{core's name of a patch: key of the weight}, for Stable Diffusion 1.5 at its full size."""
    return comfy.lora.model_lora_keys_unet(Model(), {})


def adapter(shapes):
    generator = torch.Generator().manual_seed(0)
    return {key: torch.randn(shape, generator=generator) * 0.1 for key, shape in shapes.items()}


def test_the_published_names_are_a_pair_for_each_attention_weight_of_stable_diffusion(names):
    unet = unet_model(SD15_SIZE, device="meta").state_dict()
    weights = {f"diffusion_model.{key}" for key in unet if ".attn" in key and ".to_" in key and key.endswith(".weight")}
    patches = comfy.lora.load_lora({key: torch.zeros(shape, device="meta") for key, shape in KEYS.items()}, names)
    assert len(KEYS) == 256 and len(weights) == 128 and set(patches) == weights
    for key, patch in patches.items():
        up, down, *_ = patch.weights
        assert (len(up), down.shape[1]) == tuple(unet[key.removeprefix("diffusion_model.")].shape)
        assert up.shape[1] == len(down) == 128


@pytest.mark.parametrize("strength", [1.0, 0.35, -1.0])
@pytest.mark.parametrize("prefix", ["", "unet."])
def test_each_patch_is_the_product_of_its_own_pair_without_alpha_or_rank(names, strength, prefix):
    """Each pair is told apart by its numbers. The weights are a tenth as wide as the published ones."""
    file, theirs = adapter(narrow(KEYS)), {ours: key for key, ours in unet_to_diffusers(SD15_SIZE).items()}
    patches = comfy.lora.load_lora({prefix + key: tensor for key, tensor in file.items()}, names)
    assert len(patches) == 128
    for key, patch in patches.items():
        stem = theirs[key.removeprefix("diffusion_model.")].removesuffix(".weight").removesuffix(".0")
        name = ".processor.to_".join(stem.rsplit(".to_", 1)) + "_lora"
        added = strength * file[f"{name}.up.weight"] @ file[f"{name}.down.weight"]
        weight = torch.ones_like(added)
        merged = comfy.lora.calculate_weight([(strength, patch, 1.0, None, None)], weight.clone(), key)
        assert relative_error(merged - 1, added) < 1e-5


@pytest.mark.parametrize("load, wanted", [(load_temporal, "a file of temporal layers that this pack takes"),
                                          (load_motion_lora, "a Motion LoRA")])
@pytest.mark.parametrize("name", ["v3_sd15_adapter.safetensors", "v3_sd15_adapter.ckpt"])
def test_it_is_neither_temporal_layers_nor_a_motion_lora(tmp_path, load, wanted, name):
    path = saved(tmp_path, name, {key: torch.zeros(1) for key in KEYS})
    with pytest.raises(VideoLDMError) as caught:
        load(path)
    assert str(caught.value) == (
        f"{name} is the AnimateDiff v3 domain adapter (a LoRA for the image model), not {wanted}. Load it with core's "
        "Load LoRA, on the image MODEL before or behind Load Temporal Layers, at a strength of 1 or less.")


@pytest.mark.parametrize("middle, table, told", [(False, 32, True), (True, 32, False), (False, 24, False)])
def test_the_report_of_version_3_alone_says_where_it_belongs(tmp_path, middle, table, told):
    file = load_temporal(saved(tmp_path, "mm.safetensors", motion_tensors(motion_shapes((32, 64), 1, middle, table))))
    note = " ".join(file.notes)
    assert ("v3_sd15_adapter" in note) == told
    assert not told or all(words in note for words in ("core's Load LoRA", "strength 1 or less", "watermarks"))
