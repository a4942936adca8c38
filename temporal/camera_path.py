"""Camera moves as text: keyed frames in an artist's words, presets of them, and lines of published pose files.

    0: pan 0
    15: pan 30, forward 1

Pan and tilt turn the camera to the right and up, roll turns it clockwise, all in degrees. Orbit leads it around what is
in the middle of the first picture, with degrees to the right. The moves right, up and forward are in the first frame's
directions. Zoom multiplies the focal length.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from .camera import RATIO, CameraPath, Cameras
from .errors import VideoLDMError

EXAMPLE = "Write lines such as 0: pan 0 and 15: pan 30, forward 1."
# {word: (the quantity, the factor)}. Opposite words set the same quantity
WORDS = {"pan": ("pan", 1), "tilt": ("tilt", 1), "roll": ("roll", 1), "orbit": ("orbit", 1), "zoom": ("zoom", 1),
         "right": ("x", 1), "left": ("x", -1), "up": ("y", 1), "down": ("y", -1), "forward": ("z", 1),
         "back": ("z", -1), "x": ("x", 1), "y": ("y", 1), "z": ("z", 1)}
AT_REST = {"pan": 0.0, "tilt": 0.0, "roll": 0.0, "orbit": 0.0, "x": 0.0, "y": 0.0, "z": 0.0, "zoom": 1.0}
SHOWN = {"x": "right", "y": "up", "z": "forward"}      # how a report calls a quantity; the others as they are
# {preset: (the word, its value in the last frame for an amount of 1)}
PRESETS = {"move forward": ("forward", 1.0), "move back": ("back", 1.0), "move left": ("left", 1.0),
           "move right": ("right", 1.0), "move up": ("up", 1.0), "move down": ("down", 1.0),
           "pan left": ("pan", -30.0), "pan right": ("pan", 30.0), "tilt up": ("tilt", 20.0),
           "tilt down": ("tilt", -20.0), "roll left": ("roll", -30.0), "roll right": ("roll", 30.0),
           "orbit left": ("orbit", -30.0), "orbit right": ("orbit", 30.0), "zoom in": ("zoom", 1.5),
           "zoom out": ("zoom", 1 / 1.5), "still": ("forward", 0.0)}
FOCAL = 0.48            # of an artist's camera along x; the published pose files have 0.47 to 0.59
DISTANCE = 2.0          # from the camera to what an orbit goes around, in the units of the moves
NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
KEY = re.compile(r"([+-]?\d{1,6})\s*[:=]\s*(.*)")
PART = re.compile(rf"([A-Za-z]+)\s*=?\s*({NUMBER})")
LIMITS = {"zoom": (0.1, 10.0)}          # of a quantity; the others as follows
ANGLES, MOVES = (-3600.0, 3600.0), (-1000.0, 1000.0)
COLUMNS = 19            # numbers in a line of a pose file: time, lens (4), two that nobody uses, 3x4 matrix
QUOTE = 50              # characters of a line that a sentence quotes


@dataclass(frozen=True)
class KeyedPath:
    """A camera whose place and direction are stated in some frames. Between them they change evenly."""

    keys: tuple[tuple[int, tuple[tuple[str, float], ...]], ...]    # (frame, its quantities); -1 is the last frame

    def check(self, length: int) -> str:
        self.points(length)
        beyond = max((frame for frame, _ in self.keys), default=0)
        if beyond < length:
            return ""
        return (f"The camera's lines name frame {beyond}, and the last frame of the video is {length - 1}: the move is "
                "cut there. Frames count from 0, and -1 is the last frame.")

    def points(self, length: int) -> dict[str, list[tuple[int, float]]]:
        """{quantity: (frame, value) by frame}. length: frames of the video."""
        found: dict[int, dict[str, float]] = {0: {}}
        for written, values in self.keys:
            frame = written + length if written < 0 else written
            if frame < 0:
                raise VideoLDMError(f"A line of the camera is for frame {written}, and the video has {length} frames: "
                                    f"-1 is the last, and {-length} is the first.")
            if set(found.setdefault(frame, {})) & {name for name, _ in values}:
                raise VideoLDMError(f"Two lines of the camera, one of them with {written}, are for frame {frame} of a "
                                    f"video of {length} frames. Keep one of them.")
            found[frame].update(values)
        found[0] = AT_REST | found[0]
        return {name: [(frame, values[name]) for frame, values in sorted(found.items()) if name in values]
                for name in AT_REST}

    def cameras(self, numbers: Sequence[int], length: int) -> Cameras:
        points = self.points(length)
        frames = [{name: value_at(points[name], number) for name in AT_REST} for number in numbers]
        lenses = [[FOCAL * values["zoom"], FOCAL * RATIO * values["zoom"], 0.5, 0.5] for values in frames]
        return Cameras(torch.stack([pose_of(values) for values in frames]), torch.tensor(lenses, dtype=torch.float64))

    @property
    def in_words(self) -> str:
        """The lines, as the artist could write them."""
        return "; ".join(f"{frame}: " + ", ".join(f"{SHOWN.get(name, name)} {value:g}" for name, value in values)
                         for frame, values in self.keys)


def value_at(points: list[tuple[int, float]], frame: int) -> float:
    """The value in a frame: on a straight line from point to point, and the last point's behind it."""
    for (start, first), (end, second) in pairwise(points):
        if start <= frame < end:
            return first + (frame - start) / (end - start) * (second - first)
    return points[-1][1]


