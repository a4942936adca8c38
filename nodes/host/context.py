"""Context frames on a MODEL: frames of the clip that are given.

There are six ways. Layers that were trained with context frames take them as an input. A network that was trained with
known frames takes them through its own input (known_frames.py). Some layers were trained to find them in the image
model's input (placed_frames.py), and layers that move a given picture see it through a change of the image model
(picture.py). SparseCtrl is a second network that sees them (sparse_control.py). For other layers ComfyUI's noise mask
holds them in place. All of it is on the clone, so core's samplers work as well as the pack's: the frames are in its
transformer_options, one wrapper stands around the sampling, and context guidance around calc_cond_batch.
"""

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
from comfy.patcher_extension import WrappersMP
from comfy.sampler_helpers import prepare_mask
from torch import Tensor

from ...temporal.conditioning import resolve_positions
from ...temporal.errors import VideoLDMError
from ...temporal.params import GREY, HINT, is_trained, listed
from ...temporal.picture_input import PictureParams
from ...temporal.rollout import PER_KEY, interpolated_length
from .compat import with_own_id
from .known_frames import refuse_copies
from .latents import check_channels, check_frames
from .options import (
    CLIP,
    ContextFrames,
    LayerSet,
    clip_options,
    frames_per_clip,
    layer_sets,
    layer_sets_in,
    set_clip_options,
)
from .picture import check_motion, check_one_picture, way_of_picture
from .sampling import LATENT_PIXELS
from .sockets import Executor, Model, Vae
from .sparse_control import refuse_two_ways, sparse_settings

KEY = "video_ldm_context"       # key of the wrappers


def takes_context(model: Model) -> bool:
    """Whether temporal layers on the MODEL, or their network, have an input for known frames."""
    return any(layers.params.known_frames_inputs for layers in layer_sets(model))


def way_in(model: Model) -> str:
    """How known frames enter on this MODEL, as the end of a sentence that begins with them."""
    if network_with_input(model) is not None:
        return "seen by the network's own input"
    if (way := way_of_picture(model)) is not None:
        return way
    if sees_hint(model):
        return "seen in every frame through the inpainting model's input by the temporal layers"
    if sparse_settings(model) is not None:
        return "seen by SparseCtrl"
    return "seen by the temporal layers" if takes_context(model) else "held in place by a noise mask"


def sees_hint(model: Model) -> bool:
    """Whether layers see a known frame in the channels that an inpainting model has."""
    return any(layers.params.placed_frames is not None and layers.params.placed_frames.form == HINT
               for layers in layer_sets(model))


def network_with_input(model: Model) -> LayerSet | None:
    """The layers whose network takes known frames through its own input. None if there are none."""
    return next((layers for layers in layer_sets(model) if layers.params.input_frames is not None), None)


def remakes_key_frames(model: Model) -> bool:
    """Whether the MODEL makes all frames of an interpolated clip anew: LaVie's network does, and SparseCtrl."""
    return sparse_settings(model) is not None or any(layers.params.remakes_key_frames for layers in layer_sets(model))


def samples_with_known_alone(model: Model) -> bool:
    """Whether the MODEL is told of its known frames in every clip, also where there are none."""
    return network_with_input(model) is not None or sparse_settings(model) is not None


def refuse_interpolation_network(model: Model) -> None:
    """Refuse a network that makes the frames between key frames, in a node that makes other clips."""
    for layers in layer_sets(model):
        if layers.params.remakes_key_frames:
            refuse_copies(layers)


def trained_for(layers: LayerSet, positions: tuple[int, ...], frames: int) -> bool:
    """Whether these layers and their network were trained for the positions. True if they take no known frames.

    frames: of the clip. `check_one_picture` checks the picture of layers that move one.
    """
    return all(takes.positions is None or is_trained(takes.positions, set(resolve_positions(positions, frames)), frames)
               for takes in layers.params.known_frames_inputs if not isinstance(takes, PictureParams))


def check_trained(model: Model, positions: tuple[int, ...]) -> None:
    """Refuse positions for which a set of layers with an input for known frames was not trained.

    Negative positions are taken in a clip of the trained length. Sampling knows the clip's own, and checks again.
    """
    check_one_picture(model, positions)
    for layers in layer_sets(model):
        check_trained_at(layers, positions, layers.params.frames)


def check_trained_at(layers: LayerSet, positions: tuple[int, ...], frames: int) -> None:
    """The same for one set of layers and clips of `frames` frames."""
    if not trained_for(layers, positions, frames):
        sets = "; ".join(listed(takes.positions) for takes in layers.params.known_frames_inputs)
        raise VideoLDMError(f"The temporal layers ({layers.title}) were trained for the context frames {sets}, "
                            f"not for {', '.join(map(str, positions)) or 'none'}. Numbers count from 0, and from the "
                            "end where negative. Choose one of these sets.")


