"""Whether cars keep their colour within a clip: columns of the key-frames table of `bench --quality`.

Where a sampled car should be is not known, so cars are found by their paint. A piece of paint is a group of LEAST
pixels or more on the ground that are nearer to the paint than to any other colour of the world. A car is followed from
frame to frame by its position and width. It continues as a piece of the same paint. Only where there is none does it
continue as a piece of another paint; it has then changed its colour. The figure is a share of the cars that are
clearly seen in SEEN frames or more: those with one paint in all of them. It does not say how well cars move. Frames of
a real clip in another order score as well. Frames of unrelated clips score next to nothing, and a third of the cars is
found in them.
"""

import math
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from ..demo import world
from .scene_layout_quality import nearest

LEAST, SEEN = 20, 4             # pixels of a piece of paint; frames in which a car is seen
REACH = 0.7                     # of a car's width: the way of an oncoming car in a quarter of a second
GROWTH = 2.2                    # how much wider it becomes in that time
MISSED = 1                      # frames in which a car may be hidden
DARK = 90                       # mean of the sky, 0..255, below which it is night
PAINTS = tuple(world.COLOURS)
# Trees, trunks, windows, shadows, wheels; greys of edges; at night, when all of it is tinted, marks in the headlights.
OTHERS = ((30, 96, 44), (96, 66, 40), (44, 58, 78), (40, 40, 44), (26, 26, 28),
          (150, 150, 150), (350, 350, 350), (520, 520, 520), (700, 700, 700))


@dataclass(frozen=True)
class Piece:
    """A connected piece of paint."""
    frame: int      # its number
    colour: str
    pixels: int     # how many
    x0: int         # its box, in pixels
    y0: int
    x1: int
    y1: int

    @property
    def width(self):
        return self.x1 - self.x0

    @property
    def height(self):
        return self.y1 - self.y0

    @property
    def centre(self):
        return (self.x0 + self.x1) / 2, (self.y0 + self.y1) / 2

    def holds(self, other):
        """Whether another piece's centre lies in the box of this one: a lamp on a body."""
        x, y = other.centre
        return self.x0 < x < self.x1 and self.y0 < y < self.y1


def figures_of(clips):
    """Two figures of uint8 clips (n t h w 3): the share of cars that keep their colour, and cars per clip."""
    cars = [car for clip in clips for car in cars_of(clip)]
    return (float(np.mean([keeps_colour(car) for car in cars])) if cars else math.nan), len(cars) / len(clips)


def cars_of(clip):
    """The cars of a clip, uint8 (t h w 3), that are clearly seen in SEEN frames or more: lists of pieces."""
    return [car for car in follow(pieces_of(clip)) if len(car) >= SEEN]


def keeps_colour(car):
    return len({piece.colour for piece in car}) == 1


def pieces_of(clip):
    """The pieces of paint in each frame of a clip, uint8 (t h w 3)."""
    horizon = int(world.HORIZON * clip.shape[1]) + 1
    paint = np.full(clip.shape[:3], -1)
    paint[:, horizon:] = nearest(clip[:, horizon:], clip[:, :horizon // 2].mean() < DARK, OTHERS)
    return [pieces_of_frame(number, frame) for number, frame in enumerate(paint)]


def pieces_of_frame(number, paint):
    """The pieces in a picture of colour indices (h w), large ones first, without the lamps on them."""
    found = [piece for index, colour in enumerate(PAINTS)
             for piece in connected(number, colour, solid(paint == index) if colour == "white" else paint == index)]
    found.sort(key=lambda piece: -piece.pixels)
    return [piece for number, piece in enumerate(found) if not any(large.holds(piece) for large in found[:number])]


def solid(mask):
    """A mask (h w) without lane marks, which are white like cars but narrow."""
    return ndimage.binary_opening(mask, np.ones((2, 5)))


def connected(number, colour, mask):
    """The pieces of LEAST pixels or more in a mask (h w). A gap of one pixel does not separate two."""
    labels, _ = ndimage.label(ndimage.binary_dilation(mask, np.ones((2, 2))), np.ones((3, 3)))
    labels[~mask] = 0
    for label, (rows, columns) in enumerate(ndimage.find_objects(labels), 1):
        pixels = int((labels[rows, columns] == label).sum())
        if pixels >= LEAST:
            yield Piece(number, colour, pixels, columns.start, rows.start, columns.stop, rows.stop)


def follow(frames):
    """Cars, as lists of pieces, from the pieces of each frame."""
    cars: list[list[Piece]] = []
    for number, pieces in enumerate(frames):
        free = list(pieces)
        for same in (True, False):
            going = [car for car in cars if number - 1 - MISSED <= car[-1].frame < number]
            pairs = [(distance(car[-1], piece), at, piece) for at, car in enumerate(going) for piece in free
                     if (car[-1].colour == piece.colour) is same]
            for away, at, piece in sorted(pairs, key=lambda pair: pair[0]):
                if away <= REACH and piece in free and going[at][-1].frame < number:
                    going[at].append(piece)
                    free.remove(piece)
        cars += [[piece] for piece in free]
    return cars


def distance(before, after):
    """How far two pieces are apart, in widths of a car per frame. Infinite where no car grows like that."""
    frames = after.frame - before.frame
    small, large = sorted((before.width, after.width))
    if large > small * GROWTH ** frames:
        return np.inf
    (x0, y0), (x1, y1) = before.centre, after.centre
    return float(np.hypot(x1 - x0, y1 - y0)) / large / frames
