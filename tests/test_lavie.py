"""LaVie's base and interpolation and SEINE as whole networks: docs/papers.md#l1 to #l6 and #l10.

tests/fixtures/lavie_networks.json holds what the published code predicts at timestep 500 for `network_clips` of 3
frames with the weights `network_tensors(kind, 7)`. For files with a tenth of the channels, its attention over time was
set to one head where it rotates, so that a head has the 32 channels that are rotated.
"""

import json
from dataclasses import replace
from pathlib import Path

import comfy.model_management
import comfy.sd
import comfy.utils
import folder_paths
import numpy as np
import pytest
import torch

from video_ldm.nodes.host.options import CLIP, ClipOptions, ContextFrames, LayerSet, layer_sets_in
from video_ldm.nodes.load import AS_TRAINED, LoadTemporalLayers
from video_ldm.temporal.errors import VideoLDMError
from video_ldm.temporal.families import load_temporal, load_upscaler, load_video_model
from video_ldm.temporal.params import COPIES, GREY, MASK_FIRST, InputFramesParams
from video_ldm.temporal.spatial_changes import POOLED_NORMS, SPARSE_CAUSAL
from video_ldm.tests.attach_help import assert_untouched, load_model, prediction
from video_ldm.tests.formats_help import saved
from video_ldm.tests.host.checkpoints import UNET, conditioning
from video_ldm.tests.network_help import (
    ONE_LEVEL,
    TENTH,
    Clips,
    network_clips,
    network_model,
    network_tensors,
    options_of,
    predicted,
    uniform,
)
from video_ldm.tests.reference_network import LavieBase, LavieInterpolation, Reference
from video_ldm.tests.small import relative_error

RECORDED = json.loads((Path(__file__).parent / "fixtures" / "lavie_networks.json").read_text())
REFERENCES = {"lavie_base": LavieBase, "seine": LavieBase, "lavie_interpolation": LavieInterpolation}
TIME_HEADS = {"lavie_base": 1, "seine": 1, "lavie_interpolation": 8}        # of the files of a tenth of the channels
each_kind = pytest.mark.parametrize("kind", REFERENCES)


@pytest.fixture(scope="module")
def weights():
    return {kind: network_tensors(kind, 7) for kind in REFERENCES}


@pytest.fixture(scope="module")
def models(weights, tmp_path_factory):
    folder = tmp_path_factory.mktemp("lavie")
    return {kind: network_model(folder, kind, weights[kind]) for kind in REFERENCES}


def reference(kind, tensors, clips: Clips, of=None, **options):
    network = (of or REFERENCES[kind])(tensors, 8, TIME_HEADS[kind], **options)
    return network(clips.whole, 500.0, clips.text)


# Parity

@each_kind
@pytest.mark.parametrize("size", [TENTH, ONE_LEVEL])
def test_the_whole_network_predicts_what_the_published_code_predicts(tmp_path, kind, size):
    model = network_model(tmp_path, kind, network_tensors(kind, 7, size=size), wrapped=size == TENTH)
    clips = network_clips(kind, 1, 3)
    recorded = torch.tensor(RECORDED[f"{kind}, {size}"]).view_as(clips.x)
    assert relative_error(predicted(model, clips), recorded) < 1e-5


@each_kind
def test_the_reference_network_predicts_what_the_published_code_predicts(weights, kind):
    clips = network_clips(kind, 1, 3)
    recorded = torch.tensor(RECORDED[f"{kind}, {TENTH}"]).view_as(clips.x)
    assert relative_error(reference(kind, weights[kind], clips), recorded.double()) < 1e-5


@each_kind
@pytest.mark.parametrize("number, frames, height, width", [(2, 4, 8, 8), (1, 9, 6, 10)])
def test_two_clips_in_a_batch_and_sizes_that_do_not_halve_evenly_are_those_of_the_reference(
        models, weights, kind, number, frames, height, width):
    clips = network_clips(kind, number, frames, height, width, seed=5)
    assert relative_error(predicted(models[kind], clips).double(), reference(kind, weights[kind], clips)) < 1e-5


