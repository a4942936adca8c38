"""Helpers of the tests of Frame Windows: MODELs with layers of every kind, and what they predict."""

import comfy.controlnet
import comfy.samplers
import comfy.sd
import pytest
import torch
from comfy.patcher_extension import WrappersMP

from video_ldm.nodes.windows import WINDOWS, FrameWindows
from video_ldm.tests.attach_help import models_with_layers
from video_ldm.tests.host import checkpoints

LENGTH, OVERLAP, LONG = 4, 2, 6         # of a window, shared, of a clip: the windows are 0..3 and 2..5
SHARES = torch.tensor([1, 1, 2 / 3, 1 / 3, 0, 0])[:, None, None, None]      # of the first of them, by the pyramid
BOTH = pytest.mark.parametrize("file", ["video", "motion"])


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """MODELs with layers of every kind, by name."""
    def write(folder):
        checkpoints.write_video_layers(folder / "video.safetensors")
        checkpoints.write_video_layers(folder / "vector.safetensors", mix_length=LENGTH)
        checkpoints.save(folder / "motion.safetensors", checkpoints.motion_state())
        checkpoints.save(folder / "learned.safetensors", checkpoints.motion_state(learned=True))
    yield from models_with_layers(tmp_path_factory, write)


def windowed(model, mode=WINDOWS, length=LENGTH, overlap=OVERLAP, schedule="static", fuse="pyramid", max_distance=8):
    return FrameWindows.execute(model, mode, length, overlap, schedule, fuse, max_distance).result[0]


def noise_of(frames=LONG, seed=0):
    return torch.randn(frames, 4, 2, 3, generator=torch.Generator().manual_seed(seed))


def text(seed=11, frames=1):
    """A CONDITIONING of random text, one for each of `frames`."""
    return [[torch.cat([checkpoints.conditioning(seed + 100 * n)[0][0] for n in range(frames)]), {}]]


class Predictions(comfy.samplers.CFGGuider):
    """Keeps what is predicted in every step."""

    def predict_noise(self, *args, **kwargs):
        seen = super().predict_noise(*args, **kwargs)
        self.seen.append(seen)
        return seen


def predictions(model, noise=None, positive=None, negative=None, cfg=1.0, sigmas=(2.0, 0.0)):
    guider = Predictions(model)
    guider.seen = []
    guider.set_conds(positive or text(), negative or text(12))
    guider.set_cfg(cfg)
    noise = noise_of() if noise is None else noise
    guider.sample(noise, torch.zeros_like(noise), comfy.samplers.ksampler("euler"), torch.tensor(sigmas),
                  disable_pbar=True, seed=0)
    return guider.seen


def prediction(model, noise=None, **options):
    return predictions(model, noise, **options)[0]


def by_hand(predict, noise=None):
    """The two windows as clips of their own, joined. predict: (noise of the frames, their numbers) -> prediction."""
    noise = noise_of() if noise is None else noise
    first, last = (predict(noise[places], places) for places in (slice(0, 4), slice(2, 6)))
    whole = torch.zeros_like(noise)
    whole[:4] += SHARES[:4] * first
    whole[2:] += (1 - SHARES[2:]) * last
    return whole


def notes(model, what):
    """A clone that notes `what(x, transformer_options)` of every call of its network, and the notes."""
    m, seen = model.clone(), []

    def note(executor, x, timesteps, context, y, control, transformer_options, **kwargs):
        seen.append(what(x, transformer_options))
        return executor(x, timesteps, context, y, control, transformer_options, **kwargs)

    m.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "test", note)
    return m, seen


@pytest.fixture(scope="module")
def controlnets():
    return [comfy.controlnet.load_controlnet_state_dict(checkpoints.controlnet_state(seed)) for seed in (4, 5)]


def pictures(frames=LONG, seed=3):
    return torch.rand(frames, 3, 16, 24, generator=torch.Generator().manual_seed(seed))


def steered(controlnets, hints, *seeds):
    """CONDITIONINGs that share one chain of ControlNets, as ControlNetApplyAdvanced makes them."""
    chain = None
    for net, hint in zip(controlnets, hints):
        link = net.copy().set_cond_hint(hint, 0.7, (0.0, 1.0))
        link.set_previous_controlnet(chain)
        chain = link
    return [[[text(seed)[0][0], {"control": chain, "control_apply_to_uncond": False}]] for seed in seeds]
