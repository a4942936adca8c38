"""What a running ComfyUI refuses.

One sentence appears at the node where the mistake was made. Nothing stays behind.
"""

import pytest
import torch

from video_ldm.tests.host import checkpoints
from video_ldm.tests.host.client import NodeError
from video_ldm.tests.host.graphs import MOTION, MOTION_LORA, VIDEO, Graph

SPOILT = {      # files that are no model at all, and words of the sentences that refuse them
    "page.ckpt": "is a web page", "empty.safetensors": "is empty", "cut.safetensors": "only partly downloaded",
    "code.ckpt": "needs Python code", "bare.ckpt": "needs Python code"}
OTHERS = {      # files of another kind, and what they are called
    "vae.safetensors": "a VAE", "cnet.safetensors": "a ControlNet",
    "image_lora.safetensors": "a LoRA for an image model",
    "checkpoint.safetensors": "a whole Stable Diffusion 1.x checkpoint", MOTION_LORA: "a Motion LoRA"}


@pytest.fixture(scope="module")
def wrong_files(library):
    """Every wrong file, in the folder of temporal layers."""
    folder = library.model_path("video_ldm", VIDEO).parent
    checkpoints.write_spoilt_files(folder)
    for name, state in {"vae.safetensors": checkpoints.vae_state(), "cnet.safetensors": checkpoints.controlnet_names(),
                        "image_lora.safetensors": checkpoints.image_lora(), "svd.safetensors": checkpoints.svd_state(),
                        "checkpoint.safetensors": checkpoints.checkpoint_state(),
                        "learned.safetensors": checkpoints.motion_state(learned=True)}.items():
        library.save_model("video_ldm", name, state)
    checkpoints.write_video_layers(folder / "vector.safetensors", mix_length=checkpoints.FRAMES)
    return library


@pytest.fixture(scope="module")
def wrong_models(library):
    """Image models that temporal layers for Stable Diffusion 1.x do not fit."""
    for name, state in (("sd2", checkpoints.sd2_state()), ("sdxl", checkpoints.sdxl_state()),
                        ("sd3", checkpoints.sd3_state())):
        library.save_model("diffusion_models", f"{name}.safetensors", checkpoints.as_type(state, torch.float16))
    return library


def refused(server, graph, node, at):
    """The sentence with which a node refuses. The server must be as ready as before."""
    with pytest.raises(NodeError) as caught:
        server.latent(graph, node[0])
    error = caught.value
    assert (error.node_id, error.exception_type) == (at[0], "Video LDM")
    assert "\n" not in error.message and 40 < len(error.message) < 500 and error.message.endswith(".")
    assert not any(word in error.message for word in ("Traceback", "Error(", "size mismatch", "KeyError", "torch."))
    assert server.client.json("/queue") == {"queue_running": [], "queue_pending": []}
    return error.message


def refused_file(server, file):
    graph = Graph()
    video = graph.layers(graph.image_model(), file)
    return refused(server, graph, graph.clip(video), at=video)


@pytest.mark.parametrize("file", SPOILT)
def test_a_file_that_is_no_model_is_refused_at_the_loader(server, client, wrong_files, file):
    sentence = refused_file(server, file)
    assert sentence.startswith(file) and SPOILT[file] in sentence
    assert "this must never run" not in server.log_text()


@pytest.mark.parametrize("file", OTHERS)
def test_a_file_of_another_kind_is_refused_with_what_it_is_and_where_it_belongs(server, client, wrong_files, file):
    sentence = refused_file(server, file)
    assert sentence.startswith(f"{file} is {OTHERS[file]}") and "oad " in sentence


def test_the_temporal_part_of_stable_video_diffusion_is_refused_on_an_image_model_because_of_its_scaling(
        server, client, wrong_files):
    sentence = refused_file(server, "svd.safetensors")
    assert sentence.startswith("svd.safetensors is the temporal part of Stable Video Diffusion") and "EDM" in sentence


def test_temporal_layers_are_no_motion_lora(server, client, library):
    graph = Graph()
    lora = graph.add("VideoLDMMotionLoRA", file=MOTION, strength=1.0)
    clip = graph.clip(graph.layers(graph.image_model(), MOTION, motion_lora=lora))
    assert "not a Motion LoRA" in refused(server, graph, clip, at=lora)


