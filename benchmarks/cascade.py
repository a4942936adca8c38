"""The bundled cascade as the quality figures use it: real and generated clips of held-out drives.

ComfyUI's own sampler samples every clip, through the MODEL that an artist gets, with the caption of its drive.
"""

import sys
import time

import numpy as np
import torch
from safetensors.torch import load_file

from ..demo import bundle, layers, models, world
from ..nodes.host import for_benchmarks
from ..nodes.host import models as host
from ..nodes.host.attach import attach_layers
from ..nodes.host.context import with_context_frames
from ..nodes.host.image_model import spatial_unet
from ..nodes.host.layer_weights import build_stack
from ..nodes.host.options import LayerSet, with_clip_options
from ..temporal.errors import VideoLDMError
from ..temporal.families import load_temporal
from ..temporal.rollout import plan_calls

BATCH = 4                               # clips sampled together
SAMPLER, SCHEDULER = "euler_ancestral", "ddim_uniform"      # the paper's DDIM with eta 1, as in the workflows

# Rows of real clips, as all tables name them
SECOND, SHUFFLED, FROZEN = "real, a second set (the floor)", "real, frames shuffled", "real, first frame frozen"
THROUGH = "real, through the autoencoder"


def real_clips(numbers, fps=models.FPS):
    """Rendered held-out clips, uint8 (n t h w 3)."""
    size = models.FRAMES, models.HEIGHT, models.WIDTH, fps
    return np.stack([world.clip(world.held_out_seed(number), *size).frames for number in numbers])


def shuffled(clips):
    """Each clip with its frames in another order, never the original one."""
    out = clips.copy()
    for number, clip in enumerate(clips):
        rng = np.random.default_rng(number)
        order = np.arange(len(clip))
        while (order == np.arange(len(clip))).all():
            order = rng.permutation(len(clip))
        out[number] = clip[order]
    return out


class Cascade:
    """The cascade of a folder in this ComfyUI, sampled as core's KSampler does."""

    def __init__(self, folder, work, steps, cfg):
        self.folder, self.work, self.steps, self.cfg = folder, work, steps, cfg
        self.model, self.clip, self.vae = host.load_demo(folder)
        self.null = self.text("")

    def text(self, caption):
        return self.clip.encode_from_tokens(self.clip.tokenize(caption))

    def bundled(self, file=bundle.LAYERS_FILE, strength=1.0):
        """The image model with bundled layers; strength 0 is mix 1 everywhere."""
        loaded = load_temporal(self.folder / file)
        return self.patched(loaded.params, loaded.tensors, strength)

    def arm(self, stage):
        """The image model with the layers of an arm of the ablation, which `train-demo` leaves in its work folder."""
        path = self.work / f"{stage}.safetensors"
        if not path.exists():
            raise VideoLDMError(f"there is no '{path}'. Train it with: python run.py train-demo")
        weights = {key.removeprefix("temporal."): value for key, value in load_file(path).items()}
        unet = spatial_unet(self.model)
        return self.patched(layers.temporal_params(unet, convolution=stage == "temporal"), weights, 1.0)

    def patched(self, params, tensors, strength):
        stack = build_stack(params, tensors, torch.float32)
        return attach_layers(self.model, stack, LayerSet(params, "quality", fps=models.FPS, strength=strength))

    def captions(self, numbers):
        return torch.cat([self.text(world.caption(world.scene(world.held_out_seed(number)))) for number in numbers])

    def sample(self, model, numbers, frames, seed):
        """Latents `(b t) c h w` of a clip of each held-out drive, under its caption."""
        return self.sample_texts(model, self.captions(numbers), frames, seed)

    def sample_texts(self, model, texts, frames, seed):
        """Latents `(b t) c h w` of a clip under each text (b l d)."""
        positive = texts.repeat_interleave(frames, 0)
        latent = torch.zeros(len(positive), models.UNET.latent_channels, models.HEIGHT // 8, models.WIDTH // 8)
        negative = self.null.expand(len(positive), -1, -1)
        model = with_clip_options(model, frames)
        return for_benchmarks.sample(model, latent, seed, self.steps, self.cfg, SAMPLER, SCHEDULER, [[positive, {}]],
                                     [[negative, {}]])

    def decode(self, latents):
        """Pictures of latents, uint8 `(n h w 3)`."""
        return (self.vae.decode(latents) * 255 + 0.5).clamp(0, 255).to(torch.uint8).cpu().numpy()

    def encode(self, frames):
        """Latents of uint8 pictures `(n h w 3)`."""
        return self.vae.encode(torch.from_numpy(frames).float() / 255)

    @torch.inference_mode()
    def through_autoencoder(self, clips):
        """uint8 clips (n t h w 3) encoded and decoded: the best that this cascade can give."""
        return np.stack([self.decode(self.encode(clip)) for clip in clips])

    @torch.inference_mode()
    def clips(self, model, numbers):
        """A clip per held-out drive, uint8 `(n t h w 3)`; the same noise for every model."""
        return in_batches(numbers, lambda part: self.decode(self.sample(model, part, models.FRAMES, part[0])).reshape(
            len(part), models.FRAMES, models.HEIGHT, models.WIDTH, 3))

    @torch.inference_mode()
    def rollouts(self, model, starts, numbers, length, guidance):
        """Latents `(n length c h w)` of each drive extended from its start frame `(n c h w)`, clip after clip."""
        numbers = list(numbers)
        return in_batches(range(len(numbers)), lambda part: self.rollout(
            model, starts[list(part)], [numbers[index] for index in part], length, guidance))

    def rollout(self, model, starts, numbers, length, guidance):
        video = torch.zeros(len(starts), length + models.FRAMES, *starts.shape[1:])
        video[:, 0] = starts
        for turn, call in enumerate(plan_calls(length, models.FRAMES, 1)):
            context_frames = video[:, call.start:call.start + call.known].flatten(0, 1)
            patched = with_context_frames(model, context_frames, range(call.known), guidance)
            clip = self.sample(patched, numbers, models.FRAMES, numbers[0] + 100_000 * turn)
            video[:, call.start:call.start + models.FRAMES] = clip.unflatten(0, (len(numbers), -1))
        return video[:, :length].numpy()


def in_batches(numbers, make):
    """The results of `make` for BATCH numbers at a time, in one array."""
    numbers, parts, started = list(numbers), [], time.monotonic()
    for first in range(0, len(numbers), BATCH):
        parts.append(make(numbers[first:first + BATCH]))
        done = min(first + BATCH, len(numbers))
        print(f"  {done} of {len(numbers)} clips, {time.monotonic() - started:.0f} s", end="\r", file=sys.stderr)
    return np.concatenate(parts)
