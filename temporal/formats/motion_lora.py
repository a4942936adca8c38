"""Motion LoRA: patches of the attentions of AnimateDiff motion modules (docs/formats.md#motion-lora).

There are two layouts: AnimateDiff's own, and diffusers' with `processor.to_q_lora.down` or, from PEFT, `to_q.lora_A`.
A patch is merged as `W += strength * up @ down`. The published files have no alpha, and files with alpha are refused.
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from torch import Tensor

from ..errors import VideoLDMError
from ..layers import MotionParams
from ..params import StackParams
from ..slots import Site
from ..unet_names import UNetNames, resblocks_per_level
from .files import TensorFile
from .temporal_file import Identified, require_distinct, require_one_dtype
from .tensor_names import Keys

TITLE = "a Motion LoRA"
MODULE = r"(?:(?P<side>down|up)_blocks\.(?P<level>\d+)|mid_block)\.motion_modules\.(?P<ordinal>\d+)\."
ATTENTION = (r"(?:temporal_transformer\.)?transformer_blocks\.(?P<block>\d+)\."
             r"(?:attention_blocks\.(?P<zero>\d+)|attn(?P<one>\d+))\.")
WEIGHT = (r"(?:processor\.to_(?P<to>[qkv]|out)_lora\.(?P<half>down|up)\.weight"
          r"|to_(?P<peft>[qkv]|out)(?:\.0)?\.lora_(?P<ab>[AB])(?:\.default)?\.weight)")
KEY = re.compile(MODULE + ATTENTION + WEIGHT)
LORA = r".*(?:_lora\.(?:down|up)\.|\.lora_[AB]\.|\.lora_(?:down|up)\.|\.lora\.(?:down|up)\.)"

PatchKey = tuple[str, int, int, str]        # (side: down, up or mid; level; number of the module; suffix of the weight)


def detect(keys: Keys, metadata: Mapping[str, str]) -> Identified | None:
    """Recognise a LoRA for motion modules, in either layout."""
    if keys.has(LORA) and keys.has(r".*motion_modules\."):
        return Identified("motion_lora", TITLE, "Load it with the Motion LoRA node, and connect that to Load Temporal "
                                                "Layers.", takes="motion_lora")
    return None


@dataclass
class MotionLora:
    """The content of a Motion LoRA file."""

    name: str                                           # the file's name
    pairs: dict[PatchKey, tuple[Tensor, Tensor]]        # the patch of each weight: up `c r`, down `r c`
    metadata: dict[str, str]

    @property
    def rank(self) -> int:
        """The largest rank r of its patches."""
        return max(down.shape[0] for _, down in self.pairs.values())

    def patches(self) -> dict[str, tuple[Tensor, Tensor]]:
        """{stack key: (up, down)} of all patches in the file."""
        resblocks = resblocks_per_level((side, ordinal) for side, _, ordinal, _ in self.pairs)
        return {stack_key(key, resblocks): pair for key, pair in self.pairs.items()}

    def fitting(self, params: StackParams) -> dict[str, tuple[Tensor, Tensor]]:
        """{stack key: (up, down)} of the patches for one set of layers.

        Patches of the middle module are left out if the layers have none (v1, v3). Raises VideoLDMError if another
        patch does not fit, or if no patch is left.
        """
        bricks = {site.name: brick for site, brick in params.bricks if isinstance(brick, MotionParams)}
        if not bricks:
            raise VideoLDMError(f"{self.name} is {TITLE}, which patches AnimateDiff motion modules, and the chosen "
                                f"temporal layers are {params.family} layers. Choose an AnimateDiff file, or take "
                                "the Motion LoRA away.")
        has_middle = "middle_0_post_attn_0" in bricks
        resblocks = resblocks_of(bricks)
        patches = {}
        for patch_key, (up, down) in self.pairs.items():
            if patch_key[0] == "mid" and not has_middle:
                continue
            key = stack_key(patch_key, resblocks)
            self.check(key, bricks.get(key.split(".")[1]), up, down, params)
            patches[key] = up, down
        if not patches:
            raise VideoLDMError(f"{self.name} is {TITLE} for the middle module alone, which {params.family} does "
                                "not have. Use it with AnimateDiff v2.")
        return patches

    def check(self, key: str, brick: MotionParams | None, up: Tensor, down: Tensor, params: StackParams) -> None:
        """Raise VideoLDMError for a patch of a weight that the layers lack, or of another size.

        Args:
            key: the stack key of the weight.
            brick: params of the layer at its site. None: there is no layer.
            up, down: the patch.
            params: of the set of layers.
        """
        block, attention = (int(key.split(".")[i]) for i in (4, 6))
        if brick is None or block >= brick.blocks or attention >= brick.attentions:
            raise VideoLDMError(f"{self.name} fits the chosen {params.family} layers only in part: they have no "
                                f"{key.removeprefix('layers.').removesuffix('.weight')}. It was made for another "
                                "motion module.")
        if not up.shape[0] == down.shape[1] == brick.channels:
            raise VideoLDMError(f"{self.name} patches {down.shape[1]} channels at {key.split('.')[1]}, where the "
                                f"chosen {params.family} layers have {brick.channels}. It was made for another "
                                "motion module.")


def stack_key(patch_key: PatchKey, resblocks: int) -> str:
    """The stack key of a patched weight. resblocks: per level of the UNet's input side."""
    side, level, ordinal, suffix = patch_key
    site = Site(*UNetNames(resblocks).block(side, level, ordinal), "post_attn")
    return f"layers.{site.name}.temporal_transformer.{suffix}"


