"""Layer Strength on the layers of an upscaler: frames of the video, and the part of the mask that a tile shows."""

import folder_paths
import pytest
import torch
from comfy.patcher_extension import WrappersMP

from video_ldm.nodes import upscale as nodes
from video_ldm.nodes.host import sampling, upscaling
from video_ldm.nodes.host.options import layer_sets_in
from video_ldm.nodes.layer_strength import LayerStrength
from video_ldm.nodes.load import AS_TRAINED, LoadTemporalLayers
from video_ldm.temporal.call import CallSettings
from video_ldm.temporal.upscaler import plan_pieces
from video_ldm.tests import upscale_help
from video_ldm.tests.attach_help import load_model
from video_ldm.tests.small import relative_error
from video_ldm.tests.upscale_help import small_frames, text

FRAMES, HEIGHT, WIDTH = 6, 8, 12
PLACES = [((0, 4), (0, 8)), ((0, 4), (4, 12)), ((2, 6), (0, 8)), ((2, 6), (4, 12))]        # frames and columns


@pytest.fixture(scope="module")
def upscaler(tmp_path_factory):
    """The MODEL of the smallest x4 upscaler. Its layers are listed for the loader."""
    folder = tmp_path_factory.mktemp("video_ldm")
    folder_paths.add_model_folder_path("video_ldm", str(folder))
    upscale_help.write_layers(folder / "for_upscaler.safetensors")
    return load_model(upscale_help.unet_state())


def model_of(upscaler, curve, mask=None, strength=1.0):
    model = LoadTemporalLayers.execute(upscaler, "for_upscaler.safetensors", strength, AS_TRAINED).result[0]
    return LayerStrength.execute(model, curve, "linear", mask).result[0]


def latents_of(model):
    cuts = plan_pieces(FRAMES, HEIGHT, WIDTH, 4, 2, 8)
    settings = sampling.SamplerSettings(1, 1.0, "euler", "normal", text(), text(12))
    return upscaling.upscale(model, small_frames(FRAMES, HEIGHT, WIDTH), 30, cuts, 5, settings)


def seen_by(model):
    """The strengths that every call of the network is told."""
    return [strengths for strengths, _ in told(model)]


def acting_in(model):
    """Which frames act in every call of the network."""
    return [acting for _, acting in told(model)]


def told(model):
    """What every call of the network is told. The network itself is stubbed."""
    m, seen = model.clone(), []

    def stub(executor, x, timesteps, context, y, control, options, **kwargs):
        found, = layer_sets_in(options).values()
        assert found.strengths.shape[1:] in ((1, 1), x.shape[2:])
        seen.append((found.strengths, found.acting))
        return x[:, :4]
    m.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "stub", stub)
    latents_of(m)
    return seen


def test_every_piece_gets_the_strengths_of_its_frames_and_its_part_of_the_mask(upscaler):
    mask = torch.rand(FRAMES, 2 * HEIGHT, 2 * WIDTH, generator=torch.Generator().manual_seed(8))
    values = torch.tensor([0, 0.2, 0.4, 0.6, 0.8, 1.0])[:, None, None]
    places = mask.unflatten(1, (HEIGHT, 2)).unflatten(3, (WIDTH, 2)).mean((2, 4))
    seen = seen_by(model_of(upscaler, "0: 0, 5: 1", mask))
    assert len(seen) == len(PLACES)
    for strengths, ((first, last), (left, right)) in zip(seen, PLACES):
        assert relative_error(strengths, (values * places)[first:last, :, left:right]) < 1e-6
    for strengths, ((first, last), _) in zip(seen_by(model_of(upscaler, "0: 0, 5: 1")), PLACES, strict=True):
        assert relative_error(strengths, values[first:last]) < 1e-6


def test_frames_of_strength_0_are_the_upscalers_own_in_windows_and_tiles_to_the_bit(upscaler):
    seen, alone = latents_of(model_of(upscaler, "0 1 1 0 0 1")), latents_of(model_of(upscaler, "1", strength=0.0))
    assert torch.equal(seen[[0, 3, 4]], alone[[0, 3, 4]])
    assert min(relative_error(seen[n], alone[n]) for n in (1, 2, 5)) > 1e-4


def test_which_frames_act_is_the_same_in_every_tile(upscaler):
    """Norms that see all frames together change where a frame has strength anywhere, not only in the tile."""
    mask = torch.zeros(1, HEIGHT, WIDTH)
    mask[:, :, 10:] = 1                     # in the last columns, which the tiles at the left do not show
    found = acting_in(model_of(upscaler, "0 1 1 0 0 1", mask))
    wanted = torch.tensor([False, True, True, False, False, True])
    assert all(torch.equal(acting, wanted[first:last])
               for acting, ((first, last), _) in zip(found, PLACES, strict=True))
    settings = CallSettings(frames=4, strengths=torch.zeros(4, 4, 8), acting=wanted[:4])
    assert settings.acts and torch.equal(settings.acting_images, wanted[:4])
    assert not CallSettings(frames=4, strengths=torch.zeros(4, 4, 8)).acts


def test_the_report_of_the_upscale_names_it(upscaler):
    model = model_of(upscaler, "0 1")
    cuts = plan_pieces(FRAMES, HEIGHT, WIDTH, 4, 2, 8)
    report = nodes.report_of(model, small_frames(FRAMES, HEIGHT, WIDTH), 30, cuts, nodes.layer_sets(model))
    assert "strength 1, by frame or region as Layer Strength says." in report
