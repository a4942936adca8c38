"""PVDM's networks: what they compute, beside the published code and a reference written from the papers.

docs/papers.md#p4.

tests/fixtures/pvdm.json holds some of the numbers that the published code gives for `randomised` weights: its
autoencoder with 32 channels on 16 frames of 32x32, and its U-Net with 32 channels on two levels.
"""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from video_ldm.temporal.errors import VideoLDMError
from video_ldm.temporal.layers import Factory
from video_ldm.temporal.pvdm import PVDM_L, PVDM_S, RELEASED, Autoencoder, PlaneShape, PlaneUNet, join
from video_ldm.tests.formats_help import PUBLISHED
from video_ldm.tests.pvdm_networks import (
    AUTOENCODER,
    GRID,
    RECORDED_AUTOENCODER,
    RECORDED_GRID,
    RECORDED_UNET,
    UNET,
    autoencoder,
    clips,
    rows,
    unet,
)
from video_ldm.tests.reference_pvdm import ReferenceAutoencoder, ReferenceUNet

RECORDED = json.loads((Path(__file__).parent / "fixtures" / "pvdm.json").read_text())
# What was recorded of the U-Net: its title, whether there is a clip before, and the step.
CALLS = [("no clip before, step 0", False, 0), ("a clip before, step 500", True, 500),
         ("no clip before, step 999", False, 999)]
META = Factory(device="meta")
FLOAT32 = 1e-5      # three times the largest difference that was measured. Outputs are about 1


def error(ours: torch.Tensor, wanted: torch.Tensor) -> float:
    """The largest absolute difference."""
    return (ours.double() - wanted.double()).abs().max().item()


def recorded(name: str) -> torch.Tensor:
    return torch.tensor(RECORDED[name], dtype=torch.float64)


def reference_autoencoder(network: Autoencoder) -> ReferenceAutoencoder:
    params = network.params
    return ReferenceAutoencoder(network.state_dict(), params.patch, params.heads, params.plane_heads)


def reference_unet(network: PlaneUNet) -> ReferenceUNet:
    params = network.params
    return ReferenceUNet(network.state_dict(), len(params.channel_mult), params.num_res_blocks, params.heads)


def before_clip(count: int = 1, seed: int = 5, params=UNET, grid=GRID) -> torch.Tensor:
    """Planes of a clip before, in -1..1."""
    return rows(params, grid, count, seed) / 3 ** 0.5


# Names and sizes

def shapes(network) -> dict:
    return {key: list(value.shape) for key, value in network.state_dict().items()}


def numbers(network) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def test_the_released_autoencoder_has_the_published_names_sizes_and_number_of_weights():
    network = Autoencoder(RELEASED, META)
    published = PUBLISHED["pvdm_autoencoder"]
    assert len(published) == 415
    assert shapes(network) == {key: list(shape) for key, shape in published.items()}
    assert numbers(network) == 62_064_399


def test_the_large_diffusion_network_has_the_published_names_sizes_and_number_of_weights():
    network = PlaneUNet(PVDM_L, META)
    published = PUBLISHED["pvdm_diffusion"]
    assert len(published) == 559
    assert {f"diffusion_model.{key}": shape for key, shape in shapes(network).items()} == \
        {key: list(shape) for key, shape in published.items()}
    assert numbers(network) == 528_273_412


def test_the_small_diffusion_network_has_132_million_weights():
    assert round(numbers(PlaneUNet(PVDM_S, META)) / 1e6, 2) == 132.16


# The published code

def test_planes_and_clips_are_those_of_the_published_autoencoder():
    network, x = autoencoder(RECORDED_AUTOENCODER), clips(RECORDED_AUTOENCODER)
    planes = network.encode(x)
    assert error(planes.flatten()[::3], recorded("encoded")) < FLOAT32
    assert error(network.decode(planes).flatten()[::487], recorded("decoded")) < FLOAT32


def test_planes_and_clips_of_the_reference_are_those_of_the_published_autoencoder():
    network, x = autoencoder(RECORDED_AUTOENCODER), clips(RECORDED_AUTOENCODER)
    reference = reference_autoencoder(network)
    planes = reference.encode(x[0])
    row = join([plane[None] for plane in planes])
    assert error(row.flatten()[::3], recorded("encoded")) < FLOAT32
    assert error(reference.decode(planes).flatten()[::487], recorded("decoded")) < FLOAT32


@pytest.mark.parametrize("title, known, step", CALLS)
def test_the_prediction_is_that_of_the_published_unet(title, known, step):
    z, before = rows(RECORDED_UNET, RECORDED_GRID), before_clip(params=RECORDED_UNET, grid=RECORDED_GRID)
    found = unet(RECORDED_UNET)(z, torch.tensor([step]), RECORDED_GRID, before if known else None)
    assert error(found.flatten()[::61], recorded(title)) < FLOAT32


