"""Whole video networks as MODEL: ComfyUI's own UNet with the file's spatial weights, and the temporal layers on it.

LoRA loaders, ControlNets, samplers and memory management of ComfyUI take it as they take a checkpoint's MODEL.
"""

from typing import Any

import comfy.model_base
import comfy.supported_models
import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from torch import nn

from ...temporal.errors import VideoLDMError
from ...temporal.formats.temporal_file import TemporalFile
from ...temporal.formats.video_network import OPENCLIP_H, VideoNetwork
from ...temporal.slots import unet_sites
from . import compat
from .attach import attach_layers
from .core_networks import network_of_sizes
from .layer_weights import build_stack, layer_dtype
from .models import UNET_PREFIX, latent_format_of, patcher_of_model
from .noise_schedule import keep_networks, schedule_of
from .options import LayerSet, set_clip_options
from .sockets import Model

FIRST = "input_blocks.0.0.weight"       # ComfyUI's model detection reads the sizes of the UNet from here on


def load_video_network(network: VideoNetwork, fps: float = 0.0, shared: Any = None) -> Model:
    """The MODEL of a video network.

    Args:
        network: the open file.
        fps: the frame rate of the clips, which a network with an embedding of it is told. 0: its authors'.
        shared: as `cache_key` of build_stack.

    Raises VideoLDMError for a file that does not hold exactly the tensors of its network.
    """
    config = model_config(network)
    model = patcher_of_model(config, {UNET_PREFIX + name: tensor for name, tensor in network.read_spatial().items()},
                             UNET_PREFIX)
    layers = network.layers
    model = keep_networks(model, layers.schedule, layers.name)
    stack = build_stack(layers.params, layers.tensors, layer_dtype(model, layers.dtype), shared)
    rate = fps or layers.fps
    m = attach_layers(model, stack, LayerSet(layers.params, layers.title, layers.name, rate, told_fps=fps or None,
                                             network=True))
    if layers.params.fps_width:
        set_clip_options(m, fps=rate)       # for its frame-rate token. Latent Interpolate x4 sets its own rates
    return m


def model_config(network: VideoNetwork) -> Any:
    """The config object that ComfyUI's model detection would make for a checkpoint with these spatial weights."""
    layers = network.layers
    trained = layers.schedule

    class VideoUNet(comfy.supported_models.SD15):
        title = layers.params.family
        unet_extra_config: dict = {}            # unet_config() states the heads
        text_source = network.text.source       # texts.py names it where a text does not fit
        latent_format = comfy.supported_models.SD15.latent_format if network.latents is None else \
            latent_format_of(network.latents)
        sampling_settings = {"beta_schedule": trained.beta_schedule, "linear_start": trained.linear_start,
                             "linear_end": trained.linear_end}

        def model_type(self, state_dict: dict, prefix: str = "") -> Any:
            kind = comfy.model_base.ModelType
            return kind.V_PREDICTION if trained.prediction == "v" else kind.EPS

        def get_model(self, state_dict: dict, prefix: str = "", device: Any = None) -> Any:
            # The class of Stable Diffusion 1.x would take 8 or 9 input channels for instructpix2pix or inpainting.
            made = comfy.model_base.BaseModel(self, model_type=self.model_type(state_dict, prefix), device=device)
            if trained.scale is not None:
                made.model_sampling = schedule_of(trained.beta_schedule, trained.linear_start, trained.linear_end,
                                                  trained.prediction or "eps", scale=trained.scale)
            return made

        def process_unet_state_dict_for_saving(self, state_dict: dict) -> dict:
            raise VideoLDMError(f"Core's nodes would save the spatial layers of {layers.name} alone, without its "
                                "temporal layers and its noise schedule. What they save would be loaded as an image "
                                "model and make noise. Keep the file, and load it with Load Video Model.")
    return VideoUNet(unet_config(network))


