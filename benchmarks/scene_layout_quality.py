"""Whether Scene Layout is followed: cars in their boxes, and day or night. A part of `bench --quality`.

Scenes are held out and have at least one car. The figure is the share of pixels in the body of each box that have the
paint of its car: they are nearer to it than to any other paint or ground of the world. Beside it stands the same share
in real frames, without a layout, and in the boxes of another scene.
"""

import numpy as np
import torch
from PIL import Image

from ..demo import bundle, models, scene_layout_stage, world
from ..nodes.host import for_benchmarks
from ..nodes.host.layout_conditioning import layout_patcher, with_layout
from ..temporal.families import load_layout
from ..temporal.scene_layout import concatenate_layouts
from .cascade import SAMPLER, SCHEDULER, Cascade

SCENES, STEPS, CFG = 64, 20, 3.0
BODY = (0.38, 0.88)             # of a car's height, from its top: paint from side to side, without windows and wheels
GROUND = ((98, 98, 104), (92, 158, 62), (64, 126, 46), (226, 226, 226), (170, 196, 206))
NEAR = 0.08                     # width from which a box is a near car, of the picture
REAL, TEXT, OURS = "real frames", "text alone, the scene's caption", "Scene Layout"
SHEET = 8


def control(arguments):
    """The table of Scene Layout, and sentences on what does not hold."""
    seeds = scenes_with_cars(min(arguments.clips, SCENES))
    cascade = Cascade(arguments.models, arguments.train, STEPS, CFG)
    captions = torch.cat([cascade.text(world.caption(world.scene(seed))) for seed in seeds])
    real = np.stack([world.render(world.scene(seed), 0.0, models.HEIGHT, models.WIDTH) for seed in seeds])
    empty = cascade.null.expand(len(seeds), -1, -1)
    said, unsaid = layouts(arguments.models / bundle.LAYOUT_FILE, empty, seeds)
    rows = {REAL: real, TEXT: sampled(cascade, [[captions, {}]], [[empty, {}]]), OURS: sampled(cascade, said, unsaid)}
    sheet(rows).save(arguments.output / "layout.png")
    figures = {name: figures_of(frames, seeds, real) for name, frames in rows.items()}
    return table(figures, len(seeds)), verdict(figures)


def scenes_with_cars(count: int) -> list[int]:
    """The first held-out seeds whose drive begins with a car in the picture."""
    seeds: list[int] = []
    number = 0
    while len(seeds) < count:
        if world.boxes(world.scene(world.held_out_seed(number)), 0.0):
            seeds.append(world.held_out_seed(number))
        number += 1
    return seeds


def layouts(path, text, seeds):
    """CONDITIONING with the scenes' layouts, and with an empty layout."""
    scenes = [scene_layout_stage.layout_of(world.scene(seed), [0.0]) for seed in seeds]
    patcher = layout_patcher(load_layout(path), str(path))
    return [with_layout([[text, {}]], patcher, layout) for layout in (concatenate_layouts(scenes), None)]


@torch.inference_mode()
def sampled(cascade, positive, negative):
    """Pictures, uint8 `(n h w 3)`, all from the same noise for every row."""
    count = len(positive[0][0])
    latent = torch.zeros(count, models.UNET.latent_channels, models.HEIGHT // 8, models.WIDTH // 8)
    return cascade.decode(for_benchmarks.sample(cascade.model, latent, 0, STEPS, CFG, SAMPLER, SCHEDULER, positive,
                                                negative))


def figures_of(frames, seeds, real):
    """(share of paint in the boxes, in those of near cars, in those of another scene, share of the right light)."""
    scenes = [world.scene(seed) for seed in seeds]
    own, other = (np.concatenate([shares(frame, scene) for frame, scene in zip(frames, shown)])
                  for shown in (scenes, scenes[1:] + scenes[:1]))
    night = np.array([scene.night for scene in scenes])
    light, true_light = frames.mean((1, 2, 3)), real.mean((1, 2, 3))
    middle = (true_light[night].mean() + true_light[~night].mean()) / 2
    return own[:, 0].mean(), own[own[:, 1] >= NEAR, 0].mean(), other[:, 0].mean(), ((light < middle) == night).mean()


def shares(frame, scene):
    """(share of paint, width) of the boxes of a scene: n 2. Of n boxes, which may be none."""
    pairs = [(share_of_paint(frame, corners, colour, scene.night), corners[2] - corners[0])
             for colour, *corners in world.boxes(scene, 0.0)]
    return np.array(pairs).reshape(-1, 2)


def share_of_paint(frame, corners, colour, night):
    height, width = frame.shape[:2]
    x0, y0, x1, y1 = corners
    top, foot = (round((y0 + part * (y1 - y0)) * height) for part in BODY)
    left, right = round(x0 * width), round(x1 * width)
    body = frame[top:max(foot, top + 1), left:max(right, left + 1)]
    return (nearest(body, night) == list(world.COLOURS).index(colour)).mean()


def nearest(pixels, night, more=()):
    """Which colour of the world uint8 pixels (... 3) are nearest to: its paints in their order, then GROUND and `more`.

    At night the colours are tinted as the world tints cars and ground.
    """
    paints = np.array(list(world.COLOURS.values())) * (0.62 if night else 1.0)
    colours = np.concatenate([paints, np.array((*GROUND, *more)) * (0.34 if night else 1.0)]).astype(np.float32)
    # |a - b|^2 without |a|^2, which is the same for all colours
    return (np.square(colours).sum(-1) - 2 * pixels.astype(np.float32) @ colours.T).argmin(-1)


def table(figures, count):
    lines = [f"{count} held-out scenes with a car or more; share of the pixels in the bodies of the boxes that have",
             f"the car's paint; {SAMPLER}, {STEPS} steps, cfg {CFG:g}.", "",
             "| pictures | paint in the boxes | near cars alone | in another scene's boxes | right light |",
             "|---|---|---|---|---|"]
    lines += [f"| {name} | {own:.2f} | {near:.2f} | {other:.2f} | {light:.2f} |"
              for name, (own, near, other, light) in figures.items()]
    return "\n".join(lines) + "\n"


def verdict(figures):
    (real, *_), (text, *_), (ours, _, other, _) = (figures[name] for name in (REAL, TEXT, OURS))
    failures = []
    if ours < real / 2:
        failures.append(f"FAILED: Scene Layout has {ours:.2f} of paint in the boxes, under half of real ({real:.2f}).")
    for name, low in (("text alone", text), ("the boxes of another scene", other)):
        if ours < 2 * low:
            failures.append(f"FAILED: Scene Layout ({ours:.2f}) has less than twice the paint of {name} ({low:.2f}).")
    return failures


def sheet(rows):
    """The first scenes, a row each: real, text alone, Scene Layout."""
    strips = [np.concatenate([frames[number] for frames in rows.values()], axis=1) for number in range(SHEET)]
    return Image.fromarray(np.concatenate(strips, axis=0))
