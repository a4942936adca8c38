"""Video Upscale with ComfyUI's own samplers. The sampler works on the whole video, the network on one piece at a time.

Core prepares the sampling of one piece, so its estimate of memory is for a piece. A wrapper around the sampler then
replaces the piece by the whole video, which stays on the CPU. In every step a context handler cuts the latents and the
small frames into pieces, moves each piece to the device, and blends the predictions.
"""

from collections.abc import Callable
from typing import Any

import comfy.conds
import comfy.model_base
import comfy.model_management
import torch
from comfy.context_windows import ContextHandlerABC
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ...temporal.diffusion import Diffusion
from ...temporal.errors import VideoLDMError
from ...temporal.upscaler import (
    FACTOR,
    USUAL_LEVEL,
    PiecePlan,
    augment_small_frames,
    predict_in_pieces,
    repeat_small_pixels,
    unscale_augmented,
)
from . import compat, files, sampling
from .conflicts import refuse_in_pieces
from .image_model import context_dim, model_title
from .layer_strength import cut_tile, fix_strengths
from .options import LayerSet, layer_sets, set_clip_options, transformer_options
from .sockets import Executor, Model, Vae
from .texts import other_width
from .upscaler_model import PixelUpscaler
from .windows import CORE_ESTIMATE, HANDLER, ClipWindow, in_window, windowed_value

KEY = "video_ldm/upscale"
CORE_NOISE = "ContextWindows_sampler_sample"    # key of the wrapper with which core's own windows shuffle the noise
AUGMENTATION_SEED = -10     # core adds it to the seed for the noise on the small frames
# Options of a CONDITIONING that belong to the whole picture.
TEXT_ALONE = {"control": "a ControlNet", "gligen": "GLIGEN boxes", "area": "an area", "mask": "a mask"}


class UpscalePieces(ContextHandlerABC):
    """Predicts a video piece by piece and blends the pieces. Nothing of a call is kept on it."""

    def __init__(self, small: Tensor, level: int, cuts: PiecePlan, device: Any, on_piece: Callable[[], None]) -> None:
        """
        Args:
            small: the noised small frames `t 3 h w`, on the CPU.
            level: the noise level of the small frames.
            cuts: the windows and tiles.
            device: where the network is.
            on_piece: called after each piece.
        """
        self.small, self.level, self.cuts, self.device, self.on_piece = small, level, cuts, device, on_piece

    window_widget = "window"        # the widget of Video Upscale that sets the frames of a piece

    @property
    def context_length(self) -> int:
        """Frames of a piece, under the name that core's handlers have for it."""
        return self.cuts.largest[0]

    def should_use_context(self, model: Model, conds: list, x_in: Tensor, timestep: Tensor,
                           model_options: dict) -> bool:
        return True

    def execute(self, calc_cond_batch: Callable, model: Model, conds: list, x_in: Tensor, timestep: Tensor,
                model_options: dict) -> list[Tensor]:
        """A prediction `t c h w` for each of `conds`, on the CPU."""
        if self.cuts.pieces > 1:
            refuse_in_pieces(model_options, "Video Upscale")
        options = model_options.get("transformer_options", {})
        channels = x_in.shape[1]

        def predict(frames: slice, rows: slice, columns: slice) -> Tensor:
            files.check_cancelled()
            window = ClipWindow(list(range(frames.start, frames.stop)), len(x_in), len(x_in))
            piece = frames, slice(None), rows, columns
            small = self.small[piece].to(self.device)
            parts = self.call(calc_cond_batch, model, [self.get_resized_cond(cond, small, window) for cond in conds],
                              x_in[piece].to(self.device), timestep[frames].to(self.device),
                              {**model_options, "transformer_options": cut_tile(in_window(options, window), rows,
                                                                                columns)})
            self.on_piece()
            return torch.cat(parts, dim=1).to(x_in)
        return list(predict_in_pieces(predict, self.cuts, channels * len(conds)).split(channels, dim=1))

    def call(self, calc_cond_batch: Callable, *arguments: Any) -> list[Tensor]:
        """Run the network on one piece. If memory runs out, raises with advice."""
        try:
            return calc_cond_batch(*arguments)
        except Exception as error:
            if not compat.is_out_of_memory(error):
                raise
        # Outside the except block: inside it the exception keeps the tensors of the failed call alive.
        comfy.model_management.soft_empty_cache()
        frames, height, width = self.cuts.largest
        raise VideoLDMError(f"Video Upscale ran out of memory with windows of {frames} frames in pieces of "
                            f"{FACTOR * width}x{FACTOR * height} pixels. Lower tile, or window.")

    def get_resized_cond(self, cond_in: list | None, small: Tensor, window: ClipWindow,
                         device: Any = None) -> list | None:
        """One conditioning, as core's `convert_cond` makes it, for a piece: with its frames' text and small frames."""
        if cond_in is None:
            return None
        of_upscaler = {"c_concat": comfy.conds.CONDNoiseShape(small),
                       "y": comfy.conds.CONDRegular(torch.tensor([self.level], device=small.device))}

        def of_piece(model_conds: dict) -> dict:
            others = {name: value for name, value in model_conds.items() if name not in of_upscaler}
            return {**{name: windowed_value(value, window) for name, value in others.items()}, **of_upscaler}
        return [{**cond, "model_conds": of_piece(cond["model_conds"])} for cond in cond_in]


