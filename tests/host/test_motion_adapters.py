"""Diffusers' motion adapters and AnimateDiff v3's domain adapter in a running ComfyUI."""

import pytest
import torch
from safetensors import safe_open

from video_ldm.tests.host import checkpoints
from video_ldm.tests.host.client import NodeError
from video_ldm.tests.host.graphs import FRAMES, MOTION, Graph, out
from video_ldm.tests.small import relative_error

ADAPTER = "adapter/diffusion_pytorch_model.fp16.safetensors"
LIGHTNING, DOMAIN = "animatediff_lightning_4step_diffusers.safetensors", "v3_sd15_adapter.safetensors"
LONG = 6        # frames: two windows of 4 that share 2


@pytest.fixture(scope="module", autouse=True)
def files(library):
    adapter = checkpoints.as_type(checkpoints.motion_adapter(), torch.float16)
    for name in (ADAPTER, LIGHTNING):
        library.save_model("video_ldm", name, adapter)
    for folder in ("loras", "video_ldm"):
        library.save_model(folder, DOMAIN, checkpoints.domain_adapter())
    return library


def clip(graph, model, file=ADAPTER, norms=None, **changes):
    return graph.clip(graph.layers(model, file, **({"norms": norms} if norms else {})), **changes)


def test_an_adapter_gives_the_frames_of_the_file_that_it_was_made_from_and_norms_change_them(server, client):
    """In half precision, as the checkpoint. A graph that was saved before `norms` came has none."""
    graph = Graph()
    model = graph.image_model()
    own, saved_before, *chosen = server.latents(graph, [
        clip(graph, model, MOTION), clip(graph, model),
        *(clip(graph, model, norms=norms) for norms in ("usual for the file", "each frame alone",
                                                        "pooled in the layers", "pooled in the image model"))])
    usual, each, in_layers, in_image_model = chosen
    assert torch.equal(saved_before, own) and torch.equal(usual, own) and torch.equal(each, own)
    assert relative_error(in_layers, own) > 1e-3 and relative_error(in_image_model, own) > 1e-3
    assert relative_error(in_layers, in_image_model) > 1e-3


@pytest.mark.parametrize("norms", ["each frame alone", "pooled in the image model"])
def test_windows_and_two_clips_in_a_batch_are_each_as_alone(server, client, norms):
    frames = torch.randn(2 * LONG, 4, 2, 3, generator=torch.Generator().manual_seed(3))
    names = [server.put_input_latent(f"adapter_{name}.latent", part)
             for name, part in (("both", frames), ("first", frames[:LONG]))]
    graph = Graph()
    video = graph.layers(graph.image_model(), ADAPTER, norms=norms)
    windows = graph.add("VideoLDMFrameWindows", model=video, mode="windows", length=FRAMES, overlap=2,
                        schedule="static", fuse="pyramid", max_distance=8)
    latents = [graph.add("LoadLatent", latent=name) for name in names]
    both, first, whole = server.latents(graph, [
        *(graph.clip(windows, frames=LONG, latent=latent, denoise=0.5) for latent in latents),
        graph.clip(video, frames=LONG, latent=latents[1], denoise=0.5)])
    assert len(both) == 2 * LONG and relative_error(both[:LONG], first) < 1e-5
    assert relative_error(both[LONG:], first) > 1e-2 and relative_error(first, whole) > 1e-3


def test_the_report_names_the_norms_and_what_the_files_name_says(server, client):
    graph = Graph()
    model = graph.image_model()
    shown = [graph.add("PreviewAny", source=out(graph.layers(model, file, norms=norms), 1))[0]
             for file, norms in ((ADAPTER, "usual for the file"), (LIGHTNING, "pooled in the layers"))]
    outputs = client.run(graph).outputs
    usual, lightning = (outputs[node]["text"][0] for node in shown)
    assert "an AnimateDiff motion adapter in diffusers' naming, 4 temporal layers" in usual
    assert "Each norm sees one frame, as the authors of AnimateDiff v2" in usual and "Lightning for" not in usual
    assert "Sample with euler, scheduler sgm_uniform, cfg 1, 4 steps." in lightning.splitlines()
    assert "The norms in the layers see all frames of a clip together, as in diffusers." in lightning.splitlines()


