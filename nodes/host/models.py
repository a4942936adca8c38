"""Builds ComfyUI's own networks from params, and loads the bundled demo cascade as MODEL, CLIP and VAE.

Training builds its networks here too, so the trained network is the one that ComfyUI runs. A file of the cascade is
safetensors. Its metadata has all that is needed to build its network: `format` and `params` (JSON).
"""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import comfy.latent_formats
import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.sd
import comfy.sd1_clip
import comfy.supported_models_base
import comfy.utils
import torch
from comfy.ldm.models.autoencoder import AutoencoderKL
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from torch import nn

from ...temporal.errors import VideoLDMError
from ...temporal.formats.contents import fault_of, first_line
from ...temporal.formats.files import open_contents
from ...temporal.formats.metadata import parsed_json
from ...temporal.formats.temporal_file import require_one_dtype
from . import notes
from .network_params import (  # noqa: F401  re-exported: a caller builds a network from its params
    END,
    START,
    VOCABULARY,
    AutoencoderParams,
    ImageParams,
    LatentParams,
    TextParams,
    UNetParams,
    read_autoencoder_params,
    read_image_params,
    read_text_params,
)
from .sockets import Clip, Model, Vae

FORMATS = {"image": "video_ldm_demo_image", "text": "video_ldm_demo_text", "autoencoder": "video_ldm_demo_autoencoder"}
UNET_PREFIX = "model.diffusion_model."
TOKEN_ROWS = "text_model.embeddings.token_embedding.weight"


# Networks to train

def build_unet(params: UNetParams) -> nn.Module:
    """ComfyUI's UNet with fresh weights, as LDM starts one: the last convolution of each residual branch is zero."""
    unet = initialised(UNetModel(**params.config(), dtype=torch.float32, operations=comfy.ops.disable_weight_init))
    for module in unet.modules():
        for last in (getattr(module, "proj_out", None), *list(getattr(module, "out_layers", []))[-1:]):
            if last is not None:
                nn.init.zeros_(last.weight)
                nn.init.zeros_(last.bias)
    nn.init.zeros_(unet.out[2].weight)
    nn.init.zeros_(unet.out[2].bias)
    return unet


def shapes_of_unet(params: UNetParams) -> dict[str, tuple]:
    """Names and shapes of the UNet's tensors. No tensor is made."""
    with torch.device("meta"):
        return {key: tuple(tensor.shape) for key, tensor in build_unet(params).state_dict().items()}


def build_autoencoder(params: AutoencoderParams) -> nn.Module:
    """ComfyUI's autoencoder with fresh weights."""
    return initialised(AutoencoderKL(**params.config()).float())


def build_text(params: TextParams) -> nn.Module:
    """ComfyUI's CLIP text model, in the wrapper that its CLIP uses, with fresh weights."""
    model = initialised(text_class(params)(device="cpu", dtype=torch.float32).clip_l)
    for table, spread in ((model.transformer.text_model.embeddings.token_embedding, 0.05),
                          (model.transformer.text_model.embeddings.position_embedding, 0.05)):
        nn.init.normal_(table.weight, std=spread)
    return model


def tokenizer(width: int) -> Any:
    """ComfyUI's CLIP tokenizer, for embeddings of this width."""
    return tokenizer_class(width)()


def initialised(module: nn.Module) -> nn.Module:
    """The module with PyTorch's initial weights, all trainable. ComfyUI's classes leave their weights uninitialised."""
    for layer in module.modules():
        for kind in (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.GroupNorm, nn.LayerNorm, nn.Embedding):
            if isinstance(layer, kind):
                kind.reset_parameters(layer)
    return module.requires_grad_(True)


# Text: ComfyUI's SD1 classes at another width

