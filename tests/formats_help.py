"""Stand-ins for published files: the real keys and shapes, and files of them filled with small numbers."""

import json
import lzma
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from video_ldm.temporal.errors import VideoLDMError
from video_ldm.temporal.families import load_temporal

# {file: {key: shape}} of the public checkpoints of temporal layers, one per format; no weights.
FIXTURES = Path(__file__).parent / "fixtures"
PUBLISHED = json.loads(lzma.decompress((FIXTURES / "published_keys.json.xz").read_bytes()))
# The same of public files that the pack does not take and that are in no other fixture.
REFUSED = json.loads(lzma.decompress((FIXTURES / "refused_keys.json.xz").read_bytes()))
MUSEV = json.loads(lzma.decompress((FIXTURES / "musev_keys.json.xz").read_bytes()))
PUBLISHED |= {"makeavid_sd": REFUSED.pop("makeavid_sd"), "musev": MUSEV["musev"],
              "cameractrl_adv3": REFUSED.pop("cameractrl_adv3")}
REFUSED |= {"musev_referencenet": MUSEV["musev_referencenet"]}


def narrow(shapes: dict, factor: int = 10) -> dict:
    """The same file with a tenth of the channels. Tables and kernels keep their sizes."""
    return {key: tuple(size // factor if size >= 320 else size for size in shape) for key, shape in shapes.items()}


def random_tensors(shapes: dict, seed: int = 0, dtype=torch.float32) -> dict:
    generator = torch.Generator().manual_seed(seed)
    return {key: torch.randn(shape, generator=generator).to(dtype) for key, shape in shapes.items()}


def motion_shapes(channels=(64, 128), resblocks: int = 1, middle: bool = True, table: int = 32) -> dict:
    """Keys and shapes of an AnimateDiff file for a UNet of these levels. With table 0 it has no frame positions."""
    places = [(f"down_blocks.{i}.motion_modules.{j}", c) for i, c in enumerate(channels) for j in range(resblocks)]
    places += [(f"up_blocks.{i}.motion_modules.{j}", c)
               for i, c in enumerate(reversed(channels)) for j in range(resblocks + 1)]
    places += [("mid_block.motion_modules.0", channels[-1])] if middle else []
    return {f"{place}.temporal_transformer.{suffix}": shape
            for place, c in places for suffix, shape in module_shapes(c, table).items()}


def module_shapes(c: int, table: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {f"{part}.{half}": (c,) for part in ("norm",) for half in ("weight", "bias")}
    for part in ("proj_in", "proj_out"):
        shapes |= {f"{part}.weight": (c, c), f"{part}.bias": (c,)}
    block = "transformer_blocks.0."
    for m in range(2):
        attention = f"{block}attention_blocks.{m}."
        shapes |= {f"{attention}to_{to}.weight": (c, c) for to in "qkv"}
        shapes |= {f"{attention}to_out.0.weight": (c, c), f"{attention}to_out.0.bias": (c,)}
        shapes |= {f"{attention}pos_encoder.pe": (1, table, c)} if table else {}
    for norm in ("norms.0", "norms.1", "ff_norm"):
        shapes |= {f"{block}{norm}.weight": (c,), f"{block}{norm}.bias": (c,)}
    shapes |= {f"{block}ff.net.0.proj.weight": (8 * c, c), f"{block}ff.net.0.proj.bias": (8 * c,)}
    return shapes | {f"{block}ff.net.2.weight": (c, 4 * c), f"{block}ff.net.2.bias": (c,)}


def motion_tensors(shapes: dict, seed: int = 0, dtype=torch.float32) -> dict:
    """Random weights under these names, with the frame positions that AnimateDiff computes."""
    from video_ldm.temporal.layers import interleaved_sinusoid
    tensors = random_tensors(shapes, seed, dtype)
    for key, shape in shapes.items():
        if key.endswith("pos_encoder.pe"):
            tensors[key] = interleaved_sinusoid(shape[1], shape[2])[None].to(dtype)
    return tensors


# diffusers' names for what AnimateDiff's files call otherwise
TO_DIFFUSERS = (("temporal_transformer.", ""), ("attention_blocks.0.to", "attn1.to"),
                ("attention_blocks.1.to", "attn2.to"), ("attention_blocks.0.pos_encoder", "pos_embed"),
                ("norms.0.", "norm1."), ("norms.1.", "norm2."), ("ff_norm.", "norm3."))


def adapter_names(tensors: dict) -> dict:
    """AnimateDiff's names turned into diffusers', with one table of positions for each block."""
    renamed = {}
    for key, tensor in tensors.items():
        if "attention_blocks.1.pos_encoder" in key:
            continue
        for theirs, ours in TO_DIFFUSERS:
            key = key.replace(theirs, ours)
        renamed[key] = tensor
    return renamed


def lora_shapes(channels=(64, 128), resblocks: int = 1, middle: bool = True, rank: int = 4) \
        -> dict[str, tuple[int, int]]:
    """Keys and shapes of a Motion LoRA for the same UNets, in AnimateDiff's own layout."""
    shapes: dict[str, tuple[int, int]] = {}
    for key, shape in motion_shapes(channels, resblocks, middle).items():
        if ".to_" in key and key.endswith("weight"):
            stem = key.removesuffix(".weight").removesuffix(".0")
            stem = "processor.to_".join(stem.rsplit("to_", 1)) + "_lora"
            shapes |= {f"{stem}.down.weight": (rank, shape[1]), f"{stem}.up.weight": (shape[0], rank)}
    return shapes


def saved(folder, name: str, tensors: dict, metadata: dict | None = None) -> Path:
    """A file of these tensors: safetensors or torch by its name."""
    path = Path(folder) / name
    if path.suffix == ".safetensors":
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path, metadata=metadata)
    else:
        torch.save(tensors, path)
    return path


def check_refused(tensors, folder, change, words):
    """A file of these tensors is refused with a sentence that holds `words`, once `change(tensors)` has damaged it."""
    damaged = dict(tensors)
    change(damaged)
    with pytest.raises(VideoLDMError, match=words):
        load_temporal(saved(folder, "damaged.safetensors", damaged))