def check_guidance(model: Model) -> None:
    """Refuse context guidance for layers that were never trained without known frames."""
    for layers in layer_sets(model):
        if not all(takes.from_noise for takes in layers.params.known_frames_inputs):
            raise VideoLDMError(f"Context guidance compares with a prediction without context frames, and the temporal "
                                f"layers ({layers.title}) were never trained without them. Set it to 1.")


def encoded_grey(model: Model, like: Tensor, vae: Vae | None) -> Tensor | None:
    """Mid-grey `c h w`, encoded at the size of the latents `like`, where the network on MODEL needs it. Else None.

    Raises VideoLDMError if it needs a VAE and there is none, or another model's.
    """
    layers = network_with_input(model)
    if layers is None or layers.params.input_frames is None or layers.params.input_frames.filler != GREY:
        return None
    if vae is None:
        raise VideoLDMError(f"This MODEL ({layers.title}) sees mid-grey in the frames that are to be made, and no VAE "
                            "is connected to encode it. Connect the VAE, also where the known frames are a LATENT.")
    height, width = (side * LATENT_PIXELS for side in like.shape[2:])
    grey = check_frames(vae.encode(torch.full((1, height, width, 3), 0.5)), "Frames of this VAE")
    if grey.shape[1:] != like.shape[1:]:
        raise VideoLDMError(f"The connected VAE makes latents of {' x '.join(map(str, grey.shape[1:]))} (channels, "
                            f"height, width) where this MODEL takes {' x '.join(map(str, like.shape[1:]))}. Connect "
                            "the VAE that belongs to this MODEL.")
    return grey[0]


def with_context_frames(model: Model, latents: Tensor, positions: Iterable[int], guidance: float = 1.0,
                        grey: Tensor | None = None) -> Model:
    """A clone that samples clips with these context frames.

    Args:
        model: the MODEL.
        latents: the context frames `(k n) c h w`, for k clips or for all. Pictures `(k n) 3 h w` for a SparseCtrl that
            sees pictures.
        positions: n frame numbers, from the clip's end if negative. None at all: a network that sees mid-grey in
            unknown frames then sees nothing else.
        guidance: the scale of context guidance; 1 is off.
        grey: as `encoded_grey` gives it.
    """
    positions = tuple(positions)
    refuse_interpolation_network(model)
    check_frames(latents, "The context frames")
    if len(latents) % len(positions) if positions else len(latents):
        raise VideoLDMError(f"{len(latents)} context frames were given for {len(positions)} positions. Give one frame "
                            "for each position.")
    check_trained(model, positions)
    sparse = sparse_settings(model)
    if sparse is not None:
        refuse_two_ways(model, sparse.name)
        m = with_known(model, latents, positions, sample_anew, per_latent=sparse.per_latent)
    elif not takes_context(model):
        return with_known(model, latents, positions, sample_with_noise_mask)
    else:
        sample = sample_with_context if way_of_picture(model) is None else sample_with_picture
        m = with_known(model, latents, positions, sample, grey)
    if guidance != 1:
        check_guidance(model)
        m.add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, KEY, ContextGuidance(guidance))
    return m


def with_key_frames(model: Model, keys: Tensor) -> Model:
    """A clone that makes all frames of an interpolated clip anew. keys: its key frames `t c h w`."""
    return with_known(model, keys, range(0, interpolated_length(len(keys)), PER_KEY), sample_anew)


def with_known(model: Model, latents: Tensor, positions: Iterable[int], sample: Callable,
               grey: Tensor | None = None, per_latent: int = 1) -> Model:
    """A clone with these known frames. sample: the wrapper around its sampling. Others: as in with_context_frames.

    per_latent: as in ContextFrames.
    """
    m = model.clone()
    scaled = m.model.process_latent_in
    if per_latent == 1:
        check_channels(latents, model.get_model_object("latent_format").latent_channels, "The context frames")
    set_clip_options(m, context=ContextFrames(latents, scaled(latents) if per_latent == 1 else latents,
                                              tuple(positions), grey=None if grey is None else scaled(grey[None])[0],
                                              per_latent=per_latent))
    m.remove_wrappers_with_key(WrappersMP.OUTER_SAMPLE, KEY)
    m.remove_wrappers_with_key(WrappersMP.CALC_COND_BATCH, KEY)
    m.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, sample)
    return m


