"""One call of a network in which sets of temporal layers take part.

Layers act through forward hooks on the spatial modules they belong to. The hooks live for one call (`open_call`): they
are put on the modules that are about to run, and taken off again whatever happens. So nothing of a set is visible in
the module tree, in LoRA keys, in saved checkpoints, or to any other call of the same network.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from .errors import VideoLDMError
from .layers.position import distance_band
from .params import ContextParams, SmallFramesParams
from .slots import SLOTS, Site, unet_sites
from .stack import TemporalStack
from .unet import first_resblock, unet_levels


@dataclass
class CallSettings:
    """What a set of layers is told about one call."""

    frames: int                                 # of a clip
    strength: float = 1.0                       # 0 is the image model, 1 is as trained
    text: Tensor | None = None                  # of the temporal layers, `(b t) l d`; None: the spatial layers' text
    max_distance: int | None = None             # frames that attention over time reaches; None: all
    known: Tensor | None = None                 # context frames c_S `(b t) c+1 h w`, or small frames `(b t) 3 h w`
    fps: Tensor | float | None = None           # the frame rate to make, one number or `b` of them


@dataclass(eq=False)
class Call:
    """One set of layers in one running call."""

    stack: TemporalStack
    settings: CallSettings
    context: Tensor | None                      # the text of the spatial layers
    reached: set = field(default_factory=set)   # the sites that acted
    running: bool = True                        # false where something answers in place of the network
    levels: dict = field(default_factory=dict)  # (part, index) of a block -> its resolution
    known: Tensor | None = None                 # context or small frames, kept at the first site
    maps: list | None = None                    # context channels of each resolution, made at the first site
    emb: Tensor | None = None                   # the network's timestep embedding, kept at the first ResBlock
    due: dict = field(default_factory=dict)     # site -> a residual that waits for its block to end (slots.py)

    @property
    def acting(self) -> bool:
        return self in _open_calls.get()

    @property
    def frames(self) -> int:
        return self.settings.frames

    def run(self, site: Site, x: Tensor, emb: Tensor | None = None) -> Tensor:
        """What the layer at a site makes of x. emb: the timestep embedding there, else the network's."""
        self.reached.add(site)
        context = self.stack.params.context
        if self.maps is None and context is not None:
            # Here and not when a layer asks: gradient checkpointing runs a layer twice, and the maps are made once.
            self.known = self.known_frames(x, context)
            self.maps = self.stack.context_downsampler(self.known)
        return self.stack.layers[site.name](x, CallAtSite(self, site, x, self.emb if emb is None else emb))

    def clip_text(self) -> Tensor:
        """Text of each clip: that of its first frame, `b l d`; behind it the frame rate, where the layers hear it."""
        text = self.settings.text if self.settings.text is not None else self.context
        if text is None:
            raise VideoLDMError(f"These {self.stack.params.family} layers attend to text, and the model was called "
                                "without any. Connect a CONDITIONING made by CLIP Text Encode.")
        text = text[:: self.frames]
        if not self.stack.params.fps_width:
            return text
        fps = self.settings.fps
        if fps is None:
            raise VideoLDMError(f"These {self.stack.params.family} layers are told the frame rate to make, and the model "
                                "was called without one. Sample with Latent Interpolate x4.")
        fps = torch.as_tensor(fps, dtype=torch.float32).reshape(-1).expand(len(text))
        return torch.cat([text, self.stack.fps_token(fps, text)], dim=1)

    def context_maps(self, site: Site, x: Tensor) -> Tensor | None:
        """Context channels at the resolution of x, `(b t) k h w`; None for layers without context frames.

        Other nodes may let the network run at another size from some block on (deep shrink). There the maps are those
        of a clip of that size.
        """
        if self.maps is None or self.known is None:
            return None
        level = self.levels[site.part, site.index]
        if self.maps[level].shape[2:] == x.shape[2:]:
            return self.maps[level]
        size = [side << level for side in x.shape[2:]]
        known = interpolate(self.known.float(), size, mode="bilinear", antialias=True).to(x)
        return self.stack.context_downsampler(known)[level]

    def known_frames(self, x: Tensor, params: ContextParams | SmallFramesParams) -> Tensor:
        """The context frames c_S at the resolution of x, which is the latents' own at the first site."""
        known = self.settings.known
        wanted = (len(x), params.in_channels, *x.shape[2:])
        if known is None and self.stack.params.takes_small_frames:
            raise VideoLDMError(f"These {self.stack.params.family} layers see the small frames that are upscaled, and the "
                                "model was called without any. Upscale with Video Upscale.")
        if known is None:
            return x.new_zeros(wanted)
        if known.shape != wanted:
            raise VideoLDMError(f"The known frames are {tuple(known.shape)} (frames, channels with the mask, height, "
                                f"width) where the clip takes {wanted}. Give context frames of the clip's own size.")
        return known.to(x)

    def check_reached(self) -> None:
        missed = [site.name for site, _ in self.stack.params.bricks if site not in self.reached]
        if missed:
            raise VideoLDMError(
                f"{len(missed)} of {len(self.stack.params.bricks)} temporal layers were not reached in a model call "
                f"(the first: {missed[0]}). Something in the graph replaces or skips parts of the model; remove it, or "
                "apply it before Load Temporal Layers.")


