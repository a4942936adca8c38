"""The diffusion that training and upscaling use: the schedule of the image model, its targets, its noise."""

import pytest
import torch

from video_ldm.temporal.diffusion import Diffusion
from video_ldm.temporal.errors import VideoLDMError
from video_ldm.temporal.training.image import squared_error

SD = (0.00085, 0.012)


def clips(seed=0, shape=(6, 4, 8, 8)):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("schedule, theirs", [("linear", "linear"), ("sqrt_linear", "sqrt_linear")])
def test_the_schedule_is_the_one_comfyui_samples_with(schedule, theirs):
    from comfy.model_sampling import ModelSamplingDiscrete
    sampling = ModelSamplingDiscrete()
    sampling._register_schedule(beta_schedule=theirs, timesteps=1000, linear_start=SD[0], linear_end=SD[1])
    ours = Diffusion(*SD, schedule=schedule)
    assert torch.allclose((ours.sigma / ours.alpha).float(), sampling.sigmas, rtol=1e-5)


def test_tables_are_float64_variance_preserving_and_never_reach_zero_signal():
    diffusion = Diffusion(*SD)
    assert diffusion.alpha.dtype == torch.float64 and len(diffusion.alpha) == 1000
    assert (diffusion.alpha ** 2 + diffusion.sigma ** 2 - 1).abs().max() < 1e-14
    assert diffusion.alpha[-1] == pytest.approx(0.0682655, rel=1e-4)      # SD's last step: not rescaled to zero SNR


def test_linear_means_linear_in_the_square_root_of_beta():
    cumulative = Diffusion(0.0015, 0.0195).alpha ** 2
    roots = (1 - cumulative[1:] / cumulative[:-1]).sqrt()
    assert torch.allclose(roots.diff(), roots.diff()[:1].expand(998), atol=1e-9)
    plain = Diffusion(0.0015, 0.0195, schedule="sqrt_linear").alpha ** 2
    steps = 1 - plain[1:] / plain[:-1]
    assert torch.allclose(steps.diff(), steps.diff()[:1].expand(998), atol=1e-9)


def test_v_is_alpha_eps_minus_sigma_x():
    diffusion = Diffusion(*SD, prediction="v")
    x, noise, tau = clips(0), clips(1), torch.tensor([0, 1, 10, 500, 900, 999])
    alpha, sigma = diffusion.alpha[tau][:, None, None, None], diffusion.sigma[tau][:, None, None, None]
    assert torch.allclose(diffusion.target(x, noise, tau), alpha * noise - sigma * x, atol=1e-14)
    assert torch.allclose(diffusion.add_noise(x, tau, noise), alpha * x + sigma * noise, atol=1e-14)


@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
def test_a_perfect_prediction_has_no_loss_and_gives_back_x_and_noise(prediction):
    diffusion = Diffusion(*SD, prediction=prediction)
    x, noise, tau = clips(0), clips(1), torch.tensor([0, 1, 10, 500, 900, 999])
    x_tau, target = diffusion.add_noise(x, tau, noise), diffusion.target(x, noise, tau)
    assert squared_error(diffusion, target, x, noise, tau) == 0
    assert torch.allclose(diffusion.predicted_x(target, x_tau, tau), x, atol=1e-9)
    assert torch.allclose(diffusion.predicted_noise(target, x_tau, tau), noise, atol=1e-9)
    assert squared_error(diffusion, target + 2, x, noise, tau) == pytest.approx(4)


def test_noise_is_independent_in_every_frame_and_follows_the_generator():
    diffusion = Diffusion(*SD)
    like = torch.empty(8, 4, 64, 64)
    noise = diffusion.random_noise(like, torch.Generator().manual_seed(3))
    correlation = torch.corrcoef(noise.flatten(1))
    assert (correlation - torch.eye(8)).abs().max() < 0.05      # 5 standard errors of 16,384 values is 0.039
    assert torch.equal(noise, diffusion.random_noise(like, torch.Generator().manual_seed(3)))


