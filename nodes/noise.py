"""The noise of a clip for core's SamplerCustomAdvanced: Frame Noise."""

from .host.api import io
from .host.compat import search_words
from .host.frame_noise import frame_noise
from .host.inputs import checked
from .host.sampler_inputs import noise_inputs
from .host.sockets import Model


class FrameNoise(io.ComfyNode):
    """The formulas and the papers are in temporal/noise.py."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="VideoLDMFrameNoise",
            display_name="Frame Noise",
            category="video ldm/sample",
            description="The noise that a clip begins with, for SamplerCustomAdvanced: own for each frame, one for all "
                        "frames (constant), mixed, FreeNoise for long video in windows, or repeated in each window "
                        "(repeated context). Video LDM Sampler has the same kinds, and gives the same noise for the "
                        "same seed.",
            **search_words("freenoise", "noise", "animatediff", "shared noise", "noise type", "consistent"),
            inputs=[
                io.Int.Input("seed", default=0, min=0, max=0xffffffffffffffff, control_after_generate=True,
                             tooltip="The same seed gives the same noise."),
                *noise_inputs(optional=False),
                io.Int.Input("frames", default=0, min=0, max=4096,
                             tooltip="Frames of one clip. Each clip of a batch has noise of its own. 0: the frames per "
                                     "clip that are set on the MODEL, else all frames of the latent are one clip."),
                io.Int.Input("window_length", default=0, min=0, max=4096,
                             tooltip="FreeNoise and repeated noise: frames of one window. 0: that of Frame Windows on "
                                     "the MODEL."),
                io.Int.Input("window_overlap", default=4, min=0, max=4095,
                             tooltip="FreeNoise: frames that neighbouring windows share. Not used where window_length "
                                     "is 0: then that of Frame Windows counts."),
                io.Model.Input("model", optional=True,
                               tooltip="The MODEL that is sampled, with Frame Windows on it. Its windows and its "
                                       "frames per clip count where these are 0 here."),
            ],
            outputs=[io.Noise.Output("noise_out", display_name="NOISE",
                                     tooltip="For SamplerCustomAdvanced, in place of RandomNoise.")],
        )

    @classmethod
    @checked
    def execute(cls, seed: int, noise: str, noise_mix: float, frames: int, window_length: int, window_overlap: int,
                model: Model | None = None) -> io.NodeOutput:
        return io.NodeOutput(frame_noise(seed, noise, noise_mix, model, frames, window_length, window_overlap))


NODES = [FrameNoise]