@dataclass(frozen=True)
class CallAtSite:
    """What the layer at one site may ask: a BrickCall (layers/brick.py)."""

    call: Call
    site: Site
    x: Tensor
    emb: Tensor | None

    @property
    def frames(self) -> int:
        return self.call.frames

    @property
    def strength(self) -> float:
        return self.call.settings.strength

    @property
    def text(self) -> Tensor:
        return self.call.clip_text()

    @property
    def context_maps(self) -> Tensor | None:
        return self.call.context_maps(self.site, self.x)

    def band(self, device: torch.device) -> Tensor | None:
        return distance_band(self.frames, self.call.settings.max_distance, device)


_open_calls: ContextVar[tuple[Call, ...]] = ContextVar("video_ldm_open_calls", default=())


@contextmanager
def open_call(unet: nn.Module, layers: list[tuple[TemporalStack, CallSettings]],
              context: Tensor | None = None) -> Iterator[list[Call]]:
    """Let sets of temporal layers, in this order, take part in the one call of `unet` made inside; yields the calls.

    context: the text of the spatial layers, `(b t) l d`. A set of strength 0 is bypassed: the image model, bit for bit.
    Raises VideoLDMError for a clip length the layers cannot run, a site the network lacks, or one not reached.
    """
    calls = [Call(stack, settings, context) for stack, settings in layers if settings.strength != 0]
    for call in calls:
        call.stack.check_frames(call.frames)
    with attach_calls(unet, calls):
        yield calls
    for call in calls:
        if call.running:
            call.check_reached()


@contextmanager
def attach_calls(unet: nn.Module, calls: list[Call]) -> Iterator[list[Call]]:
    """Hooks of the calls are on the network, and act in this thread of execution alone; off again whatever happens."""
    handles: list[Any] = []
    token = _open_calls.set((*_open_calls.get(), *calls))
    try:
        for call in calls:
            handles += attach_hooks(unet, call)
        yield calls
    finally:
        _open_calls.reset(token)
        for handle in handles:
            handle.remove()


def attach_hooks(unet: nn.Module, call: Call) -> list:
    """Put the hooks of a call on the spatial modules; returns the handles that take them off again."""
    sites, params = unet_sites(unet), call.stack.params
    missing = [site.name for site, _ in params.bricks if site not in sites]
    if missing:
        raise VideoLDMError(f"The model has no place for the temporal layer {missing[0]} of these {params.family} "
                            "layers: they were made for another kind of model.")
    if params.context is not None:
        call.levels = block_levels(unet, params.family, params.context.levels)
    handles = [first_resblock(unet).register_forward_pre_hook(capture_timestep_embedding(call))]
    for site, _ in params.bricks:
        handles += SLOTS[site.slot].attach(call, site, sites[site])
    for n, change in enumerate(params.spatial):
        weights = call.stack.spatial[str(n)] if str(n) in call.stack.spatial else None
        handles += change.attach(call, unet, weights)
    return handles


def capture_timestep_embedding(call: Call):
    """A hook on the first ResBlock, which is given the network's timestep embedding."""
    def hook(module, args):
        if call.acting:
            call.emb = args[1]
    return hook


def block_levels(unet: nn.Module, family: str, known: int) -> dict[tuple[str, int], int]:
    """Resolution of each block; refused where it has more than the `known` ones of the layers' context input."""
    levels = unet_levels(unet)
    if max(levels.values()) >= known:
        raise VideoLDMError(f"The model halves its latents {max(levels.values())} times, and the context input of these "
                            f"{family} layers was made for a model that does so {known - 1} times.")
    return levels