def text_class(params: TextParams) -> type:
    class DemoText(comfy.sd1_clip.SDClipModel):
        def __init__(self, device: Any = "cpu", dtype: torch.dtype | None = None,
                     model_options: dict | None = None) -> None:
            super().__init__(device=device, dtype=dtype, textmodel_json_config=params.config(),
                             model_options=model_options or {})

    class DemoClip(comfy.sd1_clip.SD1ClipModel):
        def __init__(self, device: Any = "cpu", dtype: torch.dtype | None = None,
                     model_options: dict | None = None) -> None:
            super().__init__(device=device, dtype=dtype, model_options=model_options or {}, clip_model=DemoText)
    return DemoClip


def tokenizer_class(width: int, known: tuple[int, ...] = ()) -> type:
    """known: the tokens that the text encoder knows, to warn of others; none: it does not warn."""
    class Words(comfy.sd1_clip.SDTokenizer):
        def __init__(self, **settings: Any) -> None:
            super().__init__(**{**settings, "embedding_size": width})

    class DemoTokenizer(comfy.sd1_clip.SD1Tokenizer):
        def __init__(self, embedding_directory: Any = None, tokenizer_data: dict | None = None) -> None:
            super().__init__(embedding_directory, tokenizer_data or {}, tokenizer=Words)

        def tokenize_with_weights(self, text: str, return_word_ids: bool = False, **settings: Any) -> dict:
            tokens = super().tokenize_with_weights(text, return_word_ids, **settings)
            words = getattr(self, self.clip)
            unknown = unknown_words(text, words, known) if known else []
            if unknown:
                notes.warn(f"The demo does not know {', '.join(unknown)}. It knows roads with cars, by these words: "
                           f"{', '.join(known_words(words, known))}.")
            return tokens
    return DemoTokenizer


def unknown_words(text: str, words: Any, known: tuple[int, ...]) -> list[str]:
    """The words of a text that have a token outside `known`, in their order. words: core's tokenizer."""
    found: dict[str, None] = {}
    for word in re.findall(r"[^\W\d_]+", text.lower()):
        if not set(words.tokenizer(word)["input_ids"]) <= {*known, START, END}:
            found[word] = None
    return list(found)


def known_words(words: Any, known: tuple[int, ...]) -> list[str]:
    """The words of the tokens, sorted. words: core's tokenizer."""
    found = (words.inv_vocab[token].removesuffix("</w>") for token in known)
    return sorted(word for word in found if word.isalpha())


def gather_tokens(tensors: dict, params: TextParams) -> dict:
    """Cut the token table (49408, d) to the unknown row and the rows of `params.tokens`, in that order."""
    table = tensors[TOKEN_ROWS]
    rows = torch.cat([table[unknown_token(params)][None], table[list(params.tokens)]])
    return {**tensors, TOKEN_ROWS: rows}


def scatter_tokens(tensors: dict, params: TextParams) -> dict:
    """The inverse of gather_tokens: a whole table. Every id without a row of its own gets the unknown row."""
    rows = tensors[TOKEN_ROWS]
    table = rows[:1].repeat(VOCABULARY, 1)
    table[list(params.tokens)] = rows[1:]
    return {**tensors, TOKEN_ROWS: table}


def unknown_token(params: TextParams) -> int:
    """The id whose embedding stands for all unknown words: the first id that is not in `params.tokens`."""
    return next(i for i in range(VOCABULARY) if i not in params.tokens)


# The bundled cascade

def load_demo(folder: str | Path) -> tuple[Model, Clip, Vae]:
    """(MODEL, CLIP, VAE) of the cascade in a folder. They are objects of ComfyUI's own classes."""
    folder = Path(folder)
    return (load_image_model(folder / "image.safetensors"), load_text(folder / "text.safetensors"),
            load_autoencoder(folder / "autoencoder.safetensors"))


