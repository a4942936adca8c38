"""Files of PVDM: the published layouts and the pack's own, and what is refused."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from video_ldm.temporal.errors import VideoLDMError
from video_ldm.temporal.families import (
    identify,
    identify_keys,
    load_layout,
    load_motion_lora,
    load_pvdm,
    load_temporal,
    load_video_model,
)
from video_ldm.temporal.layers import Factory
from video_ldm.temporal.pvdm import PVDM_L, PVDM_S, RELEASED, PlaneShape, PlaneUNet
from video_ldm.temporal.pvdm.files import (
    AUTOENCODER,
    DIFFUSION,
    About,
    autoencoder_params,
    check_pair,
    unet_params,
    write_autoencoder,
    write_diffusion,
)
from video_ldm.tests import pvdm_help, small_files
from video_ldm.tests.formats_help import PUBLISHED
from video_ldm.tests.pvdm_help import ABOUT, SINGLE, UNET, published

KINDS = {AUTOENCODER: pvdm_help.AUTOENCODER, DIFFUSION: UNET}
each_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(scope="module")
def networks():
    """{kind: a small random network}. Tests change copies of its tensors alone."""
    return {AUTOENCODER: pvdm_help.autoencoder(), DIFFUSION: pvdm_help.unet()}


def write_own(path, kind, network, about=ABOUT, **more):
    write = write_autoencoder if kind == AUTOENCODER else write_diffusion
    write(path, network.state_dict(), network.params, about, **more)
    return path


def refused(path, kind):
    """The sentence with which a file is refused."""
    with pytest.raises(VideoLDMError) as caught:
        load_pvdm(path, kind)
    sentence = str(caught.value)
    assert path.name in sentence and sentence.isprintable() and sentence.endswith(".")
    return sentence


def same_weights(file, network, dtype=torch.float32):
    """Whether a file's network has the weights of another one, to the bit, and whatever is computed."""
    made = file.network(Factory(dtype=dtype, device="meta"))
    given = dict(network.named_parameters())
    assert {name for name, _ in made.named_parameters()} == set(given)
    assert all(torch.equal(weight, given[name].to(dtype)) for name, weight in made.named_parameters())
    assert all(torch.equal(number, dict(network.named_buffers())[name]) for name, number in made.named_buffers())
    return True


# Sizes

def test_the_sizes_of_the_published_networks_are_read_off_their_shapes():
    diffusion = {name.removeprefix("diffusion_model."): shape for name, shape in PUBLISHED["pvdm_diffusion"].items()}
    assert autoencoder_params(PUBLISHED["pvdm_autoencoder"], {}) == RELEASED
    assert unet_params(diffusion, {}) == PVDM_L


@pytest.mark.parametrize("params", [
    PVDM_S, UNET, SINGLE, replace(UNET, channel_mult=(1, 2, 2), num_res_blocks=2, attention_levels=(1, 2)),
    replace(UNET, channel_mult=(2,), attention_levels=()), replace(UNET, num_res_blocks=3, attention_levels=())])
def test_the_sizes_of_any_diffusion_network_are_read_off_its_shapes(params):
    with torch.device("meta"):
        network = PlaneUNet(params, Factory(device="meta"))
    shapes = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    assert unet_params(shapes, {}) == params


# The pack's own files

@each_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_an_own_file_comes_back_to_the_bit_with_all_that_it_says(tmp_path, networks, kind, dtype):
    network = networks[kind]
    path = tmp_path / "own.safetensors"
    write = write_autoencoder if kind == AUTOENCODER else write_diffusion
    half = {name: tensor.to(dtype) for name, tensor in network.state_dict().items()}
    write(path, half, network.params, ABOUT, {"step": "7"})
    found = load_pvdm(path, kind)
    assert found.params == KINDS[kind] and found.dtype == dtype
    assert found.about == (ABOUT if kind == DIFFUSION else replace(ABOUT, grid=None)) and found.notes == []
    with safe_open(str(path), framework="pt") as opened:
        assert opened.metadata()["step"] == "7"
    assert all(torch.equal(tensor, half[name]) for name, tensor in found.tensors.items())
    # What is computed is not rounded to the file's type.
    made = found.network(Factory(dtype=dtype, device="meta"))
    assert all(torch.equal(number, dict(network.named_buffers())[name]) for name, number in made.named_buffers())


