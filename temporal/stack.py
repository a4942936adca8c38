"""Which brick sits at which site of a UNet, and how a set of bricks takes part in one call of it.

Bricks act through forward hooks on the spatial modules they belong to. The hooks live for one call (`open_call`): they
are put on the modules that are about to run and taken off again whatever happens, so that nothing of a set is visible
in the module tree, in LoRA keys, in saved checkpoints, or to any other call of the same network.
"""

from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from .clip_length import check_clip_length
from .errors import VideoLDMError
from .hooks import fold_hook, hook_site, note_emb, unfold_hook
from .layers import (ContextDownsampler, FpsToken, LevelModule, LevelParams, MotionModule, ResidualConv,
                     ResidualConvParams, RotaryParams, RotaryTransformer, TemporalResBlock, TemporalTransformer, attend)
from .sites import Site, first_resblock, spatial_norms, unet_levels, unet_sites

FIRST_FRAMES = ((), (0,), (0, 1))       # of prediction layers: no, one or two first frames (section 3.2)
BOTH_ENDS = ((0, -1),)                  # of interpolation layers: the two key frames (section 3.3)


@dataclass(frozen=True)
class ResBlockParams:
    """Temporal ResBlock of Video LDM, slot `post_res`."""

    channels: int
    emb_dim: int
    mix_length: int
    context_channels: int = 0


@dataclass(frozen=True)
class TransformerParams:
    """Temporal transformer of Video LDM, slot `in_attn_post_ff`."""

    channels: int
    heads: int
    context_dim: int
    mix_length: int


@dataclass(frozen=True)
class MotionParams:
    """AnimateDiff motion module, slot `post_attn`; `table_length` 0 means positions are the sinusoid, computed."""

    channels: int
    heads: int
    blocks: int
    attentions: int
    table_length: int
    norm_pooled: bool


@dataclass(frozen=True)
class ContextParams:
    """The input for known frames of prediction and interpolation layers: c_S has `latent_channels` + 1 channels, and
    each ResBlock receives `channels` more. positions: the sets of known frames that the layers were trained for, frame
    numbers from 0, from the end where negative; the empty set is a clip from noise alone."""

    channels: int
    latent_channels: int
    levels: int
    positions: tuple[tuple[int, ...], ...]

    @property
    def in_channels(self) -> int:
        return self.latent_channels + 1

    @property
    def from_noise(self) -> bool:
        return () in self.positions


@dataclass(frozen=True)
class SmallFramesParams:
    """The input for small frames of an upscaler's layers (Table 6: dim c_S 3, as many channels behind it as for known
    frames): each ResBlock receives `channels` more. The frames are those that the network itself is given, the last
    `in_channels` channels of its input."""

    channels: int
    levels: int
    in_channels: int = 3


BrickParams = ResBlockParams | TransformerParams | MotionParams | ResidualConvParams | RotaryParams | LevelParams


@dataclass(frozen=True)
class StackParams:
    """Everything that rebuilds a set of temporal layers, weights apart.

    frames: the clip length it was trained on. positions: how many frames its position table was made for, None where
    positions are computed without a table. pool_spatial_norms: the spatial GroupNorms see all frames of a clip
    together (formats.md, trap 2). context: the input for known frames, or an upscaler's for small ones; None without.
    fps_width: width of the token that tells the frame rate, 0 without one. shared_noise: an upscaler's layers, trained
    on one noise for all frames of a clip (temporal/training/upscaler.py), and to be run so.
    """

    family: str
    bricks: tuple[tuple[Site, BrickParams], ...]
    frames: int
    positions: int | None
    pool_spatial_norms: bool
    context: ContextParams | SmallFramesParams | None = None
    fps_width: int = 0
    shared_noise: bool = False

    @property
    def known_positions(self) -> tuple[tuple[int, ...], ...] | None:
        """The sets of known frames that the layers were trained for; None where they take none."""
        return self.context.positions if isinstance(self.context, ContextParams) else None

    @property
    def takes_small_frames(self) -> bool:
        return isinstance(self.context, SmallFramesParams)

    @property
    def mix_length(self) -> int:
        """Length of the mix over time: 1, or the only clip length that the layers can run."""
        return max((getattr(params, "mix_length", 1) for _, params in self.bricks), default=1)

    @property
    def table_length(self) -> int:
        """Length of the learned position table, 0 without one."""
        return max((getattr(params, "table_length", 0) for _, params in self.bricks), default=0)


