"""Load PVDM and its networks' weights, and what PVDM's nodes refuse, on small random networks."""

import re
from dataclasses import replace

import comfy.cli_args
import comfy.model_management
import comfy.utils
import pytest
import torch

from video_ldm.nodes import pvdm as nodes
from video_ldm.nodes.decode import TemporalDecode
from video_ldm.nodes.host import latents
from video_ldm.temporal.errors import VideoLDMError
from video_ldm.tests import pvdm_help, pvdm_nodes_help
from video_ldm.tests.attach_help import partly_loaded
from video_ldm.tests.pvdm_help import ABOUT, AUTOENCODER, UNET
from video_ldm.tests.pvdm_nodes_help import FRAMES, LENGTH, frames, load, planes, sample
from video_ldm.tests.small import relative_error

inference, folder, pvdm, three = (
    pvdm_nodes_help.inference, pvdm_nodes_help.folder, pvdm_nodes_help.pvdm, pvdm_nodes_help.three)     # fixtures


# Weights

def test_loading_the_same_files_twice_shares_their_weights_until_a_file_changes(folder, pvdm):
    again = load()[0]
    assert again.unet.module is pvdm.unet.module and again.autoencoder.module is pvdm.autoencoder.module
    pvdm_help.write(folder, "other", seed=1)
    one = load("other")[0]
    assert one.unet.module is not pvdm.unet.module
    pvdm_help.write(folder, "other", seed=5)
    two = load("other")[0]
    assert two.unet.module is not one.unet.module
    assert relative_error(planes(two, clips=1), planes(one, clips=1)) > 1e-2
    assert torch.equal(planes(one, clips=1), planes(pvdm, clips=1))


@pytest.mark.parametrize("budget", [0.1, 2e5])
def test_partly_loaded_networks_give_what_fully_loaded_ones_give(pvdm, three, budget):
    patchers = [pvdm.unet.patcher, pvdm.autoencoder.patcher]
    with partly_loaded(patchers, budget):
        images, _, latent = sample(pvdm, clips=3)
    assert torch.equal(latent["samples"], three[2]["samples"]) and torch.equal(images, three[0])


def eps_of(pvdm):
    """What the diffusion network predicts of some noise."""
    x = torch.randn(1, 4, LENGTH, generator=torch.Generator().manual_seed(1))
    network = pvdm.unet
    return network.module(network.cast(x), torch.tensor([500]), pvdm.shape, network.cast(x.flip(2))).float()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_networks_that_compute_in_half_precision_give_nearly_the_same(folder, monkeypatch, dtype):
    """Core chooses the types. Here it is told to, as its start options tell it."""
    pvdm_help.write(folder, "half", dtype=dtype)
    plain = load("half")[0]
    assert plain.unet.dtype == plain.autoencoder.dtype == torch.float32         # on a processor
    rounded = pvdm_help.unet().to(dtype).float()
    x = torch.randn(1, 4, LENGTH, generator=torch.Generator().manual_seed(1))
    assert relative_error(eps_of(plain), rounded(x, torch.tensor([500]), AUTOENCODER.shape, x.flip(2))) < 1e-5
    name = {torch.float16: "fp16", torch.bfloat16: "bf16"}[dtype]
    monkeypatch.setattr(comfy.cli_args.args, f"{name}_unet", True)
    monkeypatch.setattr(comfy.cli_args.args, f"{name}_vae", True)
    monkeypatch.setattr(comfy.model_management, "unet_manual_cast", lambda *args: None)
    half, report = load("half")
    assert f"computes in {str(dtype)[6:]}, the diffusion model in {str(dtype)[6:]}." in report
    parameters = [*half.unet.module.parameters(), *half.autoencoder.module.parameters()]
    assert {parameter.dtype for parameter in parameters} == {dtype}
    bound = 20 * torch.finfo(dtype).eps
    assert 0 < relative_error(eps_of(half), eps_of(plain)) < bound
    coded, exact = (nodes.PVDMEncode.execute(one, frames(FRAMES)).result[0]["samples"] for one in (half, plain))
    assert 0 < relative_error(coded, exact) < bound
    images, _, latent = sample(half, clips=1)
    assert images.dtype == latent["samples"].dtype == torch.float32 and images.std() > 0.05