# The wrong node

def refusal(server, graph, node):
    with pytest.raises(NodeError) as caught:
        server.client.run(graph)
    assert (caught.value.node_id, caught.value.exception_type) == (node[0], "Video LDM")
    return caught.value.message


def show(graph, node):
    graph.add("PreviewAny", source=node)
    return graph, node


def test_an_adapter_in_a_wrong_node_is_named(server, client):
    for kind, inputs in (("VideoLDMMotionLoRA", {"strength": 1.0}), ("VideoLDMLoadVideoModel", {})):
        graph = Graph()
        sentence = refusal(server, *show(graph, graph.add(kind, file=LIGHTNING, **inputs)))
        assert sentence.startswith(f"{LIGHTNING} is an AnimateDiff motion adapter in diffusers' naming, not ")
        assert sentence.endswith("Load it with Load Temporal Layers.")


def test_the_domain_adapter_in_a_wrong_node_is_sent_to_load_lora(server, client):
    graph = Graph()
    layers = graph.layers(graph.image_model(), DOMAIN)
    sentences = [refusal(server, *show(graph, layers))]
    graph = Graph()
    sentences.append(refusal(server, *show(graph, graph.add("VideoLDMMotionLoRA", file=DOMAIN, strength=1.0))))
    for sentence in sentences:
        assert sentence.startswith(f"{DOMAIN} is the AnimateDiff v3 domain adapter (a LoRA for the image model), not ")
        assert "Load it with core's Load LoRA" in sentence


def test_norms_on_layers_of_another_kind_are_refused(server, client):
    graph = Graph()
    video = graph.layers(graph.image_model(), norms="pooled in the layers")
    assert "only motion modules of AnimateDiff's kind" in refusal(server, *show(graph, video))


# The domain adapter

def test_the_domain_adapter_is_merged_exactly_and_its_place_does_not_matter(server, client):
    strength = 0.5
    graph = Graph()
    model = graph.image_model()
    video = graph.layers(model, MOTION)
    before, after, without = server.latents(graph, [
        graph.clip(graph.layers(graph.lora(model, strength, DOMAIN), MOTION)),
        graph.clip(graph.lora(video, strength, DOMAIN)), graph.clip(video)])
    assert torch.equal(before, after) and relative_error(before, without) > 1e-3

    saving = Graph()
    model = saving.image_model()
    saving.add("ModelSave", model=model, filename_prefix="adapter/plain")
    saving.add("ModelSave", model=saving.lora(model, strength, DOMAIN), filename_prefix="adapter/merged")
    client.run(saving)
    plain, merged = (weights(server, name) for name in ("plain", "merged"))
    lora, changed = checkpoints.domain_adapter(), 0
    for key, weight in plain.items():
        name = diffusers_name(key)
        if f"{name}.up.weight" not in lora:
            assert torch.equal(merged[key], weight)
            continue
        exact = weight + strength * lora[f"{name}.up.weight"] @ lora[f"{name}.down.weight"]
        assert torch.allclose(merged[key], exact, rtol=0, atol=1e-6)
        changed += 1
    assert changed == len(lora) // 2 == 4 * 8


def weights(server, name):
    with safe_open(server.base / "output" / "adapter" / f"{name}_00001_.safetensors", framework="pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}


def diffusers_name(key):
    """The adapter's name for the patch of a weight of the checkpoint."""
    from comfy.utils import unet_to_diffusers
    names = {ours: theirs for theirs, ours in unet_to_diffusers(checkpoints.UNET).items()}
    stem = names.get(key.removeprefix(checkpoints.UNET_PREFIX), "").removesuffix(".weight").removesuffix(".0")
    return ".processor.to_".join(stem.rsplit(".to_", 1)) + "_lora"
