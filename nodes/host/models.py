"""ComfyUI's own network classes for given params, and the bundled demo cascade as MODEL, CLIP and VAE.

Training builds its networks here too, so that what is trained is what ComfyUI runs. A file of the cascade is
safetensors whose metadata carries everything that rebuilds its network: `format` and `params` (JSON).
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

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
from safetensors import SafetensorError, safe_open
from torch import nn

from ...temporal.errors import VideoLDMError

FORMATS = {"image": "video_ldm_demo_image", "text": "video_ldm_demo_text", "autoencoder": "video_ldm_demo_autoencoder"}
UNET_PREFIX = "model.diffusion_model."
TOKEN_ROWS = "text_model.embeddings.token_embedding.weight"
START, END = 49406, 49407               # of CLIP's vocabulary; the end token also pads
VOCABULARY, LENGTH = 49408, 77


@dataclass(frozen=True)
class UNetParams:
    """An LDM UNet. Per level: channels as multiples of `model_channels`, ResBlocks, transformer blocks after each."""
    latent_channels: int
    model_channels: int
    channel_mult: tuple[int, ...]
    num_res_blocks: tuple[int, ...]
    transformer_depth: tuple[int, ...]
    head_channels: int
    context_dim: int
    concat_channels: int = 0        # of pictures beside the latents at its input
    noise_levels: int = 0           # that it can be told, as a class; 0: it is told none
    self_attention: bool = True

    @property
    def emb_dim(self):
        return 4 * self.model_channels

    def config(self):
        """What ComfyUI's UNetModel is called with, in the words of its own model detection."""
        pairs = list(zip(self.transformer_depth, self.num_res_blocks, strict=True))
        return {
            "image_size": 32, "in_channels": self.latent_channels + self.concat_channels,
            "out_channels": self.latent_channels, "num_classes": self.noise_levels or None,
            "disable_self_attentions": [not self.self_attention] * len(self.channel_mult),
            "disable_middle_self_attn": not self.self_attention,
            "model_channels": self.model_channels, "channel_mult": list(self.channel_mult),
            "num_res_blocks": list(self.num_res_blocks),
            "transformer_depth": [depth for depth, blocks in pairs for _ in range(blocks)],
            "transformer_depth_output": [depth for depth, blocks in pairs for _ in range(blocks + 1)],
            "transformer_depth_middle": self.transformer_depth[-1], "context_dim": self.context_dim,
            "num_heads": -1, "num_head_channels": self.head_channels, "use_spatial_transformer": True,
            "use_linear_in_transformer": False, "use_checkpoint": False, "legacy": False,
            "use_temporal_attention": False, "use_temporal_resblock": False,
        }


@dataclass(frozen=True)
class LatentParams:
    """Latents of the image LDM: what they are multiplied with, and the linear map to a preview's RGB."""
    scale_factor: float
    rgb_factors: tuple[tuple[float, ...], ...]
    rgb_bias: tuple[float, ...]


@dataclass(frozen=True)
class ImageParams:
    """The image LDM: network, latents, noise schedule (ComfyUI's "linear": even in sqrt(beta)) and "eps" or "v"."""
    unet: UNetParams
    latent: LatentParams
    linear_start: float
    linear_end: float
    prediction: str


@dataclass(frozen=True)
class AutoencoderParams:
    """LDM's KL autoencoder; its factor is 2 ** (levels - 1)."""
    latent_channels: int
    channels: int
    channel_mult: tuple[int, ...]
    num_res_blocks: int

    def config(self):
        ddconfig = {"double_z": True, "z_channels": self.latent_channels, "resolution": 256, "in_channels": 3,
                    "out_ch": 3, "ch": self.channels, "ch_mult": list(self.channel_mult),
                    "num_res_blocks": self.num_res_blocks, "attn_resolutions": [], "dropout": 0.0}
        return {"ddconfig": ddconfig, "embed_dim": self.latent_channels}


@dataclass(frozen=True)
class TextParams:
    """A CLIP text model. tokens: the ids that have an embedding of their own; all others share the unknown one."""
    width: int
    layers: int
    heads: int
    tokens: tuple[int, ...]

    def config(self):
        return {"hidden_size": self.width, "intermediate_size": 4 * self.width, "num_hidden_layers": self.layers,
                "num_attention_heads": self.heads, "max_position_embeddings": LENGTH, "vocab_size": VOCABULARY,
                "eos_token_id": END, "hidden_act": "quick_gelu"}


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
    """Names and shapes of its tensors, none of which is made."""
    with torch.device("meta"):
        return {key: tuple(tensor.shape) for key, tensor in build_unet(params).state_dict().items()}


