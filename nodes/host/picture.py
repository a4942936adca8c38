"""One given picture that temporal layers move: PIA, and AnimateLCM's image-to-video layers.

The picture is the one context frame of the MODEL (context.py). It is not written into the result: these layers make all
frames of the clip, the picture's own too.
"""

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from ...temporal.errors import VideoLDMError
from ...temporal.picture_input import GivenPicture, PictureMotion
from .known_frames import check_size, numbers_in_call
from .options import CallClips, ContextFrames, LayerSet, clip_options, layer_sets, layer_sets_in, transformer_options
from .sockets import Model


def way_of_picture(model: Model) -> str | None:
    """How the layers on MODEL see a picture, as the end of a sentence that begins with it.

    None if no layers take one, or if others take known frames in another way.
    """
    taken = [takes for layers in layer_sets(model) for takes in layers.params.known_frames_inputs]
    ways = dict.fromkeys(layers.params.picture.way for layers in layer_sets(model) if layers.params.picture)
    return " and ".join(ways) if ways and len(taken) == len(pictures(model)) else None


def pictures(model: Model) -> list[LayerSet]:
    """The sets of layers on MODEL that move a picture."""
    return [layers for layers in layer_sets(model) if layers.params.picture is not None]


def check_one_picture(model: Model, positions: Sequence[int]) -> None:
    """Refuse known frames that are not one picture at a place that the layers take."""
    for layers in pictures(model):
        takes = layers.params.picture
        if takes is not None and not takes.fits(positions):
            given = f"frames {', '.join(map(str, positions))} are given" if len(positions) > 1 else (
                f"frame {positions[0]} is given" if positions else "none is given")
            raise VideoLDMError(f"The temporal layers ({layers.title}) move {takes.listed}, and {given}. Set frames to "
                                "0 on Context Frames and give one picture. In Extend Video set overlap to 1.")


def check_picture_given(options: dict) -> None:
    """Refuse a sampling without a picture if layers that act need one. options: the transformer_options."""
    for layers in layer_sets_in(options).values():
        if layers.params.picture is not None and layers.strength != 0:
            given_picture(layers, options)


def given_picture(layers: LayerSet, options: dict) -> ContextFrames:
    """The picture of a sampling. Raises if there is none, or more than one."""
    known = clip_options(options).context
    if known is None or len(known.positions) != 1:
        raise VideoLDMError(f"The temporal layers ({layers.title}) move a given picture, and none is connected. "
                            "Connect Context Frames with one picture between this MODEL and the sampler, or a picture "
                            "to Extend Video.")
    return known


def picture_in_call(layers: LayerSet, x: Tensor, call: CallClips, options: dict) -> GivenPicture | None:
    """The picture in a call of the network on x. None for layers that take none, and while guidance hides it."""
    if layers.params.picture is None or layers.strength == 0 or clip_options(options).hide_context:
        return None
    known = given_picture(layers, options)
    check_size(known, x)
    latents = known.scaled.expand(call.clips, -1, -1, -1).repeat(len(call.parts), 1, 1, 1)
    numbers = numbers_in_call(known, call, options)
    return GivenPicture(latents, known.positions[0] % (known.frames or call.frames), tuple(numbers),
                        known.frames or call.frames, layers.picture_motion)


def check_motion(model: Model, known: ContextFrames) -> None:
    """Refuse settings of Picture Motion that the clips of a sampling do not fit. known: fitted to the sampling."""
    for layers in pictures(model):
        if layers.params.picture is not None and known.frames is not None:
            layers.params.picture.check_motion(layers.picture_motion, known.positions[0], known.frames)


def with_picture_motion(model: Model, motion: PictureMotion) -> Model:
    """A clone on which the layers that move a picture have these settings. Raises if there are none."""
    if not pictures(model):
        raise VideoLDMError("The connected MODEL has no temporal layers that move a given picture, so Picture Motion "
                            "has nothing to set. Load PIA or AnimateLCM's image-to-video file with Load Temporal "
                            "Layers, and connect that MODEL.")
    m = model.clone()
    options = transformer_options(m)
    options.update({key: replace(layers, picture_motion=motion) for key, layers in layer_sets_in(options).items()
                    if layers.params.picture is not None})
    return m
