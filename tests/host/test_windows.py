"""Frame Windows in a running ComfyUI: more frames than the temporal layers were trained on, and what goes with them."""

import pytest
import torch

from video_ldm.tests.host.client import NodeError
from video_ldm.tests.host.graphs import CONTROLNET, FRAMES, HEIGHT, MOTION, NEGATIVE, POSITIVE, VIDEO, WIDTH, Graph, out
from video_ldm.tests.small import relative_error

pytestmark = pytest.mark.usefixtures("library")
LONG = 6                        # frames: two windows of 4 that share 2
WINDOWS, CONVOLUTION = "windows", "convolution in time"


def windows(graph, model, mode=WINDOWS, **changes):
    widgets = dict(length=FRAMES, overlap=2, schedule="static", fuse="pyramid", max_distance=8)
    return graph.add("VideoLDMFrameWindows", model=model, mode=mode, **{**widgets, **changes})


@pytest.mark.parametrize("file", [VIDEO, MOTION])
def test_all_samplers_take_more_frames_than_a_window_and_agree(server, client, file):
    graph = Graph()
    video = graph.layers(graph.image_model(), file)
    model = windows(graph, video)
    whole, ours, core, short, same = server.latents(graph, [
        graph.clip(video, frames=LONG), graph.clip(model, frames=LONG), graph.ksampler(model, frames=LONG),
        graph.clip(model), graph.clip(video)])
    assert torch.equal(ours, core) and len(ours) == LONG and relative_error(ours, whole) > 1e-3
    assert torch.equal(short, same)     # one window is no window


def test_clips_of_one_batch_each_come_out_as_alone(server, client):
    generator = torch.Generator().manual_seed(3)
    frames = torch.randn(2 * LONG, 4, 2, 3, generator=generator)
    names = [server.put_input_latent(f"clip_{name}.latent", part) for name, part in
             (("both", frames), ("first", frames[:LONG]))]
    graph = Graph()
    model = windows(graph, graph.layers(graph.image_model()))
    latents = [graph.add("LoadLatent", latent=name) for name in names]
    both, first = server.latents(graph, [graph.clip(model, frames=LONG, latent=latent, denoise=0.5)
                                         for latent in latents])
    # The noise of the first clip is the same: core draws one frame after another.
    assert relative_error(both[:LONG], first) < 1e-5
    assert relative_error(both[LONG:], first) > 1e-2


def test_the_pictures_of_a_controlnet_follow_their_frames(server, client):
    """The pictures differ in the last frame alone.

    In one step the first two frames stay to the bit, because they share no window with the last one. With strength 0 of
    the layers all frames but the last stay, whatever the steps.
    """
    def frames(strength, shades, steps=1):
        graph = Graph()
        names = [server.put_input_image(f"hint_{shade}.png", torch.full((HEIGHT, WIDTH, 3), shade)) for shade in shades]
        pictures = [graph.add("LoadImage", image=name) for name in names]
        batch = pictures[0]
        for picture in pictures[1:]:
            batch = graph.add("ImageBatch", image1=batch, image2=picture)
        steered = graph.add("ControlNetApplyAdvanced", positive=graph.text(POSITIVE), negative=graph.text(NEGATIVE),
                            image=batch, control_net=graph.add("ControlNetLoader", control_net_name=CONTROLNET),
                            strength=1.0, start_percent=0.0, end_percent=1.0)
        model = windows(graph, graph.layers(graph.image_model(), strength=strength))
        return server.latent(graph, graph.clip(model, steered, out(steered, 1), frames=LONG, steps=steps)[0])
    same, changed = [0.2, 0.3, 0.4, 0.5, 0.6, 1.0], [0.2, 0.3, 0.4, 0.5, 0.6, 0.0]
    steered, moved = frames(1.0, same), frames(1.0, changed)
    assert torch.equal(moved[:2], steered[:2])
    assert all(relative_error(a, b) > 1e-5 for a, b in zip(moved[2:], steered[2:]))
    images, images_moved = frames(0.0, same, 2), frames(0.0, changed, 2)
    assert torch.equal(images[:-1], images_moved[:-1]) and relative_error(images[-1], images_moved[-1]) > 1e-4


def test_convolution_in_time_takes_many_frames_in_one_call(server, client):
    graph = Graph()
    video = graph.layers(graph.image_model())
    wide, narrow, short, same = server.latents(graph, [
        graph.clip(video, frames=12), graph.clip(windows(graph, video, CONVOLUTION), frames=12),
        graph.clip(windows(graph, video, CONVOLUTION), frames=9), graph.clip(video, frames=9)])
    assert torch.equal(short, same) and relative_error(narrow, wide) > 1e-4


def test_a_cancelled_clip_in_windows_leaves_the_next_as_it_was(server, client):
    def frames(**changes):
        graph = Graph()
        return graph, graph.clip(windows(graph, graph.layers(graph.image_model())), frames=LONG, **changes)[0]
    before = server.latent(*frames())
    assert len(server.cancelled(*frames(steps=500))) < 400
    client.free()
    assert torch.equal(server.latent(*frames()), before)


def refused(server, graph, node, at):
    with pytest.raises(NodeError) as caught:
        server.latent(graph, node[0])
    error = caught.value
    assert (error.node_id, error.exception_type) == (at[0], "Video LDM") and error.message.endswith(".")
    return error.message


def test_a_model_without_layers_and_impossible_windows_are_refused_at_the_node(server, client):
    graph = Graph()
    bare = windows(graph, graph.image_model())
    assert "has no temporal layers" in refused(server, graph, graph.clip(bare), at=bare)
    graph = Graph()
    wide = windows(graph, graph.layers(graph.image_model()), overlap=FRAMES)
    assert "cannot overlap by 4" in refused(server, graph, graph.clip(wide), at=wide)


# What newer versions ask for too; older ones do not look at it.
NEWER = {"freenoise": False, "cond_retain_index_list": "", "split_conds_to_windows": False,
         "latent_retain_index_list": "", "causal_window_fix": True}


def test_cores_own_windows_over_clips_are_refused_at_the_sampler_in_favour_of_this_node(server, client):
    graph = Graph()
    model = graph.add("ContextWindowsManual", model=graph.layers(graph.image_model()), context_length=FRAMES,
                      context_overlap=2, context_schedule="standard_static", context_stride=1, closed_loop=False,
                      fuse_method="pyramid", dim=0, **NEWER)
    clip = graph.clip(model, frames=LONG)
    assert "Use Frame Windows" in refused(server, graph, clip, at=clip)