def test_what_a_network_predicts_stands_in_the_metadata(tmp_path):
    network = pvdm_help.unet(replace(UNET, prediction="v"))
    path = write_own(tmp_path / "v.safetensors", DIFFUSION, network)
    assert load_pvdm(path, DIFFUSION).params == network.params and UNET.prediction == "eps"


def test_heads_that_no_shape_says_stand_in_the_metadata(tmp_path):
    two = replace(pvdm_help.AUTOENCODER, plane_heads=2, plane_head_width=8)
    network = pvdm_help.autoencoder(two)
    assert load_pvdm(write_own(tmp_path / "two.safetensors", AUTOENCODER, network), AUTOENCODER).params == two
    four = pvdm_help.unet(replace(UNET, heads=4))
    assert load_pvdm(write_own(tmp_path / "four.safetensors", DIFFUSION, four), DIFFUSION).params.heads == 4


def test_a_network_without_an_input_for_the_clip_before_is_read(tmp_path):
    network = pvdm_help.unet(SINGLE)
    found = load_pvdm(write_own(tmp_path / "single.safetensors", DIFFUSION, network), DIFFUSION)
    assert found.params == SINGLE and same_weights(found, network)


def test_a_file_that_cannot_be_read_again_is_not_written(tmp_path, networks):
    path, network = tmp_path / "none.safetensors", networks[DIFFUSION]
    for about, tensors, more in ((About(), network.state_dict(), {}), (ABOUT, {}, {}),
                                 (replace(ABOUT, grid=PlaneShape(8, 2, 2)), network.state_dict(), {}),
                                 (ABOUT, network.state_dict(), {"grid": "[1]"})):
        with pytest.raises(ValueError):
            write_diffusion(path, tensors, network.params, about, more)
    assert list(tmp_path.iterdir()) == []


# Published files

@each_kind
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.module."])
def test_a_published_file_is_taken_with_the_prefixes_of_training(tmp_path, networks, kind, prefix):
    path = tmp_path / "model_last.pth"
    torch.save({prefix + name: tensor for name, tensor in published(networks[kind]).items()}, path)
    found = load_pvdm(path, kind)
    assert found.about == About(licence="MIT, as the code of its authors says") and found.params == KINDS[kind]
    assert same_weights(found, networks[kind]) and identify(path).kind == kind


def test_a_diffusion_network_without_the_prefix_of_its_wrapper_is_taken(tmp_path, networks):
    torch.save(networks[DIFFUSION].state_dict(), tmp_path / "bare.pth")
    assert same_weights(load_pvdm(tmp_path / "bare.pth", DIFFUSION), networks[DIFFUSION])


@each_kind
@pytest.mark.parametrize("plain, averaged", [("", "ema."), ("", "model_ema."), ("model.", "ema_model."),
                                             ("net.", "EMA.")])
def test_of_a_file_with_averaged_weights_beside_the_plain_ones_the_averaged_are_taken(tmp_path, networks, kind, plain,
                                                                                     averaged):
    content = published(networks[kind])
    path = tmp_path / "both.pth"
    torch.save({plain + name: torch.zeros_like(tensor) for name, tensor in content.items()}
               | {averaged + name: tensor for name, tensor in content.items()}, path)
    found = load_pvdm(path, kind)
    assert same_weights(found, networks[kind])
    assert found.notes == ["The file holds averaged weights (EMA) beside the plain ones. The averaged are used."]


