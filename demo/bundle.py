"""The finished cascade as the files that the pack ships, and back: `python run.py train-demo --from-bundle`."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

from safetensors.torch import load_file, save_file

from ..nodes.host import models as host
from ..temporal.atomic import write_atomically
from ..temporal.families import load_decoder, load_layout, load_temporal, load_upscaler, video_ldm
from ..temporal.formats import pixel_upscaler as upscaler_format
from ..temporal.formats.temporal_file import Base, Schedule
from ..temporal.layers import Factory
from ..temporal.stack import TemporalStack
from . import decoder, layers, models, pvdm_stages, scene_layout_stage, upscaler
from .data import made, weights_of, write_json
from .stages import halved, notes
from .text import text_params

LAYOUT_FILE = "video_ldm_driving_layout.safetensors"
LAYERS_FILE, INTERPOLATION_FILE = "video_ldm_driving.safetensors", "video_ldm_driving_x4.safetensors"
DECODER_FILE = "video_ldm_driving_decoder.safetensors"
UPSCALER_FILE = "video_ldm_driving_upscaler.safetensors"
UPSCALER_LAYERS_FILE = "video_ldm_driving_upscaler_layers.safetensors"
FEATURES_FILE = "features.safetensors"
STAGES = ("autoencoder", "text", "image", "prediction", "interpolation", "layout", "temporal-decoder", "upscaler",
          "upscaler-temporal", *pvdm_stages.TRAINED, "features")
KEY_FRAMES = "key-frames"       # what prediction and interpolation begin with where the key-frame stage was not run


def check_finished(files):
    """Stop with a sentence where a stage that is bundled is not done yet."""
    made(files.latent_params, "latents")
    for stage in STAGES:
        made(files.weights(stage), stage)


def write(files, output: Path) -> str:
    """Write the finished cascade as fp16 safetensors, each with everything that rebuilds it."""
    sizes = [write_part(output, part, *content) for part, content in image_parts(files).items()]
    demo = Base("Video LDM demo", models.UNET.context_dim)
    trained = Schedule("linear", models.LINEAR_START, models.LINEAR_END, models.PREDICTION)
    unet = host.build_unet(models.UNET)
    sizes.append(write_layers(files, output / LAYERS_FILE, "prediction", layers.prediction_params(unet), demo, trained,
                              models.FPS))
    sizes.append(write_layers(files, output / INTERPOLATION_FILE, "interpolation", layers.interpolation_params(unet),
                              demo, trained))
    sizes.append(decoder.write(output / DECODER_FILE, weights_of(files, "temporal-decoder", "decoder"),
                               weights_of(files, "autoencoder", "autoencoder"), notes("temporal-decoder")))
    sizes.append(scene_layout_stage.write(output / LAYOUT_FILE, weights_of(files, "layout", "scene"),
                              load_file(files.texts)["null"], notes("layout")))
    sizes.append(write_upscaler(files, output / UPSCALER_FILE))
    sizes.append(write_layers(files, output / UPSCALER_LAYERS_FILE, "upscaler-temporal",
                              upscaler.temporal_params(host.build_unet(upscaler.UNET)), upscaler.BASE,
                              upscaler.SCHEDULE))
    sizes += pvdm_stages.write(files, output)
    sizes.append(write_tensors(output / FEATURES_FILE, weights_of(files, "features", "network"),
                               {"format": "video_ldm_demo_features", **notes("features")}))
    return f"{sum(sizes) / 1e6:.1f} MB in '{output}'"


def image_parts(files) -> dict:
    """{part: (tensors, params)} of the plain image model."""
    latents = json.loads(made(files.latent_params, "latents").read_text(encoding="utf-8"))
    image = host.ImageParams(models.UNET, host.LatentParams(**latents), models.LINEAR_START, models.LINEAR_END,
                             models.PREDICTION)
    text = text_params()
    tokens = host.gather_tokens(without_prefix(TRANSFORMER, weights_of(files, "text", "text")), text)
    unet = weights_of(files, "image", "unet")
    return {"autoencoder": (weights_of(files, "autoencoder", "autoencoder"), models.AUTOENCODER),
            "text": (tokens, text),
            "image": ({host.UNET_PREFIX + key: value for key, value in unet.items()}, image)}


TRANSFORMER = "transformer."


def without_prefix(prefix: str, tensors: dict) -> dict:
    """The tensors whose names begin with a prefix, without it."""
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def write_part(folder, part, tensors, params):
    return write_tensors(folder / f"{part}.safetensors", tensors, host.part_metadata(part, params, notes(part)))


def write_tensors(path, tensors, metadata):
    """Write fp16 safetensors; the size in bytes."""
    metadata = {key: str(value) for key, value in metadata.items()}
    write_atomically(path, lambda temporary: save_file(halved(tensors), temporary, metadata=metadata))
    return path.stat().st_size


def write_layers(files, path, stage, params, base: Base, schedule: Schedule, fps=None):
    video_ldm.write(path, halved(weights_of(files, stage, "temporal")), params, base=base, schedule=schedule, fps=fps,
                    licence=models.LICENCE, metadata=notes(stage))
    return path.stat().st_size


def write_upscaler(files, path):
    about = notes("upscaler")
    upscaler_format.write(path, halved(weights_of(files, "upscaler", "unet")), upscaler.file_params(about.pop("title")),
                          {key: str(value) for key, value in about.items()})
    return path.stat().st_size


# The way back: from the bundled files to what a stage leaves in the work folder

def restore(bundle: Path, files, but: str | None = None):
    """Take the bundled models for the stages that the work folder lacks.

    The stage `but` is left out. It is to be trained, even where the work folder has it from the bundle.
    """
    files.folder.mkdir(parents=True, exist_ok=True)
    for stage, read in READERS.items():
        if (files.folder / stage).exists():
            continue
        if stage == but:
            files.weights(stage).unlink(missing_ok=True)
        elif not files.weights(stage).exists() and pvdm_stages.is_bundled(stage, bundle):
            write_safetensors(files.weights(stage), read(bundle))
    if not files.latent_params.exists():
        stored = host.read_part(bundle / "image.safetensors", "image")[1]["latent"]
        write_json(files.latent_params, stored)


def write_safetensors(path: Path, tensors: dict) -> None:
    """Write tensors whole or not at all."""
    write_atomically(path, lambda temporary: save_file(tensors, temporary))


def as_module(name: str, tensors: dict) -> dict:
    """The tensors in float32 under the names that they have in a stage's file, where the module is `name`."""
    return {f"{name}.{key}": tensor.float().contiguous() for key, tensor in tensors.items()}


