"""Layer Strength on a MODEL: how strong its temporal layers are in each frame and region.

The settings are in the LayerSet of each set of layers. When sampling starts, they become a map with a row for each
image. Frame Windows and Video Upscale cut it for their pieces, and the layers' wrapper reads it in every call.
"""

from dataclasses import replace
from typing import Any

from torch import Tensor

from ...temporal.errors import VideoLDMError
from ...temporal.layer_strength import FrameStrength, acting_images
from . import notes
from .options import CallClips, LayerSet, VideoFrames, clip_options, layer_sets, layer_sets_in, transformer_options
from .sockets import Model


def with_layer_strength(model: Model, strength: FrameStrength) -> Model:
    """A clone whose temporal layers have further strengths. They multiply with those that the MODEL has already."""
    for layers in layer_sets(model):
        if layers.network:
            raise VideoLDMError(f"The connected MODEL ({layers.title}) is a whole video network. Its spatial layers "
                                "were trained together with its temporal layers, so it has no image model that a "
                                "frame could stay. Layer Strength takes layers of Load Temporal Layers.")
    m = model.clone()
    options = transformer_options(m)
    options.update({key: replace(layers, by_frame=(*layers.by_frame, strength))
                    for key, layers in layer_sets_in(options).items()})
    return m


def fix_strengths(options: dict, images: int, frames: int, size: tuple[int, ...]) -> None:
    """Make the maps of a sampling, in its own transformer_options. Sets that have a map keep it.

    Args:
        options: the transformer_options.
        images: of the batch.
        frames: of a clip.
        size: height and width of the latents.
    """
    for key, layers in layer_sets_in(options).items():
        if layers.by_frame and layers.strengths is None:
            warn_of_frames_beyond(layers, video_frames(options, images, frames))
            found = strengths_of(layers, options, images, frames, size)
            options[key] = replace(layers, strengths=found, acting=acting_images(found))


def video_frames(options: dict, images: int, frames: int) -> VideoFrames:
    """Which frames of which video the images of a batch are."""
    return clip_options(options).video or VideoFrames(tuple(image % frames for image in range(images)), frames)


def strengths_of(layers: LayerSet, options: dict, images: int, frames: int, size: tuple[int, ...]) -> Tensor:
    """The map of a set of layers, `images h w` or `images 1 1`. Arguments as in fix_strengths."""
    video = video_frames(options, images, frames)
    product: Any = 1
    for strength in layers.by_frame:
        strength.check(video.length, size)
        product = product * strength.of(video.numbers, size)
    return product


def warn_of_frames_beyond(layers: LayerSet, video: VideoFrames) -> None:
    """Warn where a curve names a frame that the video does not have. A video made in several calls warns once."""
    for strength in layers.by_frame:
        curve = strength.curve
        if curve is not None and curve.last >= video.length and 0 in video.numbers:
            notes.warn(f"Layer Strength names frame {curve.last}, and the last frame of the video is "
                       f"{video.length - 1}: its curve is cut there. Frames count from 0.")


def strengths_in_call(layers: LayerSet, x: Tensor, clips: CallClips, options: dict) -> Tensor | None:
    """The map for one call of the network on x, `(b t) h w` or `(b t) 1 1`. None: the same strength everywhere."""
    if not layers.by_frame:
        return None
    images, size = clips.clips * clips.frames, tuple(x.shape[2:])
    found = layers.strengths
    if found is None:       # outside of core's sampling
        found = strengths_of(layers, options, images, clips.frames, size)
    if len(found) != images:
        raise VideoLDMError(f"Layer Strength has strengths for {len(found)} images, and a node of the graph samples "
                            f"{images} of them by themselves. Remove that node, or Layer Strength.")
    if found.shape[1:] not in ((1, 1), size):
        raise VideoLDMError("An area on the CONDITIONING, or a node that works on tiles, samples a part of the picture "
                            "by itself, and Layer Strength has a mask of the whole picture. Remove that area or node, "
                            "or the mask.")
    return found.repeat(len(clips.parts), 1, 1)


def acting_in_call(layers: LayerSet, clips: CallClips) -> Tensor | None:
    """Which images of a call have strength somewhere in the whole picture, `(b t)`. None: the map of the call says."""
    return None if layers.acting is None else layers.acting.repeat(len(clips.parts))


def cut_frames(options: dict, window: Any) -> dict:
    """The LayerSets of transformer_options that change in a window, by key. window: as Selection in windows.py."""
    return {key: replace(layers, strengths=window.of(layers.strengths), acting=window.of(layers.acting))
            for key, layers in layer_sets_in(options).items()
            if layers.strengths is not None and layers.acting is not None}


def cut_tile(options: dict, rows: slice, columns: slice) -> dict:
    """Transformer_options for a tile of the picture."""
    tiles = {key: replace(layers, strengths=layers.strengths[:, rows, columns])
             for key, layers in layer_sets_in(options).items()
             if layers.strengths is not None and layers.strengths.shape[1:] != (1, 1)}
    return {**options, **tiles}
