"""SparseCtrl in a running ComfyUI: from a picture's latents and from a sketch, with what an artist combines it with."""

import pytest
import torch

from video_ldm.tests import sparse_help
from video_ldm.tests.host.client import NodeError
from video_ldm.tests.host.graphs import CONTROLNET, HEIGHT, MOTION, WIDTH, Graph
from video_ldm.tests.small import relative_error

RGB, SCRIBBLE = "sparse_rgb.safetensors", "sparse_scribble.safetensors"
LATENT, SKETCH = "sparse_known.latent", "sparse_sketch.png"


@pytest.fixture(scope="module", autouse=True)
def files(library):
    for name, kind in ((RGB, "rgb"), (SCRIBBLE, "scribble")):
        sparse_help.write_for_unet(library.model_path("controlnet", name), kind, torch.float16, gain=0.3)
    generator = torch.Generator().manual_seed(4)
    library.put_input_latent(LATENT, torch.randn(1, 4, HEIGHT // 8, WIDTH // 8, generator=generator))
    library.put_input_image(SKETCH, torch.rand(HEIGHT, WIDTH, 3, generator=generator))


def sparse(graph, model, file=RGB, strength=1.0, **options):
    return graph.add("VideoLDMLoadSparseCtrl", model=model, file=file, strength=strength, **options)


def known(graph, model, frames="0", **sources):
    sources = sources or {"latent": graph.add("LoadLatent", latent=LATENT)}
    return graph.add("VideoLDMContextFrames", model=model, frames=frames, guidance=1.0, **sources)


def test_it_steers_the_clip_of_every_sampler_and_of_strength_0_it_does_nothing(server, client):
    graph = Graph()
    video = graph.layers(graph.image_model(), MOTION)
    steered = known(graph, sparse(graph, video))
    off = known(graph, sparse(graph, video, strength=0.0))
    plain, seen, core, zero = server.latents(graph, [
        graph.clip(video), graph.clip(steered), graph.ksampler(steered), graph.clip(off)])
    assert relative_error(seen, plain) > 1e-3 and torch.equal(seen, core) and torch.equal(zero, plain)


def test_sketches_steer_the_clip(server, client):
    graph = Graph()
    video = graph.layers(graph.image_model(), MOTION)
    picture = graph.add("LoadImage", image=SKETCH)
    sketched = known(graph, sparse(graph, video, SCRIBBLE), "1", image=picture)
    plain, sketch = server.latents(graph, [graph.clip(video), graph.clip(sketched)])
    assert relative_error(sketch, plain) > 1e-4


@pytest.mark.parametrize("wrong, words", [
    (lambda graph, video: sparse(graph, video, CONTROLNET), f"{CONTROLNET} is a ControlNet, not a SparseCtrl file"),
    (lambda graph, video: sparse(graph, graph.image_model()), "has no temporal layers"),
    (lambda graph, video: graph.clip(sparse(graph, video)), f"{RGB} on this MODEL is to see known frames, and none"),
])
def test_what_would_go_wrong_is_refused_where_it_is_chosen(server, client, wrong, words):
    graph = Graph()
    node = wrong(graph, graph.layers(graph.image_model(), MOTION))
    target = node if graph[node[0]]["class_type"] == "VideoLDMSampler" else graph.clip(known(graph, node))
    with pytest.raises(NodeError, match=words):
        server.latent(graph, target[0])
