"""What is read from a file: layers, schedule, positions, and what the Video LDM layers format keeps."""

import json
import re
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from video_ldm.temporal.errors import VideoLDMError
from video_ldm.temporal.families import identify, load_svd_initialisation, load_temporal, video_ldm
from video_ldm.temporal.families.motion_modules import ANIMATEDIFF, ModuleKey
from video_ldm.temporal.formats.temporal_file import Base, Schedule, TemporalFile
from video_ldm.temporal.layers import Factory
from video_ldm.temporal.new_layers import video_ldm_params
from video_ldm.temporal.params import StackParams
from video_ldm.temporal.slots import Site, unet_sites
from video_ldm.temporal.spatial_changes import POOLED_NORMS
from video_ldm.temporal.stack import TemporalStack
from video_ldm.temporal.unet_names import UNetNames
from video_ldm.tests.formats_help import PUBLISHED, motion_shapes, motion_tensors, narrow, saved
from video_ldm.tests.small import SD15_SIZE, SMALL, randomise, unet_model

SQRT_LINEAR = Schedule("sqrt_linear", 0.00085, 0.012)
LINEAR = Schedule("linear", 0.00085, 0.012, None)
SD1 = Base("Stable Diffusion 1.x", 768)


# AnimateDiff

def animatediff(folder, middle=True, table=32, dtype=torch.float32):
    tensors = motion_tensors(motion_shapes((32, 64), 1, middle, table), dtype=dtype)
    return load_temporal(saved(folder, "mm.safetensors", tensors))


@pytest.mark.parametrize("kind, table, middle, frames, positions, pooled", [
    ("animatediff_v1", 24, False, 16, 24, True), ("animatediff_v2", 32, True, 16, 32, False),
    ("animatediff_v3", 32, False, 16, 32, False), ("longanimatediff", 64, True, 64, 64, False),
    ("animatelcm", 0, True, 16, 64, False),
])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_each_animatediff_version_brings_its_own_facts(tmp_path, kind, table, middle, frames, positions, pooled, dtype):
    file = animatediff(tmp_path, middle, table, dtype=dtype)
    params = file.params
    assert (file.kind, params.frames, params.positions, params.pool_spatial_norms) == (kind, frames, positions, pooled)
    assert params.table_length == 0 and not any(".pe" in key for key in file.tensors)
    assert (file.schedule, file.base, file.fps, file.dtype) == (SQRT_LINEAR, SD1, 8.0, dtype)
    assert {(brick.heads, brick.blocks, brick.attentions, brick.norm_pooled) for _, brick in params.bricks} == {
        (8, 1, 2, False)}
    assert [site for site, _ in params.bricks if site.part == "middle"] == [Site("middle", 0, "post_attn")] * middle
    assert (file.hint is not None) == (kind == "animatelcm")
    TemporalStack(params).load_state_dict(file.tensors)


def test_animatelcm_says_how_it_wants_to_be_sampled(tmp_path):
    hint = animatediff(tmp_path, table=0).hint
    assert (hint.sampler, hint.model_sampling, hint.cfg, hint.steps) == ("lcm", "lcm", (1.0, 2.0), (4, 8))


@pytest.mark.parametrize("channels, resblocks, config", [
    ((320, 640, 1280, 1280), 2, SD15_SIZE),
    ((64, 128), 1, SMALL),
    ((64, 64), 1, dict(SMALL, channel_mult=(1, 1))),
    ((64, 128), 2, dict(SMALL, num_res_blocks=[2, 2], transformer_depth=[1, 1, 0, 0],
                        transformer_depth_output=[1, 1, 1, 0, 0, 0])),
])
def test_motion_modules_sit_after_every_block_of_a_unet_of_that_size(tmp_path, channels, resblocks, config):
    sites = unet_sites(unet_model(config, device="meta"))
    names, found = UNetNames(resblocks), {}
    for key, shape in motion_shapes(channels, resblocks).items():
        module = ModuleKey(key, ANIMATEDIFF)
        if module.suffix == "temporal_transformer.norm.weight":
            found[module.site(names)] = shape[0]
    assert found == {site: channels for site, (_, channels) in sites.items() if site.slot == "post_attn"}


