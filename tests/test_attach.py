"""Temporal layers on a MODEL under ComfyUI's own sampling and memory management, in this process."""

import gc
import logging
import weakref

import comfy.k_diffusion.sampling
import comfy.lora
import comfy.model_management
import comfy.model_patcher
import comfy.model_sampling
import comfy.sample
import comfy.sampler_helpers
import comfy.samplers
import comfy.sd
import folder_paths
import pytest
import torch
from comfy.patcher_extension import WrappersMP

from video_ldm.nodes.host import attach, sampling
from video_ldm.nodes.load import AS_MODEL, AS_TRAINED, LoadTemporalLayers, MotionLoRA
from video_ldm.nodes.sample import VideoLDMSampler
from video_ldm.temporal.errors import VideoLDMError
from video_ldm.tests.host import checkpoints
from video_ldm.tests.host.checkpoints import FRAMES
from video_ldm.tests.small import relative_error

HEIGHT, WIDTH = 16, 24      # pixels: latents of 2 x 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of temporal files and motion LoRA that ComfyUI lists."""
    folder = tmp_path_factory.mktemp("video_ldm")
    for kind in ("video_ldm", "video_ldm_motion_lora"):
        folder_paths.add_model_folder_path(kind, str(folder))
    checkpoints.write_video_layers(folder / "video.safetensors")
    checkpoints.save(folder / "motion.safetensors", checkpoints.motion_state())
    checkpoints.save(folder / "lora.safetensors", checkpoints.motion_lora())
    return folder


@pytest.fixture(scope="module")
def state():
    return checkpoints.unet_state()


@pytest.fixture(scope="module")
def image(state):
    """The image MODEL, shared by the tests: nothing they do may stay on it."""
    model = load_model(state)
    yield model
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.model.modules())
    assert all(torch.equal(value, state[key]) for key, value in model.model.diffusion_model.state_dict().items())


def load_model(state, dtype=None):
    return comfy.sd.load_diffusion_model_state_dict(dict(state), model_options={"dtype": dtype} if dtype else {})


def with_layers(model, file, strength=1.0, schedule=AS_MODEL, **options):
    return LoadTemporalLayers.execute(model, file, strength, schedule, **options).result[0]


def motion_lora(strength, file="lora.safetensors"):
    return MotionLoRA.execute(file, strength).result[0]


def noise_of(clips=1, frames=FRAMES, seed=0):
    return torch.randn(clips * frames, 4, HEIGHT // 8, WIDTH // 8, generator=torch.Generator().manual_seed(seed))


def text(seed=11):
    return checkpoints.conditioning(seed)


class FirstPrediction(comfy.samplers.CFGGuider):
    """Keeps what is predicted for the first noise: by its MODEL, by `others` of the same network in turn, and by its own
    again."""

    others = ()

    def predict_noise(self, x, timestep, model_options={}, seed=None):
        turns = [model_options, *self.other_options(), model_options] if self.others else [model_options]
        predict = super().predict_noise
        self.seen = [predict(x, timestep, options, seed) for options in turns]
        return self.seen[0]

    def other_options(self):
        for other in self.others:
            options = comfy.model_patcher.create_model_options_clone(other.model_options)
            comfy.sampler_helpers.prepare_model_patcher(other, self.conds, options)
            yield options


def predictions(model, others=(), positive=None, negative=None, cfg=1.0, noise=None, denoise_sigma=2.0):
    """What MODELs predict for one noisy batch, as FirstPrediction has it."""
    guider = FirstPrediction(model)
    guider.others = others
    guider.set_conds(positive or text(), negative or text(12))
    guider.set_cfg(cfg)
    noise = noise_of() if noise is None else noise
    comfy.model_management.load_models_gpu([part for other in others for part in other.get_nested_additional_models()])
    guider.sample(noise, torch.zeros_like(noise), comfy.samplers.ksampler("euler"), torch.tensor([denoise_sigma, 0.0]),
                  disable_pbar=True, seed=0)
    return guider.seen


def prediction(model, **options):
    return predictions(model, **options)[0]


def batches(model):
    """A clone that notes the batch size of every call of its network, and the notes."""
    m, sizes = model.clone(), []

    def note(executor, x, *args, **kwargs):
        sizes.append(len(x))
        return executor(x, *args, **kwargs)

    m.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "test", note)
    return m, sizes


