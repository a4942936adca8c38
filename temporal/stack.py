"""Which brick sits at which site of a UNet, and how a set of bricks takes part in one call of it.

Bricks act through forward hooks on the spatial modules they belong to. The hooks live for one call (`open_call`): they
are put on the modules that are about to run and taken off again whatever happens, so that nothing of a set is visible
in the module tree, in LoRA keys, in saved checkpoints, or to any other call of the same network.
"""

from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import NamedTuple

from einops import rearrange
from torch import Tensor, nn

from .errors import VideoLDMError
from .layers import MotionModule, TemporalResBlock, TemporalTransformer, attend

PARTS = ("input", "middle", "output")
SLOTS = ("post_res", "in_attn_post_ff", "post_attn")


class Site(NamedTuple):
    """A place in the spatial network: part, LDM block index, slot (what the brick follows) and its ordinal there."""

    part: str
    index: int
    slot: str
    n: int = 0

    @property
    def name(self) -> str:
        return f"{self.part}_{self.index}_{self.slot}_{self.n}"


@dataclass(frozen=True)
class ResBlockParams:
    """Temporal ResBlock of Video LDM, slot `post_res`."""

    channels: int
    emb_dim: int
    mix_length: int


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


BrickParams = ResBlockParams | TransformerParams | MotionParams


@dataclass(frozen=True)
class StackParams:
    """Everything that rebuilds a set of temporal layers, weights apart.

    frames: the clip length it was trained on. positions: how many frames its position table was made for, None where
    positions are computed without a table. pool_spatial_norms: the spatial GroupNorms see all frames of a clip
    together (formats.md, trap 2).
    """

    family: str
    bricks: tuple[tuple[Site, BrickParams], ...]
    frames: int
    positions: int | None
    pool_spatial_norms: bool

    @property
    def mix_length(self) -> int:
        """Length of the mix over time: 1, or the only clip length that the layers can run."""
        return max((getattr(params, "mix_length", 1) for _, params in self.bricks), default=1)

    @property
    def table_length(self) -> int:
        """Length of the learned position table, 0 without one."""
        return max((getattr(params, "table_length", 0) for _, params in self.bricks), default=0)


class TemporalStack(nn.Module):
    """A set of temporal layers. State-dict keys: `layers.<site name>.<published suffix>`."""

    def __init__(self, params: StackParams, operations=nn, dtype=None, device=None, attention=attend):
        super().__init__()
        self.params = params
        self.layers = nn.ModuleDict()
        place = {"operations": operations, "dtype": dtype, "device": device}
        for site, brick in params.bricks:
            self.layers[site.name] = build_brick(brick, attention, place)

    def check_frames(self, frames: int) -> str | None:
        """Refuse a clip length that the layers cannot run; return a warning for one they were not made for."""
        params = self.params
        if params.mix_length > 1 and frames != params.mix_length:
            raise VideoLDMError(
                f"These {params.family} layers mix over time with a vector of {params.mix_length} frames, so they take "
                f"clips of exactly {params.mix_length} frames, not {frames}. Set the number of frames to {params.mix_length}.")
        if params.table_length and frames > params.table_length:
            raise VideoLDMError(
                f"These {params.family} layers have a learned table of {params.table_length} frame positions, which does "
                f"not reach {frames} frames. Set the number of frames to {params.table_length} or fewer.")
        if params.positions is not None and frames > params.positions:
            return (f"{frames} frames exceed the {params.positions} positions that these {params.family} layers were "
                    f"trained with ({params.frames}-frame clips): positions are computed beyond the table, and motion "
                    "may degrade.")
        return None


def build_brick(params: BrickParams, attention, place: dict) -> nn.Module:
    match params:
        case ResBlockParams():
            return TemporalResBlock(params.channels, params.emb_dim, params.mix_length, **place)
        case TransformerParams():
            return TemporalTransformer(params.channels, params.heads, params.context_dim, params.mix_length,
                                       attention=attention, **place)
        case MotionParams():
            return MotionModule(params.channels, params.heads, params.blocks, params.attentions, params.table_length,
                                params.norm_pooled, attention=attention, **place)
    raise TypeError(f"no brick is built from {type(params).__name__}")


# The spatial network, told by shape rather than by class so that no host is imported here.

