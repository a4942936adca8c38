"""The curves of a training log: as a picture, drawn with Pillow, and as a CSV file.

    plot_log("run/log.jsonl", "run/log.png")
    write_csv("run/log.jsonl", "run/log.csv")
"""

import csv
import io
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from ..atomic import write_atomically, write_text

Point = tuple[float, float]
Curves = Mapping[str, Sequence[Point]]

SIZE = (900, 420)
LEFT, RIGHT, BOTTOM = 78, 24, 40    # margins, pixels
ROW = 18                            # height of a line of text
SAMPLE = 34                         # length of the piece of line in the legend
SMOOTHING = 0.9
# Each curve has a colour and a pattern of dashes (drawn, left out, ... in pixels), so that they differ in grey as well.
STYLES = (((31, 87, 164), ()), ((200, 92, 20), (9, 5)), ((40, 130, 60), (2, 4)), ((140, 60, 150), (12, 4, 2, 4)),
          ((20, 20, 20), (5, 3)), ((0, 150, 160), (16, 6)))
GRID = (225, 225, 225)


def read_log(path) -> list[dict]:
    """The lines of a log.jsonl as dicts. An unfinished last line is left out."""
    rows = []
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


def write_csv(log, path) -> None:
    """Write every line of a log.jsonl as a row, under the names of all its figures. Absent figures are left empty."""
    rows = read_log(log)
    names = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def smooth(values: Sequence[float]) -> list[float]:
    """Running average, corrected for its start."""
    average, weight, result = 0.0, 0.0, []
    for value in values:
        average = SMOOTHING * average + (1 - SMOOTHING) * value
        weight = SMOOTHING * weight + (1 - SMOOTHING)
        result.append(average / weight)
    return result


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers in [low, high], about `count` of them."""
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = min((m * power for m in (1, 2, 5, 10)), key=lambda s: abs(s - raw))
    first = math.ceil(low / step - 1e-9)
    return [n * step for n in range(first, math.floor(high / step + 1e-9) + 1)]


def plot_log(log, png, names: Sequence[str] = ("loss",), title: str = "") -> None:
    """Draw figures of a log over the steps: every line of the log pale, the running average strong."""
    rows = read_log(log)
    curves = {name: [(row["step"], row[name]) for row in rows if math.isfinite(row.get(name, math.nan))]
              for name in names}
    plot_curves(curves, png, title, smoothed=True)


def plot_curves(curves: Curves, png, title: str = "", smoothed: bool = False) -> None:
    """Draw curves (x, y) with a legend of their names; a sentence where there is nothing.

    With `smoothed` the values are pale and their running average is strong. Without it they are marked and joined.
    """
    curves = {name: curve for name, curve in curves.items() if curve}
    note = "pale: each value, strong: running average" if smoothed and curves else ""
    image = Image.new("RGB", SIZE, "white")
    plot = _Plot(ImageDraw.Draw(image))
    plot.draw_head(title, list(curves), note)
    if curves:
        plot.draw_axes(curves)
        for number, curve in enumerate(curves.values()):
            plot.draw_curve(curve, number, smoothed)
    else:
        plot.text((LEFT, SIZE[1] // 2), "nothing logged yet")
    write_atomically(png, lambda temporary: image.save(temporary, format="PNG"))


class _Plot:
    """One picture that is being drawn: first its head, then its axes, then the curves."""

    def __init__(self, draw: ImageDraw.ImageDraw):
        self.draw, self.font = draw, ImageFont.load_default()
        self.top = ROW              # where the axes begin: below title and legend
        self.x_range = self.y_range = (0.0, 1.0)

    def text(self, corner: Point, words: str, colour="black") -> None:
        self.draw.text(corner, words, fill=colour, font=self.font)

    def draw_head(self, title: str, names: Sequence[str], note: str) -> None:
        """The title, then a piece of each curve's line beside its name, in as many rows as that takes."""
        x, y = LEFT, 8
        self.text((x, y), title)
        y += ROW if title else 0
        for number, name in enumerate(names):
            width = SAMPLE + 8 + self.draw.textlength(name, font=self.font) + 22
            if x > LEFT and x + width > SIZE[0] - RIGHT:
                x, y = LEFT, y + ROW
            self.draw_line([(x, y + 6), (x + SAMPLE, y + 6)], number)
            self.text((x + SAMPLE + 8, y), name)
            x += int(width)
        if note and x + self.draw.textlength(note, font=self.font) > SIZE[0] - RIGHT:
            x, y = LEFT, y + ROW
        self.text((x, y), note, (110, 110, 110))
        self.top = y + ROW + 6

    def draw_axes(self, curves: Curves) -> None:
        points = [point for curve in curves.values() for point in curve]
        self.x_range, self.y_range = (_widened([point[axis] for point in points]) for axis in (0, 1))
        (low_x, high_x), (low_y, high_y) = self.x_range, self.y_range
        for y in ticks(low_y, high_y):
            self.draw.line([self.pixel_of(low_x, y), self.pixel_of(high_x, y)], fill=GRID)
            self.text((8, self.pixel_of(low_x, y)[1] - 6), f"{y:.4g}")
        for x in ticks(low_x, high_x):
            self.draw.line([self.pixel_of(x, low_y), self.pixel_of(x, high_y)], fill=GRID)
            self.text((self.pixel_of(x, low_y)[0] - 12, SIZE[1] - BOTTOM + 8), f"{x:.6g}")

    def draw_curve(self, curve: Sequence[Point], number: int, smoothed: bool) -> None:
        colour = STYLES[number % len(STYLES)][0]
        points = [self.pixel_of(*point) for point in curve]
        if smoothed and len(curve) > 1:
            self.draw.line(points, fill=tuple(255 - (255 - part) // 3 for part in colour))
            values = smooth([y for _, y in curve])
            points = [self.pixel_of(x, y) for (x, _), y in zip(curve, values, strict=True)]
        else:
            for x, y in points:
                self.draw.ellipse([x - 3, y - 3, x + 3, y + 3], fill=colour)
        self.draw_line(points, number)

    def draw_line(self, points: Sequence[Point], number: int) -> None:
        """A line through points in the style of a curve."""
        colour, pattern = STYLES[number % len(STYLES)]
        for piece in dashes(points, pattern) if pattern else [points]:
            if len(piece) > 1:
                self.draw.line(list(piece), fill=colour, width=2)

    def pixel_of(self, x: float, y: float) -> Point:
        """Where a value lies in the picture."""
        (low_x, high_x), (low_y, high_y) = self.x_range, self.y_range
        return (LEFT + (x - low_x) / (high_x - low_x) * (SIZE[0] - LEFT - RIGHT),
                SIZE[1] - BOTTOM - (y - low_y) / (high_y - low_y) * (SIZE[1] - self.top - BOTTOM))


def dashes(points: Sequence[Point], pattern: Sequence[int]) -> Iterator[list[Point]]:
    """The drawn pieces of a line through points. pattern: lengths that are drawn and left out in turn."""
    turn, left = 0, float(pattern[0])
    piece = [points[0]]
    for (x0, y0), (x1, y1) in zip(points, points[1:], strict=False):
        length, done = math.hypot(x1 - x0, y1 - y0), 0.0
        while length - done >= left:
            done += left
            corner = (x0 + (x1 - x0) * done / length, y0 + (y1 - y0) * done / length)
            if turn % 2 == 0:
                yield [*piece, corner]
            turn += 1
            left, piece = float(pattern[turn % len(pattern)]), [corner]
        left -= length - done
        piece.append((x1, y1))
    if turn % 2 == 0:
        yield piece


def _widened(values: Sequence[float]) -> tuple[float, float]:
    """The range of the values, never empty."""
    low, high = min(values), max(values)
    if high - low < 1e-12 * max(abs(low), abs(high), 1e-300):
        return low - max(abs(low), 1.0) / 2, high + max(abs(high), 1.0) / 2
    return low, high
