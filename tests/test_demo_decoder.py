"""The bundled temporal decoder: it fits the bundled autoencoder, and neither windows nor tiles show."""

import pytest
import torch

from video_ldm.demo import bundle, models, train, world
from video_ldm.nodes.host import models as host
from video_ldm.nodes.host.decoding import DecodeSettings, Decoding
from video_ldm.nodes.host.temporal_vae import round_trip_warning, with_temporal_decoder
from video_ldm.temporal.families import load_decoder
from video_ldm.temporal.windows import window_starts

FILE = train.BUNDLE / bundle.DECODER_FILE
FRAMES, WINDOW, OVERLAP, TILE = 24, 8, 4, 64
LARGEST = 1.05          # of a difference at seams, over one inside

pytestmark = pytest.mark.skipif(not FILE.exists(), reason="the bundle has no temporal decoder: train-demo makes it")


@pytest.fixture(scope="module")
def vae():
    return host.load_autoencoder(train.BUNDLE / "autoencoder.safetensors")


@pytest.fixture(scope="module")
def made(vae):
    return with_temporal_decoder(vae, load_decoder(FILE))


@pytest.fixture(scope="module")
def drives(vae):
    """Real frames (t h w 3) in 0..1 of some held-out drives at the rate of interpolated video, and their latents."""
    size = FRAMES, models.HEIGHT, models.WIDTH, 16.0
    clips = [world.clip(world.held_out_seed(seed), *size).frames for seed in range(4)]
    with torch.inference_mode():
        return [(torch.from_numpy(clip) / 255, vae.encode(torch.from_numpy(clip) / 255)) for clip in clips]


@torch.inference_mode()
def decoded(made, z, window=FRAMES, tile=0):
    return torch.cat(list(Decoding(made, z, DecodeSettings(window, OVERLAP, tile, 1)).frames()))


def test_the_bundled_decoder_fits_the_bundled_autoencoder(vae, made):
    assert round_trip_warning(vae, made, load_decoder(FILE)) is None


@pytest.mark.slow
def test_frames_differ_no_more_at_the_seams_of_windows_than_inside_them(made, drives):
    """In units of what the real frames differ there: scenes do not move evenly."""
    starts = window_starts(FRAMES, WINDOW, OVERLAP)
    seams = {step for start in starts[1:] for step in range(start, start + WINDOW - (starts[1] - starts[0]))}
    at, inside = [], []
    for real, z in drives:
        ours, theirs = ((x[1:] - x[:-1]).abs().mean((1, 2, 3)) for x in (decoded(made, z, WINDOW), real))
        for step, ratio in enumerate((ours / theirs).tolist()):
            (at if step in seams else inside).append(ratio)
    assert sum(at) / len(at) <= LARGEST * sum(inside) / len(inside)


@pytest.mark.slow
def test_pixels_differ_no_more_at_the_seams_of_tiles_than_inside_them(made, drives):
    at, inside = [], []
    tile, overlap = TILE // 8, TILE // 8 // 4
    starts = window_starts(models.WIDTH // 8, tile, overlap)
    shared = {8 * start + place for start in starts[1:] for place in range(8 * (tile - (starts[1] - starts[0])))}
    for real, z in drives:
        ours, theirs = ((x[:, :, 1:] - x[:, :, :-1]).abs().mean((0, 1, 3)) for x in (decoded(made, z, tile=TILE), real))
        for column, ratio in enumerate((ours / theirs).tolist()):
            (at if column in shared else inside).append(ratio)
    assert sum(at) / len(at) <= LARGEST * sum(inside) / len(inside)
