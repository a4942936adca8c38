"""One call of a network with sets of temporal layers attached.

Temporal layers act through forward hooks on the spatial modules. `open_call` installs the hooks for one call and
removes them afterwards, also when the call fails. So the layers do not show up in the module tree, in LoRA keys, in
saved checkpoints, or in other calls of the same network.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from .camera_control import CameraInCall, PoseMerge
from .errors import VideoLDMError
from .layer_strength import acting_images, blended, resized
from .layers.position import distance_band
from .params import ContextParams, SmallFramesParams
from .picture_input import GivenPicture
from .reuse import ReuseInCall
from .slots import SLOTS, Site, unet_sites
from .spatial_changes import SpatialChange
from .stack import TemporalStack
from .unet import first_resblock, transformers, unet_levels


@dataclass
class CallSettings:
    """The settings of one call for one set of layers."""

    frames: int                             # t, the frames of a clip
    strength: float = 1.0                   # 0: the image model alone. 1: the layers as trained
    text: Tensor | None = None              # text for the temporal layers, `(b t) l d`. None: the spatial layers' text
    max_distance: int | None = None         # attention over time reaches this many frames. None: all frames
    known: Tensor | None = None             # context frames c_S `(b t) c+1 h w`, or small frames `(b t) 3 h w`
    fps: Tensor | float | None = None       # frames per second of the clips to make: one number, or one per clip `b`
    # The frame rate to tell a network with an embedding of it: one number, or one per clip `b`. None: its authors'
    told_fps: Tensor | float | None = None
    # Strength by image and place, `(b t) h w` at the latents' size, or `(b t) 1 1` by image alone. It multiplies
    # `strength`. None: the same everywhere
    strengths: Tensor | None = None
    # Which images have strength somewhere in the whole picture, `(b t)`, where `strengths` may be a tile of it
    acting: Tensor | None = None
    reuse: ReuseInCall | None = None        # residuals that this call keeps or uses again. None: every layer runs
    known_places: tuple[int, ...] = ()      # numbers of the frames in each clip that stand in the input without noise
    picture: GivenPicture | None = None     # the picture that the layers move. None: they see none
    camera: CameraInCall | None = None      # the camera that the motion modules follow. None: none

    @property
    def acting_images(self) -> Tensor | None:
        """Which images have strength somewhere, `(b t)`. None: all have."""
        if self.strengths is None:
            return None
        return acting_images(self.strengths) if self.acting is None else self.acting

    @property
    def acts(self) -> bool:
        """Whether the layers change anything."""
        acting = self.acting_images
        return self.strength != 0 and (acting is None or bool(acting.any()))


@dataclass(eq=False)
class Call:
    """One set of layers while its call is open."""

    stack: TemporalStack
    settings: CallSettings
    context: Tensor | None                              # the text of the spatial layers, `(b t) l d`
    reached: set[Site] = field(default_factory=set)     # the sites whose layers have run
    running: bool = True                                # False: a cache answers and the network itself does not run
    levels: dict[tuple[str, int], int] = field(default_factory=dict)    # (part, index) of a block -> its resolution
    known: Tensor | None = None                         # context frames or small frames; set at the first site
    maps: list[Tensor] | None = None                    # context channels per resolution; set at the first site
    emb: Tensor | None = None                           # the network's timestep embedding; set at the first ResBlock
    frame_embedding: Tensor | None = None               # of the frame numbers, `t e`; set at the first site
    due: dict[Site, Tensor] = field(default_factory=dict)   # residuals to add when their block ends (slots.py)
    unet: nn.Module | None = None                       # the network that its hooks are on
    tokens: tuple[int, ...] = ()                        # height and width of the tokens in the transformer that runs
    strengths: dict[tuple, Tensor] = field(default_factory=dict)    # the strengths as each kind of features takes them

    @property
    def acting(self) -> bool:
        """Whether this call is open in the current thread or task."""
        return self in _open_calls.get()

    @property
    def frames(self) -> int:
        return self.settings.frames

    @property
    def told_fps(self) -> Tensor | float | None:
        return self.settings.told_fps

    @property
    def known_places(self) -> tuple[int, ...]:
        return self.settings.known_places

    @property
    def picture(self) -> GivenPicture | None:
        return self.settings.picture

    def run(self, site: Site, x: Tensor, emb: Tensor | None = None) -> Tensor:
        """Run the layer at a site on x. emb: the timestep embedding at this site. None: the network's."""
        self.reached.add(site)
        result = self.result(site, x, emb)
        if self.settings.strengths is None:
            return result
        without = torch.zeros_like(result) if SLOTS[site.slot].gives_residual else x
        return blended(without, result, self.strengths_for(x))

    def result(self, site: Site, x: Tensor, emb: Tensor | None) -> Tensor:
        """What the layer at a site makes of x, or what it made in an earlier step. emb: as in `run`."""
        reuse, is_residual = self.settings.reuse, SLOTS[site.slot].gives_residual
        kept = None if reuse is None else reuse.residual(site, x)
        if kept is not None:
            return kept if is_residual else x + kept
        result = self.run_layer(site, x, emb)
        if reuse is not None and not reuse.again:
            reuse.keep(site, result if is_residual else result - x)
        return result

    def run_layer(self, site: Site, x: Tensor, emb: Tensor | None) -> Tensor:
        context = self.stack.params.context
        if self.maps is None and context is not None:
            # The maps are made here and not inside a layer. Gradient checkpointing runs a layer twice.
            self.known = self.input_frames(x, context)
            self.maps = self.stack.context_downsampler(self.known)
        if self.stack.params.frame_width and self.frame_embedding is None:
            self.frame_embedding = self.stack.frame_embedding(self.frames, x)
        return self.stack.layers[site.name](x, CallAtSite(self, site, x, self.emb if emb is None else emb))

    def strengths_for(self, x: Tensor) -> Tensor:
        """The strengths by image and place, in a shape that goes with features x `(b t) c h w` or `(b t) s c`."""
        assert self.settings.strengths is not None
        kind = (x.ndim, *(x.shape[2:] if x.ndim == 4 else self.tokens), x.device, x.dtype)
        if kind not in self.strengths:
            found = self.settings.strengths
            if self.by_region:
                found = resized(found, x.shape[2:] if x.ndim == 4 else self.tokens)
            if x.ndim == 3 and self.by_region and found[0].numel() != x.shape[1]:
                raise VideoLDMError("A node changes the number of places inside a transformer of the model, and Layer "
                                    "Strength has a mask for each place. Remove that node, or the mask.")
            self.strengths[kind] = (found[:, None] if x.ndim == 4 else found.flatten(1)[:, :, None]).to(x)
        return self.strengths[kind]

    @property
    def by_region(self) -> bool:
        """Whether the places of a frame have strengths of their own."""
        return self.settings.strengths is not None and self.settings.strengths.shape[1:] != (1, 1)

    def frames_changed(self, change: SpatialChange) -> Tensor | None:
        """Which images a change of the spatial network is for, `(b t)`: those with strength somewhere. None: all are.

        Sets of layers that share a change have it wherever one of them acts.
        """
        sharing = [self] if self.change_weights(change) is not None else [
            other for other in _open_calls.get()
            if other.unet is self.unet and other.frames == self.frames and change in other.stack.params.spatial]
        acting = [other.settings.acting_images for other in sharing]
        if any(images is None for images in acting):
            return None
        changed = torch.stack([images for images in acting if images is not None]).any(0)
        return None if changed.all() else changed

    def needs(self, change: SpatialChange) -> bool:
        """Whether a change of the spatial network does anything in this call."""
        return bool(self.known_places) or not getattr(change, "needs_known", False)

    def change_weights(self, change: SpatialChange) -> nn.Module | None:
        """The weights of a change of the spatial network. None: it has none."""
        number = str(self.stack.params.spatial.index(change))
        return self.stack.spatial[number] if number in self.stack.spatial else None

    def clip_text(self) -> Tensor:
        """The text of each clip, `b l d`: the text of its first frame.

        Layers with a frame-rate token get it appended as the last text token.
        """
        text = self.settings.text if self.settings.text is not None else self.context
        if text is None:
            raise VideoLDMError(f"These {self.stack.params.family} layers attend to text, and the model was called "
                                "without any. Connect a CONDITIONING made by CLIP Text Encode.")
        text = text[:: self.frames]
        if not self.stack.params.fps_width:
            return text
        fps = self.settings.fps
        if fps is None:
            raise VideoLDMError(f"These {self.stack.params.family} layers are told the frame rate to make, and the "
                                "model was called without one. Sample with Latent Interpolate x4.")
        fps = torch.as_tensor(fps, dtype=torch.float32).reshape(-1).expand(len(text))
        return torch.cat([text, self.stack.fps_token(fps, text)], dim=1)

    def context_maps(self, site: Site, x: Tensor) -> Tensor | None:
        """Context channels at the resolution of x, `(b t) k h w`. None for layers without context frames.

        Nodes such as deep shrink change the size of the features in some blocks. There the context frames are resized
        to match, and the maps are computed again.
        """
        if self.maps is None or self.known is None:
            return None
        level = self.levels[site.part, site.index]
        if self.maps[level].shape[2:] == x.shape[2:]:
            return self.maps[level]
        size = [side << level for side in x.shape[2:]]
        resized = interpolate(self.known.float(), size, mode="bilinear", antialias=True).to(x)
        return self.stack.context_downsampler(resized)[level]

    def input_frames(self, x: Tensor, params: ContextParams | SmallFramesParams) -> Tensor:
        """The context frames c_S, or the small frames, for the features x of the first site.

        At the first site the features have the latents' own resolution. Without context frames c_S is zero.
        Raises VideoLDMError where small frames are missing or a size does not fit.
        """
        known = self.settings.known
        expected = (len(x), params.in_channels, *x.shape[2:])
        if known is None and self.stack.params.takes_small_frames:
            raise VideoLDMError(f"These {self.stack.params.family} layers see the small frames that are upscaled, and "
                                "the model was called without any. Upscale with Video Upscale.")
        if known is None:
            return x.new_zeros(expected)
        if known.shape != expected:
            raise VideoLDMError(f"The known frames are {tuple(known.shape)} (frames, channels with the mask, height, "
                                f"width) where the clip takes {expected}. Give context frames of the clip's own size.")
        return known.to(x)

    def check_reached(self) -> None:
        """Raise VideoLDMError if a layer of the set has not run."""
        missed = [site.name for site, _ in self.stack.params.bricks if site not in self.reached]
        if missed:
            raise VideoLDMError(
                f"{len(missed)} of {len(self.stack.params.bricks)} temporal layers were not reached in a model call "
                f"(the first: {missed[0]}). Something in the graph replaces or skips parts of the model; remove it, or "
                "apply it before Load Temporal Layers.")


