"""Sizes of ComfyUI's networks, as files of this pack state them in their metadata, and the reading of them.

Whoever wrote a file may have stated anything. What is read here has bounds: by what the file holds, where that is
possible, so that no network is built that is larger than its weights.
"""

from dataclasses import dataclass
from typing import Any

from ...temporal.formats.metadata import betas_of, entries_of, list_of, number, whole

START, END = 49406, 49407               # of CLIP's vocabulary; the end token also pads
VOCABULARY, LENGTH = 49408, 77
# Of networks in files: more levels, blocks and sizes than any has, so that nothing of them is built without end.
MOST_LEVELS, MOST_BLOCKS, MOST_DEPTH, LARGEST = 8, 16, 32, 20_000
MOST_WIDTH = 1280       # of text: the whole vocabulary is made, whatever the file holds of it


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
    def emb_dim(self) -> int:
        return 4 * self.model_channels

    def config(self) -> dict:
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

    def config(self) -> dict:
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

    def config(self) -> dict:
        return {"hidden_size": self.width, "intermediate_size": 4 * self.width, "num_hidden_layers": self.layers,
                "num_attention_heads": self.heads, "max_position_embeddings": LENGTH, "vocab_size": VOCABULARY,
                "eos_token_id": END, "hidden_act": "quick_gelu"}


# Sizes of a network, from a file's metadata; held: how many tensors the file holds

def read_unet_params(stored: Any, held: int) -> UNetParams:
    names = tuple(UNetParams.__dataclass_fields__)
    stored = entries_of(stored, "unet", names[:7], names[7:])
    lists = {name: sizes_in(stored[name], name, most) for name, most in
             (("channel_mult", LARGEST), ("num_res_blocks", MOST_BLOCKS), ("transformer_depth", MOST_DEPTH))}
    if len(set(map(len, lists.values()))) > 1:
        raise ValueError("channel_mult, num_res_blocks and transformer_depth are not of one length")
    if min(lists["channel_mult"]) < 1 or min(lists["num_res_blocks"]) < 1 or sum(lists["num_res_blocks"]) > held:
        raise ValueError(f"channel_mult is {lists['channel_mult']} and num_res_blocks is {lists['num_res_blocks']}")
    numbers = {name: whole(stored[name], name, 1, LARGEST)
               for name in ("latent_channels", "model_channels", "head_channels", "context_dim")}
    numbers |= {name: whole(stored.get(name, 0), name, 0, LARGEST) for name in ("concat_channels", "noise_levels")}
    attends = stored.get("self_attention", True)
    if not isinstance(attends, bool):
        raise ValueError("self_attention is neither true nor false")
    for mult, depth in zip(lists["channel_mult"], lists["transformer_depth"]):
        if depth and mult * numbers["model_channels"] % numbers["head_channels"]:
            raise ValueError(f"{mult * numbers['model_channels']} channels are no heads of {numbers['head_channels']}")
    return UNetParams(**lists, **numbers, self_attention=attends)


def read_image_params(stored: Any, held: int) -> ImageParams:
    stored = entries_of(stored, "params", tuple(ImageParams.__dataclass_fields__))
    unet = read_unet_params(stored["unet"], held)
    latent = entries_of(stored["latent"], "latent", tuple(LatentParams.__dataclass_fields__))
    channels = unet.latent_channels
    rows = list_of(latent["rgb_factors"], "rgb_factors", channels, channels)
    latent = LatentParams(number(latent["scale_factor"], "scale_factor", 0, 1e6), tuple(map(colour, rows)),
                          colour(latent["rgb_bias"]))
    if stored["prediction"] not in ("eps", "v"):
        raise ValueError("prediction is neither eps nor v")
    return ImageParams(unet, latent, *betas_of(stored, text=False), stored["prediction"])


def read_autoencoder_params(stored: Any) -> AutoencoderParams:
    stored = entries_of(stored, "params", tuple(AutoencoderParams.__dataclass_fields__))
    channels, latents = (whole(stored[name], name, 1, LARGEST) for name in ("channels", "latent_channels"))
    mult = sizes_in(stored["channel_mult"], "channel_mult", LARGEST)
    return AutoencoderParams(latents, channels, mult, whole(stored["num_res_blocks"], "num_res_blocks", 1, MOST_BLOCKS))


def read_text_params(stored: Any, held: int) -> TextParams:
    stored = entries_of(stored, "params", tuple(TextParams.__dataclass_fields__))
    width = whole(stored["width"], "width", 1, MOST_WIDTH)
    heads = whole(stored["heads"], "heads", 1, width)
    tokens = [whole(token, "a token", 0, VOCABULARY - 1) for token in list_of(stored["tokens"], "tokens", VOCABULARY)]
    if len(set(tokens)) < len(tokens) or width % heads:
        raise ValueError(f"{len(tokens)} tokens, some of them twice, or a width of {width} for {heads} heads")
    return TextParams(width, whole(stored["layers"], "layers", 1, held), heads, tuple(tokens))


def sizes_in(value: Any, what: str, most: int) -> tuple[int, ...]:
    """A size for each level."""
    if isinstance(value, tuple):        # as UpscalerParams has it
        value = list(value)
    return tuple(whole(size, what, 0, most) for size in list_of(value, what, MOST_LEVELS, 1))


def colour(value: Any) -> tuple[float, ...]:
    return tuple(number(part, "a colour", -1e6, 1e6) for part in list_of(value, "a colour", 3, 3))