def test_a_published_file_maps_to_the_21_sites_of_stable_diffusion(tmp_path):
    file = load_temporal(saved(tmp_path, "v2.safetensors", motion_tensors(narrow(PUBLISHED["ad_mm_sd_v15_v2"]))))
    assert len(file.params.bricks) == 21 and len(file.tensors) == 546
    assert [site.index for site, _ in file.params.bricks] == [1, 2, 4, 5, 7, 8, 10, 11, 0, *range(12)]
    assert [brick.channels for _, brick in file.params.bricks][:9] == [32, 32, 64, 64, 128, 128, 128, 128, 128]


def test_a_learned_table_of_positions_is_kept_and_ends_where_it_ends(tmp_path):
    tensors = motion_tensors(motion_shapes())
    middle = "mid_block.motion_modules.0.temporal_transformer.transformer_blocks.0."
    tensors[middle + "attention_blocks.1.pos_encoder.pe"] += 0.01
    file = load_temporal(saved(tmp_path, "learned.safetensors", tensors))
    assert file.params.table_length == 32 and "clips of at most 32 frames" in file.notes[-1]
    stack = TemporalStack(file.params)
    stack.load_state_dict(file.tensors)
    with pytest.raises(VideoLDMError, match="learned table of 32 frame positions"):
        stack.check_frames(33)


def test_a_table_kept_in_float32_beside_half_weights_is_no_mixture(tmp_path):
    tensors = {key: tensor if key.endswith(".pe") else tensor.half()
               for key, tensor in motion_tensors(motion_shapes()).items()}
    assert load_temporal(saved(tmp_path, "mm.ckpt", tensors)).dtype == torch.float16


FIRST = "down_blocks.0.motion_modules.0.temporal_transformer."


@pytest.mark.parametrize("damage, sentence", [
    (lambda t: t.pop(FIRST + "proj_in.weight"), "1 of its 182 tensors are missing .*proj_in.weight.*incomplete"),
    (lambda t: [t.pop(key) for key in list(t) if key.startswith("down_blocks.1.")], "lacks "
                                                                                    "down_blocks.1.motion_modules.0"),
    (lambda t: t.update({FIRST + "proj_in.weight": torch.zeros(64, 32)}), r"has shape \[64, 32\] where \[64, 64\] is "
                                                                           "due"),
    (lambda t: t.update({FIRST + "extra": torch.zeros(1)}), "1 tensors that such layers do not have .*extra"),
    (lambda t: t.update({FIRST + "proj_in.weight": torch.zeros(64, 64, dtype=torch.float16)}),
     "mixes types: .* is float32, .* is float16"),
    (lambda t: t.update({FIRST + "proj_in.weight": torch.zeros(64, 64, dtype=torch.int8)}), "as int8, .*Quantised"),
    (lambda t: t.update({FIRST + "transformer_blocks.0.attention_blocks.0.pos_encoder.pe": torch.zeros(1, 24, 64)}),
     r"positions have lengths \[24, 32\]"),
    (lambda t: t.update({FIRST + "norm.weight": torch.zeros(40)}), "no layer has its sizes"),
    (lambda t: t.pop(FIRST + "norm.weight"), "no norm of a multiple of 8 channels"),
])
def test_a_motion_module_that_is_not_whole_is_refused(tmp_path, damage, sentence):
    tensors = motion_tensors(motion_shapes())
    damage(tensors)
    with pytest.raises(VideoLDMError, match=f"^mm.safetensors .*{sentence}"):
        load_temporal(saved(tmp_path, "mm.safetensors", tensors))


# Video LDM layers

TINY = dict(SMALL, model_channels=32)


def tiny_stack(**options):
    params = video_ldm_params(unet_model(TINY, device="meta"), 128, 768, lambda channels: 8, 6, **options)
    return randomise(TemporalStack(params))


def written(folder, name="layers.safetensors", **options):
    """A small stack and the file it was written to."""
    stack = tiny_stack(**options)
    video_ldm.write(folder / name, stack, stack.params, schedule=LINEAR, base=SD1, fps=4.0, licence="Apache-2.0",
                    metadata={"title": "driving"})
    return stack, folder / name