def load_image_model(path: str | Path) -> Model:
    """The MODEL of a file: ComfyUI's BaseModel and ModelPatcher, with the file's schedule and latent format."""
    tensors, stored = read_part(path, "image")
    with sizes_of(path):
        params = read_image_params(stored, len(tensors))
        wanted = {UNET_PREFIX + key: shape for key, shape in shapes_of_unet(params.unet).items()}
    check_tensors(path, wanted, tensors)
    config = model_config(params)
    config.trained_size = trained_size(path)
    return patcher_of_model(config, tensors, UNET_PREFIX)


def trained_size(path: str | Path) -> tuple[int, int] | None:
    """Width and height of the pictures that a file of the cascade was trained on. None if it does not say them."""
    found = re.fullmatch(r"(\d{1,5})x(\d{1,5})", open_contents(path).metadata.get("size", ""))
    return (int(found[1]), int(found[2])) if found else None


def patcher_of_model(config: Any, tensors: dict, prefix: str) -> Model:
    """A MODEL with these weights, in the dtype that ComfyUI would choose.

    Args:
        config: as ComfyUI's model detection makes it.
        tensors: the weights of exactly this network. They are taken out of the dictionary one by one and become the
            network's own where they have the right dtype, so that memory holds no second copy.
        prefix: of the names in `tensors`.
    """
    weight_dtype = comfy.utils.weight_dtype(tensors, prefix)
    count = comfy.utils.calculate_parameters(tensors, prefix)
    device = comfy.model_management.get_torch_device()
    dtype = comfy.model_management.unet_dtype(device, count, config.supported_inference_dtypes, weight_dtype)
    config.set_inference_dtype(dtype, comfy.model_management.unet_manual_cast(dtype, device,
                                                                              config.supported_inference_dtypes))
    offload = comfy.model_management.unet_offload_device()
    model = config.get_model(tensors, prefix, device=torch.device("meta"))
    give_weights(model.diffusion_model, tensors, prefix, dtype, offload)
    model.device = offload
    return comfy.model_patcher.ModelPatcher(model, load_device=device, offload_device=offload)


def latent_format_of(params: LatentParams) -> type:
    """The class of ComfyUI's latent formats for these latents."""
    class Latents(comfy.latent_formats.LatentFormat):
        def __init__(self) -> None:
            self.scale_factor = params.scale_factor
            self.latent_channels = len(params.rgb_factors)
            self.latent_rgb_factors = [list(row) for row in params.rgb_factors]
            self.latent_rgb_factors_bias = list(params.rgb_bias)
    return Latents


def give_weights(network: nn.Module, tensors: dict, prefix: str, dtype: torch.dtype, device: Any) -> None:
    """Replace a network's weights on the "meta" device by these tensors. ComfyUI's UNet has no other state.

    Args:
        network: the network.
        tensors, prefix: as in patcher_of_model.
        dtype: of weights that ComfyUI makes when they are loaded.
        device: of the weights.
    """
    shells = dict(network.state_dict(keep_vars=True))
    weights = {}
    for key in list(tensors):
        name = key.removeprefix(prefix)
        shell = shells.get(name)
        value = tensors.pop(key).to(device, dtype if shell is None else shell.dtype)
        # With an option of ComfyUI's the weights of convolutions have another order in memory.
        weights[name] = value if shell is None or shell.stride() == value.stride() else \
            torch.empty_like(shell, device=device).copy_(value)
        del value
    network.load_state_dict(weights, assign=True)


def model_config(params: ImageParams) -> Any:
    """The config object that ComfyUI's model detection would make for this network."""
    class DemoModel(comfy.supported_models_base.BASE):
        latent_format = latent_format_of(params.latent)
        unet_extra_config: dict = {}
        sampling_settings = {"beta_schedule": "linear", "linear_start": params.linear_start,
                             "linear_end": params.linear_end}

        def model_type(self, state_dict: dict, prefix: str = "") -> Any:
            kind = comfy.model_base.ModelType
            return kind.V_PREDICTION if params.prediction == "v" else kind.EPS
    return DemoModel(params.unet.config())


