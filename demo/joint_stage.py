"""Joint training on pictures and clips, in small (docs/papers.md#lavie-joint-training): a part of `bench --quality`.

The bundled image model is fine-tuned whole, with LaVie's layers. Clips know little of the world: all drives are by day,
and all cars are of one paint. Pictures show all of it. One arm sees the clips alone. The other sees as many clips, and
pictures beside them.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..nodes.host import models as host
from ..temporal.atomic import write_atomically
from ..temporal.families import own_network
from ..temporal.formats.temporal_file import DEMO, Schedule
from ..temporal.formats.video_network import Heads
from ..temporal.layers import RotaryParams
from ..temporal.params import StackParams
from ..temporal.slots import unet_sites
from ..temporal.spatial_changes import POOLED_NORMS
from ..temporal.stack import TemporalStack
from ..temporal.training.clips import Clips
from ..temporal.training.loop import Loop, LoopParams
from ..temporal.training.network import NetworkLoss
from . import bundle, models, world
from .autoencoder import encode
from .text import encode_ids, text_params, token_ids

CLIP_PAINT = "red"                      # of all cars in clips
CLIPS, PICTURES = 256, 768              # different clips, and pictures of as many drives
FIRST_PICTURE = 4000                    # the training seed of the first picture's drive
BATCH, IMAGES = 1, 2                    # of a step: 8 frames in one clip, and 2 pictures. The paper has 16 and 4
LOOP = LoopParams(steps=500, lr=1e-3, lr_end=1e-5, warmup=20, ema_decay=0.98, precision="float32", save_every=50,
                  seed=31)
ALONE, JOINT = "clips-alone", "clips-and-pictures"
ENCODED = 32                            # pictures or captions that are encoded together


def drives(wanted, count: int, seed_of, first: int = 0) -> list[world.Scene]:
    """The first `count` drives from number `first` on that are wanted. seed_of: world.train_seed or held_out_seed."""
    found: list[world.Scene] = []
    while len(found) < count:
        scene = world.scene(seed_of(first))
        first += 1
        if wanted(scene):
            found.append(scene)
    return found


def clip_drives(count: int, seed_of, first: int = 0) -> list[world.Scene]:
    """Drives as the clips show them: by day, with cars of one paint."""
    found = drives(lambda scene: not scene.night, count, seed_of, first)
    return [replace(scene, cars=tuple(replace(car, colour=CLIP_PAINT) for car in scene.cars)) for scene in found]


def film(scene: world.Scene) -> np.ndarray:
    """The clip of a drive, uint8 (t h w 3)."""
    return np.stack([world.render(scene, number / models.FPS, models.HEIGHT, models.WIDTH)
                     for number in range(models.FRAMES)])


# Data

def data(folder: Path, bundled: Path) -> dict[str, Tensor]:
    """Latents and texts of clips and pictures. They are made once and kept in the folder.

    bundled: the folder of the cascade, whose autoencoder and text encoder are used.
    """
    path = folder / f"data-{CLIPS}-{PICTURES}.safetensors"
    if not path.exists():
        made = make_data(bundled)
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(path, lambda temporary: save_file(made, temporary))
    return load_file(path)


@torch.no_grad()
def make_data(bundled: Path) -> dict[str, Tensor]:
    clips = clip_drives(CLIPS, world.train_seed)
    pictures = drives(lambda scene: True, PICTURES, world.train_seed, FIRST_PICTURE)
    texts = texts_of([*clips, *pictures], bundled)
    return {"clips": latents_of(map(film, clips), bundled).unflatten(0, (CLIPS, -1)),
            "pictures": latents_of(map(picture_of, pictures), bundled), "clip_texts": texts[:CLIPS].clone(),
            "picture_texts": texts[CLIPS:-1].clone(), "null": texts[-1].clone()}


def picture_of(scene: world.Scene) -> np.ndarray:
    """A picture of a drive from a moment somewhere in it, as a clip of one frame."""
    moment = (scene.seed * 0.6180339887) % 1 * (models.FRAMES - 1) / models.FPS
    return world.render(scene, moment, models.HEIGHT, models.WIDTH)[None]


def latents_of(clips, bundled: Path) -> Tensor:
    """Latents of uint8 clips (t h w 3), one frame after the other, in the image model's scale."""
    tensors = host.read_part(bundled / "autoencoder.safetensors", "autoencoder")[0]
    network = host.build_autoencoder(models.AUTOENCODER)
    network.load_state_dict({key: value.float() for key, value in tensors.items()})
    scale = image_params(bundled).latent.scale_factor
    frames = torch.from_numpy(np.concatenate(list(clips)))
    return torch.cat([encode(network.eval(), part) for part in frames.split(ENCODED)]) * scale


