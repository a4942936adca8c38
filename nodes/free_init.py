"""Sampling a clip several times for steadier motion: FreeInit."""

from ..temporal.free_init import FILTERS
from .host import free_init
from .host.api import io
from .host.compat import search_words
from .host.inputs import checked
from .host.required_layers import require_layers
from .host.sockets import Model


class FreeInit(io.ComfyNode):
    """The defaults are those of the authors' program (docs/papers.md#freeinit)."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="VideoLDMFreeInit",
            display_name="FreeInit",
            category="video ldm/sample",
            description="Steadier video, less flicker: samples each clip several times. Every time begins with the low "
                        "frequencies of the last result and new noise for the rest. It takes as many times longer. "
                        "Goes between Load Temporal Layers and any sampler.",
            **search_words("flicker", "consistency", "animatediff", "iteration options"),
            inputs=[
                io.Model.Input("model", tooltip="A MODEL from Load Temporal Layers."),
                io.Int.Input("iterations", default=3, min=1, max=20,
                             tooltip="How often a clip is sampled. 1 is as without this node. The authors advise 3 to "
                                     "5."),
                io.Combo.Input("filter", options=list(FILTERS), default="butterworth",
                               tooltip="Which frequencies of the last result are kept. Butterworth: the authors' "
                                       "choice. Gaussian: fades wider, for layers that flicker much. Ideal: all below "
                                       "the stop frequency and none above."),
                io.Float.Input("stop_space", default=0.25, min=0.0, max=1.0, step=0.05, round=0.001,
                               tooltip="The stop frequency in height and width (d_s): more keeps finer shapes of the "
                                       "last result. 1 is the finest pattern of the latent; 0 keeps nothing."),
                io.Float.Input("stop_time", default=0.25, min=0.0, max=1.0, step=0.05, round=0.001,
                               tooltip="The stop frequency in time (d_t): more keeps faster motion of the last "
                                       "result. 0 keeps nothing."),
                io.Int.Input("order", default=4, min=1, max=64,
                             tooltip="How steep the Butterworth filter is (n)."),
            ],
            outputs=[io.Model.Output("model_out", display_name="MODEL",
                                     tooltip="For Video LDM Sampler, KSampler, Extend Video or any other sampler.")],
        )

    @classmethod
    @checked
    def execute(cls, model: Model, iterations: int, filter: str, stop_space: float, stop_time: float,
                order: int) -> io.NodeOutput:
        require_layers(model)
        settings = free_init.FreeInit(iterations, filter, stop_space, stop_time, order)
        return io.NodeOutput(free_init.with_free_init(model, settings))


NODES = [FreeInit]