def test_the_prediction_of_the_reference_is_that_of_the_published_unet():
    title, _, step = CALLS[1]
    z, before = rows(RECORDED_UNET, RECORDED_GRID), before_clip(params=RECORDED_UNET, grid=RECORDED_GRID)
    reference = reference_unet(unet(RECORDED_UNET))
    found = reference(split(z[0], RECORDED_GRID), step, split(before[0], RECORDED_GRID))
    assert error(joined(found).flatten()[::61], recorded(title)) < FLOAT32


def split(row: torch.Tensor, grid) -> list[torch.Tensor]:
    """The planes of a row `c l`, by hand."""
    t, h, w = grid.t, grid.h, grid.w
    xy, yt, xt = row[:, :h * w], row[:, h * w:h * w + t * w], row[:, h * w + t * w:]
    return [xy.reshape(-1, h, w), yt.reshape(-1, t, w), xt.reshape(-1, t, h)]


def joined(planes: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([plane.reshape(len(plane), -1) for plane in planes], 1)


# The reference, on grids that the published code cannot do

@pytest.mark.parametrize("frames, height, width", [(4, 6, 10), (3, 4, 10), (2, 6, 6)])
def test_planes_and_clips_of_any_size_that_fits_are_those_of_the_reference(frames, height, width):
    """Frames that are not square, and clips smaller than those that the autoencoder was trained for."""
    network = autoencoder()
    x = clips(count=2)[:, :, :frames, :height, :width]
    reference, grid = reference_autoencoder(network), network.shape_of(x)
    planes = network.encode(x)
    pictures = network.decode(planes, grid)
    assert pictures.shape == x.shape
    for n in range(2):
        wanted = reference.encode(x[n])
        assert error(planes[n], joined(wanted)) < FLOAT32
        assert error(pictures[n], reference.decode(split(planes[n], grid))) < FLOAT32


@pytest.mark.parametrize("grid", [GRID, PlaneShape(6, 2, 4)])
def test_predictions_of_two_clips_at_two_steps_are_those_of_the_reference(grid):
    network, z, before = unet(), rows(grid=grid, count=2), before_clip(2, grid=grid)
    found = network(z, torch.tensor([7, 640]), grid, before)
    for n, step in enumerate((7, 640)):
        wanted = reference_unet(network)(split(z[n], grid), step, split(before[n], grid))
        assert error(found[n], joined(wanted)) < FLOAT32


def test_a_network_without_condition_takes_the_noisy_planes_alone():
    network = unet(replace(UNET, conditional=False))
    assert "zeros" not in network.state_dict()
    z = rows()
    nothing = [plane[:0] for plane in split(z[0], GRID)]
    wanted = reference_unet(network)(split(z[0], GRID), 500, nothing)
    assert error(network(z, torch.tensor([500]), GRID)[0], joined(wanted)) < FLOAT32


# Half precision

@pytest.mark.parametrize("dtype, bound", [(torch.bfloat16, 0.05), (torch.float16, 0.006)])
def test_networks_in_half_precision_stay_near_float32(dtype, bound):
    """The bounds are 12 roundings of a number of 1. The U-Net is deeper and has twice as many."""
    network, x = autoencoder(), clips()
    planes = network.encode(x)
    pictures = network.decode(planes)
    half = autoencoder().to(dtype)
    halved = half.encode(x.to(dtype))
    assert halved.dtype == dtype
    assert 0 < error(halved, planes) < bound
    assert 0 < error(half.decode(planes.to(dtype)), pictures) < bound
    z, step, before = rows(), torch.tensor([300]), before_clip()
    found = unet().to(dtype)(z.to(dtype), step, GRID, before.to(dtype))
    assert found.dtype == dtype
    assert 0 < error(found, unet()(z, step, GRID, before)) < 2 * bound


# Refusals

@pytest.mark.parametrize("frames, height, width", [(5, 6, 10), (4, 7, 10), (4, 8, 10), (4, 6, 12)])
def test_a_clip_that_does_not_fit_the_autoencoder_is_refused(frames, height, width):
    with pytest.raises(VideoLDMError, match=f"up to 4 frames of 10x6.*given {frames} frames of {width}x{height}"):
        autoencoder().encode(torch.zeros(1, 3, frames, height, width))


def test_planes_of_another_grid_are_refused():
    with pytest.raises(VideoLDMError, match="4 frames of 8 x 6 patches have 104 positions"):
        unet()(rows()[..., 1:], torch.tensor([0]), GRID)
    with pytest.raises(VideoLDMError, match="4 frames of 3 x 5 patches have 47 positions"):
        autoencoder().decode(torch.zeros(1, AUTOENCODER.plane_channels, 46))
