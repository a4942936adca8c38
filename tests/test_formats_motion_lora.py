"""Motion LoRA: both layouts, what they patch, and which layers they fit."""

import pytest
import torch

from video_ldm.temporal.errors import VideoLDMError
from video_ldm.temporal.families import load_motion_lora, load_temporal
from video_ldm.temporal.new_layers import video_ldm_params
from video_ldm.temporal.stack import TemporalStack
from video_ldm.tests.formats_help import (
    PUBLISHED,
    lora_shapes,
    motion_shapes,
    motion_tensors,
    narrow,
    random_tensors,
    saved,
)
from video_ldm.tests.small import SMALL, unet_model

CHANNELS = (32, 64)


@pytest.fixture(scope="module")
def layers(tmp_path_factory):
    """Params of the motion modules of each version, by name."""
    folder = tmp_path_factory.mktemp("modules")
    made = {"v1": (False, 24), "v2": (True, 32), "v3": (False, 32)}
    shapes = {name: motion_shapes(CHANNELS, 1, middle, table) for name, (middle, table) in made.items()}
    return {name: load_temporal(saved(folder, f"{name}.ckpt", motion_tensors(keys))) for name, keys in shapes.items()}


def lora(folder, name="zoom.ckpt", change=lambda tensors: tensors, **options):
    return load_motion_lora(saved(folder, name, change(random_tensors(lora_shapes(CHANNELS, **options)))))


def in_diffusers_names(tensors: dict, peft: bool = False) -> dict:
    renamed = {}
    for key, tensor in tensors.items():
        key = key.replace("temporal_transformer.", "")
        key = key.replace("attention_blocks.0", "attn1").replace("attention_blocks.1", "attn2")
        if peft:
            key = key.replace("processor.", "").replace("to_out_lora", "to_out.0_lora")
            key = key.replace("_lora.down", ".lora_A").replace("_lora.up", ".lora_B")
        renamed["unet." + key] = tensor
    return renamed


def test_a_patch_is_up_and_down_of_every_attention_weight(tmp_path, layers):
    patches = lora(tmp_path).fitting(layers["v2"].params)
    wanted = {key for key in layers["v2"].tensors if ".to_" in key and key.endswith("weight")}
    assert patches.keys() == wanted and len(wanted) == 7 * 8
    for key, (up, down) in patches.items():
        assert (up @ down).shape == layers["v2"].tensors[key].shape and down.shape[0] == 4


def test_all_layouts_and_containers_give_the_same_patches(tmp_path):
    plain = lora(tmp_path).patches()
    variants = [
        lora(tmp_path, "a.safetensors", in_diffusers_names), lora(tmp_path, "b.safetensors"),
        lora(tmp_path, "c.safetensors", lambda tensors: in_diffusers_names(tensors, peft=True)),
        lora(tmp_path, "d.ckpt", lambda tensors: {"state_dict": tensors, "animatediff_config": {}}),
        lora(tmp_path, "e.ckpt", lambda tensors: {f"module.{key}": tensor for key, tensor in tensors.items()}),
    ]
    for variant in variants:
        patches = variant.patches()
        assert patches.keys() == plain.keys()
        assert all(torch.equal(a, b) for key in plain for a, b in zip(patches[key], plain[key]))


@pytest.mark.parametrize("name", ["motion_lora_v2", "motion_lora_diffusers"])
def test_the_published_files_patch_168_weights_of_the_21_modules(tmp_path, name):
    file = load_motion_lora(saved(tmp_path, "pan.safetensors", random_tensors(narrow(PUBLISHED[name], 40))))
    patches = file.patches()
    assert len(patches) == 168 and file.rank == 64
    last = "layers.output_11_post_attn_0.temporal_transformer.transformer_blocks.0.attention_blocks.1."
    up, down = patches[last + "to_out.0.weight"]
    assert (up.shape, down.shape) == ((8, 64), (64, 8))


def test_merged_by_the_rule_it_changes_the_layers(tmp_path, layers):
    """W + strength * up @ down, without alpha: the key's weight moves by exactly that."""
    file, strength = layers["v2"], 0.7
    stack = TemporalStack(file.params)
    stack.load_state_dict(file.tensors)
    patches = lora(tmp_path).fitting(file.params)
    with torch.no_grad():
        for key, (up, down) in patches.items():
            stack.get_parameter(key).add_(strength * (up @ down))
    for key, (up, down) in patches.items():
        moved = stack.state_dict()[key] - file.tensors[key]
        assert torch.allclose(moved, strength * (up @ down), atol=1e-5)


