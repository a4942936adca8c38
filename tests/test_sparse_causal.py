"""Self-attention to the first and the previous frame, and what other nodes do to it.

See docs/papers.md#lavie-interpolation. tests/test_lavie.py compares its numbers.
"""

import pytest
import torch
from comfy.ldm.modules.attention import optimized_attention

from video_ldm.temporal.errors import VideoLDMError
from video_ldm.tests.attach_help import prediction
from video_ldm.tests.network_help import network_clips, network_model, network_tensors, predicted
from video_ldm.tests.small import relative_error

KIND = "lavie_interpolation"


@pytest.fixture(scope="module")
def weights():
    return network_tensors(KIND, 7)


@pytest.fixture(scope="module")
def model(weights, tmp_path_factory):
    return network_model(tmp_path_factory.mktemp("lavie"), KIND, weights)


def replaced_everywhere(function):
    """transformer_options with the function in the place of every spatial self-attention."""
    places = {(part, number): function for part, numbers in
              (("input", range(12)), ("middle", range(1)), ("output", range(12))) for number in numbers}
    return {"patches_replace": {"attn1": places}}


def test_a_node_that_replaces_the_attention_gets_the_keys_of_the_first_and_the_previous_frame(model):
    clips, seen = network_clips(KIND, 1, 3), []

    def attend(q, k, v, extra):
        seen.append((q.shape, k.shape, v.shape))
        return optimized_attention(q, k, v, extra["n_heads"])
    assert relative_error(predicted(model, clips, **replaced_everywhere(attend)), predicted(model, clips)) < 1e-5
    assert len(seen) == 16 and all(k == v == (q[0], 2 * q[1], q[2]) for q, k, v in seen)


def test_a_node_that_changes_keys_and_values_changes_those_of_the_other_frames(model, tmp_path, weights):
    """A hypernetwork does this: here the values are halved."""
    clips = network_clips(KIND, 1, 3)
    halved = {key: value / 2 if key.endswith("attn1.to_v.weight") else value
              for key, value in weights.items()}
    patch = {"patches": {"attn1_patch": [lambda q, k, v, extra: (q, k, v / 2)]}}
    found = predicted(model, clips, **patch)
    assert relative_error(found, predicted(network_model(tmp_path, KIND, halved), clips)) < 1e-5


def test_a_node_that_changes_the_number_of_queries_is_taken(model):
    """Token merging does this, and puts the tokens back behind the attention. Here there are twice as many."""
    clips = network_clips(KIND, 1, 3)
    twice = {"attn1_patch": [lambda q, k, v, extra: (torch.cat([q, q], dim=1), k, v)],
             "attn1_output_patch": [lambda out, extra: out.chunk(2, dim=1)[1]]}
    assert relative_error(predicted(model, clips, patches=twice), predicted(model, clips)) < 1e-5


def test_cores_token_merging_runs_and_cores_hypertile_is_refused(model):
    from comfy_extras.nodes_hypertile import HyperTile
    from comfy_extras.nodes_tomesd import TomePatchModel
    clips = network_clips(KIND, 1, 3)
    merged, = TomePatchModel.execute(model, 0.3).result
    assert 1e-4 < relative_error(predicted(merged, clips), predicted(model, clips)) < 1
    tiled = HyperTile.execute(model, 32, 1, 0, False)
    tiled = getattr(tiled, "result", tiled)[0]      # versions of ComfyUI differ
    with pytest.raises(VideoLDMError, match="cuts or joins the frames for the spatial self-attention .HyperTile does"):
        predicted(tiled, clips)


@pytest.mark.parametrize("options, words", [
    (replaced_everywhere(lambda q, k, v, extra: v), "puts each frame's own keys or values in the place of the spatial "
     "self-attention .Perturbed-Attention Guidance does"),
    ({"patches": {"attn1_patch": [lambda q, k, v, extra: (q.reshape(2 * len(q), -1, q.shape[2]), k, v)]}},
     "cuts or joins the frames for the spatial self-attention .HyperTile does"),
    ({"patches": {"attn1_patch": [lambda *args: tuple(part.flatten(0, 1)[None] for part in args[:3])]}},
     "cuts or joins the frames for the spatial self-attention"),
])
def test_a_node_that_takes_the_keys_for_those_of_the_frame_itself_is_refused(model, options, words):
    with pytest.raises(VideoLDMError, match=words):
        predicted(model, network_clips(KIND, 1, 3), **options)


def test_self_attention_guidance_is_refused_when_sampling_starts(model, tmp_path):
    from comfy_extras.nodes_sag import SelfAttentionGuidance
    with pytest.raises(VideoLDMError, match="The node SelfAttentionGuidance reads the spatial self-attention"):
        prediction(SelfAttentionGuidance.execute(model, 0.5, 2.0).result[0])
    base = network_model(tmp_path, "lavie_base", network_tensors("lavie_base", 7))
    assert prediction(SelfAttentionGuidance.execute(base, 0.5, 2.0).result[0]).isfinite().all()
