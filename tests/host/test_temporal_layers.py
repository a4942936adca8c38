"""Temporal layers in a running ComfyUI: they act while a clip is sampled, and nothing of them is left behind."""

import pytest
import torch
from safetensors import safe_open

from video_ldm.tests.host.client import NodeError
from video_ldm.tests.host.graphs import AS_MODEL, FRAMES, MOTION, MOTION_LORA, OTHER, Graph, out
from video_ldm.tests.small import relative_error

pytestmark = pytest.mark.usefixtures("library")


class PlainImages:
    """Core nodes alone, run again and again on one loaded MODEL, which the graphs of clips share."""

    def __init__(self, server):
        self.server, self.runs = server, 0
        self.graph = Graph()
        self.model = self.graph.image_model()
        self.sampler = self.graph.ksampler(self.model)

    def sample(self):
        # Changes nothing but what ComfyUI's cache goes by: core takes denoise above 0.9999 for 1.
        self.graph[self.sampler[0]]["inputs"]["denoise"] = 1 - 1e-5 * self.runs
        ran = []

        def note(kind, data):
            if kind == "executing":
                ran.append(data["node"])
        latent = self.server.latent(self.graph, self.sampler[0], on_event=note)
        assert self.sampler[0] in ran and (self.model[0] in ran) == (self.runs == 0)
        self.runs += 1
        return latent


def clip_graph(**changes):
    graph = Graph()
    video = graph.layers(graph.image_model(), frames_per_clip=FRAMES)
    return graph, graph.ksampler(video, **changes)[0]


def test_plain_images_are_the_same_before_and_after_a_clip_a_cancelled_clip_and_one_that_failed(server, client):
    images = PlainImages(server)
    before = images.sample()

    assert relative_error(server.latent(*clip_graph()), before) > 1e-3
    assert torch.equal(images.sample(), before)

    assert len(server.cancelled(*clip_graph(steps=500))) < 400
    assert torch.equal(images.sample(), before)

    with pytest.raises(NodeError, match="does not divide into clips"):
        server.latent(*clip_graph(frames=FRAMES + 1))
    assert torch.equal(images.sample(), before)


def test_two_models_of_different_strength_in_one_graph_do_not_interact(server, client):
    def frames(*strengths):
        graph = Graph()
        model = graph.image_model()
        clips = [graph.clip(graph.layers(model, strength=strength)) for strength in strengths]
        return server.latents(graph, clips)
    full, weak = frames(1.0, 0.4)
    client.free()
    (alone,) = frames(0.4)
    assert torch.equal(weak, alone) and relative_error(full, weak) > 1e-3


def test_a_saved_model_has_the_image_models_keys_and_weights_alone(server, client):
    graph = Graph()
    model = graph.image_model()
    video = graph.layers(model)
    graph.add("ModelSave", model=model, filename_prefix="saved/before")
    server.latent(graph, graph.clip(video)[0])
    graph.add("ModelSave", model=video, filename_prefix="saved/after")
    client.run(graph)

    def tensors(name):
        with safe_open(server.base / "output" / "saved" / name, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}
    before, after = tensors("before_00001_.safetensors"), tensors("after_00001_.safetensors")
    temporal = ("time_stack", "time_mixer", "time_pos_embed", "temporal", "video_ldm")
    assert not any(word in key for key in after for word in temporal)
    assert set(after) == set(before) and all(torch.equal(after[key], before[key]) for key in before)


@pytest.mark.slow
def test_the_same_graph_gives_the_same_frames_and_every_setting_changes_them(server, client):
    def frames(file=MOTION, lora=None, temporal=None, strength=1.0, schedule=AS_MODEL, per_clip=0, **widgets):
        graph = Graph()
        options = {"frames_per_clip": per_clip}
        if lora is not None:
            options["motion_lora"] = graph.add("VideoLDMMotionLoRA", file=MOTION_LORA, strength=lora)
        video = graph.layers(graph.image_model(), file, strength, schedule, **options)
        if temporal is not None:
            widgets["temporal_prompt"] = graph.text(temporal)
        return server.latent(graph, graph.clip(video, **widgets)[0])

    first = frames()
    changed = [frames(**change) for change in (
        {"strength": 0.5}, {"schedule": "as trained"}, {"seed": 8}, {"frames": 2, "clips": 2}, {"lora": 1.0},
        {"lora": 0.5}, {"steps": 3}, {"cfg": 3.0}, {"sampler": "euler_ancestral"}, {"file": "video.safetensors"},
        {"file": "video.safetensors", "temporal": OTHER})]
    outcomes = [first, *changed]
    assert all(relative_error(a, b) > 1e-5 for i, a in enumerate(outcomes) for b in outcomes[:i])
    assert torch.equal(frames(file="video.safetensors", temporal="positive"), changed[-2])      # the same text twice
    client.free()
    assert torch.equal(frames(), first)


def test_frames_per_clip_and_clips_of_the_sampler_are_what_they_are_for_a_core_sampler(server, client):
    graph = Graph()
    model = graph.image_model()
    ours = graph.clip(graph.layers(model), frames=2, clips=2)
    core = graph.ksampler(graph.layers(model, frames_per_clip=2))
    whole = graph.ksampler(graph.layers(model))
    clips, same, one = server.latents(graph, [ours, core, whole])
    assert torch.equal(clips, same) and relative_error(clips, one) > 1e-3


def test_the_frame_rate_of_the_layers_comes_out_of_the_sampler(server, client):
    graph = Graph()
    model = graph.image_model()
    shown = [graph.add("PreviewAny", source=out(graph.clip(graph.layers(model, file)), 1))
             for file in ("video.safetensors", MOTION)]
    outputs = client.run(graph).outputs
    assert [float(outputs[node]["text"][0]) for node, _ in shown] == [4.0, 8.0]


def test_the_report_says_what_was_loaded_and_how_it_is_sampled(server, client):
    graph = Graph()
    model = graph.image_model()
    lora = graph.add("VideoLDMMotionLoRA", file=MOTION_LORA, strength=0.5)
    shown = graph.add("PreviewAny", source=out(graph.layers(model, MOTION, motion_lora=lora), 1))
    report = client.run(graph).outputs[shown[0]]["text"][0]
    for words in ("motion.safetensors", "4 temporal layers", "Stable Diffusion 1.x", "16 frames",
                  "sqrt_linear 0.00085 to 0.012", "motion_lora.safetensors at 0.5"):
        assert words in report
