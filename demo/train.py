"""Training of the bundled cascade, from nothing: `python run.py train-demo`. docs/training.md says how it works.

The order is the paper's: autoencoder, text encoder, image LDM, temporal layers on the frozen image LDM. The other
stages are the attention-only arm of the ablation, scene layout, prediction, interpolation, temporal decoder, upscaler,
PVDM, and the video network of the metric. A stage resumes where it was stopped, and is skipped when it is finished.
"""

import argparse
import json
import os
import sys
import time
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from ..nodes.host import models as host
from ..temporal.atomic import write_atomically
from ..temporal.conditioning import initialise_stack
from ..temporal.scene_layout import SceneLayout
from ..temporal.stack import TemporalStack
from ..temporal.training.clips import Clips
from ..temporal.training.distributed import pick_device, rank
from ..temporal.training.image import ImageLoss
from ..temporal.training.temporal import TemporalLoss
from . import bundle, data, decoder, layers, models, parallel_stages, pvdm_stages, scene_layout_stage, upscaler
from .autoencoder import AutoencoderLoss, encode
from .data import made, weights_of
from .features import FeatureLoss, VideoNetwork
from .stages import frozen, prepare, save_array, seeded, train
from .text import TextLoss, encode_ids, text_params, token_ids

ROOT = Path(__file__).resolve().parents[1]
WORK, BUNDLE = ROOT / ".train", ROOT / "models" / "demo"
ENCODE_BATCH, CLIP_BATCH = 256, 64      # pictures, short clips


def main(argv=None):
    parser = argparse.ArgumentParser(prog="run.py train-demo", description="Train the demo models from nothing.")
    parser.add_argument("--folder", type=Path, default=WORK, help="work folder: checkpoints, logs, cached data")
    parser.add_argument("--output", type=Path, default=BUNDLE, help="where the finished models are written")
    parser.add_argument("--stage", choices=[*STEPS, "all"], default="all", help="one stage only; default: all of them")
    parser.add_argument("--from-bundle", action="store_true",
                        help="take the bundled models for finished stages, all but the one named by --stage")
    parser.add_argument("--max-minutes", type=float, help="stop the stage in progress after this time, resumable")
    parser.add_argument("--side-by-side", action=argparse.BooleanOptionalAction,
                        help="stages that do not wait for each other run at once; default: on a GPU, for all stages")
    parser.add_argument("--lane", type=int, help=argparse.SUPPRESS)         # for processes of parallel_stages
    argv = sys.argv[1:] if argv is None else argv
    arguments = parser.parse_args(argv)
    files = data.Files(arguments.folder)
    if arguments.from_bundle and rank() == 0 and arguments.lane is None:
        bundle.restore(BUNDLE, files, but=arguments.stage)
    if arguments.lane is None and wants_lanes(arguments):
        return parallel_stages.side_by_side(argv)
    torch.set_float32_matmul_precision("high")          # on a GPU; nothing on a CPU
    for name in stages_of(arguments, files):
        if arguments.lane is not None:
            parallel_stages.wait_for(name, files)
        started = time.monotonic()
        figures = STEPS[name](files, arguments)
        if rank() == 0:
            print(f"{name}: {figures}, {time.monotonic() - started:.0f} s in this run", flush=True)


def wants_lanes(arguments):
    """Whether stages run side by side: where that is asked for, and by default for whole trainings on a GPU."""
    whole = arguments.stage == "all" and arguments.max_minutes is None and "RANK" not in os.environ
    if arguments.side_by_side and not whole:
        raise SystemExit("Stages run side by side only if all of them run to their end, in one process each: leave out "
                         "--stage, --max-minutes and torchrun, or leave out --side-by-side.")
    return whole and (arguments.side_by_side or arguments.side_by_side is None and pick_device().type != "cpu")


def stages_of(arguments, files):
    if arguments.lane is not None:
        return parallel_stages.LANES[arguments.lane]
    if arguments.stage == "all":
        return STEPS
    # The bundle has the models of all stages but not their data.
    return [*(parallel_stages.missing_data(arguments.stage, files) if arguments.from_bundle else []), arguments.stage]


