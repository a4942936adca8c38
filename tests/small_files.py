"""A small valid file of every kind that the pack loads, and the loader that takes it."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from video_ldm.demo import bundle
from video_ldm.nodes.host import camera, models, sparse_control, upscaler_model, video_network
from video_ldm.temporal.conditioning import add_context_input, add_small_frames_input
from video_ldm.temporal.decoder import PAPER_KERNEL, DecoderParams
from video_ldm.temporal.families import (
    load_camera,
    load_decoder,
    load_layout,
    load_motion_lora,
    load_pvdm,
    load_sparse_control,
    load_temporal,
    load_upscaler,
    load_video_model,
    own_network,
    video_ldm,
)
from video_ldm.temporal.formats import decoder as decoder_format
from video_ldm.temporal.formats import pixel_upscaler as upscaler_format
from video_ldm.temporal.formats import scene_layout_file as layout
from video_ldm.temporal.formats.temporal_file import DEMO, Base, Schedule
from video_ldm.temporal.formats.video_network import Heads
from video_ldm.temporal.layers import ResBlockParams, RotaryParams, TransformerParams
from video_ldm.temporal.params import MASK_LAST, InputFramesParams, StackParams
from video_ldm.temporal.pvdm import files as pvdm
from video_ldm.temporal.scene_layout import LayoutParams, SceneLayout
from video_ldm.temporal.slots import Site, unet_sites
from video_ldm.temporal.spatial_changes import POOLED_NORMS
from video_ldm.temporal.stack import TemporalStack
from video_ldm.temporal.training.checkpoint import load_checkpoint, save_checkpoint
from video_ldm.tests import camera_help, pixel_help, pvdm_help, sparse_help, vsr_help
from video_ldm.tests.formats_help import lora_shapes, motion_shapes, motion_tensors, random_tensors, saved
from video_ldm.tests.network_help import network_tensors
from video_ldm.tests.small import randomise

LAYERS = StackParams("Video LDM", (
    (Site("input", 1, "post_res"), ResBlockParams(32, 64, 1)),
    (Site("input", 1, "in_attn_post_ff"), TransformerParams(32, 2, 48, 1)),
    (Site("middle", 0, "post_res"), ResBlockParams(32, 64, 1)),
), 8, 8)
SCHEDULE, BASE = Schedule("linear", 0.00085, 0.012, "eps"), Base("Stable Diffusion 1.x", 48)
SCENE = LayoutParams(("red", "blue"), (("light", ("day", "night")),), 16, 2, 2, 3, ((0, 32), (2, 32)))
DECODER = DecoderParams(4, 32, (1, 1), 1, PAPER_KERNEL)
UNET = models.UNetParams(4, 32, (1, 2), (1, 1), (0, 1), 32, 64)
IMAGE = models.ImageParams(UNET, models.LatentParams(0.5, ((0.1, 0.2, 0.3),) * 4, (0.0, 0.1, 0.2)), 0.0015, 0.0195, "v")
TEXT = models.TextParams(16, 1, 2, (5, 7, models.START, models.END))
AUTOENCODER = models.AutoencoderParams(4, 32, (1, 1), 1)


@dataclass(frozen=True)
class Small:
    """A valid file. load: what the pack's node calls with its path."""

    name: str
    path: Path
    load: Callable

    @property
    def safetensors(self) -> bool:
        return self.path.suffix == ".safetensors"


def write_all(folder: Path) -> list[Small]:
    """Write one file of each kind."""
    files = [Small(name, folder / name, load_temporal) for name in write_layers(folder)]
    files += [Small(name, folder / name, load) for name, load in write_published(folder)]
    files += [Small(name, folder / name, load) for name, load in write_others(folder)]
    return files + [Small(f"{part}.safetensors", folder / f"{part}.safetensors", load)
                    for part, load in write_demo(folder)]


def write_layers(folder: Path) -> list[str]:
    """Video LDM layers, each version of the format."""
    small = add_small_frames_input(LAYERS, 2, 8)
    versions = {1: LAYERS, 2: add_context_input(LAYERS, 2, ((), (0,), (0, 1)), channels=8, fps_width=48), 3: small,
                4: replace(small, shared_noise=True)}
    for version, params in versions.items():
        video_ldm.write(folder / f"layers_{version}.safetensors", randomise(TemporalStack(params), version), params,
                        schedule=SCHEDULE, base=BASE, fps=8.0, licence="Apache-2.0")
    return [f"layers_{version}.safetensors" for version in versions]


def write_published(folder: Path):
    """Files of other authors, in both containers."""
    motion, lora = motion_tensors(motion_shapes((32,))), random_tensors(lora_shapes((32,)))
    vsr = vsr_help.random_file(vsr_help.temporal_shapes((32, 32), 1, (1,), heads=1))
    for stem, tensors in (("motion", motion), ("lora", lora), ("vsr", vsr)):
        saved(folder, f"{stem}.safetensors", tensors)
        saved(folder, f"{stem}.ckpt", tensors)
    torch.save(motion, folder / "motion_old.ckpt", _use_new_zipfile_serialization=False)
    svd = random_tensors({f"first_stage_model.decoder.{key}": shape
                          for key, shape in decoder_format.shapes_of(replace(DECODER, kernel=(3, 1, 1))).items()})
    saved(folder, "svd.ckpt", svd)
    yield from ((f"{stem}{ending}", load) for stem, load in (
        ("motion", load_temporal), ("lora", load_motion_lora), ("vsr", load_temporal))
        for ending in (".safetensors", ".ckpt"))
    yield from (("motion_old.ckpt", load_temporal), ("svd.ckpt", load_decoder))
    torch.save(pvdm_help.published(pvdm_help.autoencoder()), folder / "pvdm.pth")
    yield "pvdm.pth", load_autoencoder
    saved(folder, "sparse.safetensors", sparse_help.recorded_file("rgb"))
    yield "sparse.safetensors", load_sparse
    saved(folder, "camera.safetensors", camera_help.recorded_file())
    yield "camera.safetensors", load_camera_file
    network = network_tensors("lavie_base", dtype=torch.float16)
    for ending in (".safetensors", ".ckpt"):
        saved(folder, f"lavie{ending}", network)
        yield f"lavie{ending}", load_network


