"""Scene Layout: boxes and labels as CONDITIONING."""

from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw

from ..temporal.errors import VideoLDMError
from ..temporal.families import load_layout
from ..temporal.formats.scene_layout_file import LayoutFile
from ..temporal.scene_layout import NOT_SAID, Layout
from .box_colours import paint, paints
from .box_lines import colour_remarks, parse_boxes
from .host import files, layout_conditioning
from .host.api import io
from .host.compat import search_words
from .host.inputs import checked
from .host.sockets import Conditioning
from .host.texts import other_width

DEMO_FILE = "video_ldm_driving_layout.safetensors"
ANY = "any"
EXAMPLE = "# x y width height colour\n0.61 0.46 0.13 0.19 red\n0.27 0.46 0.12 0.17 blue"
PREVIEW = 512           # pixels of the preview's longer side
GROUNDS = {"day": (128, 132, 128), "night": (32, 34, 44)}       # the preview's background


class Boxes(io.String.Input):
    """The text of the boxes. It tells the page what each layout file knows: web/js/scene_layout.js draws with it."""

    def as_dict(self) -> dict:
        knowledge = {name: {"most_boxes": most, "colours": paints(colours)}
                     for name, (colours, most) in files.layout_limits().items()}
        return super().as_dict() | {"layout_files": knowledge}


