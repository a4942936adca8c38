"""What nodes tell the artist on the page, in a running ComfyUI."""

import pytest

from video_ldm.tests.host.graphs import FRAMES, VIDEO, Graph

pytestmark = pytest.mark.usefixtures("library")

EVENT = "video_ldm.note"
LONGER = FRAMES + 1


def run(server, frames=LONGER, sampler="ksampler"):
    """(texts that came as events, texts that came with outputs), each by node; and the graph's nodes."""
    graph = Graph()
    model = graph.layers(graph.image_model())
    latent = graph.ksampler(model, frames=frames) if sampler == "ksampler" else graph.clip(model, frames=frames)
    graph.add("SaveLatent", samples=latent, filename_prefix="notes")
    events, outputs = {}, {}

    def note(kind, data):
        if kind == EVENT:
            events[data["node"]] = data["text"]
        elif kind == "executed" and "text" in (data["output"] or {}):
            outputs[data["node"]] = "\n".join(data["output"]["text"])
    server.client.run(graph, note)
    return events, outputs, model[0], latent[0]


def test_cores_ksampler_is_told_of_a_clip_longer_than_trained_and_the_loader_shows_its_report(server):
    warning = (f"Warning: {LONGER} frames are sampled together, and {VIDEO} was trained on clips of {FRAMES}: motion "
               f"may be worse. Set frames to {FRAMES}, or connect Frame Windows behind Load Temporal Layers.")
    events, outputs, loader, sampler = run(server)
    assert events == {sampler: warning} and list(outputs) == [loader]
    assert f"Trained on clips of {FRAMES} frames" in outputs[loader]
    assert run(server, FRAMES)[0] == {}


def test_a_warning_of_our_sampler_comes_at_once_and_with_its_output(server):
    events, outputs, _, sampler = run(server, sampler="ours")
    assert list(events) == [sampler] and outputs[sampler] == events[sampler]
    assert run(server, sampler="ours")[:2] == ({}, {})         # it does not run again, and the page keeps its text
