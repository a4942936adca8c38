"""ModelScope's network and ZeroScope, in both layouts, against diffusers' UNet3DConditionModel on random weights."""

import re
from dataclasses import replace
from pathlib import Path

import comfy.samplers
import pytest
import torch

from video_ldm.nodes.host.options import with_clip_options
from video_ldm.nodes.host.video_network import load_video_network, report_of, unet_config
from video_ldm.temporal.call import CallSettings, open_call
from video_ldm.temporal.errors import VideoLDMError
from video_ldm.temporal.families import identify_keys, load_temporal, load_video_model, modelscope
from video_ldm.temporal.formats.files import TensorFile
from video_ldm.temporal.formats.temporal_file import Base, Schedule
from video_ldm.temporal.layers import (
    ClipTransformer,
    ClipTransformerParams,
    Factory,
    GivenCall,
    StagedConv,
    StagedConvParams,
)
from video_ldm.temporal.slots import Site, unet_sites
from video_ldm.temporal.stack import TemporalStack
from video_ldm.tests.formats_help import PUBLISHED, saved
from video_ldm.tests.small import SD15, batch, randomise, relative_error, unet_model

TEXT, FRAMES, SIGMA = 1024, 5, 2.0
OWN, DIFFUSERS = "modelscope_t2v", "diffusers_unet3d_modelscope"
LEVELS, DEPTH = (64, 64, 128), 1        # a network with three levels and one ResBlock each


# Files

def diffusers_network(levels=LEVELS, depth=DEPTH, **options):
    """diffusers' network with random weights. The lowest level has no transformers, as published."""
    from diffusers import UNet3DConditionModel
    crossing = len(levels) - 1
    return UNet3DConditionModel(
        block_out_channels=levels, layers_per_block=depth, cross_attention_dim=TEXT,
        down_block_types=("CrossAttnDownBlock3D",) * crossing + ("DownBlock3D",),
        up_block_types=("UpBlock3D",) + ("CrossAttnUpBlock3D",) * crossing, **options).eval()


@pytest.fixture(scope="module")
def reference():
    return randomise(diffusers_network())


RESBLOCK = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
            "conv2": "out_layers.3", "conv_shortcut": "skip_connection"}
ENDS = {"conv_in": "input_blocks.0.0", "transformer_in": "input_blocks.0.1", "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2", "conv_norm_out": "out.0", "conv_out": "out.2"}
MODULES = {"resnets": 0, "temp_convs": 0, "attentions": 1, "temp_attentions": 2}


def own_name(key: str, depth: int) -> str:
    """The authors' name of a tensor in diffusers' naming, from the order of modules in the authors' blocks."""
    for theirs, ours in ENDS.items():
        if key.startswith(theirs + "."):
            return ours + key.removeprefix(theirs)
    match = re.fullmatch(r"(?:(down|up)_blocks\.(\d)|mid_block)\.(\w+)\.(\d)\.(.+)", key)
    side, level, kind, number, rest = match[1], int(match[2] or 0), match[3], int(match[4]), match[5]
    if kind == "resnets":
        rest = RESBLOCK[rest.rsplit(".", 1)[0]] + "." + rest.rsplit(".", 1)[1]
    if kind == "temp_convs":
        rest = "temopral_conv." + rest
    if side is None:
        return f"middle_block.{3 if (MODULES[kind], number) == (0, 1) else MODULES[kind]}.{rest}"
    if kind == "downsamplers":
        return f"input_blocks.{(depth + 1) * (level + 1)}.op.{rest.removeprefix('conv.')}"
    if kind == "upsamplers":
        return f"output_blocks.{(depth + 1) * level + depth}.{3 if level else 1}.{rest}"
    index = (depth + 1) * level + number
    return f"{'input' if side == 'down' else 'output'}_blocks.{index + (side == 'down')}.{MODULES[kind]}.{rest}"