def test_a_motion_lora_is_refused_on_layers_that_it_does_not_patch(server, client, library):
    graph = Graph()
    lora = graph.add("VideoLDMMotionLoRA", file=MOTION_LORA, strength=1.0)
    video = graph.layers(graph.image_model(), VIDEO, motion_lora=lora)
    sentence = refused(server, graph, graph.clip(video), at=video)
    assert sentence.startswith(MOTION_LORA) and "AnimateDiff" in sentence


@pytest.mark.parametrize("name, called", [("sd2", "Stable Diffusion 2.x"), ("sdxl", "Segmind_Vega"), ("sd3", "SD3")])
@pytest.mark.parametrize("file", [VIDEO, MOTION])
def test_a_model_that_the_layers_do_not_fit_is_refused_at_the_loader(server, client, wrong_models, name, called, file):
    graph = Graph()
    video = graph.layers(graph.image_model(f"{name}.safetensors"), file)
    sentence = refused(server, graph, graph.clip(video), at=video)
    assert called in sentence and ("no Stable Diffusion UNet" in sentence or file in sentence)


@pytest.mark.parametrize("first", ["TorchCompileModel", "temporal layers"])
def test_a_compiled_model_is_refused_whether_compiled_before_or_after(server, client, library, first):
    graph = Graph()
    model = graph.image_model()
    if first == "TorchCompileModel":
        video = at = graph.layers(graph.add("TorchCompileModel", model=model, backend="inductor"))
        clip = graph.clip(video)
    else:
        video = graph.add("TorchCompileModel", model=graph.layers(model), backend="inductor")
        clip = at = graph.clip(video)
    assert "TorchCompileModel" in refused(server, graph, clip, at=at)


def test_a_model_without_temporal_layers_is_refused_by_the_sampler(server, client, library):
    graph = Graph()
    clip = graph.clip(graph.image_model())
    assert "has no temporal layers" in refused(server, graph, clip, at=clip)


def test_a_denoise_below_1_without_a_latent_is_refused(server, client, library):
    graph = Graph()
    clip = graph.clip(graph.layers(graph.image_model()), denoise=0.5)
    assert "denoise is 0.5" in refused(server, graph, clip, at=clip)


def test_a_latent_that_is_no_whole_number_of_clips_is_refused(server, client, library):
    graph = Graph()
    clip = graph.clip(graph.layers(graph.image_model()), latent=graph.empty_latent(6))
    assert "6 frames, which do not divide into clips of 4" in refused(server, graph, clip, at=clip)


def test_a_batch_of_a_core_sampler_that_is_no_whole_number_of_clips_is_refused(server, client, library):
    graph = Graph()
    clip = graph.ksampler(graph.layers(graph.image_model(), frames_per_clip=3))
    assert "batch of 4 frames does not divide into clips of 3" in refused(server, graph, clip, at=clip)


@pytest.mark.parametrize("file, words", [("learned.safetensors", "learned table of 32 frame positions"),
                                         ("vector.safetensors", "clips of exactly 4 frames, and the clip has 33")])
def test_more_frames_than_the_layers_can_place_in_time_are_refused_by_loader_and_sampler(
        server, client, wrong_files, file, words):
    graph = Graph()
    model = graph.image_model()
    clip = graph.clip(graph.layers(model, file), frames=33)
    assert words in refused(server, graph, clip, at=clip)
    video = graph.layers(model, file, frames_per_clip=33)
    assert "frames_per_clip is 33" in refused(server, graph, graph.clip(video), at=video)


def test_a_clip_runs_after_all_these_refusals_as_if_there_had_been_none(server, client, wrong_files):
    def frames():
        graph = Graph()
        return server.latent(graph, graph.clip(graph.layers(graph.image_model()))[0])
    before = frames()
    for file in ("page.ckpt", "vae.safetensors"):
        refused_file(server, file)
    client.request("/free", {"free_memory": True})
    assert torch.equal(frames(), before)