def load_sparse(path: Path):
    """What Load SparseCtrl makes of a file."""
    file = load_sparse_control(path)
    sparse_control.load_sparse_control(file, torch.float32)
    return file


def load_camera_file(path: Path):
    """What Camera Motion makes of a file."""
    file = load_camera(path)
    tensors = dict(file.tensors)
    camera.load_network(file, torch.float32)
    return replace(file, tensors=tensors)


def load_network(path: Path):
    """What Load Video Model makes of a video network."""
    return video_network.load_video_network(load_video_model(path))


def load_autoencoder(path: Path):
    return load_pvdm(path, pvdm.AUTOENCODER)


def load_diffusion(path: Path):
    return load_pvdm(path, pvdm.DIFFUSION)


def write_others(folder: Path):
    """The pack's other formats."""
    decoder_format.write(folder / "decoder.safetensors", random_tensors(decoder_format.shapes_of(DECODER)), DECODER,
                         latents="Stable Diffusion 1.x", frames=6, fps=8.0, licence="Apache-2.0")
    layout.write(folder / "scene.safetensors", randomise(SceneLayout(SCENE), 5).state_dict(), SCENE, torch.randn(3, 48),
                 base=BASE, licence="Apache-2.0")
    upscaler_format.write(folder / "upscaler.safetensors", pixel_help.network().state_dict(), pixel_help.PARAMS)
    write_training(folder / "last.safetensors")
    write_own_network(folder / "network.safetensors")
    planes, diffusion = pvdm_help.write(folder)
    return [(planes, load_autoencoder), (diffusion, load_diffusion),
            ("decoder.safetensors", load_decoder), ("scene.safetensors", load_layout),
            ("upscaler.safetensors", lambda path: upscaler_model.load_upscaler(load_upscaler(path))),
            ("last.safetensors", load_checkpoint), ("network.safetensors", load_network)]


def write_own_network(path: Path):
    """A network of this pack: LaVie's layers, and an input for known frames."""
    takes = InputFramesParams(MASK_LAST, positions=((0, -1),))
    sizes = replace(UNET, context_dim=128, concat_channels=takes.channels)
    unet = models.build_unet(sizes)
    bricks = tuple((site, RotaryParams(channels, channels // 32)) for site, (_, channels) in unet_sites(unet).items()
                   if site.slot == "in_attn_pre_ff")
    params = StackParams("LaVie", bricks, 5, None, (POOLED_NORMS,), input_frames=takes)
    own_network.write(path, unet.state_dict(), randomise(TemporalStack(params), 6).state_dict(),
                      own_network.NetworkParams(params, Schedule("linear", 0.0015, 0.0195, "v"), DEMO, Heads(width=32),
                                                "small", IMAGE.latent, 8.0, "Apache-2.0"))


def write_training(path: Path):
    tensors = {"model.net.weight": torch.randn(4, 3), "ema.net.weight": torch.randn(4, 3),
               "optimizer.net.weight.step": torch.tensor(7.0), "optimizer.net.weight.exp_avg": torch.randn(4, 3),
               "optimizer.net.weight.exp_avg_sq": torch.rand(4, 3)}
    save_checkpoint(path, tensors, {"title": "small", "step": 7, "seconds": 1.5, "settings": {"lr": 0.1, "betas": [1]}})


def write_demo(folder: Path):
    text = models.build_text(TEXT).transformer.state_dict()
    bundle.write_part(folder, "text", models.gather_tokens(text, TEXT), TEXT)
    unet = models.build_unet(UNET).state_dict()
    bundle.write_part(folder, "image", {models.UNET_PREFIX + key: value for key, value in unet.items()}, IMAGE)
    bundle.write_part(folder, "autoencoder", models.build_autoencoder(AUTOENCODER).state_dict(), AUTOENCODER)
    return [("text", models.load_text), ("image", models.load_image_model), ("autoencoder", models.load_autoencoder)]


def tensors_of(loaded) -> list[Tensor]:
    """Every tensor of what a loader gave back."""
    if isinstance(loaded, tuple):       # a training checkpoint
        return list(loaded[0].values())
    if hasattr(loaded, "pairs"):        # a motion LoRA
        return [half for pair in loaded.pairs.values() for half in pair]
    for name in ("model", "cond_stage_model", "first_stage_model"):     # MODEL, CLIP, VAE
        if hasattr(loaded, name):
            layers = loaded.get_nested_additional_models() if name == "model" else []
            return [tensor for part in (getattr(loaded, name), *(layer.model for layer in layers))
                    for tensor in part.state_dict().values()]
    more = [loaded.null_text] if hasattr(loaded, "null_text") else list(getattr(loaded, "post_quant", {}).values())
    return list(loaded.tensors.values()) + more
