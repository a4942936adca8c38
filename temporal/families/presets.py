"""Distilled motion modules that only their names tell from others, and how they are sampled.

AnimateDiff-Lightning has the tensors of AnimateDiff v2. As motion adapters of diffusers, AnimateLCM and Lightning both
have them. So a preset is a suggestion in the report, and changes nothing else.
"""

import re
from dataclasses import replace

from ..formats.temporal_file import SamplerHint, TemporalFile
from ..slots import Site
from .animatediff import ANIMATELCM

LIGHTNING, STEPS = "lightning", re.compile(r"(?<!\d)(\d{1,2})[ _-]?steps?(?![a-z])")
LCM = re.compile(r"animate[ _-]?lcm")
KINDS = ("animatediff_v2", "diffusers_motion_adapter")      # what such a file is taken for
MIDDLE = Site("middle", 0, "post_attn")


def with_preset(layers: TemporalFile, name: str) -> TemporalFile:
    """The layers with the settings of the preset that their name tells. Without one, the layers themselves.

    name: of the file as the artist chose it, with its folders.
    """
    if layers.kind not in KINDS or MIDDLE not in dict(layers.params.bricks):
        return layers
    if LIGHTNING in name.lower():
        return as_lightning(layers, STEPS.search(name.lower()))
    if layers.kind != "animatediff_v2" and LCM.search(name.lower()):
        return replace(layers, hint=ANIMATELCM.hint, licence=ANIMATELCM.licence,
                       notes=[*layers.notes, "Its name says that it is AnimateLCM.", *ANIMATELCM.notes])
    return layers


def as_lightning(layers: TemporalFile, found: re.Match | None) -> TemporalFile:
    """The layers as AnimateDiff-Lightning. found: the number of steps in the file's name."""
    licensed = replace(layers, licence="CreativeML Open RAIL-M")
    if found is None or not int(found[1]):
        note = ("Its name says that it is AnimateDiff-Lightning, but not for how many steps (1, 2, 4 or 8). Sample "
                "with euler, scheduler sgm_uniform, cfg 1 and that many steps.")
        return replace(licensed, notes=[*layers.notes, note])
    steps = int(found[1])
    notes = [f"Its name says that it is AnimateDiff-Lightning for {steps} step{'s' * (steps > 1)}. At cfg 1 the "
             "negative prompt is not heard."]
    if steps == 1:
        notes.append("Its authors publish the file for one step for research only.")
    hint = SamplerHint("euler", "", cfg=(1.0, 1.0), steps=(steps, steps), scheduler="sgm_uniform")
    return replace(licensed, hint=hint, notes=[*layers.notes, *notes])
