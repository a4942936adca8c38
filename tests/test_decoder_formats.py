"""Files of temporal decoders: SVD's in all its forms, ours, and everything that is refused."""


from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from video_ldm.temporal.decoder import PAPER_KERNEL, SVD_KERNEL
from video_ldm.temporal.errors import VideoLDMError
from video_ldm.temporal.families import identify, load_decoder, load_temporal
from video_ldm.temporal.formats import decoder as file_format
from video_ldm.tests.decoder_help import latents, small_params, temporal_decoder, write_decoder
from video_ldm.tests.formats_help import PUBLISHED, saved
from video_ldm.tests.small import relative_error

SVD_UNET = {"model.diffusion_model.input_blocks.1.1.time_stack.0.attn1.to_q.weight": torch.zeros(8, 8),
            "model.diffusion_model.input_blocks.1.1.time_stack.0.attn2.to_k.weight": torch.zeros(8, 1024),
            "model.diffusion_model.input_blocks.1.1.time_mixer.mix_factor": torch.zeros(1),
            "model.diffusion_model.input_blocks.0.0.weight": torch.zeros(8, 8, 3, 3)}
ENCODER = {"encoder.conv_in.weight": torch.zeros(32, 3, 3, 3)}


@pytest.fixture(scope="module")
def state():
    """A small decoder's tensors by their own names."""
    return {key: value.clone() for key, value in temporal_decoder(small_params()).state_dict().items()}


def within(state, prefix):
    return {f"{prefix}decoder.{key}": value for key, value in state.items()}


def svd_checkpoint(state):
    return {**SVD_UNET, **within(state, "first_stage_model."),
            **{f"first_stage_model.{key}": value for key, value in ENCODER.items()}}


@pytest.mark.parametrize("form", ["checkpoint", "vae file", "vae prefix", "torch", "old name of the last layer"])
def test_svds_decoder_is_read_from_every_form_it_comes_in(tmp_path, state, form):
    renamed = {key.replace("conv_out.time_mix", "time_mix"): value for key, value in state.items()}
    tensors, name = {
        "checkpoint": (svd_checkpoint(state), "svd.safetensors"),
        "vae file": ({**within(state, ""), **ENCODER}, "vae.safetensors"),
        "vae prefix": (within(state, "vae."), "vae.safetensors"),
        "torch": ({"state_dict": svd_checkpoint(state)}, "svd.ckpt"),
        "old name of the last layer": (within(renamed, ""), "vae.safetensors")}[form]
    found = load_decoder(saved(tmp_path, name, tensors))
    assert found.params == small_params() and found.tensors.keys() == state.keys() and not found.post_quant
    assert all(torch.equal(found.tensors[key], state[key]) for key in state)
    assert found.latents == "Stable Diffusion 1.x and 2.x" and "Stability" in found.licence


def test_the_published_keys_are_a_decoder_of_svds_size():
    for name in ("svd_temporal_decoder", "diffusers_vae_temporal_decoder"):
        shapes = {key: tuple(shape) for key, shape in PUBLISHED[name].items()}
        names, quant = file_format.names_of(shapes)
        params = file_format.params_of("file", "title", {key: shapes[place] for key, place in names.items()})
        assert (params.channels, params.channel_mult, params.num_res_blocks, params.kernel, params.factor) == (
            128, (1, 2, 4, 4), 2, SVD_KERNEL, 8)
        assert names.keys() == file_format.shapes_of(params).keys() and not quant


