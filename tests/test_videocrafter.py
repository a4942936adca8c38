"""VideoCrafter's networks: files, against the reference network and against outputs of the published code.

tests/fixtures/videocrafter.json holds what the published code gives for `clips()` with the weights of `filled`: every
7th number.
"""

import json
from pathlib import Path

import comfy.ops
import comfy.sample
import comfy.supported_models
import pytest
import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from comfy_extras.nodes_model_advanced import ModelSamplingDiscrete

from video_ldm.nodes.host.video_network import load_video_network, report_of, unet_config
from video_ldm.temporal.call import CallSettings, open_call
from video_ldm.temporal.diffusion import DataScale
from video_ldm.temporal.errors import VideoLDMError
from video_ldm.temporal.families import identify_keys, load_temporal, load_video_model, videocrafter
from video_ldm.temporal.formats.files import TensorFile
from video_ldm.temporal.stack import TemporalStack
from video_ldm.tests.formats_help import PUBLISHED, saved
from video_ldm.tests.host import checkpoints
from video_ldm.tests.reference_videocrafter import PUBLISHED_NAMES, VideoCrafter, checkpoint, scale_table
from video_ldm.tests.small import randomise, relative_error

KINDS = list(PUBLISHED_NAMES)
COUNTS = {"videocrafter2": 1484, "videocrafter1_512": 1196, "videocrafter1_1024": 1200}
SMALL = dict(channels=(64, 128), resblocks=1, attention=(True, False))
RECORDED = Path(__file__).parent / "fixtures" / "videocrafter.json"
CLIPS, FRAMES, TIMESTEP, RATES = 2, 3, 480, (8, 28)


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def reference(kind):
    return randomise(VideoCrafter(kind, **SMALL)).eval()


@pytest.fixture(scope="module")
def path(kind, reference, tmp_path_factory):
    """A UNet alone."""
    return saved(tmp_path_factory.mktemp(kind), "unet.safetensors", reference.state_dict())


def core_unet(network):
    """ComfyUI's UNet and the stack of a file, as Load Video Model puts them together."""
    unet = UNetModel(**unet_config(network), dtype=torch.float32, operations=comfy.ops.disable_weight_init)
    unet.load_state_dict(network.read_spatial())
    stack = TemporalStack(network.layers.params)
    stack.load_state_dict(network.layers.tensors)
    return unet, stack


@torch.no_grad()
def predicted(unet, stack, x, text, rates):
    """What the network predicts for clips `b t c h w` that are told these frame rates."""
    frames = x.shape[1]
    settings = CallSettings(frames, told_fps=rates)
    context = text.repeat_interleave(frames, 0)
    with open_call(unet, [(stack, settings)], context):
        out = unet(x.flatten(0, 1), torch.full((len(context),), float(TIMESTEP)), context=context)
    return out.unflatten(0, x.shape[:2])


def clips(frames=FRAMES, height=8, width=4):
    """Latents `b t c h w` and text of two clips, alike on every machine."""
    x = wave((CLIPS, frames, 4, height, width), 99) * 12
    return x.float(), (wave((CLIPS, 7, 1024), 98) * 50).float()