@pytest.mark.parametrize("options", [{}, {"mix_length": 6}, {"convolution": False}, {"attention": False}])
def test_video_ldm_layers_survive_the_disk_to_the_bit(tmp_path, options):
    stack, path = written(tmp_path, **options)
    file = load_temporal(path)
    assert file.params == stack.params and (file.kind, file.base, file.fps) == ("video_ldm", SD1, 4.0)
    assert (file.schedule, file.licence, file.metadata["title"]) == (LINEAR, "Apache-2.0", "driving")
    state = stack.state_dict()
    assert file.tensors.keys() == state.keys() and all(torch.equal(file.tensors[key], state[key]) for key in state)


def test_shared_noise_is_version_4_and_a_file_that_says_nothing_has_none(tmp_path):
    stack, path = written(tmp_path)
    assert load_temporal(path).params.shared_noise is False
    params = replace(stack.params, shared_noise=True)
    video_ldm.write(path, stack, params, schedule=LINEAR, base=SD1)
    file = load_temporal(path)
    assert file.params == params and file.metadata["version"] == "4" and file.metadata["shared_noise"] == "true"
    assert any("one noise for all frames" in note for note in file.notes)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("schedule", [Schedule("sqrt_linear", 1 / 3e3, 0.1 + 0.2, "v"), SQRT_LINEAR])
def test_every_fact_and_number_type_survives_the_disk(tmp_path, dtype, schedule):
    stack = tiny_stack().to(dtype)
    params = replace(stack.params, positions=12, spatial=(POOLED_NORMS,), family="My layers")
    video_ldm.write(tmp_path / "a.safetensors", stack, params, schedule=schedule, base=Base("my model"))
    file = load_temporal(tmp_path / "a.safetensors")
    assert (file.params, file.schedule, file.base, file.fps) == (params, schedule, Base("my model", None), None)
    state = stack.state_dict()
    assert file.dtype == dtype and all(torch.equal(file.tensors[key], state[key]) for key in state)