def test_weights_that_are_cast_for_each_call_compute_in_the_wider_type(folder, monkeypatch):
    pvdm_help.write(folder, "half", dtype=torch.float16)
    exact = planes(load("half")[0])
    monkeypatch.setattr(comfy.cli_args.args, "fp16_unet", True)
    cast = load("half")[0]
    assert cast.unet.dtype == torch.float32
    assert {parameter.dtype for parameter in cast.unet.module.parameters()} == {torch.float16}
    assert torch.equal(planes(cast), exact)


# What Load PVDM says

def test_the_report_says_what_an_artist_needs(folder):
    report = load()[1].splitlines()
    assert report == [
        "A clip is 8 frames of 32x16 at 8 frames per second; its planes are a LATENT of 1 x 4 x 1 x 56.",
        "small_autoencoder.safetensors: a PVDM autoencoder, small, 0.1 million weights in float32. Licence: "
        "Apache-2.0.",
        "small.safetensors: a PVDM diffusion model, small, 0.9 million weights in float32. Licence: Apache-2.0.",
        "The autoencoder computes in float32, the diffusion model in float32."]
    for name, network in (("model_last.pth", pvdm_help.autoencoder()), ("model_9.pth", pvdm_help.unet()),
                          ("ema_model_9.pth", pvdm_help.unet())):
        torch.save(pvdm_help.published(network), folder / name)
    report = nodes.LoadPVDM.execute("model_last.pth", "model_9.pth").result[1]
    for words in ("PVDM's authors published it for UCF-101", "do not say how many frames per second", "ema_model_9.pth "
                  "lies beside it.", "Licence: MIT, as the code of its authors says."):
        assert words in report
    assert "single clips" in load("single")[1]


def test_a_file_without_a_frame_rate_plays_at_the_packs_own(folder):
    pvdm_help.write(folder, "still", about=replace(ABOUT, fps=None))
    still = load("still")[0]
    assert still.fps is None and sample(still, clips=1)[1].get_frame_rate() == 8
    assert "frame_rate" not in nodes.PVDMEncode.execute(still, frames(FRAMES)).result[0]


def test_a_changed_file_is_loaded_again(folder):
    names = "small_autoencoder.safetensors", "small.safetensors"
    before = nodes.LoadPVDM.fingerprint_inputs(*names)
    assert before == nodes.LoadPVDM.fingerprint_inputs(*names)
    (folder / names[1]).touch()
    assert before != nodes.LoadPVDM.fingerprint_inputs(*names)


# What is refused

def refused(work):
    with pytest.raises(VideoLDMError) as caught:
        work()
    sentence = str(caught.value)
    assert sentence.endswith(".") and sentence.isprintable()
    return sentence


NAME = "small_autoencoder.safetensors and small.safetensors"


@pytest.mark.parametrize("changes, words", [
    ({"start_clip": frames(FRAMES - 1)}, f"The start clip has 7 frames, and {NAME} goes on from 8. Connect at least 8 "
                                         "frames."),
    ({"start_clip": frames(1)}, "The start clip has 1 frame, and"),
    ({"start_clip": frames(FRAMES, height=32)},
     f"The frames of the start clip have 32x32 pixels, and {NAME} was trained on 32x16. Scale the frames to 32x16"),
    ({"start_clip": frames(FRAMES)[..., :1]}, "The frames of the start clip have 1 channel"),
    ({"start_clip": frames(FRAMES) / 0}, "no numbers (NaN or infinity)"),
    ({"start_clip": frames(FRAMES), "start_planes": {"samples": torch.zeros(1, 4, 1, LENGTH)}},
     "PVDM Sampler goes on from a start clip or from planes, and both are connected."),
    ({"start_planes": {"samples": torch.zeros(1, 4, 8, 8)}}, "The connected LATENT of the size 1x4x8x8 does not hold"),
    ({"clips": 0}, "PVDM Sampler: clips is 0"), ({"steps": 1001}, "PVDM Sampler: steps is 1001"),
])
def test_a_video_that_cannot_be_made_is_refused(pvdm, changes, words):
    assert words in refused(lambda: sample(pvdm, **changes))


