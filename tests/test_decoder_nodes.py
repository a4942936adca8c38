"""Load Temporal Decoder and Temporal VAE Decode on ComfyUI's own VAE, in this process."""

import logging
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from video_ldm.benchmarks.memory import Tally
from video_ldm.nodes import decode as nodes
from video_ldm.nodes.host import compat, decoding, temporal_vae
from video_ldm.nodes.host.decoding import DecodeSettings, Decoding
from video_ldm.temporal.decoder import PAPER_KERNEL, TemporalDecoder
from video_ldm.temporal.errors import VideoLDMError
from video_ldm.temporal.families import load_decoder
from video_ldm.tests import decoder_help
from video_ldm.tests.decoder_help import (
    latents,
    small_params,
    temporal_decoder,
    whole,
    write_decoder,
)
from video_ldm.tests.small import relative_error

vae, made = decoder_help.vae, decoder_help.made      # fixtures


# Load Temporal Decoder

def test_the_new_vae_encodes_as_the_old_one_bit_for_bit_and_leaves_it_unchanged(vae, tmp_path):
    pixels, z = torch.rand(3, 48, 64, 3), latents(3)
    before = {key: value.clone() for key, value in vae.get_sd().items()}
    encoded, decoded = vae.encode(pixels), vae.decode(z)
    made = temporal_vae.with_temporal_decoder(vae, load_decoder(write_decoder(tmp_path / "mine.safetensors")))
    assert torch.equal(made.encode(pixels), encoded) and not torch.equal(made.decode(z), decoded)
    assert made.patcher is not vae.patcher and made.patcher.model is made.first_stage_model is not vae.first_stage_model
    shared = {weight.data_ptr() for weight in vae.first_stage_model.parameters()}
    assert not shared & {weight.data_ptr() for weight in made.first_stage_model.parameters()}
    with torch.no_grad():
        for weight in made.first_stage_model.parameters():
            weight.zero_()                                      # whatever happens to the new one
    assert torch.equal(vae.encode(pixels), encoded) and torch.equal(vae.decode(z), decoded)
    assert vae.get_sd().keys() == before.keys() and all(torch.equal(vae.get_sd()[key], before[key]) for key in before)
    assert made.model_size() > vae.model_size()


@pytest.mark.parametrize("own", [True, False])
def test_nothing_stands_before_a_decoder_whose_file_has_no_post_quant_conv(vae, tmp_path, own):
    quant = {"weight": torch.randn(4, 4, 1, 1), "bias": torch.randn(4)} if own else None
    file = load_decoder(write_decoder(tmp_path / "x.safetensors", post_quant=quant))
    made = temporal_vae.with_temporal_decoder(vae, file)
    z, decoder = latents(3), temporal_decoder(small_params(), 7)
    fed = nn.functional.conv2d(z, quant["weight"], quant["bias"]) if own else z
    assert torch.equal(made.first_stage_model.decode(z), decoder(fed))
    assert torch.equal(made.decode(z), made.process_output(decoder(fed)).movedim(1, -1))


def test_the_image_path_of_the_new_vae_is_the_plain_vae_bit_for_bit(vae, tmp_path):
    from video_ldm.temporal.formats import decoder as file_format
    decoder = temporal_decoder(small_params())
    decoder.load_state_dict(vae.first_stage_model.decoder.state_dict(), strict=False)
    quant = vae.first_stage_model.post_quant_conv.state_dict()
    file_format.write(tmp_path / "x.safetensors", decoder.state_dict(), small_params(), latents="x", frames=6,
                      post_quant=quant)
    made = temporal_vae.with_temporal_decoder(vae, load_decoder(tmp_path / "x.safetensors"))
    z = latents(4)
    assert torch.equal(made.first_stage_model.decode(z, skip_video=True), vae.first_stage_model.decode(z))
    assert not torch.equal(made.first_stage_model.decode(z), vae.first_stage_model.decode(z))


def test_a_vae_that_has_a_temporal_decoder_already_gets_the_new_one(made, tmp_path):
    file = load_decoder(write_decoder(tmp_path / "other.safetensors", small_params(PAPER_KERNEL), seed=11))
    again = temporal_vae.with_temporal_decoder(made, file)
    z = latents(3)
    assert torch.equal(again.first_stage_model.decode(z), temporal_decoder(small_params(PAPER_KERNEL), 11)(z))
    assert isinstance(made.first_stage_model.decoder, TemporalDecoder)