def on_whole_video(noise: Tensor) -> Callable:
    """A wrapper that makes core's sampler run on the whole video, on the CPU. noise: `t c h w`, to start from."""
    def wrapper(executor: Executor, guider: Any, sigmas: Tensor, extra_args: dict, callback: Callable,
                piece_noise: Tensor, piece_latent: Tensor, denoise_mask: Tensor, disable_pbar: bool) -> Tensor:
        empty = noise.new_zeros(1).expand_as(noise)
        return executor(guider, sigmas.cpu(), extra_args, callback, noise, empty, denoise_mask, disable_pbar)
    return wrapper


class PieceProgress:
    """One progress bar over all pieces of all steps. After each step it shows the first frame.

    finished(x0): makes the large frames of a prediction, for the preview.
    """

    def __init__(self, model: Model, steps: int, pieces: int, finished: Callable) -> None:
        self.bar = sampling.RolloutProgress(model, steps, pieces)
        self.pieces, self.before, self.done, self.finished = pieces, 0, 0, finished

    def on_piece(self) -> None:
        # Samplers of second order predict all pieces more than once in a step.
        self.done = min(self.done + 1, self.pieces)
        self.bar.show(self.before + self.done, [])

    def callback(self, step: int, x0: Tensor, x: Tensor, total_steps: int) -> None:
        self.before, self.done = (step + 1) * self.pieces, 0
        self.bar.show(self.before, self.bar.pictures(self.finished(x0[:1])) if self.bar.previewer else [])


def makes_pixels(model: Model) -> bool:
    """Whether the upscaler makes pixels. The others make latents."""
    return isinstance(model.model, PixelUpscaler)


def upscale(model: Model, small: Tensor, level: int, cuts: PiecePlan, seed: int,
             settings: sampling.SamplerSettings) -> Tensor:
    """The large frames: as latents `t 4 h w`, or from an upscaler in pixel space as folded pixels `t 48 h w`.

    Without temporal layers all frames start from the same noise, so that still things flicker less. With temporal
    layers frames start from the kind of noise that these were trained on: one for all, or one for each.

    Args:
        model: the MODEL.
        small: the small frames `t h w 3` in 0..1.
        level: the noise level of the small frames.
        cuts: the windows and tiles.
        seed: of the noise.
        settings: the sampler's settings.
    """
    frames, height, width = small.shape[:3]
    channels = model.get_model_object("latent_format").latent_channels
    noisy = 1 if shares_noise(model) else frames
    noise = sampling.noise_like(torch.zeros(1).expand(noisy, channels, height, width), seed)
    noise = noise.expand(frames, -1, -1, -1)
    c_low = noised_frames(model, small, level, noisy, seed)

    def finished(x: Tensor) -> Tensor:
        """The large frames from a sampled x, of all frames or the first ones."""
        return with_details(model, x, c_low[:len(x)], level) if makes_pixels(model) else x
    progress = PieceProgress(model, settings.steps, cuts.pieces, finished)
    m = model.clone()
    # This node's pieces replace the windows of core and of Frame Windows.
    m.remove_wrappers_with_key(WrappersMP.PREPARE_SAMPLING, CORE_ESTIMATE)
    m.remove_wrappers_with_key(WrappersMP.SAMPLER_SAMPLE, CORE_NOISE)
    m.model_options[HANDLER] = UpscalePieces(c_low, level, cuts, m.load_device, progress.on_piece)
    m.add_wrapper_with_key(WrappersMP.SAMPLER_SAMPLE, KEY, on_whole_video(noise))
    length, tile_height, tile_width = cuts.largest
    fix_strengths(transformer_options(m), frames, frames, (height, width))      # of the whole video
    set_clip_options(m, frames=length)      # core prepares one piece: one clip
    piece = torch.zeros(length, channels, tile_height, tile_width)
    return finished(sampling.sample(m, seed, settings, piece, noise=piece, callback=progress.callback))


def shares_noise(model: Model) -> bool:
    """Whether all frames start from one noise: without temporal layers, or if these were trained so.

    Raises if two sets of layers were trained on different kinds of noise.
    """
    sets = layer_sets(model)
    shared = [layers.params.shared_noise for layers in sets]
    if any(shared) and not all(shared):
        one, other = (name_of(sets[shared.index(kind)]) for kind in (True, False))
        raise VideoLDMError(f"The temporal layers on this MODEL do not go together: {one} was trained on one noise for "
                            f"all frames, and {other} on noise of its own in each. Load only one of the two.")
    return all(shared)