# Trained stages

def train_autoencoder(files, arguments):
    frames, boxes = np.load(made(files.frames, "render"), mmap_mode="r"), np.load(made(files.boxes, "render"))
    network = seeded("autoencoder", lambda: host.build_autoencoder(models.AUTOENCODER))
    loss = AutoencoderLoss(network, frames, boxes, models.stage("autoencoder").batch)
    return train("autoencoder", files, {"autoencoder": network}, loss, arguments)


def train_text(files, arguments):
    params = text_params()
    network = seeded("text", lambda: host.build_text(params))
    network.logit_scale.requires_grad_(False)
    loss = seeded("text", lambda: TextLoss(network, params, models.stage("text").batch))
    return train("text", files, {"text": network, "head": loss.head}, loss, arguments)


def train_image(files, arguments):
    network = seeded("image", lambda: host.build_unet(models.UNET))
    batch = clips_of(files, "image", 1)
    texts = load_file(made(files.texts, "latents"))
    loss = ImageLoss(network, models.diffusion(), batch, texts["null"], models.DROPOUT)
    return train("image", files, {"unet": network}, loss, arguments)


def train_temporal(files, arguments, stage="temporal"):
    unet = frozen(host.build_unet(models.UNET), weights_of(files, "image", "unet"))
    stack = seeded(stage, lambda: TemporalStack(layers.temporal_params(unet, convolution=stage == "temporal")))
    texts = load_file(made(files.texts, "latents"))
    loss = TemporalLoss(unet, stack, models.diffusion(), clips_of(files, stage, models.FRAMES), texts["null"],
                        models.DROPOUT)
    return train(stage, files, loss.modules, loss, arguments)


def train_attention_only(files, arguments):
    return train_temporal(files, arguments, "temporal-attention")


def train_layout(files, arguments):
    """Boxes and labels for the frozen image LDM."""
    unet = frozen(host.build_unet(models.UNET), weights_of(files, "image", "unet"))
    scene = seeded("layout", lambda: SceneLayout(scene_layout_stage.params(models.UNET)))
    latents, texts = np.load(made(files.latents, "latents"), mmap_mode="r"), load_file(made(files.texts, "latents"))
    loss = scene_layout_stage.loss(unet, scene, models.diffusion(), latents, texts)
    return train("layout", files, {"scene": scene}, loss, arguments)


def train_prediction(files, arguments):
    """The key-frame layers learn to continue from 0, 1 or 2 first frames."""
    clips = clips_of(files, "prediction", models.FRAMES)
    return train_with_context(files, arguments, "prediction", layers.prediction_params, clips)


def train_interpolation(files, arguments):
    """Layers for the three frames between two key frames, at both rates. They begin as the key-frame layers."""
    texts = load_file(made(files.texts, "latents"))
    latents = np.load(made(files.interpolation, "interpolation-data"), mmap_mode="r")
    clips = Clips(latents, models.INTERPOLATED_FRAMES, models.stage("interpolation").batch,
                  embeddings=texts["embeddings"], captions=texts["rows"].tolist(),
                  fps=[data.rate_of(index) for index in range(len(latents))])
    return train_with_context(files, arguments, "interpolation", layers.interpolation_params, clips)


def train_with_context(files, arguments, stage, params, clips):
    unet = frozen(host.build_unet(models.UNET), weights_of(files, "image", "unet"))
    stack = seeded(stage, lambda: TemporalStack(params(unet)))
    from_bundle = files.weights(bundle.KEY_FRAMES).exists() and not files.weights("temporal").exists()
    initialise_stack(stack, weights_of(files, bundle.KEY_FRAMES if from_bundle else "temporal", "temporal"))
    texts = load_file(made(files.texts, "latents"))
    loss = TemporalLoss(unet, stack, models.diffusion(), clips, texts["null"], models.DROPOUT)
    return train(stage, files, loss.modules, loss, arguments)