@each_kind
@pytest.mark.parametrize("names", [("ema", "model"), ("ema_model", "model"), ("model_ema", "state_dict")])
def test_the_averaged_weights_come_first_where_each_has_a_dictionary(tmp_path, networks, kind, names):
    content = published(networks[kind])
    torch.save({names[1]: {name: torch.zeros_like(tensor) for name, tensor in content.items()}, names[0]: content},
               tmp_path / "both.pth")
    assert same_weights(load_pvdm(tmp_path / "both.pth", kind), networks[kind])


def test_a_file_of_two_networks_that_are_no_averages_is_refused(tmp_path, networks):
    content = published(networks[AUTOENCODER])
    path = tmp_path / "two.pth"
    torch.save(content | {f"other.{name}": tensor for name, tensor in content.items()}, path)
    assert "but holds 2 of them (behind no prefix and other.). Use a file with one." in refused(path, AUTOENCODER)


def test_the_averaged_weights_that_lie_beside_a_file_are_named(tmp_path, networks):
    for name in ("model_100.pth", "ema_model_100.pth", "model_200.pth"):
        torch.save(published(networks[DIFFUSION]), tmp_path / name)
    assert load_pvdm(tmp_path / "model_100.pth", DIFFUSION).notes == [
        "ema_model_100.pth lies beside it. It holds the averaged weights (EMA), which make better videos: choose that "
        "file."]
    for name in ("ema_model_100.pth", "model_200.pth"):
        assert load_pvdm(tmp_path / name, DIFFUSION).notes == []


# What is refused

def changed(folder, networks, kind, change):
    """A published file after `change(tensors)`."""
    tensors = published(networks[kind])
    change(tensors)
    torch.save(tensors, folder / "changed.pth")
    return folder / "changed.pth"


def without(name):
    return lambda tensors: tensors.pop(name)


def cut(name):
    return lambda tensors: tensors.update({name: tensors[name][:-1].clone()})


def converted(name, dtype):
    return lambda tensors: tensors.update({name: tensors[name].to(dtype)})


OUT, TOKEN, ZEROS = "diffusion_model.out.2.bias", "xy_token", "diffusion_model.zeros"


@pytest.mark.parametrize("kind, change, words", [
    (AUTOENCODER, without("post_xt.bias"), "but lacks post_xt.bias. The file is incomplete"),
    (AUTOENCODER, without(TOKEN), "but lacks xy_token."),
    (AUTOENCODER, without("encoder.frame_rot_emb.inv_freqs"), "but lacks encoder.frame_rot_emb.inv_freqs."),
    (AUTOENCODER, without("xy_pos_embedding"), "but lacks xy_pos_embedding."),
    (DIFFUSION, without(OUT), "but lacks out.2.bias."),
    (DIFFUSION, without("diffusion_model.input_blocks.1.0.in_layers.0.weight"), "but lacks input_blocks.1.0.in_layers"),
    (DIFFUSION, without("diffusion_model.time_embed.0.weight"), "but lacks time_embed.0.weight."),
    (DIFFUSION, without(ZEROS), r"input_blocks.0.0.weight has shape \[32, 8, 3, 3\] where \[32, 4, 3, 3\] is due"),
    (AUTOENCODER, lambda tensors: tensors.update(extra=torch.zeros(1)), "but holds extra, which such a network"),
    (DIFFUSION, lambda tensors: tensors.update({"diffusion_model.extra": torch.zeros(1)}), "but holds extra, which"),
    (DIFFUSION, lambda tensors: tensors.update(extra=torch.zeros(1)), "but holds extra, which such a network does not"),
    (AUTOENCODER, cut("pre_yt.bias"), r"but pre_yt.bias has shape \[3\] where \[4\] is due"),
    (AUTOENCODER, cut("encoder.layers.0.0.fn.to_qkv.weight"), "the attention's width is 95, which does not divide"),
    (AUTOENCODER, lambda tensors: tensors.update(xy_token=torch.zeros(())), "no such network has its sizes"),
    (DIFFUSION, cut(OUT), r"but out.2.bias has shape \[3\] where \[4\] is due"),
    (AUTOENCODER, converted(TOKEN, torch.float16), "mixes types: xy_token is float16, "),
    (DIFFUSION, converted(OUT, torch.bfloat16), "mixes types: .* out.2.bias is bfloat16"),
    (DIFFUSION, converted(OUT, torch.float64), "holds out.2.bias as float64, and weights of PVDM are float32"),
    (DIFFUSION, converted(OUT, torch.int32), "holds out.2.bias as int32, and"),
    (AUTOENCODER, lambda tensors: tensors["encoder.image_rot_emb.scales"].add_(0.1),
     "but encoder.image_rot_emb.scales does not hold the numbers that every such network has"),
    (DIFFUSION, lambda tensors: tensors[ZEROS].add_(0.1), "but zeros does not hold the numbers"),
    (DIFFUSION, lambda tensors: tensors[OUT].fill_(float("nan")), "out.2.bias holds NaN or infinity"),
])
def test_a_file_that_is_not_exactly_one_network_is_refused(tmp_path, networks, kind, change, words):
    import re
    sentence = refused(changed(tmp_path, networks, kind, change), kind)
    assert re.search(words, sentence), sentence