def read_text(bundle):
    tensors, stored = host.read_part(bundle / "text.safetensors", "text")
    params = host.TextParams(stored["width"], stored["layers"], stored["heads"], tuple(stored["tokens"]))
    kept = {TRANSFORMER + key: value for key, value in host.scatter_tokens(tensors, params).items()}
    scale = host.build_text(params).logit_scale.detach()        # never trained, and not bundled
    return as_module("text", {**kept, "logit_scale": scale})


def read_pvdm(stage: str, bundle: Path) -> dict:
    """The network of one of PVDM's stages."""
    return as_module(*pvdm_stages.read(stage, bundle))


def read_key_frames(bundle):
    """The prediction layers without their input for context frames."""
    wanted = TemporalStack(layers.temporal_params(host.build_unet(models.UNET)), Factory(device="meta")).state_dict()
    tensors = load_temporal(bundle / LAYERS_FILE).tensors
    return as_module("temporal", {key: tensors[key][tuple(map(slice, like.shape))] for key, like in wanted.items()})


READERS: dict[str, Callable[[Path], dict]] = {
    "autoencoder": lambda bundle: as_module("autoencoder", host.read_part(bundle / "autoencoder.safetensors",
                                                                          "autoencoder")[0]),
    "text": read_text,
    "image": lambda bundle: as_module("unet", without_prefix(
        host.UNET_PREFIX, host.read_part(bundle / "image.safetensors", "image")[0])),
    KEY_FRAMES: read_key_frames,
    "prediction": lambda bundle: as_module("temporal", load_temporal(bundle / LAYERS_FILE).tensors),
    "interpolation": lambda bundle: as_module("temporal", load_temporal(bundle / INTERPOLATION_FILE).tensors),
    "layout": lambda bundle: as_module("scene", load_layout(bundle / LAYOUT_FILE).tensors),
    "temporal-decoder": lambda bundle: as_module("decoder", load_decoder(bundle / DECODER_FILE).tensors),
    "upscaler": lambda bundle: as_module("unet", load_upscaler(bundle / UPSCALER_FILE).tensors),
    "upscaler-temporal": lambda bundle: as_module("temporal", load_temporal(bundle / UPSCALER_LAYERS_FILE).tensors),
    **{stage: partial(read_pvdm, stage) for stage in pvdm_stages.TRAINED},
    "features": lambda bundle: as_module("network", load_file(bundle / FEATURES_FILE)),
}
