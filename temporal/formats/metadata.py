"""Reading a file's metadata safely. Anyone may have written it, so every value is checked for type and bounds.

A wrong value raises MetadataError. Its text names the entry and says what is due. The caller adds the file's name and
what to do.
"""

import json
import math
import re
from collections.abc import Mapping
from typing import Any

LONGEST_JSON = 1_000_000        # characters of one entry
DEEPEST_JSON = 8                # nested lists and dictionaries
LONGEST_TEXT = 10_000           # characters of a title, a licence and similar texts
MOST_FRAMES = 100_000           # frames of a clip
MOST_FPS = 10_000


class MetadataError(ValueError):
    """An entry of a file's metadata that cannot be used. The text names it and says what is due."""


def shown(value: object, longest: int = 60) -> str:
    """A value as text for a message: on one line, and cut after `longest` characters."""
    try:
        text = str(value)
    except (ValueError, RecursionError):        # an integer with more digits than Python writes
        return f"a {type(value).__name__} that is too long to show"
    line = "".join(letter if letter.isprintable() else " " for letter in text[: longest + 1])
    return f"{line[:longest]}..." if len(text) > longest else line


def parsed_json(text: str, what: str) -> Any:
    """The value of a JSON text. Raises MetadataError if it is too long or nested too deep. what: the entry's name."""
    if len(text) > LONGEST_JSON:
        raise MetadataError(f"{what} is {len(text)} characters long")
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        raise MetadataError(f"{what} is '{shown(text)}', which is not JSON that can be read") from None
    if depth(value) > DEEPEST_JSON:
        raise MetadataError(f"{what} is nested more than {DEEPEST_JSON} deep")
    return value


def depth(value: object) -> int:
    """The depth of nested lists and dictionaries. Not recursive, because the depth has no bound."""
    deepest, level = 0, [value]
    while level := [part for part in level if isinstance(part, (list, dict))]:
        deepest += 1
        level = [inner for part in level for inner in (part.values() if isinstance(part, dict) else part)]
    return deepest


def whole(value: object, what: str, least: int, most: int, text: bool = False) -> int:
    """Check that a value is a whole number within bounds, and return it.

    Args:
        value: of the file.
        what: the entry's name, for the message.
        least, most: the bounds, inclusive.
        text: True: the value is text, as metadata entries are. False: it is a value within JSON.

    Raises MetadataError for any other value.
    """
    if text and isinstance(value, str) and re.fullmatch(r"[+-]?[0-9]{1,18}", value):
        value = int(value)
    if type(value) is not int or not least <= value <= most:
        raise MetadataError(f"{what} is {shown(value)}, where a whole number from {least} to {most} is due")
    return value


def number(value: object, what: str, above: float, below: float, text: bool = False) -> float:
    """Check that a value is a number between two bounds, and return it.

    Args:
        value: of the file.
        what: the entry's name, for the message.
        above, below: the bounds, exclusive.
        text: True: the value is text, as metadata entries are. False: it is a value within JSON.

    Raises MetadataError for any other value.
    """
    try:
        if text and isinstance(value, str) and value.isascii():
            result = float(value)
        elif not text and isinstance(value, (int, float)) and not isinstance(value, bool):
            result = float(value)
        else:
            result = math.nan
    except (ValueError, OverflowError):
        result = math.nan
    if not above < result < below:
        raise MetadataError(f"{what} is {shown(value)}, where a number between {above:g} and {below:g} is due")
    return result


def text_of(value: object, what: str, longest: int = LONGEST_TEXT) -> str:
    """Check that a value is text without control characters other than white space, and return it."""
    if not isinstance(value, str) or len(value) > longest or not all(map(str.isprintable, value.split())):
        raise MetadataError(f"{what} is {shown(value)}, where text of at most {longest} characters is due")
    return value


def list_of(value: object, what: str, most: int, least: int = 0) -> list:
    """Check that a value is a list of `least` to `most` entries, and return it."""
    if not isinstance(value, list) or not least <= len(value) <= most:
        length = f"a list of {len(value)}" if isinstance(value, list) else shown(value)
        raise MetadataError(f"{what} is {length}, where a list of {least} to {most} is due")
    return value


def entries_of(value: object, what: str, due: tuple[str, ...] = (), allowed: tuple[str, ...] = ()) -> dict:
    """Check that a value is a dictionary with the right keys, and return it.

    It must have all keys in `due`. Further keys must be in `allowed`. If `due` is empty, any keys may occur.
    """
    if not isinstance(value, dict):
        raise MetadataError(f"{what} is {shown(value)}, where a dictionary is due")
    missing = [entry for entry in due if entry not in value]
    if missing:
        raise MetadataError(f"{what} lacks {', '.join(missing)}")
    foreign = [entry for entry in value if entry not in due + allowed]
    if foreign and due:
        raise MetadataError(f"{what} has the unknown entry {shown(foreign[0])}")
    return value


def betas_of(metadata: Mapping, start: str = "linear_start", end: str = "linear_end",
             text: bool = True) -> tuple[float, float]:
    """The first and the last beta of a noise schedule, which must satisfy 0 < first <= last < 1.

    Args:
        metadata: with the two entries.
        start, end: the names of the entries.
        text: True: the values are text. False: they are values within JSON.
    """
    first, last = (number(metadata[entry], entry, 0, 1, text) for entry in (start, end))
    if first > last:
        raise MetadataError(f"{start} is {first:g} and {end} is {last:g}, and noise must not fall")
    return first, last


def fps_of(metadata: Mapping[str, str]) -> float | None:
    """The frames per second that a file states. None: it states none."""
    return number(metadata["fps"], "fps", 0, MOST_FPS, text=True) if metadata.get("fps") else None
