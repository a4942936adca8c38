"""Frame Noise and FreeInit in a running ComfyUI, with core's samplers and with Video LDM Sampler."""

import pytest
import torch

from video_ldm.tests.host.client import NodeError
from video_ldm.tests.host.graphs import FRAMES, MOTION, NEGATIVE, POSITIVE, Graph
from video_ldm.tests.small import relative_error

pytestmark = pytest.mark.usefixtures("library")
LONG = 6                        # frames: two windows of 4 that share 2
OWN, SHARED, MIXED = "own for each frame", "one for all frames", "mixed"
FREE_NOISE, REPEATED = "FreeNoise", "repeated in each window"


def windowed(graph):
    model = graph.layers(graph.image_model(), MOTION)
    return graph.add("VideoLDMFrameWindows", model=model, mode="windows", length=FRAMES, overlap=2, schedule="static",
                     fuse="pyramid", max_distance=8)


def frame_noise(graph, kind, model=None, **changes):
    widgets = dict(seed=7, noise=kind, noise_mix=0.5, frames=0, window_length=0, window_overlap=0)
    return graph.add("VideoLDMFrameNoise", **widgets | changes, **({"model": model} if model else {}))


def custom(graph, model, noise, frames=LONG):
    """SamplerCustomAdvanced with the settings of Graph.clip."""
    guider = graph.add("CFGGuider", model=model, positive=graph.text(POSITIVE), negative=graph.text(NEGATIVE), cfg=2.0)
    sigmas = graph.add("BasicScheduler", model=model, scheduler="normal", steps=2, denoise=1.0)
    return graph.add("SamplerCustomAdvanced", noise=noise, guider=guider, sigmas=sigmas,
                     sampler=graph.add("KSamplerSelect", sampler_name="euler"), latent_image=graph.empty_latent(frames))


def free_init(graph, model, iterations=3):
    return graph.add("VideoLDMFreeInit", model=model, iterations=iterations, filter="butterworth", stop_space=0.25,
                     stop_time=0.25, order=4)


def test_each_kind_gives_the_same_video_in_core_and_in_the_packs_sampler(server, client):
    graph = Graph()
    model = windowed(graph)
    kinds = (OWN, SHARED, MIXED, FREE_NOISE, REPEATED)
    ours = [graph.clip(model, frames=LONG, noise=kind, noise_mix=0.5) for kind in kinds]
    cores = [custom(graph, model, frame_noise(graph, kind, model)) for kind in kinds]
    by_hand = [custom(graph, model, frame_noise(graph, kind, window_length=FRAMES, window_overlap=2))
               for kind in (FREE_NOISE, REPEATED)]
    plain = [graph.clip(model, frames=LONG),
             custom(graph, model, graph.add("RandomNoise", noise_seed=7))]
    videos = server.latents(graph, ours + cores + by_hand + plain)
    wanted, found, same, before = videos[:5], videos[5:10], videos[10:12], videos[12:]
    assert all(torch.equal(a, b) for a, b in zip(wanted, found))
    assert all(torch.equal(a, b) for a, b in zip(wanted[3:], same))
    assert all(torch.equal(wanted[0], video) for video in before)       # own noise is KSampler's and RandomNoise's
    assert all(relative_error(a, b) > 1e-3 for place, a in enumerate(wanted) for b in wanted[:place])


def test_free_init_works_with_every_sampler_and_one_iteration_changes_nothing(server, client):
    graph = Graph()
    video = graph.layers(graph.image_model(), MOTION)
    model, once = free_init(graph, video), free_init(graph, video, 1)
    plain, same, ours, core, advanced = server.latents(graph, [
        graph.clip(video), graph.clip(once), graph.clip(model), graph.ksampler(model),
        custom(graph, model, graph.add("RandomNoise", noise_seed=7), FRAMES)])
    assert torch.equal(plain, same) and relative_error(ours, plain) > 1e-3
    assert torch.equal(ours, core) and torch.equal(ours, advanced)


def test_the_steps_of_all_iterations_are_on_one_bar_and_cancel_ends_them(server, client):
    def graph(steps):
        graph = Graph()
        model = free_init(graph, graph.layers(graph.image_model(), MOTION))
        return graph, graph.clip(model, steps=steps)
    seen = []

    def note(kind, data):
        if kind == "progress":
            seen.append((data["value"], data["max"]))
    whole, clip = graph(2)
    video = server.latent(whole, *clip, on_event=note)
    assert seen[-1] == (6, 6) and seen == sorted(seen)
    whole, clip = graph(200)
    assert len(server.cancelled(whole, *clip)) < 550
    client.free()
    whole, clip = graph(2)
    assert torch.equal(server.latent(whole, *clip), video)


def test_windows_that_are_missing_and_video_to_video_are_refused_with_a_sentence(server, client):
    graph = Graph()
    noise = frame_noise(graph, FREE_NOISE)
    clip = custom(graph, graph.layers(graph.image_model(), MOTION), noise)
    with pytest.raises(NodeError, match="is made for windows, and none are known") as caught:
        server.latent(graph, *clip)
    assert (caught.value.node_id, caught.value.exception_type) == (noise[0], "Video LDM")
    graph = Graph()
    model = graph.layers(graph.image_model(), MOTION)
    again = graph.clip(free_init(graph, model), latent=graph.clip(model), denoise=0.5)
    with pytest.raises(NodeError, match="FreeInit makes clips from noise alone") as caught:
        server.latent(graph, *again)
    assert (caught.value.node_id, caught.value.exception_type) == (again[0], "Video LDM")
