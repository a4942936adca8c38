"""Joint training on pictures and clips: `python run.py bench --quality --part joint`.

LaVie's claim in small (docs/papers.md#lavie-joint-training): a network that learns from clips alone forgets what its
image model knew and no clip shows. Pictures beside the clips keep it. demo/joint_stage.py says what clips and pictures
show, and trains both networks. Prompts then name what no clip has: a car of PAINT by day, or the night. A clip shows
what its prompt names if half of its frames do. The image model makes a clip of unrelated pictures under each prompt.
The other clips are of drives as the training clips show them. What was trained and sampled is kept in the folder of
the tables, so an interrupted measurement goes on.
"""

import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch

from ..demo import joint_stage, models, world
from ..demo.features import features_of, load_network
from ..nodes.host.video_network import load_video_network
from ..temporal.families import load_video_model
from ..temporal.formats.video_network import VideoNetwork
from ..temporal.metrics import frechet_distance, motion_ratio
from . import colours
from .cascade import SAMPLER, SECOND, SHUFFLED, Cascade, in_batches, shuffled

PAINT = "blue"
STEPS, CFG = 10, 2.0                        # of the sampler
NAMED, NIGHTS, OTHERS = 16, 24, 32          # clips with a prompt for the paint, for the night, and for neither
REAL, FIRST = 256, 2000                     # real clips for the distance; the first held-out drive of the prompts
SHARE = 0.5                                 # of the frames of a clip
LEAST_KEPT, MOST_LEFT = 2 / 3, 1 / 2        # of the image model's share: with pictures, and with clips alone
IMAGE, NETWORKS = "image model, fine-tuned on nothing", {joint_stage.ALONE: "trained on clips alone",
                                                        joint_stage.JOINT: "trained on clips and pictures"}
HEAD = ["| network | show the night | show the paint | frames with the paint | distance of other clips | motion |",
        "|---|---|---|---|---|---|"]


def joint(arguments) -> tuple[str, list[str]]:
    """The table, and sentences on what does not hold."""
    folder = Path(arguments.output) / "joint"
    cascade = Cascade(arguments.models, arguments.train, STEPS, CFG)
    drives = prompts(arguments.clips)
    measure = Measure(arguments.models, drives, folder)
    real = {name: np.stack(list(map(joint_stage.film, found))) for name, found in drives.items()}
    rows = {SECOND: measure.row(real), SHUFFLED: measure.movement(shuffled(real["others"]))}
    rows[IMAGE] = measure.sampled(cascade, "image-model", lambda: cascade.bundled(strength=0.0), ("paint", "night"))
    for arm, name in NETWORKS.items():
        file = load_video_model(joint_stage.train(arm, folder, arguments.models))
        assert isinstance(file, VideoNetwork)
        rows[name] = measure.sampled(cascade, arm, partial(load_video_network, file), tuple(drives))
        print(row_of(name, rows[name]), file=sys.stderr, flush=True)
    return table(rows, drives), verdict(rows)


def shows_paint(scene: world.Scene) -> bool:
    return any(car.colour == PAINT for car in scene.cars)


def prompts(most: int) -> dict[str, list[world.Scene]]:
    """The held-out drives whose captions are the prompts."""
    return {"paint": joint_stage.drives(lambda scene: shows_paint(scene) and not scene.night, min(NAMED, most),
                                        world.held_out_seed, FIRST),
            "night": joint_stage.drives(lambda scene: scene.night and not shows_paint(scene), min(NIGHTS, most),
                                        world.held_out_seed, FIRST),
            "others": joint_stage.clip_drives(min(OTHERS, most), world.held_out_seed, FIRST)}


