"""Metadata and weights that cannot be: each file is refused with one short sentence that names the place."""

import json

import pytest
import torch
from safetensors.torch import load_file

from video_ldm.temporal.families import load_temporal
from video_ldm.temporal.formats import metadata
from video_ldm.tests import loader_help
from video_ldm.tests.formats_help import saved
from video_ldm.tests.loader_help import IMAGE, KEY, NAMES, TEXT, VAE, refused, rewritten

files, tensors = loader_help.files, loader_help.tensors       # fixtures
SAFE = [name for name in NAMES if name.endswith(".safetensors")]


# Numbers that are not finite

@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", SAFE)
def test_nan_and_infinity_are_refused_by_the_name_of_the_first_tensor_with_them(files, tmp_path, name, value):
    key = sorted(load_file(files[name].path))[-1]

    def change(content, _):
        content[key].view(-1)[-1] = value
    sentence = refused(files[name].load, rewritten(files[name], tmp_path, change))
    assert f"the tensor {key} holds NaN or infinity" in sentence and name in sentence


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn,
                                   torch.float8_e5m2])
@pytest.mark.parametrize("name", ["motion.safetensors", "motion.ckpt"])
def test_nan_is_found_in_weights_of_every_type(tensors, tmp_path, dtype, name):
    stored = {key: tensor.to(dtype) for key, tensor in tensors.items()}
    loaded = load_temporal(saved(tmp_path, name, stored))
    assert loaded.dtype == dtype
    stored[KEY] = tensors[KEY].clone().index_fill_(0, torch.tensor(3), float("nan")).to(dtype)
    assert f"the tensor {KEY} holds NaN or infinity" in refused(load_temporal, saved(tmp_path, name, stored))


def test_large_finite_numbers_whose_sum_is_infinite_are_taken(tensors, tmp_path):
    stored = {**tensors, KEY: torch.full_like(tensors[KEY], 3e38)}
    loaded = load_temporal(saved(tmp_path, "large.safetensors", stored))
    assert loaded.tensors["layers.middle_0_post_attn_0.temporal_transformer.proj_in.weight"].max() == torch.tensor(3e38)


# Metadata

LAYERS, UPSCALER = "layers_2.safetensors", "upscaler.safetensors"
DECODER, SCENE = "decoder.safetensors", "scene.safetensors"
TRAINING = "last.safetensors"
DEEP = "[" * 1000 + "]" * 1000
ENTRIES = [
    *((LAYERS, entry, value, entry) for entry in ("linear_start", "linear_end")
      for value in ("-0.1", "0", "1", "1.5", "nan", "inf", "1e999", "\u0661")),
    (LAYERS, "linear_start", "0.5", "linear_start is 0.5 and linear_end is 0.012"),
    *((LAYERS, "fps", value, f"fps is {value}") for value in ("nan", "inf", "-8", "0", "1e30")),
    *((LAYERS, "frames", value, f"frames is {value}") for value in ("1.5", "-3", "1" + "0" * 30, "true", "\u0666")),
    (LAYERS, "layers", "1000000000", "layers is 1000000000"), (LAYERS, "positions", "-1", "positions is -1"),
    (LAYERS, "mix_length", "-1", "mix_length is -1"), (LAYERS, "base_context_dim", "-48", "base_context_dim is -48"),
    (LAYERS, "heads", DEEP, "heads is"), (LAYERS, "heads", "[1]", "heads is [1], where a dictionary"),
    *((LAYERS, "heads", f'{{"input_blocks.1.1": {value}}}', "heads of input_blocks.1.1 is")
      for value in ("true", "0", "-2", "1.5", "1e999", "[2]", "null", '"2"', "1" + "0" * 30)),
    *((LAYERS, "context_positions", value, "no list of lists") for value in (
        DEEP, "[[1e999]]", "[[true]]", "[[8]]", "[[-9]]", "[[1000000000]]", '{"a": 1}', "[1]", "7", '["12"]')),
    (LAYERS, "family", "x" * 20_000, "family is"), (LAYERS, "version", "9" * 5000, "version 999"),
    *((DECODER, "fps", value, f"fps is {value}") for value in ("nan", "inf", "-1")),
    *((DECODER, "frames", value, f"frames is {value}") for value in ("1.5", "0", "1" + "0" * 30)),
    *((UPSCALER, "unet", value, "unet is") for value in (DEEP, "[1]", "7", "")),
    *((UPSCALER, entry, value, entry) for entry in ("augmentation_start", "linear_end", "details")
      for value in ("-0.1", "nan", "1e999")),
    (UPSCALER, "most_noise", "1e999", "most_noise is 1e999"),
    *((SCENE, "params", value, "params is") for value in (DEEP, "[]", "null", "{")),
    (SCENE, "base_context_dim", "-1", "base_context_dim is -1"),
    *((part, "params", value, "params is") for part in (TEXT, IMAGE, VAE) for value in (DEEP, "[]", "7", "")),
    (TRAINING, "state", DEEP, "its state is"), (TRAINING, "state", "[]", "its state is"),
    (TRAINING, "state", "{}", "its state lacks step, seconds, settings"),
]
VALUES = [      # of one place within an entry of JSON
    *((UPSCALER, "unet", name, value, name) for name in ("model_channels", "head_channels", "latent_channels")
      for value in (-1, 0, 10 ** 9, True, 1.5, "32", None, [32])),
    *((UPSCALER, "unet", name, value, name) for name in ("channel_mult", "num_res_blocks", "transformer_depth")
      for value in ([10 ** 9, 1], [1] * 10 ** 5, [-1, 1], [1.5, 1], [[1], 1], 3, [], {"a": 1})),
    (UPSCALER, "unet", "num_res_blocks", [1], "not of one length"), (UPSCALER, "unet", "more", 1, "unknown entry more"),
    (UPSCALER, "unet", "self_attention", 1, "self_attention"),
    *((SCENE, "params", name, value, name) for name in ("layers", "width", "heads", "frequencies")
      for value in (-1, 10 ** 9, True, 2.5, "3", None)),
    (SCENE, "params", "heads", 3, "16 does not divide into 3 heads"),
    (SCENE, "params", "sites", [[0, 32]] * 10 ** 5, "sites"),
    *((SCENE, "params", "sites", value, "site") for value in ([[0]], [[0, 32], [0, 32]], 7, [["a", 32]])),
    *((SCENE, "params", "labels", value, "label") for value in ([["light", 7]], [[1, ["day"]]], [["light"]], {})),
    *((SCENE, "params", "colours", value, "colours") for value in ([1, 2], "red", None)),
    *((TEXT, "params", name, value, name) for name in ("width", "layers", "heads")
      for value in (-1, 0, 10 ** 9, True, 1.5, "2", None)),
    *((TEXT, "params", "tokens", value, "token") for value in (
        [5, 7, 49406, 49408], [-1, 5, 7, 9], [5, 5, 7, 9], [1e999, 5, 7, 9], list(range(49409)), 7, None,
        [True, 5, 7, 9])),
    *((IMAGE, "params", name, value, name) for name in ("linear_start", "linear_end")
      for value in (-0.1, 0, 1, float("nan"), float("inf"), True, None, [1])),
    (IMAGE, "params", "prediction", "x", "prediction"), (IMAGE, "params", "latent", {}, "latent lacks"),
    (IMAGE, "params", "unet", [], "unet is"),
    *((VAE, "params", "channel_mult", value, "channel_mult") for value in ([10 ** 9], [1] * 10 ** 5, [], 7, [-1, 1])),
    *((VAE, "params", "channels", value, "channels") for value in (-32, 0, 10 ** 9, True, "32")),
    *((TRAINING, "state", "step", value, "its step is") for value in (-1, 1.5, True, None, "7", 10 ** 30)),
    *((TRAINING, "state", "seconds", value, "seconds is") for value in (float("nan"), None, [])),
    (TRAINING, "state", "settings", [], "its settings is"),
]


