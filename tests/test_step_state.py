"""Nodes of core's that act between the model calls of a step: right with windows and known frames, or refused."""

import pytest
import torch
from comfy.patcher_extension import WrappersMP
from comfy_extras import (
    nodes_apg,
    nodes_cfg,
    nodes_easycache,
    nodes_eps,
    nodes_fresca,
    nodes_hypertile,
    nodes_mahiro,
    nodes_model_advanced,
    nodes_model_downscale,
    nodes_pag,
    nodes_sag,
    nodes_tcfg,
    nodes_tomesd,
)

from video_ldm.nodes.host.conflicts import recording_node
from video_ldm.nodes.host.upscaling import UpscalePieces
from video_ldm.nodes.longer import ContextFrames
from video_ldm.temporal.errors import VideoLDMError
from video_ldm.temporal.upscaler import plan_pieces
from video_ldm.tests.attach_help import models_with_layers, with_layers
from video_ldm.tests.host import checkpoints
from video_ldm.tests.small import relative_error
from video_ldm.tests.windows_help import LENGTH, LONG, by_hand, notes, prediction, predictions, text, windowed

SIGMAS = (8.0, 6.0, 4.5, 3.0, 2.0, 1.0, 0.0)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """MODELs with layers that take known frames and with others, by name."""
    def write(folder):
        checkpoints.write_video_layers(folder / "video.safetensors")
        checkpoints.save(folder / "motion.safetensors", checkpoints.motion_state())
        checkpoints.write_context_layers(folder / "prediction.safetensors")
    yield from models_with_layers(tmp_path_factory, write)


def noise_of(frames=LONG, seed=0, side=6):
    return torch.randn(frames, 4, side, side, generator=torch.Generator().manual_seed(seed))


def known(model, guidance=1.0, side=6):
    """A clone whose first frame is known."""
    frame = torch.randn(1, 4, side, side, generator=torch.Generator().manual_seed(5))
    return ContextFrames.execute(model, "0", guidance, latent={"samples": frame}).result[0]


def node(kind, *settings):
    return lambda model: kind.execute(model, *settings)[0]


def old_node(kind, *settings):
    return lambda model: kind().patch(model, *settings)[0]


# EasyCache

EASY = node(nodes_easycache.EasyCacheNode, 3.0, 0.0, 1.0, False)
LAZY = node(nodes_easycache.LazyCacheNode, 3.0, 0.0, 1.0, False)


@pytest.mark.parametrize("strength", [0.0, 1.0])
def test_easy_cache_is_refused_in_windows_in_favour_of_lazy_cache(models, strength):
    model = with_layers(models["image"], "video.safetensors", strength)
    for cached in (EASY(windowed(model)), windowed(EASY(model))):
        with pytest.raises(VideoLDMError, match="EasyCache keeps one state.*Frame Windows.*Use LazyCache instead"):
            predictions(cached, noise_of(), sigmas=SIGMAS)
        assert len(predictions(cached, noise_of(LENGTH), sigmas=SIGMAS)) == len(SIGMAS) - 1     # one call has them all


def test_lazy_cache_in_windows_of_the_image_model_is_lazy_cache_without(models):
    plain = predictions(LAZY(models["image"]), noise_of(), sigmas=SIGMAS)
    strengthless = windowed(with_layers(models["image"], "video.safetensors", 0.0))
    model, calls = notes(LAZY(strengthless), lambda x, options: len(x))
    seen = predictions(model, noise_of(), sigmas=SIGMAS)
    assert len(calls) < 2 * (len(SIGMAS) - 1)       # it did skip
    assert max(relative_error(a, b) for a, b in zip(seen, plain, strict=True)) < 1e-5


def test_easy_cache_keeps_what_context_guidance_evaluates_apart(models):
    """In a step that is skipped, each evaluation adds the difference that it had itself in the last step that ran."""
    model, ran, seen = known(models["prediction"], guidance=2.0), [], []

    def outside(executor, x, timesteps, context, y, control, transformer_options, **kwargs):
        ran.append(False)
        before = x.clone()
        out = executor(x, timesteps, context, y, control, transformer_options, **kwargs)
        hidden = transformer_options["video_ldm_clip"].hide_context
        seen.append((hidden, ran[-1], out - before))
        return out

    def inside(executor, *args, **kwargs):
        ran[-1] = True
        return executor(*args, **kwargs)
    model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "outside", outside)
    model = EASY(model)
    model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "inside", inside)
    predictions(model, noise_of(LENGTH), sigmas=SIGMAS)
    skipped, last = 0, {}
    for hidden, run, difference in seen:
        if run:
            last[hidden] = difference
        else:
            skipped += 1
            assert relative_error(difference, last[hidden]) < 1e-4, hidden
    assert skipped and relative_error(last[True], last[False]) > 1e-3


