"""A prompt that changes along a clip: lines `frame: prompt` to the texts of every frame.

A key frame has its own prompt. A frame between two key frames has both prompts, each with a weight. What a weight
does to the encoded texts is in nodes/host/prompt_encoding.py.
"""

import json
import re
from bisect import bisect_right
from dataclasses import dataclass

from .errors import VideoLDMError

LINEAR, HOLD = "linear", "hold"
EXAMPLE = "Write lines such as 0: a red car."
QUOTE = 60                  # characters of a line that a sentence quotes
MOST_NAMED = 12             # key frames that a warning names
SHORT = 400                 # characters of a prompt that the report shows
NUMBER = re.compile(r"[+-]?\d{1,9}")
# `"0": "a red car",` as FizzNodes and AnimateDiff-Evolved have it. Several may stand on a line.
QUOTED = re.compile(r'\s*"([^"]*)"\s*:\s*("(?:[^"\\]|\\.)*")\s*(?:,|\}?\s*$)')
# `0 = "a red car"`, AnimateDiff-Evolved's other form. It also has ranges and holds before the sign.
ASSIGNED = re.compile(r'\s*([\d.:+\-\s]+?)\s*=\s*("(?:[^"\\]|\\.)*")\s*,?\s*')
PLAIN = re.compile(r'\s*("?)([^":\uff1a]*)\1\s*[:\uff1a](.*)')


@dataclass(frozen=True)
class KeyFrame:
    """A frame with a prompt of its own."""

    frame: int              # counted from 0; it may lie beyond the last frame of the clip
    prompt: str


@dataclass(frozen=True)
class FrameText:
    """The prompts of one frame."""

    prompt: str             # that of the key frame at or before the frame
    following: str          # that of the next key frame
    weight: float           # of `following`, 0 <= weight < 1. At 0 the frame has `prompt` alone


def key_frames(lines: str, frames: int, before: str = "", after: str = "") -> list[KeyFrame]:
    """The key frames in a text of lines `frame: prompt`, in the order of their frames.

    Args:
        lines: the text.
        frames: of the clip. Negative frame numbers count from its end: -1 is the last frame.
        before, after: texts that stand before and after every prompt.
    """
    found: dict[int, str] = {}
    for name, common in (("before", before), ("after", after)):
        refuse_other_packs_words(common, f"The text in {name}")
    for number, line in enumerate(lines.splitlines(), 1):
        for written, prompt in pairs_of(line, f"Line {number}, '{shortened(line.strip(), QUOTE)}',"):
            refuse_other_packs_words(prompt, f"Line {number} of the prompts")
            frame = frame_number(written, frames, f"Line {number}")
            if frame in found:
                both = f"'{shortened(found[frame], QUOTE)}' and '{shortened(prompt, QUOTE)}'"
                raise VideoLDMError(f"Two lines of the prompts are for frame {frame}: {both}. Keep one of them.")
            found[frame] = prompt
    if not found:
        raise VideoLDMError(f"There are no prompts. {EXAMPLE}")
    return [KeyFrame(frame, with_common_text(before, found[frame], after)) for frame in sorted(found)]


def pairs_of(line: str, where: str) -> list[tuple[str, str]]:
    """The (frame, prompt) pairs on one line, as they are written. A line that begins with # is a comment.

    A # within a line belongs to the prompt. where: the line, to begin an error with.
    """
    bare = line.strip()
    if not bare or bare.startswith("#") or bare in ("{", "}"):
        return []
    quoted = quoted_pairs(bare)
    if quoted:
        return quoted
    assigned = ASSIGNED.fullmatch(line)
    if assigned:
        return [(assigned[1], unquoted(assigned[2]))]
    plain = PLAIN.fullmatch(line)
    if plain is None or not any(character.isdigit() for character in plain[2]):
        raise VideoLDMError(f"{where} does not begin with a frame number. {EXAMPLE}")
    prompt = plain[3].strip()
    whole = re.fullmatch(r'("(?:[^"\\]|\\.)*")\s*,?', prompt)
    if whole:
        prompt = unquoted(whole[1])
    elif plain[1] and prompt.startswith('"'):
        raise VideoLDMError(f"{where} has quotation marks that do not pair. Write it as \"0\": \"a red car\", or "
                            "without quotation marks.")
    return [(plain[2], prompt)]


def quoted_pairs(line: str) -> list[tuple[str, str]]:
    """The pairs of a line that has nothing but quoted pairs. Empty for other lines."""
    line, found, end = line.removeprefix("{"), [], 0
    while end < len(line):
        match = QUOTED.match(line, end)
        if match is None:
            return []
        found.append((match[1], unquoted(match[2])))
        end = match.end()
    return found


