"""PVDM on videos of your own: `python run.py train-pvdm VIDEOS`. docs/training.md says what to expect.

    decode                  each video once, at one size and frame rate
    autoencoder             a clip to planes and back, at last under discriminators
    planes                  of all windows of all videos
    diffusion               of these planes
    write                   the two files that Load PVDM takes

Each stage resumes where it was stopped, and is skipped when it is finished.
"""

import argparse
import hashlib
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..temporal.atomic import write_atomically, write_text
from ..temporal.errors import VideoLDMError
from ..temporal.pvdm import Autoencoder, AutoencoderParams, PlaneUNet, UNetParams, diffusion
from ..temporal.pvdm import files as pvdm_files
from ..temporal.training.discriminator import PatchDiscriminator
from ..temporal.training.distributed import pick_device, rank
from ..temporal.training.loop import Loop, LoopParams
from ..temporal.training.perceptual import VGGDistance
from ..temporal.training.planes import (
    PlaneAutoencoderLoss,
    PlaneAutoencoderTerms,
    PlaneDiffusionLoss,
    StoredPlanes,
    encode_windows,
)
from ..temporal.training.video_files import FrameSettings, VideoClips, decoded_videos, find_videos
from .stages import frozen, halved, prepare, save_array

KNOWN = 0.3                 # the share of clips that know the clip before, as published for UCF-101
WORK = Path(__file__).resolve().parents[1] / ".train" / "pvdm-videos"
PLAN = "plan.json"          # in the work folder
PATCH = 8                   # pixels along a side of a patch


@dataclass(frozen=True)
class Design:
    """The widths of both networks."""

    channels: int           # of the autoencoder's tokens
    depth: int              # its layers, and those of its decoder
    heads: int
    head_width: int
    plane_depth: int        # layers of the transformer of each plane
    model_channels: int     # of the U-Net
    channel_mult: tuple[int, ...]
    num_res_blocks: int
    attention_levels: tuple[int, ...]
    judge_channels: int     # of the discriminators
    prediction: str = "eps"     # of the U-Net. v is learned in fewer steps; eps is the published one


DESIGNS = {
    "small": Design(192, 4, 6, 32, 2, 128, (1, 2, 4), 1, (1, 2), 32, "v"),
    "paper-s": Design(384, 8, 8, 64, 4, 128, (1, 2, 4, 4), 2, (0, 1, 2), 64),
    "paper-l": Design(384, 8, 8, 64, 4, 256, (1, 2, 4, 4), 2, (0, 1, 2), 64),
}