@each_kind
def test_clips_and_conditions_of_one_call_come_out_as_in_calls_of_their_own(models, kind):
    """Core puts the positive and the negative prompt into one call or into two, as its memory allows."""
    first, second = network_clips(kind, 2, 3, seed=5), network_clips(kind, 2, 3, seed=6)
    together = Clips(*(torch.cat(pair) for pair in zip(first, second)))
    both = predicted(models[kind], together, conditions=(1, 0))
    for number, clips in ((0, first), (2, second)):
        assert relative_error(both[number:number + 2], predicted(models[kind], clips)) < 1e-5
    alone = predicted(models[kind], Clips(*(part[1:] for part in second)))
    assert relative_error(both[3:], alone) < 1e-5
    assert relative_error(both[2:3], alone) > 1e-2


@each_kind
def test_weights_in_half_precision_give_what_their_rounded_values_give(tmp_path, weights, kind, monkeypatch):
    """The same tolerance as in float32: the processor computes in float32, from the rounded weights."""
    half = {key: value.half() for key, value in weights[kind].items()}
    monkeypatch.setattr(comfy.model_management.args, "fp16_unet", True)
    model = network_model(tmp_path, kind, half)
    monkeypatch.undo()
    assert model.model.get_dtype() == torch.float16
    assert {weight.dtype for weight in layers_of(model).state_dict().values()} == {torch.float16}
    clips = network_clips(kind, 1, 3)
    found = predicted(model, clips)
    assert relative_error(found.double(), reference(kind, half, clips)) < 1e-5
    assert relative_error(found, predicted(network_model(tmp_path, kind, weights[kind]), clips)) > 1e-5


@each_kind
def test_a_partly_loaded_network_gives_what_a_fully_loaded_one_gives(tmp_path, weights, kind):
    """Weights beyond the budget are cast for each call. The hooks on keys and values still see their output."""
    model = network_model(tmp_path, kind, weights[kind])
    clips = network_clips(kind, 1, 3)
    before = predicted(model, clips)
    for patcher, budget in ((model, 5e6), (model.get_nested_additional_models()[0], 1e5)):
        patcher.patch_model(patcher.load_device, lowvram_model_memory=budget)
        assert patcher.model.model_lowvram and patcher.loaded_size() <= budget
    assert relative_error(predicted(model, clips), before) < 1e-6


@pytest.mark.parametrize("kind", ["lavie_base", "lavie_interpolation"])
def test_strength_scales_what_attention_over_time_adds(models, weights, kind):
    model, clips = models[kind].clone(), network_clips(kind, 1, 3)
    options = model.model_options["transformer_options"]
    key, layers = next((key, value) for key, value in options.items() if isinstance(value, LayerSet))
    scaled = {name: value * 0.5 if ".attn_temp.to_out." in name else value for name, value in weights[kind].items()}
    model.model_options["transformer_options"] = {**options, key: replace(layers, strength=0.5)}
    assert relative_error(predicted(model, clips).double(), reference(kind, scaled, clips)) < 1e-5


# Known frames, as the pack's nodes give them

def given(model, known: ContextFrames) -> dict:
    """Entries of the transformer_options for a call with known frames."""
    own = layer_sets_in(model.model_options["transformer_options"])
    return {**own, CLIP: ClipOptions(frames=known.frames, context=known)}


