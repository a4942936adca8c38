"""The benchmark of what PVDM costs: its counts, and the sums in its table."""

import re

import pytest
import torch

from video_ldm.benchmarks import pvdm as bench
from video_ldm.temporal.layers import Factory
from video_ldm.temporal.pvdm import PVDM_S, PlaneUNet

FOUND = {"plane_step": (10_000_000, 0.5), "decode": (30_000_000, 4.0), "small_pixel_step": (50_000_000, 2.0)}


def test_both_networks_have_as_many_weights():
    pixels = bench.weights(bench.VoxelUNet(bench.FULL.pixel_channels, bench.FULL.unet, bench.META))
    assert bench.FULL.unet == PVDM_S
    assert pixels == pytest.approx(bench.weights(PlaneUNet(PVDM_S, bench.META)), rel=0.01)


@pytest.mark.parametrize("name", bench.MEASURED)
def test_pieces_run_as_they_are_counted(name):
    make = bench.MEASURED[name]
    found, shape = (make(bench.QUICK, factory)() for factory in (Factory(), bench.META))
    assert found.shape == shape.shape and torch.isfinite(found).all()
    assert bench.flops(make(bench.QUICK, Factory(device="meta"))) > 1e7


def test_flops_of_pixels_grow_with_frames_and_with_area():
    counts = {size: bench.flops(bench.pixel_step(bench.QUICK, bench.META, *size))
              for size in ((4, 16), (8, 16), (4, 32))}
    assert counts[8, 16] == pytest.approx(2 * counts[4, 16], rel=1e-3)
    assert counts[4, 32] == pytest.approx(4 * counts[4, 16], rel=1e-3)


def test_a_video_takes_100_steps_for_its_first_clip_and_20_for_each_further_one(capsys):
    bench.report(bench.QUICK, FOUND)
    row = r"\| (\d+) frames \| (\d+) s, .*? GB \| (\d+) s, .*? \| ([\d.]+) times \| ([\d.]+) times"
    rows = {int(found[1]): found for found in re.finditer(row, capsys.readouterr().out)}
    counted = {name: bench.flops(make(bench.QUICK, bench.META)) for name, make in bench.MEASURED.items()}
    for frames, steps, clips in ((16, 100, 1), (128, 240, 8)):
        large = bench.flops(bench.pixel_step(bench.QUICK, bench.META, frames, 64))
        own, pixels = steps * 0.5 + clips * 4, 100 * 2.0 * large / counted["small_pixel_step"]
        assert [int(rows[frames][n]) for n in (2, 3)] == [round(own), round(pixels)]
        assert float(rows[frames][4]) == pytest.approx(pixels / own, abs=0.06)
        work = steps * counted["plane_step"] + clips * counted["decode"]
        assert float(rows[frames][5]) == pytest.approx(100 * large / work, abs=0.06)