def build_autoencoder(params: AutoencoderParams) -> nn.Module:
    """ComfyUI's autoencoder with fresh weights."""
    return initialised(AutoencoderKL(**params.config()).float())


def build_text(params: TextParams) -> nn.Module:
    """ComfyUI's CLIP text model, wrapped as its CLIP wraps it, with fresh weights."""
    model = initialised(text_class(params)(device="cpu", dtype=torch.float32).clip_l)
    for table, spread in ((model.transformer.text_model.embeddings.token_embedding, 0.05),
                          (model.transformer.text_model.embeddings.position_embedding, 0.05)):
        nn.init.normal_(table.weight, std=spread)
    return model


def tokenizer(width: int):
    """ComfyUI's CLIP tokenizer, for embeddings of this width."""
    return tokenizer_class(width)()


def initialised(module: nn.Module) -> nn.Module:
    """Give every layer torch's own initial weights, which ComfyUI's classes leave out; all parameters trainable."""
    for layer in module.modules():
        for kind in (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.GroupNorm, nn.LayerNorm, nn.Embedding):
            if isinstance(layer, kind):
                kind.reset_parameters(layer)
    return module.requires_grad_(True)


# Text: ComfyUI's SD1 classes at another width

def text_class(params: TextParams):
    class DemoText(comfy.sd1_clip.SDClipModel):
        def __init__(self, device="cpu", dtype=None, model_options={}):
            super().__init__(device=device, dtype=dtype, textmodel_json_config=params.config(),
                             model_options=model_options)

    class DemoClip(comfy.sd1_clip.SD1ClipModel):
        def __init__(self, device="cpu", dtype=None, model_options={}):
            super().__init__(device=device, dtype=dtype, model_options=model_options, clip_model=DemoText)
    return DemoClip


def tokenizer_class(width: int):
    class Words(comfy.sd1_clip.SDTokenizer):
        def __init__(self, **settings):
            super().__init__(**{**settings, "embedding_size": width})

    class DemoTokenizer(comfy.sd1_clip.SD1Tokenizer):
        def __init__(self, embedding_directory=None, tokenizer_data={}):
            super().__init__(embedding_directory, tokenizer_data, tokenizer=Words)
    return DemoTokenizer


def gather_tokens(tensors: dict, params: TextParams) -> dict:
    """Of the token table (49408, d), keep the unknown row and the rows of `params.tokens`, in that order."""
    table = tensors[TOKEN_ROWS]
    rows = torch.cat([table[unknown_token(params)][None], table[list(params.tokens)]])
    return {**tensors, TOKEN_ROWS: rows}


def scatter_tokens(tensors: dict, params: TextParams) -> dict:
    """The inverse: a whole table, in which every id without a row of its own has the unknown one."""
    rows = tensors[TOKEN_ROWS]
    table = rows[:1].repeat(VOCABULARY, 1)
    table[list(params.tokens)] = rows[1:]
    return {**tensors, TOKEN_ROWS: table}


def unknown_token(params: TextParams) -> int:
    """The id whose embedding stands for all words without a row: the first that is not in use."""
    return next(i for i in range(VOCABULARY) if i not in params.tokens)


# The bundled cascade

def load_demo(folder):
    """(MODEL, CLIP, VAE) of the cascade in a folder: objects of ComfyUI's own classes."""
    folder = Path(folder)
    return (load_image_model(folder / "image.safetensors"), load_text(folder / "text.safetensors"),
            load_autoencoder(folder / "autoencoder.safetensors"))


def load_image_model(path):
    """A MODEL: ComfyUI's BaseModel and ModelPatcher, with the file's schedule and latent format."""
    tensors, stored = read_part(path, "image")
    params = image_params(stored)
    check_keys(path, {UNET_PREFIX + key for key in shapes_of_unet(params.unet)}, tensors)
    return patcher_of_model(model_config(params), tensors, UNET_PREFIX)