def is_resblock(module: nn.Module) -> bool:
    return hasattr(module, "in_layers") and hasattr(module, "out_layers")


def is_transformer(module: nn.Module) -> bool:
    return hasattr(module, "transformer_blocks") and hasattr(module, "proj_out")


def unet_blocks(unet: nn.Module):
    """Yield (part, index, layers) for every block of an LDM UNet, in the order they run."""
    yield from (("input", i, list(block)) for i, block in enumerate(unet.input_blocks))
    if unet.middle_block is not None:
        yield "middle", 0, list(unet.middle_block)
    yield from (("output", i, list(block)) for i, block in enumerate(unet.output_blocks))


def unet_sites(unet: nn.Module) -> dict[Site, tuple[nn.Module, int]]:
    """Every site of an LDM UNet: the spatial module whose output a brick there acts on, and its channels."""
    sites = {}
    for part, index, layers in unet_blocks(unet):
        resblocks = [layer for layer in layers if is_resblock(layer)]
        transformers = [layer for layer in layers if is_transformer(layer)]
        for n, layer in enumerate(resblocks):
            sites[Site(part, index, "post_res", n)] = (layer, layer.out_channels)
        for layer in transformers:
            for n, block in enumerate(layer.transformer_blocks):
                sites[Site(part, index, "in_attn_post_ff", n)] = (block, layer.in_channels)
        followed = (transformers or resblocks)[-1:]
        for layer in followed:
            channels = layer.in_channels if is_transformer(layer) else layer.out_channels
            sites[Site(part, index, "post_attn", 0)] = (layer, channels)
    return sites


def spatial_norms(unet: nn.Module):
    """The GroupNorms of the ResBlocks and of the output, which some families pool over the frames of a clip."""
    for _, _, layers in unet_blocks(unet):
        for layer in filter(is_resblock, layers):
            yield layer.in_layers[0]
            yield layer.out_layers[0]
    yield unet.out[0]


# One call of the network

@dataclass
class CallSettings:
    """What a set of layers is told per call: frames per clip, strength (0 is the image model, 1 as trained), the text
    of the temporal layers `(b t) l d` where it is not the spatial one, and the attention band of convolution in time."""

    frames: int
    strength: float = 1.0
    text: Tensor | None = None
    max_distance: int | None = None


@dataclass(eq=False)
class Call:
    """One set of layers in one running call; `reached` counts the sites that acted."""

    stack: TemporalStack
    settings: CallSettings
    context: Tensor | None
    reached: set = field(default_factory=set)

    def clip_text(self) -> Tensor:
        """Text of each clip: that of its first frame, `b l d`."""
        text = self.settings.text if self.settings.text is not None else self.context
        if text is None:
            raise VideoLDMError(f"These {self.stack.params.family} layers attend to text, and the model was called "
                                "without any. Connect a CONDITIONING made by CLIP Text Encode.")
        return text[:: self.settings.frames]

    def run(self, site: Site, args: tuple, x: Tensor) -> Tensor:
        self.reached.add(site)
        brick, settings = self.stack.layers[site.name], self.settings
        if isinstance(brick, TemporalResBlock):
            return brick(x, args[1], settings.frames, settings.strength)
        if isinstance(brick, TemporalTransformer):
            return brick(x, self.clip_text(), settings.frames, settings.strength, settings.max_distance)
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
    handles = [sites[site][0].register_forward_hook(site_hook(call, site)) for site, _ in params.bricks]
    if params.pool_spatial_norms:
        for norm in spatial_norms(unet):
            handles.append(norm.register_forward_pre_hook(fold_hook(call)))
            handles.append(norm.register_forward_hook(unfold_hook(call)))
    return handles


def site_hook(call: Call, site: Site):
    def hook(module, args, output):
        return call.run(site, args, output) if call in _open_calls.get() else None
    return hook


def fold_hook(call: Call):
    """Before a spatial norm: frames side by side in height, so that it pools over the clip."""
    def hook(module, args):
        if call not in _open_calls.get():
            return None
        return rearrange(args[0], "(b t) c h w -> b c (t h) w", t=call.settings.frames), *args[1:]
    return hook


def unfold_hook(call: Call):
    def hook(module, args, output):
        if call not in _open_calls.get():
            return None
        return rearrange(output, "b c (t h) w -> (b t) c h w", t=call.settings.frames)
    return hook


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
