"""Temporal layers together with what artists use beside them, in a running ComfyUI, through its stock nodes."""

import pytest
import torch

from video_ldm.tests.host.graphs import (
    CONTROLNET,
    FRAMES,
    HEIGHT,
    IMAGE,
    LORA,
    MOTION,
    NEGATIVE,
    POSITIVE,
    SECOND,
    VIDEO,
    WIDTH,
    Graph,
    out,
)
from video_ldm.tests.small import relative_error

pytestmark = pytest.mark.usefixtures("library")


def test_the_three_samplers_give_the_same_clip_for_the_same_seed(server, client):
    graph = Graph()
    video = graph.layers(graph.image_model())
    positive, negative = graph.text(POSITIVE), graph.text(NEGATIVE)
    ours = graph.clip(video, positive, negative, sampler="euler_ancestral", scheduler="ddim_uniform")
    core = graph.ksampler(video, positive, negative, sampler_name="euler_ancestral", scheduler="ddim_uniform")
    custom = graph.add(
        "SamplerCustomAdvanced", latent_image=graph.empty_latent(),
        noise=graph.add("RandomNoise", noise_seed=7),
        guider=graph.add("CFGGuider", model=video, positive=positive, negative=negative, cfg=2.0),
        sampler=graph.add("KSamplerSelect", sampler_name="euler_ancestral"),
        sigmas=graph.add("BasicScheduler", model=video, scheduler="ddim_uniform", steps=2, denoise=1.0))
    frames, same, as_well = server.latents(graph, [ours, core, custom])
    assert torch.equal(frames, same) and torch.equal(frames, as_well)
    assert len(frames) == FRAMES and min(relative_error(a, b) for a, b in zip(frames, frames[1:])) > 1e-2


def test_the_sampler_goes_on_from_a_latent_as_ksampler_does(server, client):
    generator = torch.Generator().manual_seed(3)
    name = server.put_input_latent("frames.latent", torch.randn(FRAMES, 4, 2, 3, generator=generator))
    graph = Graph()
    video, latent = graph.layers(graph.image_model()), graph.add("LoadLatent", latent=name)
    ours = graph.clip(video, latent=latent, denoise=0.5)
    core = graph.ksampler(video, latent=latent, denoise=0.5)
    anew = graph.clip(video)
    frames, same, other = server.latents(graph, [ours, core, anew])
    assert torch.equal(frames, same) and relative_error(frames, other) > 1e-2


@pytest.mark.parametrize("file", [VIDEO, MOTION])
def test_a_lora_before_or_after_the_temporal_layers_gives_the_same_frames(server, client, file):
    graph = Graph()
    model = graph.image_model()
    before = graph.clip(graph.layers(graph.lora(model), file))
    after = graph.clip(graph.lora(graph.layers(model, file)))
    without = graph.clip(graph.layers(model, file))
    first, last, none = server.latents(graph, [before, after, without])
    assert torch.equal(first, last) and relative_error(first, none) > 1e-3


def test_another_checkpoint_takes_the_place_of_the_first_and_back(server, client):
    def frames(*names):
        graph = Graph()
        return server.latents(graph, [graph.clip(graph.layers(graph.image_model(name))) for name in names])
    first, second = frames(IMAGE, SECOND)
    assert torch.equal(frames(SECOND)[0], second) and torch.equal(frames(IMAGE)[0], first)
    assert relative_error(second, first) > 1e-2


def test_a_controlnet_steers_each_frame_by_its_own_picture(server, client):
    """Hints that differ in the last frame alone: with strength 0 the other frames stay, with layers they move."""
    def frames(strength, hints):
        graph = Graph()
        images = {shade: torch.full((HEIGHT, WIDTH, 3), shade) for shade in hints}
        pictures = [graph.add("LoadImage", image=server.put_input_image(f"hint_{shade}.png", images[shade]))
                    for shade in hints]
        batch = pictures[0]
        for picture in pictures[1:]:
            batch = graph.add("ImageBatch", image1=batch, image2=picture)
        steered = graph.add("ControlNetApplyAdvanced", positive=graph.text(POSITIVE), negative=graph.text(NEGATIVE),
                            image=batch,
                            control_net=graph.add("ControlNetLoader", control_net_name=CONTROLNET),
                            strength=1.0, start_percent=0.0, end_percent=1.0)
        model = graph.image_model()
        clip = graph.clip(graph.layers(model, strength=strength), steered, out(steered, 1))
        bare = graph.clip(graph.layers(model, strength=strength))
        return server.latents(graph, [clip, bare])
    same, changed = [0.2, 0.4, 0.6, 0.8], [0.2, 0.4, 0.6, 0.1]
    steered, bare = frames(1.0, same)
    assert relative_error(steered, bare) > 1e-3
    moved = frames(1.0, changed)[0]
    assert all(relative_error(a, b) > 1e-5 for a, b in zip(moved, steered))
    images, images_moved = frames(0.0, same)[0], frames(0.0, changed)[0]
    assert torch.equal(images[:-1], images_moved[:-1]) and relative_error(images[-1], images_moved[-1]) > 1e-3


