"""The graphs that artists wire around an own checkpoint, run as they are in a real server, on small random files."""

import re

import pytest
import torch

from video_ldm.temporal.video import open_video
from video_ldm.tests.host import public_files
from video_ldm.tests.host.public_files import workflow

SIZE, FRAMES = 32, 4
# {workflow: (sides of the frames, frames of the file)}
SIZES = {"lora": (SIZE, FRAMES), "dreambooth": (SIZE, FRAMES), "video_to_video": (SIZE, FRAMES),
         "second_pass": (SIZE * 3 // 2, FRAMES), "few_steps": (SIZE, FRAMES), "lightning": (SIZE, FRAMES),
         "v3_adapter": (SIZE, FRAMES), "freeu": (SIZE, FRAMES),
         "long_clip": (SIZE, 2 * FRAMES), "musev": (SIZE, FRAMES),
         "picture_to_video_pia": (SIZE, FRAMES), "picture_to_video_animatelcm": (SIZE, FRAMES),
         "camera_motion": (SIZE, FRAMES)}


@pytest.fixture(scope="module", autouse=True)
def files(server):
    public_files.write_public_files(server)
    public_files.write_own_video(server)
    public_files.write_own_picture(server)
    return server


def video_of(server, result):
    """{name of the file without its number: the video}"""
    paths = [server.output_path(file) for file in result.files() if file.get("type") == "output"]
    return {re.sub(r"_\d+_?$", "", path.stem): open_video(path) for path in paths if path.suffix == ".mp4"}


@pytest.mark.slow
@pytest.mark.parametrize("name", SIZES)
def test_a_graph_leaves_a_video_of_its_size(server, client, name):
    prompt = workflow(name, SIZE, SIZES[name][1])
    for node in prompt.values():
        if node["class_type"] == "VideoLDMFrameWindows":
            node["inputs"] |= {"length": FRAMES, "overlap": 1}
        if node["class_type"] == "VideoLDMPromptTravel":
            node["inputs"]["lines"] = "0: spring\n3: summer\n-1: winter"
    video, = video_of(server, client.run(prompt)).values()
    assert (video.width, video.frames) == SIZES[name]
    assert next(iter(video.iterate())).std() > 1


def unsaved(prompt):
    return {key: node for key, node in prompt.items() if node["class_type"] != "VideoLDMSaveVideo"}


def sampled(server, prompt, title="VideoLDMSampler"):
    return server.latent(unsaved(prompt), [key for key, node in prompt.items() if node["class_type"] == title][-1])


def without(prompt, kind):
    """The prompt without the nodes of a kind: what they were given goes on where their output went."""
    gone = {key: node["inputs"] for key, node in prompt.items() if node["class_type"] == kind}
    kept = {key: {**node, "inputs": dict(node["inputs"])} for key, node in prompt.items() if key not in gone}
    for node in kept.values():
        for entry, value in list(node["inputs"].items()):
            if isinstance(value, list) and value[0] in gone:
                passed = gone[value[0]]
                node["inputs"][entry] = passed.get("clip") if entry == "clip" else passed.get("model")
                if node["inputs"][entry] is None:
                    del node["inputs"][entry]
    return kept


@pytest.mark.slow
@pytest.mark.parametrize("name, kind", [("lora", "LoraLoader"), ("lora", "VideoLDMMotionLoRA"),
                                        ("few_steps", "LoraLoaderModelOnly"), ("few_steps", "ModelSamplingDiscrete"),
                                        ("v3_adapter", "LoraLoaderModelOnly")])
def test_what_a_graph_shows_acts_on_its_clip(server, client, name, kind):
    prompt = workflow(name, SIZE, FRAMES)
    acted = sampled(server, prompt)
    assert acted.isfinite().all() and not torch.equal(acted, sampled(server, without(prompt, kind)))


@pytest.mark.slow
def test_denoise_says_how_much_of_an_own_video_stays(server, client):
    prompt = workflow("video_to_video", SIZE, FRAMES, steps=10)
    encoder = next(key for key, node in prompt.items() if node["class_type"] == "VAEEncode")
    sampler = next(node for node in prompt.values() if node["class_type"] == "VideoLDMSampler")
    own = server.latent(unsaved(prompt), encoder)
    distances = []
    for denoise in (0.2, 0.55, 0.9):
        sampler["inputs"]["denoise"] = denoise
        distances.append(float((sampled(server, prompt) - own).square().mean()))
    assert distances == sorted(distances) and distances[0] < distances[2] / 2


@pytest.mark.slow
def test_freeu_acts_before_and_behind_the_layers_alike(server, client):
    """On the demo: FreeU acts on blocks of two and four times the first width, which the small checkpoint lacks."""
    prompt = workflow("quickstart", size=64, steps=4)
    plain = sampled(server, prompt)
    layers, sampler = (next(key for key, node in prompt.items() if node["class_type"] == kind)
                       for kind in ("VideoLDMLoadTemporalLayers", "VideoLDMSampler"))
    clips = []
    for node in (layers, sampler):
        free = workflow("quickstart", size=64, steps=4)
        free["free"] = {"class_type": "FreeU_V2", "inputs": {"model": free[node]["inputs"]["model"], "b1": 1.3,
                                                             "b2": 1.4, "s1": 0.9, "s2": 0.2}}
        free[node]["inputs"]["model"] = ["free", 0]
        clips.append(sampled(server, free))
    assert torch.equal(*clips) and not torch.equal(clips[0], plain)