def resblocks_of(names: Collection[str]) -> int:
    """The ResBlocks r per level of a UNet's input side, from the names of all sites of a set.

    n levels have n r modules on the input side and n (r + 1) on the output side.
    """
    into = sum(name.startswith("input") for name in names)
    out = sum(name.startswith("output") for name in names)
    return into // (out - into) if out > into else 1


# Reading

def load(file: TensorFile, found: Identified | None = None) -> MotionLora:
    """Load a Motion LoRA. Raises VideoLDMError if it is damaged or patches anything else."""
    halves: dict[PatchKey, dict[str, str]] = {}
    for key in file.shapes:
        patch_key, half = parse(file, key)
        require_distinct(file.name, TITLE, ((half, other) for other in
                                            (halves.get(patch_key, {}).get(half, key), key)))
        halves.setdefault(patch_key, {})[half] = key
    tensors = file.read(file.shapes)
    require_one_dtype(file.name, tensors, kind=lambda key: "all of them")
    pairs = {}
    for patch_key, pair in halves.items():
        if set(pair) != {"up", "down"}:
            raise VideoLDMError(f"{file.name} is {TITLE} in which {next(iter(pair.values()))} has no counterpart. "
                                "The file is incomplete: download it again.")
        up, down = tensors[pair["up"]], tensors[pair["down"]]
        if up.ndim != 2 or down.ndim != 2 or up.shape[1] != down.shape[0]:
            raise VideoLDMError(f"{file.name} is {TITLE} whose {pair['up']} {list(up.shape)} and {pair['down']} "
                                f"{list(down.shape)} do not multiply. The file is damaged: download it again.")
        pairs[patch_key] = up, down
    return MotionLora(file.name, pairs, dict(file.metadata))


def parse(file: TensorFile, key: str) -> tuple[PatchKey, str]:
    """The key of the patch, and "up" or "down". Raises VideoLDMError for any other key."""
    match = KEY.fullmatch(key)
    if match is None:
        raise VideoLDMError(foreign_key_message(file.name, key))
    attention = int(match["zero"]) if match["zero"] else int(match["one"]) - 1
    to = match["to"] or match["peft"]
    weight = f"to_{to}.0.weight" if to == "out" else f"to_{to}.weight"
    suffix = f"transformer_blocks.{match['block']}.attention_blocks.{attention}.{weight}"
    half = match["half"] or {"A": "down", "B": "up"}[match["ab"]]
    return (match["side"] or "mid", int(match["level"] or 0), int(match["ordinal"]), suffix), half


def foreign_key_message(name: str, key: str) -> str:
    """The message for a key that patches something else than the attentions of motion modules."""
    if "motion_modules" not in key:
        return (f"{name} patches the image model as well as motion modules (the first such tensor: {key}), as some "
                "MotionDirector trainings write it. Use the file of its motion part alone here, and the image part "
                "with core's Load LoRA.")
    if key.endswith("alpha"):
        return (f"{name} is {TITLE} with alpha entries ({key}), which the published rule for Motion LoRA does not "
                "have. Merge the alpha into its weights and remove those entries.")
    return (f"{name} is {TITLE} that patches {key}, which is none of the attentions' q, k, v and out. It comes from a "
            "trainer that this pack does not know.")