def test_layers_at_the_size_of_stable_diffusion_have_svds_names():
    unet = unet_model(dict(SD15_SIZE, context_dim=1024), device="meta")
    params = video_ldm_params(unet, 1280, 1024, lambda channels: channels // 64, 14)
    names = {video_ldm.file_key(params, key): list(tensor.shape)
             for key, tensor in TemporalStack(params, Factory(device="meta")).state_dict().items()}
    published = {key.removeprefix("model.diffusion_model."): shape for key, shape in PUBLISHED["svd_unet"].items()
                 if ".time_stack." in key or ".time_mixer." in key or ".time_pos_embed." in key}
    assert len(params.bricks) == 38 and names == published


def test_names_of_sites_in_deep_transformers_are_told_apart():
    for site in (Site("input", 4, "in_attn_post_ff", 1), Site("middle", 0, "in_attn_post_ff", 9),
                 Site("middle", 0, "post_res", 1), Site("output", 3, "post_res"), Site("input", 4, "in_attn_post_ff")):
        assert video_ldm.parse(f"{video_ldm.module_name(site)}.time_stack.0.x") == (site, "time_stack.0.x")


def test_the_metadata_is_plain_text_that_says_everything(tmp_path):
    _, path = written(tmp_path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        assert "input_blocks.1.0.time_stack.in_layers.0.weight" in file.keys()
        assert "middle_block.2.time_mixer.mix_factor" in file.keys()
    transformers = ("input_blocks.1.1", "middle_block.1", "output_blocks.2.1", "output_blocks.3.1")
    assert json.loads(metadata.pop("heads")) == dict.fromkeys(transformers, 8)
    assert metadata == {
        "format": "video_ldm_temporal_layers", "version": "1", "family": "Video LDM", "layers": "12",
        "base_family": "Stable Diffusion 1.x", "base_context_dim": "768", "frames": "6", "fps": "4.0",
        "licence": "Apache-2.0", "beta_schedule": "linear", "linear_start": "0.00085", "linear_end": "0.012",
        "position_encoding": "timestep sinusoid through an MLP", "mix_length": "1", "pool_spatial_norms": "false",
        "title": "driving"}


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    _, path = written(tmp_path)
    before = path.read_bytes()

    def failing(tensors, target, metadata):
        target.write_bytes(b"half")
        raise OSError("disk full")
    monkeypatch.setattr(video_ldm, "save_file", failing)
    with pytest.raises(OSError):
        written(tmp_path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_writing_an_incomplete_set_or_a_reserved_entry_is_refused(tmp_path):
    stack = tiny_stack()
    state = stack.state_dict()
    state.popitem()
    with pytest.raises(VideoLDMError, match="1 of its .* tensors are missing"):
        video_ldm.write(tmp_path / "a.safetensors", state, stack.params, schedule=LINEAR, base=SD1)
    with pytest.raises(ValueError, match="'frames' is the format's own"):
        video_ldm.write(tmp_path / "a.safetensors", stack, stack.params, schedule=LINEAR, base=SD1,
                        metadata={"frames": "9"})
    motion = animatediff(tmp_path)
    with pytest.raises(ValueError, match="MotionParams at input_1_post_attn_0 has no name"):
        video_ldm.write(tmp_path / "a.safetensors", motion.tensors, motion.params, schedule=LINEAR, base=SD1)
    assert not (tmp_path / "a.safetensors").exists()


MIX = "input_blocks.1.0.time_mixer.mix_factor"


@pytest.mark.parametrize("change, sentence", [
    (lambda m, t: m.update(version="5"), "version 5 of the Video LDM layers format; this pack reads versions 1, 2, 3, "
                                         "4.* Update"),
    (lambda m, t: m.update(version="4"), "contradict each other: it is version 4 and says shared noise None"),
    (lambda m, t: m.update(shared_noise="true"), "it is version 1 and says shared noise 'true'"),
    (lambda m, t: m.update(version="4", shared_noise="yes"), "it is version 4 and says shared noise 'yes'"),
    (lambda m, t: m.update(version="next"), "version next of the Video LDM layers format"),
    (lambda m, t: m.pop("frames"), "metadata lacks frames"),
    (lambda m, t: m.update(frames="many"), "metadata cannot be read"),
    (lambda m, t: m.update(frames="0"), "contradict each other: it says clips of 0 frames"),
    (lambda m, t: m.update(beta_schedule="cosine"), "metadata cannot be read .*cosine"),
    (lambda m, t: m.update(position_encoding="rotary"), "encodes frame positions as 'rotary'"),
    (lambda m, t: m.update(heads='{"input_blocks.1.1": 8}'), "contradict each other: a layer lacks "
                                                             "'number of heads of mid"),
    (lambda m, t: m.update(heads=m["heads"].replace("8", "7")), "32 channels of .* do not divide into 7 heads"),
    (lambda m, t: m.update(heads="[8]"), "metadata cannot be read"),
    (lambda m, t: m.update(base_context_dim="1024"), "it says text of width 1024, and .* takes 768"),
    (lambda m, t: m.update(mix_length="6"), "it says a mix of length 6, and .* has 1"),
    (lambda m, t: [t.pop(key) for key in list(t) if key.startswith("input_blocks.1.0.")], "it says 12 layers and "
                                                                                          "holds 11"),
    (lambda m, t: t.pop("input_blocks.1.1.time_stack.0.norm1.bias"), "tensors are missing"),
    (lambda m, t: t.pop(MIX), "a layer lacks 'time_mixer.mix_factor'"),
    (lambda m, t: t.update({"input_blocks.0.0.weight": torch.zeros(1)}), "input_blocks.0.0.weight is no temporal "
                                                                         "layer's"),
    (lambda m, t: t.update({"input_blocks.1.0.time_stack.in_layers.2.bias": torch.zeros(32).half()}), "mixes types"),
])
def test_a_file_that_contradicts_itself_is_refused(tmp_path, change, sentence):
    _, path = written(tmp_path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    change(metadata, tensors)
    save_file(tensors, tmp_path / "changed.safetensors", metadata=metadata)
    with pytest.raises(VideoLDMError, match=f"^changed.safetensors .*{sentence}"):
        load_temporal(tmp_path / "changed.safetensors")


# Stable Video Diffusion

SVD_FILES = ("svd_unet", "temporal part", "diffusers_svd_unet")
TEMPORAL_PART = re.compile(r".*\.(time_(stack|mixer|pos_embed)|temporal_(res_block|transformer_blocks))\.")
WHOLE = re.compile(r"(model\.diffusion_model\.)?(conv_in|input_blocks\.0\.0|label_emb|time_embed)\.")


def svd_file(folder, which: str):
    """A file a fifth as wide as published, with the published text width. Each tensor holds its own number. Few
    spatial tensors are kept."""
    shapes = PUBLISHED["svd_unet" if which == "temporal part" else which]
    kept = [key for key in shapes if TEMPORAL_PART.match(key) or (which != "temporal part" and WHOLE.match(key))]
    tensors = {}
    for number, key in enumerate(kept):
        shape = [size if size == 1024 or size < 320 else size // 5 for size in shapes[key]]
        tensors[key] = torch.full(shape, number, dtype=torch.float16)
    return saved(folder, "svd.safetensors", tensors)


# Places in a stack, and their names in the two layouts.
SVD_PLACES = {
    "input_1_post_res_0.time_stack.in_layers.2.weight": (
        "input_blocks.1.0.time_stack.in_layers.2.weight", "down_blocks.0.resnets.0.temporal_res_block.conv1.weight"),
    "middle_0_post_res_1.time_stack.emb_layers.1.bias": (
        "middle_block.2.time_stack.emb_layers.1.bias", "mid_block.resnets.1.temporal_res_block.time_emb_proj.bias"),
    "output_5_post_res_0.time_mixer.mix_factor": (
        "output_blocks.5.0.time_mixer.mix_factor", "up_blocks.1.resnets.2.time_mixer.mix_factor"),
    "input_8_in_attn_post_ff_0.time_stack.0.attn2.to_k.weight": (
        "input_blocks.8.1.time_stack.0.attn2.to_k.weight",
        "down_blocks.2.attentions.1.temporal_transformer_blocks.0.attn2.to_k.weight"),
    "middle_0_in_attn_post_ff_0.time_pos_embed.2.weight": (
        "middle_block.1.time_pos_embed.2.weight", "mid_block.attentions.0.time_pos_embed.linear_2.weight"),
}


def thin_unet(context_dim: int = 1024):
    return unet_model(dict(SD15_SIZE, model_channels=64, context_dim=context_dim), device="meta")


@pytest.mark.parametrize("which", SVD_FILES)
def test_svd_is_refused_on_an_image_model_and_taken_as_a_start_for_training(tmp_path, which):
    path = svd_file(tmp_path, which)
    with pytest.raises(VideoLDMError, match="^svd.safetensors is .*Stable Video Diffusion.* silent garbage: they "
                                            "expect EDM"):
        load_temporal(path)
    params = video_ldm_params(thin_unet(), 256, 1024, lambda channels: channels // 64, 14)
    start = load_svd_initialisation(path, params)
    assert len(start.tensors) == 738 and start.fresh == [] and len(start.notes) == 1
    TemporalStack(params, Factory(device="meta")).load_state_dict(start.tensors, assign=True)
    stored = load_file(path)
    for place, names in SVD_PLACES.items():
        name = next(key for key in stored if key.endswith(names[which == "diffusers_svd_unet"]))
        assert torch.equal(start.tensors[f"layers.{place}"], stored[name])


def test_on_stable_diffusion_1_the_text_widths_of_svd_start_fresh(tmp_path):
    path = svd_file(tmp_path, "temporal part")
    params = video_ldm_params(thin_unet(768), 256, 768, lambda channels: 8, 14)
    start = load_svd_initialisation(path, params)
    assert len(start.fresh) == 32 and all("attn2.to_" in key for key in start.fresh)
    assert "heads of 64 channels" in start.notes[-1]
    assert len(start.tensors) == 706


def test_nothing_else_is_taken_as_a_start_for_training(tmp_path):
    stack, path = written(tmp_path)
    with pytest.raises(VideoLDMError, match="layers.safetensors is no Stable Video Diffusion checkpoint"):
        load_svd_initialisation(path, stack.params)


def test_layers_without_their_metadata_are_refused(tmp_path):
    _, path = written(tmp_path)
    save_file(load_file(path), tmp_path / "bare.safetensors")
    assert identify(tmp_path / "bare.safetensors").kind == "video_ldm_bare"
    with pytest.raises(VideoLDMError, match="without the metadata of this pack's format"):
        load_temporal(tmp_path / "bare.safetensors")


def test_the_type_of_a_set_is_that_of_most_numbers_and_not_of_most_tensors():
    tensors = {"large": torch.zeros(100, dtype=torch.float16), "a": torch.zeros(4), "b": torch.zeros(4)}
    params = StackParams("Video LDM", (), 8, None)
    assert TemporalFile("x", "video_ldm", "x", params, tensors, None, None).dtype == torch.float16
