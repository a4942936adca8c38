"""Hotshot-XL: AnimateDiff's kind of motion module for SDXL, 8 frames (docs/formats.md#animatediff).

The published file has its own names. A re-saved file has AnimateDiff's names. It differs from AnimateDiff's SDXL beta
in the length of its position tables.

We have not seen the scheduler configuration of its authors. SDXL's own noise schedule is used, as in the other
ComfyUI loader of these files.
"""

from collections.abc import Mapping

from ..formats.files import TensorFile
from ..formats.temporal_file import Base, Identified, Schedule, TemporalFile
from ..formats.tensor_names import Keys
from ..spatial_changes import POOLED_NORMS
from .family import Facts, Family
from .motion_modules import ANIMATEDIFF, HOTSHOT, is_layout, is_sdxl, load_modules, table_length

TABLE = 24      # frames of its position tables
FACTS = Facts(
    "Hotshot-XL", "a Hotshot-XL file", Base("SDXL", 2048), Schedule("linear", 0.00085, 0.012), frames=8,
    licence="code Apache-2.0, weights CreativeML Open RAIL++-M", fps=8.0, positions=TABLE, spatial=(POOLED_NORMS,),
    norms=POOLED_NORMS.note,
    notes=("Its authors sample with euler_ancestral, 30 steps and the negative prompt \"blurry\", at about 512x512, "
           "and recommend an SDXL checkpoint made for that size.",))


def detect(keys: Keys, metadata: Mapping[str, str]) -> Identified | None:
    """Recognise Hotshot-XL's names, or AnimateDiff's names with SDXL's channels and position tables of 24 frames."""
    if is_layout(keys, HOTSHOT) or is_layout(keys, ANIMATEDIFF) and is_sdxl(keys) and table_length(keys) == TABLE:
        return FACTS.identified("hotshot_xl")
    return None


def load(file: TensorFile, found: Identified) -> TemporalFile:
    """Load a file that `detect` has recognised. Raises VideoLDMError if it is damaged."""
    own_names = HOTSHOT.pattern.fullmatch(next(iter(file.shapes)))
    return load_modules(file, found.kind, FACTS, HOTSHOT if own_names else ANIMATEDIFF)


FAMILY = Family("Hotshot-XL for SDXL", "temporal", detect, load)
