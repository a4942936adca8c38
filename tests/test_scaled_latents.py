"""Noise schedules that scale the clean latents down, against VideoCrafter's own formulas (docs/papers.md#videocrafter).

    x_t = sqrt(a_t) s_t x_0 + sqrt(1 - a_t) eps
    a DDIM step: x_0 = (x_t - sqrt(1 - a_t) eps) / sqrt(a_t) / s_t, then the same line with t' and the same eps
"""

import comfy.model_sampling
import comfy.sample
import pytest
import torch
from comfy.k_diffusion.sampling import sample_euler
from comfy_extras.nodes_model_advanced import LCM, ModelSamplingContinuousEDM, ModelSamplingDiscrete

from video_ldm.nodes.host.noise_schedule import keep_networks, report, schedule_of, with_schedule, with_trained_betas
from video_ldm.temporal.diffusion import DataScale
from video_ldm.temporal.errors import VideoLDMError
from video_ldm.temporal.formats.temporal_file import Schedule
from video_ldm.tests import attach_help
from video_ldm.tests.attach_help import text
from video_ldm.tests.reference_videocrafter import scale_table
from video_ldm.tests.small import relative_error

state, image = attach_help.state, attach_help.image     # fixtures
BETAS = ("linear", 0.00085, 0.012)
ALPHAS = torch.cumprod(1 - torch.linspace(0.00085 ** 0.5, 0.012 ** 0.5, 1000, dtype=torch.float64) ** 2, 0)
STEPS = (801, 601, 401, 201, 1)         # 5 steps of DDIM, as VideoCrafter's sampler chooses them
TABLES = {"videocrafter2": DataScale(0.7), "videocrafter1_1024": DataScale(0.3), "videocrafter1_512": None}


def table_of(kind):
    table = scale_table(kind)
    return torch.ones(1000, dtype=torch.float64) if table is None else table[:1000].double()


def noise_in(x, timestep):
    """What a network would predict: some function of its input and timestep."""
    return torch.tanh(1.3 * x + timestep / 700) - 0.2 * x


def published_step(x, t, before, table):
    eps = noise_in(x, t)
    clean = (x - (1 - ALPHAS[t]).sqrt() * eps) / ALPHAS[t].sqrt() / table[t]
    return ALPHAS[before].sqrt() * table[before] * clean + (1 - ALPHAS[before]).sqrt() * eps, clean


class Denoiser:
    """What core's samplers call: the network behind a model_sampling object."""

    def __init__(self, sampling):
        self.sampling = sampling
        self.inner_model = self
        self.model_sampling = sampling

    def __call__(self, x, sigma, **kwargs):
        eps = noise_in(self.sampling.calculate_input(sigma, x), float(self.sampling.timestep(sigma)[0]))
        return self.sampling.calculate_denoised(sigma, eps, x)


def start(seed=0):
    return torch.randn(6, 4, 3, 5, generator=torch.Generator().manual_seed(seed)).double()


@pytest.mark.parametrize("kind", TABLES)
def test_each_euler_step_and_the_whole_chain_are_the_published_ddim(kind):
    sampling, table = schedule_of(*BETAS, "eps", scale=TABLES[kind]), table_of(kind)
    levels = sampling.sigmas[[*STEPS, 0]].double()
    x, seen = start(), []
    ours = x / sampling.calculate_input(levels[:1], torch.ones(1, 1, 1, 1)).double()
    result = sample_euler(Denoiser(sampling), ours, levels, extra_args={}, disable=True,
                          callback=lambda step: seen.append(step["x"].clone()))
    for n, (t, before) in enumerate(zip(STEPS, (*STEPS[1:], 0))):
        assert relative_error(sampling.calculate_input(levels[n:n + 1], seen[n]), x) < 1e-5
        x = published_step(x, t, before, table)[0]
    assert relative_error(sampling.calculate_input(levels[-1:], result), x) < 1e-5


@pytest.mark.parametrize("kind", TABLES)
def test_one_step_is_the_published_one_between_any_two_timesteps(kind):
    sampling, table = schedule_of(*BETAS, "eps", scale=TABLES[kind]), table_of(kind)
    for t, before in ((999, 998), (500, 399), (399, 398), (398, 17), (300, 1), (1, 0)):
        levels = sampling.sigmas[[t, before]].double()
        x = start(t)
        ours = x / sampling.calculate_input(levels[:1], torch.ones(1, 1, 1, 1)).double()
        result = sample_euler(Denoiser(sampling), ours, levels, extra_args={}, disable=True)
        assert relative_error(sampling.calculate_input(levels[1:], result),
                              published_step(x, t, before, table)[0]) < 1e-5


def test_the_scale_is_the_published_table():
    for kind, scale in TABLES.items():
        if scale is not None:
            assert torch.allclose(scale.factors(len(scale_table(kind))), scale_table(kind).double(), atol=1e-6)
    assert torch.equal(DataScale(0.7).factors(3), DataScale(0.7).factors(1000)[:3])


