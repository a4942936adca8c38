"""The procedural driving world: a seeded renderer of road scenes that knows everything about what it shows.

One clip is a drive. It shows a road in perspective with a bend, lane marks and grass bands that move with the ego
speed, cars that keep their colour and drive at their own speeds, trees, hills, day or night. Everything is defined in
metres and seconds, so a seed shows the same drive at any resolution and frame rate. Edges are anti-aliased
analytically: each is blurred over the area of one pixel.

World axes: x to the right and z forward, in metres from the ego car; the camera looks along z at `CAMERA` metres.
No training seed is a held-out seed: see `train_seed` and `held_out_seed`.
"""

from dataclasses import dataclass

import numpy as np

HELD_OUT = 1 << 40                        # seeds from here on are never trained on
COLOURS = {"red": (205, 32, 36), "blue": (36, 84, 220), "yellow": (240, 196, 24), "white": (236, 236, 236),
           "green": (24, 160, 76)}
CAMERA, HORIZON, FOCAL = 2.3, 0.42, 0.80  # height in metres; horizon in image heights; focal length in image widths
NEAR, FAR = 4.5, 90.0                     # nothing is drawn outside this range of z
ROAD, SHOULDER = 5.4, 0.25                # half width of the asphalt and width of its white edge, metres
LANE = 3.6                                # lane width; the ego drives in the middle one of three lanes
DASH, BAND, TREE = 16.0, 24.0, 14.0       # periods along the road of lane dashes, grass bands and trees, metres
CAR_WIDTH, CAR_HEIGHT = 2.6, 1.9


@dataclass(frozen=True)
class Car:
    """One car."""
    lane: int           # -1 is the oncoming lane, 0 ours, 1 the right one
    start: float        # metres along the road at time 0
    speed: float        # metres per second
    colour: str


@dataclass(frozen=True)
class Scene:
    """Everything that defines a drive. `scene(seed)` makes it."""
    seed: int
    night: bool
    speed: float            # ego, metres per second
    steering: int           # -1 left, 0 straight, 1 right
    curvature: float        # 1/m at full bend; positive bends to the right
    bend_rate: float        # rad/s with which the bend opens and closes
    bend_phase: float
    phase: float            # metres along the road at time 0
    cars: tuple


@dataclass(frozen=True)
class Clip:
    """A rendered drive."""
    frames: np.ndarray      # uint8 (t, h, w, 3)
    caption: str
    labels: dict
    boxes: list             # per frame [(colour, x0, y0, x1, y1)] in fractions of the image, far cars first, clipped


def train_seed(index):
    """The index-th seed of the training set."""
    if not 0 <= index < HELD_OUT:
        raise ValueError(f"A training clip has an index from 0 to {HELD_OUT - 1}, not {index}.")
    return index


def held_out_seed(index):
    """The index-th seed that no training stage ever draws."""
    if index < 0:
        raise ValueError(f"A held-out clip has an index of 0 or more, not {index}.")
    return HELD_OUT + index


def scene(seed):
    """The drive that belongs to a seed."""
    rng = np.random.default_rng([20230418, seed])
    night = bool(rng.random() < 0.35)
    fast = bool(rng.random() < 0.5)
    speed = float(rng.uniform(11.0, 15.0) if fast else rng.uniform(4.0, 7.0))
    steering = int(rng.integers(-1, 2))
    curvature = steering * float(rng.uniform(0.010, 0.018)) + float(rng.uniform(-0.001, 0.001))
    crowd = int(rng.choice(3, p=(0.15, 0.35, 0.5)))
    cars = _draw_cars(rng, crowd, speed)
    return Scene(seed, night, speed, steering, curvature, float(rng.uniform(0.3, 0.6)),
                 float(rng.uniform(0, 2 * np.pi)), float(rng.uniform(0, 1000)), cars)


