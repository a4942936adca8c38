"""Which frames the norms around motion modules see (docs/formats.md#norms).

AnimateDiff's weights run with norms of either kind, and different programs choose differently. A file does not say it.
"""

from dataclasses import replace

from .errors import VideoLDMError
from .formats.temporal_file import TemporalFile
from .layers import MotionParams
from .spatial_changes import POOLED_NORMS

USUAL, EACH_FRAME = "usual for the file", "each frame alone"
IN_LAYERS, IN_IMAGE_MODEL = "pooled in the layers", "pooled in the image model"
CHOICES = (USUAL, EACH_FRAME, IN_LAYERS, IN_IMAGE_MODEL)
SENTENCES = {
    EACH_FRAME: "Each norm sees one frame.",
    IN_LAYERS: "The norms in the layers see all frames of a clip together, as in diffusers.",
    IN_IMAGE_MODEL: POOLED_NORMS.note,
}


def with_norms(layers: TemporalFile, choice: str) -> TemporalFile:
    """The layers with another choice of norms, on the same weights.

    choice: one of CHOICES. USUAL changes nothing.

    Raises VideoLDMError for layers that are no motion modules.
    """
    if choice == USUAL:
        return layers
    if not all(isinstance(brick, MotionParams) for _, brick in layers.params.bricks):
        raise VideoLDMError(f"norms is '{choice}', and {layers.name} is {layers.title}: only motion modules of "
                            f"AnimateDiff's kind run with other norms. Set norms to '{USUAL}'.")
    bricks = tuple((site, replace(brick, norm_pooled=choice == IN_LAYERS)) for site, brick in layers.params.bricks
                   if isinstance(brick, MotionParams))
    spatial = tuple(change for change in layers.params.spatial if change != POOLED_NORMS)
    if choice == IN_IMAGE_MODEL:
        spatial += (POOLED_NORMS,)
    return replace(layers, params=replace(layers.params, bricks=bricks, spatial=spatial), norms=SENTENCES[choice])