def test_attributes_that_comfyui_has_left_on_a_loaded_model_are_not_copied():
    module = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    module[0]._v = module[0].weight_function = object()
    module.dynamic_vbars, module[0].comfy_patched_weights, module[0].weight_comfy_model_dtype = {}, True, torch.float16
    module[0].note = "kept"
    copied = compat.own_copy(module, torch.bfloat16)
    assert not {"_v", "weight_function", "comfy_patched_weights", "weight_comfy_model_dtype"} & vars(copied[0]).keys()
    assert "dynamic_vbars" not in vars(copied) and copied[0].note == "kept" and type(copied[0]) is nn.Linear
    assert copied[0].weight.dtype == torch.bfloat16 and copied[1].num_batches_tracked.dtype == torch.int64
    copied[0].register_forward_hook(lambda *_: None)
    assert not module[0]._forward_hooks and module[0].weight.dtype == torch.float32


class Plain(nn.Module):
    pass


@pytest.mark.parametrize("change, sentence", [
    (lambda vae: setattr(vae, "first_stage_model", None), "The connected VAE is empty"),
    (lambda vae: setattr(vae, "latent_dim", 3), "is one of a video model, which decodes time by itself"),
    (lambda vae: setattr(vae, "first_stage_model", Plain()),
     r"The connected VAE \(Plain, 4 latent channels\) is not built like Stable Diffusion's"),
    (lambda vae: setattr(vae, "latent_channels", 16), "for latents of 4 channels, and the connected VAE .* has 16"),
    (lambda vae: setattr(vae, "upscale_ratio", 4),
     "for latents of 8 pixels per latent, and the connected VAE .* has 4"),
])
def test_a_vae_that_the_decoder_does_not_fit_is_refused(vae, tmp_path, change, sentence):
    import copy
    other = copy.copy(vae)
    change(other)
    with pytest.raises(VideoLDMError, match=sentence):
        temporal_vae.with_temporal_decoder(other, load_decoder(write_decoder(tmp_path / "mine.safetensors")))


def test_a_decoder_behind_a_convolution_needs_a_vae_that_has_one(vae, made, tmp_path):
    import copy
    other = copy.copy(vae)
    other.first_stage_model = Plain()
    other.first_stage_model.encoder, other.first_stage_model.decoder = nn.Identity(), vae.first_stage_model.decoder
    quant = {"weight": torch.zeros(4, 4, 1, 1), "bias": torch.zeros(4)}
    file = load_decoder(write_decoder(tmp_path / "x.safetensors", post_quant=quant))
    with pytest.raises(VideoLDMError, match="was trained behind the post_quant_conv of a VAE for the tests"):
        temporal_vae.with_temporal_decoder(other, file)


def demo_vae():
    from video_ldm.nodes.host import files, models
    return models.load_autoencoder(files.DEMO_FOLDER / "autoencoder.safetensors")


def test_a_decoder_for_other_latents_is_warned_of_by_a_test_picture_and_one_that_fits_is_not(tmp_path):
    """The latents of the bundled autoencoder mean something.

    Its decoder with fresh layers fits. Behind exchanged channels the decoder is one for another latent space of
    the same shape.
    """
    from video_ldm.demo.decoder import params
    from video_ldm.temporal.formats import decoder as file_format
    vae = demo_vae()
    decoder = temporal_vae.build_decoder(params())
    decoder.load_state_dict(vae.first_stage_model.decoder.state_dict(), strict=False)
    quant = vae.first_stage_model.post_quant_conv.state_dict()
    turned = {"weight": quant["weight"][:, [2, 3, 0, 1]], "bias": quant["bias"]}
    warnings = []
    for name, part in (("fits.safetensors", quant), ("other.safetensors", turned)):
        file_format.write(tmp_path / name, decoder.state_dict(), params(), latents="the demo", frames=6,
                          post_quant=part)
        file = load_decoder(tmp_path / name)
        warnings.append(temporal_vae.round_trip_warning(vae, temporal_vae.with_temporal_decoder(vae, file), file))
    assert warnings[0] is None
    assert "other.safetensors does not seem to fit the connected VAE" in warnings[1] and "SDXL" in warnings[1]