def name_of(layers: LayerSet) -> str:
    """The name of a set of temporal layers: its file's, or what it is if it has no file."""
    return layers.name or layers.title


def with_details(model: Model, details: Tensor, c_low: Tensor, level: int) -> Tensor:
    """The large frames as folded pixels `t 48 h w`: the enlarged small frames plus the details.

    Args:
        model: an upscaler in pixel space.
        details: what it sampled.
        c_low: the noised small frames `t 3 h w`.
        level: their noise level.
    """
    levels = torch.full((len(c_low),), level)
    base = repeat_small_pixels(unscale_augmented(c_low, levels, schedule_of(model)))
    return base.add_(details.to(base), alpha=1 / model.model.details)


def noised_frames(model: Model, small: Tensor, level: int, noisy: int, seed: int) -> Tensor:
    """c_gamma `t 3 h w`: the small frames with noise, on the CPU.

    Args:
        model: the MODEL.
        small: the small frames `t h w 3` in 0..1.
        level: the noise level.
        noisy: how many frames of noise to draw: one for all, or one for each.
        seed: the sampling's seed.
    """
    eps = torch.randn(noisy, 3, *small.shape[1:3], generator=torch.Generator().manual_seed(seed + AUGMENTATION_SEED))
    x_low = small.movedim(-1, 1).float().cpu() * 2 - 1
    return augment_small_frames(x_low, level, eps, schedule_of(model))


def schedule_of(model: Model) -> Diffusion:
    """The noise schedule of the small frames. The latents have another one."""
    augmentor = model.model.noise_augmentor
    return Diffusion(augmentor.linear_start, augmentor.linear_end, augmentor.num_timesteps)


# Checks before sampling

def check_upscaler(model: Model, reason: str = "") -> None:
    """Refuse a MODEL that is no x4 upscaler. reason: why one is needed, to begin the error with."""
    if not isinstance(getattr(model, "model", None), comfy.model_base.SD_X4Upscaler):
        reason = f"{reason}. " if reason else ""
        raise VideoLDMError(f"{reason}The connected MODEL ({model_title(model)}) is not the Stable Diffusion x4 "
                            "upscaler, which is a model of its own. Load x4-upscaler-ema.safetensors with Load "
                            "Checkpoint and connect its MODEL, CLIP and VAE, or load an upscaler of this pack's with "
                            "Load Video Model.")


def most_noise(model: Model) -> int:
    """The highest noise level that the upscaler was trained on. Raises for a MODEL that is no x4 upscaler."""
    check_upscaler(model)
    return model.model.noise_augmentor.max_noise_level


def usual_noise(model: Model) -> int:
    """The noise level that the upscaler is meant to be run with."""
    return getattr(model.model, "usual_noise", USUAL_LEVEL)


def check_conditioning(model: Model, conditioning: list, name: str) -> None:
    """Refuse a CONDITIONING that carries more than text, or a text for another model.

    A ControlNet, boxes, an area or a mask belong to the whole picture, and the network sees one piece of it at a time.
    """
    wanted = context_dim(model)
    clip = ("the CLIP that the upscaler was trained with, which for the demo's is that of Load Demo Models"
            if makes_pixels(model) else "the CLIP of the upscaler's own checkpoint")
    for _, settings in conditioning:
        for key, what in TEXT_ALONE.items():
            if settings.get(key) is not None:
                raise VideoLDMError(f"The {name} conditioning carries {what}, which Video Upscale does not take: it "
                                    "upscales piece by piece and takes text alone. Connect CLIP Text Encode directly.")
    width = other_width((text for text, _ in conditioning), wanted)
    if width is not None:
        raise VideoLDMError(f"The text of the {name} conditioning has a width of {width}, and the x4 "
                            f"upscaler takes {wanted}. Encode it with {clip}.")


def check_vae(model: Model, vae: Vae) -> None:
    """Refuse a VAE that does not decode the upscaler's latents, and any VAE if it makes pixels."""
    if makes_pixels(model):
        if vae is not None:
            raise VideoLDMError("This upscaler makes pixels, not latents, so there is nothing for a VAE to decode. "
                                "Disconnect the VAE.")
        return
    if vae is None:
        raise VideoLDMError("No VAE is connected, and this upscaler makes latents. Connect the VAE of the x4 "
                            "upscaler's checkpoint.")
    factor = vae.spacial_compression_decode() if getattr(vae, "latent_dim", 2) == 2 else None
    if vae.latent_channels != 4 or factor != 4:
        size = "is one of a video model" if factor is None else (f"decodes {vae.latent_channels} channels to {factor} "
                                                                 "pixels per latent")
        raise VideoLDMError(f"The connected VAE {size}; the x4 upscaler's decodes 4 channels to 4 pixels per latent. "
                            "Connect the VAE of the x4 upscaler's checkpoint.")