def unet_config(network: VideoNetwork) -> dict:
    """The arguments of ComfyUI's UNet, as its model detection reads them from the weights."""
    shapes = network.spatial_shapes
    name, title = network.layers.name, network.layers.title
    if FIRST not in shapes:
        raise VideoLDMError(f"{name} looks like {title}, but {FIRST} is missing. The file is damaged: download it "
                            "again.")

    def config_of(found: dict) -> dict:
        config = {**found, "num_heads": network.heads.count or -1, "num_head_channels": network.heads.width or -1}
        if network.text == OPENCLIP_H:
            config["attn_precision"] = torch.float32    # as core has it for Stable Diffusion 2.x: fp16 would overflow
        return config

    def build(found: dict) -> nn.Module:
        with torch.device("meta"):
            return UNetModel(**config_of(found), dtype=torch.float32, operations=compat.decoder_operations())
    unet, found = network_of_sizes(shapes, f"{name} looks like {title}, but", build)
    config = config_of(found)
    check_parts(network, unet, config)
    return config


def check_parts(network: VideoNetwork, unet: nn.Module, config: dict) -> None:
    """Raise VideoLDMError where the temporal layers, the text encoder or the known frames are another network's.

    Args:
        network: the open file.
        unet: the network with its spatial weights.
        config: of that network, as in unet_config.
    """
    layers = network.layers
    params, width = layers.params, config.get("context_dim")
    takes, latents = params.input_frames, config["out_channels"]
    due = latents + (takes.channels if takes else 0)
    faults = []
    if config["in_channels"] != due:
        faults.append(f"its input has {config['in_channels']} channels where {due} are due")
    if network.text.width != width:
        faults.append(f"its spatial layers take text of width {width}, and {network.text.name} makes "
                      f"{network.text.width}")
    sites = unet_sites(unet)
    for site, brick in params.bricks:
        channels = sites[site].channels if site in sites else 0
        if brick.channels != channels:
            faults.append(f"the temporal layer {site.name} has {brick.channels} channels where its spatial layers have "
                          f"{channels or 'no place for it'}")
        elif (text := getattr(brick, "context_dim", width)) != width:
            faults.append(f"the temporal layer {site.name} takes text of width {text} where "
                          f"its spatial layers take {width}")
    if faults:
        raise VideoLDMError(f"{layers.name} looks like {layers.title}, but {faults[0]}. Its parts are not of one "
                            "network: use the original file.")


def report_of(network: VideoNetwork, fps: float) -> str:
    """What the artist should know about a network, one fact a line. fps: as in load_video_network."""
    layers = network.layers
    trained = layers.schedule
    lines = [
        f"{layers.name}: {layers.title}, {len(layers.params.bricks)} temporal layers on its own spatial layers.",
        f"Text: {network.text.name}. Use {network.text.source}.",
        f"VAE: use {layers.base.source('VAE')}.",
        *rate_lines(layers, fps),
        f"Noise schedule: {trained.beta_schedule} {trained.linear_start:g} to {trained.linear_end:g}"
        + (f", latents scaled down to {trained.scale.last:g}" if trained.scale else "")
        + f". Prediction: {trained.prediction}.",
    ]
    if layers.licence:
        lines.append(f"Licence: {layers.licence}.")
    return "\n".join(lines + list(layers.notes))


def rate_lines(layers: TemporalFile, fps: float) -> list[str]:
    """The lines about the length and the frame rate of clips. fps: as in load_video_network."""
    frames, told = layers.params.frames, layers.params.usual_fps
    if told is None:
        return [f"Trained on clips of {frames} frames"
                + (f" at {fps or layers.fps:g} frames per second." if layers.fps else ".")]
    lines = [f"Trained on clips of {frames} frames, of many frame rates.",
             f"It is told {fps or told:g} frames per second, and its clips play at {fps or layers.fps or told:g}."]
    if not fps:
        lines[-1] += " So do its authors. Set fps to tell it another rate, at which the clips then play too."
    return lines