def test_a_lora_as_a_hook_on_both_conditionings_is_that_lora_on_the_model(server, client):
    graph = Graph()
    model = graph.image_model()
    hook = graph.add("CreateHookLoraModelOnly", lora_name=LORA, strength_model=1.0)
    positive, negative = graph.text(POSITIVE), graph.text(NEGATIVE)
    pair = graph.add("PairConditioningSetProperties", positive_NEW=positive, negative_NEW=negative, strength=1.0,
                     set_cond_area="default", hooks=hook)
    video = graph.layers(model)
    hooked = graph.clip(video, pair, out(pair, 1))
    loaded = graph.clip(graph.lora(video), positive, negative)
    plain = graph.clip(video, positive, negative)
    a, b, none = server.latents(graph, [hooked, loaded, plain])
    assert relative_error(a, b) < 1e-5 and relative_error(a, none) > 1e-3


def test_a_hook_on_the_positive_alone_leaves_the_negative_and_later_clips_as_they_were(server, client):
    def frames(hooked):
        graph = Graph()
        video, positive = graph.layers(graph.image_model()), graph.text(POSITIVE)
        if hooked:
            hook = graph.add("CreateHookLoraModelOnly", lora_name=LORA, strength_model=1.0)
            positive = graph.add("ConditioningSetProperties", cond_NEW=positive, strength=1.0, set_cond_area="default",
                                 hooks=hook)
        return server.latent(graph, graph.clip(video, positive)[0])
    before, with_hook = frames(False), frames(True)
    client.request("/free", {"free_memory": True})
    assert torch.equal(frames(False), before) and relative_error(with_hook, before) > 1e-3


def test_two_chained_sets_of_layers_both_act(server, client):
    graph = Graph()
    model = graph.image_model()
    video, motion = graph.layers(model, strength=0.5), graph.layers(model, MOTION)
    both = graph.layers(video, MOTION)
    one, other, chained = server.latents(graph, [graph.clip(m, seed=1) for m in (video, motion, both)])
    assert min(relative_error(chained, one), relative_error(chained, other)) > 1e-3


@pytest.mark.parametrize("weight_dtype", ["fp8_e4m3fn", "fp8_e5m2"])
def test_weights_of_8_bits_run_beside_temporal_layers_in_the_precision_of_their_file(server, client, weight_dtype):
    graph = Graph()
    narrow, exact = graph.image_model(weight_dtype=weight_dtype), graph.image_model()
    clip = graph.clip(graph.layers(narrow))
    reference, image = graph.clip(graph.layers(exact)), graph.ksampler(narrow)
    frames, precise, still = server.latents(graph, [clip, reference, image])
    assert frames.isfinite().all() and 0 < relative_error(frames, precise) < 0.5
    assert relative_error(frames, still) > 1e-3


def test_areas_and_time_ranges_of_conditioning_act_on_a_clip(server, client):
    graph = Graph()
    video = graph.layers(graph.image_model())
    positive, other = graph.text(POSITIVE), graph.text("other")
    early = graph.add("ConditioningSetTimestepRange", conditioning=other, start=0.0, end=0.5)
    part = graph.add("ConditioningSetAreaPercentage", conditioning=other, width=0.5, height=1.0, x=0.0, y=0.0,
                     strength=1.0)
    mixed = [graph.add("ConditioningCombine", conditioning_1=positive, conditioning_2=more) for more in (early, part)]
    clips = server.latents(graph, [graph.clip(video, cond) for cond in (positive, *mixed)])
    assert all(clip.isfinite().all() for clip in clips)
    assert min(relative_error(clip, clips[0]) for clip in clips[1:]) > 1e-4
