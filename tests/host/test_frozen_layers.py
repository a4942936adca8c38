"""MuseV's and makeavid-sd's layers in a running ComfyUI, beside what artists use with them, on small random files."""

import pytest
import torch

from video_ldm.tests.host import checkpoints
from video_ldm.tests.host.graphs import AS_MODEL, FRAMES, HEIGHT, WIDTH, Graph
from video_ldm.tests.small import relative_error

MUSEV, MAKEAVID, INPAINTING = "musev.bin", "makeavid.safetensors", "inpainting.safetensors"
MODELS = {MUSEV: "image.safetensors", MAKEAVID: INPAINTING}
each = pytest.mark.parametrize("file", MODELS)


@pytest.fixture(scope="module", autouse=True)
def files(library):
    half = torch.float16
    torch.save(checkpoints.as_type(checkpoints.musev_state(), half), library.model_path("video_ldm", MUSEV))
    library.save_model("video_ldm", MAKEAVID, checkpoints.as_type(checkpoints.makeavid_state(), half))
    library.save_model("diffusion_models", INPAINTING,
                       checkpoints.as_type(checkpoints.unet_state(in_channels=checkpoints.INPAINTING), half))
    return library


def known(graph, server, model, seed=3):
    """Context Frames with a random first frame."""
    generator = torch.Generator().manual_seed(seed)
    name = server.put_input_latent(f"first_{seed}.latent", torch.randn(1, 4, HEIGHT // 8, WIDTH // 8,
                                                                       generator=generator))
    latent = graph.add("LoadLatent", latent=name)
    return graph.add("VideoLDMContextFrames", model=model, frames="0", guidance=1.0, latent=latent)


@each
def test_strength_0_is_the_image_model(server, client, file):
    graph = Graph()
    image = graph.image_model(MODELS[file])
    off = graph.layers(image, file, strength=0.0, schedule=AS_MODEL)
    none, images = server.latents(graph, [graph.clip(off), graph.ksampler(image)])
    assert torch.equal(none, images)


@each
def test_a_first_frame_comes_out_as_it_went_in_and_moves_the_others(server, client, file):
    graph = Graph()
    video = graph.layers(graph.image_model(MODELS[file]), file)
    one, other, none = server.latents(graph, [graph.clip(known(graph, server, video)),
                                              graph.clip(known(graph, server, video, 4)), graph.clip(video)])
    first = torch.randn(1, 4, HEIGHT // 8, WIDTH // 8, generator=torch.Generator().manual_seed(3))
    assert torch.equal(one[:1], first)
    for frame in range(1, FRAMES):
        assert relative_error(one[frame], other[frame]) > 1e-3 and relative_error(one[frame], none[frame]) > 1e-3


@each
def test_layer_strength_acts(server, client, file):
    graph = Graph()
    image = graph.image_model(MODELS[file])
    fading = graph.add("VideoLDMLayerStrength", model=graph.layers(image, file), curve="1, 0.5, 0.2, 0",
                       interpolation="linear")
    faded, images = server.latents(graph, [graph.clip(fading), graph.clip(graph.layers(image, file, strength=0.0))])
    assert torch.equal(faded[-1], images[-1]) and relative_error(faded[1], images[1]) > 1e-3


def test_an_inpainting_checkpoint_made_by_core_s_merge_nodes_takes_the_layers(server, client):
    """Inpainting minus the plain model, and the artist's added: what their page calls an inpainting merge."""
    graph = Graph()
    difference = graph.add("ModelMergeSubtract", model1=graph.image_model(INPAINTING), model2=graph.image_model(),
                           multiplier=1.0)
    own = graph.add("ModelMergeAdd", model1=difference, model2=graph.image_model("second.safetensors"))
    clip = graph.clip(known(graph, server, graph.layers(own, MAKEAVID)))
    plain = graph.clip(known(graph, server, graph.layers(graph.image_model(INPAINTING), MAKEAVID)))
    merged, other = server.latents(graph, [clip, plain])
    assert merged.isfinite().all() and relative_error(merged, other) > 1e-3