# Clones

@pytest.mark.parametrize("file", ["video.safetensors", "motion.safetensors"])
def test_two_clones_of_one_model_with_different_strengths_run_in_turn_in_one_guider_without_interacting(image, folder, file):
    full, half = with_layers(image, file), with_layers(image, file, 0.5)
    plain, alone, weak = prediction(image), prediction(full), prediction(half)
    seen = predictions(full, others=[half, image])
    assert [torch.equal(*pair) for pair in zip(seen, (alone, weak, plain, alone))] == [True] * 4
    assert min(relative_error(alone, plain), relative_error(weak, plain), relative_error(alone, weak)) > 1e-3


def test_a_clone_that_dies_unused_does_not_detach_a_live_one(image, folder):
    live = with_layers(image, "video.safetensors")
    before = prediction(live)
    unused = [live.clone(), with_layers(image, "video.safetensors"), with_layers(live, "motion.safetensors")]
    ends = [weakref.ref(clone) for clone in unused]
    unused.clear()
    gc.collect()
    assert [end() for end in ends] == [None] * 3
    assert torch.equal(prediction(live), before)


def test_the_model_that_layers_are_loaded_onto_is_not_changed_and_nothing_is_complained_of(image, folder, caplog):
    options, keys = repr(image.model_options), set(image.model.state_dict())
    with caplog.at_level(logging.WARNING):
        video = with_layers(image, "video.safetensors", schedule=AS_TRAINED, frames_per_clip=FRAMES)
        prediction(video)
    assert caplog.text == ""
    assert repr(image.model_options) == options and not image.additional_models and not image.wrappers
    assert set(image.model.state_dict()) == keys == set(video.model_state_dict())


def test_models_that_use_one_file_share_its_weights_until_the_last_of_them_is_gone(image, folder, caplog):
    one, two = (with_layers(image, "video.safetensors", strength) for strength in (1.0, 0.5))
    stack = weakref.ref(one.get_nested_additional_models()[0].model)
    assert stack() is two.get_nested_additional_models()[0].model
    with caplog.at_level(logging.WARNING):
        prediction(one)
        del one
        gc.collect()
        prediction(two)
    assert "memory leak" not in caplog.text
    del two
    gc.collect()
    comfy.model_management.cleanup_models_gc()
    assert stack() is None


def test_strength_0_is_the_image_model_to_the_bit(image, folder):
    assert torch.equal(prediction(with_layers(image, "video.safetensors", 0.0)), prediction(image))


def test_two_chained_sets_both_act_in_either_order(image, folder):
    """Video LDM layers and AnimateDiff's sit at different places, so that their order is the network's."""
    first = with_layers(image, "video.safetensors", 0.5)
    both = with_layers(first, "motion.safetensors")
    swapped = with_layers(with_layers(image, "motion.safetensors"), "video.safetensors", 0.5)
    second = with_layers(image, "motion.safetensors")
    alone, other, chained = prediction(first), prediction(second), prediction(both)
    assert len(attach.sets_of_layers(both)) == 2
    assert min(relative_error(chained, alone), relative_error(chained, other)) > 1e-4
    assert torch.equal(prediction(swapped), chained) and torch.equal(prediction(first), alone)


# Batches

def test_positive_and_negative_give_the_same_whether_they_share_a_call_or_not(image, folder, monkeypatch):
    model, sizes = batches(with_layers(image, "video.safetensors"))
    together = prediction(model, cfg=3.0)
    monkeypatch.setattr(model.model, "memory_required", lambda *args, **kwargs: float("inf"))
    apart = prediction(model, cfg=3.0)
    assert sizes == [2 * FRAMES] + [FRAMES] * 2
    assert relative_error(apart, together) < 1e-5     # other batch sizes take other paths through the matrix products


def test_conditionings_of_other_lengths_run_apart_and_each_is_what_it_is_alone(image, folder):
    model, sizes = batches(with_layers(image, "video.safetensors"))
    short, long = text(11), checkpoints.conditioning(12, tokens=5)
    both = prediction(model, positive=short, negative=long, cfg=2.0)
    assert sizes == [FRAMES] * 2
    alone = [prediction(model, positive=cond) for cond in (short, long)]
    assert relative_error(both, alone[1] + 2.0 * (alone[0] - alone[1])) < 1e-5


