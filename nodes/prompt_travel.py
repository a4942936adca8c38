"""A prompt that changes along a clip: Prompt Travel."""

from ..temporal import prompt_travel
from ..temporal.prompt_travel import HOLD, LINEAR
from .host.api import io
from .host.compat import search_words
from .host.inputs import checked
from .host.prompt_encoding import encode_texts
from .host.sockets import Clip

EXAMPLE = "0: spring, fresh green leaves\n15: autumn, red leaves"


class PromptTravel(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="VideoLDMPromptTravel",
            display_name="Prompt Travel",
            category="video ldm/sample",
            description="Changes the prompt along a clip. Each line has a frame number and a prompt; between two of "
                        "these key frames the prompt goes over from one to the other, or holds. Gives CONDITIONING "
                        "with a text for each frame, for any sampler, Frame Windows and Extend Video. Takes the prompt "
                        "schedules of FizzNodes (BatchPromptSchedule) and AnimateDiff-Evolved (Prompt Scheduling).",
            **search_words("prompt schedule", "batchpromptschedule", "fizznodes", "animatediff", "travel", "keyframe",
                           "prompt per frame"),
            inputs=[
                io.Clip.Input("clip", tooltip="The CLIP of the image checkpoint, as for CLIP Text Encode."),
                io.String.Input("lines", multiline=True, default=EXAMPLE,
                                tooltip="One line for each key frame: its number, a colon and the prompt. 0 is the "
                                        "first frame, -1 the last. A line that begins with # is a comment. Weights "
                                        "such as (red:1.2) and embedding:name work as in CLIP Text Encode."),
                io.Int.Input("frames", default=16, min=1, max=10000,
                             tooltip="Frames of the clip, as on the sampler; for Extend Video its length. Each frame "
                                     "takes 0.2 MB of memory, with SDXL 0.6 MB."),
                io.Combo.Input("mode", options=[LINEAR, HOLD], default=LINEAR,
                               tooltip="Linear: from one key frame to the next the encoded prompts are mixed, in equal "
                                       "steps. Hold: each prompt stays until the next key frame."),
                io.String.Input("before", multiline=True, default="",
                                tooltip="Text that stands before every prompt. Write its commas yourself."),
                io.String.Input("after", multiline=True, default="",
                                tooltip="Text that stands after every prompt. Write its commas yourself."),
            ],
            outputs=[
                io.Conditioning.Output("conditioning", display_name="CONDITIONING",
                                       tooltip="A text for each frame, for a sampler's positive or negative."),
                io.String.Output("report", display_name="report",
                                 tooltip="Which frame has which prompt, and warnings."),
            ],
        )

    @classmethod
    @checked
    def execute(cls, clip: Clip, lines: str, frames: int, mode: str, before: str, after: str) -> io.NodeOutput:
        keys = prompt_travel.key_frames(lines, frames, before, after)
        texts = prompt_travel.texts_of_frames(keys, frames, mode)
        return io.NodeOutput(encode_texts(clip, texts), prompt_travel.report_of(keys, texts))


NODES = [PromptTravel]