def _draw_cars(rng, crowd, ego):
    """Up to three cars, at most one per lane, so that they do not collide."""
    count = (0, 1, 3)[crowd] if crowd < 2 else int(rng.integers(2, 4))
    lanes = rng.permutation([0, 1, -1])[:count]
    colours = rng.permutation(list(COLOURS))
    cars = []
    for lane, colour in zip(lanes, colours):
        if lane == 0:                     # ahead of us, closing in or getting away slowly
            relative = float(rng.uniform(-2.0, 2.0))
            start = float(rng.uniform(11.0, 17.0)) - min(relative, 0.0) * 1.5
            speed = ego + relative
        elif lane == 1:                   # overtakes us or falls back
            relative = float(rng.choice([-1, 1]) * rng.uniform(1.5, 4.0))
            start = float(rng.uniform(7.0, 14.0) if relative > 0 else rng.uniform(14.0, 26.0))
            speed = ego + relative
        else:                             # oncoming
            speed = -float(rng.uniform(3.0, 7.0))
            start = float(rng.uniform(25.0, 60.0))
        cars.append(Car(int(lane), start, speed, str(colour)))
    return tuple(cars)


def labels(drive):
    """The labels that the caption is made of and that the metric network learns to tell."""
    return {"night": int(drive.night), "speed": drive.speed, "fast": int(drive.speed > 9), "steering": drive.steering,
            "crowdedness": min(len(drive.cars), 2), "cars": len(drive.cars),
            "colours": tuple(car.colour for car in drive.cars), "lanes": tuple(car.lane for car in drive.cars)}


def caption(drive):
    """One sentence about a drive, e.g. "a busy road at night, driving fast, turning left, a red car and a blue car"."""
    crowd = ("an empty road", "a quiet road", "a busy road")[min(len(drive.cars), 2)]
    light = "at night" if drive.night else "by day"
    pace = "driving fast" if drive.speed > 9 else "driving slow"
    bend = {-1: "turning left", 0: "going straight", 1: "turning right"}[drive.steering]
    cars = " and ".join(f"a {car.colour} car" for car in drive.cars)
    return ", ".join(part for part in (f"{crowd} {light}", pace, bend, cars) if part)


def clip(seed, frames=8, height=64, width=128, fps=4.0, start=0.0):
    """Render `frames` pictures of the drive of `seed`, from `start` seconds on."""
    drive = scene(seed)
    pictures = np.empty((frames, height, width, 3), np.uint8)
    times = [start + k / fps for k in range(frames)]
    for k, time in enumerate(times):
        pictures[k] = render(drive, time, height, width)
    return Clip(pictures, caption(drive), labels(drive), [boxes(drive, time, height, width) for time in times])


# ------------------------------------------------------------------------------------------------------ rendering

def render(drive, time, height, width):
    """One picture uint8 `(h, w, 3)` of a drive at a time in seconds."""
    view = _View(drive, time, height, width)
    _paint_sky(view)
    _paint_ground(view)
    _paint_things(view)
    return (np.clip(view.image, 0, 1) * 255 + 0.5).astype(np.uint8)


class _View:
    """The camera at one moment: the picture that is being painted, and the projection into it."""

    def __init__(self, drive, time, height, width):
        self.drive, self.time, self.height, self.width = drive, time, height, width
        self.image = np.zeros((height, width, 3), np.float32)
        self.focal = FOCAL * width
        self.horizon = HORIZON * height
        self.travel = drive.phase + drive.speed * time
        bend = 0.8 + 0.2 * np.sin(drive.bend_rate * time + drive.bend_phase)
        self.curvature = drive.curvature * bend
        self.heading = self.curvature * 0.5 * drive.speed * time      # how far the hills have turned, radians
        self.columns = np.arange(width, dtype=np.float32) + 0.5
        self.rows = np.arange(height, dtype=np.float32) + 0.5

    def bend(self, z):
        """Sideways shift of the road at a depth, metres: a circle of radius 1/curvature, to second order."""
        return 0.5 * self.curvature * z * z

    def ahead(self, car):
        """How far ahead of the ego car another is, metres."""
        return car.start + (car.speed - self.drive.speed) * self.time

    def point(self, x, y, z):
        """Picture coordinates, in pixels, of a point `x` metres right of the road's middle, `y` above it, `z` ahead."""
        scale = self.focal / z
        return self.width / 2 + (x + self.bend(z)) * scale, self.horizon + (CAMERA - y) * scale

    def tint(self, colour, light=None):
        """A colour 0..255 as it looks at this hour, 0..1."""
        colour = np.asarray(colour, np.float32) / 255
        if not self.drive.night:
            return colour
        return colour * (0.4 if light is None else light)


