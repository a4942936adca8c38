"""bench --traffic: what is counted, and that no change raises what the temporal layers move."""

from pathlib import Path

import pytest
import torch
from torch.nn.functional import linear, scaled_dot_product_attention

from video_ldm.benchmarks.speed import (
    ANIMATELCM_I2V,
    LEVELS,
    MOTION,
    PIA,
    SPARSE,
    VIDEO_LDM,
    Case,
    build_control,
    params_of,
    sparse_params,
)
from video_ldm.benchmarks.traffic import FusedAttention, Traffic, counted, layers_of, network, peak
from video_ldm.nodes.host import sparse_control
from video_ldm.temporal.families import animatelcm_i2v, pia, sparsectrl
from video_ldm.temporal.formats.files import TensorFile
from video_ldm.temporal.formats.tensor_names import Keys
from video_ldm.temporal.layers import interleaved_sinusoid
from video_ldm.tests.formats_help import PUBLISHED, motion_shapes
from video_ldm.tests.picture_help import encoder_shapes

# Bytes that a set of layers moves in one step: 16 frames of 512x512 pixels, bfloat16. Lower them, never raise them.
MOST = {MOTION: 35_400_000_000, VIDEO_LDM: 52_750_000_000}


def bytes_of(work):
    traffic = Traffic()
    with traffic, FusedAttention(traffic):
        work()
    return traffic.total


def test_operations_count_what_they_read_and_write_and_views_are_free():
    x, weight = torch.empty(6, 4, device="meta"), torch.empty(5, 4, device="meta")
    assert bytes_of(lambda: linear(x, weight)) == 4 * (24 + 20 + 30)
    assert bytes_of(lambda: x.view(3, 8).transpose(0, 1)[2:]) == 0
    assert bytes_of(lambda: x.t().contiguous()) == 4 * (24 + 24)
    assert bytes_of(lambda: x.mul_(2.0)) == 4 * (24 + 24)
    assert bytes_of(lambda: x[:1].expand(6, 4) + x) == 4 * (4 + 24 + 24)       # what is repeated is there once
    assert bytes_of(lambda: torch.empty_like(x)) == 0


def test_attention_is_one_operation():
    query, keys = torch.empty(2, 3, 8, 16, device="meta"), torch.empty(2, 3, 5, 16, device="meta")
    shape = []
    assert bytes_of(lambda: shape.extend(scaled_dot_product_attention(query, keys, keys).shape)) == 4 * (
        2 * query.numel() + 2 * keys.numel())
    assert shape == [2, 3, 8, 16]


def file_of(shapes):
    """A file without numbers but for its tables of positions."""
    shapes = {key: tuple(shape) for key, shape in shapes.items()}

    def read(keys):
        return {key: interleaved_sinusoid(*shapes[key][1:])[None] if key.endswith(".pe") else
                torch.empty(shapes[key], device="meta") for key in keys}
    return TensorFile(Path("published.safetensors"), shapes, {}, tuple(shapes), read)


MOVING = {
    PIA: (pia, motion_shapes(LEVELS, 2, False, 32) | {"conv_in.weight": (320, 9, 3, 3), "conv_in.bias": (320,)}),
    ANIMATELCM_I2V: (animatelcm_i2v, motion_shapes(LEVELS, 2, True, 0) | encoder_shapes(LEVELS)),
}


@pytest.mark.parametrize("name", MOVING)
def test_layers_that_move_a_picture_are_measured_as_their_published_files_have_them(name):
    family, shapes = MOVING[name]
    file = file_of(shapes)
    params = family.load(file, family.detect(Keys(file.shapes), {})).params
    ours = params_of(network(Case("meta", torch.bfloat16, 64, 16)), name, 16)
    assert dict(ours.bricks) == dict(params.bricks)
    assert (ours.spatial, ours.positions, ours.picture) == (params.spatial, params.positions, params.picture)


def test_sparsectrl_is_measured_as_its_published_file_has_it():
    found = file_of(PUBLISHED["ad_v3_sd15_sparsectrl_rgb"])
    file = sparsectrl.load(found, sparsectrl.detect(Keys(found.shapes), {}))
    assert sparse_params(16) == file.params
    case = Case("meta", torch.bfloat16, 64, 16)
    ours = {key: tuple(weight.shape) for key, weight in build_control(SPARSE, case).state_dict().items()}
    theirs = sparse_control.sparse_network(file, torch.bfloat16).state_dict()
    assert ours == {key: tuple(weight.shape) for key, weight in theirs.items()}


@pytest.mark.parametrize("name", MOST)
def test_a_step_with_layers_moves_no_more_than_before(name):
    case = Case("meta", torch.bfloat16, 64, 16)
    unet = network(case)
    traffic, _ = counted(unet, layers_of(unet, name, case), case)
    moved = sum(traffic.of().values())
    assert 0.9 * MOST[name] < moved <= MOST[name]       # much less: lower the number above


def test_a_step_with_layers_holds_no_more_at_once_than_one_without():
    case = Case("meta", torch.bfloat16, 64, 16)
    unet = network(case)
    assert peak(unet, layers_of(unet, MOTION, case), case) <= 1.01 * peak(unet, None, case)
