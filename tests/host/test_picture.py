"""Layers that move a given picture in a running ComfyUI: PIA, and AnimateLCM image to video."""

import pytest
import torch

from video_ldm.tests import picture_help
from video_ldm.tests.host import checkpoints
from video_ldm.tests.host.client import NodeError
from video_ldm.tests.host.graphs import FRAMES, HEIGHT, IMAGE, MOTION, SECOND, WIDTH, Graph, out
from video_ldm.tests.small import relative_error

PIA, I2V, DEEP = "pia.safetensors", "AnimateLCM_sd15_i2v.safetensors", "deep.safetensors"
PICTURE = "picture.latent"


@pytest.fixture(scope="module", autouse=True)
def files(library):
    half = torch.float16
    library.save_model("video_ldm", PIA, checkpoints.as_type(picture_help.pia_state(), half))
    library.save_model("video_ldm", I2V, checkpoints.as_type(picture_help.i2v_state(), half))
    library.save_model("diffusion_models", DEEP, checkpoints.as_type(picture_help.deep_unet_state(), half))
    picture = torch.randn(1, 4, HEIGHT // 8, WIDTH // 8, generator=torch.Generator().manual_seed(3))
    library.put_input_latent(PICTURE, picture)
    return library


def shown(graph, model, frames="0", picture=None):
    return graph.add("VideoLDMContextFrames", model=model, frames=frames, guidance=1.0,
                     latent=picture or graph.add("LoadLatent", latent=PICTURE))


def moving(graph, base=IMAGE, file=PIA, amount="moderate", motion_scale=0.8, **options):
    """MODEL of a picture that moves, with its layers on a checkpoint."""
    model = graph.image_model(base) if isinstance(base, str) else base
    layers = graph.layers(model, file, **options)
    return shown(graph, graph.add("VideoLDMPictureMotion", model=layers, amount=amount, motion_scale=motion_scale))


def test_both_move_a_picture_with_every_sampler_and_the_plain_model_stays_as_it_was(server, client):
    graph = Graph()
    plain = [graph.ksampler(graph.image_model(name), seed=5) for name in (IMAGE, DEEP)]
    before = server.latents(graph, [(node, 0) for node, _ in plain])
    pia, lcm = moving(graph), moving(graph, DEEP, I2V)
    report = graph.add("PreviewAny", source=out(pia, 1))[0]
    nodes = [graph.clip(pia), graph.ksampler(pia), graph.clip(lcm), graph.ksampler(lcm),
             graph.clip(moving(graph, amount="large")), graph.clip(moving(graph, DEEP, I2V, motion_scale=0.0)),
             graph.clip(moving(graph, SECOND))]
    ours, core, made, made_core, large, still, second = server.latents(graph, [(node, 0) for node, _ in nodes])
    assert torch.equal(ours, core) and torch.equal(made, made_core)
    assert all(relative_error(*pair) > 1e-4 for pair in ((large, ours), (still, made), (second, ours)))
    assert all(found.isfinite().all() and found.std() > 0.1 for found in (ours, made))
    assert report and "made anew" in client.run(graph).outputs[report]["text"][0]
    again = Graph()
    after = server.latents(again, [(again.ksampler(again.image_model(name), seed=5)[0], 0) for name in (IMAGE, DEEP)])
    assert all(map(torch.equal, before, after))


@pytest.mark.parametrize("base, file", [(IMAGE, PIA), (DEEP, I2V)])
def test_layer_strength_leaves_frames_of_strength_0_as_they_are_without_layers(server, client, base, file):
    graph = Graph()
    weak = graph.add("VideoLDMLayerStrength", model=moving(graph, base, file), curve="1 0 1 0", interpolation="hold")
    image = graph.layers(graph.image_model(base), file, 0.0)
    faint, alone = server.latents(graph, [graph.clip(weak), graph.clip(image)])
    assert torch.equal(faint[[1, 3]], alone[[1, 3]]) and relative_error(faint[[0, 2]], alone[[0, 2]]) > 1e-4


def test_extend_video_goes_on_from_a_picture(server, client):
    graph = Graph()
    video = graph.add("VideoLDMExtend", model=graph.layers(graph.image_model(), PIA), positive=graph.text("positive"),
                      negative=graph.text("negative"), frames=FRAMES, width=WIDTH, height=HEIGHT, seed=1, steps=1,
                      cfg=1.0, sampler="euler", scheduler="normal", length=7, context_guidance=1.0, overlap=1,
                      on_cancel="stop", latent=graph.add("LoadLatent", latent=PICTURE))
    longer = server.latent(graph, video[0])
    assert len(longer) == 7 and longer.isfinite().all()


@pytest.mark.parametrize("node, words", [
    ("sampler", "move a given picture, and none is connected"), ("loop", "made for clips of 16 frames"),
    ("motion", "no temporal layers that move a given picture"), ("two", "move one picture, as any frame of the clip"),
    ("network", "is a PIA file .*, not a whole video model"), ("lora", "is an AnimateLCM image-to-video file, not a")])
def test_wrong_use_is_refused_at_the_node_in_one_sentence(server, client, node, words):
    graph = Graph()
    layers = graph.layers(graph.image_model(), MOTION if node == "motion" else PIA)
    if node == "sampler":
        last = graph.clip(layers)
    elif node == "loop":
        last = graph.clip(moving(graph, amount="loop, small"))
    elif node == "motion":
        last = graph.add("VideoLDMPictureMotion", model=layers, amount="small", motion_scale=0.8)
    elif node == "two":
        two = graph.add("RepeatLatentBatch", samples=graph.add("LoadLatent", latent=PICTURE), amount=2)
        last = shown(graph, layers, "0, 1", two)
    elif node == "network":
        last = graph.add("VideoLDMLoadVideoModel", file=PIA)
    else:
        last = graph.add("VideoLDMMotionLoRA", file=I2V, strength=1.0)
    graph.add("PreviewAny", source=last)
    with pytest.raises(NodeError, match=words) as caught:
        client.run(graph)
    assert (caught.value.node_id, caught.value.exception_type) == (last[0], "Video LDM")
