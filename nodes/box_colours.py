"""Colours of boxes: names that a layout file knows, or #rrggbb, which stands for the nearest of them."""

import re

from PIL import ImageColor

from ..temporal.errors import VideoLDMError
from ..temporal.formats.scene_layout_file import LayoutFile

HEX = re.compile(r"#[0-9a-fA-F]{6}")
UNKNOWN = (160, 160, 160)       # paint of a name that only the file knows
FARTHEST = 0.15                 # between two colours that still pass for one; `distance` explains the unit
LIGHTNESS = 0.25                # by how much a difference in lightness counts: a dark red is still red


def paint(colour: str) -> tuple[int, int, int]:
    """Red, green and blue, 0 to 255, in which the boxes of a colour are drawn."""
    try:
        return ImageColor.getrgb(colour)[:3]
    except ValueError:
        return UNKNOWN


def paints(colours: tuple[str, ...]) -> dict[str, str]:
    """{name: #rrggbb} of colours, for the page."""
    return {colour: "#{:02x}{:02x}{:02x}".format(*paint(colour)) for colour in colours}


def known_colour(line: str, word: str, content: LayoutFile) -> str:
    """The file's colour for a word of the artist. Raises if it has none. line: how a sentence about it begins."""
    names = content.params.colours
    if word.lower() in names:
        return word.lower()
    if not word.startswith("#"):
        raise VideoLDMError(f"{line} has the colour '{word}'. {content.name} knows {', '.join(names)}.")
    if not HEX.fullmatch(word):
        raise VideoLDMError(f"{line} has the colour '{word}'. Write a colour by its name or as #rrggbb, such as "
                            f"#ff0000: {content.name} knows {', '.join(names)}.")
    nearest = nearest_colour(word, names)
    if nearest is None:
        raise VideoLDMError(f"{line} has the colour '{word}', which is far from every colour that {content.name} "
                            f"knows. Choose one of {', '.join(names)}.")
    return nearest


def nearest_colour(word: str, names: tuple[str, ...]) -> str | None:
    """The nearest colour to a #rrggbb, or None if none is near. A name without a paint is never the nearest.

    web/js/scene_layout_lines.js does the same in the page.
    """
    wanted = oklab(ImageColor.getrgb(word)[:3])
    far = {name: distance(wanted, oklab(paint(name))) for name in names if paint(name) != UNKNOWN}
    nearest = min(far, key=lambda name: far[name], default=None)
    return nearest if nearest is not None and far[nearest] <= FARTHEST else None


def distance(one: tuple[float, ...], other: tuple[float, ...]) -> float:
    """How different two colours of `oklab` look. From black to white it is 0.25, from red to green 0.37."""
    weights = (LIGHTNESS, 1, 1)
    return sum((weight * (a - b)) ** 2 for weight, a, b in zip(weights, one, other)) ** 0.5


def oklab(rgb: tuple[int, ...]) -> tuple[float, float, float]:
    """Lightness 0 to 1, green to red, and blue to yellow of an sRGB colour (Björn Ottosson, "OKLab", 2020)."""
    red, green, blue = (value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4
                        for value in (value / 255 for value in rgb))
    long = (0.4122214708 * red + 0.5363325363 * green + 0.0514459929 * blue) ** (1 / 3)
    middle = (0.2119034982 * red + 0.6806995451 * green + 0.1073969566 * blue) ** (1 / 3)
    short = (0.0883024619 * red + 0.2817188376 * green + 0.6299787005 * blue) ** (1 / 3)
    return (0.2104542553 * long + 0.7936177850 * middle - 0.0040720468 * short,
            1.9779984951 * long - 2.4285922050 * middle + 0.4505937099 * short,
            0.0259040371 * long + 0.7827717662 * middle - 0.8086757660 * short)