def own_layout(weights: dict, depth: int = DEPTH) -> dict:
    """diffusers' weights in the authors' layout, where the temporal transformers' projections are convolutions."""
    renamed = {own_name(key, depth): tensor for key, tensor in weights.items()}
    projection = re.compile(r"(?:input_blocks\.0\.1|middle_block\.2|(?:in|out)put_blocks\.\d+\.2)\.proj_\w+\.weight")
    return {key: tensor[..., None] if projection.fullmatch(key) else tensor for key, tensor in renamed.items()}


LAYOUTS = {"diffusers": dict, "own": own_layout,
           "own, prefixed": lambda weights: {f"model.diffusion_model.{key}": tensor
                                             for key, tensor in own_layout(weights).items()}}


def written(folder, reference, layout="diffusers", dtype=None, name="modelscope.safetensors"):
    weights = {key: tensor.to(dtype) if dtype else tensor for key, tensor in reference.state_dict().items()}
    return saved(folder, name, LAYOUTS[layout](weights))


@pytest.fixture(scope="module")
def model(reference, tmp_path_factory):
    return load_video_network(load_video_model(written(tmp_path_factory.mktemp("networks"), reference)))


# The test's own naming

def test_the_authors_names_of_the_published_file_follow_from_diffusers_names():
    renamed = own_layout({key: torch.empty(shape, device="meta") for key, shape in PUBLISHED[DIFFUSERS].items()}, 2)
    assert {key: tuple(tensor.shape) for key, tensor in renamed.items()} == {
        key: tuple(shape) for key, shape in PUBLISHED[OWN].items()}


# Parity

class Predicted(comfy.samplers.CFGGuider):
    def predict_noise(self, x, timestep, model_options=None, seed=None):
        self.x, self.sizes = x, []

        def note(apply_model, args):
            self.sizes.append(len(args["input"]))
            return apply_model(args["input"], args["timestep"], **args["c"])
        options = dict(model_options, model_function_wrapper=note)
        self.denoised = super().predict_noise(x, timestep, options, seed)
        return self.denoised


def heard(seed):
    return [[torch.randn(1, 7, TEXT, generator=torch.Generator().manual_seed(seed)), {}]]


def sampled(model, noise, frames, cfg):
    """(eps of the guided prediction at SIGMA, batch sizes of the network's calls) from ComfyUI's own sampling."""
    guider = Predicted(with_clip_options(model, frames))
    guider.set_conds(heard(11), heard(12))
    guider.set_cfg(cfg)
    guider.sample(noise, torch.zeros_like(noise), comfy.samplers.ksampler("euler"), torch.tensor([SIGMA, 0.0]),
                  disable_pbar=True, seed=0)
    return (guider.x - guider.denoised) / SIGMA, guider.sizes


def timestep_of_sigma() -> int:
    """The step whose noise level is nearest to SIGMA, with betas whose square roots are evenly spaced."""
    betas = torch.linspace(0.00085 ** 0.5, 0.012 ** 0.5, 1000, dtype=torch.float64) ** 2
    kept = torch.cumprod(1 - betas, 0)
    return int((((1 - kept) / kept).sqrt().log() - torch.tensor(SIGMA).log()).abs().argmin())


@torch.no_grad()
def expected(reference, noise, frames, cfg):
    """The same from diffusers' network."""
    clips = (noise * SIGMA / (SIGMA ** 2 + 1) ** 0.5).unflatten(0, (-1, frames)).transpose(1, 2)

    def eps(text):
        out = reference(clips, timestep_of_sigma(), text[0][0].expand(len(clips), -1, -1)).sample
        return out.transpose(1, 2).flatten(0, 1)
    positive, negative = eps(heard(11)), eps(heard(12))
    return negative + cfg * (positive - negative)


