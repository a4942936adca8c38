"""How well upscaled frames fit together, with and without temporal layers (Video LDM, section 3.4 and 4.1.1).

Parts of held-out clips are rendered large, made small by averaging, and upscaled again. A part has the size that the
video network of the distance takes, so that the network sees every pixel.
"""

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import avg_pool2d, interpolate

from ..demo import bundle, models, upscaler, world
from ..demo.features import features_of, load_network
from ..nodes.host import upscaler_model, upscaling
from ..nodes.host.attach import attach_layers
from ..nodes.host.layer_weights import build_stack
from ..nodes.host.options import LayerSet
from ..nodes.host.sampling import SamplerSettings
from ..temporal.errors import VideoLDMError
from ..temporal.families import load_temporal, load_upscaler
from ..temporal.metrics import frechet_distance, motion_ratio
from ..temporal.upscaler import FACTOR, plan_pieces, unfold_pixels
from .cascade import Cascade, in_batches
from .reconstruction import LARGEST_LOSS, LEAST_GAIN, psnr

RATE = models.RATES[0]
STEPS, CFG, SAMPLER, SCHEDULER = 8, 1.0, "euler", "ddim_uniform"
BICUBIC, ALONE, SAME, TOGETHER = ("bicubic", "frame by frame, each from noise of its own",
                                  "frame by frame, from the same noise", "with temporal layers")
SHOWN = 4


def parts(numbers):
    """(large, small) frames of a random part of each held-out drive, uint8 (n t 64 128 3) and (n t 16 32 3)."""
    cut: list[np.ndarray] = []
    for number in numbers:
        rng, frames = np.random.default_rng(number), upscaled_drive(number)
        top, left = (FACTOR * rng.integers((size - side) // FACTOR + 1) for size, side in
                     ((upscaler.HEIGHT, models.HEIGHT), (upscaler.WIDTH, models.WIDTH)))
        cut.append(frames[:, top:top + models.HEIGHT, left:left + models.WIDTH])
    large = np.stack(cut)
    pixels = torch.from_numpy(large).flatten(0, 1).movedim(-1, 1).float()
    small = avg_pool2d(pixels, FACTOR).round().to(torch.uint8).movedim(1, -1)
    return large, small.unflatten(0, large.shape[:2]).numpy()


def upscaled_drive(number):
    return world.clip(world.held_out_seed(number), models.FRAMES, upscaler.HEIGHT, upscaler.WIDTH, RATE).frames


class Upscaler:
    """The bundled upscaler, run as Video Upscale runs it."""

    def __init__(self, arguments):
        self.cascade = Cascade(arguments.models, arguments.train, STEPS, CFG)
        self.model = upscaler_model.load_upscaler(load_upscaler(arguments.models / bundle.UPSCALER_FILE))
        layers = load_temporal(arguments.models / bundle.UPSCALER_LAYERS_FILE)
        stack = build_stack(layers.params, layers.tensors, torch.float32)
        self.layered = attach_layers(self.model, stack, LayerSet(layers.params, "quality", fps=RATE))

    def clip(self, model, small, number):
        """uint8 (t 4h 4w 3) of small frames uint8 (t h w 3), as one window."""
        frames = torch.from_numpy(small).float() / 255
        text = [[[words, {}]] for words in (self.cascade.captions([number]), self.cascade.null)]
        count, height, width = frames.shape[:3]
        cuts = plan_pieces(count, height, width, count, 0, 0)
        x = upscaling.upscale(model, frames, upscaler.USUAL_LEVEL, cuts, number,
                               SamplerSettings(STEPS, CFG, SAMPLER, SCHEDULER, *text))
        return ((unfold_pixels(x) + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).movedim(1, -1).numpy()

    def alone(self, small, number):
        """Every frame a video of its own."""
        return np.concatenate([self.clip(self.model, frame[None], number + 1000 * time)
                               for time, frame in enumerate(small)])


def bicubic(small):
    pixels = torch.from_numpy(small).movedim(-1, 1).float()
    large = interpolate(pixels, scale_factor=FACTOR, mode="bicubic")
    return large.round().clamp(0, 255).to(torch.uint8).movedim(1, -1).numpy()


@torch.inference_mode()
def upscaled_parts(arguments):
    """The table of the ways to enlarge frames, and sentences on what does not hold."""
    try:
        ours = Upscaler(arguments)
    except VideoLDMError as error:
        return f"Upscaling is left out: {error}\n", []
    numbers, network = range(arguments.clips), load_network(arguments.models / "features.safetensors")
    large, small = parts(numbers)
    ways = {BICUBIC: lambda number: bicubic(small[number]), ALONE: lambda number: ours.alone(small[number], number),
            SAME: lambda number: ours.clip(ours.model, small[number], number),
            TOGETHER: lambda number: ours.clip(ours.layered, small[number], number)}
    real_features, rows, shown = features_of(network, large), {}, [large[:SHOWN]]
    for name, way in ways.items():
        made = in_batches(numbers, lambda batch, way=way: np.stack([way(number) for number in batch]))
        distance = frechet_distance(features_of(network, made), real_features)
        rows[name] = distance, motion_ratio(made, large), psnr(made, large)
        shown.append(made[:SHOWN])
    sheet(shown).save(arguments.output / "upscaling.png")
    return table(rows, arguments), verdict(rows)


def sheet(shown):
    """The first parts, every second frame: each as rendered, then as each way makes it."""
    strips = [np.concatenate(list(clips[number][::2]), axis=1) for number in range(SHOWN) for clips in shown]
    return Image.fromarray(np.concatenate(strips, axis=0))


def table(rows, arguments):
    lines = [f"Parts of {arguments.clips} held-out drives at {RATE:g} frames a second, {models.FRAMES} frames of "
             f"{models.WIDTH}x{models.HEIGHT} from {models.WIDTH // FACTOR}x{models.HEIGHT // FACTOR}, noise level "
             f"{upscaler.USUAL_LEVEL}, {STEPS} steps; the distance is to the parts themselves.", "",
             "| upscaled | Frechet distance | motion, ratio to real | PSNR |", "|---|---|---|---|"]
    lines += [f"| {name} | {row[0]:.3f} | {row[1]:.2f} | {row[2]:.2f} dB |" for name, row in rows.items()]
    return "\n".join(lines) + "\n"


def verdict(rows):
    """Sentences on what does not hold, in comparison with frames that each have noise of their own, as in the paper.

    With one noise for all frames, even an upscaler without layers hardly flickers. So that is no comparison.
    """
    after, _, made = rows[TOGETHER]
    failures = []
    before, _, alone = rows[ALONE]
    if after > before * (1 - LEAST_GAIN):
        failures.append(f"FAILED: the distance {TOGETHER} ({after:.3f}) is not a third below that {ALONE} "
                        f"({before:.3f}).")
    if made < alone - LARGEST_LOSS:
        failures.append(f"FAILED: the PSNR falls by more than {LARGEST_LOSS} dB, from {alone:.2f} to {made:.2f}.")
    return failures
