"""A tiny LDM-shaped network, and a program that trains temporal layers on it in one process or under torchrun.

    torchrun --nproc-per-node 2 tests/training_worker.py FOLDER STEPS
"""

import importlib.util
import os
import sys
from pathlib import Path

import torch
from torch import nn

FRAMES, EMB_DIM, TEXT = 4, 16, 6


def layers(channels, out):
    return nn.Sequential(nn.GroupNorm(8, channels), nn.SiLU(), nn.Conv2d(channels, out, 3, padding=1))


class TinyResBlock(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.out_channels = channels
        self.in_layers = layers(channels, channels)
        self.emb_layers = nn.Linear(EMB_DIM, channels)
        self.out_layers = layers(channels, channels)

    def forward(self, x, emb):
        return x + self.out_layers(self.in_layers(x) + self.emb_layers(emb)[:, :, None, None])


class TinyUNet(nn.Module):
    """Three ResBlocks in the LDM layout. The text is added to the timestep embedding."""

    def __init__(self, channels=32):
        super().__init__()
        self.time, self.text = nn.Linear(1, EMB_DIM), nn.Linear(TEXT, EMB_DIM)
        self.input_blocks = nn.ModuleList([nn.ModuleList([nn.Conv2d(4, channels, 3, padding=1)]),
                                           nn.ModuleList([TinyResBlock(channels)])])
        self.middle_block = nn.ModuleList([TinyResBlock(channels)])
        self.output_blocks = nn.ModuleList([nn.ModuleList([TinyResBlock(channels)])])
        self.out = layers(channels, 4)

    def forward(self, x, timesteps, context=None):
        emb = self.time(timesteps[:, None].to(x.dtype) / 1000)
        if context is not None:
            emb = emb + self.text(context.mean(dim=1))
        x = self.input_blocks[0][0](x)
        for block in (self.input_blocks[1][0], self.middle_block[0], self.output_blocks[0][0]):
            x = block(x, emb)
        return self.out(x)


def tiny_unet(seed=0):
    torch.manual_seed(seed)
    return TinyUNet()


def tiny_stack(unet, seed=1):
    """Temporal layers whose zero-initialised convolutions are random, so that every parameter has a gradient."""
    from video_ldm.temporal.new_layers import video_ldm_params
    from video_ldm.temporal.stack import TemporalStack
    torch.manual_seed(seed)
    stack = TemporalStack(video_ldm_params(unet, EMB_DIM, TEXT, lambda channels: 4, FRAMES))
    for name, parameter in stack.named_parameters():
        if "out_layers.3" in name:
            nn.init.normal_(parameter, std=0.1)
    return stack


def tiny_videos(count=5, length=9, seed=2):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, length, 4, 6, 8, generator=generator), torch.randn(count, 3, TEXT, generator=generator)


def temporal_loss(batch, **options):
    from video_ldm.temporal.diffusion import Diffusion
    from video_ldm.temporal.training.clips import Clips
    from video_ldm.temporal.training.temporal import TemporalLoss
    unet = tiny_unet()
    videos, texts = tiny_videos()
    clips = Clips(videos, FRAMES, batch, embeddings=texts)
    return TemporalLoss(unet, tiny_stack(unet), Diffusion(0.0015, 0.0195, prediction="v"), clips, **options)


def train(folder, steps, batch=4):
    """Run the loop. Return it with the gradients of its last step still on the parameters."""
    from video_ldm.temporal.training.loop import Loop, LoopParams
    loss = temporal_loss(batch)
    params = LoopParams(steps, 1e-3, grad_clip=None, warmup=0, ema_decay=0.9, save_every=2, log_every=1, device="cpu")
    loop = Loop(params, loss.modules, loss, folder, "tiny")
    loop.run()
    return loop


def main(folder, steps):
    root = Path(__file__).resolve().parent.parent
    spec = importlib.util.spec_from_file_location("video_ldm_run", root / "run.py")
    run = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(run)
    run.import_pack()
    torch.set_num_threads(1)
    loop = train(folder, int(steps))
    from safetensors.torch import save_file
    gradients = {name: p.grad for name, p in loop.parameters.items()}
    save_file(gradients, Path(folder) / f"gradients_{os.environ.get('RANK', 0)}.safetensors")


if __name__ == "__main__":
    main(*sys.argv[1:])