@dataclass(frozen=True)
class CallAtSite:
    """The BrickCall (layers/brick.py) that the layer at one site receives."""

    call: Call
    site: Site
    x: Tensor               # the features at the site
    emb: Tensor | None      # the timestep embedding at the site

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

    @property
    def frame_embedding(self) -> Tensor | None:
        return self.call.frame_embedding

    @property
    def merge(self) -> PoseMerge | None:
        camera = self.call.settings.camera
        return None if camera is None else camera.at(self.site, self.x, self.frames)

    def band(self, device: torch.device) -> Tensor | None:
        return distance_band(self.frames, self.call.settings.max_distance, device)


_open_calls: ContextVar[tuple[Call, ...]] = ContextVar("video_ldm_open_calls", default=())


@contextmanager
def open_call(unet: nn.Module, layers: list[tuple[TemporalStack, CallSettings]],
              context: Tensor | None = None) -> Iterator[list[Call]]:
    """Attach sets of temporal layers to `unet` for the one call that is made inside. Yields the open calls.

    The sets run in the given order. A set of strength 0 is left out, and the result is the image model's, bit for bit.
    So is a frame of strength 0, if all sets leave it out, and a clip of one frame with layers whose authors have it so.

    Args:
        unet: an LDM UNet.
        layers: the sets of layers, each with its settings.
        context: the text of the spatial layers, `(b t) l d`.

    Raises VideoLDMError for a clip length that the layers cannot run, and for a site that the network lacks. It is also
    raised at the end, if the call did not reach a layer.
    """
    calls = [Call(stack, settings, context) for stack, settings in layers if acts(stack, settings)]
    for call in calls:
        call.stack.check_frames(call.frames)
    with attach_calls(unet, calls):
        yield calls
    for call in calls:
        if call.running:
            call.check_reached()