class SceneLayout(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="VideoLDMSceneLayout",
            display_name="Scene Layout",
            category="video ldm/sample",
            description="Sets what is where in a picture: a box and a colour for each car, day or night, and how "
                        "crowded the road is. Connect positive and negative to a sampler of the image model that the "
                        "file was trained on. The picture can be the start of a drive for Extend Video.",
            **search_words("boxes", "bounding box", "bbox", "regional", "draw", "gligen", "driving"),
            inputs=[
                io.Combo.Input("file", **files.loader_list("layout", DEMO_FILE),
                               tooltip="A scene layout file in models/video_ldm, or the bundled one of the demo."),
                Boxes("boxes", multiline=True, default=EXAMPLE,
                      tooltip="Draw the boxes in the picture below with the mouse, or write them, one per line: x y "
                              "width height colour. The numbers are fractions of the picture, from 0 to 1; x and y are "
                              "the box's upper left corner. A file knows a few colours and a largest number of boxes: "
                              "the bundled one at most three boxes, red, blue, yellow, white or green. A colour such "
                              "as #2454dc stands for the nearest of these. A # after the colour begins a comment. "
                              "Write none for no cars. Leave it empty to let cars stand anywhere."),
                io.Combo.Input("light", options=[ANY, "day", "night"], default="day",
                               tooltip="The time of day; any leaves it open."),
                io.Combo.Input("crowdedness", options=[ANY, "empty", "quiet", "busy"], default=ANY,
                               tooltip="Cars on the road, also those out of sight: empty is none, quiet one, busy "
                                       "more. Any leaves it open."),
                io.Int.Input("width", default=128, min=16, max=16384, step=8,
                             tooltip="Width of the picture. Only the preview's shape depends on it."),
                io.Int.Input("height", default=64, min=16, max=16384, step=8,
                             tooltip="Height of the picture. Only the preview's shape depends on it."),
                io.Conditioning.Input("positive", optional=True,
                                      tooltip="A text to go with the layout. Without one, the layout alone counts."),
                io.Conditioning.Input("negative", optional=True,
                                      tooltip="The negative text. Without one, it is that of an empty prompt."),
            ],
            outputs=[
                io.Conditioning.Output("conditioning", display_name="positive",
                                       tooltip="The text with the layout, for a sampler's positive."),
                io.Conditioning.Output("open", display_name="negative",
                                       tooltip="The text with an open layout, for the same sampler's negative. "
                                               "Guidance then acts on the boxes."),
                io.Image.Output("preview", display_name="preview", tooltip="The boxes, drawn."),
                io.String.Output("report", display_name="report",
                                 tooltip="What the boxes say, and which colours of the file stand for those written "
                                         "as #rrggbb."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, file: str, **kwargs: Any) -> tuple[int, int]:
        return files.fingerprint(file)

    @classmethod
    @checked
    def execute(cls, file: str, boxes: str, light: str, crowdedness: str, width: int, height: int,
                positive: Conditioning | None = None, negative: Conditioning | None = None) -> io.NodeOutput:
        path = files.resolve(file)
        content = load_layout(path)
        found = parse_boxes(boxes, content, (width, height))
        scene = as_layout(found, {"light": light, "crowdedness": crowdedness}, content)
        patcher = layout_conditioning.layout_patcher(content, (str(path), *files.fingerprint(file)))
        text = [[content.null_text[None], {}]]
        sides = (check_width(side, content) if side is not None else text for side in (positive, negative))
        with_boxes, without = (layout_conditioning.with_layout(side, patcher, layout)
                               for side, layout in zip(sides, (scene, None)))
        return io.NodeOutput(with_boxes, without, preview(found or [], light, width, height),
                             report_of(found, boxes, content))


def report_of(boxes: list[tuple] | None, text: str, content: LayoutFile) -> str:
    """What the boxes say, in words. text: the lines that they came from."""
    if boxes is None:
        return "No boxes are given: cars stand anywhere."
    count = f"{len(boxes)} of at most {content.most_boxes} boxes" if boxes else "No cars"
    colours = f": {', '.join(colour for *_, colour in boxes)}" if boxes else ""
    return "\n".join([f"{count}{colours}.", *colour_remarks(text, content)])


def as_layout(boxes: list[tuple] | None, labels: dict[str, str], content: LayoutFile) -> Layout:
    """The node's scene as a Layout of one picture."""
    numbers = [label_number(labels, name, values, content) for name, values in content.params.labels]
    colours = [content.params.colours.index(colour) for *_, colour in boxes or []]
    return Layout(
        boxes=torch.tensor([corners for *corners, _ in boxes or []]).reshape(1, -1, 4),
        colours=torch.tensor(colours, dtype=torch.long)[None],
        present=torch.ones(1, len(colours), dtype=torch.bool),
        told=torch.tensor([boxes is not None]),
        labels=torch.tensor([numbers], dtype=torch.long),
    )


def label_number(labels: dict[str, str], name: str, values: tuple[str, ...], content: LayoutFile) -> int:
    said = labels.get(name, ANY)
    if said == ANY:
        return NOT_SAID
    if said not in values:
        raise VideoLDMError(f"{content.name} knows no {name} '{said}', only {', '.join(values)}. Set {name} to one of "
                            "these, or to any.")
    return 1 + values.index(said)


def check_width(conditioning: Conditioning, content: LayoutFile) -> Conditioning:
    """The CONDITIONING as it is. Raises if the text encoder of another model made it."""
    width = other_width((text for text, _ in conditioning), content.base.context_dim)
    if width is not None:
        raise VideoLDMError(f"The connected text has a width of {width}, and {content.name} was made for "
                            f"{content.base.named}, whose text has {content.base.context_dim}. Encode it with "
                            f"{content.base.source('CLIP')}.")
    return conditioning


def preview(boxes: list[tuple], light: str, width: int, height: int) -> torch.Tensor:
    """The boxes as a picture, `1 h w 3`."""
    scale = PREVIEW / max(width, height)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    picture = Image.new("RGB", size, GROUNDS.get(light, (80, 83, 86)))
    pen = ImageDraw.Draw(picture)
    for *corners, colour in sorted(boxes, key=lambda box: box[3]):       # nearer cars stand lower and in front
        pixels = [corner * (size[axis % 2] - 1) for axis, corner in enumerate(corners)]
        pen.rectangle(pixels, fill=paint(colour), outline=(255, 255, 255), width=2)
    return torch.from_numpy(np.asarray(picture, np.float32) / 255)[None]


NODES = [SceneLayout]
