"""Prompt Travel in a running ComfyUI, with the bundled demo's CLIP."""

import pytest
import torch

from video_ldm.tests.host.client import NodeError
from video_ldm.tests.host.graphs import Graph, out
from video_ldm.tests.small import relative_error

DAY, NIGHT = "a quiet road by day", "a busy road at night"
LAYERS = "video_ldm_driving.safetensors"
SIZE = dict(width=32, height=32)
FRAMES = 6


class DemoGraph(Graph):
    """A graph of the bundled demo's models."""

    def __init__(self):
        super().__init__()
        self.demo = self.add("VideoLDMLoadDemo")
        self.nothing = self.encoded("")

    def encoded(self, prompt):
        return self.add("CLIPTextEncode", clip=out(self.demo, 1), text=prompt)

    def travel(self, lines, frames=FRAMES, mode="linear", before="", after=""):
        return self.add("VideoLDMPromptTravel", clip=out(self.demo, 1), lines=lines, frames=frames, mode=mode,
                        before=before, after=after)

    def model(self, strength=0.0):
        """At strength 0 every frame is an image by itself, and shows its own text alone."""
        return self.layers(self.demo, LAYERS, strength)

    def frames(self, positive, negative=None, model=None, frames=FRAMES, **changes):
        return self.clip(model or self.model(), positive, negative or self.nothing, frames=frames, **SIZE, **changes)


def test_frames_at_a_key_frame_are_those_of_its_prompt_alone_and_the_others_lie_between(server, client):
    graph = DemoGraph()
    travelling = graph.travel(f"0: {DAY}\n1: {DAY}\n4: {NIGHT}")
    made, day, night, held = server.latents(graph, [
        graph.frames(travelling), graph.frames(graph.encoded(DAY)), graph.frames(graph.encoded(NIGHT)),
        graph.frames(graph.travel(f"0: {DAY}\n4: {NIGHT}", mode="hold"))])
    assert torch.equal(made[:2], day[:2]) and torch.equal(made[4:], night[4:])
    assert torch.equal(held[:4], day[:4]) and torch.equal(held[4:], night[4:])
    for frame in (2, 3):
        assert all(relative_error(made[frame], other[frame]) > 1e-3 for other in (day, night))


def test_core_and_windows_and_extend_video_give_each_frame_its_text(server, client):
    """With the layers at strength 0 the windows and the samplers make the same images."""
    graph = DemoGraph()
    positive, model = graph.travel(f"0: {DAY}\n-1: {NIGHT}"), graph.model()
    windowed = graph.add("VideoLDMFrameWindows", model=model, mode="windows", length=4, overlap=2, schedule="static",
                         fuse="pyramid", max_distance=8)
    empty = graph.add("EmptyLatentImage", batch_size=FRAMES, **SIZE)
    ours, core, windows, twice, first = server.latents(graph, [
        graph.frames(positive), graph.ksampler(model, positive, graph.nothing, empty),
        graph.frames(positive, model=windowed), graph.frames(positive, clips=2),
        graph.frames(graph.travel(f"0: {DAY}\n-1: {NIGHT}", 2 * FRAMES), frames=2 * FRAMES)])
    assert torch.equal(core, ours) and relative_error(windows, ours) < 1e-5
    # The noise of the second clip is that of the later frames of the longer clip, whose texts are others.
    assert relative_error(twice[:FRAMES], ours) < 1e-5
    assert relative_error(twice[FRAMES:], first[FRAMES:]) > 1e-3


def test_the_report_names_the_prompts_and_a_key_frame_beyond_the_clip(server, client):
    graph = DemoGraph()
    node = graph.travel(f'"0": "{DAY}",\n"6": "{NIGHT}"', after=", car")
    shown = graph.add("PreviewAny", source=out(node, 1))
    said = client.run(graph).outputs[shown[0]]["text"][0]
    assert said.splitlines() == [
        f"Frame 0: {DAY} , car",
        f"Frames 1 to 5: from '{DAY} , car' to '{NIGHT} , car', 17% to 83% of the second",
        "Warning: the key frame 6 lies beyond the last frame. Frames are counted from 0, so the last of 6 is 5."]


@pytest.mark.parametrize("lines, frames, words, at_sampler", [
    ("a red car", FRAMES, "does not begin with a frame number", False),
    ("", FRAMES, "There are no prompts", False),
    ("0: a\n0: b", FRAMES, "Two lines of the prompts are for frame 0", False),
    (f"0: {DAY}\n-1: {NIGHT}", 16, "made a text for each of 16 frames, and a clip has 6 frames. Set frames", True)])
def test_bad_lines_are_refused_at_the_node_and_another_number_of_frames_at_the_sampler(server, client, lines, frames,
                                                                                       words, at_sampler):
    graph = DemoGraph()
    travelling = graph.travel(lines, frames)
    clip = graph.frames(travelling)
    with pytest.raises(NodeError) as caught:
        server.latent(graph, clip[0])
    error = caught.value
    assert (error.node_id, error.exception_type) == ((clip if at_sampler else travelling)[0], "Video LDM")
    assert words in error.message and error.message.endswith(".")
