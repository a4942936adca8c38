"""Video Upscale in a real ComfyUI: the smallest x4 upscaler, its VAE and layers for it, through the stock loaders."""

import numpy as np
import pytest
import torch
from PIL import Image

from video_ldm.temporal.video import open_video, read_audio, write_video
from video_ldm.tests import pixel_help, upscale_help
from video_ldm.tests.host import checkpoints
from video_ldm.tests.host.client import Interrupted, NodeError
from video_ldm.tests.host.graphs import POSITIVE, Graph, out, write_text
from video_ldm.tests.host.test_video_nodes import everything_in
from video_ldm.tests.video_help import clip

MODEL, VAE, LAYERS = "x4.safetensors", "x4_vae.safetensors", "x4_layers.safetensors"
LAVIE, PIXELS, PIXEL_LAYERS = "x4_lavie.pt", "pixel_upscaler.safetensors", "pixel_upscaler_layers.safetensors"
WORDS, NO_WORDS, PIXEL_WORDS = "upscale_positive", "upscale_negative", "pixel_upscale_words"
FRAMES, SIZE = 3, 16


@pytest.fixture(scope="module", autouse=True)
def upscaler_files(library):
    half = torch.float16
    library.save_model("diffusion_models", MODEL, checkpoints.as_type(upscale_help.unet_state(), half))
    library.save_model("vae", VAE, checkpoints.as_type(upscale_help.vae_state(), half))
    upscale_help.write_layers(library.model_path("video_ldm", LAYERS), dtype=half)
    upscale_help.write_published(library.model_path("video_ldm", LAVIE))
    pixel_help.write_model(library.model_path("video_ldm", PIXELS))
    pixel_help.write_layers(library.model_path("video_ldm", PIXEL_LAYERS))
    for name, words in ((WORDS, upscale_help.text(11)), (NO_WORDS, upscale_help.text(12)),
                        (PIXEL_WORDS, pixel_help.text())):
        write_text(library, name, words)


def upscaled(graph, server, layers=LAYERS, **changes):
    """The node on a few frames that are all the same, in one step."""
    model = graph.image_model(MODEL)
    if layers:
        model = graph.layers(model, layers)
    name = server.put_input_image("small.png", upscale_help.small_frames(1, SIZE, SIZE)[0])
    images = graph.add("RepeatImageBatch", image=graph.add("LoadImage", image=name), amount=FRAMES)
    inputs = dict(positive=graph.text(WORDS), negative=graph.text(NO_WORDS), noise_level=30, window=2, overlap=1,
                  tile=0, fps=6.0, seed=7, steps=1, cfg=1.0, sampler="euler", scheduler="normal", images=images,
                  vae=graph.add("VAELoader", vae_name=VAE))
    return graph.add("VideoLDMUpscale", **{"model": model, **inputs, **changes})


def save(graph, **inputs):
    return graph.add("VideoLDMSaveVideo", **{"filename_prefix": "upscaled/clip", "format": "webp", "fps": 0.0, "crf": 0,
                                             "contact_sheet": 0, **inputs})[0]


def test_a_clip_is_upscaled_with_layers_for_the_upscaler_and_streams_to_a_file(server, client):
    graph = Graph()
    node = upscaled(graph, server)
    file, report = save(graph, video=out(node, 1)), graph.add("PreviewAny", source=out(node, 2))[0]
    result = client.run(graph)
    video = open_video(server.output_path(result.outputs[file]["images"][0]))
    assert (video.frames, video.width, video.height, video.rate) == (FRAMES, 4 * SIZE, 4 * SIZE, 6)
    assert np.stack(list(video.iterate())).std() > 5
    assert "Temporal layers: " in result.outputs[report]["text"][0]
    bars = [data["value"] for kind, data in result.events if kind == "progress" and data["node"] == node[0]]
    assert bars[-1] == 2                # windows 0..1 and 1..2, one step


def test_an_upscaled_range_of_a_video_file_keeps_its_sound(server, client):
    """Frames 2 to 4 of 8 at 4 a second are heard from second 0.5 to 1.25: 6 tones for 6 loudspeakers."""
    pitches = (400, 520, 600, 80, 720, 800)
    time = np.arange(2 * 48000) / 48000
    tones = np.stack([0.4 * np.sin(2 * np.pi * pitch * time) for pitch in pitches]).astype(np.float32)
    write_video(server.input_path("tones.mp4"), clip(8, SIZE, SIZE), 4, audio=(tones, 48000))
    graph = Graph()
    loader = graph.add("VideoLDMLoadVideo", file="tones.mp4", start_frame=2, frame_count=3, stride=1)
    node = upscaled(graph, server, layers=False, fps=0.0)
    del graph[node[0]]["inputs"]["images"]
    graph[node[0]]["inputs"]["video"] = out(loader, 1)
    file = save(graph, video=out(node, 1), format="mp4", crf=10)
    video = open_video(server.output_path(client.run(graph).outputs[file]["images"][0]))
    assert (video.frames, video.rate, video.width) == (3, 4, 4 * SIZE)
    sound, rate = read_audio(video)
    assert (rate, sound.shape) == (48000, (6, 36000))
    spectrum = np.abs(np.fft.rfft(sound[:, 6000:30000], axis=1))       # half a second: 2 Hz a bin
    assert (spectrum.argmax(1) * 2).tolist() == list(pitches)


