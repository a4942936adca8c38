"""Known frames for any Stable Diffusion 1.5 checkpoint with AnimateDiff v3's layers: Load SparseCtrl."""

from typing import Any

from ..temporal.errors import VideoLDMError
from ..temporal.families import listing, load_sparse_control
from ..temporal.families.sparsectrl import LAYERS, SparseControlFile
from ..temporal.layer_strength import LINEAR, Curve, read_curve
from ..temporal.sparse_control import PICTURES
from .host import files, sparse_control
from .host.api import io
from .host.compat import search_words
from .host.image_model import context_dim, model_title, spatial_unet
from .host.inputs import checked
from .host.layer_weights import layer_dtype
from .host.options import layer_sets
from .host.required_layers import require_layers
from .host.sockets import Model
from .layer_strength import in_words


class LoadSparseControl(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="VideoLDMLoadSparseCtrl",
            display_name="Load SparseCtrl",
            category="video ldm/load",
            description="Lets a video model see some frames of the clip: pictures, or sketches. A second network sees "
                        "them at every step, and steers the model as a ControlNet does. Connect the frames with "
                        "Context Frames, or use Extend Video or Latent Interpolate x4. Works on any Stable Diffusion "
                        f"1.5 checkpoint with AnimateDiff v3's temporal layers. Takes {listing('sparse_control')}.",
            **search_words("sparse ctrl", "sparsectrl", "sparse control", "animatediff v3", "picture to video",
                           "image to video", "img2vid", "i2v", "scribble", "sketch", "keyframe", "first frame",
                           "last frame", "controlnet"),
            inputs=[
                io.Model.Input("model", tooltip="A MODEL from Load Temporal Layers: a Stable Diffusion 1.5 checkpoint "
                                                "with AnimateDiff v3's layers."),
                io.Combo.Input("file", **files.loader_list("sparse_control", kind=files.SPARSE_CONTROL),
                               tooltip="A SparseCtrl file in models/controlnet or models/video_ldm."),
                io.Float.Input("strength", default=1.0, min=0.0, max=2.0, step=0.01,
                               tooltip="How much the known frames count in all frames. 1 is as trained. 0 is the MODEL "
                                       "without SparseCtrl, to the bit."),
                io.String.Input("curve", default="1", multiline=True, optional=True,
                                tooltip="Further strengths by frame, from 0 to 2, which multiply with strength. A list "
                                        "such as 1 1 0.5 gives one number to each frame, and the last holds for the "
                                        "rest. Frames with strengths, such as 0: 1, 15: 0.3, are joined to a curve. "
                                        "Frames count from 0. 1 changes nothing."),
                io.Float.Input("start_percent", default=0.0, min=0.0, max=1.0, step=0.001, optional=True,
                               tooltip="The share of the sampling after which it begins to act, as on core's Apply "
                                       "ControlNet. 0: from the first step on."),
                io.Float.Input("end_percent", default=1.0, min=0.0, max=1.0, step=0.001, optional=True,
                               tooltip="The share of the sampling after which it acts no more. 1: to the last step."),
            ],
            outputs=[
                io.Model.Output("model_out", display_name="MODEL",
                                tooltip="For Context Frames, Extend Video or Latent Interpolate x4. Samplers refuse it "
                                        "without known frames."),
                io.String.Output("report", display_name="report", tooltip="What was loaded and how to use it."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, file: str, **kwargs: Any) -> tuple[int, int]:
        return files.fingerprint(file, files.SPARSE_CONTROL)

    @classmethod
    @checked
    def execute(cls, model: Model, file: str, strength: float, curve: str = "1", start_percent: float = 0.0,
                end_percent: float = 1.0) -> io.NodeOutput:
        path = files.resolve(file, files.SPARSE_CONTROL)
        unet = spatial_unet(model)
        require_layers(model)
        loaded = load_sparse_control(path)
        sparse_control.check_model(model, loaded, unet, context_dim(model), model_title(model))
        strengths = read_curve(curve, LINEAR, "no SparseCtrl at all")
        if end_percent <= start_percent:
            raise VideoLDMError(f"SparseCtrl would begin at {start_percent:g} of the sampling and end at "
                                f"{end_percent:g}. Set end_percent above start_percent, or strength to 0 to leave it "
                                "out.")
        shared = (path, *files.fingerprint(file, files.SPARSE_CONTROL))
        network = sparse_control.load_sparse_control(loaded, layer_dtype(model, loaded.dtype), shared)
        params = loaded.params
        settings = sparse_control.SparseSettings(loaded.name, params.sees, params.per_latent, strength, strengths,
                                                 start_percent, end_percent)
        out = sparse_control.attach_sparse_control(model, network, settings)
        return io.NodeOutput(out, report_of(model, loaded, settings, strengths))


def report_of(model: Model, loaded: SparseControlFile, settings: sparse_control.SparseSettings,
              curve: Curve | None) -> str:
    """What the artist should know, one fact a line.

    Args:
        model: the MODEL with its temporal layers.
        loaded: the file.
        settings: the node's.
        curve: the strengths by frame; None: there are none.
    """
    lines = [f"{loaded.name}: {loaded.title}, on {model_title(model)}.",
             f"Trained with {LAYERS}'s layers, on clips of {loaded.params.frames} frames.",
             "It sees sketches: connect them to Context Frames as IMAGE, at the size of the video."
             if settings.sees == PICTURES else
             "It sees pictures. Those that this checkpoint made itself work best.",
             "The frames that it sees are made anew with the others: close to them, and not the same."]
    others = sorted({layers.params.family for layers in layer_sets(model)} - {LAYERS})
    if others:
        lines.insert(2, f"This MODEL has layers of {', '.join(others)}: they run, and may follow the frames less.")
    if settings.strength != 1 or curve is not None and any(value != 1 for _, value in curve.points):
        by_frame = "" if curve is None else f", times {in_words(curve)}"
        lines.append(f"Strength: {settings.strength:g}{by_frame}.")
    if (settings.start, settings.end) != (0, 1):
        lines.append(f"It acts from {settings.start:g} to {settings.end:g} of the sampling.")
    return "\n".join([*lines, f"Licence: {loaded.licence}."])


NODES = [LoadSparseControl]