def test_a_vae_and_a_file_are_tried_together_once_until_one_of_them_changes(made, monkeypatch):
    trips, vae = [], demo_vae()
    monkeypatch.setattr(temporal_vae, "_outcomes", {})
    monkeypatch.setattr(temporal_vae, "round_trips", lambda *vaes: trips.append(vaes) or (30.0, 10.0))
    file = SimpleNamespace(name="mine.safetensors", latents="the tests")

    def warned(vae, *stamp):
        assert "mine.safetensors does not seem to fit" in temporal_vae.round_trip_warning(vae, made, file, stamp)
        return len(trips)
    assert [warned(vae, "mine", 1), warned(vae, "mine", 1), warned(demo_vae(), "mine", 1)] == [1, 1, 1]
    assert [warned(vae, "mine", 2), warned(vae, "other", 1)] == [2, 3]
    with torch.no_grad():
        vae.first_stage_model.decoder.conv_in.bias[0] += 1
    assert [warned(vae, "mine", 1), warned(vae, "mine", 1)] == [4, 4]
    assert temporal_vae.round_trip_warning(vae, made, file) and len(trips) == 5       # nobody says which file it is
    vae.patcher.patches = {"first_stage_model.decoder.conv_in.bias": []}
    assert [warned(vae, "mine", 1), warned(vae, "mine", 1)] == [6, 7]                 # what patches do is not known


# Temporal VAE Decode

def test_one_window_is_what_the_vae_decodes(made, vae):
    z = latents(5)
    assert torch.equal(whole(made, z), made.decode(z)) and torch.equal(whole(vae, z), vae.decode(z))


def test_with_a_plain_vae_the_window_is_a_batch_and_changes_nothing(vae):
    z = latents(7)
    for window in (1, 2, 3):
        assert relative_error(whole(vae, z, window, window - 1), vae.decode(z)) < 1e-5
    assert not Decoding(vae, z, DecodeSettings(4, 3, 0, 1)).overlap


def test_the_result_does_not_depend_on_free_memory(made, monkeypatch):
    """Core splits the same batch by it, which is where its seams come from."""
    import comfy.model_management
    z = latents(10)
    results, core = [], []
    for free in (2 ** 40, 1):
        monkeypatch.setattr(comfy.model_management, "get_free_memory",
                            lambda *args, free=free, **more: (free, free) if more else free)
        results.append(whole(made, z, 6, 2))
        core.append(made.decode(z))
    assert torch.equal(*results) and not torch.equal(*core)


def test_attention_over_a_large_picture_keeps_no_matrix_of_scores_and_the_vae_keeps_its_own(made, monkeypatch):
    """On a CPU core's takes as much memory as is free."""
    block, z = made.first_stage_model.decoder.mid.attn_1, latents(2, 12, 16)
    chosen, before = block.optimized_attention, whole(made, z)
    monkeypatch.setattr(compat, "MOST_SCORES", 2 ** 10)
    block.optimized_attention = None                        # not called
    try:
        assert relative_error(whole(made, z), before) < 1e-4 and block.optimized_attention is None
    finally:
        block.optimized_attention = chosen
    q = torch.rand(1, 32, 64, 64)
    with torch.no_grad(), Tally() as tally:
        compat.frugal(None)(q, q, q)
    assert tally.most["cpu"] < 64 ** 4 * 4 / 4


def test_clips_of_a_batch_are_decoded_one_by_one(made):
    z = latents(12)
    two = whole(made, z, 4, 2, clips=2)
    assert torch.equal(two, torch.cat([whole(made, z[:6], 4, 2), whole(made, z[6:], 4, 2)]))
    assert not torch.equal(two, whole(made, z, 4, 2))
    assert [nodes.clips_of(latent, 12) for latent in ({"clip_frames": 6}, {"clip_frames": 5}, {})] == [2, 1, 1]


def test_tiles_are_decoded_over_all_frames_of_a_window(made):
    z, seen = latents(6, 20, 12), []
    decoder = made.first_stage_model.decoder
    hook = decoder.register_forward_pre_hook(lambda module, args: seen.append(tuple(args[0].shape)))
    tiled = whole(made, z, 4, 2, tile=64)
    hook.remove()
    assert set(seen) == {(4, 4, 8, 8)}
    assert len(seen) == Decoding(made, z, DecodeSettings(4, 2, 64, 1)).steps() == 2 * 3 * 2
    assert tiled.shape == (6, 160, 96, 3) and 0 <= tiled.min() and tiled.max() <= 1