def clips_of(files, stage, frames):
    texts = load_file(made(files.texts, "latents"))
    return Clips(np.load(made(files.latents, "latents"), mmap_mode="r"), frames, models.stage(stage).batch,
                 embeddings=texts["embeddings"], captions=texts["rows"].tolist())


def train_decoder(files, arguments):
    """The autoencoder's decoder gets layers over time. The encoder stays as it is."""
    weights = weights_of(files, "autoencoder", "autoencoder")
    loss = seeded("temporal-decoder", lambda: decoder.loss_of(weights, models.stage("temporal-decoder").batch))
    return train("temporal-decoder", files, loss.modules, loss, arguments)


def train_upscaler(files, arguments):
    """The image upscaler, on single frames."""
    unet = seeded("upscaler", lambda: host.build_unet(upscaler.UNET))
    return train_on_patches(files, arguments, "upscaler", unet, None, 1)


def train_upscaler_layers(files, arguments):
    """Temporal layers on the frozen image upscaler."""
    unet = frozen(host.build_unet(upscaler.UNET), weights_of(files, "upscaler", "unet"))
    stack = seeded("upscaler-temporal", lambda: TemporalStack(upscaler.temporal_params(unet)))
    return train_on_patches(files, arguments, "upscaler-temporal", unet, stack, models.FRAMES)


def train_on_patches(files, arguments, stage, unet, stack, frames):
    texts = load_file(made(files.texts, "latents"))
    patches = upscaler.RenderedPatches(np.load(made(files.large, "render-large"), mmap_mode="r"),
                                       np.load(files.large_boxes), frames, models.stage(stage).batch,
                                       texts["embeddings"], texts["rows"].tolist())
    loss = upscaler.loss(unet, stack, patches, texts)
    return train(stage, files, loss.modules, loss, arguments)


def train_features(files, arguments):
    network = seeded("features", VideoNetwork)
    loss = FeatureLoss(network, np.load(made(files.frames, "render"), mmap_mode="r"), models.stage("features").batch)
    return train("features", files, {"network": network}, loss, arguments)


# Prepared data: the first process makes it, the others wait for the file

def render(files, arguments):
    prepare(data.render_training_set, files.frames, files)
    return f"{models.TRAIN_CLIPS} clips of {models.FRAMES} frames, {models.WIDTH}x{models.HEIGHT}"


def render_large(files, arguments):
    prepare(render_large_clips, files.large, files)
    return f"{upscaler.CLIPS} clips of {models.FRAMES} frames, {upscaler.WIDTH}x{upscaler.HEIGHT}"


def render_large_clips(files):
    temporary = files.large.with_suffix(".tmp")
    np.save(files.large_boxes, upscaler.render(temporary))
    os.replace(temporary, files.large)


def make_latents(files, arguments):
    prepare(encode_all, files.latents, files)
    prepare(encode_texts, files.texts, files)
    stored = json.loads(made(files.latent_params, "latents").read_text(encoding="utf-8"))
    captions = len(load_file(files.texts)["embeddings"])
    return f"scale {stored['scale_factor']:.4f}, {captions} captions"


def encode_all(files):
    """Write the latents of all frames, scaled to unit deviation.

    The scale and the linear map from latents to colours are written too, unless they came with the bundle: its models
    were trained with its scale.
    """
    device = pick_device()
    weights = weights_of(files, "autoencoder", "autoencoder")
    network = frozen(host.build_autoencoder(models.AUTOENCODER), weights).to(device)
    frames = np.load(made(files.frames, "render"), mmap_mode="r")
    flat = frames.reshape(-1, *frames.shape[2:])
    parts = []
    for start in range(0, len(flat), ENCODE_BATCH):
        with torch.autocast(device.type, torch.bfloat16):
            parts.append(encode(network, torch.from_numpy(flat[start:start + ENCODE_BATCH].copy()).to(device)).cpu())
    latents = torch.cat(parts)
    if not files.latent_params.exists():
        scale = 1 / latents.std().item()
        factors, bias = preview_map(latents[::97] * scale, flat[::97])
        data.write_json(files.latent_params, {"scale_factor": scale, "rgb_factors": factors, "rgb_bias": bias})
    scale = json.loads(files.latent_params.read_text(encoding="utf-8"))["scale_factor"]
    latents = (latents * scale).unflatten(0, frames.shape[:2]).numpy()
    write_atomically(files.latents, lambda temporary: save_array(temporary, latents))