def _paint_sky(view):
    top, low = ((14, 18, 48), (40, 44, 84)) if view.drive.night else ((84, 150, 232), (196, 222, 244))
    blend = np.clip(view.rows / view.horizon, 0, 1)[:, None]
    sky = (np.asarray(top) * (1 - blend) + np.asarray(low) * blend) / 255
    view.image[:] = sky[:, None, :]
    angle = (view.columns - view.width / 2) / view.focal + view.heading
    crest = 0.055 + 0.030 * np.sin(3.0 * angle + view.drive.phase) + 0.014 * np.sin(7.0 * angle + 2 * view.drive.phase)
    cover = np.clip(view.rows[:, None] - (view.horizon - crest * view.width * 0.5)[None, :] + 0.5, 0, 1)
    _blend(view.image, cover, view.tint((96, 128, 150), 0.30))


def _paint_ground(view):
    first = int(np.floor(view.horizon))
    rows = view.rows[first:]
    below = np.maximum(rows - view.horizon, 0.25)
    z = CAMERA * view.focal / below                                   # depth of each row
    long = z / below                                                  # metres of road per pixel row
    side = z / view.focal                                             # metres per pixel column
    x = (view.columns[None, :] - view.width / 2) * side[:, None] - view.bend(z)[:, None]
    along = z + view.travel

    bands = _square(along, BAND, 0.5, long)[:, None, None]
    image = bands * view.tint((92, 158, 62), 0.30) + (1 - bands) * view.tint((64, 126, 46), 0.30)
    image = np.broadcast_to(image, x.shape + (3,)).astype(np.float32)
    distance, unit = np.abs(x), side[:, None]
    _blend(image, _below(distance, ROAD + SHOULDER, unit), view.tint((226, 226, 226), 0.55))
    _blend(image, _below(distance, ROAD, unit), view.tint((98, 98, 104), 0.34))
    dash = _square(along, DASH, 0.4, long)[:, None]
    lines = np.clip((0.16 - np.abs(distance - LANE / 2)) / unit + 0.5, 0, np.minimum(1, 0.32 / unit))
    _blend(image, lines * dash, view.tint((238, 238, 238), 0.75))
    if view.drive.night:                                              # the ego car's headlights
        beam = np.exp(-((z[:, None] - 9) / 9) ** 2 - (x / 3.2) ** 2)
        image *= (1 + 0.9 * beam)[..., None]
    haze = np.clip((z - 30) / 70, 0, 0.75)[:, None]
    _blend(image, np.broadcast_to(haze, x.shape), view.tint((170, 196, 206), 0.22))
    cover = np.clip(rows - view.horizon + 0.5, 0, 1)[:, None, None]
    view.image[first:] = view.image[first:] * (1 - cover) + image * cover


def _paint_things(view):
    """Trees and cars, far ones first."""
    things = [(z, "tree", side) for z, side in _trees(view)]
    things += [(view.ahead(car), "car", car) for car in view.drive.cars]
    for z, kind, what in sorted((thing for thing in things if NEAR < thing[0] < FAR), key=lambda thing: -thing[0]):
        if kind == "tree":
            _paint_tree(view, what, z)
        else:
            _paint_car(view, what, z)


def boxes(drive, time, height=64, width=128):
    """The cars in the picture of a drive at a time in seconds: (colour, x0, y0, x1, y1), far ones first."""
    view = _View(drive, time, height, width)
    found = []
    for car in sorted(drive.cars, key=lambda car: -view.ahead(car)):
        z = view.ahead(car)
        if NEAR < z < FAR:
            centre, foot = view.point(car.lane * LANE, 0.0, z)
            half, tall = CAR_WIDTH / 2 * view.focal / z, CAR_HEIGHT * view.focal / z
            corners = ((centre - half) / width, (foot - tall) / height, (centre + half) / width, foot / height)
            x0, y0, x1, y1 = (float(min(max(corner, 0.0), 1.0)) for corner in corners)
            if x1 > x0 and y1 > y0:
                found.append((car.colour, x0, y0, x1, y1))
    return found


def _trees(view):
    first = int(np.ceil((view.travel + NEAR) / TREE))
    for number in range(first, first + int(60 / TREE)):
        yield number * TREE - view.travel, 1 if number % 2 else -1