@pytest.mark.parametrize("last", [0.7, 0.3])
def test_the_sigmas_and_the_input_are_those_of_the_noised_latents(last):
    sampling, scale = schedule_of(*BETAS, "eps", scale=DataScale(last)), DataScale(last).factors(1000)
    wanted = (1 - ALPHAS).sqrt() / (ALPHAS.sqrt() * scale)
    assert relative_error(sampling.sigmas.double(), wanted) < 1e-5
    assert bool((sampling.sigmas.diff() > 0).all())
    clean, noise = start(1), start(2)
    for t in (0, 1, 250, 399, 400, 700, 999):
        noised = ALPHAS[t].sqrt() * scale[t] * clean + (1 - ALPHAS[t]).sqrt() * noise
        sigma = sampling.sigmas[t:t + 1]
        core = sampling.noise_scaling(sigma.double(), noise, clean)
        assert relative_error(sampling.calculate_input(sigma, core), noised) < 1e-5
        assert int(sampling.timestep(sigma)) == t
    # Between two timesteps the input's variance of noise and latents still adds up to that of the plain process.
    for sigma in torch.tensor([0.05, 0.7, 3.0, 11.0]):
        amplitude, factor = sampling.amplitude(sigma), sampling.factor(sigma)
        assert float((amplitude * sigma) ** 2 + (amplitude / factor) ** 2) == pytest.approx(1, rel=1e-5)


@pytest.mark.parametrize("scale", TABLES.values())
def test_a_sampling_from_noise_alone_starts_with_the_noise_itself(scale):
    sampling, noise = schedule_of(*BETAS, "eps", scale=scale), start(3)
    sigma = sampling.sigma_max.double()
    x = sampling.noise_scaling(sigma, noise, torch.zeros_like(noise), max_denoise=True)
    assert relative_error(sampling.calculate_input(sigma[None], x), noise) < 1e-5


def test_a_network_without_a_scale_has_cores_own_schedule():
    plain = schedule_of(*BETAS, "eps")
    assert type(plain).calculate_input is comfy.model_sampling.EPS.calculate_input
    assert torch.equal(plain.sigmas, comfy.model_sampling.ModelSamplingDiscrete().sigmas)


# On a MODEL

SCALED = Schedule(*BETAS, "eps", DataScale(0.7))


@pytest.fixture
def scaled(image):
    """The image MODEL with a scaled schedule, as a video network has it."""
    m = image.clone()
    m.add_object_patch("model_sampling", schedule_of(*BETAS, "eps", scale=SCALED.scale))
    return keep_networks(m, SCALED, "net.ckpt")


def discrete(model, kind, zsnr=False):
    return ModelSamplingDiscrete().patch(model, kind, zsnr)[0]


def sample(model, sampler="euler", scheduler="ddim_uniform"):
    noise = attach_help.noise_of()
    return comfy.sample.sample(model, noise, 3, 1.0, sampler, scheduler, text(), text(12), torch.zeros_like(noise),
                               seed=7, disable_pbar=True)


def test_a_node_behind_the_network_does_not_drop_the_scale(image, scaled):
    for scheduler in ("ddim_uniform", "normal"):
        whole = sample(scaled, scheduler=scheduler)
        assert relative_error(sample(discrete(scaled, "eps"), scheduler=scheduler), whole) < 1e-5
        assert relative_error(sample(image, scheduler=scheduler), whole) > 1e-2


def test_lcm_behind_the_network_takes_fifty_of_the_scaled_levels(scaled):
    found = with_trained_betas(discrete(scaled, "lcm")).get_model_object("model_sampling")
    assert isinstance(found, LCM) and len(found.sigmas) == 50
    assert relative_error(found.sigmas, schedule_of(*BETAS, "eps", scale=SCALED.scale).sigmas[19::20]) < 1e-6
    assert torch.isfinite(sample(discrete(scaled, "lcm"), "lcm", "sgm_uniform")).all()
    # The input is that of the same timestep among all thousand.
    sigma = found.sigmas[7:8]
    assert float(found.amplitude(sigma)) == pytest.approx(
        float(ALPHAS[159].sqrt() * SCALED.scale.factors(1000)[159]), rel=1e-5)


@pytest.mark.parametrize("kind", ["v_prediction", "x0", "img_to_img"])
def test_a_prediction_that_knows_no_scale_is_refused(scaled, kind):
    with pytest.raises(VideoLDMError, match=r"net.ckpt was trained to predict noise in latents that are scaled down, "
                                            r"and a node .* Set that node, ModelSamplingDiscrete, to eps or lcm"):
        sample(discrete(scaled, kind))


def test_a_schedule_without_timesteps_is_refused(scaled):
    other = ModelSamplingContinuousEDM().patch(scaled, "eps", 120.0, 0.002)[0]
    with pytest.raises(VideoLDMError, match="has no place for the scaled latents that net.ckpt was trained on"):
        sample(other)


def test_layers_with_another_schedule_are_refused_on_the_network(scaled):
    with pytest.raises(VideoLDMError, match="net.ckpt samples latents that are scaled down, and mm.ckpt was not "
                                            "trained on such. Set schedule on Load Temporal Layers to the model's own"):
        with_schedule(scaled, "sqrt_linear", 0.00085, 0.012, "eps", "mm.ckpt")
    with pytest.raises(VideoLDMError, match="scaled down"):
        with_schedule(discrete(scaled, "eps"), "sqrt_linear", 0.00085, 0.012, "eps", "mm.ckpt")
    # "The model's own" is the network's: Load Temporal Layers' report says so.
    assert report(scaled, as_trained=False) == [
        "Noise schedule: the model's own, which is that of net.ckpt (linear 0.00085 to 0.012, latents scaled down to "
        "0.7).", "Prediction: that of the MODEL (eps, latents scaled down to 0.7)."]
