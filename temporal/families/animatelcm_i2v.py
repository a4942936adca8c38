"""AnimateLCM image-to-video: AnimateLCM's kind of motion modules, and an encoder of a given picture
(docs/formats.md#animatelcm-image-to-video)."""

import re
from collections.abc import Mapping
from dataclasses import replace

from ..errors import VideoLDMError
from ..formats.files import TensorFile
from ..formats.temporal_file import Identified, SamplerHint, Schedule, TemporalFile
from ..formats.tensor_names import Keys
from ..picture_changes import PictureFeatures, require_sites
from ..picture_input import PictureParams
from .animatediff import UNSTATED, facts
from .family import Facts, Family
from .motion_modules import is_with, load_modules

ENCODER, CHANGE = "img_encoder.", "spatial.0."      # names in the file, and of the stack
BLOCK1 = re.compile(r"img_encoder\.body\.(\d+)\.block1\.weight")
TAKES = PictureParams("seen through an encoder of its own", anywhere=False, affinities=False, from_noise=False)
BLOCKS = 2              # of the encoder in each level
MOST_LEVELS = 16        # bound for the levels; the published file has 4


def facts_for(channels: tuple[int, ...]) -> Facts:
    """channels: of the encoder in each level."""
    found = facts(
        "AnimateLCM image-to-video", 16, UNSTATED, schedule=Schedule("sqrt_linear", 0.00085, 0.014), positions=64,
        spatial=(PictureFeatures(channels, blocks=BLOCKS),), picture=TAKES,
        hint=SamplerHint("lcm", "lcm", cfg=(1.0, 2.0), steps=(2, 4)),
        notes=("It moves a given picture, which is frame 0: connect Context Frames with one picture between this MODEL "
               "and the sampler, or Extend Video with overlap 1.",
               "Picture Motion sets its motion_scale: 0.8 is as trained, less keeps more of the picture.",
               "A distilled module: those few steps need AnimateLCM_sd15_i2v_lora on the image model too, at 0.8."))
    return replace(found, title="an AnimateLCM image-to-video file")


def detect(keys: Keys, metadata: Mapping[str, str]) -> Identified | None:
    """Recognise motion modules with an encoder beside them, and nothing of an image model."""
    return facts_for(()).identified("animatelcm_i2v") if is_with(keys, r"img_encoder\.") else None


def load(file: TensorFile, found: Identified) -> TemporalFile:
    """Load a file that `detect` has recognised. Raises VideoLDMError if it is damaged."""
    encoder = [key for key in file.shapes if key.startswith(ENCODER)]
    own = facts_for(channels_of(file, found))
    changes = {CHANGE + key.removeprefix(ENCODER): tensor for key, tensor in file.read(encoder).items()}
    loaded = load_modules(file, found.kind, own, changes=changes)
    change, = own.spatial
    assert isinstance(change, PictureFeatures)
    require_sites(file.name, found.title, change, {site: brick.channels for site, brick in loaded.params.bricks})
    return loaded


def channels_of(file: TensorFile, found: Identified) -> tuple[int, ...]:
    """The encoder's channels in each level. Raises VideoLDMError for blocks that do not make whole levels."""
    blocks = {int(match[1]): sum(file.shapes[key][:1]) for key, match in
              ((key, BLOCK1.fullmatch(key)) for key in file.shapes) if match}
    if not blocks or sorted(blocks) != list(range(len(blocks))) or len(blocks) % BLOCKS or (
            len(blocks) > BLOCKS * MOST_LEVELS) or not all(blocks.values()):
        raise VideoLDMError(f"{file.name} looks like {found.title}, but the blocks of its img_encoder do not make "
                            "whole levels. The file is incomplete: download it again.")
    return tuple(blocks[number] for number in range(0, len(blocks), BLOCKS))


FAMILY = Family("AnimateLCM image-to-video for Stable Diffusion 1.x", "temporal", detect, load)
