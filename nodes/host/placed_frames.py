"""Known frames in the input of the image model, for layers that were trained to find them there (MuseV, makeavid-sd).

They are put in where the network itself is called. Wrappers of other nodes see the noisy latents alone.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from ...temporal.conditioning import clips_from_latents
from ...temporal.params import HINT, StackParams
from .known_frames import check_size, check_window, frames_in_call
from .options import ContextFrames, LayerSet, clip_options, clips_in_call
from .sockets import Model

LATENTS, MASKED = 4, 9      # input channels of Stable Diffusion 1.x, and of its inpainting model
Place = Callable[[Tensor, Tensor | None], Tensor]     # (input of the network, images to place in) -> input


def is_inpainting(model: Model) -> bool:
    """Whether the network of a MODEL takes a mask and a picture beside the noisy latents."""
    return model.model.diffusion_model.input_blocks[0][0].in_channels == MASKED


def params_on(model: Model, params: StackParams) -> StackParams:
    """The params of layers on this MODEL. A hint needs the channels of an inpainting model."""
    takes = params.placed_frames
    if takes is not None and takes.form == HINT and not is_inpainting(model):
        return replace(params, placed_frames=None)
    return params


def report(params: StackParams, model: Model) -> list[str]:
    """What the artist should know about the known frames of layers on this MODEL, one fact a line."""
    takes = params.placed_frames
    if takes is None or takes.form != HINT:
        return []
    if is_inpainting(model):
        return ["This MODEL is an inpainting model. Give it the first frame with Context Frames, frames 0: it then "
                "sees that frame in every frame, as in training. Without Context Frames it sees what an inpainting "
                "model sees, and the layers were not trained so."]
    return ["This MODEL is no inpainting model. The layers act on it, but it sees no first frame, and in training it "
            "always did. Context Frames holds a frame by a noise mask here."]


def placed(layers: LayerSet, x: Tensor, options: dict) -> tuple[tuple[int, ...], Place | None]:
    """(numbers of the frames without noise in each clip, how to place frames in the input). None: nothing is placed."""
    takes, known = layers.params.placed_frames, clip_options(options).context
    if takes is None or known is None or clip_options(options).hide_context:
        return (), None
    check_size(known, x)
    call = clips_in_call(len(x), options)
    if takes.form == HINT:
        return (), hint(known, call.clips, call.frames, len(call.parts))
    inside = frames_in_call(known, call, options)
    check_window(takes, inside, call, options)
    clips, mask = clips_from_latents(inside.latents, inside.positions, call.frames, call.clips)
    return tuple(inside.positions), in_place(clips.flatten(0, 1).repeat(len(call.parts), 1, 1, 1),
                                             mask.flatten().repeat(len(call.parts)))


def in_place(frames: Tensor, mask: Tensor) -> Place:
    """IN_PLACE: the frames `(b t) c h w` stand in the input where the mask `(b t)` is 1."""
    def place(x: Tensor, images: Tensor | None) -> Tensor:
        chosen = mask.to(x.device) == 1
        if images is not None:
            chosen = chosen & images.to(x.device)
        latents = torch.where(chosen[:, None, None, None], frames.to(x), x[:, :frames.shape[1]])
        return torch.cat([latents, x[:, frames.shape[1]:]], dim=1)
    return place


def hint(known: ContextFrames, clips: int, frames: int, parts: int) -> Place:
    """HINT: the mask is 0, and the picture beside it is the first frame, in every frame.

    Args:
        known: the known frames.
        clips: in one part of the batch.
        frames: of a clip.
        parts: of the batch, one for each condition.
    """
    first = known.scaled.unflatten(0, (-1, len(known.positions)))[:, known.positions.index(0)]
    pictures = first.expand(clips, -1, -1, -1).repeat_interleave(frames, dim=0).repeat(parts, 1, 1, 1)
    channels = torch.cat([torch.zeros_like(pictures[:, :1]), pictures], dim=1)

    def place(x: Tensor, images: Tensor | None) -> Tensor:
        given = channels.to(x)
        if images is not None:
            given = torch.where(images.to(x.device)[:, None, None, None], given, x[:, LATENTS:])
        return torch.cat([x[:, :LATENTS], given], dim=1)
    return place