def test_diffusers_own_decoder_gives_the_same_pictures(tmp_path):
    """Its weights under its names, through our reader, into our decoder, against its own forward."""
    diffusers = pytest.importorskip("diffusers")
    from video_ldm.nodes.host.temporal_vae import build_decoder
    from video_ldm.tests.small import randomise
    theirs = diffusers.AutoencoderKLTemporalDecoder(block_out_channels=(32, 32, 64, 64), layers_per_block=2,
                                                    down_block_types=("DownEncoderBlock2D",) * 4)
    randomise(theirs, 4)
    state = {key: value.clone() for key, value in theirs.state_dict().items()}
    found = load_decoder(saved(tmp_path, "diffusion_pytorch_model.safetensors", state))
    assert found.params == replace(small_params(), num_res_blocks=2) and found.kind == "diffusers_svd_temporal_decoder"
    ours = build_decoder(found.params)
    ours.load_state_dict(found.tensors)
    z = latents(5)
    with torch.no_grad():
        assert relative_error(ours(z), theirs.decode(z, num_frames=5).sample) < 1e-5


@pytest.mark.parametrize("kernel", [SVD_KERNEL, PAPER_KERNEL], ids=str)
def test_a_decoder_of_ours_comes_back_from_its_file_with_all_that_was_said_of_it(tmp_path, kernel):
    params = small_params(kernel)
    quant = {"weight": torch.randn(4, 4, 1, 1), "bias": torch.randn(4)}
    path = write_decoder(tmp_path / "mine.safetensors", params, post_quant=quant, metadata={"steps": "3"})
    found = load_decoder(path)
    assert (found.kind, found.params, found.frames, found.fps) == ("video_ldm_decoder", params, 6, 8.0)
    assert found.latents == "the tests" and found.licence == "Apache-2.0" and found.metadata["steps"] == "3"
    assert all(torch.equal(found.post_quant[part], quant[part]) for part in quant)
    assert identify(path).takes == "decoder"
    with pytest.raises(ValueError, match="format's own"):
        write_decoder(tmp_path / "more.safetensors", metadata={"frames": "4"})
    assert not (tmp_path / "more.safetensors").exists()


def test_load_temporal_layers_is_told_where_a_decoder_belongs(tmp_path, state):
    path = saved(tmp_path, "vae.safetensors", within(state, ""))
    with pytest.raises(VideoLDMError, match="vae.safetensors is the temporal decoder of Stable Video Diffusion .* Load "
                                            "it with "
                                            "Load Temporal Decoder"):
        load_temporal(path)
    with pytest.raises(VideoLDMError, match="Stable Video Diffusion checkpoint"):
        load_temporal(saved(tmp_path, "svd.safetensors", svd_checkpoint(state)))


# Refusals

def image_part(state):
    return {key: value for key, value in state.items() if "time_" not in key and "mix_factor" not in key}


def test_an_image_decoder_in_the_slot_is_refused(tmp_path, state):
    sentence = "with an image decoder: it has no temporal layers. Choose svd.safetensors"
    svd = {**SVD_UNET, **within(image_part(state), "first_stage_model.")}
    for name, tensors in (("vae.safetensors", within(image_part(state), "")), ("svd_image_decoder.safetensors", svd)):
        with pytest.raises(VideoLDMError, match=f"{name} is .* {sentence}"):
            load_decoder(saved(tmp_path, name, tensors))


@pytest.mark.parametrize("name, tensors, sentence", [
    ("lora.safetensors", {"lora_unet_x.lora_down.weight": torch.zeros(4, 4)},
     "a LoRA .*, not a temporal decoder. Load it"),
    ("what.safetensors", {"something": torch.zeros(2)}, "a kind that this pack does not know"),
])
def test_other_files_are_named_and_refused(tmp_path, name, tensors, sentence):
    with pytest.raises(VideoLDMError, match=sentence):
        load_decoder(saved(tmp_path, name, tensors))


def spoilt(state, **changes):
    return within({**state, **{key.replace("__", "."): value for key, value in changes.items()}}, "")