@dataclass(frozen=True)
class Plan:
    """What is trained, and for how long."""

    design: Design
    height: int
    width: int
    frames: int             # of a clip
    fps: float
    every: int              # a window begins at every so many frames, where planes are stored
    autoencoder_steps: int
    adversarial_steps: int  # the last of them, under discriminators
    diffusion_steps: int
    autoencoder_batch: int  # clips of a step
    diffusion_batch: int
    device: str = "auto"

    def __post_init__(self) -> None:
        counts = {name: value for name, value in vars(self).items() if isinstance(value, int)}
        small = [name for name, value in counts.items() if value < (0 if name == "adversarial_steps" else 1)]
        if small:
            raise VideoLDMError(f"{small[0]} is {counts[small[0]]}, which is too few.")
        side = PATCH * self.halvings
        if self.height % side or self.width % side or self.frames % self.halvings or self.frames % self.every:
            raise VideoLDMError(f"Width and height have to be multiples of {side}, and the frames of a clip a multiple "
                                f"of {self.halvings} and of {self.every}. These are {self.width}x{self.height} and "
                                f"{self.frames}.")

    @property
    def autoencoder(self) -> AutoencoderParams:
        d = self.design
        return AutoencoderParams(self.frames, self.height, self.width, PATCH, d.channels, 4, d.depth, d.heads,
                                 d.head_width, d.plane_depth, 4, d.channels // 8, 4 * d.channels // 3)

    @property
    def halvings(self) -> int:
        """The sides of the planes are multiples of this number, because the U-Net halves them."""
        return 2 ** (len(self.design.channel_mult) - 1)

    @property
    def unet(self) -> UNetParams:
        d = self.design
        return UNetParams(4, d.model_channels, d.channel_mult, d.num_res_blocks, d.attention_levels,
                          row=self.autoencoder.shape.length, prediction=d.prediction)

    def kept(self) -> dict[str, Any]:
        """What may not change between two runs in one folder."""
        plan = asdict(self)
        return {name: plan[name] for name in ("design", "height", "width", "frames", "fps", "every")}


def main(argv=None):
    parser = argparse.ArgumentParser(prog="run.py train-pvdm", description="Train PVDM on videos of your own.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("videos", type=Path, help="a folder of videos, or one video")
    parser.add_argument("--name", default="my", help="the finished files are NAME_pvdm.safetensors and "
                                                     "NAME_pvdm_autoencoder.safetensors")
    parser.add_argument("--folder", type=Path, default=WORK,
                        help="work folder: decoded frames, checkpoints, logs")
    parser.add_argument("--output", type=Path, help="where the finished files are written; without it, the work folder")
    parser.add_argument("--design", choices=DESIGNS, default="small", help="how large the networks are")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--height", type=int, default=256)
    parser.add_argument("--frames", type=int, default=16, help="of a clip")
    parser.add_argument("--fps", type=float, default=8.0, help="frames a second that are learned")
    parser.add_argument("--every", type=int, default=1, help="planes are stored of a window at every so many frames")
    parser.add_argument("--autoencoder-steps", type=int, default=30_000)
    parser.add_argument("--adversarial-steps", type=int, default=8_000,
                        help="how many of them, at the end, are under discriminators")
    parser.add_argument("--diffusion-steps", type=int, default=100_000)
    parser.add_argument("--autoencoder-batch", type=int, default=4)
    parser.add_argument("--diffusion-batch", type=int, default=32)
    parser.add_argument("--vgg", type=Path, help="torchvision's vgg16-397923af.pth, for the perceptual term; without "
                                                 "it there is no such term")
    parser.add_argument("--max-minutes", type=float, help="stop the stage in progress after this time, resumable")
    parser.add_argument("--from", dest="start", type=Path, default=Path(), help=argparse.SUPPRESS)     # of paths
    asked = vars(parser.parse_args(argv))
    start, places = asked.pop("start"), {name: asked.pop(name) for name in ("name", "max_minutes")}
    places |= {name: None if path is None else start / path for name, path in
               ((name, asked.pop(name)) for name in ("videos", "folder", "output", "vgg"))}
    torch.set_float32_matmul_precision("high")          # on a GPU; nothing on a CPU
    try:
        plan = Plan(**asked | {"design": DESIGNS[asked["design"]]})
        return 0 if train(plan, **places) else 3
    except VideoLDMError as error:
        print(f"\n{error}", file=sys.stderr)
        return 1


def train(plan: Plan, videos: Path, name: str, folder: Path, output: Path | None = None, vgg: Path | None = None,
          max_minutes: float | None = None) -> bool:
    """All stages. False where the time was up before the end.

    Args:
        videos: a folder of videos, or one video.
        name: what the finished files begin with.
        folder: of the work.
        output: the folder of the finished files; None: the work folder.
        vgg: the file of the perceptual network; None: no perceptual term.
        max_minutes: of the stage in progress.
    """
    autoencoder_params, unet_params = plan.autoencoder, plan.unet
    perceptual = VGGDistance(vgg) if vgg is not None else None
    paths = find_videos(videos)
    check_plan(plan, folder)
    frames = decoded_videos(paths, folder / "frames", FrameSettings(plan.height, plan.width, plan.fps, plan.frames),
                            rank() == 0, say)
    if rank() == 0:
        write_text(folder / PLAN, json.dumps(plan.kept(), indent=1))
    say(f"{len(frames)} videos, {sum(map(len, frames))} frames at {plan.fps:g} a second")
    loop = autoencoder_loop(plan, seeded(0, lambda: Autoencoder(autoencoder_params)), frames, perceptual, folder)
    if not finished(loop, max_minutes):
        return False
    weights = loop.ema_state("autoencoder")
    network = frozen(Autoencoder(autoencoder_params), weights).to(pick_device(plan.device))
    belongs = digest(weights)           # planes and their diffusion belong to one state of the autoencoder
    planes = stored_planes(plan, network, paths, frames, folder / f"planes-{belongs}")
    source = StoredPlanes(planes, apart=plan.frames // plan.every)
    loss = PlaneDiffusionLoss(seeded(1, lambda: PlaneUNet(unet_params)), source, autoencoder_params.shape,
                              diffusion(unet_params.prediction), plan.diffusion_batch, KNOWN)
    params = LoopParams(plan.diffusion_steps, 1e-4, device=plan.device)
    loop = Loop(params, loss.modules, loss, folder / f"diffusion-{belongs}", "PVDM diffusion")
    if not finished(loop, max_minutes):
        return False
    if rank() == 0:
        write(plan, weights, loop.ema_state("unet"), output or folder, name)
    return True


def autoencoder_loop(plan: Plan, network: Autoencoder, frames: list[np.ndarray], perceptual: VGGDistance | None,
                     folder: Path) -> Loop:
    """The training of the autoencoder, both stages."""
    judged = plan.adversarial_steps > 0
    terms = PlaneAutoencoderTerms(perceptual=4.0 if perceptual else 0.0, adversarial=1.0 if judged else 0.0,
                                  features=4.0 if judged else 0.0,
                                  adversarial_from=max(plan.autoencoder_steps - plan.adversarial_steps, 0))
    clip_judge, frame_judge = (seeded(dims, lambda dims=dims: PatchDiscriminator(dims, plan.design.judge_channels))
                               for dims in (3, 2)) if judged else (None, None)
    loss = PlaneAutoencoderLoss(network, VideoClips(frames, plan.frames, plan.autoencoder_batch), terms, clip_judge,
                                frame_judge, perceptual)
    params = LoopParams(plan.autoencoder_steps, 1e-4, betas=(0.5, 0.9), ema_decay=0.999, device=plan.device)
    return Loop(params, loss.modules, loss, folder / "autoencoder", "PVDM autoencoder")


def finished(loop: Loop, max_minutes: float | None) -> bool:
    if loop.run(None if max_minutes is None else max_minutes * 60):
        return True
    say(f"{loop.title}: stopped at step {loop.step} of {loop.params.steps}. Run the same command again to go on.")
    return False


def stored_planes(plan: Plan, network: Autoencoder, paths: list[Path], frames: list[np.ndarray],
                  folder: Path) -> list[np.ndarray]:
    """The planes of all windows of each video, (k c l), read from the disk as they are needed."""
    planes = []
    for number, (path, video) in enumerate(zip(paths, frames, strict=True)):
        assert isinstance(video, np.memmap)     # decoded_videos() opens files
        target = folder / f"{Path(str(video.filename)).stem}.npy"
        if not target.exists():
            say(f"Encoding {number + 1} of {len(paths)}: {path.name}")
        prepare(lambda target, video: write_atomically(target, lambda temporary: save_array(
            temporary, encode_windows(network, video, plan.every).numpy())), target, target, video)
        planes.append(np.load(target, mmap_mode="r", allow_pickle=False))
    return planes


def write(plan: Plan, autoencoder: dict[str, Tensor], unet: dict[str, Tensor], output: Path, name: str) -> None:
    """Write the two files that Load PVDM takes, in half precision."""
    about = pvdm_files.About(plan.fps, name, grid=plan.autoencoder.shape)
    paths = [output / f"{name}{part}.safetensors" for part in ("_pvdm_autoencoder", "_pvdm")]
    pvdm_files.write_autoencoder(paths[0], halved(autoencoder), plan.autoencoder, about)
    pvdm_files.write_diffusion(paths[1], halved(unet), plan.unet, about)
    say(f"Written: {paths[0]} and {paths[1]}. Put both into ComfyUI's models/video_ldm; Load PVDM takes them.")


# Help

def seeded(seed: int, build):
    """Build a network with initial weights of this seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build()


def digest(weights: dict[str, Tensor]) -> str:
    """A short name for a state of weights."""
    found = hashlib.blake2b(digest_size=6)
    for name in sorted(weights):
        found.update(name.encode())
        found.update(weights[name].contiguous().view(torch.uint8).numpy())
    return found.hexdigest()


def check_plan(plan: Plan, folder: Path) -> None:
    """Refuse a work folder that holds a training by another plan."""
    path, due = folder / PLAN, json.loads(json.dumps(plan.kept()))
    if not path.exists():
        return
    try:
        found = dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise VideoLDMError(f"'{path}' cannot be read ({error}). Take another --folder.") from error
    changed = [name for name in due if found.get(name) != due[name]]
    if changed:
        raise VideoLDMError(f"The folder '{folder}' holds a training with another {' and '.join(changed)}. Give the "
                            "same settings to go on with it, or another --folder.")


def say(text: str) -> None:
    if rank() == 0:
        print(text, flush=True)
