"""PVDM in a running ComfyUI: sample, go on, encode, edit, decode, stream; nothing else changes by it."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from video_ldm.temporal.video import open_video
from video_ldm.tests import pvdm_help
from video_ldm.tests.host.client import NodeError
from video_ldm.tests.host.graphs import IMAGE, VIDEO, Graph, out
from video_ldm.tests.pvdm_help import AUTOENCODER
from video_ldm.tests.small import relative_error

FRAMES, LENGTH = AUTOENCODER.frames, AUTOENCODER.shape.length
WIDGETS = dict(seed=3, clips=2, steps=3, following_steps=2, eta=1.0, guidance=0.0, fps=0.0)


@pytest.fixture(scope="module", autouse=True)
def pvdm_files(library):
    folder = library.model_path("video_ldm", "x").parent
    pvdm_help.write(folder, "planes")
    pvdm_help.write(folder, "others", seed=5)
    (folder / "cut.safetensors").write_bytes((folder / "planes.safetensors").read_bytes()[:90_000])


class PvdmGraph(Graph):
    def pvdm(self, name="planes"):
        return self.add("VideoLDMLoadPVDM", autoencoder=f"{name}_autoencoder.safetensors",
                        diffusion=f"{name}.safetensors")

    def sampled(self, pvdm, **changes):
        return self.add("VideoLDMPVDMSampler", pvdm=pvdm, **{**WIDGETS, **changes})


def planes(server, name="planes", **changes):
    graph = PvdmGraph()
    return server.latent(graph, graph.sampled(graph.pvdm(name), **changes)[0], 2)


def written(server, result, prefix):
    """The video file that a run wrote under this name, and its frames."""
    file = next(file for file in result.files() if file["filename"].startswith(prefix))
    video = open_video(server.output_path(file))
    return video, torch.from_numpy(video.read(video.select(0, 0, 1)))


def test_a_video_is_sampled_goes_on_and_streams_to_both_saving_nodes(server, client):
    graph = PvdmGraph()
    pvdm = graph.pvdm()
    first = graph.sampled(pvdm)
    more = graph.sampled(pvdm, start_planes=out(first, 2), seed=4, clips=3)
    graph.add("VideoLDMSaveVideo", video=out(more, 1), filename_prefix="pvdm", format="mp4", fps=0.0, crf=1,
              contact_sheet=0)
    graph.add("SaveVideo", video=out(first, 1), filename_prefix="core", format="auto", codec="auto")
    decoded = graph.add("VideoLDMPVDMDecode", pvdm=pvdm, planes=out(more, 2), fps=0.0)
    graph.add("SaveImage", images=decoded, filename_prefix="frames")
    result = client.run(graph)
    video, streamed = written(server, result, "pvdm")
    assert (video.frames, video.width, video.height, video.rate) == (3 * FRAMES, 32, 16, 8)
    pictures = [file for file in result.files() if file["filename"].startswith("frames")]
    assert len(pictures) == 3 * FRAMES
    still = torch.stack([torch.from_numpy(np.asarray(Image.open(server.output_path(file)))) for file in pictures])
    grey = torch.tensor([0.299, 0.587, 0.114])      # a codec keeps the brightness of each pixel, and colours of four
    assert (streamed @ grey - still.float() / 255 @ grey).abs().mean() < 0.02
    assert written(server, result, "core")[0].frames == 2 * FRAMES


def test_planes_are_saved_loaded_mixed_and_decoded(server, client):
    first, second = planes(server), planes(server, seed=4)
    assert first.shape == (2, 4, 1, LENGTH) and relative_error(first, second) > 0.1
    assert torch.equal(planes(server, clips=1), first[:1])
    for name, tensor in (("first.latent", first), ("second.latent", second)):
        server.put_input_latent(name, tensor)
    graph = PvdmGraph()
    pvdm = graph.pvdm()
    loaded = [graph.add("LoadLatent", latent=name) for name in ("first.latent", "second.latent")]
    blended = graph.add("LatentBlend", samples1=loaded[0], samples2=loaded[1], blend_factor=0.25)
    added = graph.add("LatentAdd", samples1=out(graph.sampled(pvdm), 2), samples2=loaded[1])
    images = graph.add("VideoLDMPVDMDecode", pvdm=pvdm, planes=blended, fps=0.0)
    again = graph.add("VideoLDMPVDMEncode", pvdm=pvdm, images=images)
    mixed, summed, encoded = server.latents(graph, [(blended[0], 0), (added[0], 0), (again[0], 0)])
    assert relative_error(mixed, 0.25 * first + 0.75 * second) < 1e-6 and torch.equal(summed, first + second)
    network = pvdm_help.autoencoder()
    with torch.no_grad():
        expected = network.encode(network.decode(mixed[:, :, 0]))
    assert relative_error(encoded[:, :, 0], expected) < 1e-4


def test_a_start_clip_goes_on_as_its_planes_do(server, client):
    graph = PvdmGraph()
    pvdm = graph.pvdm()
    start = graph.sampled(pvdm, clips=1)
    encoded = graph.add("VideoLDMPVDMEncode", pvdm=pvdm, images=start)
    by_images, by_planes = (graph.sampled(pvdm, seed=8, **way) for way in
                            ({"start_clip": start}, {"start_planes": encoded}))
    one, two = server.latents(graph, [(by_images[0], 2), (by_planes[0], 2)])
    assert torch.equal(one, two) and relative_error(one, planes(server, seed=8)) > 1e-2


def test_two_pvdms_in_one_graph_do_not_interact(server, client):
    alone = [planes(server, name) for name in ("planes", "others")]
    client.free()
    graph = PvdmGraph()
    both = [graph.sampled(graph.pvdm(name)) for name in ("planes", "others")]
    together = server.latents(graph, [(link[0], 2) for link in both])
    assert all(torch.equal(a, b) for a, b in zip(alone, together)) and relative_error(*alone) > 0.1


def test_the_nodes_of_image_models_are_the_same_before_and_after(server, client):
    def clip():
        graph = Graph()
        return server.latent(graph, graph.clip(graph.layers(graph.image_model()))[0])
    before = clip()
    graph = PvdmGraph()
    video = graph.clip(graph.layers(graph.image_model()), seed=7)
    ours = graph.sampled(graph.pvdm())
    beside, rows = server.latents(graph, [(video[0], 0), (ours[0], 2)])
    assert torch.equal(beside, before) and torch.equal(rows, planes(server))
    client.free()
    assert torch.equal(clip(), before)


def test_a_cancel_ends_a_clip_and_the_next_run_is_whole(server, client):
    graph = PvdmGraph()
    steps = server.cancelled(graph, graph.sampled(graph.pvdm(), clips=3, steps=400, following_steps=400)[0], 2)
    assert len(steps) < 400         # within the first clip
    client.free()
    first = planes(server)
    client.free()
    assert torch.equal(planes(server), first)


@pytest.mark.parametrize("files, words", [
    (("planes.safetensors", "planes_autoencoder.safetensors"), "planes.safetensors is a PVDM diffusion model, not a "
     "PVDM autoencoder. The two files of Load PVDM are swapped"),
    (("planes_autoencoder.safetensors", VIDEO), f"{VIDEO} is a file of Video LDM temporal layers, not a PVDM diffusion "
     "model. Load it with Load Temporal Layers."),
    (("image.safetensors", "planes.safetensors"), "image.safetensors is a plain Stable Diffusion 1.x UNet, not a PVDM"),
    (("planes_autoencoder.safetensors", "cut.safetensors"), "cut.safetensors is damaged or only partly downloaded"),
])
def test_files_that_are_no_pvdm_are_refused_in_one_sentence(server, client, files, words):
    shutil.copy(server.model_path("diffusion_models", IMAGE), server.model_path("video_ldm", "image.safetensors"))
    graph = PvdmGraph()
    pvdm = graph.add("VideoLDMLoadPVDM", autoencoder=files[0], diffusion=files[1])
    with pytest.raises(NodeError, match=words):
        server.latent(graph, graph.sampled(pvdm)[0], 2)


def test_a_pvdm_and_its_planes_are_refused_where_they_do_not_belong(server, client):
    graph = Graph()
    layers = graph.layers(graph.image_model(), file="planes.safetensors")
    with pytest.raises(NodeError, match="planes.safetensors is a PVDM diffusion model, .* Load it with Load PVDM"):
        server.latent(graph, graph.clip(layers)[0])
    graph = PvdmGraph()
    pvdm = graph.pvdm()
    short = graph.add("EmptyImage", width=32, height=16, batch_size=3, color=0)
    with pytest.raises(NodeError, match="The start clip has 3 frames, and .* goes on from 8"):
        server.latent(graph, graph.sampled(pvdm, start_clip=short)[0], 2)
    graph = PvdmGraph()
    decoded = graph.add("VideoLDMPVDMDecode", pvdm=graph.pvdm(), planes=graph.empty_latent(), fps=0.0)
    graph.add("SaveImage", images=decoded, filename_prefix="x")
    with pytest.raises(NodeError, match="does not hold planes of"):
        client.run(graph)
    graph = PvdmGraph()
    planes_of_it = out(graph.sampled(graph.pvdm()), 2)
    made = graph.clip(graph.layers(graph.image_model()), latent=planes_of_it)
    with pytest.raises(NodeError, match="The connected frames are planes of a PVDM"):
        server.latent(graph, made[0])
