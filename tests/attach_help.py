"""A small image MODEL, temporal files and what a MODEL predicts, shared by the tests of layers on a MODEL."""

from contextlib import contextmanager

import comfy.model_management
import comfy.model_patcher
import comfy.sampler_helpers
import comfy.samplers
import comfy.sd
import folder_paths
import pytest
import torch
from comfy.patcher_extension import WrappersMP

from video_ldm.nodes.load import AS_MODEL, LoadTemporalLayers, MotionLoRA
from video_ldm.tests.host import checkpoints
from video_ldm.tests.host.checkpoints import FRAMES

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
    assert_untouched(model, state)


def models_with_layers(tmp_path_factory, write):
    """Yields {name: MODEL}: one with the layers of each file that `write(folder)` leaves, and "image" without layers.

    All share one network. Afterwards nothing may have stayed on it.
    """
    folder = tmp_path_factory.mktemp("video_ldm")
    folder_paths.add_model_folder_path("video_ldm", str(folder))
    write(folder)
    state = checkpoints.unet_state()
    image = load_model(state)
    found = {path.stem: with_layers(image, path.name) for path in folder.iterdir()}
    yield {"image": image, **found}
    assert_untouched(image, state)


def assert_untouched(model, state):
    """No hook is left on the network, and its weights are those it was loaded with."""
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.model.modules())
    assert all(torch.equal(value, state[key]) for key, value in model.model.diffusion_model.state_dict().items())


def load_model(state, dtype=None):
    return comfy.sd.load_diffusion_model_state_dict(dict(state), model_options={"dtype": dtype} if dtype else {})


def with_layers(model, file, strength=1.0, schedule=AS_MODEL, **options):
    return LoadTemporalLayers.execute(model, file, strength, schedule, **options).result[0]


def motion_lora(strength, file="lora.safetensors"):
    return MotionLoRA.execute(file, strength).result[0]


@contextmanager
def partly_loaded(patchers, budget):
    """While open, `budget` bytes of each patcher's weights are loaded, and the others stay where they are."""
    for patcher in patchers:
        patcher.unpatch_model(patcher.offload_device)
        patcher.patch_model(patcher.load_device, lowvram_model_memory=budget)
        assert patcher.model.model_lowvram and patcher.loaded_size() <= budget
        patcher.partially_load = lambda *args, **kwargs: 0      # core would load the rest: the processor has room
    yield
    for patcher in patchers:
        del patcher.partially_load
        patcher.unpatch_model(patcher.offload_device)


def noise_of(clips=1, frames=FRAMES, seed=0):
    return torch.randn(clips * frames, 4, HEIGHT // 8, WIDTH // 8, generator=torch.Generator().manual_seed(seed))


def text(seed=11):
    return checkpoints.conditioning(seed)


class FirstPrediction(comfy.samplers.CFGGuider):
    """Keeps what is predicted for the first noise.

    Its own MODEL predicts first, then each of `others` on the same network, then its own again.
    """

    others = ()

    def predict_noise(self, x, timestep, model_options=None, seed=None):
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