@pytest.mark.parametrize("name, entry, value, words", ENTRIES)
def test_an_impossible_entry_of_the_metadata_is_refused_by_its_name(files, tmp_path, name, entry, value, words):
    def change(_, header):
        header[entry] = value
    assert words in refused(files[name].load, rewritten(files[name], tmp_path, change))


@pytest.mark.parametrize("name, entry, place, value, words", VALUES)
def test_an_impossible_value_within_an_entry_is_refused_by_its_name(files, tmp_path, name, entry, place, value,
                                                                           words):
    def change(_, header):
        header[entry] = json.dumps({**json.loads(header[entry]), place: value})
    assert words in refused(files[name].load, rewritten(files[name], tmp_path, change))


def test_json_that_is_too_deep_or_too_long_is_refused():
    assert metadata.parsed_json('{"a": [[1, 2.5, "x", null]]}', "it") == {"a": [[1, 2.5, "x", None]]}
    assert metadata.parsed_json("[" * 8 + "]" * 8, "it") == [[[[[[[[]]]]]]]]
    for text, words in (("[" * 9 + "]" * 9, "it is nested more than 8 deep"), (DEEP * 300, "is nested|no.* JSON"),
                        (f'"{"x" * 1_000_001}"', "it is 1000003 characters long"), ("{", "is not JSON")):
        with pytest.raises(metadata.MetadataError, match=words):
            metadata.parsed_json(text, "it")


def test_only_numbers_in_plain_digits_and_within_their_bounds_are_read():
    assert [metadata.whole(value, "it", -5, 20, text=True) for value in ("16", "-5", "+7")] == [16, -5, 7]
    assert metadata.whole(16, "it", -5, 20) == 16 and metadata.number(0.5, "it", 0, 1) == 0.5
    assert [metadata.number(value, "it", 0, 1, text=True) for value in ("0.5", "5e-1")] == [0.5] * 2
    assert metadata.betas_of({"linear_start": "0.00085", "linear_end": "0.012"}) == (0.00085, 0.012)
    assert metadata.fps_of({"fps": "23.976"}) == 23.976 and metadata.fps_of({}) is None
    for value, text in ((True, False), (1.0, False), ("1.0", True), ("", True), (" 1", True), (None, False),
                        (21, False), ("21", True), ("\uff11", True), (10 ** 5000, False), ([1], False), ("7", False)):
        with pytest.raises(metadata.MetadataError, match="^it is .*a whole number from -5 to 20 is due$"):
            metadata.whole(value, "it", -5, 20, text)
    for value, text in ((True, False), ("", True), ("x", True), (0, False), (1, False), ("nan", True), ("0.5", False),
                        (float("inf"), False), (None, False), (10 ** 400, False), ("\uff11", True), ([0.5], False)):
        with pytest.raises(metadata.MetadataError, match="^it is .*a number between 0 and 1 is due$"):
            metadata.number(value, "it", 0, 1, text)