def make_interpolation_data(files, arguments):
    prepare(encode_interpolation, files.interpolation, files)
    slow, fast = models.RATES
    return f"{models.TRAIN_CLIPS} clips of {models.INTERPOLATED_FRAMES} frames at {slow:g} and {fast:g} fps"


def encode_interpolation(files):
    """Write the latents of short clips at the rates that interpolation makes, in the scale of the key frames."""
    scale = json.loads(made(files.latent_params, "latents").read_text(encoding="utf-8"))["scale_factor"]
    network = frozen(host.build_autoencoder(models.AUTOENCODER), weights_of(files, "autoencoder", "autoencoder"))
    device = pick_device()
    network.to(device)
    parts = []
    clips = data.render_clips(data.interpolation_clip, models.TRAIN_CLIPS)
    while batch := list(islice(clips, CLIP_BATCH)):
        frames = np.concatenate(batch)
        with torch.autocast(device.type, torch.bfloat16):
            parts.append(encode(network, torch.from_numpy(frames).to(device)).float().cpu() * scale)
    latents = torch.cat(parts).unflatten(0, (-1, models.INTERPOLATED_FRAMES)).numpy()
    write_atomically(files.interpolation, lambda temporary: save_array(temporary, latents))


def preview_map(latents, frames):
    """Least squares from latents (n c h w) to colours -1..1 of the frames averaged over each latent's pixels."""
    factor = frames.shape[1] // latents.shape[-2]
    small = frames.astype(np.float32).reshape(len(frames), latents.shape[-2], factor, latents.shape[-1], factor, 3)
    colours = small.mean((2, 4)).reshape(-1, 3) / 127.5 - 1
    inputs = latents.permute(0, 2, 3, 1).reshape(-1, latents.shape[1]).numpy()
    inputs = np.concatenate([inputs, np.ones((len(inputs), 1), np.float32)], axis=1)
    solution, *_ = np.linalg.lstsq(inputs, colours, rcond=None)
    return solution[:-1].tolist(), solution[-1].tolist()


@torch.no_grad()
def encode_texts(files):
    """Write the embeddings of the different captions (k 77 d) and of the empty one, and the row of each clip."""
    params = text_params()
    encoder = frozen(host.build_text(params), weights_of(files, "text", "text"))
    captions = data.captions()
    different = sorted(set(captions))
    ids = token_ids([*different, ""], host.tokenizer(params.width))
    embeddings = torch.cat([encode_ids(encoder, part)[0] for part in ids.split(ENCODE_BATCH)])
    rows = torch.tensor([different.index(caption) for caption in captions])
    tensors = {"embeddings": embeddings[:-1].contiguous(), "null": embeddings[-1].contiguous(), "rows": rows}
    write_atomically(files.texts, lambda temporary: save_file(tensors, temporary))


# The bundle

def write_bundle(files, arguments):
    bundle.check_finished(files)
    return bundle.write(files, arguments.output) if rank() == 0 else "written by the first process"


STEPS = {"render": render, "autoencoder": train_autoencoder, "text": train_text, "latents": make_latents,
         "image": train_image, "temporal": train_temporal, "temporal-attention": train_attention_only,
         "layout": train_layout, "prediction": train_prediction,
         "interpolation-data": make_interpolation_data, "interpolation": train_interpolation,
         "temporal-decoder": train_decoder, "render-large": render_large, "upscaler": train_upscaler,
         "upscaler-temporal": train_upscaler_layers, **pvdm_stages.STEPS, "features": train_features,
         "bundle": write_bundle}
