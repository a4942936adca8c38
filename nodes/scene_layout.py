"""Scene Layout: boxes and labels as CONDITIONING."""

import math
import re
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageColor, ImageDraw

from ..temporal.errors import VideoLDMError
from ..temporal.families import load_layout
from ..temporal.formats.scene_layout_file import LayoutFile
from ..temporal.scene_layout import NOT_SAID, Layout
from .host import files, layout_conditioning
from .host.api import io
from .host.inputs import checked
from .host.sockets import Conditioning
from .host.texts import other_width

DEMO_FILE = "video_ldm_driving_layout.safetensors"
ANY, NONE = "any", "none"
EXAMPLE = "# x y width height colour\n0.61 0.46 0.13 0.19 red\n0.27 0.46 0.12 0.17 blue"
PREVIEW = 512           # pixels of the preview's longer side
PIXELS = 2              # a coordinate from here on must be in pixels
EDGE = 1e-6             # a box may reach this far beyond the picture, by rounding
GROUNDS = {"day": (128, 132, 128), "night": (32, 34, 44)}       # the preview's background


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
            inputs=[
                io.Combo.Input("file", **files.loader_list("layout", DEMO_FILE),
                               tooltip="A scene layout file in models/video_ldm, or the bundled one of the demo."),
                io.String.Input("boxes", multiline=True, default=EXAMPLE,
                                tooltip="One box per line: x y width height colour. The numbers are fractions of the "
                                        "picture; x and y are the box's upper left corner. A # begins a comment. "
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
        return io.NodeOutput(with_boxes, without, preview(found or [], light, width, height))


def parse_boxes(text: str, content: LayoutFile, size: tuple[int, int] | None = None) -> list[tuple] | None:
    """[(x0, y0, x1, y1, colour)] from the widget's lines. None if it has no lines, which leaves the boxes open.

    Args:
        text: the widget's text.
        content: the layout file.
        size: width and height of the picture, with which an error can convert a box from pixels.
    """
    for number, line in enumerate(text.splitlines(), 1):
        refuse_hex_colour(number, line, content)
    lines = [(number, re.sub("#.*", "", line).replace(",", " ").split())
             for number, line in enumerate(text.splitlines(), 1)]
    lines = [(number, words) for number, words in lines if words]
    if not lines:
        return None
    if [words for _, words in lines] == [[NONE]]:
        return []
    if len(lines) > content.most_boxes:
        raise VideoLDMError(f"There are {len(lines)} boxes, and {content.name} knows pictures of at most "
                            f"{content.most_boxes}. Leave out {len(lines) - content.most_boxes} of the lines.")
    return [parse_box(number, words, content, size) for number, words in lines]


def refuse_hex_colour(number: int, line: str, content: LayoutFile) -> None:
    """Refuse a colour such as #ff0000, which would be read as a comment."""
    found = re.fullmatch(r"\s*(?:[^\s#]+\s+){4}(#[0-9a-fA-F]{3,8})\b.*", line)
    if found:
        raise VideoLDMError(f"Line {number} of the boxes has the colour '{found[1]}'. Colours are words here, and a # "
                            f"begins a comment: {content.name} knows {', '.join(content.params.colours)}.")


def parse_box(number: int, words: list[str], content: LayoutFile, size: tuple[int, int] | None = None) -> tuple:
    line = f"Line {number} of the boxes, '{' '.join(words)}',"
    if len(words) != 5:
        raise VideoLDMError(f"{line} has {counted(len(words), 'word')}. A box has five: x y width height colour, as in "
                            "0.61 0.46 0.13 0.19 red.")
    numbers = []
    for word in words[:4]:
        value = as_number(word)
        if value is None:
            raise VideoLDMError(f"{line} has '{word}' where a number is due. A box is x y width height colour, as in "
                                "0.61 0.46 0.13 0.19 red.")
        numbers.append(value)
    x, y, width, height = numbers
    if width <= 0 or height <= 0:
        raise VideoLDMError(f"{line} has a width of {width:g} and a height of {height:g}. Both must be more than 0.")
    if max(numbers) >= PIXELS:
        raise VideoLDMError(f"{line} seems to be in pixels. Coordinates are fractions of the picture, from 0 to 1: "
                            f"divide x and width by the picture's width, y and height by its height"
                            f"{in_fractions(numbers, size)}.")
    if x < -EDGE or y < -EDGE or x + width > 1 + EDGE or y + height > 1 + EDGE:
        raise VideoLDMError(f"{line} reaches from {x:g}, {y:g} to {x + width:g}, {y + height:g}, beyond the picture. "
                            "Coordinates are fractions of it, from 0 to 1; cut the box off at the picture's edge.")
    colour = words[4].lower()
    if colour not in content.params.colours:
        raise VideoLDMError(f"{line} has the colour '{words[4]}'. {content.name} knows "
                            f"{', '.join(content.params.colours)}.")
    return max(x, 0.0), max(y, 0.0), min(x + width, 1.0), min(y + height, 1.0), colour


def in_fractions(numbers: list[float], size: tuple[int, int] | None) -> str:
    """A box in pixels as fractions, for an error. Empty if it is not within the picture."""
    x, y, width, height = (value / side for value, side in zip(numbers, 2 * (size or (1, 1))))
    inside = size and 0 <= x <= x + width <= 1 and 0 <= y <= y + height <= 1
    return f", which gives {x:.3g} {y:.3g} {width:.3g} {height:.3g}" if inside else ""


def counted(number: int, what: str) -> str:
    return f"{number} {what}" + ("" if number == 1 else "s")


def as_number(word: str) -> float | None:
    try:
        value = float(word)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


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


def paint(colour: str) -> tuple[int, ...]:
    try:
        return ImageColor.getrgb(colour)
    except ValueError:      # a name that only the file knows
        return 160, 160, 160


NODES = [SceneLayout]
