"""Scene Layout in a running ComfyUI, on core's KSampler."""

import pytest
import torch

from video_ldm.temporal.formats import scene_layout_file as layout_format
from video_ldm.temporal.formats.temporal_file import Base
from video_ldm.temporal.scene_layout import LayoutParams, SceneLayout
from video_ldm.tests.host.client import NodeError
from video_ldm.tests.host.graphs import LORA, POSITIVE, Graph, out
from video_ldm.tests.small import randomise, relative_error

FILE = "scene.safetensors"
PARAMS = LayoutParams(colours=("red", "blue"), labels=(("light", ("day", "night")),
                                                       ("crowdedness", ("empty", "quiet", "busy"))),
                      width=16, heads=2, layers=1, frequencies=3, sites=((0, 320),))


@pytest.fixture(scope="module", autouse=True)
def scene_file(library):
    layout_format.write(library.model_path("video_ldm", FILE), randomise(SceneLayout(PARAMS), 5).half().state_dict(),
                        PARAMS, torch.randn(7, 768), base=Base("Stable Diffusion 1.x", 768), licence="Apache-2.0")


def scene(graph, **changes):
    """The node, with texts unless told otherwise."""
    widgets = dict(file=FILE, boxes="0.5 0.4 0.2 0.3 red", light="day", crowdedness="any", width=24, height=16)
    return graph.add("VideoLDMSceneLayout", **{**widgets, **changes})


def sampled(server, lora=False, **changes):
    graph = Graph()
    node = scene(graph, **changes)
    model = graph.lora(graph.image_model(), name=LORA) if lora else graph.image_model()
    return server.latent(graph, graph.ksampler(model, node, out(node, 1), frames=1)[0])


def plain(server):
    graph = Graph()
    return server.latent(graph, graph.ksampler(graph.image_model(), frames=1)[0])


def test_every_widget_changes_the_picture_and_the_plain_model_is_the_same_before_and_after(server, client):
    before = plain(server)
    pictures = [before] + [sampled(server, **changes) for changes in (
        {}, {"boxes": "0.1 0.4 0.2 0.3 red"}, {"boxes": "0.5 0.4 0.2 0.3 blue"}, {"boxes": "none"}, {"boxes": ""},
        {"light": "night"}, {"light": "any"}, {"crowdedness": "busy"}, {"lora": True})]
    assert all(relative_error(a, b) > 1e-5 for i, a in enumerate(pictures) for b in pictures[:i])
    assert torch.equal(plain(server), before)
    client.free()
    assert torch.equal(sampled(server), pictures[1])


def test_a_text_goes_with_a_layout(server, client):
    graph = Graph()
    node = scene(graph, positive=graph.text(POSITIVE))
    latent = server.latent(graph, graph.ksampler(graph.image_model(), node, out(node, 1), frames=1)[0])
    assert relative_error(latent, sampled(server)) > 1e-5


def test_bad_boxes_and_the_wrong_model_are_refused_in_one_sentence(server, client):
    with pytest.raises(NodeError, match="seems to be in pixels"):
        sampled(server, boxes="12 8 20 20 red")
    with pytest.raises(NodeError, match="colour 'pink'"):
        sampled(server, boxes="0.1 0.1 0.2 0.2 pink")
    with pytest.raises(NodeError, match="is a file of Video LDM temporal layers, not a scene layout file"):
        sampled(server, file="video.safetensors")
