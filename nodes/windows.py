"""More frames than the temporal layers were trained on: Frame Windows."""

from ..temporal.clip_length import check_clip_length, clip_limit
from ..temporal.errors import VideoLDMError
from ..temporal.params import StackParams
from ..temporal.schedules import FUSES, SCHEDULES
from .host import windows
from .host.api import io
from .host.compat import search_words
from .host.inputs import checked
from .host.options import layer_sets
from .host.sockets import Model

WINDOWS, CONVOLUTION = "windows", "convolution in time"


class FrameWindows(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="VideoLDMFrameWindows",
            display_name="Frame Windows",
            category="video ldm/sample",
            description="Samples clips of more frames than the temporal layers were trained on. Windows: overlapping "
                        "pieces of the trained length are joined in every step, in the memory of one window. "
                        "Convolution in time: all frames are sampled at once, and each attends to its neighbours only. "
                        "Goes between Load Temporal Layers and any sampler. The sampler may then make more frames.",
            **search_words("context options", "context window", "sliding window", "longer", "long video", "infinite",
                           "loop", "animatediff"),
            inputs=[
                io.Model.Input("model", tooltip="A MODEL from Load Temporal Layers."),
                io.Combo.Input("mode", options=[WINDOWS, CONVOLUTION], default=WINDOWS,
                               tooltip="Windows: works with all layers, in the memory of one window. Convolution in "
                                       "time: the paper's way for Video LDM layers, all frames in memory at once."),
                io.Int.Input("length", default=0, min=0, max=4096,
                             tooltip="Windows: frames of one window. 0 is the length that the layers were trained on, "
                                     "which is best. A clip that fits one window is sampled as without this node."),
                io.Int.Input("overlap", default=4, min=0, max=4095,
                             tooltip="Windows: the least number of frames that neighbouring windows share. More is "
                                     "smoother and slower. A quarter to half of the length is usual."),
                io.Combo.Input("schedule", options=list(SCHEDULES), default="static",
                               tooltip="Windows: static windows are the same in every step. Shifting windows move from "
                                       "step to step, which hides seams. Looped windows shift too, and the last frame "
                                       "leads on to the first."),
                io.Combo.Input("fuse", options=list(FUSES), default="pyramid",
                               tooltip="Windows: how a frame of several windows is averaged. Pyramid: the middle of a "
                                       "window counts most. Ramp: windows fade within the overlap alone. Flat: all "
                                       "count the same."),
                io.Int.Input("max_distance", default=8, min=1, max=4096,
                             tooltip="Convolution in time: how many frames away attention over time reaches. The "
                                     "paper's is 8, for layers trained on 8 frames."),
            ],
            outputs=[io.Model.Output("model_out", display_name="MODEL",
                                     tooltip="For Video LDM Sampler, KSampler or any other, with more frames.")],
        )

    @classmethod
    @checked
    def execute(cls, model: Model, mode: str, length: int, overlap: int, schedule: str, fuse: str,
                max_distance: int) -> io.NodeOutput:
        layers = [found.params for found in layer_sets(model)]
        if not layers:
            raise VideoLDMError("The connected MODEL has no temporal layers, so there are no clips to sample in "
                                "windows. Connect Frame Windows after Load Temporal Layers.")
        if mode == CONVOLUTION:
            check_convolution(layers)
            return io.NodeOutput(windows.without_windows(model, max_distance))
        length = length or min(params.frames for params in layers)
        check_windows(layers, length, overlap)
        return io.NodeOutput(windows.with_windows(model, windows.FrameWindows(length, overlap, schedule, fuse)))


def check_windows(layers: list[StackParams], length: int, overlap: int) -> None:
    """Refuse windows that overlap by their whole length, or that the layers cannot run."""
    if overlap >= length:
        raise VideoLDMError(f"Windows of {length} frames cannot overlap by {overlap}. Set overlap below {length}.")
    for params in layers:
        check_clip_length(params, length, "a window has", "Set length to {limit}.")


def check_convolution(layers: list[StackParams]) -> None:
    """Refuse layers with weights for each frame number. A convolution in time has the same weights at every frame."""
    for limit in filter(None, map(clip_limit, layers)):
        if limit.exactly:
            raise VideoLDMError(f"{limit.reason}, so they cannot be convolved in time. Choose the mode windows.")


NODES = [FrameWindows]
