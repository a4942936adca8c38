"""Temporal layers on a MODEL: precision and place of their weights, motion LoRA, noise and schedule.

See docs/papers.md#v18.
"""

import copy

import comfy.k_diffusion.sampling
import comfy.lora
import comfy.model_sampling
import comfy.sample
import comfy.samplers
import pytest
import torch
from comfy.ldm.modules import attention
from comfy.patcher_extension import WrappersMP
from comfy_extras.nodes_model_advanced import LCM, ModelSamplingContinuousEDM, ModelSamplingDiscrete

from video_ldm.nodes.host import sampling
from video_ldm.nodes.host.attach import attach_layers
from video_ldm.nodes.host.layer_weights import build_stack
from video_ldm.nodes.host.noise_schedule import same_steps, with_schedule
from video_ldm.nodes.host.options import LayerSet, with_clip_options
from video_ldm.nodes.load import AS_MODEL, AS_TRAINED, LoadTemporalLayers
from video_ldm.nodes.sample import VideoLDMSampler
from video_ldm.temporal.call import CallSettings, open_call
from video_ldm.temporal.errors import VideoLDMError
from video_ldm.tests import attach_help
from video_ldm.tests.attach_help import (
    HEIGHT,
    WIDTH,
    load_model,
    motion_lora,
    noise_of,
    partly_loaded,
    prediction,
    predictions,
    text,
    with_layers,
)
from video_ldm.tests.host import checkpoints
from video_ldm.tests.host.checkpoints import FRAMES
from video_ldm.tests.small import batch, relative_error

folder, state, image = attach_help.folder, attach_help.state, attach_help.image     # fixtures


# Weights

@pytest.mark.parametrize("file, dtype", [("video.safetensors", torch.float16), ("motion.safetensors", torch.bfloat16),
                                         ("video.safetensors", torch.float8_e4m3fn)])
def test_weights_of_low_precision_give_what_their_rounded_values_give_in_float32(folder, state, file, dtype):
    rounded = {key: value.to(dtype).float() for key, value in state.items()}
    exact, stored = load_model(rounded), load_model(state, dtype)
    narrow = with_layers(stored, file)
    weights = narrow.get_nested_additional_models()[0].model.state_dict()
    own = torch.float32 if dtype == torch.float8_e4m3fn else dtype      # beside fp8, the file's
    assert {weight.dtype for weight in weights.values()} == {own}
    stack = build_stack(narrow.get_nested_additional_models()[0].model.params,
                               {name: weight.float() for name, weight in weights.items()}, torch.float32)
    reference = prediction(attach_layers(exact, stack, LayerSet(stack.params)))
    assert relative_error(prediction(narrow), reference) < 1e-5


@pytest.mark.parametrize("budget", [0.1, 25e6])
def test_partly_loaded_models_give_what_fully_loaded_ones_give(state, folder, budget):
    """Weights beyond the budget stay where they are and are cast for each call, a Motion LoRA with them."""
    model = load_model(state)
    lora = checkpoints.image_lora()
    names = comfy.lora.model_lora_keys_unet(model.model, {})
    model.add_patches(comfy.lora.load_lora(lora, names), 1.0)
    video = with_layers(model, "motion.safetensors", motion_lora=motion_lora(0.7))
    video = with_layers(video, "video.safetensors", 0.5)
    reference = prediction(video)
    patchers = [video, *video.get_nested_additional_models()]
    with partly_loaded(patchers, budget):
        assert relative_error(prediction(video), reference) < 1e-5
    assert relative_error(prediction(video), reference) < 1e-6


def test_loaded_layers_do_not_change_with_their_file(image, folder):
    path = folder / "rewritten.safetensors"
    checkpoints.save(path, checkpoints.motion_state())
    model = with_layers(image, "rewritten.safetensors")
    before = prediction(model)
    with open(path, "r+b") as file:
        file.seek(-1000000, 2)
        file.write(bytes(1000000))
    assert torch.equal(prediction(model), before)
    assert not torch.equal(prediction(with_layers(image, "rewritten.safetensors")), before)


# Motion LoRA

def merged(path, strength):
    """The motion file with the LoRA merged by hand: W += strength * up @ down."""
    state, lora = checkpoints.motion_state(), checkpoints.motion_lora()
    for key in [key for key in lora if key.endswith(".up.weight")]:
        weight = key.replace("processor.", "").replace("_lora.up.weight", ".0.weight" if "to_out" in key else ".weight")
        state[weight] = state[weight] + strength * lora[key] @ lora[key.replace(".up.", ".down.")]
    checkpoints.save(path, state)