@pytest.mark.parametrize("file", ["video.safetensors", "motion.safetensors"])
def test_three_clips_in_a_batch_are_what_each_is_alone(image, folder, file):
    model = with_layers(image, file, frames_per_clip=FRAMES)
    noise = noise_of(clips=3)
    together = prediction(model, noise=noise)
    alone = torch.cat([prediction(model, noise=clip) for clip in noise.split(FRAMES)])
    assert relative_error(together, alone) < 1e-5
    assert relative_error(prediction(with_layers(image, file), noise=noise), together) > 1e-4     # one clip of 12 frames


def test_a_batch_that_is_no_whole_number_of_clips_is_refused_and_leaves_nothing(image, folder):
    model = with_layers(image, "video.safetensors", frames_per_clip=3)
    with pytest.raises(VideoLDMError, match="batch of 4 frames does not divide into clips of 3 frames"):
        prediction(model)
    assert not any(module._forward_hooks for module in image.model.modules())


def test_conditioning_over_a_part_of_the_picture_runs_at_that_size(image, folder):
    model = with_layers(image, "video.safetensors")
    part = [[text()[0][0], {"area": (2, 2, 0, 0), "strength": 1.0}]]
    seen = prediction(model, positive=part)
    assert seen.isfinite().all() and relative_error(seen, prediction(model)) > 1e-3


# Text of the temporal layers

def test_a_temporal_prompt_is_heard_by_the_temporal_layers_alone(image, folder):
    model = with_layers(image, "video.safetensors")
    same, other = (attach.with_clip_options(model, FRAMES, {0: text(seed)[0][0]}) for seed in (11, 13))
    usual = prediction(model)
    assert torch.equal(prediction(same), usual)
    assert relative_error(prediction(other), usual) > 1e-4
    silent = with_layers(image, "video.safetensors", 0.0)
    silent = attach.with_clip_options(silent, FRAMES, {0: text(13)[0][0]})
    assert torch.equal(prediction(silent), prediction(image))


def test_a_temporal_prompt_of_another_length_and_a_negative_without_one_share_a_call(image, folder):
    model = with_layers(image, "video.safetensors")
    long = checkpoints.conditioning(13, tokens=14)[0][0]
    both = prediction(attach.with_clip_options(model, FRAMES, {0: long}), cfg=2.0)
    positive = prediction(attach.with_clip_options(model, FRAMES, {0: long}))
    negative = prediction(model, positive=text(12))
    assert relative_error(both, negative + 2.0 * (positive - negative)) < 1e-5


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
    stack = attach.build_stack(narrow.get_nested_additional_models()[0].model.params,
                               {name: weight.float() for name, weight in weights.items()}, torch.float32)
    reference = prediction(attach.attach_layers(exact, stack, {"strength": 1.0}))
    assert relative_error(prediction(narrow), reference) < 1e-5


@pytest.mark.parametrize("budget", [0.1, 25e6])
def test_partly_loaded_models_give_what_fully_loaded_ones_give(state, folder, budget):
    """Weights beyond the budget stay where they are and are cast for each call; a Motion LoRA is then added per call."""
    model = load_model(state)
    lora = checkpoints.image_lora()
    names = comfy.lora.model_lora_keys_unet(model.model, {})
    model.add_patches(comfy.lora.load_lora(lora, names), 1.0)
    video = with_layers(with_layers(model, "motion.safetensors", motion_lora=motion_lora(0.7)), "video.safetensors", 0.5)
    reference = prediction(video)
    patchers = [video, *video.get_nested_additional_models()]
    for patcher in patchers:
        patcher.unpatch_model(patcher.offload_device)
        patcher.patch_model(patcher.load_device, lowvram_model_memory=budget)
        assert patcher.model.model_lowvram and patcher.loaded_size() <= budget
        patcher.partially_load = lambda *args, **kwargs: 0      # core would load the rest: the processor has room
    assert relative_error(prediction(video), reference) < 1e-5
    for patcher in patchers:
        del patcher.partially_load
        patcher.unpatch_model(patcher.offload_device)
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


# torch.compile

