"""Whole networks that are trained with this pack, from the training to the MODEL of Load Video Model."""

import json
from dataclasses import replace

import folder_paths
import pytest
import torch
from safetensors.torch import load_file, save_file

from video_ldm.nodes.host import for_benchmarks
from video_ldm.nodes.host import models as host
from video_ldm.nodes.host.context import with_context_frames, with_key_frames
from video_ldm.nodes.host.models import LatentParams, UNetParams
from video_ldm.nodes.host.options import with_clip_options
from video_ldm.nodes.load import LoadVideoModel
from video_ldm.temporal.call import CallSettings, open_call
from video_ldm.temporal.diffusion import Diffusion
from video_ldm.temporal.errors import VideoLDMError
from video_ldm.temporal.families import identify, load_temporal, load_video_model, own_network
from video_ldm.temporal.formats.temporal_file import DEMO, Schedule
from video_ldm.temporal.formats.video_network import Heads
from video_ldm.temporal.layers import (
    ClipTransformerParams,
    FrameAttentionParams,
    MotionParams,
    ResBlockParams,
    RotaryParams,
    StagedConvParams,
    TransformerParams,
)
from video_ldm.temporal.new_layers import video_ldm_params
from video_ldm.temporal.params import COPIES, MASK_LAST, InputFramesParams, StackParams
from video_ldm.temporal.slots import Site, unet_sites
from video_ldm.temporal.spatial_changes import POOLED_NORMS, SPARSE_CAUSAL
from video_ldm.temporal.stack import TemporalStack
from video_ldm.temporal.training.batch import Batch
from video_ldm.temporal.training.clips import Clips
from video_ldm.temporal.training.loop import Loop, LoopParams
from video_ldm.temporal.training.network import MOST_NOISE, NetworkLoss, widened
from video_ldm.tests.small import randomise

SIZES = UNetParams(latent_channels=4, model_channels=32, channel_mult=(1, 2), num_res_blocks=(1, 1),
                   transformer_depth=(1, 1), head_channels=32, context_dim=128)
