"""LDM's names of a UNet's spatial weights, for files in diffusers' naming (docs/formats.md#positions)."""

import re
from collections.abc import Iterable, Mapping

from .slots import Site
from .unet_names import BLOCK, UNetNames, resblocks_per_level

RESBLOCK = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
            "conv2": "out_layers.3", "conv_shortcut": "skip_connection"}
ENDS = {"conv_in": "input_blocks.0.0", "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2", "conv_norm_out": "out.0", "conv_out": "out.2"}
END = re.compile("(" + "|".join(map(re.escape, ENDS)) + r")\.(weight|bias)")
MODULE = re.compile(BLOCK + r"(?P<kind>resnets|attentions)\.(?P<number>\d+)\.(?P<rest>.+)")
OUTPUT_BLOCK = re.compile(r"output_blocks\.(\d+)\.")
RESAMPLER = re.compile(r"(?P<side>down|up)_blocks\.(?P<level>\d+)\.(?:down|up)samplers\.0\.conv\.(?P<rest>.+)")


def names_of_unet(keys: Iterable[str]) -> UNetNames:
    """The numbering of the UNet that these keys belong to, in diffusers' naming."""
    found = [match for match in map(MODULE.fullmatch, keys) if match and match["kind"] == "resnets"]
    levels = 1 + max((int(match["level"] or 0) for match in found), default=0)
    return UNetNames(resblocks_per_level((match["side"], int(match["number"])) for match in found), levels)


def ldm_names(keys: Iterable[str]) -> dict[str, str]:
    """{LDM's name: key} of the spatial weights among the keys. Other keys are left out."""
    keys = list(keys)
    unet = names_of_unet(keys)
    with_transformers = {(match["side"], match["level"]) for match in map(MODULE.fullmatch, keys)
                         if match and match["kind"] == "attentions"}
    names = {}
    for key in keys:
        name = ldm_name(key, unet, with_transformers)
        if name is not None:
            names[name] = key
    return names


def ldm_name(key: str, unet: UNetNames, with_transformers: set) -> str | None:
    """LDM's name of one key. None for a key that is no spatial weight.

    with_transformers: (side, level) of the levels that have spatial transformers.
    """
    if match := END.fullmatch(key):
        return f"{ENDS[match[1]]}.{match[2]}"
    if match := MODULE.fullmatch(key):
        rest = match["rest"]
        if match["kind"] == "resnets":
            module, _, kind = rest.rpartition(".")
            if module not in RESBLOCK:
                return None
            rest = f"{RESBLOCK[module]}.{kind}"
        return f"{unet.module(match['side'], int(match['level'] or 0), match['kind'], int(match['number']))}.{rest}"
    if match := RESAMPLER.fullmatch(key):
        part, index = unet.block(match["side"], int(match["level"]), unet.resblocks)
        if match["side"] == "down":
            return f"{part}_blocks.{index}.0.op.{match['rest']}"
        number = 2 if (match["side"], match["level"]) in with_transformers else 1
        return f"{part}_blocks.{index}.{number}.conv.{match['rest']}"
    return None


# For each slot, the 1-dimensional weight in LDM's names that shows a place for a layer, and how many channels it has
TRANSFORMER = r"(?:(?P<part>input|output)_blocks\.(?P<index>\d+)|middle_block)\.1\."
BLOCK_NORM = TRANSFORMER + r"transformer_blocks\.(?P<n>\d+)\.norm1\.weight"
RESBLOCK_PLACE = r"(?:(?P<part>input|output)_blocks\.(?P<index>\d+)\.0|middle_block\.(?P<n>[02]))"
PLACES = {
    "post_conv_in": r"(?P<part>input)_blocks\.(?P<index>0)\.0\.bias",
    "post_res": RESBLOCK_PLACE + r"\.out_layers\.0\.weight",
    "in_attn_pre_ff": BLOCK_NORM,
    "in_attn_post_ff": BLOCK_NORM,
    "post_attn": TRANSFORMER + r"norm\.weight",
    "post_conv1": RESBLOCK_PLACE + r"\.in_layers\.2\.bias",
    "post_conv2": RESBLOCK_PLACE + r"\.out_layers\.3\.bias",
    "post_shortcut": RESBLOCK_PLACE + r"\.skip_connection\.bias",
    "post_resampler": r"(?P<part>input|output)_blocks\.(?P<index>\d+)\.(?:0\.op|[12]\.conv)\.bias",
    "post_conv_out": r"out\.2\.bias",
}


def places(shapes: Mapping[str, tuple], slots: Iterable[str]) -> dict[Site, int]:
    """{site: channels} of all places for layers in a network. After blocks without transformer there is no post_attn.

    shapes: of the spatial weights, by name in LDM's UNet. slots: keys of PLACES.
    """
    found = {}
    for slot in slots:
        pattern = re.compile(PLACES[slot])
        for name, shape in shapes.items():
            match = pattern.fullmatch(name)
            if match is None or len(shape) != 1:        # a weight of another shape is refused by its name later
                continue
            if slot == "post_conv_out":
                found[Site("output", last_output_block(shapes), slot)] = shape[0]
                continue
            number = int(match.groupdict().get("n") or 0)
            # the middle's ResBlocks are its modules 0 and 2
            n = number // 2 if RESBLOCK_PLACE in PLACES[slot] else number
            found[Site(match["part"] or "middle", int(match["index"] or 0), slot, n)] = shape[0]
    return found


def last_output_block(names: Iterable[str]) -> int:
    """The number of the last output block. names: of the spatial weights in LDM's UNet."""
    return max((int(match[1]) for match in map(OUTPUT_BLOCK.match, names) if match), default=0)