def noise_of(clips, frames=FRAMES):
    return torch.randn(clips * frames, 4, 8, 12, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("clips, frames, cfg", [(1, 5, 1.0), (2, 3, 9.0)])
def test_the_network_predicts_what_diffusers_predicts(model, reference, clips, frames, cfg):
    noise = noise_of(clips, frames)
    found, sizes = sampled(model, noise, frames, cfg)
    assert sizes == [len(noise) * (1 if cfg == 1 else 2)]
    assert relative_error(found, expected(reference, noise, frames, cfg)) < 1e-5


def test_cond_and_uncond_in_calls_of_their_own_are_the_same(model, reference, monkeypatch):
    noise = noise_of(2)
    monkeypatch.setattr(model.model, "memory_required", lambda *args, **kwargs: float("inf"))
    found, sizes = sampled(model, noise, FRAMES, 9.0)
    assert sizes == [len(noise)] * 2
    assert relative_error(found, expected(reference, noise, FRAMES, 9.0)) < 1e-5


def test_the_authors_layout_gives_the_same_bits(model, reference, tmp_path):
    noise = noise_of(1)
    path = written(tmp_path, reference, "own", name="text2video_pytorch_model.pth")
    other = load_video_network(load_video_model(path))
    assert torch.equal(sampled(other, noise, FRAMES, 9.0)[0], sampled(model, noise, FRAMES, 9.0)[0])


@pytest.mark.parametrize("layout", ["own", "own, prefixed"])
def test_the_authors_layout_is_read_as_the_same_tensors(reference, tmp_path, layout):
    ours, theirs = (load_video_model(written(tmp_path, reference, name, name=f"{number}.safetensors"))
                    for number, name in enumerate((layout, "diffusers")))
    assert ours.layers.params == theirs.layers.params
    for read in (lambda network: network.layers.tensors, lambda network: network.read_spatial()):
        assert read(ours).keys() == read(theirs).keys()
        assert all(torch.equal(tensor, read(theirs)[key]) for key, tensor in read(ours).items())


def test_half_precision_weights_predict_nearly_the_same(reference, tmp_path):
    noise = noise_of(1)
    loaded = load_video_model(written(tmp_path, reference, "own", torch.float16))
    assert loaded.layers.dtype == torch.float16
    halved = diffusers_network()
    halved.load_state_dict({key: tensor.half().float() for key, tensor in reference.state_dict().items()})
    found = sampled(load_video_network(loaded), noise, FRAMES, 1.0)[0]
    assert found.isfinite().all()
    assert relative_error(found, expected(halved, noise, FRAMES, 1.0)) < 2e-2


# Published files

class Zeros(TensorFile):
    """A file of zeros that need no memory."""

    @classmethod
    def of(cls, shapes):
        return cls(Path("published.safetensors"), dict(shapes), {}, tuple(shapes),
                   lambda keys: {key: torch.zeros(()).expand(shapes[key]) for key in keys})


@pytest.fixture(params=[OWN, DIFFUSERS])
def published(request):
    shapes = {key: tuple(shape) for key, shape in PUBLISHED[request.param].items()}
    return modelscope.load(Zeros.of(shapes), identify_keys(shapes))


def test_the_published_file_is_the_whole_network(published):
    """docs/formats.md#modelscope-and-zeroscope: 1480 tensors, 1411.2 M; in temporal layers 794 tensors, 545.3 M."""
    unet_config(published)      # refuses missing and surplus spatial tensors
    layers = published.layers
    stack = TemporalStack(layers.params, Factory(device="meta"))
    temporal, spatial = list(stack.parameters()), published.spatial_shapes
    assert (len(temporal), len(temporal) + len(spatial)) == (794, 1480)
    elements = sum(tensor.numel() for tensor in temporal)
    assert round(elements / 1e6, 1) == 545.3
    assert round((elements + sum(torch.Size(shape).numel() for shape in spatial.values())) / 1e6, 1) == 1411.2
    slots = [site.slot for site, _ in layers.params.bricks]
    assert {slot: slots.count(slot) for slot in slots} == {"post_conv_in": 1, "post_res": 22, "post_attn": 16}
    assert dict(layers.params.bricks)[Site("input", 0, "post_conv_in")] == ClipTransformerParams(320, 8, 512)
    assert dict(layers.params.bricks)[Site("output", 3, "post_attn")] == ClipTransformerParams(1280, 20, 1280)
    assert dict(layers.params.bricks)[Site("middle", 0, "post_res", 1)] == StagedConvParams(1280)


def test_its_facts_are_those_of_its_authors(published):
    config, layers = unet_config(published), published.layers
    assert (config["num_head_channels"], config["context_dim"], config["in_channels"]) == (64, 1024, 4)
    assert layers.schedule == Schedule("linear", 0.00085, 0.012, "eps")
    assert (layers.params.frames, layers.fps, layers.base) == (16, 8.0, Base("Stable Diffusion 2.x", 1024))
    report = report_of(published, 0)
    for fact in ("39 temporal layers", "OpenCLIP-H", "16 frames at 8 frames", "CC-BY-NC-4.0", "24 frames"):
        assert fact in report


# Layers

@pytest.mark.parametrize("spread", [1.0, 1e-3])
@torch.no_grad()
def test_each_layer_equals_diffusers_layer(spread):
    """Where the input is spread little, the norms' eps count as much as the input."""
    from diffusers.models.resnet import TemporalConvLayer
    from diffusers.models.transformers.transformer_temporal import TransformerTemporalModel
    x = spread * torch.randn(2 * FRAMES, 64, 3, 4)
    conv, transformer = (randomise(layer).eval() for layer in (TemporalConvLayer(64, 64),
                                                               TransformerTemporalModel(4, 24, in_channels=64)))
    ours = StagedConv(StagedConvParams(64)), ClipTransformer(ClipTransformerParams(64, 4, 96))
    theirs = conv(x, num_frames=FRAMES), transformer(x, num_frames=FRAMES).sample
    for brick, layer, output in zip(ours, (conv, transformer), theirs):
        brick.load_state_dict({key: tensor.flatten(3) if tensor.ndim == 5 else tensor
                               for key, tensor in layer.state_dict().items()})
        assert relative_error(brick(x, GivenCall(FRAMES)) - x, output - x) < 1e-4


@torch.no_grad()
def test_fresh_layers_leave_the_network_as_it_is():
    for brick in (StagedConv(StagedConvParams(64)), ClipTransformer(ClipTransformerParams(64, 2, 128)),
                  ClipTransformer(ClipTransformerParams(64, 2, 128, reach=16))):
        x = torch.randn(6, 64, 2, 3)
        assert torch.equal(brick(x, GivenCall(3)), x)


@pytest.mark.parametrize("params", [StagedConvParams(64), ClipTransformerParams(64, 1, 64),
                                    ClipTransformerParams(64, 2, 128, reach=3)])
@torch.no_grad()
def test_a_layer_adds_its_strength_of_what_it_adds_as_trained(params):
    brick, x = randomise(params.build(Factory())), torch.randn(6, 64, 2, 3)
    whole, half = (brick(x, GivenCall(3, strength)) - x for strength in (1.0, 0.5))
    assert relative_error(half, whole / 2) < 1e-6
    assert torch.equal(brick(x, GivenCall(3, 0.0)), x)


@pytest.mark.parametrize("reach", [None, 3])
@torch.no_grad()
def test_attention_reaches_as_many_frames_as_it_is_let(reach):
    """Frame 7 hears of frame 0 through two attentions that reach 4 frames each, and not if each reaches 3."""
    brick = randomise(ClipTransformer(ClipTransformerParams(64, 1, 64, reach=reach)))
    brick.norm = torch.nn.Identity()        # it pools over all frames
    x = torch.randn(8, 64, 2, 3)
    changed = torch.cat([x[:1] + 1, x[1:]])
    for distance, hears in ((4, True), (3, False), (None, True)):
        call = GivenCall(8, max_distance=distance)
        assert torch.equal(brick(x, call)[7], brick(changed, call)[7]) is not hears


@torch.no_grad()
def test_relative_positions_are_those_of_videocrafter():
    """Written down from VideoCrafter's formula, frame by frame: docs/papers.md#relative-positions-in-time."""
    params, frames = ClipTransformerParams(64, 2, 64, reach=2), 5
    attention = randomise(ClipTransformer(params)).transformer_blocks[0].attn1
    x = torch.randn(3, frames, 64)
    q, k, v = (to(x).unflatten(-1, (2, 32)) for to in (attention.to_q, attention.to_k, attention.to_v))
    keys, values = attention.relative_position_k.embeddings_table, attention.relative_position_v.embeddings_table
    out = torch.zeros_like(q)
    for i in range(frames):
        rows = [max(-2, min(2, j - i)) + 2 for j in range(frames)]
        scores = torch.stack([(q[:, i] * (k[:, j] + keys[rows[j]])).sum(-1) for j in range(frames)], -1) / 32 ** 0.5
        shares = scores.softmax(-1)
        out[:, i] = sum(shares[..., j, None] * (v[:, j] + values[rows[j]]) for j in range(frames))
    assert relative_error(attention(x), attention.to_out(out.flatten(2))) < 1e-5


# Layers alone

SD2 = dict(SD15, model_channels=64, num_res_blocks=[1, 1, 1], channel_mult=(1, 1, 2), transformer_depth=[1, 1, 0],
           transformer_depth_output=[1] * 4 + [0] * 2, context_dim=TEXT, use_linear_in_transformer=True, num_heads=-1,
           num_head_channels=64)


@torch.no_grad()
def test_its_layers_act_on_another_stable_diffusion_2(reference, tmp_path):
    file = load_temporal(written(tmp_path, reference, "own"))
    unet = randomise(unet_model(SD2), seed=7)
    file.check_base({site: count for site, (_, count) in unet_sites(unet).items()}, TEXT, "Stable Diffusion 2.x")
    assert file.schedule == Schedule("linear", 0.00085, 0.012, None)        # v stays v
    assert any("not trained together" in note for note in file.notes)
    stack = TemporalStack(file.params)
    stack.load_state_dict(file.tensors)
    x, timesteps, text = batch(1, FRAMES, text=TEXT)
    outputs = []
    for strength in (0.0, 1.0):
        with open_call(unet, [(stack, CallSettings(FRAMES, strength))], text):
            outputs.append(unet(x, timesteps, context=text))
    assert torch.equal(outputs[0], unet(x, timesteps, context=text))
    assert relative_error(outputs[1], outputs[0]) > 1e-2


def test_its_layers_are_refused_on_stable_diffusion_1(reference, tmp_path):
    file = load_temporal(written(tmp_path, reference))
    with pytest.raises(VideoLDMError, match="made for Stable Diffusion 2.x, .* its text has a width of 768 instead of "
                                            "1024"):
        file.check_base({}, 768, "Stable Diffusion 1.x")


# Refusals

def refused(tensors):
    """The sentence for a file with tensors of these shapes."""
    shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    with pytest.raises(VideoLDMError) as raised:
        unet_config(modelscope.load(Zeros.of(shapes), identify_keys(shapes)))
    return str(raised.value)


GONE = {
    "a tensor of a convolution": ("down_blocks.1.temp_convs.0.conv3.3.weight", "1 of its .* tensors are missing"),
    "the norm that shows a size": ("mid_block.temp_convs.0.conv1.0.weight",
                                   "the tensor conv1.0.weight of its temporal layer middle_0_post_res_0 is missing"),
    "a transformer": ("up_blocks.1.temp_attentions.1.", "its temporal layer output_3_post_attn_0 is missing"),
    "a convolution": ("mid_block.temp_convs.1.", "its temporal layer middle_0_post_res_1 is missing"),
    "the first transformer": ("transformer_in.", "its temporal layer input_0_post_conv_in_0 is missing"),
    "a spatial tensor": ("mid_block.resnets.1.conv1.weight", "middle_block.2.in_layers.2.weight is missing where"),
}


@pytest.mark.parametrize("layout", ["diffusers", "own"])
@pytest.mark.parametrize("what", GONE)
def test_a_file_that_lacks_something_is_refused(reference, what, layout):
    gone, sentence = GONE[what]
    kept = {key: tensor for key, tensor in reference.state_dict().items() if not key.startswith(gone)}
    message = refused(LAYOUTS[layout](kept))
    assert re.search(sentence, message)
    assert message.startswith("published.safetensors looks like a ModelScope or ZeroScope text-to-video network, but ")


def test_a_file_of_other_sizes_is_refused(reference):
    weights, place = reference.state_dict(), "mid_block.temp_convs.0."
    wide = {key: tensor.new_empty([256 if size == 128 else size for size in tensor.shape])
            for key, tensor in weights.items() if key.startswith(place)}
    assert "middle_0_post_res_0 has 256 channels where its spatial layers have 128" in refused(weights | wide)
    uneven = {"transformer_in.proj_in.weight": torch.zeros(500, 64)}
    assert "proj_in.weight of its temporal layer input_0_post_conv_in_0 is [500, 64]" in refused(weights | uneven)


def test_a_file_with_further_tensors_is_refused(reference):
    weights, more = reference.state_dict(), torch.zeros(4)
    assert "holds 1 tensors that it does not have (the first: fps.weight)" in refused(weights | {"fps.weight": more})
    assert "(the first: pre_image.0.weight)" in refused(own_layout(weights) | {"pre_image.0.weight": more})
    nowhere = {key.replace("transformer_in.", "input_blocks.2.2."): tensor for key, tensor in weights.items()
               if key.startswith("transformer_in.")}
    assert "input_2_post_attn_0 has 64 channels where its spatial layers have no place for one" in refused(
        own_layout(weights) | nowhere)


def test_a_text_of_another_width_than_the_files_is_refused(reference):
    def narrow(tensor):
        return tensor[:, :768] if tensor.ndim == 2 and tensor.shape[1] == TEXT else tensor
    other = {key: narrow(tensor) if ".attn2." in key else tensor for key, tensor in reference.state_dict().items()}
    assert "its text has a width of 768 where 1024 is due" in refused(other)


@pytest.mark.parametrize("name", ["modelscope.safetensors", "text2video_pytorch_model.pth"])
def test_a_truncated_file_is_refused(reference, tmp_path, name):
    path = written(tmp_path, reference, "own", name=name)
    path.write_bytes(path.read_bytes()[:-100_000])
    with pytest.raises(VideoLDMError, match=f"^{name} is damaged or only partly downloaded"):
        load_video_model(path)


def test_networks_with_the_same_layers_and_another_input_are_other_files():
    own, diffusers = PUBLISHED[OWN], PUBLISHED[DIFFUSERS]
    assert identify_keys(diffusers | {"image_latents_proj_in.0.weight": (16, 4, 3, 3)}).kind == "i2vgen_xl"
    assert identify_keys(diffusers | {"conv_in.weight": (320, 3, 3, 3)}).kind == "show1_pixel"
    assert identify_keys({"unet.transformer_in.transformer_blocks.0.attn1.to_q.lora_up.weight": (512, 8)}).kind \
        == "motion_director"
    assert identify_keys(own | {"init_attn.0.norm.weight": (320,)}).kind == "videocrafter2"
    found = identify_keys(own)
    assert (found.kind, found.takes, found.also) == ("modelscope", "video_model", "temporal")
    assert replace(found, kind="") == replace(identify_keys(diffusers), kind="")


def test_a_text_of_another_width_is_refused(model):
    from video_ldm.nodes.host.texts import check_texts
    wrong = [[torch.zeros(1, 77, 768), {}]]
    with pytest.raises(VideoLDMError, match="width of 768, .* takes 1024.*CLIP of a Stable Diffusion 2.x checkpoint"):
        check_texts(model, wrong, wrong)