LATENTS = LatentParams(0.5, ((0.1, 0.2, 0.3),) * 4, (0.0, 0.1, 0.2))
FRAMES, SHAPE = 5, (4, 4, 8)
INPUTS = {"base": None, "interpolation": InputFramesParams(COPIES),
          "masked": InputFramesParams(MASK_LAST, positions=((0, -1),))}


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def layers_for(kind, unet):
    """Params of LaVie's layers, of its interpolation, and of Video LDM's layers that are told the frame rate."""
    if kind == "masked":
        params = video_ldm_params(unet, SIZES.emb_dim, 128, lambda channels: channels // 32, FRAMES)
        return replace(params, fps_width=128, input_frames=INPUTS[kind])
    slot, brick = ("in_attn_pre_ff", RotaryParams) if kind == "base" else ("in_attn_post_ff", FrameAttentionParams)
    bricks = tuple((site, brick(channels, channels // 32)) for site, (_, channels) in unet_sites(unet).items()
                   if site.slot == slot)
    spatial = (POOLED_NORMS,) if kind == "base" else (POOLED_NORMS, SPARSE_CAUSAL)
    return StackParams("LaVie", bricks, FRAMES, None, spatial, input_frames=INPUTS[kind])


class Trained:
    """A network after two steps of training, and its file."""

    def __init__(self, kind, folder):
        takes = INPUTS[kind]
        start = randomise(host.build_unet(SIZES), 1).state_dict()
        further = takes.channels if takes else 0
        self.unet = host.build_unet(replace(SIZES, concat_channels=further))
        self.unet.load_state_dict(widened(start, 4 + further))
        torch.manual_seed(2)
        self.stack = TemporalStack(layers_for(kind, self.unet))
        clips = Clips(random(3, FRAMES, *SHAPE), FRAMES, 2, embeddings=random(3, 6, 128, seed=1), fps=[7.5, 30, 7.5])
        pictures = Batch(random(2, *SHAPE, seed=2), random(2, 6, 128, seed=3))
        loss = NetworkLoss(self.unet, self.stack, Diffusion(0.0015, 0.0195, prediction="v"), clips,
                           images=None if kind == "interpolation" else lambda step: pictures,
                           most_noise=MOST_NOISE if kind == "masked" else 0)
        loop = Loop(LoopParams(2, 1e-3, warmup=0, ema_decay=0.0, device="cpu"), loss.modules, loss, folder / kind, kind)
        loop.run()
        self.params = own_network.NetworkParams(self.stack.params, Schedule("linear", 0.0015, 0.0195, "v"), DEMO,
                                                Heads(width=32), f"a small {kind} network", LATENTS, 7.5, "none")
        self.path = folder / f"own_{kind}.safetensors"
        own_network.write(self.path, loop.ema_state("spatial"), loop.ema_state("temporal"), self.params)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("networks")
    folder_paths.add_model_folder_path("video_ldm", str(folder))
    return folder


@pytest.fixture(scope="module", params=list(INPUTS))
def trained(request, folder):
    return Trained(request.param, folder), request.param


def calls_while_sampling(model, text):
    """(x, timesteps, context, output) of every call of the network while two steps are sampled at cfg 2."""
    calls = []

    def keep(executor, x, timesteps, context, *args, **kwargs):
        output = executor(x, timesteps, context, *args, **kwargs)
        calls.append((x, timesteps, context, output))
        return output
    model = with_clip_options(model, FRAMES)
    for_benchmarks.wrap_network(model, "keep", keep)
    empty = torch.zeros(FRAMES, *SHAPE)
    samples = for_benchmarks.sample(model, empty, 3, 2, 2.0, "euler", "normal", [[text, {}]], [[-text, {}]])
    assert samples.isfinite().all() and len(calls) >= 2
    return calls


@torch.no_grad()
def test_a_trained_network_predicts_in_load_video_models_model_what_it_predicted_in_training(trained):
    network, kind = trained
    model, report = LoadVideoModel.execute(network.path.name, 30.0).result
    known = random(2, *SHAPE, seed=5)
    if kind == "interpolation":
        model = with_key_frames(model, known)
        further = (known * 0.5)[[0, 0, 0, 1, 1]]        # by the latents' factor
    elif kind == "masked":
        model = with_context_frames(model, known, (0, -1))
        further = torch.zeros(FRAMES, 5, *SHAPE[1:])
        further[[0, -1], :4], further[[0, -1], 4] = known * 0.5, 1.0
    else:
        further = torch.zeros(FRAMES, 0, *SHAPE[1:])
    for x, timesteps, context, output in calls_while_sampling(model, random(1, 6, 128, seed=6)):
        parts = len(x) // FRAMES
        with open_call(network.unet, [(network.stack, CallSettings(FRAMES, fps=30.0))], context):
            due = network.unet(torch.cat([x, further.repeat(parts, 1, 1, 1)], 1), timesteps, context=context)
        assert (output - due).abs().max() <= 1e-6 * due.abs().max() and due.abs().max() > 0.01
    assert "the CLIP of Load Demo Models" in report and f"a small {kind} network" in report
    assert "the VAE of Load Demo Models" in report and "Licence: none." in report


def test_a_written_network_is_read_back_to_the_bit(trained):
    network, _ = trained
    read = load_video_model(network.path)
    assert own_network.read_params(read.layers.metadata) == network.params
    assert read.layers.params == network.stack.params
    assert all(torch.equal(read.layers.tensors[key], value) for key, value in network.stack.state_dict().items())
    spatial, own = read.read_spatial(), network.unet.state_dict()
    assert spatial.keys() == own.keys() and all(torch.equal(spatial[key], own[key]) for key in own)
    assert identify(network.path).takes == "video_model" and identify(network.path).also is None


def test_its_temporal_layers_alone_are_refused_and_the_sentence_says_where_the_file_belongs(trained):
    with pytest.raises(VideoLDMError, match="video network trained with this pack.*trained together with its spatial "
                                            "layers. Load it with Load Video Model"):
        load_temporal(trained[0].path)


# Files that someone else has changed

@pytest.fixture(scope="module")
def written(folder):
    network = Trained("masked", folder)
    with open(network.path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        return load_file(network.path), json.loads(file.read(length))["__metadata__"]


def changed_brick(metadata, **entries):
    bricks = json.loads(metadata["bricks"])
    bricks[0] = {**bricks[0], **entries}
    return json.dumps([{key: value for key, value in brick.items() if value is not None} for brick in bricks])


HOSTILE = {
    "another version": (lambda m: dict(version="2"), "version 2, and this pack reads version 1"),
    "no bricks": (lambda m: dict(bricks=None), "lacks bricks"),
    "empty bricks": (lambda m: dict(bricks="[]"), "a list of 0"),
    "bricks no JSON": (lambda m: dict(bricks="[{"), "not JSON"),
    "deep bricks": (lambda m: dict(bricks="[" * 5000 + "]" * 5000), "bricks is"),
    "a class that is none of ours": (lambda m: dict(bricks=changed_brick(m, kind="Popen")), "kind is Popen"),
    "a kind that is a list": (lambda m: dict(bricks=changed_brick(m, kind=["RotaryParams"])), "kind is"),
    "a field of another class": (lambda m: dict(bricks=changed_brick(m, evil=1)), "unknown entry evil"),
    "a field that is missing": (lambda m: dict(bricks=changed_brick(m, channels=None)), "lacks channels"),
    "channels without end": (lambda m: dict(bricks=changed_brick(m, channels=10 ** 9)), "whole number from 0"),
    "channels of text": (lambda m: dict(bricks=changed_brick(m, channels="32")), "whole number from 0"),
    "no channels": (lambda m: dict(bricks=changed_brick(m, channels=0)), "no layer has its sizes|is due"),
    "a flag that is a number": (lambda m: dict(bricks=json.dumps([
        dict(site=["input", 1, "post_attn", 0], kind="MotionParams", channels=32, heads=1, blocks=1, attentions=1,
             table_length=0, norm_pooled=1)])), "norm_pooled is 1, where true or false is due"),
    "nothing where a number is due": (lambda m: dict(bricks=m["bricks"].replace('"heads": 1', '"heads": null')),
                                      "heads is None, where a whole number"),
    "a site that is no list": (lambda m: dict(bricks=changed_brick(m, site="input")), "a site is"),
    "a slot of another name": (lambda m: dict(bricks=changed_brick(m, site=["input", 1, "eval", 0])), "slot is eval"),
    "two layers at one site": (lambda m: dict(bricks=json.dumps(json.loads(m["bricks"])[:1] * 2)), "two layers at"),
    "a change that is none of ours": (lambda m: dict(spatial='["os.system"]'), "spatial is os.system"),
    "a base that is none": (lambda m: dict(base="SDXL"), "base is SDXL"),
    "no prediction": (lambda m: dict(prediction=""), "prediction is None, where eps or v is due"),
    "a prediction that is not sampled": (lambda m: dict(prediction="x0"), "prediction is x0, where eps or v is due"),
    "betas that fall": (lambda m: dict(linear_start="0.5"), "noise must not fall"),
    "two kinds of heads": (lambda m: dict(heads='{"count": 8, "width": 8}'), "a count or a width is due"),
    "no heads": (lambda m: dict(heads="{}"), "a count or a width is due"),
    "heads of text": (lambda m: dict(heads='{"count": "8"}'), "heads' count is 8"),
    "heads that do not divide": (lambda m: dict(heads='{"width": 24}'), "proj_in"),
    "frames without end": (lambda m: dict(frames="1" * 15), "frames is"),
    "known frames outside": (lambda m: dict(input_frames=m["input_frames"].replace("-1", "99")), "a known frame is 99"),
    "another form": (lambda m: dict(input_frames=m["input_frames"].replace("latents, mask", "x")), "form is x"),
    "latents without colours": (lambda m: dict(latents='{"scale_factor": 1}'), "latent lacks"),
    "a base whose text has another width": (lambda m: dict(base="Stable Diffusion 1.x"),
                                            "take text of width 128, and CLIP-L makes 768"),
    "known frames without channels for them": (lambda m: dict(input_frames=None), "input has 9 channels where 4 are"),
    "known frames of another form": (lambda m: dict(input_frames=m["input_frames"].replace("latents, mask", "copies")),
                                     "input has 9 channels where 8 are due"),
    "a layer in a block that the network lacks": (
        lambda m: dict(bricks=m["bricks"].replace('["input", 1, "post_res", 0]', '["input", 9, "post_res", 0]')),
        "temporal layer|tensors are missing"),
    "a frame-rate token of another width": (lambda m: dict(fps_width="64"), "fps_token"),
}


@pytest.mark.parametrize("change, match", HOSTILE.values(), ids=HOSTILE)
def test_a_changed_file_is_refused_with_one_sentence_that_names_it(written, tmp_path, folder, change, match):
    tensors, metadata = written
    altered = {**metadata, **change(metadata)}
    path = folder / "changed.safetensors"
    save_file(tensors, path, metadata={key: value for key, value in altered.items() if value is not None})
    with pytest.raises(VideoLDMError, match=match) as refused:
        LoadVideoModel.execute(path.name)
    assert "changed.safetensors is a" in str(refused.value) or "changed.safetensors looks like" in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("wrong, match", [
    (("input", 9, "post_res", 0), "layer input_9_post_res_0 has 32 channels where its spatial layers have no place"),
    (("middle", 0, "post_res", 0), "layer middle_0_post_res_0 has 32 channels where its spatial layers have 64")])
def test_layers_of_another_network_are_refused_and_not_sampled(trained, folder, wrong, match):
    """Tensors and metadata of the layers agree with each other, but not with the spatial weights."""
    network, _ = trained
    layers = StackParams("Video LDM", ((Site(*wrong), ResBlockParams(32, 128, 1)),), FRAMES, None,
                         input_frames=network.params.layers.input_frames)
    path = folder / "other_layers.safetensors"
    own_network.write(path, network.unet.state_dict(), TemporalStack(layers).state_dict(),
                      replace(network.params, layers=layers))
    with pytest.raises(VideoLDMError, match=match):
        LoadVideoModel.execute(path.name)


@pytest.mark.parametrize("kind", ["lost", "surplus", "lost layer"])
def test_a_file_that_lacks_a_tensor_or_has_another_is_refused(written, folder, kind):
    tensors, metadata = written
    layer = next(key for key in tensors if key.startswith("temporal.layers."))
    lost = {"lost": own_network.UNET + "out.2.weight", "lost layer": layer}.get(kind)
    tensors = {key: value for key, value in tensors.items() if key != lost}
    if kind == "surplus":
        tensors["evil.weight"] = torch.zeros(1)
    path = folder / "changed.safetensors"
    save_file(tensors, path, metadata=metadata)
    with pytest.raises(VideoLDMError, match="out.2.weight|evil.weight|are missing"):
        LoadVideoModel.execute(path.name)


@pytest.mark.parametrize("brick", [
    ResBlockParams(32, 128, 1), TransformerParams(32, 1, 128, 1), RotaryParams(32, 1), FrameAttentionParams(32, 1),
    MotionParams(32, 1, table_length=16, norm_pooled=True), StagedConvParams(32), ClipTransformerParams(32, 1, 32),
    ClipTransformerParams(32, 1, 32, reach=8)], ids=lambda brick: type(brick).__name__)
def test_every_kind_of_layer_is_read_back_as_it_was_written(trained, brick):
    params = replace(trained[0].params, layers=StackParams("any", ((Site("input", 1, "post_res"), brick),), 16, 24))
    assert own_network.read_params(own_network.header_of(params)) == params


def test_a_network_that_the_format_cannot_hold_is_not_written(folder, trained):
    network, _ = trained
    path = folder / "never.safetensors"
    for params in (replace(network.params, layers=replace(network.params.layers, shared_noise=True)),
                   replace(network.params, base="SDXL")):
        with pytest.raises(ValueError):
            own_network.write(path, {}, network.stack.state_dict(), params)
    with pytest.raises(VideoLDMError, match="it holds 0 tensors"):
        own_network.write(path, {}, {}, network.params)
    assert not path.exists()