def acts(stack: TemporalStack, settings: CallSettings) -> bool:
    """Whether a set of layers changes anything in a call with these settings."""
    return settings.acts and not (stack.params.image_alone and settings.frames == 1)


@contextmanager
def attach_calls(unet: nn.Module, calls: list[Call]) -> Iterator[list[Call]]:
    """Install the hooks of the calls on the network, and remove them at the end, also after an error.

    The hooks act in the current thread or task only.
    """
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


def attach_hooks(unet: nn.Module, call: Call) -> list[Any]:
    """Install the hooks of one call on the spatial modules. Returns the handles that remove them.

    Raises VideoLDMError before any is installed: where the network lacks a site of the layers, and where a change of
    the network would reach frames of strength 0.
    """
    sites, params = unet_sites(unet), call.stack.params
    missing = [site.name for site, _ in params.bricks if site not in sites]
    if missing:
        raise VideoLDMError(f"The model has no place for the temporal layer {missing[0]} of these {params.family} "
                            "layers: they were made for another kind of model.")
    if params.context is not None:
        call.levels = block_levels(unet, params.family, params.context.levels)
    call.unet = unet
    for change in params.spatial:
        if call.frames_changed(change) is not None and not change.by_frame and call.needs(change):
            raise VideoLDMError(f"{change.note} So single frames cannot stay the image model's with these "
                                f"{params.family} layers. Give every frame a strength above 0.")
    before = [other for other in takewhile(lambda other: other is not call, _open_calls.get())
              if other.unet is unet and other.frames == call.frames]
    handles = [first_resblock(unet).register_forward_pre_hook(capture_timestep_embedding(call))]
    for site, _ in params.bricks:
        handles += SLOTS[site.slot].attach(call, site, sites[site])
    if call.by_region:
        handles += [part.register_forward_pre_hook(note_size(call)) for part in transformers(unet)]
    for change in params.spatial:
        weights = call.change_weights(change)
        if weights is None and any(change in other.stack.params.spatial for other in before):
            continue        # another set has made this change of the network already
        handles += change.attach(call, unet, weights)
    return handles


def capture_timestep_embedding(call: Call) -> Callable[[nn.Module, tuple], None]:
    """A pre-hook for the first ResBlock. It keeps the timestep embedding that the ResBlock receives."""
    def hook(module: nn.Module, args: tuple) -> None:
        if call.acting:
            call.emb = args[1]
    return hook


def note_size(call: Call) -> Callable[[nn.Module, tuple], None]:
    """A pre-hook for spatial transformers. It keeps the height and width that their tokens are made from."""
    def hook(module: nn.Module, args: tuple) -> None:
        if call.acting:
            call.tokens = tuple(args[0].shape[2:])
    return hook


def block_levels(unet: nn.Module, family: str, resolutions: int) -> dict[tuple[str, int], int]:
    """The resolution of each block, by (part, index).

    Raises VideoLDMError if the network has more `resolutions` than the context input of the layers.
    """
    levels = unet_levels(unet)
    if max(levels.values()) >= resolutions:
        raise VideoLDMError(f"The model halves its latents {max(levels.values())} times, and the context input of "
                            f"these {family} layers was made for a model that does so {resolutions - 1} times.")
    return levels
