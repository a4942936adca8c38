"""Sizes of ComfyUI's networks, and how they are read from the metadata of this pack's files.

A file may state any size. So every size is checked against bounds, and where possible against the number of tensors in
the file: no network is built that is larger than its weights.
"""

from dataclasses import dataclass
from typing import Any

from ...temporal.formats.latents import LatentParams, read_latents
from ...temporal.formats.metadata import betas_of, entries_of, list_of, whole

START, END = 49406, 49407               # tokens of CLIP's vocabulary; the end token is also the padding
VOCABULARY, LENGTH = 49408, 77          # tokens in CLIP's vocabulary, and in a text
# Bounds for networks in files, above those of any known network.
MOST_LEVELS, MOST_BLOCKS, MOST_DEPTH, LARGEST = 8, 16, 32, 20_000
MOST_WIDTH = 1280       # of a text model: its whole token table is built, however few rows the file has


@dataclass(frozen=True)
class UNetParams:
    """An LDM UNet. The names are those of LDM's config."""
    latent_channels: int
    model_channels: int
    channel_mult: tuple[int, ...]       # for each level: channels as a multiple of `model_channels`
    num_res_blocks: tuple[int, ...]     # for each level: ResBlocks
    transformer_depth: tuple[int, ...]  # for each level: transformer blocks after each ResBlock
    head_channels: int                  # channels of one attention head
    context_dim: int                    # width of the text
    concat_channels: int = 0            # channels of pictures that are concatenated to the latents
    noise_levels: int = 0               # classes for the noise level of those pictures; 0: no class embedding
    self_attention: bool = True

    @property
    def emb_dim(self) -> int:
        return 4 * self.model_channels

    def config(self) -> dict:
        """The arguments of ComfyUI's UNetModel, as its model detection makes them."""
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
class ImageParams:
    """The image LDM."""
    unet: UNetParams
    latent: LatentParams
    linear_start: float     # first beta of ComfyUI's "linear" schedule, which is linear in sqrt(beta)
    linear_end: float       # last beta
    prediction: str         # "eps" or "v"


@dataclass(frozen=True)
class AutoencoderParams:
    """LDM's KL autoencoder. A latent stands for 2 ** (levels - 1) pixels along each side."""
    latent_channels: int
    channels: int
    channel_mult: tuple[int, ...]       # for each level: channels as a multiple of `channels`
    num_res_blocks: int                 # of each level

    def config(self) -> dict:
        ddconfig = {"double_z": True, "z_channels": self.latent_channels, "resolution": 256, "in_channels": 3,
                    "out_ch": 3, "ch": self.channels, "ch_mult": list(self.channel_mult),
                    "num_res_blocks": self.num_res_blocks, "attn_resolutions": [], "dropout": 0.0}
        return {"ddconfig": ddconfig, "embed_dim": self.latent_channels}


@dataclass(frozen=True)
class TextParams:
    """A CLIP text model."""
    width: int
    layers: int
    heads: int
    tokens: tuple[int, ...]     # ids with an embedding of their own; all other ids share one

    def config(self) -> dict:
        return {"hidden_size": self.width, "intermediate_size": 4 * self.width, "num_hidden_layers": self.layers,
                "num_attention_heads": self.heads, "max_position_embeddings": LENGTH, "vocab_size": VOCABULARY,
                "eos_token_id": END, "hidden_act": "quick_gelu"}


# Reading sizes from a file's metadata. held: how many tensors the file has.

def read_unet_params(stored: Any, held: int) -> UNetParams:
    names = tuple(UNetParams.__dataclass_fields__)
    stored = entries_of(stored, "unet", names[:7], names[7:])
    params = UNetParams(
        latent_channels=whole(stored["latent_channels"], "latent_channels", 1, LARGEST),
        model_channels=whole(stored["model_channels"], "model_channels", 1, LARGEST),
        channel_mult=sizes_in(stored["channel_mult"], "channel_mult", LARGEST),
        num_res_blocks=sizes_in(stored["num_res_blocks"], "num_res_blocks", MOST_BLOCKS),
        transformer_depth=sizes_in(stored["transformer_depth"], "transformer_depth", MOST_DEPTH),
        head_channels=whole(stored["head_channels"], "head_channels", 1, LARGEST),
        context_dim=whole(stored["context_dim"], "context_dim", 1, LARGEST),
        concat_channels=whole(stored.get("concat_channels", 0), "concat_channels", 0, LARGEST),
        noise_levels=whole(stored.get("noise_levels", 0), "noise_levels", 0, LARGEST),
        self_attention=stored.get("self_attention", True),
    )
    mult, blocks, depths = params.channel_mult, params.num_res_blocks, params.transformer_depth
    if not len(mult) == len(blocks) == len(depths):
        raise ValueError("channel_mult, num_res_blocks and transformer_depth are not of one length")
    if min(mult) < 1 or min(blocks) < 1 or sum(blocks) > held:
        raise ValueError(f"channel_mult is {mult} and num_res_blocks is {blocks}")
    if not isinstance(params.self_attention, bool):
        raise ValueError("self_attention is neither true nor false")
    for channels in (factor * params.model_channels for factor, depth in zip(mult, depths) if depth):
        if channels % params.head_channels:
            raise ValueError(f"{channels} channels are no heads of {params.head_channels}")
    return params


def read_image_params(stored: Any, held: int) -> ImageParams:
    stored = entries_of(stored, "params", tuple(ImageParams.__dataclass_fields__))
    unet = read_unet_params(stored["unet"], held)
    latent = read_latents(stored["latent"], unet.latent_channels)
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