def unquoted(quoted: str) -> str:
    r"""The text between quotation marks. As in JSON, \" is a quotation mark and \\ is a backslash."""
    try:
        return json.loads(quoted, strict=False)
    except ValueError:                      # \( is no JSON, and means a bracket to ComfyUI
        return quoted[1:-1]


def refuse_other_packs_words(text: str, where: str) -> None:
    """Refuse what FizzNodes and AnimateDiff-Evolved compute from a prompt. Here it would be read as text.

    where: what the text is, to begin an error with.
    """
    if "--neg" in text:
        raise VideoLDMError(f"{where} has a negative text behind --neg. Write the negative texts into a second Prompt "
                            "Travel, or into CLIP Text Encode.")
    if "`" in text:
        raise VideoLDMError(f"{where} has a formula between ` signs, which Prompt Travel does not compute. Write "
                            "numbers, as in (red:1.2), on the lines of two key frames.")


def frame_number(written: str, frames: int, where: str) -> int:
    """The number of a frame, counted from 0. where: the line, to begin an error with."""
    written = written.strip()
    if not NUMBER.fullmatch(written):
        raise VideoLDMError(f"{where} of the prompts has '{shortened(written, QUOTE)}' where a frame number is due. "
                            "Frames are whole numbers: 0 is the first frame, and -1 is the last.")
    frame = int(written)
    if written.startswith("-"):
        frame += frames
    if frame < 0 or (written.startswith("-") and frame >= frames):
        raise VideoLDMError(f"{where} of the prompts is for frame {written}, and there are {frames} frames: -1 is the "
                            f"last, and {-frames} is the first.")
    return frame


def with_common_text(before: str, prompt: str, after: str) -> str:
    """A prompt between the texts that all prompts have in common. Spaces join them, and no comma is added."""
    return " ".join(part for part in (before.strip(), prompt, after.strip()) if part)


def texts_of_frames(keys: list[KeyFrame], frames: int, mode: str) -> list[FrameText]:
    """The texts of every frame of a clip.

    Before the first key frame its prompt holds, and after the last one the last prompt. Between key frames a < b frame
    f has the weight (f - a) / (b - a) for the prompt of b, or, if prompts are held, 0.
    """
    numbers = [key.frame for key in keys]
    texts = []
    for frame in range(frames):
        place = bisect_right(numbers, frame)
        here, following = keys[max(place - 1, 0)], keys[min(place, len(keys) - 1)]
        between = mode == LINEAR and here.frame < frame < following.frame and here.prompt != following.prompt
        weight = (frame - here.frame) / (following.frame - here.frame) if between else 0.0
        texts.append(FrameText(here.prompt, following.prompt if between else here.prompt, weight))
    return texts


def report_of(keys: list[KeyFrame], texts: list[FrameText]) -> str:
    """Which frames have which prompts, and what an artist may not expect."""
    lines, first = [], 0
    for frame in range(1, len(texts) + 1):
        if frame == len(texts) or group_of(texts[frame]) != group_of(texts[first]):
            lines.append(f"{frames_named(first, frame - 1)}: {described(texts[first], texts[frame - 1])}")
            first = frame
    return "\n".join([*lines, *warnings_of(keys, len(texts))])


def group_of(text: FrameText) -> tuple[str, str]:
    """Frames that follow one another and have the same group share a line of the report."""
    return text.prompt, text.following


def frames_named(first: int, last: int) -> str:
    return f"Frame {first}" if first == last else f"Frames {first} to {last}"


def described(first: FrameText, last: FrameText) -> str:
    """The prompts of frames from `first` to `last`, which are of one group."""
    if not first.weight:
        return shortened(first.prompt) or "the empty prompt"
    shares = f"{first.weight:.0%}" if first == last else f"{first.weight:.0%} to {last.weight:.0%}"
    return f"from '{shortened(first.prompt)}' to '{shortened(first.following)}', {shares} of the second"


def warnings_of(keys: list[KeyFrame], frames: int) -> list[str]:
    """A sentence about the key frames that lie beyond the clip, if there are any."""
    beyond = [str(key.frame) for key in keys if key.frame >= frames]
    if not beyond:
        return []
    which = f"frame {beyond[0]} lies" if len(beyond) == 1 else f"frames {', '.join(beyond[:MOST_NAMED])} lie"
    return [f"Warning: the key {which} beyond the last frame. Frames are counted from 0, so the last of {frames} is "
            f"{frames - 1}."]


def shortened(text: str, length: int = SHORT) -> str:
    text = " ".join(text.split())
    return text if len(text) <= length else f"{text[:length]}..."
