"""Motion adapters of diffusers: read, run with norms of each kind, and named by what their file's name says."""

from dataclasses import replace

import pytest
import torch

from video_ldm.temporal.errors import VideoLDMError
from video_ldm.temporal.families import identify_keys, load_motion_lora, load_temporal
from video_ldm.temporal.families.presets import with_preset
from video_ldm.temporal.formats.temporal_file import Base, Schedule
from video_ldm.temporal.norms import CHOICES, EACH_FRAME, IN_IMAGE_MODEL, IN_LAYERS, USUAL, with_norms
from video_ldm.temporal.slots import Site
from video_ldm.temporal.spatial_changes import POOLED_NORMS
from video_ldm.temporal.stack import TemporalStack
from video_ldm.tests.formats_help import (
    PUBLISHED,
    adapter_names,
    lora_shapes,
    motion_shapes,
    motion_tensors,
    random_tensors,
    saved,
)
from video_ldm.tests.small import SD15, batch, randomise, relative_error, unet_model
from video_ldm.tests.test_formats_parity import CONFIGS, TEXT, animatediff_names, diffusers_unet, image_unet, run

NAME = "diffusion_pytorch_model.safetensors"
SDXL_LEVELS = (320, 640, 1280)


def adapter(folder, middle=True, table=32, dtype=torch.float32, levels=(32, 64), name=NAME):
    tensors = motion_tensors(motion_shapes(levels, 1, middle, table), dtype=dtype)
    return load_temporal(saved(folder, name, adapter_names(tensors)))


def stack_of(file) -> TemporalStack:
    stack = TemporalStack(file.params)
    stack.load_state_dict(file.tensors)
    return stack


# Running

@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_an_adapter_with_norms_pooled_in_the_layers_equals_diffusers_whole_unet(tmp_path, name):
    middle, config = "with middle" in name, dict(SD15, model_channels=64, **CONFIGS[name]) | {"context_dim": TEXT}
    theirs = diffusers_unet(config, middle)
    weights = theirs.state_dict()
    parts = {key: tensor.clone() for key, tensor in weights.items() if ".motion_modules." in key}
    unet, file = image_unet(config, weights), load_temporal(saved(tmp_path, NAME, parts))
    x, timesteps, context = batch(2, 3, text=TEXT)
    reference = theirs(x.unflatten(0, (2, 3)).transpose(1, 2), timesteps[0], context).sample
    reference = reference.transpose(1, 2).flatten(0, 1)

    def made(choice):
        return run(unet, stack_of(with_norms(file, choice)), x, timesteps, context, 3)
    assert relative_error(made(IN_LAYERS), reference) < 1e-5
    assert torch.equal(made(USUAL), made(EACH_FRAME)) and relative_error(made(USUAL), reference) > 1e-3
    assert relative_error(made(IN_IMAGE_MODEL), reference) > 1e-3
    own = load_temporal(saved(tmp_path, "mm.safetensors", animatediff_names(weights)))
    assert torch.equal(made(USUAL), run(unet, stack_of(own), x, timesteps, context, 3))


@torch.no_grad()
def test_an_adapter_of_v1_with_norms_pooled_in_the_image_model_equals_the_authors_file(tmp_path):
    config = dict(SD15, model_channels=32, **CONFIGS["one ResBlock, with middle"]) | {"context_dim": TEXT}
    unet = randomise(unet_model(config))
    x, timesteps, context = batch(2, 3, text=TEXT)
    own = load_temporal(saved(tmp_path, "mm_sd_v15.safetensors", motion_tensors(motion_shapes((32, 64), 1, False, 24))))
    made = {choice: run(unet, stack_of(with_norms(adapter(tmp_path, False, 24), choice)), x, timesteps, context, 3)
            for choice in CHOICES}
    authors = run(unet, stack_of(own), x, timesteps, context, 3)
    assert own.kind == "animatediff_v1" and torch.equal(made[IN_IMAGE_MODEL], authors)
    assert all(relative_error(made[choice], authors) > 1e-3 for choice in (USUAL, EACH_FRAME, IN_LAYERS))
    alone = run(unet, stack_of(with_norms(own, EACH_FRAME)), x, timesteps, context, 3)
    assert torch.equal(alone, made[EACH_FRAME])


# Reading

