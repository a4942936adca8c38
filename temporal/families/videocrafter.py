"""VideoCrafter's text-to-video networks (docs/formats.md#videocrafter; docs/papers.md#videocrafter).

A file is a whole UNet of Stable Diffusion 2.x with ModelScope's temporal layers, or a whole checkpoint with a VAE and a
text encoder beside it. Version 1 has tables of relative positions, version 2 has convolutions over time. Two of the
three networks are told the frame rate, and were trained on latents that are scaled down.
"""

import re
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from ..diffusion import DataScale, make_betas
from ..errors import VideoLDMError
from ..formats.files import TensorFile
from ..formats.temporal_file import Base, Identified, Schedule
from ..formats.tensor_names import Keys
from ..formats.video_network import OPENCLIP_H, Heads, VideoNetwork
from ..fps_embedding import FpsEmbedding
from .family import Facts, Family, NetworkFacts
from .modelscope import HEAD_WIDTH, bricks_of, own_names, with_flat_weights

TOLD = 28.0             # the frame rate that the authors' script tells a network
PLAYED = 10.0           # the frame rate at which it saves the clips
TIMESTEPS = 1000
FIRST_TRANSFORMER = "init_attn.0."
NOT_ALONE = ("Its spatial layers were trained together with its temporal layers, so on an image model its temporal "
             "layers would give noise.")
LICENCE = "repository Apache-2.0, but for personal, research and non-commercial use alone by its own page"


def version(name: str, title: str, size: str, licence: str = LICENCE, scale: DataScale | None = None,
            convolutions: bool = False) -> NetworkFacts:
    """The facts of one network.

    Args:
        name: its name in sentences.
        title: what it is, with an article.
        size: the width and height that its authors sample.
        licence: as its authors state it.
        scale: the factor on the clean latents in training. None: there is none.
        convolutions: whether it has convolutions over time.
    """
    facts = Facts(name, title, Base("Stable Diffusion 2.x", 1024), Schedule("linear", 0.00085, 0.012, "eps", scale), 16,
                  licence, PLAYED, notes=(
                      f"Its authors sample 16 frames of {size} with 50 steps, cfg 12 and DDIM at eta 1. Use "
                      "euler_ancestral with ddim_uniform for that, and euler for eta 0.",))
    slots = ("post_conv_in", "post_attn") + (("post_res",) if convolutions else ())
    return NetworkFacts(facts, OPENCLIP_H, Heads(width=HEAD_WIDTH), NOT_ALONE, slots)


VERSIONS = {
    "videocrafter2": version(
        "VideoCrafter2", "VideoCrafter2's text-to-video network", "512x320",
        LICENCE + "; the page of the weights says Apache-2.0", DataScale(0.7), convolutions=True),
    "videocrafter1_1024": version(
        "VideoCrafter1", "VideoCrafter1's text-to-video network of 1024x576", "1024x576", scale=DataScale(0.3)),
    "videocrafter1_512": version("VideoCrafter1", "VideoCrafter1's text-to-video network of 512x320", "512x320"),
}
FPS = re.compile(r"fps_embedding\.(?P<rest>.+)")
# What a whole checkpoint holds beside the network: its VAE, its text encoder, and tables made from the betas.
UNUSED = re.compile(r"(?:first_stage_model|cond_stage_model)\..+|betas|logvar|scale_factor|scale_arr|posterior_\w+|"
                    r"(?:(?:sqrt|log)_\w*)?alphas_cumprod\w*")
OTHERS = ("first_stage_model.", "cond_stage_model.")
BETAS, SCALE = "betas", "scale_arr"


def detect(keys: Keys, metadata: Mapping[str, str]) -> Identified | None:
    """Recognise a text-to-video network. Those for image to video also attend to a picture."""
    if not keys.has(r"init_attn\.0\.") or keys.has(r".*\.to_k_ip\."):
        return None
    if keys.shape(r"input_blocks\.0\.0\.weight")[1:2] != (4,):
        return None
    size = "1024" if keys.has(r"fps_embedding\.") else "512"
    kind = "videocrafter2" if keys.has(r".*\.temopral_conv\.") else f"videocrafter1_{size}"
    return VERSIONS[kind].identified(kind)