@each_kind
@pytest.mark.parametrize("ending", [".pth", ".safetensors"])
def test_a_truncated_file_is_refused(tmp_path, networks, kind, ending):
    path = tmp_path / f"cut{ending}"
    if ending == ".pth":
        torch.save(published(networks[kind]), path)
    else:
        write_own(path, kind, networks[kind])
    content = path.read_bytes()
    for share in (0.3, 0.9):
        path.write_bytes(content[:int(share * len(content))])
        assert "Download it again" in refused(path, kind)


@pytest.mark.parametrize("kind, entries, words", [
    (AUTOENCODER, {"version": "2"}, "is a PVDM autoencoder written by this pack of version 2, and this pack reads"),
    (AUTOENCODER, {"plane_heads": "3"}, "no such network has its sizes (the width of the planes' attention is 48"),
    (AUTOENCODER, {"plane_heads": "0"}, "plane_heads is 0, where a whole number from 1"),
    (AUTOENCODER, {"fps": "fast"}, "fps is fast, where a number"),
    (DIFFUSION, {"heads": "7"}, "its attentions do not divide into 7 heads"),
    (DIFFUSION, {"prediction": "x"}, "its prediction is x, where eps or v is due"),
    (DIFFUSION, {"grid": "[8, 2]"}, "grid is a list of 2"), (DIFFUSION, {"grid": "8"}, "grid is 8"),
    (DIFFUSION, {"grid": json.dumps([8, -2, 4])}, "grid is -2"), (DIFFUSION, {"grid": None}, "lack the grid"),
    (DIFFUSION, {"format": "video_ldm_pvdm_autoencoder"}, "The two files of Load PVDM are swapped"),
])
def test_metadata_that_contradict_the_format_are_refused(tmp_path, networks, kind, entries, words):
    path = write_own(tmp_path / "own.safetensors", kind, networks[kind])
    with safe_open(str(path), framework="pt") as opened:
        metadata = {**opened.metadata(), **entries}
    save_file(load_file(path), path, metadata={key: value for key, value in metadata.items() if value is not None})
    assert words in refused(path, kind)


def test_metadata_of_other_programs_count_for_nothing(tmp_path, networks):
    path = tmp_path / "pt.safetensors"
    save_file(published(networks[DIFFUSION]), path, metadata={"format": "pt", "heads": "4", "fps": "3"})
    found = load_pvdm(path, DIFFUSION)
    assert found.params.heads == 8 and found.fps is None


# Which file is what, and where it belongs