def shown_frames(graph, client, server, node):
    """The frames of a node's IMAGE (t h w 3), integers, and the run."""
    preview = graph.add("PreviewImage", images=node)[0]
    result = client.run(graph)
    files = [server.output_path(file) for file in result.outputs[preview]["images"]]
    return np.stack([np.asarray(Image.open(file).convert("RGB")) for file in files]).astype(int), result


def test_without_layers_a_still_clip_stays_still_and_the_report_says_what_is_missing(server, client):
    graph = Graph()
    node = upscaled(graph, server, layers=False)
    report = graph.add("PreviewAny", source=out(node, 2))[0]
    frames, result = shown_frames(graph, client, server, node)
    assert frames.shape == (FRAMES, 4 * SIZE, 4 * SIZE, 3) and frames.std() > 5
    assert np.abs(frames[1:] - frames[0]).max() <= 1
    assert "No temporal layers" in result.outputs[report]["text"][0]


@pytest.mark.slow
def test_layers_in_lavies_layout_upscale_a_clip(server, client):
    graph = Graph()
    lavie, _ = shown_frames(graph, client, server, upscaled(graph, server, layers=LAVIE, noise_level=300))
    graph = Graph()
    plain, _ = shown_frames(graph, client, server, upscaled(graph, server, layers=False, noise_level=300))
    assert lavie.shape == plain.shape == (FRAMES, 4 * SIZE, 4 * SIZE, 3)
    assert np.abs(lavie - plain).mean() > 0.5


def test_an_upscaler_in_pixel_space_needs_no_vae(server, client):
    made = []
    for layers in (False, True):
        graph = Graph()
        model = graph.add("VideoLDMLoadVideoModel", file=PIXELS)
        model = graph.layers(model, PIXEL_LAYERS) if layers else model
        words = graph.text(PIXEL_WORDS)
        node = upscaled(graph, server, model=model, positive=words, negative=words, noise_level=150)
        del graph[node[0]]["inputs"]["vae"]
        made.append(shown_frames(graph, client, server, node)[0])
    alone, together = made
    assert alone.shape == (FRAMES, 4 * SIZE, 4 * SIZE, 3) and alone.std() > 5
    assert np.abs(alone[1:] - alone[0]).max() <= 1          # a still clip, the same noise for all frames
    assert np.abs(together - alone).mean() > 0.5


def test_a_file_that_is_no_video_model_is_refused_in_one_sentence_at_its_loader(server, client):
    graph = Graph()
    loader = graph.add("VideoLDMLoadVideoModel", file=LAYERS)
    save(graph, video=out(upscaled(graph, server, model=loader), 1))
    refusal = "x4_layers.safetensors is a file of Video LDM temporal layers, not a whole"
    with pytest.raises(NodeError, match=refusal) as caught:
        client.run(graph)
    assert caught.value.node_id == loader[0] and caught.value.exception_type == "Video LDM"


def refused(server, client, sentence, unconnected=None, positive=None, **changes):
    graph = Graph()
    if positive:
        changes["positive"] = graph.text(positive)
    node = upscaled(graph, server, **changes)
    graph[node[0]]["inputs"].pop(unconnected, None)
    save(graph, video=out(node, 1))
    with pytest.raises(NodeError, match=sentence) as caught:
        client.run(graph)
    return caught.value.node_id == node[0] and caught.value.exception_type == "Video LDM"


def test_wrong_connections_and_widgets_are_refused_in_one_sentence_at_the_node(server, client):
    assert refused(server, client, "noise_level is 300, .* from 0 to 250", noise_level=300)
    assert refused(server, client, "No VAE is connected", unconnected="vae")
    assert refused(server, client, "has nothing to upscale", unconnected="images")
    assert refused(server, client, "tile is 32 pixels", tile=32)
    assert refused(server, client, "has a width of 768, and the x4 upscaler takes 1024", positive=POSITIVE)


def test_cancelling_leaves_no_file(server, client):
    graph = Graph()
    node = upscaled(graph, server, steps=200)
    save(graph, video=out(node, 1))
    before = everything_in(server.base / "output")

    def stop(kind, data):
        if kind == "progress" and data["node"] == node[0] and data["value"] >= 1:
            client.interrupt()
    with pytest.raises(Interrupted):
        client.run(graph, on_event=stop)
    assert everything_in(server.base / "output") == before
