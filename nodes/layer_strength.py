"""How strong the temporal layers are in each frame and region: Layer Strength."""

import torch

from ..temporal.errors import VideoLDMError
from ..temporal.layer_strength import HOLD, LINEAR, Curve, FrameStrength, read_curve
from ..temporal.reference_attention import KNOWN_ATTENTION
from ..temporal.spatial_changes import POOLED_NORMS
from .host import layer_strength
from .host.api import io
from .host.compat import search_words
from .host.inputs import checked
from .host.options import layer_sets
from .host.sockets import Model

ALL_NAMED = 16      # the report lists the strength of each frame of a list up to this length


class LayerStrength(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="VideoLDMLayerStrength",
            display_name="Layer Strength",
            category="video ldm/sample",
            description="Sets how strong the temporal layers (the motion module) are in each frame and in each region: "
                        "a list, a curve over the frames, or a mask. Frames of strength 0 stay the image model's. For "
                        "motion that fades in or out, less motion in a part of the picture, and what other packs "
                        "call effect multival. Works in Frame Windows, Extend Video and with any sampler.",
            **search_words("multival", "effect multival", "animatediff", "motion scale", "motion strength", "keyframe",
                           "curve"),
            inputs=[
                io.Model.Input("model", tooltip="A MODEL from Load Temporal Layers. All temporal layers that are on it "
                                                "get these strengths, multiplied with the strength that they have."),
                io.String.Input("curve", default="1", multiline=True,
                                tooltip="The strength in each frame, from 0 to 2; 1 is as trained. A list such as 0 "
                                        "0.2 1 gives one number to each frame, and the last holds for the rest. Frames "
                                        "with strengths, such as 0: 0.2, 15: 1, are joined to a curve. Frames count "
                                        "from 0. 1 changes nothing, for a mask alone."),
                io.Combo.Input("interpolation", options=[LINEAR, HOLD], default=LINEAR,
                               tooltip="Between the frames that the curve names. Linear: a straight line. Hold: each "
                                       "strength stays until the next frame that is named."),
                io.Mask.Input("mask", optional=True,
                              tooltip="The strength in each region: white is full strength, black is none. One picture "
                                      "for all frames, or one for each. It multiplies with the curve."),
            ],
            outputs=[
                io.Model.Output("model_out", display_name="MODEL",
                                tooltip="For Frame Windows, Context Frames, Video LDM Sampler, KSampler or any other."),
                io.String.Output("report", display_name="report", tooltip="The strength of each frame in words."),
            ],
        )

    @classmethod
    @checked
    def execute(cls, model: Model, curve: str, interpolation: str, mask: torch.Tensor | None = None) -> io.NodeOutput:
        if not layer_sets(model):
            raise VideoLDMError("The connected MODEL has no temporal layers, so there is nothing to weaken or "
                                "strengthen. Connect Layer Strength after Load Temporal Layers.")
        found = read_curve(curve, interpolation)
        if found is None and mask is None:
            raise VideoLDMError("Layer Strength has an empty curve and no mask. Write a curve, such as 0: 0.2, 15: 1, "
                                "or connect a mask.")
        if mask is not None and not mask.any():
            raise VideoLDMError("The mask of Layer Strength is black everywhere, which would leave the temporal layers "
                                "out. Load Image gives such a mask for a picture without transparency. Connect another "
                                "mask, or invert it.")
        out = layer_strength.with_layer_strength(model, FrameStrength(found, mask))
        return io.NodeOutput(out, report_of(model, found, mask))


def report_of(model: Model, curve: Curve | None, mask: torch.Tensor | None) -> str:
    """What the node does, one fact a line."""
    lines = [] if curve is None else [f"Strength: {in_words(curve)}."]
    if mask is not None:
        count, height, width = mask.shape
        pictures = "one picture for all frames" if count == 1 else f"{count} pictures, one for each frame"
        lines.append(f"Mask: {pictures}, {width}x{height}, {100 * mask.mean():.0f} % white on average.")
    for layers in layer_sets(model):
        more = " and with an earlier Layer Strength" if layers.by_frame else ""
        lines.append(f"It multiplies with the strength {layers.strength:g} of {layers.name or layers.title}{more}.")
    if curve is not None and any(strength == 0 for _, strength in curve.points):
        lines.append("Frames of strength 0 are the image model's own pictures.")
    if mask is not None:
        lines.append("In black regions the layers add nothing. The image model's attention still mixes regions.")
    changes = {change for layers in layer_sets(model) for change in layers.params.spatial}
    if POOLED_NORMS in changes:
        lines.append("These layers also change the image model's norms: wholly in frames with any strength, and not at "
                     "all in frames of strength 0.")
    if any(layers.params.picture for layers in layer_sets(model)):
        lines.append("These layers also see the given picture: wholly in frames with any strength, and not at all in "
                     "frames of strength 0.")
    if KNOWN_ATTENTION in changes:
        lines.append("With Context Frames every frame needs a strength above 0.")
    return "\n".join(lines)


def in_words(curve: Curve) -> str:
    """The strengths, as the middle of a sentence."""
    (first, strength), *others = curve.points
    if not others:
        return f"{strength:g} in every frame"
    if curve.points == tuple((n, value) for n, (_, value) in enumerate(curve.points)):
        shown = ", ".join(f"{value:g}" for _, value in curve.points[:ALL_NAMED])
        shown += ", ..." if len(curve.points) > ALL_NAMED else ""
        return f"{shown} in frames 0 to {curve.last}, and {curve.points[-1][1]:g} in all later frames"
    text = f"{strength:g} {'at frame 0' if first == 0 else f'up to frame {first}'}"
    for frame, value in others:
        if curve.interpolation == HOLD:
            text += f", {value:g} from frame {frame}"
        elif value == strength:
            text += f", the same up to frame {frame}"
        else:
            text += f", {'rising' if value > strength else 'falling'} to {value:g} at frame {frame}"
        strength = value
    return text + (" on" if curve.interpolation == HOLD else ", and the same in all later frames")


NODES = [LayerStrength]
