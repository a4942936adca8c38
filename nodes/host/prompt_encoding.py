"""Encodes the prompts of a clip's frames with ComfyUI's CLIP, as CONDITIONING with an item for each frame.

Core gives such items to the images of a batch in order. frame_conditioning.py and windows.py cut them for the frames of
a call.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...temporal.errors import VideoLDMError
from ...temporal.prompt_travel import FrameText
from .files import check_cancelled, refuse_beyond_memory
from .made_for import MADE_FOR
from .sockets import Clip, Conditioning

POOLED = "pooled_output"
MOST_REPEATS = 4        # times that the longest text may be repeated; core has the same limit for two texts


def encode_texts(clip: Clip, texts: Sequence[FrameText]) -> Conditioning:
    """CONDITIONING with an item for each of `texts`. Each prompt is encoded once, as CLIP Text Encode does it.

    With hooks on the CLIP that change over the steps there are several entries, one for each range of steps. Each has
    an item for each frame.
    """
    encoded: dict[str, list] = {}
    for prompt in dict.fromkeys(prompt for text in texts for prompt in (text.prompt, text.following)):
        check_cancelled()
        encoded[prompt] = clip.encode_from_tokens_scheduled(clip.tokenize(prompt))
    ranges = len(encoded[texts[0].prompt])      # the same for all prompts: the hooks decide it
    return [entry_of_frames({prompt: entries[number] for prompt, entries in encoded.items()}, texts)
            for number in range(ranges)]


def entry_of_frames(entries: dict[str, Sequence], texts: Sequence[FrameText]) -> list:
    """One entry of a CONDITIONING, with an item for each frame. entries: {prompt: its text and options}."""
    check_kind(entries)
    tokens = same_length({prompt: text for prompt, (text, _) in entries.items()})
    options = dict(next(iter(entries.values()))[1])
    pooled = {prompt: given.get(POOLED) for prompt, (_, given) in entries.items()}
    if options.get(POOLED) is not None:
        options[POOLED] = blended(pooled, texts)
    return [blended(tokens, texts), {**options, MADE_FOR: len(texts)}]


def check_kind(entries: dict[str, Sequence]) -> None:
    """Refuse what a CLIP of another kind gives beside its text, such as a mask of tokens. It cannot be interpolated."""
    for text, options in entries.values():
        others = [name for name, value in options.items() if name != POOLED and isinstance(value, Tensor)]
        if others or not isinstance(text, Tensor) or text.ndim != 3 or len(text) != 1:
            what = f"gives {others[0]} beside the text" if others else "gives no text of tokens"
            raise VideoLDMError(f"This CLIP {what}: it belongs to another kind of model than Stable Diffusion 1.x, 2.x "
                                "or SDXL. Connect the CLIP of such a checkpoint.")


def same_length(texts: dict[str, Tensor]) -> dict[str, Tensor]:
    """Texts `1 l d` of one length. Shorter ones are repeated.

    Attention to repeated tokens gives the same result, so a prompt means what it means alone. Core does the same with
    two texts of a call. A text that is padded with empty tokens would mean something else.
    """
    lengths = {text.shape[1] for text in texts.values()}
    length = math.lcm(*lengths)
    if length > MOST_REPEATS * max(lengths):
        named = ", ".join(map(str, sorted(lengths)))
        raise VideoLDMError(f"The prompts have {named} tokens, and to bring them to one length each would have "
                            f"{length}. Shorten the longest prompts, so that all have 75 words or fewer, or 150 or "
                            "fewer.")
    return {prompt: text.repeat(1, length // text.shape[1], 1) for prompt, text in texts.items()}


def blended(encoded: dict[str, Any], texts: Sequence[FrameText]) -> Tensor:
    """The items of all frames. At weight 0 an item is the encoded prompt, bit for bit. encoded: {prompt: `1 ...`}."""
    first = next(iter(encoded.values()))
    refuse_beyond_memory(first.nbytes * len(texts), f"The texts of {len(texts)} frames", "Lower frames.")
    items = first.new_empty(len(texts), *first.shape[1:])
    for item, text in zip(items, texts):
        here = encoded[text.prompt][0]
        item.copy_(torch.lerp(here, encoded[text.following][0], text.weight) if text.weight else here)
    return items
