"""A picture of a training log, drawn with Pillow alone.

    plot_log("run/log.jsonl", "run/log.png")
"""

import json
import math
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from ..atomic import write_atomically

SIZE = (900, 420)
MARGINS = (78, 34, 24, 40)          # left, top, right, bottom
COLOURS = ((31, 87, 164), (200, 92, 20), (40, 130, 60), (140, 60, 150))
SMOOTHING = 0.9


def read_log(path):
    """The lines of a log.jsonl as dicts; an unfinished last line is left out."""
    rows = []
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


def smooth(values):
    """Running average, corrected for its start."""
    average, weight, result = 0.0, 0.0, []
    for value in values:
        average = SMOOTHING * average + (1 - SMOOTHING) * value
        weight = SMOOTHING * weight + (1 - SMOOTHING)
        result.append(average / weight)
    return result


def ticks(low, high, count=5):
    """Round numbers in [low, high], about `count` of them."""
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = min((m * power for m in (1, 2, 5, 10)), key=lambda s: abs(s - raw))
    first = math.ceil(low / step - 1e-9)
    return [n * step for n in range(first, math.floor(high / step + 1e-9) + 1)]


def plot_log(log, png, names=("loss",), title=""):
    """Draw figures of a log over the steps: every line of the log pale, the running average strong."""
    rows = read_log(log)
    curves = {name: [(row["step"], row[name]) for row in rows if math.isfinite(row.get(name, math.nan))]
              for name in names}
    plot_curves(curves, png, title)


def plot_curves(curves, png, title=""):
    """Draw {name: [(x, y), ...]}, each pale and its running average strong; a sentence where there is nothing."""
    curves = {name: curve for name, curve in curves.items() if curve}
    image = Image.new("RGB", SIZE, "white")
    draw = ImageDraw.Draw(image)
    if curves:
        _draw_curves(draw, curves)
    else:
        draw.text((MARGINS[0], SIZE[1] // 2), "nothing logged yet", fill="black", font=ImageFont.load_default())
    legend = ", ".join(curves)
    draw.text((MARGINS[0], 10), f"{title}   {legend}".strip(), fill="black", font=ImageFont.load_default())
    write_atomically(png, lambda temporary: image.save(temporary, format="PNG"))


def _draw_curves(draw, curves):
    left, top, right, bottom = MARGINS
    points = [point for curve in curves.values() for point in curve]
    low_x, high_x = _widened([x for x, _ in points])
    low_y, high_y = _widened([y for _, y in points])

    def place(x, y):
        return (left + (x - low_x) / (high_x - low_x) * (SIZE[0] - left - right),
                SIZE[1] - bottom - (y - low_y) / (high_y - low_y) * (SIZE[1] - top - bottom))

    font = ImageFont.load_default()
    for y in ticks(low_y, high_y):
        draw.line([place(low_x, y), place(high_x, y)], fill=(225, 225, 225))
        draw.text((8, place(low_x, y)[1] - 6), f"{y:.4g}", fill="black", font=font)
    for x in ticks(low_x, high_x):
        draw.line([place(x, low_y), place(x, high_y)], fill=(225, 225, 225))
        draw.text((place(x, low_y)[0] - 12, SIZE[1] - bottom + 8), f"{x:.6g}", fill="black", font=font)
    for colour, curve in zip(COLOURS * len(curves), curves.values()):
        pale = tuple(255 - (255 - c) // 3 for c in colour)
        steps, values = zip(*curve)
        if len(curve) > 1:
            draw.line([place(x, y) for x, y in curve], fill=pale)
            draw.line([place(x, y) for x, y in zip(steps, smooth(values))], fill=colour, width=2)
        else:
            x, y = place(*curve[0])
            draw.ellipse([x - 2, y - 2, x + 2, y + 2], fill=colour)


def _widened(values):
    """The range of the values, never empty."""
    low, high = min(values), max(values)
    if high - low < 1e-12 * max(abs(low), abs(high), 1e-300):
        return low - max(abs(low), 1.0) / 2, high + max(abs(high), 1.0) / 2
    return low, high