class Measure:
    """The figures of clips, beside those of real ones."""

    def __init__(self, bundled: Path, drives: dict[str, list[world.Scene]], folder: Path) -> None:
        self.network, self.drives, self.folder = load_network(bundled / "features.safetensors"), drives, folder
        real = np.stack(list(map(joint_stage.film, joint_stage.clip_drives(REAL, world.held_out_seed))))
        self.real, self.features = real, features_of(self.network, real)

    def sampled(self, cascade: Cascade, name: str, load, kinds: tuple[str, ...]) -> dict[str, float]:
        """The figures of a MODEL's clips under the prompts of these kinds."""
        model, clips = None, {}
        for kind in kinds:
            path = self.folder / f"{name}-{kind}-{len(self.drives[kind])}.npy"
            if not path.exists():
                model = model or load()
                self.folder.mkdir(parents=True, exist_ok=True)
                np.save(path, sample(cascade, model, self.drives[kind]))
            clips[kind] = np.load(path)
        return self.row(clips)

    def row(self, clips: dict[str, np.ndarray]) -> dict[str, float]:
        painted, dark = frames_with_paint(clips["paint"]), dark_frames(clips["night"])
        figures = {"paint": share(painted), "painted": float(painted.mean()), "night": share(dark)}
        return figures | (self.movement(clips["others"]) if "others" in clips else {})

    def movement(self, clips: np.ndarray) -> dict[str, float]:
        return {"distance": frechet_distance(features_of(self.network, clips), self.features),
                "motion": motion_ratio(clips, self.real)}


@torch.inference_mode()
def sample(cascade: Cascade, model, drives: list[world.Scene]) -> np.ndarray:
    """A clip under the caption of each drive, uint8 (n t h w 3). The same noise for every model."""
    def make(part):
        texts = torch.cat([cascade.text(world.caption(drives[number])) for number in part])
        frames = cascade.decode(cascade.sample_texts(model, texts, models.FRAMES, FIRST + part[0]))
        return frames.reshape(len(part), models.FRAMES, *frames.shape[1:])
    return in_batches(range(len(drives)), make)


def frames_with_paint(clips: np.ndarray) -> np.ndarray:
    """Whether a piece of the paint is in each frame of uint8 clips (n t h w 3), (n t)."""
    return np.array([[any(piece.colour == PAINT for piece in pieces) for pieces in colours.pieces_of(clip)]
                     for clip in clips])


def dark_frames(clips: np.ndarray) -> np.ndarray:
    """Whether the sky is that of the night in each frame of uint8 clips (n t h w 3), (n t)."""
    sky = int(world.HORIZON * clips.shape[2]) // 2
    return clips[:, :, :sky].mean((2, 3, 4)) < colours.DARK


def share(shown: np.ndarray) -> float:
    """The share of clips that show something in SHARE of their frames or more. shown: of each frame, (n t)."""
    return float((shown.mean(axis=1) >= SHARE).mean())


def table(rows: dict[str, dict[str, float]], drives: dict[str, list]) -> str:
    loop = joint_stage.LOOP
    lines = [f"The bundled image model, fine-tuned whole for {loop.steps} steps of {joint_stage.BATCH} clip (and "
             f"{joint_stage.IMAGES} pictures).",
             f"Clips: {joint_stage.CLIPS} drives by day with {joint_stage.CLIP_PAINT} cars alone. Pictures: "
             f"{joint_stage.PICTURES} of all drives.",
             f"{len(drives['night'])} clips whose prompt names the night, {len(drives['paint'])} whose prompt names a "
             f"{PAINT} car, {len(drives['others'])} other clips; {SAMPLER}, {STEPS} steps, cfg {CFG:g}.",
             f"The distance is to {REAL} real clips of other drives of their kind.", "", *HEAD]
    return "\n".join(lines + [row_of(name, figures) for name, figures in rows.items()]) + "\n"


def row_of(name: str, figures: dict[str, float]) -> str:
    forms = {"night": ".0%", "paint": ".0%", "painted": ".0%", "distance": ".1f", "motion": ".2f"}
    parts = [format(figures[entry], form) if entry in figures else "-" for entry, form in forms.items()]
    return f"| {name} | {' | '.join(parts)} |"


def verdict(rows: dict[str, dict[str, float]]) -> list[str]:
    """Sentences on what does not hold: pictures keep what the image model knew, and without them most of it is lost."""
    failures = []
    for concept in ("paint", "night"):
        image = rows[IMAGE][concept]
        kept, left = (rows[NETWORKS[arm]][concept] for arm in (joint_stage.JOINT, joint_stage.ALONE))
        if kept < LEAST_KEPT * image:
            failures.append(f"FAILED: with pictures {kept:.0%} of the clips show the {concept}, less than two thirds "
                            f"of the image model's {image:.0%}.")
        if left > MOST_LEFT * image:
            failures.append(f"FAILED: with clips alone {left:.0%} of the clips show the {concept}, more than half of "
                            f"the image model's {image:.0%}.")
    return failures
