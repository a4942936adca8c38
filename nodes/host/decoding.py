"""Latents to pixels, window by window, for every VAE.

One window is in memory at a time, and the result depends on the settings alone. Core's VAE Decode splits a batch by the
memory that happens to be free, and a temporal decoder would take each part for a clip.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import comfy.model_management
import torch
from torch import Tensor, nn

from ...temporal.errors import VideoLDMError
from ...temporal.upscaler import FACTOR, match_colours, unfold_pixels
from ...temporal.windows import decode_in_tiles, decode_in_windows, tile_count, window_slices
from . import compat, files
from .sockets import Vae
from .temporal_vae import is_temporal, title_of

TILE_OVERLAP = 4                # neighbouring tiles share 1/4 of a tile
SMALLEST_TILE = 64              # pixels
FALLBACK_TILES = (512, 256)     # pixels; tried in turn if memory runs out and no tile was set


@dataclass(frozen=True)
class DecodeSettings:
    """The settings of one decode."""

    window: int         # frames that are decoded together
    overlap: int        # frames that neighbouring windows share
    tile: int           # pixels along a side of a tile; 0: no tiles
    clips: int          # how many clips the batch holds, one after another
    node: str = "Temporal VAE Decode"       # title of the node, for messages


class FrameSource(Protocol):
    """Frames that are made piece by piece: what the classes of this file have in common."""

    node: str       # title of the node that makes them, for messages
    count: int      # frames
    height: int     # pixels
    width: int      # pixels

    def steps(self) -> int:
        """How often `on_piece` is called for all frames, for a progress bar."""
        ...

    def frames(self, first: int = 0, last: int | None = None,
               on_piece: Callable[[], None] | None = None) -> Iterator[Tensor]:
        """Frames `first` to `last` as IMAGE (n h w 3) in 0..1, in order, some at a time. on_piece(): after each."""
        ...


class Decoding:
    """Decodes a batch of latents `(b t) c h w`, window by window."""

    def __init__(self, vae: Vae, samples: Tensor, settings: DecodeSettings) -> None:
        check_latents(vae, samples, settings)
        self.vae, self.samples, self.settings, self.node = vae, samples, settings, settings.node
        self.temporal = is_temporal(vae)
        self.factor = vae.spacial_compression_decode()
        self.count = len(samples)
        self.height, self.width = (side * self.factor for side in samples.shape[2:])
        self.tile = settings.tile       # pixels; smaller once memory has run out

    @property
    def clip(self) -> int:
        """Frames of one clip."""
        return self.count // self.settings.clips

    @property
    def overlap(self) -> int | None:
        """Frames that neighbouring windows share at least. None for a plain VAE: it decodes every frame by itself."""
        if not self.temporal:
            return None
        return self.settings.overlap if self.settings.window < self.clip else 0

    def steps(self) -> int:
        """Pieces that a whole decode is made of, for a progress bar."""
        windows = len(window_slices(self.clip, self.settings.window, self.overlap)) * self.settings.clips
        height, width = self.samples.shape[2:]
        return windows * (tile_count(height, width, *self.tiling()) if self.tile else 1)

    def frames(self, first: int = 0, last: int | None = None,
               on_piece: Callable[[], None] | None = None) -> Iterator[Tensor]:
        last = self.count if last is None else last
        for start in range(0, self.count, self.clip):
            if start + self.clip <= first or start >= last:
                continue
            z = self.samples[start:start + self.clip]
            for pictures in decode_in_windows(lambda part: self.decode_window(part, on_piece), z, self.settings.window,
                                       self.overlap, max(first - start, 0), min(last - start, self.clip)):
                yield self.vae.process_output(pictures).movedim(1, -1)

    def decode_window(self, z: Tensor, on_piece: Callable[[], None] | None = None) -> Tensor:
        """Pictures `t 3 H W` of one window, in the network's own range. Falls back to tiles if memory runs out."""
        while True:
            try:
                return self.in_pieces(z, on_piece)
            except Exception as error:
                if not compat.is_out_of_memory(error):
                    raise
            # Outside the except block: inside it the exception keeps the tensors of the failed decode alive.
            comfy.model_management.soft_empty_cache()
            self.tile = self.smaller_tile(len(z))
            logging.warning("[Video LDM] %s ran out of memory and goes on in tiles of %d pixels. Set tile to %d to "
                            "have it so from the start, or lower window.", self.settings.node, self.tile, self.tile)

    def smaller_tile(self, frames: int) -> int:
        """The next tile to try after memory has run out. Raises if there is none, or if the artist chose the tile."""
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
        return decode_in_tiles(piece, z, *self.tiling()) if self.tile else piece(z)

    def tiling(self) -> tuple[int, int]:
        """Tile and overlap in latents."""
        tile = max(self.tile // self.factor, 1)
        return tile, tile // TILE_OVERLAP

    @torch.no_grad()
    def decode_piece(self, z: Tensor) -> Tensor:
        """Run the network on latents that are decoded together."""
        vae = self.vae
        need = len(z) * vae.memory_used_decode((1, *z.shape[1:]), vae.vae_dtype)
        comfy.model_management.load_models_gpu([vae.patcher], memory_required=need, force_full_load=vae.disable_offload)
        network = vae.first_stage_model
        with compat.on_device(vae.device), cancellable(network), compat.frugal_attention(network, vae.device):
            pictures = network.decode(z.to(vae.device, vae.vae_dtype))
        return pictures.to(vae.output_device).float()


class Unfolding:
    """Frames of an upscaler in pixel space. They are pixels already, folded: `t 48 h w` in -1..1."""

    def __init__(self, frames: Tensor, node: str) -> None:
        self.folded, self.node, self.count = frames, node, len(frames)
        self.height, self.width = (FACTOR * side for side in frames.shape[2:])

    def steps(self) -> int:
        return self.count

    def frames(self, first: int = 0, last: int | None = None,
               on_piece: Callable[[], None] | None = None) -> Iterator[Tensor]:
        for frame in self.folded[first:last].split(1):
            files.check_cancelled()
            if on_piece is not None:
                on_piece()
            yield ((unfold_pixels(frame) + 1) / 2).clamp(0, 1).movedim(1, -1)


class ColoursKept:
    """Gives the large frames the colours of the small ones `t h w 3` in 0..1, frame by frame."""

    def __init__(self, decoding: FrameSource, small: Tensor) -> None:
        self.decoding, self.small, self.node, self.count = decoding, small, decoding.node, decoding.count
        self.height, self.width = decoding.height, decoding.width

    def steps(self) -> int:
        return self.decoding.steps()

    def frames(self, first: int = 0, last: int | None = None,
               on_piece: Callable[[], None] | None = None) -> Iterator[Tensor]:
        number = first
        for piece in self.decoding.frames(first, last, on_piece):
            for large in piece.split(1):
                small = self.small[number:number + 1]
                number += 1
                yield match_colours(small.movedim(-1, 1), large.movedim(-1, 1)).clamp(0, 1).movedim(1, -1)


def check_latents(vae: Vae, samples: Tensor, settings: DecodeSettings) -> None:
    """Refuse latents that the VAE cannot decode, and settings that contradict each other."""
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
    check_tile(settings.tile)


def check_tile(tile: int) -> None:
    """Refuse a tile too small to decode. 0 stands for no tiles."""
    if tile and tile < SMALLEST_TILE:
        raise VideoLDMError(f"tile is {tile} pixels; {SMALLEST_TILE} is the least. Raise it, or set it to 0 for none.")


@contextmanager
def cancellable(network: nn.Module, kind: type[nn.Module] = nn.Conv2d) -> Iterator[None]:
    """While open, every layer of this kind in the network checks for Cancel. One window may take a minute."""
    hooks = [part.register_forward_pre_hook(lambda *_: files.check_cancelled())
             for part in network.modules() if isinstance(part, kind)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
