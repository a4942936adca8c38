"""Refuses what other nodes put on a MODEL and what fails when a step calls the network several times.

Some nodes keep a state between the calls of the network. They expect one call in a step, with all frames.
"""

import dis
from collections.abc import Callable, Iterator

from comfy.patcher_extension import WrappersMP, get_all_wrappers, get_wrappers_with_key
from comfy.utils import get_attr

from ...temporal.errors import VideoLDMError
from ...temporal.reference_attention import KNOWN_ATTENTION
from ...temporal.spatial_changes import SPARSE_CAUSAL
from .image_model import model_title
from .options import clip_options, layer_sets_in
from .placed_frames import MASKED
from .sockets import Patcher

GUIDANCE = ("sampler_pre_cfg_function", "sampler_cfg_function", "sampler_post_cfg_function",
            "sampler_calc_cond_batch_function")      # core's keys for functions that run in a step, outside the network


def refuse_in_pieces(model_options: dict, node: str) -> None:
    """Refuse nodes that would give a wrong result while `node` of this pack samples a video in pieces."""
    if get_wrappers_with_key(WrappersMP.DIFFUSION_MODEL, "easycache", model_options, is_model_options=True):
        raise VideoLDMError(f"EasyCache keeps one state for all the pieces in which {node} samples a video, so it "
                            "would add the changes of one piece to the frames of another. Use LazyCache instead: it "
                            "works on all frames at once.")
    recorder = recording_node(model_options)
    if recorder is not None:
        raise VideoLDMError(f"The node {recorder} keeps what the model did in its last call, and {node} samples a "
                            f"video in several calls. Remove {recorder}, or sample all frames in one call.")


def recording_node(model_options: dict) -> str | None:
    """The name of a node that keeps something from one call of the network for the next. None if there is none.

    Two patterns are found. A guidance function reads a variable that the node's patch inside the network writes:
    Self-Attention Guidance keeps the attention of a block this way. Or a wrapper around the network writes a variable
    of its own: caches do.
    """
    inside = recorder_inside(model_options)
    if inside is not None:
        return inside
    for function in wrappers_in(model_options):
        if written_by(function):
            return function.__qualname__.split(".")[0]
    return None


def recorder_inside(model_options: dict) -> str | None:
    """The name of a node whose guidance reads what its patch inside the network wrote. None if there is none."""
    written = [cell for patch in patches_in(model_options.get("transformer_options", {}))
               for cell in written_by(patch)]
    for function in guidance_in(model_options):
        if any(cell is other for cell in variables(function).values() for other in written):
            return function.__qualname__.split(".")[0]
    return None


def refuse_readers_of_attention(model_options: dict) -> None:
    """Refuse nodes that take the keys of a spatial self-attention for those of its frame, where they are others'."""
    options = model_options.get("transformer_options", {})
    sets = layer_sets_in(options).values()
    recorder = recorder_inside(model_options)
    if recorder is not None and any(SPARSE_CAUSAL in layers.params.spatial for layers in sets):
        raise VideoLDMError(f"The node {recorder} reads the spatial self-attention of a step as that of each frame to "
                            "itself, and this network's frames see the first and the previous frame instead. Remove "
                            f"{recorder}.")
    known = clip_options(options).context is not None
    if recorder is not None and known and any(KNOWN_ATTENTION in layers.params.spatial for layers in sets):
        raise VideoLDMError(f"The node {recorder} reads the spatial self-attention of a step as that of each frame to "
                            "itself, and with these temporal layers every frame sees the known frames too. Remove "
                            f"{recorder}, or Context Frames.")


FIRST_CONVOLUTION = "input_blocks.0.0.weight"


def refuse_merged_in_part(model: Patcher) -> None:
    """Refuse a merge with a MODEL of other sizes. Core scales such a weight down and adds nothing.

    The first convolution of an inpainting model is not refused where core leaves it as it is. Adding the difference of
    two models to it is how inpainting checkpoints are made.
    """
    for key, patches in model.patches.items():
        for strength, value, strength_model, *_ in patches:
            if not isinstance(value, list) or (strength, strength_model) == (0, 1):
                continue        # no merge, or one that leaves this weight as it is
            own, other = (tuple(tensor.shape) for tensor in (get_attr(model.model, key), value[0][0]))
            if own != other:
                name = key.removeprefix("diffusion_model.")
                if name == FIRST_CONVOLUTION and strength_model == 1 and own[1] == MASKED:
                    continue
                raise VideoLDMError(f"A node merges this MODEL ({model_title(model)}) with one of another kind: "
                                    f"{name} is {list(own)} in this one and {list(other)} in that one. Merge it with a "
                                    f"MODEL of its own kind. If no other weight differs, ModelMergeSD1 leaves this "
                                    f"one as it is where {'.'.join(name.split('.')[:2])}. is 1.")


def patches_in(options: dict) -> Iterator[Callable]:
    """The functions that nodes have put inside the network."""
    for patches in options.get("patches", {}).values():
        yield from patches
    for patches in options.get("patches_replace", {}).values():
        yield from patches.values()


def guidance_in(model_options: dict) -> Iterator[Callable]:
    for key in GUIDANCE:
        functions = model_options.get(key) or []
        yield from functions if isinstance(functions, list) else [functions]


def wrappers_in(model_options: dict) -> Iterator[Callable]:
    """The functions that nodes have put around the network."""
    if "model_function_wrapper" in model_options:
        yield model_options["model_function_wrapper"]
    for kind in (WrappersMP.APPLY_MODEL, WrappersMP.DIFFUSION_MODEL):
        yield from get_all_wrappers(kind, model_options, is_model_options=True)


def variables(function: Callable) -> dict[str, object]:
    """{name: cell} of a function's closure."""
    function = getattr(function, "__func__", function)
    names = getattr(getattr(function, "__code__", None), "co_freevars", ())
    return dict(zip(names, getattr(function, "__closure__", None) or ()))


def written_by(function: Callable) -> list:
    """The cells of its closure that a function writes."""
    shared = variables(function)
    steps = dis.get_instructions(function) if shared else ()
    return [shared[step.argval] for step in steps if step.opname == "STORE_DEREF" and step.argval in shared]