@pytest.mark.parametrize("positions", [(0,), (0, 3), (0, 1)])
def test_seine_sees_its_mask_then_the_known_frames_and_grey_elsewhere(models, weights, positions):
    """The mask is 0 at a known frame. Two clips, each with frames of its own."""
    clips = network_clips("seine", 2, 4, seed=8)
    source = np.random.RandomState(1)
    frames, grey = uniform((2, len(positions), 4, 8, 8), source), uniform((4, 8, 8), source)
    known = torch.cat([torch.ones(2, 4, 1, 8, 8), grey.expand(2, 4, -1, -1, -1)], dim=2)
    for n, position in enumerate(positions):
        known[:, position, :1], known[:, position, 1:] = 0, frames[:, n]
    stacked = frames.flatten(0, 1)
    options = given(models["seine"], ContextFrames(stacked, stacked, positions, 4, grey))
    found = predicted(models["seine"], Clips(clips.x, clips.known[:, :, :0], clips.text), **options)
    wanted = reference("seine", weights["seine"], Clips(clips.x, known, clips.text))
    assert relative_error(found.double(), wanted) < 1e-5


def test_interpolation_sees_for_frame_k_the_key_frame_with_number_k_plus_1_over_4(models, weights):
    """docs/papers.md#l5. Two clips, each with key frames of its own."""
    kind = "lavie_interpolation"
    clips, keys = network_clips(kind, 2, 5, seed=8), uniform((2, 2, 4, 8, 8), np.random.RandomState(1))
    stacked = keys.flatten(0, 1)
    options = given(models[kind], ContextFrames(stacked, stacked, (0, 4), 5))
    found = predicted(models[kind], Clips(clips.x, clips.known[:, :, :0], clips.text), **options)
    wanted = reference(kind, weights[kind], Clips(clips.x, keys[:, [0, 0, 0, 1, 1]], clips.text))
    assert relative_error(found.double(), wanted) < 1e-5


# What the comparisons notice

class NormPerFrame(LavieBase):
    pooled = False


class AfterFeedForward(LavieBase):
    def before_feed_forward(self, name, x):
        return x

    def after_feed_forward(self, name, x):
        return LavieBase.before_feed_forward(self, name, x)


class WithoutTable(LavieBase):
    def scores(self, name, head, q, k):
        table = self.weights.pop(f"{name}.time_rel_pos_bias.relative_attention_bias.weight", None)
        if table is None:
            return super().scores(name, head, q, k)
        self.weights[f"{name}.time_rel_pos_bias.relative_attention_bias.weight"] = torch.zeros_like(table)
        return super().scores(name, head, q, k)


class BeforeFeedForward(LavieInterpolation):
    before_feed_forward = LavieInterpolation.after_feed_forward

    def after_feed_forward(self, name, x):
        return x


class CurrentForPrevious(LavieInterpolation):
    def self_attention_source(self, x):
        return torch.cat([x[:, :1].expand_as(x), x], dim=2)


class PreviousAlone(LavieInterpolation):
    def self_attention_source(self, x):
        return torch.cat([x[:, :1], x[:, :-1]], dim=1)


class EachFrameAlone(LavieInterpolation):
    self_attention_source = Reference.self_attention_source


@pytest.mark.parametrize("kind, wrong", [
    ("lavie_base", NormPerFrame), ("lavie_base", AfterFeedForward), ("lavie_base", WithoutTable),
    ("lavie_base", Reference),
    ("lavie_interpolation", BeforeFeedForward), ("lavie_interpolation", CurrentForPrevious),
    ("lavie_interpolation", PreviousAlone), ("lavie_interpolation", EachFrameAlone)])
def test_a_network_that_differs_in_one_rule_predicts_something_else(models, weights, kind, wrong):
    clips = network_clips(kind, 1, 4)
    other = reference(kind, weights[kind], clips, of=wrong)
    assert relative_error(predicted(models[kind], clips).double(), other) > 1e-3


@pytest.mark.parametrize("kind", ["seine", "lavie_interpolation"])
def test_the_further_channels_of_the_input_follow_the_noisy_latents(models, weights, kind):
    clips = network_clips(kind, 1, 3)
    wrong = Clips(clips.x, clips.known.flip(2), clips.text)
    assert relative_error(predicted(models[kind], wrong), predicted(models[kind], clips)) > 1e-2


# Statements