def fit_to_sampling(guider: Any, noise: Tensor) -> ContextFrames:
    """The context frames with their positions in the clips of this sampling. Raises if they do not fit its clips."""
    options = guider.model_options["transformer_options"]
    clip, frames = clip_options(options), frames_per_clip(len(noise), options)
    known = clip.context
    assert known is not None        # with_context_frames sets it together with this wrapper
    pixels = LATENT_PIXELS // known.per_latent
    if tuple(known.latents.shape[2:]) != tuple(side * known.per_latent for side in noise.shape[2:]):
        given, wanted = (f"{shape[-1] * size}x{shape[-2] * size}" for shape, size in
                         ((known.latents.shape, pixels), (noise.shape, LATENT_PIXELS)))
        raise VideoLDMError(f"The context frames are {given} pixels and the clip is {wanted}. Resize one of them: "
                            "context frames have the clip's own size.")
    positions = resolve_positions(known.positions, frames)
    for layers in layer_sets_in(options).values():
        check_trained_at(layers, positions, frames)
    clips, sets = len(noise) // frames, len(known.latents) // len(positions) if positions else 1
    if sets not in (1, clips):
        raise VideoLDMError(f"Context frames were given for {sets} clips, and {clips} clips are sampled. Give one set "
                            "for all clips, or one for each.")
    # The guider's options are its own for the length of one sampling.
    known = replace(known, positions=positions, frames=frames)
    options[CLIP] = replace(clip, context=known)
    return known


def write_context(samples: Tensor, known: ContextFrames) -> Tensor:
    """A copy of frames `(b t) ...` with the context frames at their positions."""
    if not known.positions:
        return samples.clone()
    clips = samples.clone().unflatten(0, (-1, known.frames))
    given = known.latents.to(samples).unflatten(0, (-1, len(known.positions)))
    clips[:, list(known.positions)] = given.expand(len(clips), *given.shape[1:])
    return clips.flatten(0, 1)


def full_mask(noise: Tensor, mask: Tensor | None) -> Tensor:
    """A new noise mask `(b t) 1 h w`, as core would make it of a sampling's own. None: 1 everywhere."""
    if mask is None:
        return torch.ones(len(noise), 1, *noise.shape[2:], device=noise.device)
    # Newer versions pass a mask of the noise's shape. prepare_mask would take its channels for further masks.
    ready = mask.shape == noise.shape
    return (mask if ready else prepare_mask(mask, noise.shape, noise.device))[:, :1].clone()


def sample_with_context(executor: Executor, noise: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Wraps a sampling. The layers take the context frames as an input, and the result has them unchanged."""
    known = fit_to_sampling(executor.class_obj, noise)
    return write_context(executor(noise, *args, **kwargs), known)


def sample_anew(executor: Executor, noise: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Wraps a sampling that makes the known frames anew with the others: LaVie's interpolation, and SparseCtrl."""
    fit_to_sampling(executor.class_obj, noise)
    return executor(noise, *args, **kwargs)


def sample_with_picture(executor: Executor, noise: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Wraps a sampling whose layers move a given picture. They make the picture's own frame anew too."""
    check_motion(executor.class_obj.model_patcher, fit_to_sampling(executor.class_obj, noise))
    return executor(noise, *args, **kwargs)


def sample_with_noise_mask(executor: Executor, noise: Tensor, latent_image: Tensor, sampler: str, sigmas: Tensor,
                           denoise_mask: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
    """Wraps a sampling, for layers without such an input. The frames are the latent to start from, behind a mask."""
    known = fit_to_sampling(executor.class_obj, noise)
    mask = full_mask(noise, denoise_mask)
    mask.unflatten(0, (-1, known.frames))[:, list(known.positions)] = 0
    samples = executor(noise, write_context(latent_image, known), sampler, sigmas, mask, *args, **kwargs)
    return write_context(samples, known)


class ContextGuidance:
    """Video LDM's context guidance (docs/papers.md#prediction), together with text guidance:

    `e = e(c, neg) + s_t (e(c, pos) - e(c, neg)) + (s_c - 1)(e(c, pos) - e(0, pos))`

    The same holds for the denoised prediction, which is linear in e. The last term is added to the prediction of every
    condition, and so to the guider's result: the weights of the conditions add up to 1.
    """

    def __init__(self, scale: float) -> None:
        self.scale = scale

    def __call__(self, executor: Executor, model: Model, conds: list, x_in: Tensor, timestep: Tensor,
                 model_options: dict) -> list[Tensor]:
        predictions = executor(model, conds, x_in, timestep, model_options)
        if not conds or conds[0] is None:
            return predictions
        options = {**model_options["transformer_options"]}
        options[CLIP] = replace(clip_options(options), hide_context=True)
        hidden = [with_own_id(cond, KEY) for cond in conds[0]]
        without, = executor(model, [hidden], x_in, timestep, {**model_options, "transformer_options": options})
        term = (self.scale - 1) * (predictions[0] - without)
        return [p if cond is None else p + term for p, cond in zip(predictions, conds)]
