"""AnimateDiff motion modules: v1, v2, v3, AnimateLCM, LongAnimateDiff, and the beta for SDXL.

The format is described in docs/formats.md#animatediff.
"""

from collections.abc import Mapping
from typing import Any

from ..formats.files import TensorFile
from ..formats.temporal_file import Base, Identified, SamplerHint, Schedule, TemporalFile
from ..formats.tensor_names import Keys
from ..spatial_changes import POOLED_NORMS
from .family import Facts, Family
from .motion_modules import ANIMATEDIFF, is_layout, is_sdxl, load_modules, table_length

SD15, SDXL = Base("Stable Diffusion 1.x", 768), Base("SDXL", 2048)
# The schedules leave the prediction type open. So an image model for v-prediction keeps predicting v.
SCHEDULE = Schedule("sqrt_linear", 0.00085, 0.012)
SDXL_SCHEDULE = Schedule("linear", 0.00085, 0.02)
FPS = 8.0       # the rate at which the authors save their clips
UNSTATED = "not stated by its authors"


def facts(name: str, frames: int = 16, licence: str = "Apache-2.0", base: Base = SD15, schedule: Schedule = SCHEDULE,
          **more: Any) -> Facts:
    """The facts of one version.

    Args:
        name: in sentences.
        frames: length of the clips that it was trained on.
        licence: of the weights.
        base: the image model.
        schedule: the noise schedule.
        more: further fields of Facts.
    """
    return Facts(name, f"{'a' if name[0] == 'L' else 'an'} {name} motion module", base, schedule, frames, licence, FPS,
                 **{"positions": 32, **more})


ANIMATELCM = facts(
    "AnimateLCM", 16, UNSTATED, positions=64, hint=SamplerHint("lcm", "lcm", cfg=(1.0, 2.0), steps=(4, 8)),
    notes=("A distilled module: those few steps need AnimateLCM's own LoRA on the image model too.",))
VERSIONS = {
    "animatediff_v1": facts("AnimateDiff v1", spatial=(POOLED_NORMS,), norms=POOLED_NORMS.note),
    "animatediff_v2": facts(
        "AnimateDiff v2",
        notes=("LongAnimateDiff's 32-frame file has the same tensors and runs the same way.",)),
    "animatediff_v3": facts(
        "AnimateDiff v3",
        notes=("Its domain adapter, v3_sd15_adapter.ckpt, is a LoRA for the image model alone: load it with core's "
               "Load LoRA, strength 1 or less, before or behind this node. It absorbed what the training videos look "
               "like, watermarks too. At 1 frames look as those videos; 0, or no adapter, leaves your checkpoint's "
               "look.",)),
    "longanimatediff": facts(
        "LongAnimateDiff", 64, UNSTATED,
        notes=("Its authors run it on 16 to 64 frames with a strength of 1.15.",)),
    "animatelcm": ANIMATELCM,
    "animatediff_sdxl": facts(
        "AnimateDiff SDXL beta", base=SDXL, schedule=SDXL_SCHEDULE,
        notes=("Its authors sample with euler, 100 steps, cfg 8.5 to 10, at about 1024x1024.",)),
}
NORM_POOLED = {"animatediff_sdxl"}      # versions whose own norms pool over the frames of a clip


def detect(keys: Keys, metadata: Mapping[str, str]) -> Identified | None:
    """Recognise a file of motion modules and nothing else. refused.py names files with further tensors."""
    if not is_layout(keys, ANIMATEDIFF):
        return None
    kind = version_of(keys)
    return VERSIONS[kind].identified(kind)


def version_of(keys: Keys) -> str:
    """The version of a file of motion modules, a key of VERSIONS."""
    length = table_length(keys)
    if is_sdxl(keys):
        return "animatediff_sdxl"
    if keys.has(r"mid_block\."):
        if not length:
            return "animatelcm"
        return "longanimatediff" if length > 32 else "animatediff_v2"
    return "animatediff_v1" if 0 < length <= 24 else "animatediff_v3"


def load(file: TensorFile, found: Identified) -> TemporalFile:
    """Load a file that `detect` has recognised. Raises VideoLDMError if it is damaged."""
    return load_modules(file, found.kind, VERSIONS[found.kind], norm_pooled=found.kind in NORM_POOLED)


FAMILY = Family("AnimateDiff v1, v2, v3, AnimateLCM and LongAnimateDiff for Stable Diffusion 1.x, AnimateDiff SDXL "
                "beta", "temporal", detect, load)