@pytest.mark.parametrize("version", ["v1", "v3"])
def test_the_middle_module_is_left_out_where_the_layers_have_none(tmp_path, layers, version):
    patches = lora(tmp_path).fitting(layers[version].params)
    assert len(patches) == 6 * 8 and not any("middle" in key for key in patches)


def test_a_lora_of_a_few_modules_finds_its_places(tmp_path, layers):
    few = lora(tmp_path, change=lambda tensors: {key: tensor for key, tensor in tensors.items()
                                                 if key.startswith("up_blocks.1.motion_modules.0.")})
    assert {key.split(".")[1] for key in few.fitting(layers["v2"].params)} == {"output_2_post_attn_0"}


@pytest.mark.parametrize("options, sentence", [
    ({"channels": (64, 128)}, "patches 64 channels at input_1_post_attn_0, where the chosen AnimateDiff v2 layers "
                              "have 32"),
    ({"channels": (32, 64, 64)}, "fits the chosen AnimateDiff v2 layers only in part: they have no "),
    ({"channels": (32, 64), "resblocks": 2}, "only in part|patches"),
])
def test_a_lora_for_other_modules_is_refused(tmp_path, layers, options, sentence):
    file = load_motion_lora(saved(tmp_path, "zoom.ckpt", random_tensors(lora_shapes(**options))))
    with pytest.raises(VideoLDMError, match=f"^zoom.ckpt .*({sentence})"):
        file.fitting(layers["v2"].params)


def test_a_lora_on_video_ldm_layers_is_refused(tmp_path):
    params = video_ldm_params(unet_model(SMALL, device="meta"), 256, 768, lambda channels: 8, 6)
    with pytest.raises(VideoLDMError, match="patches AnimateDiff motion modules, and the chosen temporal layers are "
                                            "Video LDM"):
        lora(tmp_path).fitting(params)


def test_a_lora_of_the_middle_alone_is_refused_where_there_is_none(tmp_path, layers):
    middle = lora(tmp_path, change=lambda tensors: {k: t for k, t in tensors.items() if k.startswith("mid_block")})
    assert len(middle.fitting(layers["v2"].params)) == 8
    with pytest.raises(VideoLDMError, match="for the middle module alone"):
        middle.fitting(layers["v3"].params)


FIRST = "down_blocks.0.motion_modules.0.temporal_transformer.transformer_blocks.0."
Q = FIRST + "attention_blocks.0.processor.to_q_lora."
IMAGE_LAYER = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.processor.to_q_lora.up.weight"


@pytest.mark.parametrize("change, sentence", [
    (lambda t: t.pop(Q + "up.weight"), "to_q_lora.down.weight has no counterpart"),
    (lambda t: t.update({Q + "up.weight": torch.zeros(32, 3)}), "do not multiply"),
    (lambda t: t.update({Q + "alpha": torch.zeros(())}), "with alpha entries"),
    (lambda t: t.update({FIRST + "ff.net.0.proj_lora.up.weight": torch.zeros(8, 8)}), "none of the attentions"),
    (lambda t: t.update({IMAGE_LAYER: torch.zeros(8, 8)}), "patches the image model as well .* MotionDirector"),
    (lambda t: t.update({Q + "up.weight": torch.zeros(32, 4).half()}), "mixes types"),
])
def test_a_lora_that_is_damaged_or_of_another_trainer_is_refused(tmp_path, change, sentence):
    def changed(tensors):
        change(tensors)
        return tensors
    with pytest.raises(VideoLDMError, match=f"^zoom.ckpt .*{sentence}"):
        lora(tmp_path, change=changed)


def test_each_loader_refuses_the_others_file_and_says_where_it_goes(tmp_path):
    path = saved(tmp_path, "zoom.ckpt", random_tensors(lora_shapes(CHANNELS)))
    with pytest.raises(VideoLDMError, match="zoom.ckpt is a Motion LoRA, not a file of temporal layers .* the Motion "
                                            "LoRA node"):
        load_temporal(path)
    path = saved(tmp_path, "v2.ckpt", motion_tensors(motion_shapes(CHANNELS)))
    with pytest.raises(VideoLDMError, match="v2.ckpt is an AnimateDiff v2 motion module, not a Motion LoRA. Load it "
                                            "with Load"):
        load_motion_lora(path)
    path = saved(tmp_path, "style.safetensors", {"lora_unet_x.lora_down.weight": torch.zeros(4, 4)})
    with pytest.raises(VideoLDMError, match="style.safetensors is a LoRA for an image model .* core's Load LoRA"):
        load_motion_lora(path)