def test_single_clips_are_all_that_a_network_without_an_input_for_the_clip_before_makes(folder):
    single = load("single")[0]
    assert planes(single, clips=1).shape == (1, 4, 1, LENGTH)
    for changes in ({"clips": 2}, {"clips": 1, "start_clip": frames(FRAMES)}):
        assert "it makes single clips. Set clips to 1, and connect no start clip." in refused(
            lambda changes=changes: sample(single, **changes))


@pytest.mark.parametrize("images, words", [
    (frames(FRAMES + 3), f"11 frames do not divide into clips of 8, which {NAME} takes. Connect 8 or 16 frames."),
    (frames(5), "5 frames do not divide into clips of 8, which .* takes. Connect 8 frames."),
    (frames(FRAMES, width=40), "The frames have 40x16 pixels, and .* was trained on 32x16."),
    (frames(FRAMES, height=8), "The frames have 32x8 pixels, and .* was trained on 32x16."),
])
def test_frames_that_are_no_clips_of_the_model_are_refused(pvdm, images, words):
    assert re.search(words, refused(lambda: nodes.PVDMEncode.execute(pvdm, images)))


@pytest.mark.parametrize("size", [(1, 4, 16, 32), (1, 8, 1, LENGTH), (1, 4, 1, LENGTH + 1), (1, 4, 1, 1, LENGTH)])
def test_latents_that_are_no_planes_are_refused(pvdm, size):
    words = f"of the size {'x'.join(map(str, size))} does not hold planes of {NAME}, which are clips x 4 x 1 x 56."
    assert words in refused(lambda: nodes.PVDMDecode.execute(pvdm, {"samples": torch.zeros(size)}, 0.0))
    if size[1] == 4 and len(size) == 4:
        odd = {"samples": torch.zeros(1, 4, 1, LENGTH), latents.KIND: "SD15"}
        assert "does not hold planes" in refused(lambda: nodes.PVDMDecode.execute(pvdm, odd, 0.0))


def test_nodes_for_image_models_refuse_planes(three):
    vae = type("Vae", (), {"encode": None, "decode": None, "first_stage_model": None})()
    sentence = refused(lambda: TemporalDecode.execute(vae, three[2], 8, 4, 0, 0.0))
    assert sentence.startswith("The connected latents are planes of a PVDM") and "PVDM Decode" in sentence
    assert refused(lambda: latents.check_kind(three[2], None, "The key frames")).startswith("The key frames are planes")


def test_two_files_of_different_models_are_refused(folder):
    from video_ldm.temporal.pvdm.files import write_diffusion
    wide = replace(UNET, channels=8)
    write_diffusion(folder / "wide.safetensors", pvdm_help.unet(wide).state_dict(), wide, ABOUT)
    assert "wide.safetensors diffuses planes of 8 channels" in refused(
        lambda: nodes.LoadPVDM.execute("small_autoencoder.safetensors", "wide.safetensors"))
    assert "are swapped, or one is chosen twice" in refused(
        lambda: nodes.LoadPVDM.execute("small.safetensors", "small_autoencoder.safetensors"))
    assert "are swapped, or one is chosen twice" in refused(
        lambda: nodes.LoadPVDM.execute("small.safetensors", "small.safetensors"))
    assert "There is no file none.safetensors" in refused(
        lambda: nodes.LoadPVDM.execute("none.safetensors", "small.safetensors"))