def wave(shape, number):
    """Numbers that every machine computes alike, spread as weights of this shape are."""
    count = torch.Size(shape).numel()
    values = torch.sin(torch.arange(count, dtype=torch.float64) * 0.7548776662466927 * (number + 1) + number)
    return values.reshape(shape) * ((count // shape[0]) ** -0.5 * 1.4 if len(shape) > 1 else 0.2)


def filled(state):
    """The same weights for each name of a state dict."""
    return {key: (wave(tuple(state[key].shape), number) + ("norm" in key and key.endswith("weight"))).float()
            for number, key in enumerate(sorted(state))}


# The network

def error(ours, reference):
    """The largest difference, as a share of the output's range."""
    return float((ours - reference).abs().max() / (reference.max() - reference.min()))


@pytest.mark.parametrize("frames", [1, 5, 20])
@torch.no_grad()
def test_two_clips_with_two_frame_rates_are_the_reference_networks(path, reference, frames):
    """20 frames are farther apart than the tables of relative positions reach."""
    x, text = clips(frames, 4, 4) if frames == 20 else clips(frames)
    ours = predicted(*core_unet(load_video_model(path)), x, text, torch.tensor(RATES))
    wanted = torch.stack([reference(x[n], TIMESTEP, text[n], RATES[n]) for n in range(CLIPS)])
    assert error(ours, wanted) < 1e-5


def test_the_output_is_that_of_the_published_code(kind, tmp_path):
    """Recorded with the authors' own module: the reference network could be wrong where this pack is."""
    weights = filled(VideoCrafter(kind, **SMALL).state_dict())
    network = load_video_model(saved(tmp_path, "unet.safetensors", weights))
    ours = predicted(*core_unet(network), *clips(), torch.tensor(RATES)).flatten()[::7]
    assert error(ours, torch.tensor(json.loads(RECORDED.read_text())[kind])) < 1e-5


def test_the_frame_rate_counts_where_the_network_is_told_it(kind, path):
    unet, stack = core_unet(load_video_model(path))
    x, text = clips()
    slow, fast, unsaid = (predicted(unet, stack, x, text, rate) for rate in (8.0, 28.0, None))
    assert torch.equal(fast, unsaid)                            # the authors tell 28
    if kind == "videocrafter1_512":
        assert torch.equal(slow, fast)
    else:
        assert relative_error(slow, fast) > 1e-3
        each = predicted(unet, stack, x, text, torch.tensor([8.0, 28.0]))
        assert relative_error(each[0], slow[0]) < 1e-5 and relative_error(each[1], fast[1]) < 1e-5


def test_attention_in_half_precision_is_computed_as_core_does_for_stable_diffusion_2(path):
    """Its keys and queries overflow in fp16. core: `attn_precision` of its class SD20."""
    unet, _ = core_unet(load_video_model(path))
    found = {module.attn_precision for module in unet.modules() if hasattr(module, "attn_precision")}
    assert found == {comfy.supported_models.SD20.unet_extra_config["attn_precision"]} == {torch.float32}


# Files

def published_file(kind, extra=()):
    """An open file with the published names and shapes, and no numbers."""
    shapes = {key.removeprefix("model.diffusion_model."): tuple(shape)
              for key, shape in PUBLISHED[PUBLISHED_NAMES[kind]].items()} | dict(extra)
    return TensorFile(Path("model.ckpt"), shapes, {}, tuple(shapes),
                      lambda keys: {key: torch.empty(shapes[key], device="meta") for key in keys})


def test_the_published_files_load_complete(kind):
    file = published_file(kind)
    network = videocrafter.load(file, identify_keys(file.shapes))
    used = set(network.spatial_names.values())
    assert len(file.shapes) == COUNTS[kind] == len(used) + len(network.layers.tensors)
    assert network.layers.kind == kind
    config = unet_config(network)       # refuses any difference to ComfyUI's own UNet
    assert (config["num_head_channels"], config["context_dim"], config["use_linear_in_transformer"]) == (64, 1024, True)
    slots = [site.slot for site, _ in network.layers.params.bricks]
    assert [slots.count(slot) for slot in ("post_conv_in", "post_res", "post_attn")] == [
        1, 22 if kind == "videocrafter2" else 0, 16]


def test_the_reference_network_has_the_published_names(kind):
    with torch.device("meta"):
        state = VideoCrafter(kind).state_dict()
    assert {key: tuple(value.shape) for key, value in state.items()} == published_file(kind).shapes


@pytest.mark.parametrize("wrap, ending", [
    (lambda state: {"state_dict": state, "global_step": 3}, "ckpt"), (lambda state: state, "safetensors"),
    (lambda state: {"module": {f"_forward_module.{key}": value for key, value in state.items()}}, "pt")])
def test_a_whole_checkpoint_is_the_same_network_and_names_its_schedule(kind, reference, path, tmp_path, wrap, ending):
    whole = checkpoint(kind, reference.state_dict())
    found = load_video_model(saved(tmp_path, f"model.{ending}", wrap(whole)))
    alone = load_video_model(path)
    x, text = clips()
    assert torch.equal(predicted(*core_unet(found), x, text, 8.0), predicted(*core_unet(alone), x, text, 8.0))
    assert found.layers.schedule == alone.layers.schedule
    missing = "The file holds no noise schedule. The published one is used."
    beside = "The VAE and the text encoder in the file are not used."
    assert [note in alone.layers.notes for note in (missing, beside)] == [True, False]
    assert [note in found.layers.notes for note in (missing, beside)] == [False, True]


def test_of_a_whole_checkpoint_the_vae_and_the_text_encoder_are_not_read(reference, tmp_path, kind):
    whole = checkpoint(kind, reference.state_dict())
    whole["first_stage_model.decoder.conv_in.weight"].fill_(float("nan"))       # reading it would be refused
    found = load_video_model(saved(tmp_path, "model.safetensors", whole))
    assert found.layers.kind == kind and len(found.read_spatial()) + len(found.layers.tensors) == len(
        reference.state_dict())


SCALES = {"videocrafter2": DataScale(0.7), "videocrafter1_1024": DataScale(0.3), "videocrafter1_512": None}


def test_the_facts_are_the_published_ones(kind, path):
    network = load_video_model(path)
    layers = network.layers
    assert (layers.schedule.beta_schedule, layers.schedule.linear_start, layers.schedule.linear_end,
            layers.schedule.prediction, layers.schedule.scale) == ("linear", 0.00085, 0.012, "eps", SCALES[kind])
    assert (network.text.name, network.text.width, layers.params.frames) == ("OpenCLIP-H", 1024, 16)
    assert layers.params.usual_fps == (None if kind == "videocrafter1_512" else 28.0)
    assert "research" in layers.licence
    with pytest.raises(VideoLDMError, match="unet.safetensors is VideoCrafter.'s text-to-video network.*, not a file "
                                            "of temporal layers .* Its spatial layers were trained together with its "
                                            "temporal layers, so .* noise. Load it with Load Video Model.$"):
        load_temporal(path)


@pytest.mark.parametrize("told, words", [
    (0, "It is told 28 frames per second, and its clips play at 10. So do its authors."),
    (12, "It is told 12 frames per second, and its clips play at 12.")])
def test_the_report_names_the_frame_rates_the_text_encoder_and_the_schedule(kind, path, told, words):
    report = report_of(load_video_model(path), told)
    assert "Text: OpenCLIP-H. Use the CLIP of a Stable Diffusion 2.x checkpoint." in report
    if kind == "videocrafter1_512":
        assert f"at {told or 10} frames per second" in report and "scaled" not in report
    else:
        assert words in report
        assert f"latents scaled down to {SCALES[kind].last:g}. Prediction: eps." in report


def one_kind(kind):
    """Tests of what is the same for all versions run on one."""
    return pytest.mark.parametrize("kind", [kind], indirect=True, scope="module")


@one_kind("videocrafter2")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_file_with_another_scale_brings_its_own(kind, reference, tmp_path, dtype):
    whole = checkpoint(kind, reference.state_dict())
    whole["scale_arr"] = scale_table("videocrafter1_1024").to(dtype)
    whole["betas"] = whole["betas"].to(dtype)
    path = saved(tmp_path, "model.safetensors", whole)
    if dtype is torch.float32:
        assert load_video_model(path).layers.schedule.scale == DataScale(0.3)
    whole["scale_arr"] = scale_table(kind).to(dtype)
    assert load_video_model(saved(tmp_path, "model.safetensors", whole)).layers.schedule.scale == DataScale(0.7)
    del whole["scale_arr"]
    assert load_video_model(saved(tmp_path, "model.safetensors", whole)).layers.schedule.scale is None


@one_kind("videocrafter2")
@pytest.mark.parametrize("table, values", [
    ("scale_arr", torch.linspace(1, 0.5, 1400) ** 2), ("scale_arr", torch.zeros(1400)), ("scale_arr", torch.ones(3, 3)),
    ("scale_arr", torch.ones(5)), ("scale_arr", torch.zeros(1400, dtype=torch.int64)),
    ("betas", torch.linspace(0.00085, 0.012, 1000)), ("betas", torch.ones(3))])
def test_a_noise_schedule_that_nobody_published_is_refused(kind, reference, tmp_path, table, values):
    whole = checkpoint(kind, reference.state_dict()) | {table: values}
    with pytest.raises(VideoLDMError, match=rf"model.safetensors is VideoCrafter2's text-to-video network, but its "
                                            rf"noise schedule is none that this pack knows \(the tensor {table}\)."):
        load_video_model(saved(tmp_path, "model.safetensors", whole))


@one_kind("videocrafter2")
@pytest.mark.parametrize("gone", [
    "fps_embedding.0.weight", "fps_embedding.2.bias", "init_attn.0.", "middle_block.2.", "middle_block.3.",
    "output_blocks.0.0.temopral_conv.", "input_blocks.1.2.transformer_blocks.0.attn2.to_q.weight", "time_embed.0.bias",
    "input_blocks.1.2.", "output_blocks.1.1.conv.weight"])
def test_an_incomplete_file_is_refused(kind, reference, tmp_path, gone):
    cut = {key: value for key, value in reference.state_dict().items() if not key.startswith(gone)}
    path = saved(tmp_path, "model.safetensors", cut)
    with pytest.raises(VideoLDMError, match="model.safetensors"):
        unet_config(load_video_model(path))


@one_kind("videocrafter2")
def test_an_embedding_of_the_frame_rate_that_does_not_fit_the_timesteps_is_refused(kind, reference, tmp_path):
    other = {key: torch.zeros(*[128] * (value.ndim - 1), 128) for key, value in reference.state_dict().items()
             if key.startswith("fps_embedding.")}
    path = saved(tmp_path, "model.safetensors", reference.state_dict() | other)
    with pytest.raises(VideoLDMError, match=r"but its embedding of the frame rate has 128 numbers where that of the "
                                            r"timestep has 256"):
        load_video_model(path)


@one_kind("videocrafter1_1024")
@pytest.mark.parametrize("more", ["input_blocks.1.3.weight", "middle_block.2.in_layers.0.weight", "label_emb.0.weight",
                                  "input_blocks.0.1.proj_in.weight", "fps_embedding.4.weight"])
def test_a_file_with_more_than_the_network_is_refused(kind, reference, tmp_path, more):
    whole = reference.state_dict() | {more: torch.zeros(64)}
    with pytest.raises(VideoLDMError, match="model.safetensors looks like VideoCrafter1's"):
        unet_config(load_video_model(saved(tmp_path, "model.safetensors", whole)))


def test_image_to_video_files_are_refused_by_name():
    found = identify_keys(PUBLISHED["videocrafter_i2v_512_v1.0"])
    assert (found.kind, found.takes, found.title) == (
        "videocrafter_i2v", None, "a VideoCrafter image-to-video checkpoint")
    crafter = {key: (320, 8, 3, 3) if key.endswith("input_blocks.0.0.weight") else shape
               for key, shape in PUBLISHED["videocrafter_i2v_512_v1.0"].items()}
    found = identify_keys(crafter)
    assert (found.kind, found.takes) == ("dynamicrafter", None) and "DynamiCrafter" in found.title


# In ComfyUI

def published_chain(reference, noise, text, negative, cfg, steps, scale, fps):
    """The published sampler at eta 0, from noise of the first step's level to the last step's clean latents."""
    alphas = torch.cumprod(1 - torch.linspace(0.00085 ** 0.5, 0.012 ** 0.5, 1000, dtype=torch.float64) ** 2, 0)
    x = (1 - alphas[steps[0]]).sqrt() * noise.double()
    for t, before in zip(steps, (*steps[1:], 0)):
        with torch.no_grad():
            cond, uncond = (reference(x.float(), t, words, fps).double() for words in (text, negative))
        eps = uncond + cfg * (cond - uncond)
        clean = (x - (1 - alphas[t]).sqrt() * eps) / alphas[t].sqrt() / scale[t]
        x = alphas[before].sqrt() * scale[before] * clean + (1 - alphas[before]).sqrt() * eps
    return clean


@pytest.mark.parametrize("fps, told", [(0, 28), (6, 6)])
def test_core_samples_what_the_published_sampler_samples(kind, path, reference, fps, told):
    """KSampler with cfg: the whole of schedule, scale, frame rate, text and network. Nothing is left afterwards."""
    model = load_video_network(load_video_model(path), fps)
    texts = [checkpoints.conditioning(seed, width=1024) for seed in (1, 2)]
    noise = torch.randn(4, 4, 4, 4, generator=torch.Generator().manual_seed(3))
    ours = comfy.sample.sample(model, noise, 5, 2.0, "euler", "ddim_uniform", *texts, torch.zeros_like(noise), seed=7,
                               disable_pbar=True)
    table = scale_table(kind)
    scale = torch.ones(1000) if table is None else table
    wanted = published_chain(reference, noise, *(item[0][0][0] for item in texts), 2.0, (801, 601, 401, 201, 1), scale,
                             told)
    assert error(ours.double() * 0.18215, wanted) < 1e-4
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.model.modules())


@one_kind("videocrafter1_1024")
def test_a_node_behind_load_video_model_keeps_the_scale(kind, path):
    model = load_video_network(load_video_model(path))
    texts = [checkpoints.conditioning(seed, width=1024) for seed in (1, 2)]
    noise = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(3))

    def sampled(video):
        return comfy.sample.sample(video, noise, 2, 1.0, "euler", "ddim_uniform", *texts, torch.zeros_like(noise),
                                   seed=7, disable_pbar=True)
    assert relative_error(sampled(ModelSamplingDiscrete().patch(model, "eps", False)[0]), sampled(model)) < 1e-5
    with pytest.raises(VideoLDMError, match="unet.safetensors was trained to predict noise in latents that are scaled"):
        sampled(ModelSamplingDiscrete().patch(model, "v_prediction", False)[0])


