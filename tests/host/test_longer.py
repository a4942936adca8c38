"""Context Frames, Extend Video and Latent Interpolate x4 in a real server."""

import pytest
import torch

from video_ldm.tests.host.client import NodeError
from video_ldm.tests.host.graphs import BETWEEN, MOTION, NEGATIVE, POSITIVE, PREDICTION, VIDEO, Graph

FRAMES = 4


def latents(count, seed=3):
    return torch.randn(count, 4, 2, 3, generator=torch.Generator().manual_seed(seed))


class Longer(Graph):
    def start(self, server, frames, name="longer.latent"):
        return self.add("LoadLatent", latent=server.put_input_latent(name, frames))

    def context(self, model, latent, frames="0", guidance=1.0):
        return self.add("VideoLDMContextFrames", model=model, frames=frames, guidance=guidance, latent=latent)

    def extend(self, model, latent, length=8, **changes):
        widgets = dict(frames=FRAMES, width=24, height=16, seed=7, steps=2, cfg=2.0, sampler="euler",
                       scheduler="normal", length=length, context_guidance=1.0, overlap=2, on_cancel="stop")
        return self.add("VideoLDMExtend", model=model, positive=self.text(POSITIVE), negative=self.text(NEGATIVE),
                        latent=latent, **{**widgets, **changes})

    def interpolate(self, model, latent, **changes):
        widgets = dict(seed=7, steps=2, times=1, cfg=1.0, sampler="euler", scheduler="ddim_uniform", fps=2.0, windows=0)
        return self.add("VideoLDMInterpolate", model=model, positive=self.text(POSITIVE), negative=self.text(NEGATIVE),
                        latent=latent, **{**widgets, **changes})


@pytest.mark.parametrize("file", [PREDICTION, MOTION])
def test_ksampler_goes_on_from_a_context_frame(server, library, file):
    graph, known = Longer(), latents(1)
    model = graph.context(graph.layers(graph.image_model(), file), graph.start(server, known), guidance=2.0)
    frames = server.latent(graph, graph.ksampler(model, frames=FRAMES)[0])
    assert torch.equal(frames[:1], known) and frames.shape == (FRAMES, 4, 2, 3) and frames[1:].isfinite().all()


@pytest.mark.parametrize("file", [PREDICTION, MOTION])
def test_a_video_is_extended_and_the_plain_model_stays_as_it_was(server, library, file):
    plain = Longer()
    plain_node = plain.ksampler(plain.image_model(), frames=2)[0]
    before = server.latent(plain, plain_node)
    graph, known = Longer(), latents(1)
    video = graph.extend(graph.layers(graph.image_model(), file), graph.start(server, known), length=9)
    frames = server.latent(graph, video[0])
    assert frames.shape == (9, 4, 2, 3) and torch.equal(frames[:1], known)
    changed = {**plain, plain_node: {**plain[plain_node], "inputs": {**plain[plain_node]["inputs"], "seed": 8}}}
    server.latent(changed, plain_node)                  # another run between, so that nothing comes from a cache
    assert torch.equal(server.latent(plain, plain_node), before)


def test_interpolation_keeps_key_frames_and_passes_the_frame_rate_on(server, library):
    graph, keys = Longer(), latents(3)
    between = graph.layers(graph.image_model(), BETWEEN)
    frames = server.latent(graph, graph.interpolate(between, graph.start(server, keys), times=2)[0])
    assert frames.shape == (33, 4, 2, 3) and torch.equal(frames[::16], keys)


@pytest.mark.slow
def test_after_a_cancelled_video_the_same_graph_makes_the_whole_video(server, library):
    graph = Longer()
    layers = graph.layers(graph.image_model(), PREDICTION)
    video = graph.extend(layers, graph.start(server, latents(1)), length=10, on_cancel="keep finished clips", steps=8)
    told, pressed = [], []

    def cancel(kind, data):
        if kind == "executed" and data["node"] == video[0]:
            told.append(data["output"]["text"][0])
        if kind == "progress" and data["node"] == video[0] and data["value"] > 9 and not pressed:
            pressed.append(data["value"])           # in the second clip
            server.client.interrupt()
    short = server.latent(graph, video[0], on_event=cancel)
    assert pressed and 4 <= len(short) < 10
    assert [text.splitlines()[0] for text in told] == [
        f"Warning: Cancelled: {len(short)} of 10 frames are finished and kept, and the video is short. Queue it again "
        "for all frames."]
    whole = server.latent(graph, video[0])
    assert len(whole) == 10 and torch.equal(whole[:len(short)], short)


@pytest.mark.parametrize("build, sentence", [
    (lambda g, s: g.context(g.layers(g.image_model(), PREDICTION), g.start(s, latents(1)), "2"),
     "were trained for the context"),
    (lambda g, s: g.context(g.image_model(), g.start(s, latents(1))), "has no temporal layers"),
    (lambda g, s: g.extend(g.layers(g.image_model(), BETWEEN), g.start(s, latents(1))),
     "were trained for the context frames"),
    (lambda g, s: g.extend(g.layers(g.image_model(), PREDICTION), g.start(s, latents(9)), length=8),
     "Set a length above 9"),
    (lambda g, s: g.interpolate(g.layers(g.image_model(), VIDEO), g.start(s, latents(3))), "make key frames"),
    (lambda g, s: g.interpolate(g.layers(g.image_model(), BETWEEN), g.start(s, latents(1))), "There is one key frame"),
    (lambda g, s: g.clip(g.layers(g.image_model(), BETWEEN), frames=5), "make the frames between context frames")])
def test_what_cannot_work_is_refused_with_a_sentence_at_the_node(server, library, build, sentence):
    graph = Longer()
    node = build(graph, server)[0]
    if graph[node]["class_type"] == "VideoLDMContextFrames":
        node = graph.ksampler([node, 0], frames=FRAMES)[0]
    with pytest.raises(NodeError, match=sentence):
        server.latent(graph, node)
