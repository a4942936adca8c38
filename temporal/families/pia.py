"""PIA: motion modules that move a given picture, on any Stable Diffusion 1.x model (docs/formats.md#pia).

The file holds a first convolution of nine input channels. Its authors give a personalised checkpoint the last five
alone, and keep the checkpoint's own first four and its bias. So do we.

The modules have the names and tables of AnimateDiff v3, or those of a motion adapter of diffusers. But the image
model's norms see all frames of a clip together, as in version 1.
"""

from collections.abc import Mapping
from dataclasses import replace

from ..errors import VideoLDMError
from ..formats.files import TensorFile
from ..formats.temporal_file import Identified, TemporalFile
from ..formats.tensor_names import Keys
from ..picture_changes import PictureChannels
from ..picture_input import PictureParams
from ..spatial_changes import POOLED_NORMS
from .animatediff import facts
from .family import Facts, Family
from .motion_modules import ANIMATEDIFF, DIFFUSERS, Layout, is_with, load_modules

CONV_IN, BIAS = "conv_in.weight", "conv_in.bias"
LATENT_CHANNELS = 4
INPUTS = 2 * LATENT_CHANNELS + 1        # noisy latents, affinity, the picture's latents
CHANGE = "spatial.0.weight"             # the change's weights: PictureChannels is the first change
LAYOUTS: dict[str, Layout] = {"pia": ANIMATEDIFF, "diffusers_pia": DIFFUSERS}       # by kind of file
TAKES = PictureParams("seen by further channels of the image model's first convolution", anywhere=True,
                      affinities=True, from_noise=True)


def facts_for(channels: int) -> Facts:
    """channels: of the first convolution's output."""
    found = facts("PIA", spatial=(PictureChannels(channels), POOLED_NORMS), picture=TAKES,
                  norms=POOLED_NORMS.note, notes=(
        "It moves a given picture: connect Context Frames with one picture between this MODEL and the sampler, or "
        "Extend Video with overlap 1.",
        "Picture Motion sets how far the picture moves, loops, and a change of style.",
        "Its authors sample with ddim, 25 steps, cfg 7.5, and the longer side at 512.",
        "Its first convolution's channels for the noisy latents are not used: they are the image model's own."))
    return replace(found, title="a PIA file (motion modules that move a picture)")


def detect(keys: Keys, metadata: Mapping[str, str]) -> Identified | None:
    """Recognise motion modules with a first convolution of nine input channels, and nothing of an image model."""
    if keys.shape(r"conv_in\.weight")[1:2] != (INPUTS,):
        return None
    return next((facts_for(0).identified(kind) for kind, layout in LAYOUTS.items()
                 if is_with(keys, r"conv_in\.", layout)), None)


def load(file: TensorFile, found: Identified) -> TemporalFile:
    """Load a file that `detect` has recognised. Raises VideoLDMError if it is damaged."""
    shape = file.shapes[CONV_IN]
    surplus = [key for key in file.shapes if key.startswith("conv_in.") and key not in (CONV_IN, BIAS)]
    if len(shape) != 4 or surplus:
        wrong = f"holds {surplus[0]}" if surplus else f"has a {CONV_IN} of shape {list(shape)}"
        raise VideoLDMError(f"{file.name} looks like {found.title}, but {wrong}. The file is damaged or from an "
                            "unknown variant.")
    further = file.read([CONV_IN])[CONV_IN][:, LATENT_CHANNELS:].clone()
    return load_modules(file, found.kind, facts_for(shape[0]), LAYOUTS[found.kind], changes={CHANGE: further})


FAMILY = Family("PIA for Stable Diffusion 1.x", "temporal", detect, load)
