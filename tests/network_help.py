"""Small files of whole video networks, the MODELs that they give, and what these predict.

A file is small in one of two ways. TENTH has all blocks under the published names with a tenth of the channels.
ONE_LEVEL has one level of one ResBlock with the published channels, so that core knows its spatial part as Stable
Diffusion 1.x. Weights are random.
"""

import re
from dataclasses import replace
from typing import NamedTuple

import comfy.model_patcher
import comfy.sampler_helpers
import numpy as np
import torch

from video_ldm.nodes.host.options import CLIP, clip_options, layer_sets_in
from video_ldm.nodes.host.video_network import load_video_network
from video_ldm.temporal.families import load_video_model
from video_ldm.temporal.formats.video_network import VideoNetwork
from video_ldm.temporal.layers.position import rotation_angles
from video_ldm.tests.formats_help import PUBLISHED, saved

TENTH, ONE_LEVEL = "a tenth of the channels", "one level"
# Networks that differ from a published file in one tensor: SEINE is LaVie's base with more input channels.
KINDS = PUBLISHED | {"seine": PUBLISHED["lavie_base"] | {"conv_in.weight": (320, 9, 3, 3)}}
BIAS = ".relative_attention_bias.weight"        # LaVie's table by distance has a column for each head
ROTATION = ".rotary_emb.freqs"
FIRST_BLOCKS = re.compile(r"(?:conv_(?:in|out|norm_out)|time_embedding\..*|down_blocks\.0\.(?:resnets|attentions)\.0|"
                          r"mid_block|up_blocks\.3\.(?:resnets|attentions)\.[01])\..*")
INNERMOST = {1280: 320, 5120: 1280, 10240: 2560}    # sizes of the middle block, where the first level is the only one


class Clips(NamedTuple):
    """The input of one call."""

    x: torch.Tensor         # noise `b t 4 h w`
    known: torch.Tensor     # the further channels of the input `b t k h w`; k may be 0
    text: torch.Tensor      # `b l d`

    @property
    def whole(self) -> torch.Tensor:
        """The network's own input `b t c h w`."""
        return torch.cat([self.x, self.known], dim=2)


def network_shapes(kind: str, size: str = TENTH) -> dict:
    """Names and shapes of a small file. kind: a key of KINDS, as in "lavie_base"."""
    if size == ONE_LEVEL:
        return {key.replace("up_blocks.3", "up_blocks.0"): first_level(key, shape)
                for key, shape in KINDS[kind].items() if FIRST_BLOCKS.fullmatch(key)}
    return {key: (shape[0], 1) if key.endswith(BIAS) else tuple(map(narrowed, shape))
            for key, shape in KINDS[kind].items()}


def narrowed(size: int) -> int:
    """A tenth of a number of channels of the network. The text keeps its width."""
    return size // 10 if size % 320 == 0 else size


def first_level(key: str, shape: tuple) -> tuple:
    """The shape of a tensor in a network whose only level is the first."""
    if key.endswith("time_emb_proj.weight"):
        return 320, 1280
    if key.startswith("mid_block."):
        return tuple(INNERMOST.get(size, size) for size in shape)
    return tuple(640 if size == 960 else size for size in shape)    # its first block up has no wider level below it


def network_tensors(kind: str, seed: int = 0, dtype: torch.dtype = torch.float32, size: str = TENTH) -> dict:
    """The weights of a small file. They are spread like fresh ones, so that the network's output stays about 1.

    NumPy's old generator draws the same numbers on every machine and in every version.
    """
    source = np.random.RandomState(seed)
    return {key: drawn(key, shape, source).to(dtype) for key, shape in network_shapes(kind, size).items()}


def uniform(shape: tuple, source: np.random.RandomState) -> torch.Tensor:
    """Numbers of variance 1."""
    return torch.from_numpy((source.random_sample(tuple(shape)) * 2 - 1) * 3 ** 0.5).float()


def drawn(key: str, shape: tuple, source: np.random.RandomState) -> torch.Tensor:
    if key.endswith(ROTATION):
        return rotation_angles(torch.ones(1))[0]
    value = uniform(shape, source)
    if len(shape) == 1:
        return 1 + 0.1 * value if "norm" in key and key.endswith("weight") else 0.1 * value
    if key.endswith(BIAS):
        return value
    return value / (value[0].numel() ** 0.5)


def network_clips(kind: str, clips: int, frames: int, height: int = 8, width: int = 8, seed: int = 3,
                  text: int = 768) -> Clips:
    """Random inputs.

    Args:
        kind: a key of KINDS. It tells the number of further input channels.
        clips, frames: of each clip.
        height, width: of the latents.
        seed: of the numbers.
        text: the width of the text.
    """
    source = np.random.RandomState(seed)
    weight = next(shape for key, shape in KINDS[kind].items()
                  if key in ("conv_in.weight", "input_blocks.0.0.weight"))
    x, known = (uniform((clips, frames, channels, height, width), source) for channels in (4, weight[1] - 4))
    return Clips(x, known, uniform((clips, 7, text), source))


def network_model(folder, kind: str, tensors: dict, wrapped: bool = True):
    """The MODEL of a file of these tensors. wrapped: under `ema`, as LaVie's authors save theirs."""
    network = load_video_model(saved(folder, f"{kind}.pt", {"ema": tensors} if wrapped else tensors))
    assert isinstance(network, VideoNetwork)
    return load_video_network(network)


def options_of(model, frames: int, conditions: tuple[int, ...] = (0,)) -> dict:
    """The transformer_options of a call of MODEL as core's sampling makes them.

    But no further channels are made for the network's input: `predicted` is given them.
    """
    options = comfy.model_patcher.create_model_options_clone(model.model_options)
    comfy.sampler_helpers.prepare_model_patcher(model, {}, options)
    own = options["transformer_options"]
    own |= {key: replace(layers, params=replace(layers.params, input_frames=None))
            for key, layers in layer_sets_in(own).items()}
    return {**own, CLIP: replace(clip_options(own), frames=frames), "cond_or_uncond": list(conditions)}


@torch.no_grad()
def predicted(model, clips: Clips, timestep: float = 500.0, conditions: tuple[int, ...] = (0,),
              **more) -> torch.Tensor:
    """The noise `b t 4 h w` that MODEL predicts at a timestep, by core's apply_model.

    Args:
        model: the MODEL. Its weights are where they are: nothing is loaded to another device.
        clips: the input. With several conditions, the clips of each follow those of the one before.
        timestep: of the noise schedule.
        conditions: core's number of each condition in the call.
        more: further entries of the transformer_options.
    """
    frames = clips.x.shape[1]
    sigma = model.model.model_sampling.sigma(torch.tensor(timestep))
    x = clips.x.flatten(0, 1)
    noisy = x * (sigma ** 2 + 1) ** 0.5         # core divides by this
    known = clips.known.flatten(0, 1)
    denoised = model.model.apply_model(
        noisy, sigma.expand(len(x)), c_concat=known if known.shape[1] else None,
        c_crossattn=clips.text.repeat_interleave(frames, 0),
        transformer_options={**options_of(model, frames, conditions), **more})
    return ((noisy - denoised) / sigma).unflatten(0, clips.x.shape[:2])
