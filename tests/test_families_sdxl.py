"""Motion modules for SDXL: AnimateDiff's beta and Hotshot-XL, against outputs of their published code.

tests/fixtures/motion_modules.json holds what the published modules add to `features()` with the weights of `filled`:
every 17th number. Both modules have the same names and sizes. The beta's norm sees all frames of a clip together.
"""

import json
from pathlib import Path

import pytest
import torch

from video_ldm.temporal.errors import VideoLDMError
from video_ldm.temporal.families import identify_keys, load_temporal
from video_ldm.temporal.families.motion_modules import ANIMATEDIFF, HOTSHOT, ModuleKey
from video_ldm.temporal.formats.temporal_file import Base, Schedule
from video_ldm.temporal.layers import GivenCall, MotionModule, MotionParams
from video_ldm.temporal.slots import Site
from video_ldm.temporal.unet_names import UNetNames
from video_ldm.tests.formats_help import PUBLISHED, motion_shapes, motion_tensors, saved
from video_ldm.tests.small import relative_error

CHANNELS, FRAMES, CLIPS, HEIGHT, WIDTH = 64, 5, 2, 2, 3
RECORDED = json.loads((Path(__file__).parent / "fixtures" / "motion_modules.json").read_text())
LEVELS = (320, 640, 1280)


def wave(shape: tuple, number: int) -> torch.Tensor:
    """Numbers that every machine computes alike, spread as weights of this shape are."""
    count = torch.Size(shape).numel()
    values = torch.sin(torch.arange(count, dtype=torch.float64) * 0.7548776662466927 * (number + 1) + number)
    return values.reshape(shape) * ((count // shape[0]) ** -0.5 * 1.4 if len(shape) > 1 else 0.2)


def features() -> torch.Tensor:
    size = CLIPS * FRAMES, CHANNELS, HEIGHT, WIDTH
    return (wave(size, 99).float() * 3 * (CHANNELS * HEIGHT * WIDTH) ** 0.5 / 1.4)


def filled(module: MotionModule) -> MotionModule:
    transformer = module.temporal_transformer
    state = transformer.state_dict()
    for number, key in enumerate(sorted(state)):
        is_norm = "norm" in key and key.endswith("weight")
        state[key].copy_((wave(tuple(state[key].shape), number) + is_norm).float())
    return module


@pytest.mark.parametrize("kind, pooled", [("animatediff_sdxl", True), ("hotshot_xl", False)])
@torch.no_grad()
def test_a_module_adds_what_the_published_code_adds(kind, pooled):
    def added(norm_pooled):
        brick = filled(MotionModule(MotionParams(CHANNELS, 8, norm_pooled=norm_pooled)))
        return (brick(features(), GivenCall(FRAMES)) - features()).flatten()[::17]
    recorded = torch.tensor(RECORDED[kind])
    assert relative_error(added(pooled), recorded) < 1e-5
    assert relative_error(added(not pooled), recorded) > 1e-2


def hotshot_names(tensors: dict) -> dict:
    """AnimateDiff's names turned into Hotshot-XL's."""
    return {key.replace("motion_modules", "temporal_attentions").replace(".temporal_transformer", "")
            .replace("pos_encoder.pe", "pos_encoder.positional_encoding"): tensor for key, tensor in tensors.items()}


def sdxl_file(folder, name: str, table: int, rename=dict):
    """A file for three levels of SDXL's channels with one ResBlock each, in half precision."""
    tensors = motion_tensors(motion_shapes(LEVELS, 1, False, table), dtype=torch.float16)
    return load_temporal(saved(folder, name, rename(tensors)))


def test_animatediff_sdxl_brings_its_own_facts(tmp_path):
    file = sdxl_file(tmp_path, "mm_sdxl_v10_beta.safetensors", 32)
    assert (file.kind, file.title) == ("animatediff_sdxl", "an AnimateDiff SDXL beta motion module")
    assert (file.base, file.fps) == (Base("SDXL", 2048), 8.0)
    assert file.schedule == Schedule("linear", 0.00085, 0.02)
    assert (file.params.frames, file.params.positions, file.params.pool_spatial_norms) == (16, 32, False)
    assert {brick.norm_pooled for _, brick in file.params.bricks} == {True}
    assert [(site, brick.channels) for site, brick in file.params.bricks] == [
        (Site("input", 1, "post_attn"), 320), (Site("input", 3, "post_attn"), 640),
        (Site("input", 5, "post_attn"), 1280),
        *((Site("output", index, "post_attn"), (1280, 640, 320)[index // 2]) for index in range(6))]


@pytest.mark.parametrize("name, rename", [("hsxl_temporal_layers.safetensors", hotshot_names),
                                          ("resaved.safetensors", dict)])
def test_hotshot_is_read_in_its_own_names_and_in_animatediffs(tmp_path, name, rename):
    file = sdxl_file(tmp_path, name, 24, rename)
    assert (file.kind, file.params.family, file.base.family, file.fps) == ("hotshot_xl", "Hotshot-XL", "SDXL", 8.0)
    assert file.schedule == Schedule("linear", 0.00085, 0.012)
    assert (file.params.frames, file.params.positions, file.params.pool_spatial_norms) == (8, 24, True)
    assert {brick.norm_pooled for _, brick in file.params.bricks} == {False}
    tensors = motion_tensors(motion_shapes(LEVELS, 1, False, 24), dtype=torch.float16)
    weight = "transformer_blocks.0.attention_blocks.1.to_q.weight"
    assert torch.equal(file.tensors[f"layers.output_2_post_attn_0.temporal_transformer.{weight}"],
                       tensors[f"up_blocks.1.motion_modules.0.temporal_transformer.{weight}"])


@pytest.mark.parametrize("name, layout", [("hotshotxl", HOTSHOT), ("ad_mm_sdxl_v10_beta", ANIMATEDIFF)])
def test_the_published_files_have_a_module_after_every_resblock_of_sdxl(name, layout):
    """docs/formats.md#numbering-of-blocks: input blocks 1, 2, 4, 5, 7, 8 and all nine output blocks."""
    keys = [ModuleKey(key, layout) for key in PUBLISHED[name]]
    sites = {key.site(UNetNames(2)) for key in keys}
    assert sites == {Site("input", index, "post_attn") for index in (1, 2, 4, 5, 7, 8)} | {
        Site("output", index, "post_attn") for index in range(9)}


def test_a_whole_hotshot_unet_and_a_file_without_a_module_are_refused(tmp_path):
    whole = PUBLISHED["hotshotxl"] | {"conv_in.weight": (320, 4, 3, 3)}
    assert identify_keys(whole).kind == "hotshot_unet"
    tensors = hotshot_names(motion_tensors(motion_shapes((32, 64, 64), 1, False, 24)))
    cut = {key: tensor for key, tensor in tensors.items() if not key.startswith("up_blocks.1.temporal_attentions.0")}
    with pytest.raises(VideoLDMError, match=r"cut.safetensors looks like a Hotshot-XL file, but lacks "
                                            r"up_blocks.1.temporal_attentions.0"):
        load_temporal(saved(tmp_path, "cut.safetensors", cut))