class TemporalStack(nn.Module):
    """A set of temporal layers. State-dict keys: `layers.<site name>.<published suffix>`, `context_downsampler.*` and
    `fps_token.*` where it has them."""

    def __init__(self, params: StackParams, operations=nn, dtype=None, device=None, attention=attend):
        super().__init__()
        self.params = params
        self.layers = nn.ModuleDict()
        place = {"operations": operations, "dtype": dtype, "device": device}
        for site, brick in params.bricks:
            self.layers[site.name] = build_brick(brick, attention, place)
        given = params.context
        if given is not None:
            self.context_downsampler = ContextDownsampler(given.in_channels, given.channels, given.levels, **place)
        if params.fps_width:
            self.fps_token = FpsToken(params.fps_width, **place)

    def check_frames(self, frames: int) -> str | None:
        """Refuse a clip length that the layers cannot run; return a warning for one they were not made for."""
        params = self.params
        check_clip_length(params, frames, "the clip has",
                          "Set the number of frames to {limit}, or connect Frame Windows for more.")
        if params.positions is not None and frames > params.positions:
            return (f"{frames} frames exceed the {params.positions} positions that these {params.family} layers were "
                    f"trained with ({params.frames}-frame clips): positions are computed beyond the table, and motion "
                    "may degrade. Frame Windows keeps to the trained length.")
        return None


def build_brick(params: BrickParams, attention, place: dict) -> nn.Module:
    match params:
        case ResBlockParams():
            return TemporalResBlock(params.channels, params.emb_dim, params.mix_length, params.context_channels, **place)
        case TransformerParams():
            return TemporalTransformer(params.channels, params.heads, params.context_dim, params.mix_length,
                                       attention=attention, **place)
        case MotionParams():
            return MotionModule(params.channels, params.heads, params.blocks, params.attentions, params.table_length,
                                params.norm_pooled, attention=attention, **place)
        case ResidualConvParams():
            return ResidualConv(params, **place)
        case RotaryParams():
            return RotaryTransformer(params, attention=attention, **place)
        case LevelParams():
            return LevelModule(params, **place)
    raise TypeError(f"no brick is built from {type(params).__name__}")


# One call of the network

@dataclass
class CallSettings:
    """What a set of layers is told per call: frames per clip, strength (0 is the image model, 1 as trained), the text
    of the temporal layers `(b t) l d` where it is not the spatial one, the attention band of convolution in time, the
    known frames c_S `(b t) c+1 h w` (none: an all-zero mask) or an upscaler's small frames `(b t) 3 h w`, and the frame
    rate to make, one number or `b` of them."""

    frames: int
    strength: float = 1.0
    text: Tensor | None = None
    max_distance: int | None = None
    known: Tensor | None = None
    fps: Tensor | float | None = None


@dataclass(eq=False)
class Call:
    """One set of layers in one running call; `reached` counts the sites that acted. running: false where something
    answers in place of the network."""

    stack: TemporalStack
    settings: CallSettings
    context: Tensor | None
    reached: set = field(default_factory=set)
    running: bool = True
    levels: dict = field(default_factory=dict)      # (part, index) of a block -> its resolution
    maps: list | None = None                        # context channels of each resolution, made at the first ResBlock
    emb: Tensor | None = None                       # the network's timestep embedding, noted at the first ResBlock
    due: dict = field(default_factory=dict)         # site -> a residual that waits for its block to end (hooks.py)

    @property
    def acting(self) -> bool:
        return self in _open_calls.get()

    def clip_text(self) -> Tensor:
        """Text of each clip: that of its first frame, `b l d`; behind it the frame rate, where the layers hear it."""
        text = self.settings.text if self.settings.text is not None else self.context
        if text is None:
            raise VideoLDMError(f"These {self.stack.params.family} layers attend to text, and the model was called "
                                "without any. Connect a CONDITIONING made by CLIP Text Encode.")
        text = text[:: self.settings.frames]
        if not self.stack.params.fps_width:
            return text
        fps = self.settings.fps
        if fps is None:
            raise VideoLDMError(f"These {self.stack.params.family} layers are told the frame rate to make, and the model "
                                "was called without one. Sample with Latent Interpolate x4.")
        fps = torch.as_tensor(fps, dtype=torch.float32).reshape(-1).expand(len(text))
        return torch.cat([text, self.stack.fps_token(fps, text)], dim=1)

    def context_maps(self, site: Site, x: Tensor) -> Tensor | None:
        """Context channels of a ResBlock, `(b t) k h w`; the latents' own resolution is that of the first ResBlock."""
        if self.stack.params.context is None:
            return None
        if self.maps is None:
            self.maps = self.stack.context_downsampler(self.known_frames(x))
        return self.maps[self.levels[site.part, site.index]]

    def known_frames(self, x: Tensor) -> Tensor:
        known, params = self.settings.known, self.stack.params.context
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

    def run(self, site: Site, args: tuple, x: Tensor) -> Tensor:
        self.reached.add(site)
        brick, settings = self.stack.layers[site.name], self.settings
        if isinstance(brick, TemporalResBlock):
            return brick(x, args[1], settings.frames, settings.strength, self.context_maps(site, x))
        if isinstance(brick, TemporalTransformer):
            return brick(x, self.clip_text(), settings.frames, settings.strength, settings.max_distance)
        if isinstance(brick, ResidualConv):
            return brick(x, settings.frames, settings.strength)
        if isinstance(brick, LevelModule):
            return brick(x, self.emb, settings.frames, settings.strength)
        return brick(x, settings.frames, settings.strength, settings.max_distance)

    def check_reached(self):
        missed = [site.name for site, _ in self.stack.params.bricks if site not in self.reached]
        if missed:
            raise VideoLDMError(
                f"{len(missed)} of {len(self.stack.params.bricks)} temporal layers were not reached in a model call "
                f"(the first: {missed[0]}). Something in the graph replaces or skips parts of the model; remove it, or "
                "apply it before Load Temporal Layers.")


