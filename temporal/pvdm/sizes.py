"""The sizes of PVDM's two networks, read off the shapes of their tensors (docs/formats.md#pvdm)."""

import re
from collections.abc import Iterable, Mapping

from ..formats.metadata import shown, whole
from .autoencoder import AutoencoderParams
from .unet import HEADS, UNetParams

PREDICTIONS = ("eps", "v")
PLANE_HEADS = 4                 # of the published autoencoders
LARGEST = 100_000               # of any size


def autoencoder_params(shapes: Mapping[str, tuple], metadata: Mapping[str, str]) -> AutoencoderParams:
    """The sizes of an autoencoder, from its tensors' shapes. Raises KeyError for a missing tensor."""
    patch = shapes["to_pixel.1.weight"][-1]
    head = 2 * shapes["encoder.frame_rot_emb.inv_freqs"][0]
    plane_heads = heads_in(metadata, "plane_heads", PLANE_HEADS)
    frames, rows, columns = (shapes[f"{plane}_pos_embedding"][1] - 1 for plane in ("xy", "yt", "xt"))
    return AutoencoderParams(
        frames=bounded(frames, "frames"), height=bounded(rows, "rows") * patch,
        width=bounded(columns, "columns") * patch, patch=bounded(patch, "the patch"),
        channels=bounded(shapes["xy_token"][-1], "channels"), plane_channels=shapes["pre_xy.weight"][0],
        depth=counted(shapes, r"encoder\.layers\.(\d+)\."),
        heads=divided(shapes["encoder.layers.0.0.fn.to_qkv.weight"][0], 3 * head, "the attention's width"),
        head_width=head, plane_depth=counted(shapes, r"xy_quant_attn\.layers\.(\d+)\."), plane_heads=plane_heads,
        plane_head_width=divided(shapes["xy_quant_attn.layers.0.0.fn.to_qkv.weight"][0], 3 * plane_heads,
                                 "the width of the planes' attention"),
        plane_hidden=shapes["xy_quant_attn.layers.0.1.fn.net.0.weight"][0])


def unet_params(shapes: Mapping[str, tuple], metadata: Mapping[str, str]) -> UNetParams:
    """The sizes of a diffusion network, from its tensors' shapes. Raises KeyError for a missing tensor."""
    blocks = counted(shapes, r"output_blocks\.(\d+)\.")
    # The last block of a level ends with a second ResBlock, which enlarges. The first level has none.
    enlarging = {match[1] for match in map(re.compile(r"output_blocks\.(\d+)\.[12]\.in_layers\.2\.weight").fullmatch,
                                           shapes) if match}
    levels = 1 + len(enlarging)
    per_level = divided(blocks, levels, "the number of blocks")
    if counted(shapes, r"input_blocks\.(\d+)\.") != blocks or per_level < 2:
        raise ValueError("its two sides differ in their number of blocks")
    width = bounded(shapes["time_embed.0.weight"][1], "the width")
    channels = bounded(shapes["out.2.weight"][0], "channels")
    first = [1 + level * per_level for level in range(levels)]      # the number of each level's first block
    mult = tuple(divided(shapes[f"input_blocks.{number}.0.out_layers.3.weight"][0], width, "a level's width")
                 for number in first)
    heads = heads_in(metadata, "heads", HEADS)
    if any(width * factor % heads for factor in mult):
        raise ValueError(f"its attentions do not divide into {heads} heads")
    prediction = metadata.get("prediction", "eps")
    if prediction not in PREDICTIONS:
        raise ValueError(f"its prediction is {shown(prediction)}, where {' or '.join(PREDICTIONS)} is due")
    conditional = "zeros" in shapes
    return UNetParams(channels, width, mult, per_level - 1,
                      tuple(level for level, number in enumerate(first)
                            if f"input_blocks.{number}.1.qkv.weight" in shapes), heads, conditional,
                      bounded(shapes["zeros"][2], "the row") if conditional else 0, prediction)


def heads_in(metadata: Mapping[str, str], entry: str, published: int) -> int:
    """The number of heads that an own file states, else that of the published files."""
    return whole(metadata.get(entry, str(published)), entry, 1, LARGEST, text=True)


def counted(shapes: Iterable[str], pattern: str) -> int:
    """How many numbers the pattern's group has, which must be 0, 1, 2 and so on. Raises KeyError if one is missing."""
    found = {int(match[1][:9]) for match in map(re.compile(pattern).match, shapes) if match}
    missing = next(number for number in range(len(found) + 1) if number not in found)
    if missing < len(found) or not found:
        place = pattern.replace(r"(\d+)", str(missing)).replace("\\", "")
        raise KeyError(f"{place}*")
    return len(found)


def bounded(size: int, what: str) -> int:
    """A size that is above 0 and no larger than any network's. Raises ValueError for others."""
    if not 0 < size <= LARGEST:
        raise ValueError(f"{what} would be {size}")
    return size


def divided(size: int, by: int, what: str) -> int:
    """`size` / `by`. Raises ValueError for a remainder."""
    if by < 1 or size % by or not size:
        raise ValueError(f"{what} is {size}, which does not divide by {by}")
    return size // by
