"""The known frames of one call of the network.

Temporal layers take them as c_S. A network with an input of its own takes them as further channels of its input, behind
the noisy latents. Both are the same for every condition.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ...temporal.conditioning import clips_from_latents, context_input_from_latents, copies_input, masked_input
from ...temporal.errors import VideoLDMError
from ...temporal.params import (
    COPIES,
    ContextParams,
    InputFramesParams,
    PlacedFramesParams,
    SmallFramesParams,
    is_trained,
    listed,
)
from ...temporal.stack import TemporalStack
from .options import CallClips, ContextFrames, LayerSet, clip_options, clips_in_call, layer_sets_in


@dataclass(frozen=True)
class FramesInCall:
    """The known frames of the clips in one call, at their places there."""

    latents: Tensor             # `(k n) c h w`, scaled as the model has them; k is 1 or the number of clips
    positions: list[int]        # n frame numbers within the clips of the call; may be empty


def numbers_in_call(known: ContextFrames, call: CallClips, options: dict) -> list[int]:
    """The frame numbers, within a whole clip, of the frames in this call. A window has some of them."""
    window = options.get("context_window")
    if window is None:
        return list(range(known.frames or call.frames))
    return list(getattr(window, "frames", window.index_list))


def frames_in_call(known: ContextFrames, call: CallClips, options: dict) -> FramesInCall:
    """Those of the known frames that are in this call. None are while context guidance hides them."""
    numbers = numbers_in_call(known, call, options)
    inside = [n for n, position in enumerate(known.positions) if position in numbers]
    if not inside or clip_options(options).hide_context:
        return FramesInCall(known.scaled[:0], [])
    latents = known.scaled.unflatten(0, (-1, len(known.positions)))[:, inside].flatten(0, 1)
    return FramesInCall(latents, [numbers.index(known.positions[n]) for n in inside])


def check_window(takes: ContextParams | InputFramesParams | PlacedFramesParams, inside: FramesInCall, call: CallClips,
                 options: dict) -> None:
    """Refuse a window whose known frames stand where the layers were not trained to have them."""
    if options.get("context_window") is None or clip_options(options).hide_context:
        return
    if not is_trained(takes.positions, set(inside.positions), call.frames):
        places = ", ".join(map(str, sorted(inside.positions))) or "none"
        # Static windows begin and end as clips do, but those in the middle have no known frame either.
        advice = ("Set the schedule of Frame Windows to static, or sample the clip in one window." if inside.positions
                  else "Sample the clip in one window, or make a longer video with Extend Video.")
        raise VideoLDMError(f"In a window of {call.frames} frames the context frames are {places}, and the temporal "
                            f"layers were trained for {listed(takes.positions)}. {advice}")


def check_size(known: ContextFrames, x: Tensor) -> None:
    """Refuse a call for a part of the picture."""
    if tuple(known.scaled.shape[2:]) != tuple(side * known.per_latent for side in x.shape[2:]):
        raise VideoLDMError("A part of the picture is sampled by itself, and the context frames are of the whole "
                            "picture. Remove the area from the conditioning, or the node that works on "
                            "tiles of the picture.")


def context_input(stack: TemporalStack, x: Tensor, options: dict) -> Tensor | None:
    """c_S `(b t) c+1 h w` for layers that take context frames, else None.

    An upscaler's layers take the small frames: the last channels of its input x.
    """
    takes, clip = stack.params.context, clip_options(options)
    if takes is None:
        return None
    if isinstance(takes, SmallFramesParams):
        return x[:, -takes.in_channels:]
    known = clip.context
    if known is None or clip.hide_context:
        if not takes.from_noise and not clip.hide_context:
            raise VideoLDMError("These temporal layers make the frames between context frames, and no context frames "
                                "are connected. Sample with Latent Interpolate x4, or connect Context Frames.")
        return None
    check_size(known, x)
    call = clips_in_call(len(x), options)
    inside = frames_in_call(known, call, options)
    check_window(takes, inside, call, options)
    if not inside.positions:
        return None
    c_s = context_input_from_latents(inside.latents, inside.positions, call.frames, call.clips)
    return c_s.repeat(len(call.parts), 1, 1, 1)


def further_channels(layers: LayerSet, x: Tensor, options: dict) -> Tensor | None:
    """The further channels `(b t) c h w` of the network's input, for noisy latents x. None for other networks."""
    params = layers.params.input_frames
    if params is None:
        return None
    known = check_given(layers, clip_options(options).context)
    check_size(known, x)
    call = clips_in_call(len(x), options)
    if params.form == COPIES:
        keys = known.scaled.unflatten(0, (-1, len(known.positions))).expand(call.clips, -1, -1, -1, -1)
        channels = copies_input(keys, numbers_in_call(known, call, options))
    else:
        inside = frames_in_call(known, call, options)
        check_window(params, inside, call, options)
        clips, mask = clips_from_latents(inside.latents, inside.positions, call.frames, call.clips)
        channels = masked_input(params, clips, mask, known.grey)
    return channels.to(x).repeat(len(call.parts), 1, 1, 1)


def with_further_channels(x: Tensor, channels: Tensor | None) -> Tensor:
    """The input of the network itself, for noisy latents x."""
    return x if channels is None else torch.cat([x, channels], dim=1)


def check_all_given(options: dict) -> None:
    """Refuse a sampling without known frames if a network on the MODEL takes them through its own input."""
    for layers in layer_sets_in(options).values():
        if layers.params.input_frames is not None:
            check_given(layers, clip_options(options).context)


def check_given(layers: LayerSet, known: ContextFrames | None) -> ContextFrames:
    """The known frames. Raises if there are none."""
    if known is not None:
        return known
    if layers.params.remakes_key_frames:
        refuse_copies(layers)
    raise VideoLDMError(f"This MODEL ({layers.title}) is given known frames through its own input, and none are "
                        "connected. Connect Context Frames between this MODEL and the sampler, or use Extend Video.")


def refuse_copies(layers: LayerSet) -> None:
    """Refuse a network that takes a copy of a key frame for every frame, in a node that is not made for it."""
    raise VideoLDMError(f"This MODEL ({layers.title}) makes the frames between key frames. It takes the key frames in "
                        "Latent Interpolate x4 alone: connect it there.")
