"""Latents to pixels window by window, for every VAE: what is in memory is one window, and the result depends on the
settings alone. Core splits a batch by the memory that happens to be free, and a temporal decoder takes each part for a
clip of its own."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import comfy.model_management
import torch
from torch import Tensor, nn

from ...temporal.errors import VideoLDMError
from ...temporal.upscaler import FACTOR, unfolded, with_colours_of
from ...temporal.windows import in_tiles, in_windows, spread, tile_count
from . import compat, files
from .sockets import Vae
from .temporal_vae import is_temporal, title_of

TILE_OVERLAP = 4                # neighbouring tiles share one part in so many of a tile
SMALLEST_TILE = 64              # pixels
FALLBACK_TILES = (512, 256)     # pixels, tried in turn where memory runs out and no tile was set


@dataclass(frozen=True)
class DecodeSettings:
    """window, overlap: frames; tile: pixels, 0 for none; clips: how many the batch holds, one after another; node: who
    decodes, for messages."""

    window: int
    overlap: int
    tile: int
    clips: int
    node: str = "Temporal VAE Decode"


class Decoding:
    """A batch of latents (b t) c h w that is to be decoded: `frames(first, last)` gives it piece by piece."""

    def __init__(self, vae: Vae, samples: Tensor, settings: DecodeSettings) -> None:
        check_latents(vae, samples, settings)
        self.vae, self.samples, self.settings, self.node = vae, samples, settings, settings.node
        self.temporal = is_temporal(vae)
        self.factor = vae.spacial_compression_decode()
        self.count = len(samples)
        self.height, self.width = (side * self.factor for side in samples.shape[2:])
        self.tile = settings.tile       # pixels; becomes smaller where memory runs out

    @property
    def clip(self) -> int:
        """Frames of one clip."""
        return self.count // self.settings.clips

    @property
    def overlap(self) -> int:
        """Frames that neighbouring windows share: none where frames do not see each other."""
        return self.settings.overlap if self.temporal and self.settings.window < self.clip else 0

    def steps(self) -> int:
        """Pieces that a whole decode is made of, for a progress bar."""
        windows = len(spread(self.clip, self.settings.window, self.overlap)) * self.settings.clips
        return windows * (tile_count(*self.samples.shape[2:], *self.tiling()) if self.tile else 1)

    def frames(self, first: int = 0, last: int | None = None, on_piece: Callable[[], None] = None) -> Iterator[Tensor]:
        """Frames `first` to `last` as IMAGE (n h w 3) in 0..1, in order. on_piece(): after every window or tile."""
        last = self.count if last is None else last
        for start in range(0, self.count, self.clip):
            if start + self.clip <= first or start >= last:
                continue
            z = self.samples[start:start + self.clip]
            for pictures in in_windows(lambda part: self.decode_window(part, on_piece), z, self.settings.window,
                                       self.overlap, max(first - start, 0), min(last - start, self.clip)):
                yield self.vae.process_output(pictures).movedim(1, -1)

    def decode_window(self, z: Tensor, on_piece: Callable[[], None] = None) -> Tensor:
        """Pictures (t 3 H W), as the network gives them, of the frames of one window."""
        while True:
            try:
                return self.in_pieces(z, on_piece)
            except Exception as error:
                if not compat.is_out_of_memory(error):
                    raise
            # Outside the except block: inside it the exception keeps the tensors of the failed decode alive.
            comfy.model_management.soft_empty_cache()
            self.tile = self.smaller_tile(len(z))
            logging.warning("[Video LDM] %s ran out of memory and goes on in tiles of %d pixels. Set tile to %d to have "
                            "it so from the start, or lower window.", self.settings.node, self.tile, self.tile)

    def smaller_tile(self, frames: int) -> int:
        """The next tile to try where memory ran out; a sentence where an artist has to choose."""
        smaller = [tile for tile in FALLBACK_TILES if tile < min(self.tile or 10 ** 9, max(self.height, self.width))]
        if self.settings.tile or not smaller:
            tiles = f"in tiles of {self.tile} pixels" if self.tile else "at once"
            advice = "or lower tile." if self.tile else "or set tile to 256."
            raise VideoLDMError(f"{self.settings.node} ran out of memory with windows of {frames} frames of "
                                f"{self.width}x{self.height} {tiles}. Lower window, {advice}")
        return smaller[0]

    def in_pieces(self, z: Tensor, on_piece: Callable[[], None] | None) -> Tensor:
        def piece(part: Tensor) -> Tensor:
            files.check_cancelled()
            pictures = self.decode_piece(part)
            if on_piece is not None:
                on_piece()
            return pictures
        return in_tiles(piece, z, *self.tiling()) if self.tile else piece(z)

    def tiling(self) -> tuple[int, int]:
        """Tile and overlap in latents."""
        tile = max(self.tile // self.factor, 1)
        return tile, tile // TILE_OVERLAP

    @torch.no_grad()
    def decode_piece(self, z: Tensor) -> Tensor:
        """The network on frames that are decoded together."""
        vae = self.vae
        need = len(z) * vae.memory_used_decode((1, *z.shape[1:]), vae.vae_dtype)
        comfy.model_management.load_models_gpu([vae.patcher], memory_required=need, force_full_load=vae.disable_offload)
        network = vae.first_stage_model
        with compat.on_device(vae.device), cancellable(network), compat.frugal_attention(network, vae.device):
            pictures = network.decode(z.to(vae.device, vae.vae_dtype))
        return pictures.to(vae.output_device).float()


class Unfolding:
    """Frames that are pixels already, folded: `t 48 h w` in -1..1. The interface is that of a Decoding."""

    def __init__(self, frames: Tensor, node: str) -> None:
        self.folded, self.node, self.count = frames, node, len(frames)
        self.height, self.width = (FACTOR * side for side in frames.shape[2:])

    def steps(self) -> int:
        return self.count

    def frames(self, first: int = 0, last: int | None = None, on_piece: Callable[[], None] = None) -> Iterator[Tensor]:
        """Frames `first` to `last` as IMAGE (1 h w 3) in 0..1, in order. on_piece(): after each."""
        for frame in self.folded[first:last].split(1):
            files.check_cancelled()
            if on_piece is not None:
                on_piece()
            yield ((unfolded(frame) + 1) / 2).clamp(0, 1).movedim(1, -1)


class ColoursKept:
    """A decoding whose large frames get the colours of the small ones `t h w 3` in 0..1, frame by frame. The interface
    is that of a Decoding."""

    def __init__(self, decoding: "Decoding | Unfolding", small: Tensor) -> None:
        self.decoding, self.small, self.node, self.count = decoding, small, decoding.node, decoding.count
        self.height, self.width = decoding.height, decoding.width

    def steps(self) -> int:
        return self.decoding.steps()

    def frames(self, first: int = 0, last: int | None = None, on_piece: Callable[[], None] = None) -> Iterator[Tensor]:
        """Frames `first` to `last` as IMAGE (1 h w 3) in 0..1, in order."""
        number = first
        for piece in self.decoding.frames(first, last, on_piece):
            for large in piece.split(1):
                small = self.small[number:number + 1]
                number += 1
                yield with_colours_of(small.movedim(-1, 1), large.movedim(-1, 1)).clamp(0, 1).movedim(1, -1)


def check_latents(vae: Vae, samples: Tensor, settings: DecodeSettings) -> None:
    """Refuse what cannot be decoded, and widgets that contradict each other."""
    title = title_of(vae)
    if getattr(vae, "latent_dim", 2) != 2 or samples.ndim != 4:
        raise VideoLDMError(f"The LATENT has {samples.ndim} dimensions and the VAE is {title}: they belong to a video "
                            "model that decodes time by itself. Use core's VAE Decode for it.")
    if samples.shape[1] != vae.latent_channels:
        raise VideoLDMError(f"The LATENT has {samples.shape[1]} channels and the connected VAE ({title}) takes "
                            f"{vae.latent_channels}. Connect the VAE that belongs to the MODEL it was sampled with.")
    if not len(samples):
        raise VideoLDMError("The LATENT has no frames. Connect the LATENT of a sampler.")
    if len(samples) % settings.clips:
        raise VideoLDMError(f"The LATENT has {len(samples)} frames, which do not divide into {settings.clips} clips. "
                            "Set clips to the number that was sampled, or to 1.")
    if settings.overlap >= settings.window < len(samples) // settings.clips and is_temporal(vae):
        raise VideoLDMError(f"overlap is {settings.overlap} frames and window is {settings.window}: windows must be "
                            "longer than what they share. Lower overlap, or raise window.")
    if settings.tile and settings.tile < SMALLEST_TILE:
        raise VideoLDMError(f"tile is {settings.tile} pixels; {SMALLEST_TILE} is the least. Raise it, or set it to 0 "
                            "for none.")


@contextmanager
def cancellable(network: nn.Module) -> Iterator[None]:
    """While open, every convolution of the network notices Cancel: a window may take a minute."""
    hooks = [part.register_forward_pre_hook(lambda *_: files.check_cancelled())
             for part in network.modules() if isinstance(part, nn.Conv2d)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
