"""Files of LaVie's super-resolution and of Upscale-A-Video: what is read from them, and what is refused."""

import re
from pathlib import Path

import pytest
import torch

from video_ldm.temporal.errors import VideoLDMError
from video_ldm.temporal.families import identify_keys, load_temporal
from video_ldm.temporal.families import video_super_resolution as vsr
from video_ldm.temporal.formats.files import TensorFile
from video_ldm.temporal.formats.temporal_file import Base, NoiseLevels, Schedule
from video_ldm.temporal.formats.tensor_names import Keys
from video_ldm.temporal.layers import Factory, LevelModule
from video_ldm.temporal.layers.position import rotation_angles
from video_ldm.temporal.slots import Site, unet_sites
from video_ldm.temporal.stack import TemporalStack
from video_ldm.temporal.unet_names import UNetNames
from video_ldm.tests import vsr_help
from video_ldm.tests.formats_help import PUBLISHED, saved
from video_ldm.tests.small import SD15_SIZE, unet_model

X4 = dict(vsr_help.UNET, model_channels=256, num_heads=8, context_dim=1024)
FREQUENCIES = re.compile(r".*freqs$")


@pytest.fixture(scope="module")
def weights():
    """The temporal layers alone, for three levels of one ResBlock, all but the first with text."""
    return vsr_help.random_file(vsr_help.temporal_shapes((64, 64, 128), 1, (1, 2), heads=2))


def load(folder, tensors, name="lavie_vsr.pt"):
    return load_temporal(saved(folder, name, tensors))


def published(name: str, kind: str):
    """The published file as it would be read, without any weights."""
    shapes = {key: tuple(shape) for key, shape in PUBLISHED[name].items()}

    def read(keys):
        return {key: rotation_angles(torch.ones(1))[0] if FREQUENCIES.match(key)
                else torch.empty(shapes[key], device="meta") for key in keys}
    return vsr.load(TensorFile(Path(f"{name}.bin"), shapes, {}, tuple(shapes), read), identify_keys(shapes))


# The published files

def test_the_published_file_holds_the_papers_217_million_temporal_parameters():
    file = published(vsr_help.LAVIE, "lavie_vsr")
    stack = TemporalStack(file.params, Factory(device="meta"))
    numbers = [weight.numel() for weight in stack.parameters()]
    assert sum(numbers) == 217_638_400 and len(numbers) == 454
    levels = [module for module in stack.modules() if isinstance(module, LevelModule)]
    assert len(levels) == 9 and sum(p.numel() for module in levels for p in module.parameters()) == 128_403_968
    # LaVie's rule for what was trained; the frequencies of 17 rotations are no weights.
    named = {key: shape for key, shape in PUBLISHED[vsr_help.LAVIE].items() if "temporal" in key}
    assert sum(torch.Size(shape).numel() for shape in named.values()) == sum(numbers) + 17 * 16


def test_both_published_files_are_one_set_of_layers_for_the_x4_upscaler():
    lavie, other = published(vsr_help.LAVIE, "lavie_vsr"), published(vsr_help.UPSCALE_A_VIDEO, "upscale_a_video")
    assert lavie.params.bricks == other.params.bricks and len(lavie.params.bricks) == 41
    assert {key: tensor.shape for key, tensor in lavie.tensors.items()} == {
        key: tensor.shape for key, tensor in other.tensors.items()}
    sites = {site: channels for site, (_, channels) in unet_sites(unet_model(X4, device="meta")).items()}
    for file in (lavie, other):
        file.check_base(sites, 1024, "the Stable Diffusion x4 upscaler")
        assert (file.params.frames, file.params.positions, file.params.pool_spatial_norms) == (8, None, True)
        assert (file.base, file.fps) == (Base("Stable Diffusion x4 upscaler", 1024), None)
    assert {brick.heads for _, brick in lavie.params.bricks if hasattr(brick, "heads")} == {8}


