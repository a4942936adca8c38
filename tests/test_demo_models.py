"""Files of the demo cascade become ComfyUI's own objects, and a wrong file becomes a sentence."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from video_ldm.demo import bundle
from video_ldm.demo import models as sizes
from video_ldm.demo.text import encode_ids, text_params, token_ids
from video_ldm.nodes.host import models
from video_ldm.temporal.errors import VideoLDMError

UNET = models.UNetParams(4, 32, (1, 2), (1, 1), (1, 1), 32, 128)
LATENT = models.LatentParams(0.5, ((0.1, 0.2, 0.3),) * 4, (0.0, 0.1, 0.2))
AUTOENCODER = models.AutoencoderParams(4, 32, (1, 1, 1, 1), 1)


@pytest.fixture(scope="module")
def cascade(tmp_path_factory):
    """A folder with a cascade of random weights, and its networks."""
    folder = tmp_path_factory.mktemp("cascade")
    torch.manual_seed(0)
    params, image = text_params(), models.ImageParams(UNET, LATENT, 0.0015, 0.0195, "v")
    text, unet, autoencoder = models.build_text(params), models.build_unet(UNET), models.build_autoencoder(AUTOENCODER)
    tokens = models.gather_tokens(text.transformer.state_dict(), params)
    bundle.write_part(folder, "text", tokens, params)
    bundle.write_part(folder, "image", {models.UNET_PREFIX + k: v for k, v in unet.state_dict().items()}, image)
    bundle.write_part(folder, "autoencoder", autoencoder.state_dict(), AUTOENCODER)
    return folder, text, unet


def test_the_cascade_loads_as_model_clip_and_vae(cascade):
    folder, text, unet = cascade
    model, clip, vae = models.load_demo(folder)
    loaded = model.model.diffusion_model.state_dict()
    assert all(torch.allclose(loaded[key].float(), value, atol=1e-3) for key, value in unet.state_dict().items())
    assert model.model.latent_format.scale_factor == LATENT.scale_factor
    assert model.model.latent_format.latent_rgb_factors == [list(row) for row in LATENT.rgb_factors]
    sampling = model.get_model_object("model_sampling")
    betas = torch.linspace(0.0015 ** 0.5, 0.0195 ** 0.5, 1000, dtype=torch.float64) ** 2
    last = torch.cumprod(1 - betas, 0)[-1]
    assert float(sampling.sigma_max) == pytest.approx(float(((1 - last) / last).sqrt()), rel=1e-4)
    assert vae.decode(torch.zeros(1, 4, 4, 8)).shape == (1, 32, 64, 3)


def test_the_stock_text_encoding_is_what_training_saw(cascade):
    folder, text, _ = cascade
    clip = models.load_text(folder / "text.safetensors")
    caption = "a busy road by day, driving fast, turning left, a red car and a blue car"
    ids = token_ids([caption], models.tokenizer(sizes.TEXT_WIDTH))
    with torch.no_grad():
        expected, _ = encode_ids(text, ids)
    assert torch.allclose(clip.encode_from_tokens(clip.tokenize(caption)), expected, atol=2e-2)


def test_words_without_a_row_of_their_own_share_the_unknown_one(cascade):
    folder, text, _ = cascade
    params = text_params()
    whole = models.scatter_tokens(load_file(folder / "text.safetensors"), params)[models.TOKEN_ROWS]
    assert whole.shape == (models.VOCABULARY, params.width)
    trained = text.transformer.state_dict()[models.TOKEN_ROWS]
    known = list(params.tokens)
    assert torch.allclose(whole[known].float(), trained[known], atol=1e-3)
    others = [token for token in range(500) if token not in params.tokens]
    assert (whole[others] == whole[others[0]]).all()


@pytest.mark.parametrize("part", ["image", "text", "autoencoder"])
def test_a_missing_damaged_or_wrong_file_is_named_in_a_sentence(cascade, tmp_path, part):
    folder, _, _ = cascade
    load = {"image": models.load_image_model, "text": models.load_text, "autoencoder": models.load_autoencoder}[part]
    with pytest.raises(VideoLDMError, match=f"{part}.safetensors is missing"):
        load(tmp_path / f"{part}.safetensors")
    cut = tmp_path / f"cut_{part}.safetensors"
    cut.write_bytes((folder / f"{part}.safetensors").read_bytes()[:-100])
    with pytest.raises(VideoLDMError, match="is damaged"):
        load(cut)
    other = "text" if part == "image" else "image"
    with pytest.raises(VideoLDMError, match=f"is not the demo's {part} model"):
        load(folder / f"{other}.safetensors")


def test_a_file_that_lacks_a_tensor_is_refused(cascade, tmp_path):
    folder, _, _ = cascade
    tensors = load_file(folder / "autoencoder.safetensors")
    del tensors["quant_conv.bias"]
    path = tmp_path / "autoencoder.safetensors"
    stored = {"latent_channels": 4, "channels": 32, "channel_mult": [1, 1, 1, 1], "num_res_blocks": 1}
    save_file(tensors, path, metadata={"format": models.FORMATS["autoencoder"], "params": json.dumps(stored)})
    with pytest.raises(VideoLDMError, match="lacks 'quant_conv.bias'"):
        models.load_autoencoder(path)