def test_easy_cache_is_refused_where_a_video_is_upscaled_in_pieces_and_not_where_it_is_one(models):
    class Reached(Exception):
        pass

    def network(*args):
        raise Reached

    def upscale(frames):
        small, x = torch.zeros(frames, 3, 16, 16), torch.zeros(frames, 4, 16, 16)
        cuts = plan_pieces(frames, 16, 16, window=4, overlap=2, tile=0)
        pieces = UpscalePieces(small, 0, cuts, torch.device("cpu"), lambda: None)
        m = EASY(models["image"])
        options = {"transformer_options": {"wrappers": m.wrappers}}
        pieces.execute(network, None, [None], x, torch.ones(frames), options)
    with pytest.raises(VideoLDMError, match="EasyCache keeps one state.*Video Upscale.*Use LazyCache instead"):
        upscale(6)
    with pytest.raises(Reached):
        upscale(4)


# Guidance that reads what a patch has kept

SAG = node(nodes_sag.SelfAttentionGuidance, 0.5, 2.0)


@pytest.mark.parametrize("name", ["video", "motion"])
def test_self_attention_guidance_is_refused_in_windows_by_its_name(models, name):
    for model in (SAG(windowed(models[name])), windowed(SAG(models[name]))):
        with pytest.raises(VideoLDMError, match="The node SelfAttentionGuidance keeps what the model did"):
            prediction(model, noise_of(), cfg=2.0)
    one_call = prediction(SAG(windowed(models[name])), noise_of(LENGTH), cfg=2.0)
    assert torch.equal(one_call, prediction(SAG(models[name]), noise_of(LENGTH), cfg=2.0))
    assert relative_error(one_call, prediction(models[name], noise_of(LENGTH), cfg=2.0)) > 1e-3


class SharesSettings:
    @staticmethod
    def patch(model, scale):
        def inside(q, k, v, extra_options):
            return q * scale, k, v

        def outside(args):
            return args["denoised"] * scale
        m = model.clone()
        m.set_model_attn1_patch(inside)
        m.set_model_sampler_post_cfg_function(outside)
        return m


class KeepsAlso:
    """A patch that keeps something, and guidance or a wrapper that reads or keeps it, wherever core has a place."""

    @staticmethod
    def guided(model, key):
        kept = None

        def inside(q, k, v, extra_options):
            nonlocal kept
            kept = q
            return q, k, v

        def outside(args):
            return args["denoised"] * kept.mean()
        m = model.clone()
        m.set_model_attn2_patch(inside)
        m.model_options[key] = [outside] if key.endswith(("pre_cfg_function", "post_cfg_function")) else outside
        return m

    @staticmethod
    def wrapper():
        kept = None

        def around(executor, *args, **kwargs):
            nonlocal kept
            kept = executor(*args, **kwargs)
            return kept
        return around


class Caches:
    @staticmethod
    def patch(model):
        last = None

        def around(apply_model, args):
            nonlocal last
            if last is None:
                last = apply_model(args["input"], args["timestep"], **args["c"])
            return last
        m = model.clone()
        m.set_model_unet_function_wrapper(around)
        return m


def test_a_node_is_known_by_the_variable_that_its_patch_writes_and_its_guidance_reads(models):
    shares = SharesSettings.patch(models["image"], 0.9)
    assert recording_node(shares.model_options) is None
    assert recording_node(KeepsAlso.guided(shares, "sampler_post_cfg_function").model_options) == "KeepsAlso"
    assert recording_node(INSIDE["PAG"](shares).model_options) is None
    assert recording_node(Caches.patch(shares).model_options) == "Caches"
    for name, patched in INSIDE.items():
        assert recording_node(patched(models["image"]).model_options) is None, name