def _paint_tree(view, side, z):
    centre, foot = view.point(side * (ROAD + 3.4), 0.0, z)
    scale = view.focal / z
    _box(view, centre - 0.22 * scale, foot - 2.2 * scale, centre + 0.22 * scale, foot, view.tint((96, 66, 40), 0.3))
    _disc(view, centre, foot - 3.3 * scale, 1.55 * scale, 1.9 * scale, view.tint((30, 96, 44), 0.28))


def _paint_car(view, car, z):
    """Draw a car as seen from behind, or from the front if it is oncoming."""
    centre, foot = view.point(car.lane * LANE, 0.0, z)
    scale = view.focal / z
    half, tall = CAR_WIDTH / 2 * scale, CAR_HEIGHT * scale
    paint = np.asarray(COLOURS[car.colour])
    body, roof = view.tint(paint, 0.62), view.tint(paint * 0.82, 0.56)
    _disc(view, centre, foot, half * 1.15, 0.16 * scale, view.tint((40, 40, 44), 0.2))
    for wheel in (-1, 1):
        _box(view, centre + wheel * half * 0.68 - 0.22 * scale, foot - 0.45 * scale,
             centre + wheel * half * 0.68 + 0.22 * scale, foot, view.tint((26, 26, 28)))
    _box(view, centre - half * 0.76, foot - tall, centre + half * 0.76, foot - tall * 0.5, roof)
    _box(view, centre - half * 0.62, foot - tall * 0.9, centre + half * 0.62, foot - tall * 0.58,
         view.tint((44, 58, 78), 0.5))
    _box(view, centre - half, foot - tall * 0.62, centre + half, foot - 0.22 * scale, body)
    lamp = np.asarray((255, 250, 214) if car.lane == -1 else (255, 40, 30)) / 255
    for end in (-1, 1):
        _box(view, centre + end * half * 0.76 - 0.2 * scale, foot - tall * 0.52,
             centre + end * half * 0.76 + 0.2 * scale, foot - tall * 0.36, lamp * (1.0 if view.drive.night else 0.85))


# ------------------------------------------------------------------------------------------------- anti-aliased ink

def _square(position, period, duty, footprint):
    """A 0/1 wave along the road, averaged over each row's footprint: far away it fades to `duty`."""
    def area(at):
        turns = np.floor(at / period)
        return turns * duty * period + np.minimum(at - turns * period, duty * period)
    return (area(position + footprint / 2) - area(position - footprint / 2)) / footprint


def _below(value, edge, unit):
    """How much of a pixel of size `unit` lies at `value < edge`, 0..1."""
    return np.clip((edge - value) / unit + 0.5, 0, 1)


def _blend(image, cover, colour):
    """image <- cover * colour + (1 - cover) * image, in place."""
    image += cover[..., None] * (np.asarray(colour, np.float32) - image)


def _window(view, x0, y0, x1, y1):
    """The slices of the picture that a shape touches, and its pixel centres; None outside the picture."""
    left, right = max(int(x0) - 1, 0), min(int(x1) + 2, view.width)
    top, bottom = max(int(y0) - 1, 0), min(int(y1) + 2, view.height)
    if left >= right or top >= bottom:
        return None
    return view.image[top:bottom, left:right], view.columns[left:right], view.rows[top:bottom]


def _box(view, x0, y0, x1, y1, colour):
    """A filled rectangle; each pixel takes the share that it covers."""
    found = _window(view, x0, y0, x1, y1)
    if found is None:
        return
    image, columns, rows = found
    across = np.clip(np.minimum(columns + 0.5, x1) - np.maximum(columns - 0.5, x0), 0, 1)
    down = np.clip(np.minimum(rows + 0.5, y1) - np.maximum(rows - 0.5, y0), 0, 1)
    _blend(image, down[:, None] * across[None, :], colour)


def _disc(view, x, y, rx, ry, colour):
    """A filled ellipse with one soft pixel of edge."""
    found = _window(view, x - rx, y - ry, x + rx, y + ry)
    if found is None:
        return
    image, columns, rows = found
    radius = np.sqrt(((columns[None, :] - x) / rx) ** 2 + ((rows[:, None] - y) / ry) ** 2)
    _blend(image, np.clip((1 - radius) * min(rx, ry) + 0.5, 0, 1), colour)
