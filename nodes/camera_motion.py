"""A camera that moves as the artist says, on AnimateDiff v3's layers: Camera Motion."""

from typing import Any

from ..temporal.camera_path import PRESETS, path_of
from ..temporal.families import listing, load_camera
from ..temporal.families.cameractrl import LAYERS, CameraFile
from .host import camera, files
from .host.api import io
from .host.compat import search_words
from .host.image_model import model_title, spatial_unet
from .host.inputs import checked
from .host.layer_weights import layer_dtype
from .host.options import layer_sets
from .host.required_layers import require_layers
from .host.sockets import Model


class CameraMotion(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="VideoLDMCameraMotion",
            display_name="Camera Motion",
            category="video ldm/load",
            description="Moves the camera: pan, tilt, roll, orbit, forward and back, or a path of your own. For any "
                        "Stable Diffusion 1.5 checkpoint with AnimateDiff v3's temporal layers; goes between Load "
                        f"Temporal Layers and the sampler. Takes {listing('camera')}.",
            **search_words("cameractrl", "camera control", "camera move", "pan", "tilt", "zoom", "dolly", "orbit",
                           "pose", "trajectory", "realestate10k", "animatediff v3", "motion"),
            inputs=[
                io.Model.Input("model", tooltip="A MODEL from Load Temporal Layers: a Stable Diffusion 1.5 checkpoint "
                                                "with AnimateDiff v3's layers."),
                io.Combo.Input("file", **files.loader_list("camera"),
                               tooltip="A CameraCtrl file in models/video_ldm or models/animatediff_models."),
                io.Combo.Input("move", options=list(PRESETS), default="move forward",
                               tooltip="A move from the first frame of the video to its last. It counts where poses is "
                                       "empty."),
                io.Float.Input("amount", default=1.0, min=0.0, max=3.0, step=0.05, round=0.01,
                               tooltip="How far the move goes. 1 is 30 degrees for pan, roll and orbit, 20 for tilt, "
                                       "1.5 times for a zoom, and one unit for the other moves. The cameras of the "
                                       "authors' examples go 0.6 to 2.8 units."),
                io.Float.Input("strength", default=1.0, min=0.0, max=2.0, step=0.01,
                               tooltip="How much the layers follow the camera. 1 is as trained. 0 is the MODEL without "
                                       "this node, to the bit."),
                io.String.Input("poses", default="", multiline=True, optional=True,
                                tooltip="A path of your own in place of move: frames with what the camera has done by "
                                        "then, such as 0: pan 0 and 15: pan 30, forward 1, a line each. Frames count "
                                        "from 0; -1 is the last. Words: pan, tilt, roll, orbit (degrees), right, left, "
                                        "up, down, forward, back, zoom. Or the lines of a RealEstate10K pose file, "
                                        "one for each frame."),
            ],
            outputs=[
                io.Model.Output("model_out", display_name="MODEL",
                                tooltip="For Frame Windows, Video LDM Sampler, KSampler or any other."),
                io.String.Output("report", display_name="report", tooltip="What was loaded and how the camera moves."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, file: str, **kwargs: Any) -> tuple[int, int]:
        return files.fingerprint(file)

    @classmethod
    @checked
    def execute(cls, model: Model, file: str, move: str, amount: float, strength: float,
                poses: str = "") -> io.NodeOutput:
        path = files.resolve(file)
        spatial_unet(model)
        require_layers(model)
        cameras, in_words = path_of(move, amount, poses)
        loaded = load_camera(path)
        layers = camera.steered_layers(model, loaded)
        control = camera.load_network(loaded, layer_dtype(model, loaded.dtype), (path, *files.fingerprint(file)))
        settings = camera.CameraSettings(loaded.name, layers, control, cameras, strength)
        return io.NodeOutput(camera.attach_camera(model, settings), report_of(model, loaded, settings, in_words))


def report_of(model: Model, loaded: CameraFile, settings: camera.CameraSettings, in_words: str) -> str:
    """What the artist should know, one fact a line.

    Args:
        model: the MODEL with its temporal layers.
        loaded: the file.
        settings: the node's.
        in_words: the camera's path.
    """
    steered = camera.layers_of(model, settings.layers)
    lines = [f"{loaded.name}: {loaded.title}, on {model_title(model)}.",
             f"Camera: {in_words}."]
    if steered.params.family != LAYERS:
        lines.append(f"It steers {steered.name or steered.title}. It was trained with {LAYERS}'s layers.")
    others = [layers.name or layers.title for layers in layer_sets(model) if layers is not steered]
    if others:
        lines.append(f"It steers {steered.name or steered.title} alone, and not {', '.join(others)}.")
    if "zoom" in in_words:
        lines.append("The lens changes. In its training clips it never did: forward and back are surer.")
    lines.append("Off: strength is 0." if settings.strength == 0 else
                 f"Strength {settings.strength:g}. Its authors sample {loaded.params.frames} frames of 384x256 with "
                 "cfg 14 and 25 steps.")
    lines.append(f"At most {loaded.params.frames} frames in one call: more need Frame Windows with that length.")
    return "\n".join([*lines, f"Licence: {loaded.licence}."])


NODES = [CameraMotion]
