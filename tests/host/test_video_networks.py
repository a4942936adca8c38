"""Whole video networks in a real ComfyUI: small files under the published names, and the workflows that use them.

The workflows' checkpoints are large because of their text encoders. Saved texts stand for CLIP Text Encode, the bundled
autoencoder for the checkpoint's VAE, and the smallest networks of their kind for the others.
"""

import json
from pathlib import Path

import pytest
import torch

from video_ldm.temporal.video import open_video
from video_ldm.tests import test_modelscope, test_videocrafter, upscale_help
from video_ldm.tests.host import checkpoints, public_files
from video_ldm.tests.host.client import NodeError
from video_ldm.tests.host.graphs import IMAGE, MOTION, NEGATIVE, POSITIVE, Graph, out, write_text
from video_ldm.tests.network_help import network_tensors
from video_ldm.tests.reference_videocrafter import VideoCrafter
from video_ldm.tests.small import randomise

WORKFLOWS = Path(__file__).resolve().parents[2] / "workflows" / "api"
BASE, INTERPOLATION, SEINE = "lavie_base.pt", "lavie_interpolation.pt", "seine.pt"
WIDE_POSITIVE, WIDE_NEGATIVE = "wide positive", "wide negative"         # texts of OpenCLIP-H's width
# {file: (its texts, what the report says of its text encoder)}
CLIP_L, OPENCLIP_H = (POSITIVE, NEGATIVE, "CLIP-L"), (WIDE_POSITIVE, WIDE_NEGATIVE, "OpenCLIP-H")
NETWORKS = {BASE: CLIP_L, "text2video_pytorch_model.pth": OPENCLIP_H, "zeroscope.safetensors": OPENCLIP_H,
            "videocrafter1_512.ckpt": OPENCLIP_H, "videocrafter1_1024.ckpt": OPENCLIP_H,
            "videocrafter2.ckpt": OPENCLIP_H}
X4, VSR = "x4.safetensors", "lavie_vsr.pt"
KEYS, SIZE = 3, 32          # key frames of a clip, and its width and height in pixels
CASCADE = 2                 # key frames where Latent Interpolate x4 and Video Upscale follow


@pytest.fixture(scope="module", autouse=True)
def networks(library):
    """The files, in half precision."""
    for name, tensors in small_files().items():
        tensors = checkpoints.as_type(tensors, torch.float16)
        path = library.model_path("video_ldm", name)
        if path.suffix == ".safetensors":
            library.save_model("video_ldm", name, tensors)
        else:
            torch.save({"ema": tensors} if path.suffix == ".pt" else tensors, path)
    library.save_model("diffusion_models", X4, checkpoints.as_type(upscale_help.unet_state(), torch.float16))
    library.save_model("vae", "x4_vae_of_networks.safetensors",
                       checkpoints.as_type(upscale_help.vae_state(), torch.float16))
    upscale_help.write_published(library.model_path("video_ldm", VSR))
    for seed, name in ((11, WIDE_POSITIVE), (12, WIDE_NEGATIVE)):
        write_text(library, name, checkpoints.conditioning(seed, width=1024))
    return library


def small_files() -> dict:
    """{file: its tensors}"""
    modelscope = randomise(test_modelscope.diffusers_network()).state_dict()
    crafters = {f"{kind}.ckpt": randomise(VideoCrafter(kind, **test_videocrafter.SMALL)).state_dict()
                for kind in test_videocrafter.KINDS}
    return {BASE: network_tensors("lavie_base"), INTERPOLATION: network_tensors("lavie_interpolation"),
            SEINE: network_tensors("seine"), "text2video_pytorch_model.pth": test_modelscope.own_layout(modelscope),
            "zeroscope.safetensors": modelscope, **crafters}


def plain(server, seed=7):
    """Latents of the plain image model."""
    graph = Graph()
    return server.latent(graph, graph.ksampler(graph.image_model(), seed=seed)[0])


@pytest.mark.slow
@pytest.mark.parametrize("file", NETWORKS)
def test_a_network_samples_a_clip_and_the_plain_model_stays_as_it_was(networks, client, file):
    positive, negative, encoder = NETWORKS[file]
    before = plain(networks)
    graph = Graph()
    model = graph.add("VideoLDMLoadVideoModel", file=file)
    shown = graph.add("PreviewAny", source=out(model, 1))[0]
    clip = graph.clip(model, graph.text(positive), graph.text(negative))[0]
    same = graph.ksampler(model, graph.text(positive), graph.text(negative), frames=4)[0]
    ours, cores = networks.latents(graph, [(clip, 0), (same, 0)])
    report = client.run(graph).outputs[shown]["text"][0]
    assert encoder in report and "Licence: " in report
    assert ours.isfinite().all() and ours.std() > 0.1
    assert torch.equal(ours, cores)
    plain(networks, seed=8)                     # another run between, so that nothing comes from a cache
    assert torch.equal(plain(networks), before)


def test_a_text_of_another_encoder_is_refused_with_the_name_of_the_right_one(networks, client):
    graph = Graph()
    model = graph.add("VideoLDMLoadVideoModel", file=BASE)
    graph.add("SaveLatent", samples=graph.ksampler(model, graph.text(WIDE_POSITIVE), graph.text(NEGATIVE)),
              filename_prefix="x")
    with pytest.raises(NodeError, match="with the CLIP of a Stable Diffusion 1.x checkpoint"):
        client.run(graph)