def test_each_kind_states_its_input_and_its_changes_of_the_spatial_network(models):
    def params(kind):
        return layers_of(models[kind]).params
    assert params("lavie_base").input_frames is None and params("lavie_base").spatial == (POOLED_NORMS,)
    assert params("seine").input_frames == InputFramesParams(MASK_FIRST, given=0.0, filler=GREY)
    assert params("seine").input_frames.channels == 5 and params("seine").spatial == (POOLED_NORMS,)
    assert params("lavie_interpolation").input_frames == InputFramesParams(COPIES)
    assert params("lavie_interpolation").input_frames.channels == 4
    assert params("lavie_interpolation").spatial == (POOLED_NORMS, SPARSE_CAUSAL)
    assert [params(kind).frames for kind in REFERENCES] == [16, 16, 61]


def silenced(tensors: dict) -> dict:
    """The weights with nothing added by attention over time."""
    return {key: torch.zeros_like(value) if ".attn_temp.to_out." in key else value for key, value in tensors.items()}


class PooledNorms(Reference):
    pooled = True


def test_without_attention_over_time_the_base_is_the_per_frame_network_with_pooled_norms(tmp_path, weights):
    """docs/papers.md#l2."""
    silent = silenced(weights["lavie_base"])
    model, clips = network_model(tmp_path, "lavie_base", silent), network_clips("lavie_base", 2, 3)
    found = predicted(model, clips).double()
    assert relative_error(found, reference("lavie_base", silent, clips, of=PooledNorms)) < 1e-5
    assert relative_error(found, reference("lavie_base", silent, clips, of=Reference)) > 1e-3


@pytest.fixture(scope="module")
def one_level(tmp_path_factory):
    """The folder with lavie_base.pt, its weights, and the plain MODEL that core makes of its spatial ones."""
    folder = tmp_path_factory.mktemp("one_level")
    folder_paths.add_model_folder_path("video_ldm", str(folder))
    tensors = network_tensors("lavie_base", 7, size=ONE_LEVEL)
    saved(folder, "lavie_base.pt", {"ema": tensors})
    names = comfy.utils.unet_to_diffusers(UNET)
    state = {ours: tensors[theirs] for theirs, ours in names.items() if theirs in tensors}
    return folder, tensors, state, load_model(state)


def test_for_one_frame_the_silent_base_is_stable_diffusion_bit_for_bit(one_level, tmp_path):
    """docs/papers.md#l2. The plain network has the same weights by core's own names."""
    folder, tensors, _, image = one_level
    model = network_model(tmp_path, "lavie_base", silenced(tensors))
    clips = network_clips("lavie_base", 1, 1)
    call = dict(timesteps=torch.tensor([500.0]), context=clips.text)
    with torch.no_grad():
        ours = model.model.diffusion_model(clips.x[0], **call, transformer_options=options_of(model, 1))
        plain = image.model.diffusion_model(clips.x[0], **call, transformer_options={})
    assert torch.equal(ours, plain)
    assert relative_error(predicted(network_model(tmp_path, "lavie_base", tensors), clips)[0], plain) > 1e-3


def test_its_layers_alone_on_its_own_spatial_weights_are_the_whole_network(one_level):
    """Load Temporal Layers on the plain checkpoint, which is unchanged afterwards."""
    folder, tensors, state, image = one_level
    clips = network_clips("lavie_base", 1, 3)
    model, report = LoadTemporalLayers.execute(image, "lavie_base.pt", 1.0, AS_TRAINED).result
    assert "They were not trained together with this image model." in report
    whole = network_model(folder, "lavie_base", tensors)
    assert relative_error(predicted(model, clips), predicted(whole, clips)) < 1e-5
    assert_untouched(image, state)


@pytest.mark.parametrize("kind, words", [
    ("lavie_interpolation", "LaVie's frame interpolation network, not a file of temporal layers that this pack takes. "
     "Its temporal layers were trained for a network whose input takes the key frames and whose self-attention sees "
     "other frames."),
    ("seine", "SEINE's network for image to video and transitions, not a file of temporal layers that this pack takes. "
     "Its temporal layers were trained for a network whose input takes known frames.")])
