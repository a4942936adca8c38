"""Load Temporal Decoder and Temporal VAE Decode in a real ComfyUI, with the bundled autoencoder as the VAE."""

import av
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from video_ldm.nodes.host.files import DEMO_FOLDER
from video_ldm.temporal.decoder import TemporalDecoder
from video_ldm.temporal.formats import decoder as file_format
from video_ldm.temporal.video import open_video
from video_ldm.tests.host.client import Interrupted, NodeError
from video_ldm.tests.host.test_video_nodes import everything_in
from video_ldm.tests.small import randomise

DECODER, LATENT = "decoder.safetensors", "drive.latent"
FRAMES, WIDTH, HEIGHT = 10, 128, 64


@pytest.fixture(scope="module")
def files(server):
    """A temporal decoder for the bundled autoencoder with weak random layers, and latents of some frames."""
    from comfy.ldm.modules.diffusionmodules.model import Decoder

    from video_ldm.demo.decoder import params
    weights = {key: value.float() for key, value in load_file(DEMO_FOLDER / "autoencoder.safetensors").items()}
    decoder = TemporalDecoder(Decoder(**params().config()), params().kernel)
    image = {key.removeprefix("decoder."): value for key, value in weights.items() if key.startswith("decoder.")}
    randomise(decoder)
    with torch.no_grad():
        decoder.conv_out.time_mix_conv.weight.mul_(0.02)
        for colour in range(3):
            decoder.conv_out.time_mix_conv.weight[colour, colour, 1] += 1
        decoder.conv_out.time_mix_conv.bias.zero_()
        for block in decoder.blocks():
            block.mix_factor.fill_(-4.0)
    decoder.load_state_dict(image, strict=False)
    post_quant = {part: weights[f"post_quant_conv.{part}"] for part in ("weight", "bias")}
    file_format.write(server.model_path("video_ldm", DECODER), decoder.state_dict(), params(), latents="the Video LDM "
                                                                                                       "demo",
                      frames=6, post_quant=post_quant)
    z = torch.randn(FRAMES, 4, HEIGHT // 8, WIDTH // 8, generator=torch.Generator().manual_seed(3))
    server.put_input_latent(LATENT, z)
    return server


def graph(**settings):
    return {
        "demo": {"class_type": "VideoLDMLoadDemo", "inputs": {}},
        "load": {"class_type": "VideoLDMLoadTemporalDecoder", "inputs": {"vae": ["demo", 2], "file": DECODER}},
        "latent": {"class_type": "LoadLatent", "inputs": {"latent": LATENT}},
        "decode": {"class_type": "VideoLDMTemporalDecode", "inputs": {
            "vae": ["load", 0], "samples": ["latent", 0], "window": 4, "overlap": 2, "tile": 0, "fps": 6.0,
            **settings}}}


def save(**inputs):
    return {"class_type": "VideoLDMSaveVideo", "inputs": {
        "filename_prefix": "decoded/clip", "format": "webp", "fps": 0.0, "crf": 0, "contact_sheet": 0, **inputs}}


CORE_SAVE = {"class_type": "SaveVideo", "inputs": {
    "video": ["decode", 1], "filename_prefix": "core/clip", "format": "mp4", "codec": "h264"}}


def frames_of(server, result, node):
    """The video that a node has saved, and its frames as uint8. WebP keeps them exactly."""
    video = open_video(server.output_path(next(iter(result.outputs[node]["images"]))))
    return video, np.stack(list(video.iterate()))


def test_the_images_and_the_stream_are_the_same_frames(files, client):
    prompt = {**graph(), "images": save(images=["decode", 0]), "video": save(video=["decode", 1])}
    streamed = {**graph(), "video": save(video=["decode", 1])}
    both, alone = client.run(prompt), client.run(streamed)
    video, frames = frames_of(files, both, "images")
    assert video.frames == FRAMES and (video.width, video.height) == (WIDTH, HEIGHT) and frames.std() > 5
    for result in (both, alone):
        stream, others = frames_of(files, result, "video")
        assert stream.rate == 6 and np.array_equal(frames, others)


def test_cores_own_save_video_streams_it_with_the_workflow(files, client):
    result = client.run({**graph(), "save": CORE_SAVE}, extra_data={"extra_pnginfo": {"workflow": {"nodes": []}}})
    with av.open(str(files.output_path(result.files()[0]))) as container:
        assert {"prompt", "workflow"} <= container.metadata.keys()
        assert container.streams.video[0].codec_context.name == "h264"
        assert sum(1 for _ in container.decode(video=0)) == FRAMES
    bars = [data["value"] for kind, data in result.events if kind == "progress" and data["node"] == "save"]
    assert bars and bars[-1] == FRAMES          # core's node has no progress of its own


def test_connecting_the_images_later_decodes_again_instead_of_handing_out_nothing(files, client):
    streamed = {**graph(), "video": save(video=["decode", 1])}
    client.run(streamed)
    assert "decode" not in client.run(streamed).executed()          # cached as it was
    result = client.run({**streamed, "preview": {"class_type": "PreviewImage", "inputs": {"images": ["decode", 0]}}})
    assert "decode" in result.executed() and len(result.outputs["preview"]["images"]) == FRAMES


def test_the_temporal_decoder_decodes_other_pictures_than_the_plain_vae_and_one_window_as_cores_node(files, client):
    core = {"class_type": "VAEDecode", "inputs": {"vae": ["load", 0], "samples": ["latent", 0]}}
    prompt = {**graph(window=16), "core": core, "own": save(images=["decode", 0]), "theirs": save(images=["core", 0])}
    result = client.run(prompt)
    _, own = frames_of(files, result, "own")
    _, theirs = frames_of(files, result, "theirs")
    assert np.array_equal(own, theirs)
    plain = {**graph(window=16, vae=["demo", 2]), "own": save(images=["decode", 0])}
    _, image = frames_of(files, client.run(plain), "own")
    assert image.shape == own.shape and not np.array_equal(image, own)


def test_the_report_says_what_was_loaded(files, client):
    show = {"class_type": "PreviewAny", "inputs": {"source": ["load", 1]}}
    report = client.run({**graph(), "report": show}).outputs["report"]["text"][0]
    assert "decoder.safetensors" in report and "for latents of the Video LDM demo" in report and "Warning" not in report


def test_wrong_files_and_widgets_are_refused_in_one_sentence_at_the_node(files, client):
    wrong = graph()
    wrong["load"]["inputs"]["file"] = "video_ldm_driving.safetensors"
    for prompt, node, sentence in (
            (wrong, "load", "video_ldm_driving.safetensors is .*, not a temporal decoder. Load it with Load Temporal "
                            "Layers"),
            (graph(window=4, overlap=4), "decode", "overlap is 4 frames and window is 4"),
            (graph(clips=3), "decode", "10 frames, which do not divide into 3 clips"),
            (graph(tile=32), "decode", "tile is 32 pixels; 64 is the least")):
        with pytest.raises(NodeError, match=sentence) as caught:
            client.run({**prompt, "save": save(video=["decode", 1])})
        assert caught.value.node_id == node and caught.value.exception_type == "Video LDM"


@pytest.mark.parametrize("node", ["decode", "save"])
def test_cancelling_leaves_no_file(files, client, node):
    files.put_input_latent("long.latent", torch.randn(120, 4, HEIGHT // 8, WIDTH // 8))
    prompt = {**graph(), "save": save(**({"images": ["decode", 0]} if node == "decode" else {"video": ["decode", 1]}),
                                      format="mp4")}
    prompt["latent"]["inputs"]["latent"] = "long.latent"
    before = everything_in(files.base / "output")

    def stop(kind, data):
        if kind == "progress" and data["node"] == node and data["value"] >= 2:
            client.interrupt()
    with pytest.raises(Interrupted):
        client.run(prompt, on_event=stop)
    assert everything_in(files.base / "output") == before
