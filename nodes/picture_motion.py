"""How far a given picture moves: Picture Motion."""

from ..temporal.picture_input import AFFINITIES, SMALL, PictureMotion
from .host import picture
from .host.api import io
from .host.compat import search_words
from .host.inputs import checked
from .host.sockets import Model


class PictureMotionNode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="VideoLDMPictureMotion",
            display_name="Picture Motion",
            category="video ldm/sample",
            description="Sets how far layers that move a given picture move it: PIA's amount, which also makes loops "
                        "and changes of style, or the motion scale of AnimateLCM image-to-video. Goes between Load "
                        "Temporal Layers and Context Frames or Extend Video. Without this node the amount is small "
                        "and the motion scale 0.8.",
            **search_words("pia", "animatelcm", "image to video", "img2vid", "i2v", "motion magnitude", "affinity",
                           "motion scale", "loop", "style transfer"),
            inputs=[
                io.Model.Input("model", tooltip="A MODEL with PIA's or AnimateLCM's image-to-video layers on it, from "
                                                "Load Temporal Layers."),
                io.Combo.Input("amount", options=list(AFFINITIES), default=SMALL,
                               tooltip="Only for PIA: how far the frames move away from the picture. A loop comes "
                                       "back to the picture in the last of 16 frames. A new style follows the text "
                                       "and the checkpoint more than the picture's own look."),
                io.Float.Input("motion_scale", default=0.8, min=0.0, max=1.5, step=0.05, round=0.01,
                               tooltip="Only for AnimateLCM image-to-video: the factor of the frame numbers. 0.8 is as "
                                       "trained. Less keeps more of the picture; 0 moves least."),
            ],
            outputs=[
                io.Model.Output("model_out", display_name="MODEL", tooltip="For Context Frames or Extend Video."),
                io.String.Output("report", display_name="report", tooltip="What was set for which layers."),
            ],
        )

    @classmethod
    @checked
    def execute(cls, model: Model, amount: str, motion_scale: float) -> io.NodeOutput:
        out = picture.with_picture_motion(model, PictureMotion(amount, motion_scale))
        return io.NodeOutput(out, report_of(model, amount, motion_scale))


def report_of(model: Model, amount: str, motion_scale: float) -> str:
    """What the node sets, a line for each set of layers."""
    lines = []
    for layers in picture.pictures(model):
        name = layers.name or layers.title
        if layers.params.picture is not None and layers.params.picture.affinities:
            values = ", ".join(f"{value:g}" for value in AFFINITIES[amount])
            lines.append(f"{name}: amount '{amount}'. Affinity to the picture by the distance in frames: {values}.")
        else:
            lines.append(f"{name}: motion_scale {motion_scale:g}.")
    return "\n".join(lines)


NODES = [PictureMotionNode]