@pytest.mark.parametrize("strength", [1.0, -0.5])
def test_a_motion_lora_is_the_same_as_merging_it_by_hand(image, folder, strength):
    merged(folder / f"merged{strength}.safetensors", strength)
    patched = prediction(with_layers(image, "motion.safetensors", motion_lora=motion_lora(strength)))
    assert relative_error(patched, prediction(with_layers(image, f"merged{strength}.safetensors"))) < 1e-5
    assert relative_error(patched, prediction(with_layers(image, "motion.safetensors"))) > 1e-3


def test_two_motion_lora_add_up(image, folder):
    twice = [*motion_lora(0.25), *motion_lora(0.75)]
    once = prediction(with_layers(image, "motion.safetensors", motion_lora=motion_lora(1.0)))
    assert relative_error(prediction(with_layers(image, "motion.safetensors", motion_lora=twice)), once) < 1e-5


def test_a_motion_lora_stays_on_the_layers_it_was_given_to(image, folder):
    bare = with_layers(image, "motion.safetensors")
    before = prediction(bare)
    patched = with_layers(image, "motion.safetensors", motion_lora=motion_lora(1.0))
    other = with_layers(image, "motion.safetensors", motion_lora=motion_lora(1.0))
    changed = prediction(patched)
    assert torch.equal(prediction(bare), before)
    assert torch.equal(prediction(other), changed)
    assert torch.equal(prediction(with_layers(image, "motion.safetensors")), before)
    chained = prediction(with_layers(bare, "motion.safetensors", motion_lora=motion_lora(1.0)))
    reverse = prediction(with_layers(patched, "motion.safetensors"))
    assert relative_error(chained, reverse) > 1e-4      # the LoRA is on the second set alone, then on the first


def test_layers_with_and_without_a_motion_lora_run_in_turn_in_one_sampling_each_as_it_is_alone(image, folder):
    """Core patches the weights of a LoRA in place: layers of one file that shared them would all be patched."""
    bare, weak, strong = (with_layers(image, "motion.safetensors", **({"motion_lora": motion_lora(s)} if s else {}))
                          for s in (0, 0.3, 1.0))
    alone = [prediction(model) for model in (strong, bare, weak)]
    seen = predictions(strong, others=[bare, weak])
    assert [relative_error(*pair) < 1e-5 for pair in zip(seen, (*alone, alone[0]))] == [True] * 4
    assert min(relative_error(alone[0], alone[1]), relative_error(alone[2], alone[1])) > 1e-4


def test_a_set_with_a_motion_lora_behind_the_same_set_without_is_that_set_and_a_merged_one(image, folder):
    merged(folder / "merged1.safetensors", 1.0)
    first = with_layers(image, "motion.safetensors", 0.5)
    chained = prediction(with_layers(first, "motion.safetensors", motion_lora=motion_lora(1.0)))
    assert relative_error(chained, prediction(with_layers(first, "merged1.safetensors"))) < 1e-5


# The attention of the host

