"""PVDM's sampler: DDIM and the ancestral sampler with clamped planes, and videos clip after clip.

docs/papers.md#p8 and #p9.

A network of one formula stands in place of the U-Net. tests/fixtures/pvdm.json holds some of the numbers that the
published sampler gives with it.
"""

import json
from pathlib import Path
from types import SimpleNamespace

import comfy.k_diffusion.sampling
import pytest
import torch

from video_ldm.temporal.diffusion import Diffusion
from video_ldm.temporal.pvdm import PlaneShape, SamplerParams, diffusion, roll_out, sample
from video_ldm.temporal.pvdm.sampling import LINEAR_END, LINEAR_START, times
from video_ldm.tests.pvdm_networks import RECORDED_UNET, formula, rows
from video_ldm.tests.reference_pvdm import ancestral, cumulative_alphas, ddim

RECORDED = json.loads((Path(__file__).parent / "fixtures" / "pvdm.json").read_text())
SHAPE = (2, 4, 24)
TEN = Diffusion(LINEAR_START, LINEAR_END, steps=10)
EVERY_HUNDREDTH = 100       # with TEN the formula is told a hundred times the step
CHAIN = 2e-5                # three times the largest difference that was measured of five steps in float32


def seeded(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def start(generator: torch.Generator) -> torch.Tensor:
    return torch.randn(SHAPE, generator=generator)


def before() -> torch.Tensor:
    """Planes of the clips before, in -1..1."""
    return rows(RECORDED_UNET, PlaneShape(3, 2, 6), count=2, seed=6)[:, :, :24] / 3 ** 0.5


def recorded(name: str) -> torch.Tensor:
    return torch.tensor(RECORDED[name])


def hundredfold(x, tau, cond):
    return formula(x, tau * EVERY_HUNDREDTH, cond)


# The published sampler

@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("name, known, guidance", [("no clip before", False, 0.0), ("guidance 0", True, 0.0),
                                                   ("guidance 0.5", True, 0.5)])
def test_five_steps_are_those_of_the_published_ddim(eta, name, known, guidance):
    generator = seeded()
    found = sample(formula, start(generator), before() if known else None, SamplerParams(5, eta, guidance), diffusion(),
                   generator)
    assert (found.flatten()[::4] - recorded(f"eta {eta:g}, {name}")).abs().max() < CHAIN


def test_all_steps_of_a_schedule_are_those_of_the_published_ancestral_sampler():
    generator = seeded()
    found = sample(hundredfold, start(generator), before(), SamplerParams(10), TEN, generator)
    assert (found.flatten()[::4] - recorded("ancestral, 10 steps of 10")).abs().max() < CHAIN


# The papers' formulas, in float64

def test_the_noise_schedule_is_linear_in_the_root_of_beta_from_0_0015_to_0_0195():
    wanted = torch.tensor(cumulative_alphas(), dtype=torch.float64)
    assert torch.allclose(diffusion().alpha ** 2, wanted, rtol=1e-12, atol=0)


@pytest.mark.parametrize("steps, schedule", [(5, diffusion("v")), (10, Diffusion(0.0015, 0.0195, 10, "v"))])
def test_a_network_that_predicts_v_gives_the_planes_of_the_same_network_that_predicts_eps(steps, schedule):
    of_eps = Diffusion(0.0015, 0.0195, schedule.steps)

    def v(x, tau, cond):
        alpha, sigma = schedule.coefficients(tau, x)
        eps = formula(x, tau, cond)
        return (eps - sigma * x) / alpha
    x, params = start(seeded()).double(), SamplerParams(steps, 0.5, 0.5)
    found, wanted = (sample(network, x, before().double(), params, each, seeded(9))
                     for network, each in ((v, schedule), (formula, of_eps)))
    assert (found - wanted).abs().max() < 1e-9
    assert (found - sample(v, x, before().double(), params, of_eps, seeded(9))).abs().max() > 0.1


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("guidance", [0.0, 0.5])
def test_steps_are_those_of_ddim_with_clamped_planes_and_the_networks_own_noise(eta, guidance):
    x, cond = start(seeded()).double(), before().double()
    found = sample(formula, x, cond, SamplerParams(5, eta, guidance), diffusion(), seeded(9))
    generator = seeded(9)
    noises = [torch.randn(SHAPE, generator=generator).double() for _ in range(5)]

    def network(x, now):
        known, unknown = (formula(x, torch.tensor([now, now]), part) for part in (cond, None))
        return (1 + guidance) * known - guidance * unknown
    wanted = ddim(network, x, [999, 799, 599, 399, 199], noises, eta)
    assert (found - wanted).abs().max() < 1e-9


def test_with_all_steps_each_is_drawn_from_the_posterior_of_the_clamped_planes():
    """The last step adds no noise. eta does not count."""
    x, cond = start(seeded()).double(), before().double()
    found = [sample(hundredfold, x, cond, SamplerParams(10, eta), TEN, seeded(9)) for eta in (0.0, 1.0)]
    generator = seeded(9)
    noises = [torch.randn(SHAPE, generator=generator).double() for _ in range(9)]
    wanted = ancestral(lambda x, now: hundredfold(x, torch.tensor([now, now]), cond), x, noises, 10)
    assert (found[0] - wanted).abs().max() < 1e-9
    assert torch.equal(*found)


def test_steps_are_spread_evenly_from_the_last_to_one_before_the_first():
    assert times(5, 1000) == [999, 799, 599, 399, 199, -1]
    assert times(3, 1000) == [999, 665, 332, -1]
    assert times(1, 1000) == [999, -1]
    assert times(1000, 1000) == list(range(999, -2, -1))


def test_no_number_of_steps_takes_a_step_twice():
    for steps in range(1, 1001):
        moments = times(steps, 1000)
        assert len(moments) == steps + 1 and moments[0] == 999 and moments[-1] == -1
        assert all(later < now for now, later in zip(moments, moments[1:])), steps


# Clamped planes, and noise

@pytest.mark.parametrize("steps, schedule", [(5, diffusion()), (10, TEN)])
def test_clean_planes_are_clamped_at_every_step(steps, schedule):
    """Without a clamp the formula's clean planes leave -1..1, so that it has something to do."""
    seen, free = [], []

    def network(x, tau, cond):
        eps = formula(x, tau * (1000 // schedule.steps), cond)
        free.append(schedule.predicted_x(eps, x, tau))
        return eps
    found = sample(network, start(seeded()), None, SamplerParams(steps), schedule, seeded(9),
                   lambda done, clean: seen.append((done, clean)))
    assert [done for done, _ in seen] == list(range(1, steps + 1))
    for (_, clean), unclamped in zip(seen, free, strict=True):
        assert torch.equal(clean, unclamped.clamp(-1, 1))
        assert unclamped.abs().max() > 1.02
    assert torch.equal(found, seen[-1][1])


def test_without_eta_the_result_depends_on_the_first_noise_alone():
    x, generator = start(seeded()), seeded(9)
    state = generator.get_state()
    found = sample(formula, x, before(), SamplerParams(5, eta=0.0), diffusion(), generator)
    assert torch.equal(generator.get_state(), state)
    assert torch.equal(found, sample(formula, x, before(), SamplerParams(5, eta=0.0), diffusion()))


def test_with_eta_the_result_depends_on_the_generator_and_is_the_same_for_the_same_seed():
    results = [sample(formula, start(seeded()), before(), SamplerParams(5), diffusion(), seeded(seed))
               for seed in (9, 9, 10)]
    assert torch.equal(results[0], results[1])
    assert (results[0] - results[2]).abs().max() > 0.1


@pytest.mark.parametrize("cond, guidance, calls", [(None, 0.5, 3), (before(), 0.0, 3), (before(), 0.5, 6)])
def test_guidance_asks_the_network_twice_only_where_there_is_a_clip_before(cond, guidance, calls):
    asked = []

    def network(x, tau, known):
        asked.append(known is not None)
        return formula(x, tau, known)
    sample(network, start(seeded()), cond, SamplerParams(3, guidance=guidance), diffusion(), seeded())
    assert len(asked) == calls and sum(asked) == (0 if cond is None else 3)


# Core's sampler

def core_euler_ancestral(network, x: torch.Tensor, steps: int, schedule: Diffusion, generator) -> torch.Tensor:
    """The same steps by core's euler_ancestral, whose noisy planes are x / alpha."""
    moments = times(steps, schedule.steps)[:-1]
    ratios = [float(schedule.sigma[moment] / schedule.alpha[moment]) for moment in moments]

    def clean(noisy, sigma, **_):
        now = moments[min(range(len(ratios)), key=lambda n: abs(ratios[n] - float(sigma[0])))]
        tau = torch.full((len(noisy),), now)
        x = noisy * float(schedule.alpha[now])
        return schedule.predicted_x(network(x, tau, None), x, tau).clamp(-1, 1)
    # Core asks its model's noise schedule whether it is that of a flow.
    clean.inner_model = SimpleNamespace(inner_model=SimpleNamespace(model_sampling=None))
    noise = iter([torch.randn(SHAPE, generator=generator).double() for _ in moments])
    return comfy.k_diffusion.sampling.sample_euler_ancestral(
        clean, x / float(schedule.alpha[moments[0]]), torch.tensor([*ratios, 0.0], dtype=torch.float64), disable=True,
        noise_sampler=lambda *_: next(noise))


def inside(schedule: Diffusion):
    """A network whose clean planes are 0.9 tanh x: nothing is clamped."""
    def network(x, tau, cond):
        alpha, sigma = schedule.coefficients(tau, x)
        return (x - alpha * 0.9 * x.tanh()) / sigma
    return network


def test_cores_euler_ancestral_gives_another_result_where_planes_are_clamped_and_the_same_elsewhere():
    """Core takes the noise of a step from the clamped planes, PVDM's DDIM from the network. So PVDM has its own."""
    x = start(seeded()).double()
    for network, equal in ((inside(diffusion()), True), (formula, False)):
        ours = sample(network, x, None, SamplerParams(5), diffusion(), seeded(9))
        difference = (ours - core_euler_ancestral(network, x, 5, diffusion(), seeded(9))).abs().max()
        assert difference < 1e-9 if equal else difference > 0.1


# Clip after clip

class Watched:
    """The formula, and the clip before of each call."""

    def __init__(self):
        self.known = []

    def __call__(self, x, tau, cond):
        self.known.append(cond)
        return formula(x, tau, cond)


def noise_of(number: int) -> torch.Tensor:
    return start(seeded(100 + number))


def rolled(clips: int, network=formula, given: torch.Tensor | None = None, first: int = 0, **options) -> list:
    """Clips from number `first` on, with 2 steps for the first and 3 for others."""
    return list(roll_out(clips, SamplerParams(2), SamplerParams(3), network, lambda n: noise_of(first + n), diffusion(),
                         lambda n: seeded(first + n), given, **options))


def test_each_clip_is_conditioned_on_the_planes_of_the_clip_before_it_as_they_were_sampled():
    network = Watched()
    found = rolled(3, network)
    assert [clip.shape for clip in found] == [SHAPE] * 3
    assert len(network.known) == 2 + 3 + 3
    assert network.known[:2] == [None, None]
    for clip, calls in ((found[0], network.known[2:5]), (found[1], network.known[5:8])):
        assert all(torch.equal(known, clip) for known in calls)


def test_a_clip_does_not_depend_on_the_clips_earlier_than_the_one_before_it():
    """The third clip, sampled behind the second one alone, is the same. Behind another second clip it is not."""
    found = rolled(3)
    again, = rolled(1, given=found[1], first=2)
    assert torch.equal(again, found[2])
    other, = rolled(1, given=found[0], first=2)
    assert (other - found[2]).abs().max() > 0.1


def test_a_video_that_goes_on_from_a_clip_begins_with_the_steps_of_following_clips():
    network, counted = Watched(), []
    rolled(2, network, given=before(), on_step=lambda done, clean: counted.append(done))
    assert counted == [1, 2, 3, 1, 2, 3]
    assert torch.equal(network.known[0], before())


def test_clips_are_sampled_when_they_are_asked_for():
    network = Watched()
    clips = roll_out(1000, SamplerParams(1), SamplerParams(1), network, noise_of, diffusion(), seeded)
    next(clips), next(clips)
    assert len(network.known) == 2
