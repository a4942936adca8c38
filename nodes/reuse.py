"""Fewer calls of the temporal layers: Reuse Temporal Layers."""

from ..temporal.errors import VideoLDMError
from ..temporal.reuse import MOST_REUSED
from .host import reuse
from .host.api import io
from .host.compat import search_words
from .host.inputs import checked
from .host.required_layers import require_layers
from .host.sockets import Model


class ReuseTemporalLayers(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="VideoLDMReuseLayers",
            display_name="Reuse Temporal Layers",
            category="video ldm/sample",
            description="Faster sampling: the temporal layers (the motion module) rest in some steps, and what they "
                        "added in the step before is added again. The image model runs in every step. Goes between "
                        "Load Temporal Layers and any sampler.",
            **search_words("speed", "faster", "cache", "teacache", "pyramid attention broadcast", "animatediff"),
            inputs=[
                io.Model.Input("model", tooltip="A MODEL from Load Temporal Layers or Load Video Model."),
                io.Int.Input("steps", default=1, min=0, max=MOST_REUSED,
                             tooltip="How many steps use again what one step has kept. 1: the layers run in every "
                                     "second step. More is faster and less exact. 0 is off, and exactly as without "
                                     "this node."),
                io.Float.Input("start_percent", default=0.0, min=0.0, max=1.0, step=0.01, round=0.001,
                               tooltip="Where in the sampling the layers begin to rest. 0 is its start. The first "
                                       "step always runs them."),
                io.Float.Input("end_percent", default=1.0, min=0.0, max=1.0, step=0.01, round=0.001,
                               tooltip="Where the layers run in every step again. 1 is the end of the sampling."),
            ],
            outputs=[
                io.Model.Output("model_out", display_name="MODEL",
                                tooltip="For Frame Windows, Context Frames, Video LDM Sampler, KSampler or any other."),
                io.String.Output("report", display_name="report", tooltip="What is kept, and its memory."),
            ],
        )

    @classmethod
    @checked
    def execute(cls, model: Model, steps: int, start_percent: float, end_percent: float) -> io.NodeOutput:
        require_layers(model)
        if start_percent >= end_percent:
            raise VideoLDMError(f"start_percent is {start_percent:g} and end_percent is {end_percent:g}, so the range "
                                "is empty. Set end_percent above start_percent.")
        return io.NodeOutput(reuse.with_reuse(model, steps, start_percent, end_percent),
                             report_of(model, steps, start_percent, end_percent))


def report_of(model: Model, steps: int, start: float, end: float) -> str:
    """What the node does, one fact a line."""
    if not steps:
        return "Off: the temporal layers run in every step."
    rest = "1 step rests" if steps == 1 else f"{steps} steps rest"
    frame = reuse.bytes_per_frame(model) / 1e6
    return (f"Where the layers have run, the next {rest}, from {100 * start:g} % to {100 * end:g} % of the sampling.\n"
            f"While it samples, {frame:.0f} MB are kept for each frame of 512x512 and each condition: "
            f"{32 * frame / 1e3:.1f} GB for 16 frames with a negative text. Each window keeps its own.\n"
            "On a GPU with too little memory left they wait in the computer's memory.")


NODES = [ReuseTemporalLayers]