@pytest.mark.parametrize("file, over_frames, to_text", [("motion.safetensors", 8, 0), ("video.safetensors", 4, 4)])
def test_on_other_devices_than_a_cpu_layers_attend_as_the_host_was_told_to(image, folder, monkeypatch, file,
                                                                           over_frames, to_text):
    """Run on the meta device, which has shapes alone. In 4 places AnimateDiff attends to frames twice, Video LDM's
    layers once and to text once. The band of convolution in time comes as numbers, on which core's attentions agree."""
    asked = []

    def chosen(q, k, v, heads, mask=None, **options):
        asked.append((len(q), q.shape[1], k.shape[1], mask if mask is None else (mask.dtype, tuple(mask.shape))))
        return q.new_empty(*q.shape[:2], v.shape[-1])
    monkeypatch.setattr(attention, "optimized_attention", chosen)
    stack = copy.deepcopy(with_layers(image, file).get_nested_additional_models()[0].model).to("meta")
    unet, places = checkpoints.meta_unet(), HEIGHT // 8 * WIDTH // 8
    x, timesteps, context = (part.to("meta") for part in batch(1, 9, height=HEIGHT // 8, width=WIDTH // 8))
    with open_call(unet, [(stack, CallSettings(9, max_distance=3))], context):
        unet(x, timesteps, context=context)
    band = (torch.float32, (9, 9))
    assert [one for one in asked if one[:2] == (places, 9)] == [(places, 9, 9, band)] * over_frames
    assert [one for one in asked if one[:2] == (1, 9 * places)] == [(1, 9 * places, 7, None)] * to_text


# Noise and schedule (docs/papers.md#v18)

def sigmas_of(betas):
    alphas = torch.cumprod(1 - betas, 0)
    return ((1 - alphas) / alphas) ** 0.5


def test_core_calls_the_papers_schedule_linear_evenly_spaced_in_sqrt_beta(image):
    sigmas = sigmas_of(torch.linspace(0.00085 ** 0.5, 0.012 ** 0.5, 1000, dtype=torch.float64) ** 2)
    ours = with_schedule(image, "linear", 0.00085, 0.012, "eps").get_model_object("model_sampling")
    assert relative_error(ours.sigmas.double(), sigmas) < 1e-5
    assert torch.equal(ours.sigmas, image.get_model_object("model_sampling").sigmas)


def test_the_trained_schedule_is_applied_unless_told_to_keep_the_models_own(image, folder):
    def sigma_max(file, schedule):
        return float(with_layers(image, file, schedule=schedule).get_model_object("model_sampling").sigma_max)
    evenly = sigmas_of(torch.linspace(0.00085, 0.012, 1000, dtype=torch.float64))
    assert sigma_max("motion.safetensors", AS_TRAINED) == pytest.approx(float(evenly[-1]), rel=1e-5)
    assert float(evenly[-1]) == pytest.approx(25.15, abs=0.01)
    assert sigma_max("motion.safetensors", AS_MODEL) == pytest.approx(14.6146, abs=1e-3)
    assert sigma_max("video.safetensors", AS_TRAINED) == pytest.approx(14.6146, abs=1e-3)


def discrete(model, kind, zsnr=False):
    """What core's node ModelSamplingDiscrete makes of a MODEL."""
    return ModelSamplingDiscrete().patch(model, kind, zsnr)[0]


def sampling_of(model):
    return model.get_model_object("model_sampling")


EVENLY = torch.linspace(0.00085, 0.012, 1000, dtype=torch.float64)      # AnimateDiff's betas


def test_the_layers_prediction_counts_where_no_node_on_the_model_says_another(image):
    told = sampling_of(with_schedule(image, "sqrt_linear", 0.00085, 0.012, "v"))
    assert isinstance(told, comfy.model_sampling.V_PREDICTION)
    unsaid = sampling_of(with_schedule(image, "sqrt_linear", 0.00085, 0.012, None))
    assert not isinstance(unsaid, comfy.model_sampling.V_PREDICTION) and isinstance(unsaid, comfy.model_sampling.EPS)
    chained = with_schedule(with_schedule(image, "linear", 0.00085, 0.012, "v"), "sqrt_linear", 0.00085, 0.012, "eps")
    assert not isinstance(sampling_of(chained), comfy.model_sampling.V_PREDICTION)


@pytest.mark.parametrize("kind, base", [
    ("eps", comfy.model_sampling.EPS), ("v_prediction", comfy.model_sampling.V_PREDICTION), ("lcm", LCM),
    ("x0", comfy.model_sampling.X0), ("img_to_img", comfy.model_sampling.IMG_TO_IMG)])
@pytest.mark.parametrize("zsnr", [False, True])
def test_a_node_before_the_layers_keeps_its_rules_on_the_trained_betas(image, folder, kind, base, zsnr):
    found = sampling_of(with_layers(discrete(image, kind, zsnr), "motion.safetensors", schedule=AS_TRAINED))
    trained = sigmas_of(EVENLY)
    if zsnr:
        trained = comfy.model_sampling.rescale_zero_terminal_snr_sigmas(trained)
    assert isinstance(found, base)
    assert isinstance(found, comfy.model_sampling.V_PREDICTION) == (kind == "v_prediction")
    wanted = trained[19::20] if kind == "lcm" else trained      # LCM takes 50 of 1000 steps
    assert relative_error(found.sigmas.double()[:-1], wanted[:-1]) < 1e-5 and len(found.sigmas) == len(wanted)
    assert float(found.sigma_max) == pytest.approx(float(wanted[-1]), rel=1e-3)


def core_sample(model, scheduler="ddim_uniform", steps=3, denoise=1.0, sampler="euler", seen=None):
    """KSampler, and the noise levels that its sampler got."""
    m = model.clone()

    def note(executor, guider, sigmas, *args, **kwargs):
        if seen is not None:
            seen.append(sigmas.clone())
        return executor(guider, sigmas, *args, **kwargs)
    m.add_wrapper_with_key(WrappersMP.SAMPLER_SAMPLE, "test", note)
    noise = noise_of()
    return comfy.sample.sample(m, noise, steps, 1.0, sampler, scheduler, text(), text(12), torch.zeros_like(noise),
                               seed=7, disable_pbar=True, denoise=denoise)


@pytest.mark.parametrize("kind", ["v_prediction", "lcm"])
def test_a_node_behind_the_layers_gives_the_same_frames_as_before_them(image, folder, kind):
    before = with_layers(discrete(image, kind), "motion.safetensors", schedule=AS_TRAINED)
    after = discrete(with_layers(image, "motion.safetensors", schedule=AS_TRAINED), kind)
    assert float(sampling_of(after).sigma_max) == pytest.approx(14.6146, abs=1e-3)
    for scheduler, denoise in (("ddim_uniform", 1.0), ("sgm_uniform", 0.6)):
        levels = []
        one, other = (core_sample(model, scheduler, denoise=denoise, seen=levels) for model in (before, after))
        assert relative_error(levels[1], levels[0]) < 1e-6
        assert relative_error(other, one) < 1e-5
    assert float(levels[0][0]) < 25 < float(sampling_of(before).sigma_max)
    # A scheduler that spaces noise levels, not steps, is right on the pack's samplers, which ask it themselves.
    latent = {"samples": torch.zeros_like(noise_of())}
    one, other = (sampling.ksample(model, 7, 3, 1.0, "euler", "karras", text(), text(12), latent, 1.0)
                  for model in (before, after))
    assert torch.equal(one, other)


def test_the_models_own_schedule_behind_the_layers_stays(image, folder):
    m, levels = discrete(with_layers(image, "motion.safetensors", schedule=AS_MODEL), "eps"), []
    core_sample(m, seen=levels)
    assert float(levels[0][0]) < 14.62


def test_putting_betas_back_changes_no_model_and_lasts_for_one_sampling(image, folder):
    plain = core_sample(image)
    lost = discrete(with_layers(image, "motion.safetensors", schedule=AS_TRAINED), "v_prediction")
    own = sampling_of(lost)
    first = core_sample(lost)
    assert sampling_of(lost) is own and torch.equal(core_sample(image), plain)
    assert torch.equal(core_sample(lost), first)


def test_noise_levels_that_were_chosen_with_the_trained_betas_stay_as_they_are(image, folder):
    trained = with_layers(image, "motion.safetensors", schedule=AS_TRAINED)
    right, wrong = sampling_of(trained), sampling_of(image)
    for scheduler in ("ddim_uniform", "normal", "karras"):
        chosen = comfy.samplers.calculate_sigmas(right, scheduler, 5)
        assert torch.equal(same_steps(chosen, wrong, right), chosen)
        moved = same_steps(comfy.samplers.calculate_sigmas(wrong, scheduler, 5), wrong, right)
        assert float(moved[0]) == pytest.approx(float(chosen[0]), rel=1e-5) and moved[-1] == 0
        if scheduler != "karras":
            assert relative_error(moved, chosen) < 1e-5


def test_a_schedule_without_betas_is_refused(image, folder):
    continuous = ModelSamplingContinuousEDM().patch(image, "v_prediction", 120.0, 0.002)[0]
    with pytest.raises(VideoLDMError, match="has no place for the betas .* schedule on Load Temporal Layers"):
        with_layers(continuous, "motion.safetensors", schedule=AS_TRAINED)
    with_layers(continuous, "motion.safetensors", schedule=AS_MODEL)
    behind = ModelSamplingContinuousEDM().patch(with_layers(image, "motion.safetensors", schedule=AS_TRAINED),
                                                "v_prediction", 120.0, 0.002)[0]
    with pytest.raises(VideoLDMError, match="has no place for the betas"):
        core_sample(behind)


def test_the_report_says_which_schedule_and_prediction_are_in_force(image, folder):
    def report(model, file, schedule):
        return LoadTemporalLayers.execute(model, file, 1.0, schedule).result[1]
    lcm = report(discrete(image, "lcm", True), "motion.safetensors", AS_TRAINED)
    assert "Noise schedule: as trained (sqrt_linear 0.00085 to 0.012)." in lcm
    assert "Prediction: that of the MODEL (LCM, 50 of 1000 steps, zero terminal SNR)." in lcm
    assert "Prediction: that of the MODEL (eps)." in report(image, "motion.safetensors", AS_TRAINED)
    first = with_layers(image, "motion.safetensors", schedule=AS_TRAINED)
    second = report(first, "video.safetensors", AS_TRAINED)
    assert "takes the place of that of motion.safetensors (sqrt_linear 0.00085 to 0.012)" in second
    assert "the model's own, which is that of motion.safetensors" in report(first, "video.safetensors", AS_MODEL)
    assert "Noise schedule: the model's own." in report(image, "video.safetensors", AS_MODEL)


def ddim_with_eta_1(model, x, sigmas, extra_args=None, callback=None, disable=None):
    """DDIM (2010.02502), Eq. 12 and 16 with eta 1, in float64 and its own variables:
    x_t = sqrt(a) x0 + sqrt(1 - a) eps."""
    alphas = 1 / (1 + sigmas.double() ** 2)
    noises = comfy.k_diffusion.sampling.default_noise_sampler(x, seed=ddim_with_eta_1.seed)
    z = alphas[0].sqrt() * x.double()
    for i in range(len(sigmas) - 1):
        a, a_next = alphas[i], alphas[i + 1]
        denoised = model((z / a.sqrt()).to(x.dtype), sigmas[i] * x.new_ones(len(x)), **extra_args).double()
        eps = (z - a.sqrt() * denoised) / (1 - a).sqrt()
        spread = ((1 - a_next) / (1 - a)).sqrt() * (1 - a / a_next).sqrt()
        z = a_next.sqrt() * denoised + (1 - a_next - spread ** 2).clamp(min=0).sqrt() * eps
        if a_next < 1:
            z = z + spread * noises(sigmas[i], sigmas[i + 1]).double()
    return z.to(x.dtype)


def test_the_papers_sampler_ddim_with_eta_1_is_cores_ancestral_euler_on_uniform_steps(image, folder, monkeypatch):
    model = with_clip_options(with_layers(image, "video.safetensors"), FRAMES)
    latent, steps, seed = {"samples": torch.zeros_like(noise_of())}, 4, 7
    ours = sampling.ksample(model, seed, steps, 1.0, "euler_ancestral", "ddim_uniform", text(), text(12), latent, 1.0)
    # Core's seed of the noise that is added underway is version-dependent: read it where core passes it on.
    original = comfy.k_diffusion.sampling.default_noise_sampler
    seeds = []
    monkeypatch.setattr(comfy.k_diffusion.sampling, "default_noise_sampler",
                        lambda x, seed=None: (seeds.append(seed), original(x, seed=seed))[1])
    again = sampling.ksample(model, seed, steps, 1.0, "euler_ancestral", "ddim_uniform", text(), text(12), latent, 1.0)
    assert torch.equal(again, ours)
    ddim_with_eta_1.seed = seeds[0]
    monkeypatch.setattr(comfy.samplers, "sampler_object", lambda name: comfy.samplers.KSAMPLER(ddim_with_eta_1))
    papers = sampling.ksample(model, seed, steps, 1.0, "euler_ancestral", "ddim_uniform", text(), text(12), latent, 1.0)
    assert relative_error(ours, papers) < 1e-5


def test_every_frame_starts_from_noise_of_its_own(image, folder, monkeypatch):
    """Independent standard normal frames, those of KSampler for the seed: one draw for the whole batch."""
    drawn = []
    monkeypatch.setattr(comfy.sample, "sample", lambda model, noise, *args, **kwargs: drawn.append(noise) or noise)
    model = with_layers(image, "video.safetensors")
    VideoLDMSampler.execute(model, text(), text(12), frames=8, width=512, height=512, clips=2, seed=5, steps=1, cfg=1.0,
                            sampler="euler", scheduler="normal", denoise=1.0)
    frames = drawn[0].flatten(1).double()
    assert torch.equal(drawn[0], comfy.sample.prepare_noise(torch.zeros(16, 4, 64, 64), 5))
    correlation = torch.corrcoef(frames) - torch.eye(16)
    assert correlation.abs().max() < 5 * frames.shape[1] ** -0.5
    assert (frames.mean(1).abs() < 0.05).all() and ((frames.std(1) - 1).abs() < 0.05).all()