@pytest.mark.parametrize("change, sentence", [
    (lambda s: within({k: v for k, v in s.items() if k != "up.1.block.0.conv2.weight"}, ""),
     "1 of its .* tensors are missing .the first: up.1.block.0.conv2.weight"),
    (lambda s: spoilt(s, more=torch.zeros(1)), "holds 1 tensors that such a decoder does not have .the first: more"),
    (lambda s: spoilt(s, norm_out__weight=torch.zeros(7)), r"norm_out.weight has shape \[7\] where \[32\] is due"),
    (lambda s: spoilt(s, norm_out__weight=torch.zeros(32, dtype=torch.int8)),
     "int8, which is not a floating-point type"),
    (lambda s: spoilt(s, up__0__block__0__conv2__weight=s["up.0.block.0.conv2.weight"].half()), "mixes types"),
    (lambda s: within({k: v for k, v in s.items() if not k.startswith("up.")}, ""), "The file is incomplete"),
    (lambda s: spoilt(s, mid__block_1__time_stack__in_layers__2__weight=torch.zeros(64, 64, 5, 1, 1)),
     r"its kernel over time is \(5, 1, 1\)"),
    (lambda s: spoilt(s, up__0__block__0__conv1__weight=torch.zeros(20, 32, 3, 3)), "do not divide into 32 groups"),
])
def test_a_file_that_is_not_whole_is_refused_with_the_first_fault(tmp_path, state, change, sentence):
    with pytest.raises(VideoLDMError, match=sentence):
        load_decoder(saved(tmp_path, "decoder.safetensors", change(state)))


@pytest.mark.parametrize("entry, value, sentence", [
    ("version", "2", "version 2 of the format of temporal decoders; this pack reads version 1. Update"),
    ("latents", None, "whose metadata lacks latents"),
    ("frames", "six", "cannot be read: frames is six, where a whole"),
    ("fps", "-1", "cannot be read: fps is -1, where a number between 0 and 10000")])
def test_impossible_metadata_is_refused(tmp_path, entry, value, sentence):
    path = write_decoder(tmp_path / "mine.safetensors")
    from safetensors import safe_open
    with safe_open(str(path), framework="pt") as file:
        metadata = {**file.metadata(), entry: value}
    save_file(load_file(path), path, metadata={key: text for key, text in metadata.items() if text is not None})
    with pytest.raises(VideoLDMError, match=sentence):
        load_decoder(path)


def test_a_convolution_before_the_decoder_has_to_fit_its_latents(tmp_path):
    quant = {"weight": torch.zeros(5, 5, 1, 1), "bias": torch.zeros(5)}
    path = write_decoder(tmp_path / "mine.safetensors", post_quant=quant)
    with pytest.raises(VideoLDMError, match="post_quant_conv does not fit its latents of 4 channels"):
        load_decoder(path)


def test_the_vae_has_to_have_the_decoders_latents(tmp_path):
    found = load_decoder(write_decoder(tmp_path / "mine.safetensors"))
    found.check_vae(4, 8, "a VAE")
    sentence = r"for latents of 4 channels, and the connected VAE \(Flux\) has 16. Connect a VAE for the tests"
    with pytest.raises(VideoLDMError, match=sentence):
        found.check_vae(16, 8, "Flux")
    with pytest.raises(VideoLDMError, match="latents of 8 pixels per latent, and the connected VAE .* has 4"):
        found.check_vae(4, 4, "x4")


def test_an_incomplete_decoder_is_not_written(tmp_path, state):
    with pytest.raises(VideoLDMError, match="missing"):
        file_format.write(tmp_path / "x.safetensors", image_part(state), small_params(), latents="x", frames=6)
    assert not list(tmp_path.iterdir())


def test_what_stands_before_the_decoder_in_svds_checkpoint_is_left_there(tmp_path, state):
    quant = {"weight": torch.ones(4, 4, 1, 1), "bias": torch.ones(4)}
    named = {f"first_stage_model.post_quant_conv.{part}": value for part, value in quant.items()}
    found = load_decoder(saved(tmp_path, "svd.safetensors", {**svd_checkpoint(state), **named}))
    assert found.tensors.keys() == state.keys() and found.post_quant == {}
