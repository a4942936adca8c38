"""Layer Strength in a running ComfyUI: a curve and a mask between Load Temporal Layers and the samplers."""

import pytest
import torch

from video_ldm.tests.host.client import NodeError
from video_ldm.tests.host.graphs import FRAMES, HEIGHT, MOTION, VIDEO, WIDTH, Graph, out
from video_ldm.tests.small import relative_error

pytestmark = pytest.mark.usefixtures("library")
LONG = 6                # frames: two windows of 4 that share 2
STILL, MOVING = [0, 3, 4], [1, 2, 5]
CURVE = "0: 0, 1: 1, 3: 0, 5: 1"


def strengths(graph, model, curve, interpolation="hold", **optional):
    return graph.add("VideoLDMLayerStrength", model=model, curve=curve, interpolation=interpolation, **optional)


def windows(graph, model):
    return graph.add("VideoLDMFrameWindows", model=model, mode="windows", length=FRAMES, overlap=2, schedule="static",
                     fuse="pyramid", max_distance=8)


@pytest.mark.parametrize("file", [VIDEO, MOTION])
def test_frames_of_strength_0_stay_those_of_the_image_model_under_all_samplers_and_in_windows(server, client, file):
    graph = Graph()
    model = graph.image_model()
    image, video = graph.layers(model, file, 0.0), graph.layers(model, file)
    weak = strengths(graph, video, CURVE)
    ours, core, alone, plain, parts, parts_alone = server.latents(graph, [
        graph.clip(weak, frames=LONG), graph.ksampler(weak, frames=LONG), graph.clip(image, frames=LONG),
        graph.clip(video, frames=LONG), graph.clip(windows(graph, weak), frames=LONG),
        graph.clip(windows(graph, image), frames=LONG)])
    assert torch.equal(ours, core)
    assert torch.equal(ours[STILL], alone[STILL]) and torch.equal(parts[STILL], parts_alone[STILL])
    for seen in (ours, parts):
        assert all(relative_error(seen[n], alone[n]) > 1e-4 for n in MOVING)
    assert all(relative_error(ours[n], plain[n]) > 1e-4 for n in range(LONG))


def test_a_mask_of_core_acts_in_its_region_and_white_changes_nothing(server, client):
    graph = Graph()
    video = graph.layers(graph.image_model())
    masks = [graph.add("SolidMask", value=value, width=WIDTH, height=HEIGHT) for value in (1.0, 0.5)]
    left = graph.add("SolidMask", value=1.0, width=WIDTH // 3, height=HEIGHT)
    part = graph.add("MaskComposite", destination=graph.add("SolidMask", value=0.0, width=WIDTH, height=HEIGHT),
                     source=left, x=0, y=0, operation="add")
    white, grey, region, half, plain = server.latents(graph, [
        graph.clip(model) for model in (*(strengths(graph, video, "", mask=mask) for mask in [*masks, part]),
                                        strengths(graph, video, "0.5"), video)])
    assert torch.equal(white, plain) and torch.equal(grey, half)
    assert all(relative_error(region, other) > 1e-4 for other in (plain, half))


def test_the_report_says_the_strengths(server, client):
    graph = Graph()
    node = strengths(graph, graph.layers(graph.image_model()), "0: 0.2, 15: 1", "linear")
    shown = graph.add("PreviewAny", source=out(node, 1))
    report = client.run(graph).outputs[shown[0]]["text"][0]
    assert "0.2 at frame 0, rising to 1 at frame 15" in report and "strength 1 of video.safetensors" in report


@pytest.mark.parametrize("curve, bare, words", [
    ("0: 0, 8: fast", False, "'8:fast' in the curve is no strength"), ("", False, "an empty curve and no mask"),
    ("0 1", True, "has no temporal layers")])
def test_bad_input_is_refused_at_the_node_in_one_sentence(server, client, curve, bare, words):
    graph = Graph()
    model = graph.image_model()
    node = strengths(graph, model if bare else graph.layers(model), curve)
    with pytest.raises(NodeError, match=words) as caught:
        server.latent(graph, graph.clip(node)[0])
    assert (caught.value.node_id, caught.value.exception_type) == (node[0], "Video LDM")


def test_masks_that_do_not_fit_the_clip_are_refused_at_the_sampler(server, client):
    graph = Graph()
    node = strengths(graph, graph.layers(graph.image_model()), "1",
                     mask=graph.add("SolidMask", value=1.0, width=64, height=64))
    clip = graph.clip(node)
    with pytest.raises(NodeError, match="is 64x64 pixels, and the frames have other proportions") as caught:
        server.latent(graph, clip[0])
    assert (caught.value.node_id, caught.value.exception_type) == (clip[0], "Video LDM")
