"""Previews of a clip: pictures of it in one sheet, and what the page needs to play them.

The sheet is core's own kind of preview, so it is seen on every page. Just before it the server tells the page where in
it the pictures are. The pack's script cuts them out and plays them in the node (web/js/moving_preview.js).
"""

import math
from collections.abc import Sequence

import latent_preview
import torch
from PIL import Image

from . import notes

EVENT = "video_ldm.preview"     # web/js/moving_preview.js listens to it
MOST_PICTURES = 16              # of a clip
PREVIEW_SHAPE = 1.5             # width / height of the room for a preview in a node
USUAL_RATE = 8.0                # frames per second where nobody says


def spread(frames: int) -> list[int]:
    """The numbers of the frames that are shown of a clip, evenly spaced from the first to the last."""
    if frames <= MOST_PICTURES:
        return list(range(frames))
    return [round(number) for number in torch.linspace(0, frames - 1, MOST_PICTURES).tolist()]


def sheet_preview(pictures: Sequence, rate: float, moving: int | None = None) -> tuple:
    """Pictures in rows, as core's progress bar takes a preview. The page is told how to play them: show it at once.

    Args:
        pictures: PIL pictures of one size.
        rate: pictures per second.
        moving: how many of them are a clip; those behind it stand still beside it. None: all.
    """
    width, height = pictures[0].size
    columns = columns_of(len(pictures), width, height)
    sheet = Image.new("RGB", (width * columns, height * math.ceil(len(pictures) / columns)))
    for number, picture in enumerate(pictures):
        row, column = divmod(number, columns)
        sheet.paste(picture.convert("RGB"), (width * column, height * row))
    tell_page(len(pictures), columns, len(pictures) if moving is None else moving, rate)
    return "JPEG", sheet, latent_preview.MAX_PREVIEW_RESOLUTION * 2


def tell_page(pictures: int, columns: int, moving: int, rate: float) -> None:
    """Tell the page how the next preview of the running node is cut and played. One picture cannot move."""
    if moving > 1:
        notes.send(EVENT, {"columns": columns, "rows": math.ceil(pictures / columns), "frames": moving,
                           "still": pictures - moving, "fps": rate})


def columns_of(count: int, width: int, height: int) -> int:
    """Columns for `count` pictures of a size. The sheet is as near as it can be to the shape of a node's preview."""
    def distance(columns: int) -> float:
        return abs(math.log(columns * width / (math.ceil(count / columns) * height) / PREVIEW_SHAPE))
    return min(range(1, count + 1), key=distance)
