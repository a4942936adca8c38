"""The lines of Scene Layout: x y width height colour."""

import math
import re

from ..temporal.errors import VideoLDMError
from ..temporal.formats.scene_layout_file import LayoutFile
from .box_colours import known_colour

NONE = "none"           # the only line of a picture without cars
PIXELS = 2              # a coordinate from here on must be in pixels
EDGE = 1e-6             # a box may reach this far beyond the picture, by rounding
COMMENT = re.compile("#.*")
BEFORE_COLOUR = re.compile(r"\s*(?:[^\s#]+\s+){4}#[0-9a-zA-Z]+")     # of a line whose fifth word begins with #


def parse_boxes(text: str, content: LayoutFile, size: tuple[int, int] | None = None) -> list[tuple] | None:
    """[(x0, y0, x1, y1, colour)] from the widget's lines. None if it has no lines, which leaves the boxes open.

    Args:
        text: the widget's text.
        content: the layout file.
        size: width and height of the picture, with which an error can convert a box from pixels.
    """
    lines = numbered_words(text)
    if not lines:
        return None
    if [words for _, words in lines] == [[NONE]]:
        return []
    if len(lines) > content.most_boxes:
        raise VideoLDMError(f"There are {len(lines)} boxes, and {content.name} knows pictures of at most "
                            f"{content.most_boxes}. Leave out {len(lines) - content.most_boxes} of the lines.")
    return [parse_box(number, words, content, size) for number, words in lines]


def numbered_words(text: str) -> list[tuple[int, list[str]]]:
    """(number, words) of every line that has words. A # begins a comment, unless it is the fifth word's."""
    lines = [(number, words_of(line)) for number, line in enumerate(text.splitlines(), 1)]
    return [(number, words) for number, words in lines if words]


def words_of(line: str) -> list[str]:
    """The words before the comment."""
    line = line.replace(",", " ")
    box = BEFORE_COLOUR.match(line)
    start = box.end() if box else 0
    return (line[:start] + COMMENT.sub("", line[start:])).split()


def colour_remarks(text: str, content: LayoutFile) -> list[str]:
    """A sentence for each colour that was written as #rrggbb. The text must have passed `parse_boxes`."""
    coloured = [(number, words[4]) for number, words in numbered_words(text) if len(words) == 5]
    return [f"Line {number}: {word} is taken as {known_colour('', word, content)}, the nearest colour that "
            f"{content.name} knows." for number, word in coloured if word.startswith("#")]


def parse_box(number: int, words: list[str], content: LayoutFile, size: tuple[int, int] | None = None) -> tuple:
    """One box of `parse_boxes`."""
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
    colour = known_colour(line, words[4], content)
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