def load_text(path: str | Path) -> Clip:
    """The CLIP of a file, for core's CLIP Text Encode."""
    tensors, stored = read_part(path, "text")
    with sizes_of(path):
        params = read_text_params(stored, len(tensors))
        network = text_class(params)(device="meta", dtype=torch.float32).clip_l.transformer
        wanted = {key: tuple(tensor.shape) for key, tensor in network.state_dict().items()}
    check_tensors(path, wanted | {TOKEN_ROWS: (1 + len(params.tokens), params.width)}, tensors)
    target = comfy.supported_models_base.ClipTarget(tokenizer_class(params.width, params.tokens), text_class(params))
    clip = comfy.sd.CLIP(target, embedding_directory=embedding_folders(),
                         parameters=sum(tensor.numel() for tensor in tensors.values()))
    clip.load_sd(scatter_tokens(tensors, params))
    return clip


def embedding_folders() -> list[str]:
    import folder_paths  # here, because benchmarks import this file outside of ComfyUI
    return folder_paths.get_folder_paths("embeddings")


def load_autoencoder(path: str | Path) -> Vae:
    """The VAE of a file."""
    tensors, stored = read_part(path, "autoencoder")
    with sizes_of(path):
        params = read_autoencoder_params(stored)
        with torch.device("meta"):
            network = AutoencoderKL(**params.config())
        wanted = {key: tuple(tensor.shape) for key, tensor in network.state_dict().items()}
    check_tensors(path, wanted, tensors)
    return vae_of(tensors, params)


def vae_of(tensors: dict, params: AutoencoderParams) -> Vae:
    """A VAE of ComfyUI's with these weights."""
    return comfy.sd.VAE(sd=tensors, config={"params": params.config()})


def part_metadata(part: str, params: Any, notes: dict) -> dict:
    """The metadata of a file of the cascade. notes: further entries."""
    return {"format": FORMATS[part], "params": json.dumps(asdict(params)), **{k: str(v) for k, v in notes.items()}}


def read_part(path: str | Path, part: str) -> tuple[dict, Any]:
    """(tensors, params as a dict) of a file of the cascade. Raises if the file is missing or damaged."""
    path = Path(path)
    if not path.is_file():
        raise VideoLDMError(f"The demo file {path.name} is missing in '{path.parent}'. Install the pack again, or "
                            "train the demo models with: python run.py train-demo")
    try:
        contents = open_contents(path)
        if contents.metadata.get("format") != FORMATS[part]:
            raise VideoLDMError(f"'{path}' is not the demo's {part} model. Install the pack again.")
        tensors, stored = contents.read_all(), parsed_json(contents.metadata.get("params", ""), "params")
    except ValueError as error:
        if "Install the pack again" in str(error):
            raise
        raise damaged(path, fault_of(error)) from None
    require_one_dtype(path.name, tensors)
    return tensors, stored


def damaged(path: str | Path, fault: str) -> VideoLDMError:
    return VideoLDMError(f"The demo file '{path}' is damaged ({fault}). Install the pack again.")


@contextmanager
def sizes_of(path: str | Path) -> Iterator[None]:
    """While open, errors about impossible sizes become one sentence about the file."""
    try:
        yield
    except (TypeError, ValueError, RuntimeError, AssertionError, IndexError, ArithmeticError) as error:
        raise damaged(path, f"no network has its sizes: {first_line(error)}") from None


def check_tensors(path: str | Path, wanted: dict[str, tuple], tensors: dict) -> None:
    """Refuse a file that does not hold exactly the tensors of the network in its metadata."""
    for key in sorted(wanted.keys() ^ tensors.keys()):
        fault = "lacks" if key in wanted else "has the unknown tensor"
        raise VideoLDMError(f"The demo file '{path}' {fault} '{key}'. Install the pack again.")
    for key, shape in wanted.items():
        if tuple(tensors[key].shape) != shape:
            raise damaged(path, f"'{key}' has shape {list(tensors[key].shape)} where {list(shape)} is due")