def test_layers_that_would_give_noise_on_an_image_model_are_not_taken_alone(tmp_path, weights, kind, words):
    path = saved(tmp_path, f"{kind}.pt", weights[kind])
    with pytest.raises(VideoLDMError) as caught:
        load_temporal(path)
    assert str(caught.value) == (f"{kind}.pt is {words} On an image model they would give noise. Load it with Load "
                                 "Video Model.")
    with pytest.raises(VideoLDMError, match=f"^{kind}.pt is .*, not an upscaler. Load it with Load Video Model.$"):
        load_upscaler(path)


def test_its_betas_are_evenly_spaced_themselves(models):
    """docs/papers.md#l6."""
    for kind in REFERENCES:
        kept = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
        sigmas = models[kind].model.model_sampling.sigmas.double()
        assert relative_error(sigmas, ((1 - kept) / kept).sqrt()) < 1e-5


def test_guidance_acts_on_all_channels_of_a_clip(models):
    """docs/papers.md#l10."""
    model, positive, negative = models["lavie_base"], conditioning(21), conditioning(22)
    cond, uncond = (prediction(model, positive=one) for one in (positive, negative))
    guided = prediction(model, positive=positive, negative=negative, cfg=7.5)
    assert relative_error(guided, uncond + 7.5 * (cond - uncond)) < 1e-5
    assert relative_error(guided, cond) > 1e-2


def lora_of(tensors: dict, rank: int = 2) -> dict:
    """A LoRA in kohya's names: {module of the UNet: (up, down)}."""
    source = np.random.RandomState(9)
    wanted = (".attn1.to_q.weight", ".attn2.to_v.weight", ".ff.net.0.proj.weight", ".proj_in.weight",
              "resnets.0.conv1.weight")
    found = {}
    for key, weight in tensors.items():
        if key.endswith(wanted):
            rows, columns = len(weight), weight[0].numel()
            found[key.removesuffix(".weight")] = tuple(
                0.1 * uniform(shape, source) for shape in ((rows, rank), (rank, columns)))
    return found


@each_kind
def test_a_lora_for_stable_diffusion_changes_the_output_as_it_changes_the_spatial_weights(tmp_path, weights, kind):
    pairs, strength, rank, alpha = lora_of(weights[kind]), 0.7, 2, 1.0
    file, merged = {}, dict(weights[kind])
    for module, (up, down) in pairs.items():
        name, weight = "lora_unet_" + module.replace(".", "_"), merged[f"{module}.weight"]
        merged[f"{module}.weight"] = weight + strength * alpha / rank * (up @ down).view_as(weight)
        spatial = weight.ndim == 4
        file[f"{name}.lora_up.weight"] = up[..., None, None] if spatial else up
        file[f"{name}.lora_down.weight"] = down.view(rank, *weight.shape[1:]) if spatial else down
        file[f"{name}.alpha"] = torch.tensor(alpha)
    assert len(pairs) == 16 * 4 + 9
    model, clips = network_model(tmp_path, kind, weights[kind]), network_clips(kind, 1, 3)
    before = predicted(model, clips)
    patched, _ = comfy.sd.load_lora_for_models(model, None, file, strength, 0.0)
    assert len(patched.patches) == len(pairs)
    patched.patch_model()
    found = predicted(patched, clips)
    assert relative_error(found, predicted(network_model(tmp_path, kind, merged), clips)) < 1e-5
    assert relative_error(found, before) > 1e-2
    patched.unpatch_model()
    assert torch.equal(predicted(model, clips), before)


def test_a_truncated_file_is_refused_with_one_sentence(tmp_path, weights):
    path = saved(tmp_path, "lavie_base.pt", {"ema": weights["lavie_base"]})
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(VideoLDMError, match="^lavie_base.pt is damaged or only partly downloaded"):
        load_video_model(path)


def layers_of(model):
    return model.get_nested_additional_models()[0].model
