"""PVDM's planes: which part of a clip each of their positions stands for, and how they meet in the U-Net.

docs/papers.md#p1 to #p3, #p5 to #p7, #p10.
"""

import pytest
import torch
from torch import nn

from video_ldm.temporal.layers import Factory
from video_ldm.temporal.pvdm import PVDM_S, RELEASED, Autoencoder, PlaneShape, PlaneUNet
from video_ldm.temporal.pvdm.planes import broadcast
from video_ldm.tests.pvdm_networks import AUTOENCODER, GRID, UNET, autoencoder, clips, rows, unet

SQUARE = PlaneShape(4, 6, 6)
STEP = torch.tensor([400])


def changed(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """Which positions of a plane `1 c i j` differ."""
    return (before != after).any(1)[0]


def only(shape: tuple, place: tuple) -> torch.Tensor:
    wanted = torch.zeros(shape, dtype=torch.bool)
    wanted[place] = True
    return wanted


def without_layers(network: Autoencoder) -> Autoencoder:
    """Tokens then are of their patches alone."""
    network.encoder.layers, network.decoder.layers = nn.ModuleList(), nn.ModuleList()
    return network


# The autoencoder

@pytest.mark.parametrize("planes_first", [True, False])
def test_a_clip_of_the_released_size_is_a_row_of_2048_positions_of_4_numbers(planes_first):
    network = Autoencoder(RELEASED, Factory(device="meta")).to("meta")
    x, row = torch.empty(2, 3, 16, 256, 256, device="meta"), torch.empty(2, 4, 2048, device="meta")
    assert (network.decode(row) if planes_first else network.encode(x)).shape == (x if planes_first else row).shape


def test_planes_and_pictures_lie_between_minus_1_and_1():
    network = autoencoder()
    for name in ("xy", "yt", "xt"):
        getattr(network, f"pre_{name}").weight.mul_(4)
    network.to_pixel[1].weight.mul_(4)
    planes = network.encode(clips())
    assert 0.95 < planes.abs().max() <= 1
    assert 0.95 < network.decode(planes).abs().max() <= 1


def test_encoding_and_decoding_are_the_two_halves_of_the_autoencoder_bit_by_bit():
    network, x = autoencoder(), clips(count=2)
    assert torch.equal(network(x), network.decode(network.encode(x)))
    shorter = x[:, :, :3, :4]
    assert torch.equal(network(shorter), network.decode(network.encode(shorter), PlaneShape(3, 2, 5)))


def test_a_patch_changes_its_own_position_in_each_plane():
    """xy is rows and columns, yt is time and columns, xt is time and rows, in this order. Frames have 3 rows and 5
    columns of patches."""
    network, x = without_layers(autoencoder()), clips()
    grid, before = AUTOENCODER.shape, network.encode(x)
    t, i, j = 2, 1, 3
    x[:, :, t, 2 * i:2 * i + 2, 2 * j:2 * j + 2] += 0.5
    xy, yt, xt = (changed(*pair) for pair in zip(grid.split(before), grid.split(network.encode(x))))
    assert torch.equal(xy, only((3, 5), (i, j)))
    assert torch.equal(yt, only((4, 5), (t, j)))
    assert torch.equal(xt, only((4, 3), (t, i)))


@pytest.mark.parametrize("plane, dim, missing", [(0, 2, "time"), (1, 3, "rows"), (2, 4, "columns")])
def test_a_plane_looks_along_the_axis_that_it_lacks_and_no_other(plane, dim, missing):
    """A position of a plane depends on the patches along that axis, so that it can change for each of them."""
    network, x = without_layers(autoencoder()), clips()
    grid, before = AUTOENCODER.shape, network.encode(x)
    size = (1, 1, 1, 2, 2)[dim]
    for n in range((grid.t, grid.h, grid.w)[dim - 2]):
        other = x.clone()
        other.narrow(dim, n * size, size).add_(0.5)
        found = [changed(*pair) for pair in zip(grid.split(before), grid.split(network.encode(other)))]
        assert found[plane].all()
        for another in {0, 1, 2} - {plane}:
            axis = [("rows", "columns"), ("time", "columns"), ("time", "rows")][another].index(missing)
            assert torch.equal(found[another].any(1 - axis), only(found[another].shape[axis:axis + 1], (n,)))


@pytest.mark.parametrize("plane, name", [(0, "xy"), (1, "yt"), (2, "xt")])
def test_a_plane_keeps_the_first_token_although_the_learned_token_is_the_last(plane, name):
    """Where the attention of a plane adds nothing, the plane is that of the first patches along its axis."""
    network, x = without_layers(autoencoder()), clips()
    grid = AUTOENCODER.shape
    before = grid.split(network.encode(x))[plane]
    token = getattr(network, f"{name}_token")
    token.add_(1)
    assert changed(before, grid.split(network.encode(x))[plane]).all()      # the attention reads the learned token
    for layer in getattr(network, f"{name}_quant_attn").layers:
        layer[0].fn.to_out[0].weight.zero_()
    alone = grid.split(network.encode(x))[plane]
    token.add_(1)
    later = x.clone()
    later.narrow(2 + plane, 1 if plane == 0 else 2, 1).add_(0.5)
    assert torch.equal(alone, grid.split(network.encode(later))[plane])
    x.narrow(2 + plane, 0, 1).add_(0.5)
    assert changed(alone, grid.split(network.encode(x))[plane]).all()


@pytest.mark.parametrize("plane, name, dim", [(0, "xy", 2), (1, "yt", 3), (2, "xt", 4)])
def test_a_shift_of_a_plane_is_the_same_along_the_axis_that_it_lacks_before_the_decoder(plane, name, dim):
    network, seen = autoencoder(), []
    network.decoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    grid, row = AUTOENCODER.shape, network.encode(clips())
    shift = torch.tensor([0.3, -0.2, 0.5])
    position = grid.lengths[0] if plane else 0
    position += grid.lengths[1] if plane == 2 else 0
    shifted = row.clone()
    shifted[:, :, position + 2] += shift
    network.decode(row), network.decode(shifted)
    before, after = (tokens.unflatten(2, (grid.h, grid.w)).movedim(-1, 1) for tokens in seen)       # b c t h w
    difference = (after - before).movedim(dim, 2).flatten(3)[0, :, :, 2]        # c, along the missing axis
    wanted = getattr(network, f"post_{name}").weight[:, :, 0, 0] @ shift
    assert (difference - wanted[:, None]).abs().max() < 1e-5
    assert (after != before).any(1)[0].sum() == difference.shape[1]


def test_planes_are_added_where_they_cross():
    xy, yt, xt = torch.rand(1, 2, 3, 5), torch.rand(1, 2, 4, 5), torch.rand(1, 2, 4, 3)
    found = broadcast([xy, yt, xt])
    assert found.shape == (1, 2, 4, 3, 5)
    assert torch.equal(found[0, 1, 2, 0, 4], xy[0, 1, 0, 4] + yt[0, 1, 2, 4] + xt[0, 1, 2, 0])


# The U-Net

def outputs(network: PlaneUNet, x: torch.Tensor, cond=None, grid: PlaneShape = GRID) -> list[torch.Tensor]:
    return grid.split(network(x, STEP, grid, cond))


@pytest.mark.parametrize("plane", range(3))
def test_planes_meet_only_in_the_attention_over_the_row(plane):
    """Where it adds nothing, a plane's output depends on this plane alone."""
    network, x = unet(), rows()
    other = x.clone()
    GRID.split(other)[plane].add_(0.5)
    assert all(changed(*pair).all() for pair in zip(outputs(network, x), outputs(network, other)))
    for attention in (*network.input_attns[1:], network.mid_attn, *network.output_attns):
        attention.proj_out.weight.zero_()
        attention.proj_out.bias.zero_()
    found = [changed(*pair).any().item() for pair in zip(outputs(network, x), outputs(network, other))]
    assert found == [n == plane for n in range(3)]


def test_an_attention_over_the_row_stands_behind_every_block_but_the_first_convolution():
    network = PlaneUNet(PVDM_S, Factory(device="meta"))
    assert [hasattr(part, "qkv") for part in network.input_attns] == [False] + 11 * [True]
    assert hasattr(network.mid_attn, "qkv")
    assert [hasattr(part, "qkv") for part in network.output_attns] == 12 * [True]


def test_no_clip_before_is_a_clip_of_zeros():
    network, x = unet(), rows()
    nothing = network(x, STEP, GRID)
    assert torch.equal(nothing, network(x, STEP, GRID, torch.zeros_like(x)))
    assert (nothing - network(x, STEP, GRID, rows(seed=5))).abs().max() > 0.1


def test_a_fresh_network_predicts_zero():
    with torch.no_grad():
        assert not PlaneUNet(UNET)(rows(), STEP, GRID, rows(seed=5)).any()


def test_swapping_yt_and_xt_of_square_frames_swaps_the_outputs():
    """The network knows neither what a plane is nor where a position is."""
    network, x, cond = unet(), rows(grid=SQUARE), rows(grid=SQUARE, seed=5)

    def swapped(row):
        first, second, third = row.split(SQUARE.lengths, 2)
        return torch.cat([first, third, second], 2)
    found = network(x, STEP, SQUARE, cond)
    again = network(swapped(x), STEP, SQUARE, swapped(cond))
    assert (swapped(found) - again).abs().max() < 1e-5
    assert (found - again).abs().max() > 0.1