def test_swapped_files_are_refused_by_name(tmp_path, networks):
    for kind, other in ((AUTOENCODER, DIFFUSION), (DIFFUSION, AUTOENCODER)):
        path = write_own(tmp_path / f"{kind}.safetensors", kind, networks[kind])
        titles = {AUTOENCODER: "a PVDM autoencoder", DIFFUSION: "a PVDM diffusion model"}
        assert refused(path, other) == (
            f"{path.name} is {titles[kind]}, not {titles[other]}. The two files of Load PVDM are swapped, or one is "
            "chosen twice: choose this one for the other input.")


def test_other_loaders_send_a_pvdm_to_load_pvdm(tmp_path, networks):
    path = write_own(tmp_path / "planes.safetensors", AUTOENCODER, networks[AUTOENCODER])
    for load in (load_temporal, load_motion_lora, load_layout, load_video_model):
        with pytest.raises(VideoLDMError, match="planes.safetensors is a PVDM autoencoder, not a.* Load it with Load "
                                                "PVDM, as autoencoder.$"):
            load(path)


def test_a_file_of_another_kind_is_named_with_the_node_that_takes_it(tmp_path):
    small_files.write_layers(tmp_path)
    assert refused(tmp_path / "layers_1.safetensors", AUTOENCODER) == (
        "layers_1.safetensors is a file of Video LDM temporal layers, not a PVDM autoencoder. Load it with Load "
        "Temporal Layers.")
    for name, shapes, words in (
            ("sd.safetensors", {f"model.diffusion_model.{name}": shape for name, shape in {
                "input_blocks.0.0.weight": (8, 4, 3, 3), "output_blocks.0.0.in_layers.0.weight": (8,),
                "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": (8, 768)}.items()}
             | {"first_stage_model.decoder.conv_in.weight": (8,)},
             "is a whole Stable Diffusion 1.x checkpoint, not a PVDM diffusion model. Load it with core's Load Chec"),
            ("vae.safetensors", {"decoder.mid.block_1.norm1.weight": (8,)}, "is a VAE, not a PVDM diffusion model.")):
        save_file({key: torch.zeros(shape) for key, shape in shapes.items()}, tmp_path / name)
        assert words in refused(tmp_path / name, DIFFUSION)


def test_a_training_checkpoint_of_a_pvdm_is_no_pvdm():
    shapes = {f"model.autoencoder.{name}": shape for name, shape in PUBLISHED["pvdm_autoencoder"].items()}
    assert identify_keys(shapes, {"format": "video_ldm_training"}).kind == "training_checkpoint"


# Pairs

def test_two_files_that_do_not_belong_together_are_refused(tmp_path, networks):
    def pair(**changes):
        file = load_pvdm(tmp_path / "diffusion.safetensors", DIFFUSION)
        file.params = replace(file.params, **{key: value for key, value in changes.items() if key != "grid"})
        file.about = replace(file.about, **{key: value for key, value in changes.items() if key == "grid"})
        check_pair(load_pvdm(tmp_path / "planes.safetensors", AUTOENCODER), file)
    for name, kind in (("planes", AUTOENCODER), ("diffusion", DIFFUSION)):
        write_own(tmp_path / f"{name}.safetensors", kind, networks[kind])
    pair()
    pair(grid=None)
    for changes, words in (
            ({"channels": 8}, "diffuses planes of 8 channels, and those of planes.safetensors have 4."),
            ({"grid": PlaneShape(8, 4, 2)}, "diffuses planes of 8 frames of 4 x 2 patches, and those of planes.saf"),
            ({"grid": None, "row": 55}, "diffuses planes of 55 positions, and those of planes.safetensors have 56."),
            ({"channel_mult": (1, 2, 4)}, "diffuses planes that it can halve 2 times, and those of planes.safeten")):
        with pytest.raises(VideoLDMError, match=words) as caught:
            pair(**changes)
        assert str(caught.value).endswith("The two files belong to different models: choose the autoencoder that the "
                                          "diffusion model was trained with.")