class NoRoom:
    """A decoder that runs out of memory above so many latents."""

    def __init__(self, network, most, monkeypatch):
        decode = network.decode

        def limited(z, **more):
            if z.shape[2] * z.shape[3] > most:
                raise torch.cuda.OutOfMemoryError("CUDA out of memory")
            return decode(z, **more)
        monkeypatch.setattr(network, "decode", limited)


def test_where_memory_runs_out_tiles_are_used_and_the_log_says_so(made, monkeypatch, caplog):
    monkeypatch.setattr(decoding, "FALLBACK_TILES", (128, 64))
    z = latents(4, 20, 24)
    asked = whole(made, z, tile=64)
    NoRoom(made.first_stage_model, 100, monkeypatch)
    with caplog.at_level(logging.WARNING):
        assert torch.equal(whole(made, z), asked)
    assert [record.getMessage().split("tiles of ")[1].split(" ")[0] for record in caplog.records] == ["128", "64"]


def test_where_memory_runs_out_for_good_the_sentence_names_the_widgets(made, monkeypatch):
    monkeypatch.setattr(decoding, "FALLBACK_TILES", (128, 64))
    NoRoom(made.first_stage_model, 10, monkeypatch)
    z = latents(4, 20, 24)
    with pytest.raises(VideoLDMError, match="windows of 4 frames of 192x160 in tiles of 64 pixels. Lower window, or "
                                            "lower tile"):
        whole(made, z)
    with pytest.raises(VideoLDMError, match="in tiles of 128 pixels. Lower window, or lower tile"):
        whole(made, z, tile=128)            # what an artist has set is not changed
    with pytest.raises(VideoLDMError, match="192x160 at once.*|64x48 at once. Lower window, or set tile to 256"):
        whole(made, latents(4, 6, 8))


@pytest.mark.parametrize("error", [RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate "
                                                "memory"),
                                   MemoryError(), torch.cuda.OutOfMemoryError("x")])
def test_every_kind_of_memory_running_out_is_known_and_other_errors_pass(error, made, monkeypatch):
    assert compat.is_out_of_memory(error)
    assert not compat.is_out_of_memory(RuntimeError("size mismatch")) and not compat.is_out_of_memory(ValueError())

    def fail(z):
        raise RuntimeError("size mismatch")
    monkeypatch.setattr(made.first_stage_model, "decode", fail)
    with pytest.raises(RuntimeError, match="size mismatch"):
        whole(made, latents(2))


def test_cancel_is_noticed_within_a_window_and_leaves_no_hooks(made, monkeypatch):
    class Cancelled(Exception):
        pass
    calls = []

    def check():
        calls.append(1)
        if len(calls) > 5:
            raise Cancelled
    monkeypatch.setattr(decoding.files, "check_cancelled", check)
    with pytest.raises(Cancelled):
        whole(made, latents(4))
    assert len(calls) == 6
    assert not any(part._forward_pre_hooks for part in made.first_stage_model.modules())


@pytest.mark.parametrize("z, settings, sentence", [
    (latents(4, channels=16), {},
     "The LATENT has 16 channels and the connected VAE .* takes 4. Connect the VAE that belongs"),
    (torch.zeros(1, 4, 3, 6, 8), {}, "has 5 dimensions .* Use core's VAE Decode"),
    (latents(0), {}, "The LATENT has no frames"),
    (latents(4), {"clips": 3}, "4 frames, which do not divide into 3 clips. Set clips"),
    (latents(5), {"window": 4, "overlap": 4}, "overlap is 4 frames and window is 4"),
    (latents(4), {"tile": 32}, "tile is 32 pixels; 64 is the least"),
])
def test_what_cannot_be_decoded_is_refused_in_a_sentence(made, z, settings, sentence):
    with pytest.raises(VideoLDMError, match=sentence):
        Decoding(made, z, DecodeSettings(**{"window": 8, "overlap": 2, "tile": 0, "clips": 1, **settings}))


def test_an_overlap_that_nothing_uses_is_no_mistake(made, vae):
    z = latents(5)
    assert torch.equal(whole(made, z, 5, 9), made.decode(z))                    # one window
    assert relative_error(whole(vae, z, 2, 4), vae.decode(z)) < 1e-5            # frames that do not see each other


def test_one_frame_odd_sizes_and_frames_smaller_than_a_tile_are_decoded(made):
    for z in (latents(1), latents(3, 5, 7), latents(2, 1, 1)):
        assert torch.equal(whole(made, z, tile=512), made.decode(z))
