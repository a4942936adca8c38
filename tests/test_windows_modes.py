"""Beside the windows of Frame Windows: core's own node for them, convolution in time, and what is refused."""

import pytest
import torch
from comfy.ldm.modules import attention

from video_ldm.nodes.host import compat, layer_weights
from video_ldm.nodes.host.options import with_clip_options
from video_ldm.nodes.load import AS_MODEL, LoadTemporalLayers
from video_ldm.nodes.windows import CONVOLUTION
from video_ldm.temporal.errors import VideoLDMError
from video_ldm.temporal.layers import attend
from video_ldm.temporal.layers.position import distance_band
from video_ldm.tests import windows_help
from video_ldm.tests.small import relative_error
from video_ldm.tests.windows_help import (
    BOTH,
    LENGTH,
    LONG,
    OVERLAP,
    by_hand,
    noise_of,
    notes,
    pictures,
    prediction,
    steered,
    text,
    windowed,
)

models, controlnets = windows_help.models, windows_help.controlnets     # fixtures


# Core's own node

def core_windows(model, **more):
    """`more`: of newer hosts, which put the frame before a window in front of it where `causal_window_fix` is on."""
    from comfy_extras.nodes_context_windows import ContextWindowsManualNode
    more = {"freenoise": False, "causal_window_fix": False, **more} if compat.SLICING_WINDOWS else {}
    return ContextWindowsManualNode.execute(model, LENGTH, OVERLAP, "standard_static", 1, False, "pyramid", 0,
                                            **more).result[0]


def test_cores_own_windows_are_right_or_refused(models, controlnets):
    model = core_windows(models["video"])
    assert torch.equal(prediction(model, noise_of(LENGTH)), prediction(models["video"], noise_of(LENGTH)))     # at rest
    if compat.SLICING_WINDOWS:
        per_frame = {"positive": text(frames=LONG), "cfg": 2.0}
        assert relative_error(prediction(model, **per_frame), prediction(windowed(models["video"]), **per_frame)) < 1e-5
        prefixed = by_hand(lambda noise, places: prediction(models["video"], noise) if places.start == 0 else
                           prediction(models["video"], noise_of()[places.start - 1:places.stop])[1:])
        assert relative_error(prediction(core_windows(models["video"], causal_window_fix=True)), prefixed) < 1e-5
        with pytest.raises(VideoLDMError, match="first pictures of a ControlNet to every window. Use Frame Windows"):
            prediction(model, positive=steered(controlnets, [pictures()], 11)[0])
        with pytest.raises(VideoLDMError, match="know nothing of clips. Use Frame Windows"):
            prediction(with_clip_options(model, LONG), noise_of(2 * LONG))
    else:
        with pytest.raises(VideoLDMError, match="dim 0. fail in this version of ComfyUI. Use Frame Windows"):
            prediction(model)
    again = windowed(core_windows(models["video"]))
    assert torch.equal(prediction(again), prediction(windowed(models["video"])))


def test_cores_own_windows_are_refused_whichever_node_comes_first(models):
    late = LoadTemporalLayers.execute(core_windows(models["image"]), "video.safetensors", 1.0, AS_MODEL).result[0]
    with pytest.raises(VideoLDMError, match="Use Frame Windows"):
        prediction(with_clip_options(late, LONG))


# Convolution in time

@BOTH
def test_convolution_in_time_changes_nothing_up_to_its_reach_and_narrows_attention_beyond(models, file):
    model = windowed(models[file], CONVOLUTION, max_distance=4)
    assert torch.equal(prediction(model, noise_of(5)), prediction(models[file], noise_of(5)))
    wide, narrow = prediction(models[file]), prediction(model)
    assert relative_error(narrow, wide) > 1e-4
    assert torch.equal(prediction(windowed(models[file], CONVOLUTION, max_distance=5)), wide)


def test_convolution_in_time_runs_all_frames_in_one_call_and_takes_the_place_of_windows(models):
    model, sizes = notes(windowed(windowed(models["video"]), CONVOLUTION), lambda x, options: len(x))
    prediction(model, noise_of(12))
    assert sizes == [12]
    back = windowed(windowed(models["video"], CONVOLUTION, max_distance=1))
    assert torch.equal(prediction(back), prediction(windowed(models["video"])))


@pytest.mark.parametrize("name", ["attention_basic", "attention_split", "attention_sub_quad", "attention_pytorch"])
def test_every_attention_of_the_host_takes_the_band_as_it_is_given(name):
    q, k, v = torch.randn(3, 2, 12, 64, generator=torch.Generator().manual_seed(0))
    band = distance_band(12, 3)
    seen = getattr(attention, name)(q, k, v, 4, mask=layer_weights.as_numbers(band, q.dtype))
    assert relative_error(seen, attend(q, k, v, 4, band)) < 1e-5 < relative_error(seen, attend(q, k, v, 4))


# Refusals

@pytest.mark.parametrize("name, options, sentence", [
    ("image", {}, "has no temporal layers, so there are no clips"),
    ("image", {"mode": CONVOLUTION}, "has no temporal layers, so there are no clips"),
    ("video", {"overlap": 4}, "Windows of 4 frames cannot overlap by 4. Set overlap below 4"),
    ("vector", {"length": 6}, "so they take clips of exactly 4 frames, and a window has 6. Set length to 4"),
    ("vector", {"mode": CONVOLUTION}, "of 4 frames, so they cannot be convolved in time. Choose the mode windows"),
    ("learned", {"length": 33}, "they take clips of up to 32 frames, and a window has 33. Set length to 32 or fewer")])
def test_what_cannot_be_sampled_in_pieces_is_refused_with_a_sentence(models, name, options, sentence):
    with pytest.raises(VideoLDMError, match=sentence):
        windowed(models[name], **options)