@pytest.mark.parametrize("middle, table", [(False, 24), (False, 32), (True, 32), (True, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_an_adapter_brings_the_weights_and_the_facts_of_animatediff(tmp_path, middle, table, dtype):
    file = adapter(tmp_path, middle, table, dtype)
    own = load_temporal(saved(tmp_path, "mm.safetensors", motion_tensors(motion_shapes((32, 64), 1, middle, table),
                                                                         dtype=dtype)))
    assert file.kind == "diffusers_motion_adapter" and "in diffusers' naming" in file.title
    assert file.params.bricks == own.params.bricks and file.params.positions == table and not file.params.spatial
    assert (file.schedule, file.base, file.fps, file.dtype) == (own.schedule, own.base, own.fps, dtype)
    assert file.tensors.keys() == own.tensors.keys()
    assert all(torch.equal(file.tensors[key], own.tensors[key]) for key in own.tensors)
    assert "norms sets it" in file.norms and own.norms == (POOLED_NORMS.note if table == 24 else "")


def test_an_adapter_for_sdxl_pools_the_norms_in_its_layers_as_the_beta(tmp_path):
    file = adapter(tmp_path, False, 32, torch.float16, SDXL_LEVELS)
    assert (file.kind, file.base, file.schedule) == ("diffusers_motion_adapter_sdxl", Base("SDXL", 2048),
                                                     Schedule("linear", 0.00085, 0.02))
    assert {brick.norm_pooled for _, brick in file.params.bricks} == {True}
    assert with_norms(file, IN_LAYERS).params == file.params
    assert {brick.norm_pooled for _, brick in with_norms(file, EACH_FRAME).params.bricks} == {False}


def test_an_adapter_for_sdxl_with_hotshots_table_is_refused_because_its_norms_are_not_known(tmp_path):
    with pytest.raises(VideoLDMError, match="is a motion adapter in diffusers' naming with tensors that no published "
                                            "version has, not .* Use the file that it was made from"):
        adapter(tmp_path, False, 24, torch.float16, SDXL_LEVELS)


@pytest.mark.parametrize("name, modules", [("v1", 20), ("v2", 21), ("sdxl", 15)])
def test_the_published_layouts_have_a_module_after_every_resblock(name, modules):
    shapes = PUBLISHED[f"diffusers_motion_adapter_{name}"]
    assert len(shapes) == 27 * modules
    assert identify_keys({f"unet.{key}": shape for key, shape in shapes.items()}).takes == "temporal"


def test_an_adapter_without_tables_computes_its_positions(tmp_path):
    file = adapter(tmp_path, table=0)
    assert file.params.positions == 32 and file.params.table_length == 0


def test_a_learned_table_serves_both_attentions_of_its_block(tmp_path):
    tensors = adapter_names(motion_tensors(motion_shapes((32, 64), 1, True, 8)))
    table = "mid_block.motion_modules.0.transformer_blocks.0.pos_embed.pe"
    tensors[table] = tensors[table] + 0.25
    file = load_temporal(saved(tmp_path, NAME, tensors))
    assert file.params.table_length == 8 and "clips of at most 8 frames" in file.notes[-1]
    own = [file.tensors[f"layers.middle_0_post_attn_0.temporal_transformer.transformer_blocks.0.attention_blocks.{m}."
                        "pos_encoder.pe"] for m in range(2)]
    assert all(torch.equal(one, tensors[table]) for one in own) and own[0].data_ptr() != own[1].data_ptr()
    stack_of(file)


MODULE = "down_blocks.0.motion_modules.0."


@pytest.mark.parametrize("damage, sentence", [
    (lambda t: t.pop(MODULE + "proj_in.weight"), "1 of its 182 tensors are missing .*proj_in.weight.*incomplete"),
    (lambda t: [t.pop(key) for key in list(t) if key.startswith("down_blocks.1.")],
     "lacks down_blocks.1.motion_modules.0"),
    (lambda t: t.update({MODULE + "transformer_blocks.0.attention_blocks.0.to_q.weight": torch.zeros(32, 32)}),
     "attn1.to_q.weight and .* are the same tensor|attention_blocks.0.to_q.weight and .* are the same tensor"),
    (lambda t: t.update({MODULE + "transformer_blocks.0.attn3.to_q.weight": torch.zeros(32, 32)}), "1 tensors that "
     "such layers do not have"),
    (lambda t: t.update({MODULE + "transformer_blocks.0.pos_embed.pe": torch.zeros(1, 7, 32)}), "lengths"),
    (lambda t: t.update({MODULE + "proj_in.weight": t[MODULE + "proj_in.weight"].half()}), "mixes types"),
    (lambda t: t.update({"conv_in.weight": torch.zeros(320, 9, 3)}), "looks like a PIA file .* shape \\[320, 9, 3\\]"),
    (lambda t: t.update({"conv_in.weight": torch.zeros(320, 4, 3, 3)}), "whole UNetMotionModel"),
])
def test_a_damaged_adapter_is_refused_in_a_sentence(tmp_path, damage, sentence):
    tensors = adapter_names(motion_tensors(motion_shapes((32, 64))))
    damage(tensors)
    with pytest.raises(VideoLDMError, match=sentence):
        load_temporal(saved(tmp_path, NAME, tensors))


def test_a_motion_lora_fits_an_adapter(tmp_path):
    file = adapter(tmp_path)
    lora = load_motion_lora(saved(tmp_path, "lora.safetensors", random_tensors(lora_shapes((32, 64)))))
    assert len(lora.fitting(file.params)) == 56


# Norms

def test_norms_change_no_weight_and_leave_the_usual_file_as_it_is(tmp_path):
    file = adapter(tmp_path)
    assert with_norms(file, USUAL) is file
    for choice in (EACH_FRAME, IN_LAYERS, IN_IMAGE_MODEL):
        changed = with_norms(file, choice)
        assert changed.tensors is file.tensors and changed.norms not in ("", file.norms)
        assert {brick.norm_pooled for _, brick in changed.params.bricks} == {choice == IN_LAYERS}
        assert changed.params.spatial == ((POOLED_NORMS,) if choice == IN_IMAGE_MODEL else ())
        assert replace(changed.params, bricks=(), spatial=()) == replace(file.params, bricks=(), spatial=())


def test_norms_of_layers_that_are_no_motion_modules_are_refused():
    from video_ldm.nodes.host import files
    demo = load_temporal(files.DEMO_FOLDER / "video_ldm_driving.safetensors")
    assert with_norms(demo, USUAL) is demo
    with pytest.raises(VideoLDMError, match="norms is 'pooled in the layers', and video_ldm_driving.safetensors is .*: "
                                            "only motion modules .* Set norms to 'usual for the file'."):
        with_norms(demo, IN_LAYERS)


# Presets

@pytest.mark.parametrize("name, steps", [
    ("animatediff_lightning_4step_comfyui.safetensors", 4), ("AnimateDiff-Lightning/8-step.safetensors", 8),
    ("animatediff_lightning_2step_diffusers.safetensors", 2), ("lightning 1 step.safetensors", 1),
    ("sd15/8steps_Lightning_mm.safetensors", 8)])
@pytest.mark.parametrize("names", [dict, adapter_names])
def test_lightning_is_told_by_its_name_and_says_how_it_is_sampled(tmp_path, name, steps, names):
    tensors = names(motion_tensors(motion_shapes((32, 64))))
    file = load_temporal(saved(tmp_path, "file.safetensors", tensors))
    preset = with_preset(file, name)
    assert file.hint is None and preset.licence == "CreativeML Open RAIL-M" and preset.params == file.params
    assert preset.hint.sentence() == (f"Sample with euler, scheduler sgm_uniform, cfg 1, {steps} "
                                      f"step{'s' * (steps > 1)}.")
    assert preset.notes[len(file.notes)].startswith("Its name says that it is AnimateDiff-Lightning for")
    assert ("research only" in preset.notes[-1]) == (steps == 1)


def test_lightning_without_a_number_says_that_the_steps_are_those_it_was_made_for(tmp_path):
    file = adapter(tmp_path)
    for name in ("lightning.safetensors", "lightning_0step.safetensors", "lightning_1024step.safetensors"):
        preset = with_preset(file, name)
        assert preset.hint is None and "not for how many steps (1, 2, 4 or 8)" in preset.notes[-1]


def test_animatelcms_adapter_is_told_by_its_name_or_folder(tmp_path):
    file = adapter(tmp_path)
    preset = with_preset(file, f"AnimateLCM/{NAME}")
    assert preset.hint.sentence() == ("Sample with lcm and ModelSamplingDiscrete set to lcm, cfg 1 to 2, 4 to 8 steps.")
    assert preset.licence == "not stated by its authors" and "AnimateLCM's own LoRA" in preset.notes[-1]


@pytest.mark.parametrize("middle, name", [(True, NAME), (True, "mm_sd15_v2.safetensors"),
                                          (False, "lightning_4step.safetensors"), (False, "AnimateLCM.safetensors")])
def test_no_other_file_has_a_preset(tmp_path, middle, name):
    file = adapter(tmp_path, middle)
    assert with_preset(file, name) is file
    assert (Site("middle", 0, "post_attn") in dict(file.params.bricks)) == middle
