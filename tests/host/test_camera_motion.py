"""Camera Motion in a running ComfyUI: alone, and with what an artist combines it with."""

import pytest
import torch

from video_ldm.tests import camera_help
from video_ldm.tests.host import checkpoints
from video_ldm.tests.host.client import NodeError
from video_ldm.tests.host.graphs import FRAMES, MOTION, Graph
from video_ldm.tests.host.test_temporal_layers import PlainImages
from video_ldm.tests.small import relative_error

CAMERA, V3 = "camera_small.safetensors", "camera_v3.safetensors"


@pytest.fixture(scope="module", autouse=True)
def files(library):
    library.save_model("video_ldm", V3, checkpoints.as_type(camera_help.v3_state(), torch.float16))
    camera_help.write_for_unet(library.model_path("video_ldm", CAMERA), torch.float16)


def moved(graph, model, file=CAMERA, move="pan right", strength=1.0, **options):
    return graph.add("VideoLDMCameraMotion", model=model, file=file, move=move, amount=1.0, strength=strength,
                     **options)


def test_it_moves_the_clip_and_leaves_the_model_as_it_was_and_lora_combines_in_either_order(server, client):
    graph = Graph()
    image = graph.image_model()
    video = graph.layers(image, V3)
    steered = moved(graph, video)
    off = moved(graph, video, strength=0.0)
    before = moved(graph, graph.layers(graph.lora(image), V3))
    after = graph.lora(steered)
    written = moved(graph, video, move="roll left", poses="0: pan 0\n-1: pan 30")
    plain, seen, core, zero, first, last, own, again = server.latents(graph, [
        graph.clip(video), graph.clip(steered), graph.ksampler(steered), graph.clip(off), graph.clip(before),
        graph.clip(after), graph.clip(written), graph.clip(graph.layers(image, V3, frames_per_clip=FRAMES))])
    assert relative_error(seen, plain) > 1e-3 and torch.equal(seen, core)
    assert torch.equal(zero, plain) and torch.equal(again, plain)
    assert torch.equal(own, seen)           # the text counts, and says what the preset pan right does
    assert torch.equal(first, last) and relative_error(first, seen) > 1e-4


def test_windows_clips_of_a_batch_layer_strength_and_reuse_combine(server, client):
    graph = Graph()
    video = graph.layers(graph.image_model(), V3)
    steered = moved(graph, video)
    windows = graph.add("VideoLDMFrameWindows", model=steered, mode="windows", length=FRAMES, overlap=2,
                        schedule="static", fuse="pyramid", max_distance=8)
    weak = graph.add("VideoLDMLayerStrength", model=steered, curve="0.5", interpolation="linear")
    reused, resting = (graph.add("VideoLDMReuseLayers", model=model, steps=1, start_percent=0.0, end_percent=1.0)
                       for model in (steered, video))
    plain, alone, long, two, half, kept, rest = server.latents(graph, [
        graph.clip(video), graph.clip(steered), graph.clip(windows, frames=6), graph.clip(steered, clips=2),
        graph.clip(weak), graph.clip(reused), graph.clip(resting)])
    assert len(long) == 6 and torch.isfinite(long).all()
    assert len(two) == 2 * FRAMES and relative_error(two[:FRAMES], alone) < 1e-3
    assert relative_error(half, alone) > 1e-4 and relative_error(half, plain) > 1e-4
    assert relative_error(kept, rest) > 1e-3


def test_the_image_model_is_the_same_after_a_clip_with_it_and_after_a_cancelled_one(server, client):
    images = PlainImages(server)
    before = images.sample()

    def clip(**changes):
        graph = Graph()
        return graph, graph.clip(moved(graph, graph.layers(graph.image_model(), V3)), **changes)[0]
    assert relative_error(server.latent(*clip()), before) > 1e-3
    assert torch.equal(images.sample(), before)
    assert server.cancelled(*clip(steps=500))[-1] < 400
    assert torch.equal(images.sample(), before)


@pytest.mark.parametrize("wrong, words", [
    (lambda graph, video: moved(graph, video, V3), f"{V3} is an AnimateDiff v3 motion module, not a CameraCtrl file"),
    (lambda graph, video: moved(graph, graph.image_model()), "has no temporal layers"),
    (lambda graph, video: moved(graph, graph.layers(graph.image_model(), MOTION)),
     f"{CAMERA} steers AnimateDiff v3's motion modules, and the connected MODEL has {MOTION}"),
    (lambda graph, video: moved(graph, video, poses="0: fly 3"), "has 'fly 3' where a move is due"),
    (lambda graph, video: graph.layers(graph.image_model(), CAMERA), "Load it with Camera Motion."),
])
def test_what_would_go_wrong_is_refused_where_it_is_chosen(server, client, wrong, words):
    graph = Graph()
    node = wrong(graph, graph.layers(graph.image_model(), V3))
    with pytest.raises(NodeError, match=words):
        server.latent(graph, graph.clip(node)[0])
