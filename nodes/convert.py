"""Convert Temporal File."""

from pathlib import Path
from typing import Any

from .host import conversion, files
from .host.api import io
from .host.compat import search_words
from .host.inputs import checked

STEPS = 1000        # of the progress bar


class ConvertTemporalFile(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="VideoLDMConvert",
            display_name="Convert Temporal File",
            category="video ldm/load",
            description="Writes any model file that this pack takes as a new .safetensors file in models/video_ldm. "
                        "The weights stay the same to the bit. The new file loads faster, runs no code, and says what "
                        "it is, who may use it and where it comes from. Of a whole checkpoint the network alone is "
                        "written.",
            **search_words("ckpt to safetensors", "pickle", "model converter", "motion module"),
            is_output_node=True,
            inputs=[
                io.Combo.Input("file", **files.convertible_list(),
                               tooltip="A file in models/video_ldm, in the folders of motion modules and Motion LoRA, "
                                       "in models/vae or an svd checkpoint. Torch files (.pt, .ckpt, .pth, .bin) come "
                                       "first."),
                io.String.Input("name", default="",
                                tooltip="The name of the new file, without folders. Empty: the name of the old one. A "
                                        "file that exists is never written over."),
            ],
            outputs=[
                io.String.Output("name_out", display_name="name", tooltip="The new file's name in models/video_ldm. "
                                                                          "Refresh the page (R) to see it in lists."),
                io.String.Output("report", display_name="report", tooltip="What was written, what was left out, and "
                                                                          "the licence of the weights."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, file: str, **kwargs: Any) -> tuple[int, int]:
        return files.path_fingerprint(files.resolve_convertible(file))

    @classmethod
    @checked
    def execute(cls, file: str, name: str = "") -> io.NodeOutput:
        source = files.resolve_convertible(file)
        step = files.progress(STEPS)
        done = conversion.convert(source, files.new_model_file(name, source), lambda share: step(int(STEPS * share)))
        return io.NodeOutput(Path(done.path).name, conversion.report_of(done))


NODES = [ConvertTemporalFile]