def test_a_compiled_model_is_refused_whether_it_was_compiled_before_or_after(image, folder):
    from comfy_api.torch_helpers import set_torch_compile_wrapper
    compiled = image.clone()
    set_torch_compile_wrapper(model=compiled, backend="eager")
    with pytest.raises(VideoLDMError, match="compiled by TorchCompileModel"):
        with_layers(compiled, "video.safetensors")
    video = with_layers(image, "video.safetensors").clone()
    set_torch_compile_wrapper(model=video, backend="eager")
    with pytest.raises(VideoLDMError, match="compiled by TorchCompileModel"):
        prediction(video)


# Noise and schedule (statement 18)

def sigmas_of(betas):
    alphas = torch.cumprod(1 - betas, 0)
    return ((1 - alphas) / alphas) ** 0.5


def test_core_calls_the_papers_schedule_linear_evenly_spaced_in_sqrt_beta(image):
    sigmas = sigmas_of(torch.linspace(0.00085 ** 0.5, 0.012 ** 0.5, 1000, dtype=torch.float64) ** 2)
    ours = attach.with_schedule(image, "linear", 0.00085, 0.012, "eps").get_model_object("model_sampling")
    assert relative_error(ours.sigmas.double(), sigmas) < 1e-5
    assert torch.equal(ours.sigmas, image.get_model_object("model_sampling").sigmas)


def test_the_trained_schedule_is_applied_unless_told_to_keep_the_models_own(image, folder):
    def sigma_max(file, schedule):
        return float(with_layers(image, file, schedule=schedule).get_model_object("model_sampling").sigma_max)
    evenly = sigmas_of(torch.linspace(0.00085, 0.012, 1000, dtype=torch.float64))
    assert sigma_max("motion.safetensors", AS_TRAINED) == pytest.approx(float(evenly[-1]), rel=1e-5) == pytest.approx(25.15, abs=0.01)
    assert sigma_max("motion.safetensors", AS_MODEL) == pytest.approx(14.6146, abs=1e-3)
    assert sigma_max("video.safetensors", AS_TRAINED) == pytest.approx(14.6146, abs=1e-3)


def test_a_model_that_predicts_v_keeps_doing_so_unless_the_layers_say_otherwise(image):
    v_model = attach.with_schedule(image, "linear", 0.00085, 0.012, "v")
    kept = attach.with_schedule(v_model, "sqrt_linear", 0.00085, 0.012, None).get_model_object("model_sampling")
    told = attach.with_schedule(v_model, "sqrt_linear", 0.00085, 0.012, "eps").get_model_object("model_sampling")
    assert isinstance(kept, comfy.model_sampling.V_PREDICTION)
    assert not isinstance(told, comfy.model_sampling.V_PREDICTION) and isinstance(told, comfy.model_sampling.EPS)


def ddim_with_eta_1(model, x, sigmas, extra_args=None, callback=None, disable=None):
    """DDIM (2010.02502), Eq. 12 and 16 with eta 1, in float64 and in its own variables: x_t = sqrt(a) x0 + sqrt(1 - a) eps."""
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
    model = attach.with_clip_options(with_layers(image, "video.safetensors"), FRAMES)
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


# Memory

def test_core_is_told_that_a_clip_with_temporal_layers_takes_more_memory_once_however_many_sets_there_are(image, folder):
    def estimate(model):
        asked = []
        guider = FirstPrediction(model)
        guider.set_conds(text(), text(12))
        guider.set_cfg(1.0)
        original = model.model.memory_required
        model.model.memory_required = lambda shape, **kwargs: asked.append(shape[0]) or original(shape, **kwargs)
        try:
            guider.sample(noise_of(), torch.zeros_like(noise_of()), comfy.samplers.ksampler("euler"), torch.tensor([1.0, 0.0]),
                          disable_pbar=True, seed=0)
        finally:
            del model.model.memory_required
        return max(asked)
    once = with_layers(image, "video.safetensors")
    assert estimate(image) == 2 * FRAMES
    assert estimate(once) == estimate(with_layers(once, "motion.safetensors")) == 2 * FRAMES * attach.ACTIVATIONS


def test_a_warning_for_more_frames_than_positions_comes_once(image, folder, caplog):
    model = with_layers(image, "motion.safetensors")
    with caplog.at_level(logging.WARNING):
        predictions(model, noise=noise_of(frames=33))
    assert caplog.text.count("33 frames exceed the 32 positions") == 1


