"""AnimateDiff's motion modules in the naming of diffusers' MotionAdapter (docs/formats.md#motion-adapters).

Nothing in such a file tells of which version it was made: converted files of v1 and v3, or of v2, AnimateLCM and
AnimateDiff-Lightning, have the same names and shapes. So all for one image model run alike, each norm on one frame, and
`norms` of Load Temporal Layers chooses otherwise.
"""

from collections.abc import Mapping

from ..formats.files import TensorFile
from ..formats.temporal_file import Identified, TemporalFile
from ..formats.tensor_names import Keys
from . import hotshot_xl
from .animatediff import SCHEDULE, SD15, SDXL, SDXL_SCHEDULE
from .family import Facts, Family
from .motion_modules import DIFFUSERS, is_layout, is_sdxl, load_modules, table_length

LICENCE = "that of the AnimateDiff file that it was made from"
VERSIONS = {
    "diffusers_motion_adapter": Facts(
        "AnimateDiff motion adapter", "an AnimateDiff motion adapter in diffusers' naming", SD15, SCHEDULE, 16, LICENCE,
        8.0, positions=32,
        norms="Each norm sees one frame, as the authors of AnimateDiff v2, v3 and AnimateLCM have it. diffusers pools "
              "the norms in the layers, and the authors of v1 those in the image model: norms sets it."),
    "diffusers_motion_adapter_sdxl": Facts(
        "AnimateDiff SDXL beta", "an AnimateDiff motion adapter for SDXL in diffusers' naming", SDXL, SDXL_SCHEDULE, 16,
        LICENCE, 8.0, positions=32,
        notes=("Its authors sample with euler, 100 steps, cfg 8.5 to 10, at about 1024x1024.",)),
}
NORM_POOLED = {"diffusers_motion_adapter_sdxl"}     # as its authors and diffusers both have it


def detect(keys: Keys, metadata: Mapping[str, str]) -> Identified | None:
    """Recognise a motion adapter and nothing else. refused.py names files with further tensors."""
    if not is_layout(keys, DIFFUSERS):
        return None
    sdxl = is_sdxl(keys)
    if sdxl and table_length(keys) == hotshot_xl.TABLE:
        return None         # Hotshot-XL's table: no such adapter was published, and its norms differ from the beta's
    kind = "diffusers_motion_adapter_sdxl" if sdxl else "diffusers_motion_adapter"
    return VERSIONS[kind].identified(kind)


def load(file: TensorFile, found: Identified) -> TemporalFile:
    """Load a file that `detect` has recognised. Raises VideoLDMError if it is damaged."""
    return load_modules(file, found.kind, VERSIONS[found.kind], DIFFUSERS, found.kind in NORM_POOLED)


FAMILY = Family("AnimateDiff motion adapters in diffusers' naming", "temporal", detect, load)