def test_tau_is_uniform_over_all_steps():
    tau = Diffusion(*SD).random_tau(200_000, torch.Generator().manual_seed(0))
    counts = torch.bincount(tau, minlength=1000).double()
    chi_square = ((counts - 200) ** 2 / 200).sum()
    assert len(counts) == 1000 and 800 < chi_square < 1200      # 999 +- 4.5 standard deviations of 45
    assert counts.min() > 120       # 200 - 5.7 standard deviations of 14: no step is left out, neither 0 nor 999
    assert set(Diffusion(*SD, steps=3).random_tau(100, torch.Generator().manual_seed(0)).tolist()) == {0, 1, 2}


def test_ddim_with_eta_1_is_the_ancestral_sampler_of_core():
    """docs/papers.md#v18: in core's terms, on x / alpha and sigma / alpha, DDIM at eta 1 is euler_ancestral."""
    from comfy.k_diffusion.sampling import get_ancestral_step
    diffusion = Diffusion(*SD)
    x, eps, noise = clips(0), clips(1), clips(2)
    for now, then in [(999, 995), (500, 496), (4, 0)]:
        a, s, a_then, s_then = diffusion.alpha[now], diffusion.sigma[now], diffusion.alpha[then], diffusion.sigma[then]
        spread = s_then / s * (1 - a ** 2 / a_then ** 2).sqrt()
        ddim = a_then * (x - s * eps) / a + (s_then ** 2 - spread ** 2).sqrt() * eps + spread * noise
        down, up = get_ancestral_step(s / a, s_then / a_then, eta=1.0)
        ancestral = x / a + eps * (down - s / a) + up * noise
        assert torch.allclose(ddim / a_then, ancestral, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("arguments, sentence", [
    (dict(prediction="flow"), "prediction type 'flow' is unknown"),
    (dict(schedule="cosine"), "beta schedule 'cosine' is unknown"),
    (dict(linear_start=0.02, linear_end=0.01), "0 < start <= end < 1"),
    (dict(steps=0), "at least one step"),
])
def test_unknown_settings_are_refused_in_a_sentence(arguments, sentence):
    with pytest.raises(VideoLDMError, match=sentence):
        Diffusion(**({"linear_start": SD[0], "linear_end": SD[1]} | arguments))


def test_a_tau_per_clip_instead_of_per_frame_is_refused():
    with pytest.raises(VideoLDMError, match="one step per batch item"):
        Diffusion(*SD).add_noise(clips(), torch.tensor([1, 2]), clips())


def test_weights_count_places_more_or_less_and_a_perfect_answer_still_has_no_loss():
    diffusion, (x, noise, output) = Diffusion(0.0015, 0.0195, prediction="v"), (clips(n).float() for n in range(3))
    tau = torch.arange(6) * 100
    ones = torch.ones(6, 1, 8, 8)
    plain = squared_error(diffusion, output, x, noise, tau)
    assert torch.allclose(squared_error(diffusion, output, x, noise, tau, ones), plain)
    half = ones.clone()
    half[..., :4] = 3
    error = (diffusion.target(x, noise, tau) - output).square()
    expected = (3 * error[..., :4] + error[..., 4:]).mean() / 2
    assert torch.allclose(squared_error(diffusion, output, x, noise, tau, half), expected)
    assert squared_error(diffusion, diffusion.target(x, noise, tau), x, noise, tau, half) == 0


@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
def test_the_error_of_x_is_measured_on_the_x_that_an_output_stands_for(prediction):
    diffusion, (x, noise, output) = Diffusion(0.0015, 0.0195, prediction=prediction), (clips(n) for n in range(3))
    tau = torch.tensor([1, 150, 400, 600, 850, 999])
    x_tau = diffusion.add_noise(x, tau, noise)
    expected = (diffusion.predicted_x(output, x_tau, tau) - x).square().mean()
    error = squared_error(diffusion, output, x, noise, tau, x0_weighting=True)
    assert torch.allclose(error.double(), expected, rtol=1e-4)