def pose_of(values: dict[str, float]) -> Tensor:
    """The pose of one frame, `4 4`."""
    orbit, pan, tilt, roll = (math.radians(values[name]) for name in ("orbit", "pan", "tilt", "roll"))
    around = placed(turned("y", -orbit), (DISTANCE * math.sin(orbit), 0.0, DISTANCE * (1 - math.cos(orbit))))
    turn = turned("y", pan) @ turned("x", tilt) @ turned("z", roll)
    return around @ placed(turn, (values["x"], -values["y"], values["z"]))


def turned(axis: str, angle: float) -> Tensor:
    """The matrix `3 3` of a turn. Around y a positive angle looks to the right, around x up, around z it is clockwise.

    angle: in radians.
    """
    cos, sin = math.cos(angle), math.sin(angle)
    rows = {"x": [[1, 0, 0], [0, cos, -sin], [0, sin, cos]], "y": [[cos, 0, sin], [0, 1, 0], [-sin, 0, cos]],
            "z": [[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]]}
    return torch.tensor(rows[axis], dtype=torch.float64)


def placed(turn: Tensor, place: tuple[float, float, float]) -> Tensor:
    """The pose of a camera that is turned like this and stands there."""
    pose = torch.eye(4, dtype=torch.float64)
    pose[:3, :3], pose[:3, 3] = turn, torch.tensor(place, dtype=torch.float64)
    return pose


@dataclass(frozen=True, eq=False)
class ListedPath:
    """A camera with a line of a pose file for each frame."""

    listed: Cameras

    def check(self, length: int) -> str:
        count = len(self.listed.poses)
        if count < length:
            raise VideoLDMError(f"The pose lines of the camera are for {count} frames, and the video has {length}. "
                                "Give a line for each frame, or make fewer frames.")
        if count > length:
            return f"The camera has {count} pose lines, and the video has {length} frames: the last lines are not used."
        return ""

    def cameras(self, numbers: Sequence[int], length: int) -> Cameras:
        frames = list(numbers)
        return Cameras(self.listed.poses[frames], self.listed.lenses[frames])

    @property
    def in_words(self) -> str:
        return f"{len(self.listed.poses)} pose lines, one for each frame"


def preset_path(name: str, amount: float) -> KeyedPath:
    """A preset from the first frame to the last. amount: how far; 1 is usual. name: a key of PRESETS."""
    word, value = PRESETS[name]
    quantity, factor = WORDS[word]
    end = value ** amount if quantity == "zoom" else value * factor * amount
    return KeyedPath(((0, ((quantity, AT_REST[quantity]),)), (-1, ((quantity, end),))))


