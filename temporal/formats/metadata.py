"""Reading a file's metadata safely: anyone may have written it, so every value has a type and bounds.

A value that does not fit raises MetadataError. Its text says which entry is wrong and what is due. The format that
reads the entry says which file it is and what to do.
"""

import json
import math
import re
from collections.abc import Mapping

LONGEST_JSON = 1_000_000        # characters of one entry
DEEPEST_JSON = 8                # lists and dictionaries within one another
LONGEST_TEXT = 10_000           # characters of a title, a licence and the like
MOST_FRAMES = 100_000           # of a clip
MOST_FPS = 10_000


class MetadataError(ValueError):
    """An entry of a file's metadata that cannot be used: which one, and what is due."""


def shown(value, longest: int = 60) -> str:
    """A value as a sentence quotes it: on one line, and cut where it is long."""
    try:
        text = str(value)
    except (ValueError, RecursionError):        # a whole number of more digits than Python writes
        return f"a {type(value).__name__} that is too long to show"
    line = "".join(letter if letter.isprintable() else " " for letter in text[: longest + 1])
    return f"{line[:longest]}..." if len(text) > longest else line


def parsed_json(text: str, what: str):
    """The value of an entry of JSON, which is neither long nor deep."""
    if len(text) > LONGEST_JSON:
        raise MetadataError(f"{what} is {len(text)} characters long")
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        raise MetadataError(f"{what} is '{shown(text)}', which is not JSON that can be read") from None
    if depth(value) > DEEPEST_JSON:
        raise MetadataError(f"{what} is nested more than {DEEPEST_JSON} deep")
    return value


def depth(value) -> int:
    """How many lists and dictionaries contain one another; not recursive, since the value may be anything."""
    deepest, level = 0, [value]
    while level := [part for part in level if isinstance(part, (list, dict))]:
        deepest += 1
        level = [inner for part in level for inner in (part.values() if isinstance(part, dict) else part)]
    return deepest


def whole(value, what: str, least: int, most: int, text: bool = False) -> int:
    """A whole number within bounds.

    Args:
        value: what the file says.
        what: the entry's name, for the sentence.
        least, most: the bounds, both allowed.
        text: the entry is text, as all metadata are, and not a value within JSON.
    """
    if text and isinstance(value, str) and re.fullmatch(r"[+-]?[0-9]{1,18}", value):
        value = int(value)
    if type(value) is not int or not least <= value <= most:
        raise MetadataError(f"{what} is {shown(value)}, where a whole number from {least} to {most} is due")
    return value


def number(value, what: str, above: float, below: float, text: bool = False) -> float:
    """A finite number between two bounds, neither of which it may be. Args: as `whole` has them."""
    try:
        if isinstance(value, bool) or not isinstance(value, str if text else (int, float)):
            raise ValueError
        result = float(value) if not text or value.isascii() else math.nan
    except (ValueError, OverflowError):
        result = math.nan
    if not above < result < below:
        raise MetadataError(f"{what} is {shown(value)}, where a number between {above:g} and {below:g} is due")
    return result


def text_of(value, what: str, longest: int = LONGEST_TEXT) -> str:
    """Text that can be shown: no control characters but ends of lines."""
    if not isinstance(value, str) or len(value) > longest or not all(map(str.isprintable, value.split())):
        raise MetadataError(f"{what} is {shown(value)}, where text of at most {longest} characters is due")
    return value


def list_of(value, what: str, most: int, least: int = 0) -> list:
    """A list whose length is within bounds."""
    if not isinstance(value, list) or not least <= len(value) <= most:
        length = f"a list of {len(value)}" if isinstance(value, list) else shown(value)
        raise MetadataError(f"{what} is {length}, where a list of {least} to {most} is due")
    return value


def entries_of(value, what: str, due: tuple[str, ...] = (), allowed: tuple[str, ...] = ()) -> dict:
    """A dictionary with all entries that are due, and none but those and the allowed ones. Where none is due: any."""
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
    """First and last beta of a noise schedule: between 0 and 1, and not falling. text: not of a dictionary in JSON."""
    first, last = (number(metadata[entry], entry, 0, 1, text) for entry in (start, end))
    if first > last:
        raise MetadataError(f"{start} is {first:g} and {end} is {last:g}, and noise must not fall")
    return first, last


def fps_of(metadata: Mapping[str, str]) -> float | None:
    """The frame rate that a file states; None where it states none."""
    return number(metadata["fps"], "fps", 0, MOST_FPS, text=True) if metadata.get("fps") else None