_open_calls: ContextVar[tuple[Call, ...]] = ContextVar("video_ldm_open_calls", default=())


@contextmanager
def open_call(unet: nn.Module, layers: list[tuple[TemporalStack, CallSettings]], context: Tensor | None = None):
    """Let sets of temporal layers, in this order, take part in the one call of `unet` made inside; yields the calls.

    context: the text of the spatial layers, `(b t) l d`. A set of strength 0 is bypassed: the image model, bit for bit.
    Raises VideoLDMError for a clip length the layers cannot run, a site the network lacks, or one not reached.
    """
    calls = [Call(stack, settings, context) for stack, settings in layers if settings.strength != 0]
    for call in calls:
        call.stack.check_frames(call.settings.frames)
    with attached(unet, calls):
        yield calls
    for call in calls:
        if call.running:
            call.check_reached()


@contextmanager
def attached(unet: nn.Module, calls: list[Call]):
    """Hooks of the calls are on the network, and act in this thread of execution alone; off again whatever happens."""
    handles = []
    token = _open_calls.set((*_open_calls.get(), *calls))
    try:
        for call in calls:
            handles += attach(unet, call)
        yield calls
    finally:
        _open_calls.reset(token)
        for handle in handles:
            handle.remove()


def attach(unet: nn.Module, call: Call) -> list:
    """Put the hooks of a call on the spatial modules; returns the handles that take them off again."""
    sites, params = unet_sites(unet), call.stack.params
    missing = [site.name for site, _ in params.bricks if site not in sites]
    if missing:
        raise VideoLDMError(f"The model has no place for the temporal layer {missing[0]} of these {params.family} "
                            "layers: they were made for another kind of model.")
    if params.context is not None:
        call.levels = levels_of(unet, params)
    handles = []
    if any(site.slot == "post_level" for site, _ in params.bricks):
        handles.append(first_resblock(unet).register_forward_pre_hook(note_emb(call)))
    for site, _ in params.bricks:
        handles += hook_site(call, site, *sites[site])
    if params.pool_spatial_norms:
        for norm in spatial_norms(unet):
            handles.append(norm.register_forward_pre_hook(fold_hook(call)))
            handles.append(norm.register_forward_hook(unfold_hook(call)))
    return handles


def levels_of(unet: nn.Module, params: StackParams) -> dict:
    """Resolution of each block; refused where the context input of the layers has not so many."""
    levels = unet_levels(unet)
    if max(levels.values()) >= params.context.levels:
        raise VideoLDMError(f"The model halves its latents {max(levels.values())} times, and the context input of these "
                            f"{params.family} layers was made for a model that does so {params.context.levels - 1} "
                            "times.")
    return levels


# Fresh layers for a network

def video_ldm_params(unet: nn.Module, emb_dim: int, context_dim: int, heads_of, frames: int, mix_length: int = 1,
                     convolution: bool = True, attention: bool = True) -> StackParams:
    """Params of untrained Video LDM layers for an LDM UNet: a temporal ResBlock after every ResBlock and a temporal
    transformer in every spatial transformer (papers.md A.2).

    heads_of: channels -> number of heads, as the spatial transformers have it. `convolution` and `attention` leave
    one kind out, for ablations.
    """
    bricks = []
    for site, (_, channels) in unet_sites(unet).items():
        if site.slot == "post_res" and convolution:
            bricks.append((site, ResBlockParams(channels, emb_dim, mix_length)))
        elif site.slot == "in_attn_post_ff" and attention:
            bricks.append((site, TransformerParams(channels, heads_of(channels), context_dim, mix_length)))
    return StackParams("Video LDM", tuple(bricks), frames, None, pool_spatial_norms=False)