def load(file: TensorFile, found: Identified) -> VideoNetwork:
    """Load a file that `detect` has recognised. Raises VideoLDMError if it is damaged."""
    file = with_flat_weights(file)
    network = VERSIONS[found.kind]
    unused = {key for key in file.shapes if UNUSED.fullmatch(key)}
    fps = {key: f"spatial.0.{match['rest']}" for key in file.shapes if (match := FPS.fullmatch(key))}
    names = own_names((key for key in file.shapes if key not in unused and key not in fps), FIRST_TRANSFORMER)
    layer_names = {key: f"layers.{site.name}.{suffix}" for key, (site, suffix) in names.layers.items()}
    schedule, notes = schedule_of(file, network)
    if any(key.startswith(OTHERS) for key in unused):
        notes += ("The VAE and the text encoder in the file are not used.",)
    network = replace(network, facts=replace(network.facts, schedule=schedule))
    params = network.facts.stack_params(bricks_of(file, network.facts.title, names), None)
    if found.kind != "videocrafter1_512":
        params = replace(params, spatial=(fps_embedding(file, network.facts.title),))
    return network.network(file, found.kind, params, layer_names | fps, names.spatial, unused, notes)


def fps_embedding(file: TensorFile, title: str) -> FpsEmbedding:
    """The embedding of the frame rate in a file."""
    shape = file.shapes.get("fps_embedding.0.weight", ())
    if len(shape) != 2:
        raise VideoLDMError(f"{file.name} looks like {title}, but the tensor fps_embedding.0.weight is "
                            f"{list(shape) or 'missing'}. The file is incomplete or damaged: download it again.")
    emb = (*file.shapes.get("time_embed.2.weight", shape), 0)[0]
    if emb != shape[0]:
        raise VideoLDMError(f"{file.name} looks like {title}, but its embedding of the frame rate has {shape[0]} "
                            f"numbers where that of the timestep has {emb}. The file is damaged: download it again.")
    return FpsEmbedding(shape[1], shape[0], TOLD)


def schedule_of(file: TensorFile, network: NetworkFacts) -> tuple[Schedule, tuple[str, ...]]:
    """The noise schedule of a file, and sentences for the report. A whole checkpoint holds it, a UNet alone does not.

    Raises VideoLDMError for a noise schedule that this pack does not know.
    """
    published = network.facts.schedule
    tables = file.read(key for key in (BETAS, SCALE) if key in file.shapes)
    if not tables:
        return published, ("The file holds no noise schedule. The published one is used.",)
    betas = make_betas(published.linear_start, published.linear_end, TIMESTEPS, published.beta_schedule)
    if not equal(tables.get(BETAS, betas), betas):
        raise unknown_schedule(file, network, BETAS)
    if SCALE not in tables:
        return replace(published, scale=None), ()
    scale = next((scale for scale in (published.scale, guessed(tables[SCALE])) if scale is not None
                  and equal(tables[SCALE][:TIMESTEPS], scale.factors(TIMESTEPS))), None)
    if scale is None:
        raise unknown_schedule(file, network, SCALE)
    return replace(published, scale=scale), ()


def guessed(table: Tensor) -> DataScale | None:
    """The scale that a table shows, if it falls evenly from 1 and then stays."""
    if table.ndim != 1 or len(table) < TIMESTEPS or not table[-1] > 0:
        return None
    return DataScale(round(float(table[-1]), 4), 1 + int((table == table[-1]).int().argmax()))


def equal(table: Tensor, expected: Tensor) -> bool:
    """Whether a file's table holds these numbers, up to the rounding of its dtype."""
    rounding = max(2 * torch.finfo(table.dtype).eps, 1e-5) if table.dtype.is_floating_point else 0.0
    return table.shape == expected.shape and torch.allclose(table.double(), expected, rtol=rounding, atol=0)


def unknown_schedule(file: TensorFile, network: NetworkFacts, table: str) -> VideoLDMError:
    """The error for a table of the noise schedule that is not like a published one."""
    return VideoLDMError(f"{file.name} is {network.facts.title}, but its noise schedule is none that this pack knows "
                         f"(the tensor {table}). Use the published file.")


FAMILY = Family("VideoCrafter 1 and 2, text to video", "video_model", detect, load)
