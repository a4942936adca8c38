"""The sizes of the tiny bundled cascade, and how long each of its parts is trained."""

from dataclasses import dataclass, replace

from ..nodes.host.models import AutoencoderParams, UNetParams
from ..temporal.diffusion import Diffusion
from ..temporal.training.distributed import pick_device
from ..temporal.training.loop import LoopParams

HEIGHT, WIDTH, FRAMES, FPS = 64, 128, 8, 4.0
TRAIN_CLIPS = 8000                      # rendered once, seeds 0..7999
LINEAR_START, LINEAR_END, PREDICTION = 0.0015, 0.0195, "v"      # the paper's driving model, Video LDM, Table 6
DROPOUT = 0.1                           # of the text, for classifier-free guidance
CONTEXT_CHANNELS = 64                   # the paper's 128, at this UNet's width
INTERPOLATED_FRAMES = 5                 # frames of a window of the interpolation layers
RATES = (4 * FPS, 16 * FPS)             # that they make
ALL_RATES = (FPS, *RATES)               # of key frames and of both steps between them
LICENCE = "Apache-2.0"
SAVED_EVERY = 1000                      # steps on a GPU, where a step takes ten milliseconds

AUTOENCODER = AutoencoderParams(latent_channels=4, channels=32, channel_mult=(1, 1, 2, 3), num_res_blocks=1)
TEXT_WIDTH, TEXT_LAYERS, TEXT_HEADS = 128, 2, 4
UNET = UNetParams(latent_channels=4, model_channels=64, channel_mult=(1, 2, 2), num_res_blocks=(1, 1, 1),
                  transformer_depth=(1, 1, 1), head_channels=32, context_dim=TEXT_WIDTH)


def diffusion() -> Diffusion:
    return Diffusion(LINEAR_START, LINEAR_END, prediction=PREDICTION)


@dataclass(frozen=True)
class OnGPU:
    """What differs on a GPU. For networks so small, a large batch takes it little longer than a small one."""
    batch: int
    steps: int
    lr: float
    precision: str = "float32"
    cuda_graph: bool = True     # without it a step takes three or four times as long


@dataclass(frozen=True)
class Stage:
    """One training."""
    title: str
    batch: int                      # pictures, captions or clips per step
    loop: LoopParams
    on_gpu: OnGPU | None = None     # None: as on a CPU


STAGES = {
    "autoencoder": Stage("autoencoder", 16, LoopParams(
        steps=4200, lr=8e-4, lr_end=1e-6, warmup=80, ema_decay=0.99, precision="bfloat16", save_every=200, seed=11),
        on_gpu=OnGPU(32, 5000, 8e-4)),
    "text": Stage("text encoder", 32, LoopParams(
        steps=300, lr=1e-3, lr_end=1e-5, warmup=30, ema_decay=0.99, precision="float32", save_every=200, seed=12)),
    "image": Stage("image LDM", 32, LoopParams(
        steps=6500, lr=8e-4, lr_end=1e-5, warmup=150, ema_decay=0.998, precision="bfloat16", seed=13),
        on_gpu=OnGPU(96, 6000, 1e-3)),
    "temporal": Stage("temporal layers", 4, LoopParams(
        steps=9000, lr=6e-4, lr_end=1e-5, warmup=100, ema_decay=0.998, precision="bfloat16", seed=14),
        on_gpu=OnGPU(24, 2000, 9e-4, "bfloat16")),
    "temporal-attention": Stage("temporal layers, attention only", 4, LoopParams(
        steps=9000, lr=6e-4, lr_end=1e-5, warmup=100, ema_decay=0.998, precision="bfloat16", seed=14),
        on_gpu=OnGPU(24, 2000, 9e-4, "bfloat16")),
    "prediction": Stage("prediction layers", 4, LoopParams(
        steps=11000, lr=4e-4, lr_end=1e-5, warmup=100, ema_decay=0.998, precision="bfloat16", seed=16),
        on_gpu=OnGPU(24, 5000, 7e-4, "bfloat16")),
    "interpolation": Stage("interpolation layers", 6, LoopParams(
        steps=4300, lr=5e-4, lr_end=1e-5, warmup=100, ema_decay=0.998, precision="bfloat16", seed=17),
        on_gpu=OnGPU(36, 1400, 8e-4, "bfloat16")),
    "layout": Stage("scene layout", 32, LoopParams(
        steps=3200, lr=2e-3, lr_end=1e-5, warmup=50, ema_decay=0.99, precision="bfloat16", save_every=150, seed=19),
        on_gpu=OnGPU(96, 1200, 2e-3)),
    "temporal-decoder": Stage("temporal decoder", 4, LoopParams(
        steps=2700, lr=1e-4, lr_end=1e-6, warmup=30, ema_decay=0.995, precision="bfloat16", grad_clip=None,
        betas=(0.9, 0.99), save_every=200, seed=18),
        on_gpu=OnGPU(4, 2700, 1e-4, cuda_graph=False)),
    "upscaler": Stage("upscaler", 16, LoopParams(
        steps=1500, lr=6e-4, lr_end=1e-5, warmup=100, ema_decay=0.995, precision="bfloat16", save_every=200, seed=21),
        on_gpu=OnGPU(24, 3000, 8e-4)),
    "upscaler-temporal": Stage("temporal layers of the upscaler", 2, LoopParams(
        steps=1200, lr=5e-4, lr_end=1e-5, warmup=100, ema_decay=0.995, precision="bfloat16", save_every=200, seed=22),
        on_gpu=OnGPU(8, 2000, 7e-4, "bfloat16")),
    "pvdm-autoencoder": Stage("autoencoder of PVDM", 2, LoopParams(
        steps=3200, lr=2e-3, lr_end=2.5e-4, warmup=60, ema_decay=0.995, precision="float32", betas=(0.9, 0.99),
        save_every=200, seed=31)),
    "pvdm-diffusion": Stage("diffusion of PVDM", 8, LoopParams(
        steps=2900, lr=1e-3, lr_end=2e-5, warmup=100, ema_decay=0.998, precision="float32", save_every=200, seed=32)),
    "features": Stage("video network of the metric", 16, LoopParams(
        steps=1200, lr=1e-3, lr_end=1e-5, warmup=50, ema_decay=0.99, precision="bfloat16", seed=15)),
}


def stage(name: str) -> Stage:
    """A training as this machine runs it."""
    about = STAGES[name]
    if about.on_gpu is None or pick_device().type == "cpu":
        return about
    there = about.on_gpu
    loop = replace(about.loop, steps=there.steps, lr=there.lr, precision=there.precision, cuda_graph=there.cuda_graph,
                   save_every=SAVED_EVERY)
    return replace(about, batch=there.batch, loop=loop)