@pytest.mark.parametrize("file, node, sentence", [
    (BASE, "interpolate", "make key frames, not the frames between them"),
    (INTERPOLATION, "ksampler", "Latent Interpolate x4 alone: connect it there"),
    (INTERPOLATION, "clip", "Latent Interpolate x4 alone: connect it there"),
    (SEINE, "ksampler", "Connect Context Frames between this MODEL and the sampler"),
    (SEINE, "layers", "were trained for a network whose input takes known frames"),
])
def test_a_network_in_the_wrong_place_is_refused_at_that_node(networks, client, file, node, sentence):
    graph = Graph()
    if node == "layers":
        made = graph.layers(graph.image_model(), file)
    else:
        model = graph.add("VideoLDMLoadVideoModel", file=file)
        if node == "interpolate":
            made = graph.add("VideoLDMInterpolate", model=model, positive=graph.text(POSITIVE),
                             negative=graph.text(NEGATIVE), latent=graph.empty_latent(2), seed=1, steps=1,
                             times=1, cfg=1.0, sampler="euler", scheduler="normal", fps=8.0, windows=0)
        else:
            made = getattr(graph, node)(model)
    if node == "layers":
        graph.add("PreviewAny", source=out(made, 1))
    else:
        graph.add("SaveLatent", samples=made, filename_prefix="x")
    with pytest.raises(NodeError, match=sentence):
        client.run(graph)


# The workflows

def stand_ins(name, keys):
    """A workflow with small networks, few steps and this number of key frames."""
    prompt = json.loads((WORKFLOWS / f"{name}.json").read_text(encoding="utf-8"))
    wide = {key for key, node in prompt.items() if "v2-1" in node["inputs"].get("ckpt_name", "")
            or "x4" in node["inputs"].get("ckpt_name", "")}
    made = {}
    for key, node in prompt.items():
        inputs = dict(node["inputs"])
        if node["class_type"] == "CLIPTextEncode":
            negative = "egative" in node["_meta"]["title"]
            names = (WIDE_POSITIVE, WIDE_NEGATIVE) if inputs["clip"][0] in wide else (POSITIVE, NEGATIVE)
            made[key] = {"class_type": "LoadTrainingDataset", "inputs": {"folder_name": names[negative]}}
            continue
        if node["class_type"] == "CheckpointLoaderSimple":
            upscaler = "x4" in inputs["ckpt_name"]
            made[f"{key} model"] = {"class_type": "UNETLoader", "inputs": {
                "unet_name": X4 if upscaler else IMAGE, "weight_dtype": "default"}}
            made[f"{key} vae"] = ({"class_type": "VAELoader", "inputs": {"vae_name": "x4_vae_of_networks.safetensors"}}
                                  if upscaler else {"class_type": "VideoLDMLoadDemo", "inputs": {}})
            continue
        inputs |= {"steps": 1} if "steps" in inputs else {}
        inputs |= {"width": SIZE, "height": SIZE} if {"width", "height"} <= inputs.keys() else {}
        inputs |= {"frame_count": keys} if "frame_count" in inputs else {}
        inputs |= {"frames": keys} if node["class_type"] == "VideoLDMSampler" else {}
        inputs |= {"file": MOTION} if inputs.get("file") == "mm_sd15_v2.safetensors" else {}
        if node["class_type"] == "VideoLDMLoadTemporalDecoder":     # its network is large; the VAE itself serves here
            made[key] = {"class_type": "VideoLDMLoadDemo", "inputs": {}}
            continue
        made[key] = {"class_type": node["class_type"], "inputs": inputs}
    for node in made.values():
        for entry, value in node["inputs"].items():
            if isinstance(value, list):
                node["inputs"][entry] = moved(value, prompt)
    return made


def moved(link, prompt):
    """A link to a node of the workflow, as a link to what stands in for it."""
    node, slot = link
    kind, links = prompt[node]["class_type"], prompt[node]["inputs"]
    if kind == "CLIPTextEncode":
        return [node, 1]                        # LoadTrainingDataset: latents, then CONDITIONING
    if kind == "CheckpointLoaderSimple":
        vae = 0 if "x4" in links["ckpt_name"] else 2
        return [f"{node} vae", vae] if slot == 2 else [f"{node} model", 0]
    return [node, 2] if kind == "VideoLDMLoadTemporalDecoder" else link


@pytest.mark.slow
@pytest.mark.parametrize("name, keys, sizes", [
    ("lavie", CASCADE, {"lavie": (5, SIZE), "lavie_large": (5, 4 * SIZE)}),
    ("animatediff_lavie", CASCADE, {"animatediff_lavie": (5, SIZE), "animatediff_lavie_large": (5, 4 * SIZE)}),
    ("seine_picture", KEYS, {"seine_picture": (KEYS, SIZE)}),
    ("seine_transition", KEYS, {"seine_transition": (KEYS, SIZE)}),
    ("zeroscope", KEYS, {"zeroscope": (KEYS, SIZE)}),
    ("interpolate_video", KEYS, {"interpolate_video": (9, SIZE)}),
    ("upscale_video", KEYS, {"upscale_video": (KEYS, 4 * SIZE)}),
])
def test_a_workflow_runs_from_text_or_pictures_to_video_files(networks, client, name, keys, sizes):
    example = torch.rand(48, 40, 3, generator=torch.Generator().manual_seed(1))
    networks.put_input_image("example.png", example)
    public_files.write_own_video(networks, SIZE, SIZE)
    result = client.run(stand_ins(name, keys))
    files = [networks.output_path(file) for file in result.files() if file.get("type") == "output"]
    videos = {path.name.rsplit("_00", 1)[0]: open_video(path) for path in files if path.suffix == ".mp4"}
    found = {stem: (video.frames, video.width) for stem, video in videos.items()}
    assert found == sizes
    assert all(next(iter(video.iterate())).std() > 1 for video in videos.values())