def read_path(text: str) -> KeyedPath | ListedPath | None:
    """The camera that a text describes. None for an empty text. Raises VideoLDMError for any other text."""
    lines = [(number, line.strip()) for number, line in enumerate(re.split(r"[\n;]", text), 1) if line.strip()]
    lines = [(number, line) for number, line in lines if not line.startswith("#")]
    if not lines:
        return None
    poses = [(number, line) for number, line in lines if not line.lower().startswith("http")]
    if poses and KEY.match(poses[0][1]) is None and re.match(rf"{NUMBER}\s+{NUMBER}\s", poses[0][1] + " "):
        return listed_path(poses)
    return KeyedPath(tuple(key_of(number, line) for number, line in lines))


def key_of(number: int, line: str) -> tuple[int, tuple[tuple[str, float], ...]]:
    """The frame and the quantities of one line. number: of the line."""
    where = f"Line {number} of the camera, '{line[:QUOTE]}',"
    match = KEY.fullmatch(line)
    if match is None:
        raise VideoLDMError(f"{where} does not begin with a frame number. {EXAMPLE}")
    values: dict[str, float] = {}
    for part in filter(None, (part.strip() for part in match[2].split(","))):
        found = PART.fullmatch(part)
        if found is None or found[1].lower() not in WORDS:
            raise VideoLDMError(f"{where} has '{part[:QUOTE]}' where a move is due: one of {', '.join(WORDS)} with a "
                                f"number. {EXAMPLE}")
        name, factor = WORDS[found[1].lower()]
        if name in values:
            raise VideoLDMError(f"{where} has {found[1]} beside another word for the same move. Keep one of them.")
        values[name] = float(found[2]) * factor
        lowest, highest = LIMITS.get(name, MOVES if name in SHOWN else ANGLES)
        if not lowest <= values[name] <= highest:
            raise VideoLDMError(f"{where} has {found[1]} {found[2]}, and it goes from {lowest:g} to {highest:g}.")
    if not values:
        raise VideoLDMError(f"{where} names no move. {EXAMPLE}")
    return int(match[1]), tuple(values.items())


def listed_path(lines: list[tuple[int, str]]) -> ListedPath:
    """The path of the lines of a pose file. lines: (number of the line, line)."""
    rows = torch.tensor([numbers_of(number, line) for number, line in lines], dtype=torch.float64)
    to_camera = torch.eye(4, dtype=torch.float64).repeat(len(rows), 1, 1)
    to_camera[:, :3] = rows[:, 7:].unflatten(1, (3, 4))
    turns = to_camera[:, :3, :3]
    off = (turns @ turns.mT - torch.eye(3, dtype=torch.float64)).abs().amax((1, 2))
    for n, (number, _) in enumerate(lines):
        if off[n] > 1e-2 or torch.linalg.det(turns[n]) < 0:
            raise VideoLDMError(f"Line {number} of the camera has a matrix that is no turn of a camera (its last 12 "
                                "numbers, 3 rows of 4). Copy whole lines of a RealEstate10K pose file.")
    return ListedPath(Cameras(torch.linalg.inv(to_camera), rows[:, 1:5]))


def numbers_of(number: int, line: str) -> list[float]:
    """The numbers of one line of a pose file."""
    parts = line.replace(",", " ").split()
    if len(parts) != COLUMNS or not all(re.fullmatch(NUMBER, part) for part in parts):
        raise VideoLDMError(f"Line {number} of the camera, '{line[:QUOTE]}', is no line of a RealEstate10K pose file: "
                            f"such a line has {COLUMNS} numbers, and this one {len(parts)} words.")
    values = [float(part) for part in parts]
    if not all(map(math.isfinite, values)) or max(map(abs, values[7:])) > 1e6:
        raise VideoLDMError(f"Line {number} of the camera has a number that is too large for a camera's place.")
    if not all(0.05 <= focal <= 20 for focal in values[1:3]) or not all(0 <= middle <= 1 for middle in values[3:5]):
        raise VideoLDMError(f"Line {number} of the camera has the lens {', '.join(parts[1:5])}. These four are shares "
                            "of the picture's width and height, such as 0.5 0.9 0.5 0.5, and not pixels.")
    return values


def path_of(move: str, amount: float, text: str) -> tuple[CameraPath, str]:
    """(the camera of the text, or of the preset where the text is empty; the same in words)."""
    found = read_path(text)
    if found is not None:
        return found, found.in_words
    path = preset_path(move, amount)
    return path, f"{move} ({path.in_words})"