def test_each_file_brings_its_schedule_its_licence_and_how_it_is_sampled():
    lavie, other = published(vsr_help.LAVIE, "lavie_vsr"), published(vsr_help.UPSCALE_A_VIDEO, "upscale_a_video")
    assert lavie.schedule == Schedule("sqrt_linear", 0.0001, 0.02, "v") and "research" in lavie.licence
    assert lavie.noise == NoiseLevels("LaVie", 350, 50)
    assert "left them as the x4 upscaler has them" in lavie.notes[0] and "noise level 50" in lavie.notes[1]
    assert other.schedule == Schedule("linear", 0.0001, 0.02, "v") and "non-commercial" in other.licence
    assert other.noise == NoiseLevels("Upscale-A-Video", 350, 120)
    assert "Whether they were trained is not known" in other.notes[0] and "was not seen" in other.notes[1]


@pytest.mark.parametrize("config, text, sentence", [
    (SD15_SIZE, 768, "its text has a width of 768 instead of 1024. Connect the MODEL of x4-upscaler-ema.safetensors"),
    (dict(SD15_SIZE, context_dim=1024), 1024,
     "which has 320 channels instead of 256 at the layer input_3_post_level_0"),
])
def test_other_image_models_are_refused(config, text, sentence):
    sites = {site: channels for site, (_, channels) in unet_sites(unet_model(config, device="meta")).items()}
    with pytest.raises(VideoLDMError, match=f"lavie_vsr.bin is LaVie's video .*, made for .*{sentence}"):
        published(vsr_help.LAVIE, "lavie_vsr").check_base(sites, text, "Stable Diffusion")


# Reading

def test_the_same_weights_under_either_files_names_give_the_same_layers(tmp_path, weights):
    lavie, other = load(tmp_path, weights), load(tmp_path, vsr_help.other_names(weights), "unet_video.bin")
    assert (lavie.kind, other.kind) == ("lavie_vsr", "upscale_a_video")
    assert lavie.params.bricks == other.params.bricks and lavie.tensors.keys() == other.tensors.keys()
    assert all(torch.equal(lavie.tensors[key], other.tensors[key]) for key in lavie.tensors)
    assert set(vsr_help.other_names(PUBLISHED[vsr_help.LAVIE])) == set(PUBLISHED[vsr_help.UPSCALE_A_VIDEO])


@pytest.mark.parametrize("wrap", [
    lambda t: {"ema": t, "opt": {"step": 3}}, lambda t: {"module." + key: tensor for key, tensor in t.items()},
    lambda t: {"state_dict": {"unet." + key: tensor for key, tensor in t.items()}},
    lambda t: t | {"conv_in.weight": torch.ones(4), "down_blocks.1.attentions.0.norm.weight": torch.ones(4).half()},
    lambda t: {key: tensor for key, tensor in t.items() if "freqs" not in key},
    lambda t: t | {"mid_block.attentions.0.transformer_blocks.0.attn_temporal.rotary_emb.cached_freqs": torch.ones(3)},
    lambda t: {key: tensor.half() for key, tensor in t.items()},
])
def test_wrapped_bare_and_half_files_are_the_same_layers(tmp_path, weights, wrap):
    file, whole = load(tmp_path, wrap(weights)), load(tmp_path, weights, "whole.pt")
    assert file.params == whole.params
    assert all(torch.equal(tensor.float(), whole.tensors[key].to(tensor.dtype).float())
               for key, tensor in file.tensors.items())