def texts_of(scenes, bundled: Path) -> Tensor:
    """The texts of drives, and the empty one behind them, (n l d)."""
    params = text_params()
    encoder = host.build_text(params)
    weights = bundle.READERS["text"](bundled)
    encoder.load_state_dict({key.removeprefix("text."): value for key, value in weights.items()})
    ids = token_ids([*map(world.caption, scenes), ""], host.tokenizer(params.width))
    return torch.cat([encode_ids(encoder.eval(), part)[0] for part in ids.split(ENCODED)])


# The network

def image_params(bundled: Path) -> host.ImageParams:
    tensors, stored = host.read_part(bundled / "image.safetensors", "image")
    return host.read_image_params(stored, len(tensors))


def image_unet(bundled: Path) -> nn.Module:
    """The bundled image model's UNet, in float32, to train."""
    unet = host.build_unet(image_params(bundled).unet)
    weights = bundle.READERS["image"](bundled)
    unet.load_state_dict({key.removeprefix("unet."): value for key, value in weights.items()})
    return unet


def lavie_layers(unet: nn.Module) -> StackParams:
    """LaVie's layers for a UNet: attention over time in every transformer, and norms that see all frames together."""
    bricks = tuple((site, RotaryParams(channels, channels // models.UNET.head_channels))
                   for site, (_, channels) in unet_sites(unet).items() if site.slot == "in_attn_pre_ff")
    return StackParams("LaVie", bricks, models.FRAMES, None, (POOLED_NORMS,))


def train(arm: str, folder: Path, bundled: Path) -> Path:
    """Train or resume an arm. Returns its file, a video network for Load Video Model."""
    path = folder / f"{arm}.safetensors"
    if not path.exists():
        made, unet = data(folder, bundled), image_unet(bundled)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(LOOP.seed)
            stack = TemporalStack(lavie_layers(unet))
        loop = Loop(LOOP, {"spatial": unet, "temporal": stack}, loss(arm, unet, stack, made), folder / arm, arm)
        loop.run()
        own_network.write(path, loop.ema_state("spatial"), loop.ema_state("temporal"), file_params(stack, arm, bundled))
    return path


def loss(arm: str, unet: nn.Module, stack: TemporalStack, made: dict[str, Tensor]) -> NetworkLoss:
    clips = Clips(made["clips"], models.FRAMES, BATCH, embeddings=made["clip_texts"])
    pictures = Clips(made["pictures"][:, None], 1, 1, embeddings=made["picture_texts"]).images(IMAGES)
    return NetworkLoss(unet, stack, models.diffusion(), clips, made["null"], models.DROPOUT,
                       images=pictures if arm == JOINT else None)


def file_params(stack: TemporalStack, arm: str, bundled: Path) -> own_network.NetworkParams:
    schedule = Schedule("linear", models.LINEAR_START, models.LINEAR_END, models.PREDICTION)
    return own_network.NetworkParams(stack.params, schedule, DEMO, Heads(width=models.UNET.head_channels),
                                     f"Video LDM demo, LaVie's layers, {arm}", image_params(bundled).latent,
                                     models.FPS, models.LICENCE)