def patcher_of_model(config, tensors: dict, prefix: str):
    """A MODEL with these weights, in the type that ComfyUI would run them in. config: what its detection would give."""
    weight_dtype = comfy.utils.weight_dtype(tensors, prefix)
    count = comfy.utils.calculate_parameters(tensors, prefix)
    device = comfy.model_management.get_torch_device()
    dtype = comfy.model_management.unet_dtype(device, count, config.supported_inference_dtypes, weight_dtype)
    config.set_inference_dtype(dtype, comfy.model_management.unet_manual_cast(dtype, device,
                                                                              config.supported_inference_dtypes))
    offload = comfy.model_management.unet_offload_device()
    model = config.get_model(tensors, prefix, device=offload)
    model.load_model_weights(tensors, prefix)
    return comfy.model_patcher.ModelPatcher(model, load_device=device, offload_device=offload)


def model_config(params: ImageParams):
    """What ComfyUI's model detection would give for this network."""
    class DemoLatent(comfy.latent_formats.LatentFormat):
        def __init__(self):
            self.scale_factor = params.latent.scale_factor
            self.latent_channels = params.unet.latent_channels
            self.latent_rgb_factors = [list(row) for row in params.latent.rgb_factors]
            self.latent_rgb_factors_bias = list(params.latent.rgb_bias)

    class DemoModel(comfy.supported_models_base.BASE):
        latent_format = DemoLatent
        unet_extra_config = {}
        sampling_settings = {"beta_schedule": "linear", "linear_start": params.linear_start,
                             "linear_end": params.linear_end}

        def model_type(self, state_dict, prefix=""):
            kind = comfy.model_base.ModelType
            return kind.V_PREDICTION if params.prediction == "v" else kind.EPS
    return DemoModel(params.unet.config())


def load_text(path):
    """A CLIP for the stock CLIP Text Encode."""
    tensors, stored = read_part(path, "text")
    params = TextParams(stored["width"], stored["layers"], stored["heads"], tuple(stored["tokens"]))
    target = comfy.supported_models_base.ClipTarget(tokenizer_class(params.width), text_class(params))
    clip = comfy.sd.CLIP(target, embedding_directory=embedding_folders(),
                         parameters=sum(tensor.numel() for tensor in tensors.values()))
    check_keys(path, set(clip.cond_stage_model.clip_l.transformer.state_dict()), tensors)
    clip.load_sd(scatter_tokens(tensors, params))
    return clip


def embedding_folders():
    import folder_paths  # only inside a running ComfyUI is there anything to know here
    return folder_paths.get_folder_paths("embeddings")


def load_autoencoder(path):
    """A VAE."""
    tensors, stored = read_part(path, "autoencoder")
    params = AutoencoderParams(**stored)
    check_keys(path, set(AutoencoderKL(**params.config()).state_dict()), tensors)
    return vae_of(tensors, params)


def vae_of(tensors: dict, params: AutoencoderParams):
    """A VAE of ComfyUI's with these weights."""
    return comfy.sd.VAE(sd=tensors, config={"params": params.config()})


def image_params(stored: dict) -> ImageParams:
    unet, latent = stored["unet"], stored["latent"]
    return ImageParams(
        UNetParams(**{key: tuple(value) if isinstance(value, list) else value for key, value in unet.items()}),
        LatentParams(latent["scale_factor"], tuple(map(tuple, latent["rgb_factors"])), tuple(latent["rgb_bias"])),
        stored["linear_start"], stored["linear_end"], stored["prediction"])


def part_metadata(part: str, params, notes: dict) -> dict:
    """The metadata of a file of the cascade; `notes` are further entries, text to text."""
    return {"format": FORMATS[part], "params": json.dumps(asdict(params)), **{k: str(v) for k, v in notes.items()}}


def read_part(path, part: str):
    """(tensors, params as a dict) of a file of the cascade, or a sentence about what is wrong with it."""
    path = Path(path)
    if not path.is_file():
        raise VideoLDMError(f"The demo file {path.name} is missing in '{path.parent}'. Install the pack again, or "
                            "train the demo models with: python run.py train-demo")
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError) as error:
        raise VideoLDMError(f"The demo file '{path}' is damaged ({error}). Install the pack again.") from error
    if metadata.get("format") != FORMATS[part]:
        raise VideoLDMError(f"'{path}' is not the demo's {part} model. Install the pack again.")
    return tensors, json.loads(metadata["params"])


def check_keys(path, expected: set, tensors: dict):
    """Refuse a file that does not hold exactly the network its metadata tells."""
    for key in sorted(expected ^ tensors.keys()):
        fault = "lacks" if key in expected else "has the unknown tensor"
        raise VideoLDMError(f"The demo file '{path}' {fault} '{key}'. Install the pack again.")