@one_kind("videocrafter2")
def test_the_packs_sampler_plays_at_one_rate_and_tells_another(kind, path):
    """Video LDM Sampler sets the clips' own rate. The network is still told its own."""
    from video_ldm.nodes.sample import VideoLDMSampler
    texts = [checkpoints.conditioning(seed, width=1024) for seed in (1, 2)]

    def sampled(fps):
        model = load_video_network(load_video_model(path), fps)
        latent, rate = VideoLDMSampler.execute(model, *texts, 3, 32, 32, 1, 5, 2, 1.0, "euler", "ddim_uniform",
                                               1.0).result
        return latent["samples"], rate
    usual, rate = sampled(0)
    assert rate == 10
    told, rate = sampled(28)
    assert rate == 28 and torch.equal(told, usual)
    other, rate = sampled(10)
    assert rate == 10 and relative_error(other, usual) > 1e-3


@one_kind("videocrafter2")
def test_text_of_another_encoder_is_refused_with_the_right_one(kind, path):
    model = load_video_network(load_video_model(path))
    noise = torch.zeros(2, 4, 4, 4)
    words = checkpoints.conditioning(1, width=768)
    with pytest.raises(VideoLDMError, match="the CLIP of a Stable Diffusion 2.x checkpoint"):
        comfy.sample.sample(model, noise, 1, 1.0, "euler", "normal", words, words, noise, disable_pbar=True)
