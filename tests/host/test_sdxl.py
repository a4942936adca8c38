"""Motion modules for SDXL on a checkpoint of SDXL's kind, in a running ComfyUI.

The checkpoint is the smallest that ComfyUI takes for SDXL, with SDXL's own channels. Most of its weights are zero: a
ResBlock or transformer then passes its input on, so that what the motion modules add reaches the output.
"""

import pytest
import torch

from video_ldm.tests.formats_help import motion_shapes, motion_tensors
from video_ldm.tests.host.client import NodeError
from video_ldm.tests.host.graphs import AS_TRAINED, IMAGE, Graph, out
from video_ldm.tests.small import relative_error, unet_model

CHECKPOINT, BETA, HOTSHOT = "sdxl_wide.safetensors", "mm_sdxl_v10_beta.safetensors", "hsxl_temporal_layers.safetensors"
FRAMES, TEXT, POOLED = 3, 2048, 1280
CONFIG = dict(image_size=32, in_channels=4, out_channels=4, model_channels=320, num_res_blocks=[2, 2, 2],
              channel_mult=(1, 2, 4), use_spatial_transformer=True, legacy=False, num_heads=-1, num_head_channels=64,
              context_dim=TEXT, use_linear_in_transformer=True, adm_in_channels=2816, num_classes="sequential",
              transformer_depth=[0, 0, 1, 1, 2, 2], transformer_depth_middle=-1,
              transformer_depth_output=[0, 0, 0, 1, 1, 1, 2, 2, 2])
PASSING = ("skip_connection.weight", ".op.weight", ".conv.weight", "input_blocks.0.0.weight", "out.2.weight")


def sdxl_checkpoint() -> dict:
    generator, state = torch.Generator().manual_seed(0), {}
    for key, value in unet_model(CONFIG, device="meta").state_dict().items():
        state[key] = torch.zeros(value.shape, dtype=torch.float16)
        if key.endswith(PASSING):
            spread = torch.Size(value.shape[1:]).numel() ** -0.5
            state[key] = (torch.randn(value.shape, generator=generator) * spread).half()
        elif value.ndim == 1 and key.endswith("weight"):
            state[key] += 1
    return state


def motion_file(table: int) -> dict:
    """Random motion modules for it: their last layer is small, so that half precision holds what they add."""
    tensors = motion_tensors(motion_shapes((320, 640, 1280), 2, False, table), dtype=torch.float16)
    return {key: tensor if key.endswith(".pe") else tensor * tensor[0].numel() ** -0.5
            for key, tensor in tensors.items()}


@pytest.fixture(scope="module")
def sdxl(library):
    from video_ldm.tests.host.graphs import write_text
    library.save_model("diffusion_models", CHECKPOINT, sdxl_checkpoint())
    library.save_model("video_ldm", BETA, motion_file(32))
    library.save_model("video_ldm", HOTSHOT, {
        key.replace("motion_modules", "temporal_attentions").replace(".temporal_transformer", "")
        .replace("pos_encoder.pe", "pos_encoder.positional_encoding"): tensor
        for key, tensor in motion_file(24).items()})
    generator = torch.Generator().manual_seed(5)
    write_text(library, "sdxl text", [[torch.randn(1, 7, TEXT, generator=generator),
                                       {"pooled_output": torch.randn(1, POOLED, generator=generator)}]])
    return library


def sampled(file=None, strength=1.0):
    graph = Graph()
    text = graph.text("sdxl text")
    model = graph.image_model(CHECKPOINT)
    model = graph.layers(model, file, strength, AS_TRAINED) if file else model
    return graph, graph.ksampler(model, text, text, frames=FRAMES, steps=1, cfg=1.0), model


@pytest.mark.slow
@pytest.mark.parametrize("file, schedule, frames", [(BETA, "linear 0.00085 to 0.02", 16),
                                                    (HOTSHOT, "linear 0.00085 to 0.012", 8)])
def test_motion_modules_for_sdxl_act_on_an_sdxl_checkpoint_and_leave_it_as_it_was(sdxl, client, file, schedule, frames):
    graph, plain, _ = sampled()
    before = sdxl.latent(graph, plain[0])
    graph, clip, model = sampled(file)
    report = graph.add("PreviewAny", source=out(model, 1))
    result = client.run(graph)
    said = result.outputs[report[0]]["text"][0]
    assert f"Trained on clips of {frames} frames at 8 frames per second." in said and schedule in said
    with_layers = sdxl.latent(sampled(file)[0], clip[0])
    assert with_layers.isfinite().all() and relative_error(with_layers, before) > 1e-3
    graph, silent, _ = sampled(file, 0.0)
    if file == HOTSHOT:         # its schedule is SDXL's own, so that strength 0 is the image model to the bit
        assert torch.equal(sdxl.latent(graph, silent[0]), before)
    graph, again, _ = sampled()
    assert torch.equal(sdxl.latent(graph, again[0]), before)


@pytest.mark.slow
def test_files_for_sdxl_and_for_stable_diffusion_1_are_not_mixed_up(sdxl, client):
    graph = Graph()
    clip = graph.ksampler(graph.layers(graph.image_model(IMAGE), BETA), frames=FRAMES)
    with pytest.raises(NodeError, match="AnimateDiff SDXL beta motion module, made for SDXL, and the connected MODEL "
                                        "is Stable Diffusion 1.x: its text has a width of 768 instead of 2048"):
        sdxl.latent(graph, clip[0])