@pytest.mark.parametrize("channels, resblocks, text, depth, output", [
    ((64, 128), 1, (0,), [1, 0], [1, 1, 0, 0]),
    ((64, 64, 128), 1, (1, 2), [0, 1, 1], [0, 0, 1, 1, 1, 1]),
    ((64, 128), 3, (1,), [0, 0, 0, 1, 1, 1], [0] * 4 + [1] * 4),
])
def test_the_depth_of_a_network_is_read_from_the_names_in_its_file(tmp_path, channels, resblocks, text, depth, output):
    """The layers fill all places of a UNet of that shape where such layers sit."""
    file = load(tmp_path, vsr_help.random_file(vsr_help.temporal_shapes(channels, resblocks, text, heads=2)))
    unet = unet_model(dict(vsr_help.UNET, num_res_blocks=[resblocks] * len(channels), transformer_depth=depth,
                           channel_mult=tuple(c // 64 for c in channels), transformer_depth_output=output,
                           disable_self_attentions=[True] * len(channels)), device="meta")
    found = {site: channels for site, (_, channels) in unet_sites(unet).items()}
    assert {site: brick.channels for site, brick in file.params.bricks} == {
        site: channels for site, channels in found.items() if site.slot in ("in_attn_pre_ff", "post_level")
        or site.slot == "post_res" and site._replace(slot="in_attn_pre_ff") in found}


INSIDE = "down_blocks.1.attentions.0."
ATTENTION = INSIDE + "transformer_blocks.0.attn_temporal."
TABLE = "time_rel_pos_bias.relative_attention_bias.weight"


@pytest.mark.parametrize("damage, sentence", [
    (lambda t: t.pop("down_temporal_blocks.1.shift_conv.weight"),
     "1 of its 266 tensors are missing .the first: layers.input_4_post_level_0.shift_conv.weight.*incomplete"),
    (lambda t: drop(t, "down_temporal_blocks.2."), "lacks the temporal module after down_blocks.2. The file is incom"),
    (lambda t: drop(t, "up_temporal_blocks.1."), "lacks the temporal module after up_blocks.1"),
    (lambda t: drop(t, "mid_temporal_block."), "lacks the temporal module after mid_block"),
    (lambda t: drop(t, INSIDE + "resblock_temporal."), "lacks the temporal convolution of down_blocks.1.attentions.0"),
    (lambda t: drop(t, INSIDE + "transformer"), "lacks the temporal attention of down_blocks.1.attentions.0"),
    (lambda t: drop(t, "up_blocks.1.attentions.1"), "lacks the temporal convolution of up_blocks.1.attentions.1"),
    (lambda t: drop(t, "down_blocks.2.attentions", "up_blocks.0.attentions") or t.update(
        {"down_blocks.2.attentions.0.proj_in.weight": torch.zeros(128, 128)}),
     "lacks the temporal convolution of down_blocks.2.attentions.0"),
    (lambda t: t.pop(ATTENTION + TABLE), "layer at input_3_in_attn_pre_ff_0 lacks attn_temporal.time_rel_pos_bias"),
    (lambda t: t.update({ATTENTION + TABLE: torch.zeros(64, 2)}), r"has shape \[64, 2\] where \[32, 2\] is due"),
    (lambda t: t.update({ATTENTION + TABLE: torch.zeros(32, 8)}), "no layer has its sizes .64 channels in 8 heads"),
    (lambda t: t.update({"down_temporal_blocks.0.attentions.0.proj_in.weight": torch.zeros(64, 64)}),
     "1 tensors that such layers do not have .the first: layers.input_2_post_level_0.attentions.0.proj_in.weight"),
    (lambda t: t.update({"temporal_token": torch.zeros(4)}), "1 tensors that .* not have .the first: temporal_token"),
    (lambda t: t.update({INSIDE + "resblock_temporal.conv1.weight": torch.zeros(64, 64, 3, 1, 1).half()}),
     "mixes types: .* is float"),
    (lambda t: t.update({ATTENTION + "rotary_emb.freqs": torch.ones(16)}),
     "attn_temporal.rotary_emb.freqs does not hold the frequencies of frame positions"),
])
def test_a_file_that_is_not_whole_or_of_another_variant_is_refused(tmp_path, weights, damage, sentence):
    tensors = dict(weights)
    damage(tensors)
    with pytest.raises(VideoLDMError, match=f"^lavie_vsr.pt .*{sentence}"):
        load(tmp_path, tensors)


def drop(tensors: dict, *prefixes: str):
    for key in [key for key in tensors if key.startswith(prefixes)]:
        tensors.pop(key)


def test_the_video_vae_of_upscale_a_video_stays_refused():
    found = identify_keys(PUBLISHED["upscale_a_video_decoder_vae_video"])
    assert (found.kind, found.takes) == ("upscale_a_video_vae", None)
    assert vsr.detect(Keys(PUBLISHED["lavie_base"]), {}) is None


def test_the_blocks_of_a_deeper_transformer_are_sites_of_their_own():
    names = UNetNames(resblocks=2, levels=4)
    keys = [f"down_blocks.1.attentions.0.transformer_blocks.{block}.attn_temporal.to_q.weight" for block in (0, 2)]
    assert [vsr.parse(key)[0].site(names) for key in keys] == [Site("input", 4, "in_attn_pre_ff", 0),
                                                                Site("input", 4, "in_attn_pre_ff", 2)]