# What is right in windows

INSIDE = {      # acts within a call, or is linear in what the conditions give
    "PAG": node(nodes_pag.PerturbedAttentionGuidance, 3.0),
    "ToMe": node(nodes_tomesd.TomePatchModel, 0.5),
    "HyperTile": node(nodes_hypertile.HyperTile, 32, 2, 0, False),
    "deep shrink": node(nodes_model_downscale.PatchModelAddDownscale, 1, 2.0, 0.0, 1.0, True, "bicubic", "bicubic"),
    "FreSca": node(nodes_fresca.FreSca, 0.7, 1.6, 1),
    "Epsilon Scaling": node(nodes_eps.EpsilonScaling, 1.1),
}
OUTSIDE = {     # acts on what a step predicts for all frames
    "TCFG": node(nodes_tcfg.TCFG),
    "APG": node(nodes_apg.APG, 0.5, 2.0, 0.3),
    "CFG-Zero*": node(nodes_cfg.CFGZeroStar),
    "Mahiro": node(nodes_mahiro.Mahiro),
    "Rescale CFG": old_node(nodes_model_advanced.RescaleCFG, 0.7),
}


def seeded(model, noise, **options):
    torch.manual_seed(0)        # ToMe and HyperTile draw
    return prediction(model, noise, **options)


@pytest.mark.parametrize("name", INSIDE)
def test_nodes_that_act_within_a_call_are_right_in_windows(models, name):
    patched, noise = INSIDE[name](models["video"]), noise_of(side=8)
    seen = seeded(INSIDE[name](windowed(models["video"])), noise, cfg=2.0)
    torch.manual_seed(0)
    reference = by_hand(lambda part, _: prediction(patched, part, cfg=2.0), noise)
    assert relative_error(seen, reference) < 1e-5
    assert relative_error(seen, prediction(windowed(models["video"]), noise, cfg=2.0)) > 1e-4


@pytest.mark.parametrize("name", OUTSIDE)
def test_nodes_that_act_on_whole_steps_are_right_in_windows(models, name):
    def given(model):
        """The node on a MODEL that predicts what the windows do, joined by hand."""
        m = OUTSIDE[name](model)
        m.set_model_sampler_calc_cond_batch_function(lambda args: list(joined))
        return m
    noise = noise_of()
    joined = [by_hand(lambda part, _, cond=cond: prediction(models["video"], part, positive=cond), noise)
              for cond in (text(), text(12))]
    seen = prediction(OUTSIDE[name](windowed(models["video"])), noise, cfg=2.0)
    assert relative_error(seen, prediction(given(models["image"]), noise, cfg=2.0)) < 1e-5
    assert relative_error(seen, prediction(windowed(models["video"]), noise, cfg=2.0)) > 1e-4


# Deep shrink and known frames

@pytest.mark.parametrize("after_skip", [True, False])
def test_deep_shrink_takes_known_frames_at_the_size_that_the_network_runs_at(models, after_skip):
    shrink = node(nodes_model_downscale.PatchModelAddDownscale, 1, 2.0, 0.0, 1.0, after_skip, "bicubic", "bicubic")
    noise = noise_of(LENGTH)
    seen = prediction(shrink(known(models["prediction"])), noise)
    assert relative_error(seen[1:], prediction(shrink(models["prediction"]), noise)[1:]) > 1e-3
    assert relative_error(seen, prediction(known(models["prediction"]), noise)) > 1e-3


@pytest.mark.parametrize("key", ["sampler_pre_cfg_function", "sampler_cfg_function", "sampler_post_cfg_function",
                                 "sampler_calc_cond_batch_function"])
def test_guidance_that_reads_what_a_patch_keeps_is_found_in_every_place_that_core_has(models, key):
    assert recording_node(KeepsAlso.guided(models["image"], key).model_options) == "KeepsAlso"


@pytest.mark.parametrize("kind", [WrappersMP.APPLY_MODEL, WrappersMP.DIFFUSION_MODEL])
def test_a_wrapper_that_keeps_something_is_found_on_either_side_of_the_model(kind):
    while_sampling = {"transformer_options": {"wrappers": {kind: {"key": [KeepsAlso.wrapper()]}}}}
    assert recording_node(while_sampling) == "KeepsAlso"
