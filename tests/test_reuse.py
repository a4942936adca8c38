"""Reuse Temporal Layers: what a step keeps, which step uses it, and whose it is."""

from types import SimpleNamespace

import comfy.model_management
import pytest
import torch
from comfy_extras import nodes_pag
from torch import nn

from video_ldm.nodes.host.options import with_clip_options
from video_ldm.nodes.host.reuse import KEY, SamplingWithReuse, numbers_per_image, overlapping, refuse_reuse
from video_ldm.nodes.layer_strength import LayerStrength
from video_ldm.nodes.reuse import ReuseTemporalLayers
from video_ldm.nodes.upscale import VideoUpscale
from video_ldm.temporal.call import CallSettings, open_call
from video_ldm.temporal.errors import VideoLDMError
from video_ldm.temporal.reuse import KeptResiduals, ReusePlan
from video_ldm.tests.attach_help import models_with_layers
from video_ldm.tests.host import checkpoints
from video_ldm.tests.small import batch, relative_error, small_stack, small_unet
from video_ldm.tests.windows_help import LENGTH, noise_of, notes, predictions, text, windowed

SIGMAS = (8.0, 6.0, 4.5, 3.0, 2.0, 0.0)
ALL = ReusePlan(1, float("inf"), 0.0)
BOTH = pytest.mark.parametrize("file", ["video", "motion"])


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """MODELs by name: with layers of both kinds, and the image model."""
    def write(folder):
        checkpoints.write_video_layers(folder / "video.safetensors")
        checkpoints.save(folder / "motion.safetensors", checkpoints.motion_state())
    yield from models_with_layers(tmp_path_factory, write)


def reused(model, steps=1, start=0.0, end=1.0):
    return ReuseTemporalLayers.execute(model, steps, start, end).result[0]


def steps_of(model, noise=None, sigmas=SIGMAS, **options):
    return predictions(model, noise_of(LENGTH) if noise is None else noise, sigmas=sigmas, **options)


# What is computed

class Adds(nn.Module):
    """In a layer's place: it adds what it is told, or returns it where the slot adds it."""

    def __init__(self, residual, alone):
        super().__init__()
        self.residual, self.alone = residual, alone

    def forward(self, x, call):
        return self.residual if self.alone else x + self.residual


@torch.no_grad()
def test_a_later_step_adds_what_each_layer_added_before():
    """Against a network in whose layers' places stands what they added to the features of the step before."""
    unet, clips, frames = small_unet(), 2, 4
    stack = small_stack(unet, frames)
    x, timesteps, context, *_ = batch(clips, frames)
    later = x + 0.3 * torch.randn(x.shape, generator=torch.Generator().manual_seed(5))
    kept, added = KeptResiduals(ALL), {}

    def call(x, sigma=None):
        reuse = None if sigma is None else kept.call(["part"], sigma)
        with open_call(unet, [(stack, CallSettings(frames, reuse=reuse))], context):
            return unet(x, timesteps, context=context)

    def note(name):
        def hook(module, args, output):
            added[name] = output - args[0]
        return hook

    plain, plain_later = call(x), call(later)
    hooks = [layer.register_forward_hook(note(name)) for name, layer in stack.layers.items()]
    first = call(x, 2.0)
    for hook in hooks:
        hook.remove()
    second = call(later, 1.0)
    real, stack.layers = stack.layers, nn.ModuleDict({name: Adds(added[name], False) for name in stack.layers})
    expected = call(later)
    stack.layers = real
    assert torch.equal(first, plain)                                # a step that keeps is exact
    assert relative_error(second, expected) < 1e-6
    assert relative_error(second, plain_later) > 1e-4
    assert torch.equal(call(later, 0.5), plain_later)               # the step after it runs the layers


@pytest.mark.parametrize("steps, expected", [(1, [1, 1, 2, 2, 3]), (2, [1, 1, 1, 2, 2]), (3, [1, 1, 1, 1, 2])])
def test_the_layers_run_in_the_first_step_and_after_each_rest(models, steps, expected):
    seen, stores = [], []
    noted, _ = notes(reused(models["video"], steps), lambda x, options: stores.append(options[KEY]))
    steps_of(noted, cfg=3.0)
    assert stores[0].ran == expected[-1] and stores[0].reused == 5 - expected[-1]
    kept = KeptResiduals(ReusePlan(steps, 10.0, 0.0))
    for sigma in SIGMAS[:-1]:
        kept.call(["part"], sigma)
        seen.append(kept.ran)
    assert seen == expected


@BOTH
def test_the_first_step_is_exact_and_the_second_is_not(models, file):
    plain, seen = steps_of(models[file]), steps_of(reused(models[file]))
    assert torch.equal(seen[0], plain[0])
    assert 0 < relative_error(seen[1], plain[1]) < 0.5


@BOTH
def test_0_steps_are_the_model_without_the_node_to_the_bit(models, file):
    plain = steps_of(models[file])
    for model in (reused(models[file], 0), reused(reused(models[file], 2), 0)):
        assert all(map(torch.equal, steps_of(model), plain))


def test_outside_the_range_every_step_runs_the_layers(models):
    model = models["video"]
    plain = steps_of(model)
    sampling = model.get_model_object("model_sampling")
    # The range ends between the third and the fourth noise level.
    end = next(percent / 1000 for percent in range(1, 1000) if sampling.percent_to_sigma(percent / 1000) < 4.0)
    seen = steps_of(reused(model, 1, 0.0, end))
    assert not torch.equal(seen[1], plain[1])
    late = steps_of(reused(model, 1, end, 1.0))
    assert all(map(torch.equal, late[:4], plain[:4])) and not torch.equal(late[4], plain[4])


# Whose it is

def test_conditions_in_one_call_and_in_two_give_the_same(models, monkeypatch):
    model = reused(models["video"])
    together = steps_of(model, cfg=3.0)
    noted, sizes = notes(model, lambda x, options: len(x))
    monkeypatch.setattr(model.model, "memory_required", lambda *args, **kwargs: 1e15)
    apart = steps_of(noted, cfg=3.0)
    assert set(sizes) == {LENGTH}                   # so core really called once for each condition
    assert all(relative_error(*pair) < 1e-5 for pair in zip(apart, together))


def test_parts_get_their_own_residuals_in_any_order():
    kept, x = KeptResiduals(ALL), torch.zeros(4, 3)
    kept.call(["a", "b"], 2.0).keep("site", torch.tensor([[1.0] * 3] * 2 + [[2.0] * 3] * 2))
    found = kept.call(["b", "a"], 1.0).residual("site", x)
    assert found[:, 0].tolist() == [2, 2, 1, 1]
    assert kept.call(["b", "c"], 0.9) is not None and kept.reused == 1      # c is new: the layers run


def test_two_clips_of_a_batch_are_as_alone(models):
    model, noise = models["video"], noise_of(2 * LENGTH)
    both = steps_of(reused(with_clip_options(model, LENGTH)), noise)
    alone = steps_of(reused(model), noise[LENGTH:])
    assert all(relative_error(two[LENGTH:], one) < 1e-5 for two, one in zip(both, alone))


@BOTH
def test_windows_keep_their_own(models, file):
    """Two windows without a shared frame are two clips, each as it is alone."""
    noise = noise_of(2 * LENGTH)
    long = steps_of(reused(windowed(models[file], overlap=0)), noise)
    alone = [steps_of(reused(models[file]), part) for part in noise.split(LENGTH)]
    for seen, *parts in zip(long, *alone):
        assert relative_error(seen, torch.cat(parts)) < 1e-5


def test_guidance_that_calls_twice_in_a_step_keeps_two(models):
    """Perturbed attention predicts once more with the same text. It gets the residuals of its own call."""
    pag = nodes_pag.PerturbedAttentionGuidance.execute(models["video"], 2.0).result[0]
    kept = KeptResiduals(ALL)
    first, second = kept.call(["text"], 2.0), kept.call(["text"], 2.0)
    assert first.parts[0] is not second.parts[0] and not second.again
    assert kept.call(["text"], 1.0).parts[0] is first.parts[0]
    plain, seen = steps_of(pag), steps_of(reused(pag))
    assert torch.equal(seen[0], plain[0]) and 0 < relative_error(seen[1], plain[1]) < 0.5


def test_frames_of_strength_0_stay_the_image_models_to_the_bit(models):
    weakened = LayerStrength.execute(models["motion"], "0 1 1 0", "linear").result[0]
    image, seen = steps_of(models["image"]), steps_of(reused(weakened))
    for step, alone in zip(seen, image):
        assert torch.equal(step[[0, 3]], alone[[0, 3]]) and relative_error(step[1:3], alone[1:3]) > 1e-4


def test_nothing_is_left_of_a_window_that_does_not_come_back():
    kept = KeptResiduals(ALL)
    for step in range(20):
        kept.call([("window", step)], 20.0 - step).keep("site", torch.zeros(4, 3))
    assert kept.size <= 2 * 4 * 3 * 4


def test_features_of_another_size_run_the_layers():
    kept = KeptResiduals(ALL)
    kept.call(["a"], 2.0).keep("site", torch.zeros(4, 3, 8, 8))
    again = kept.call(["a"], 1.0)
    assert again.again
    assert again.residual("site", torch.zeros(4, 3, 4, 4)) is None
    assert again.residual("elsewhere", torch.zeros(4, 3, 8, 8)) is None


def test_a_sampling_begins_with_nothing(models):
    """Two samplings of one MODEL in one graph, and a clone of it."""
    model = reused(models["video"])
    first, again = steps_of(model), steps_of(model)
    assert all(map(torch.equal, first, again))
    assert KEY not in model.model_options["transformer_options"]


def test_windows_that_move_are_hardly_used_again_and_a_warning_says_so(models, caplog):
    noise = noise_of(16)
    with caplog.at_level("WARNING"):
        steps_of(reused(windowed(models["video"], schedule="static", overlap=1)), noise)
        assert "hardly" not in caplog.text
        steps_of(reused(windowed(models["video"], schedule="shifting", overlap=1)), noise)
    assert "hardly a step that could use" in caplog.text


# Memory

def test_what_is_kept_is_as_large_as_reported(models):
    model = models["video"]
    sizes = []
    noted, _ = notes(reused(model), lambda x, options: sizes.append(options[KEY].size))
    steps_of(noted, cfg=3.0)
    per_image = numbers_per_image(model.model.diffusion_model, model.model_options["transformer_options"], (2, 3))
    assert sizes[1] == 2 * LENGTH * per_image * 4


@pytest.mark.parametrize("free, waits", [(10**6, True), (10**12, False)])
def test_on_a_gpu_with_too_little_memory_it_waits_on_the_cpu(models, monkeypatch, free, waits):
    monkeypatch.setattr(comfy.model_management, "get_free_memory", lambda *args: free)
    monkeypatch.setattr(comfy.model_management, "get_torch_device", lambda: torch.device("meta"))
    model = models["video"]
    wrap = SimpleNamespace(inner_model=model.model, conds={"positive": [1], "negative": [1]})
    assert SamplingWithReuse(ALL).waits_on_cpu(wrap, model.model_options, (16, 4, 64, 64)) == waits


def test_frames_that_two_windows_share_count_twice():
    assert overlapping(None) == 1
    assert overlapping(SimpleNamespace(context_length=16, context_overlap=8)) == 2


# The node

def test_a_model_without_layers_and_an_empty_range_are_refused(models):
    with pytest.raises(VideoLDMError, match="no temporal layers"):
        reused(models["image"])
    with pytest.raises(VideoLDMError, match="Set end_percent above start_percent"):
        reused(models["video"], 1, 0.5, 0.5)


def test_video_upscale_takes_no_model_that_keeps_residuals(models):
    """Its memory is that of one piece, and each piece would keep its own."""
    refuse_reuse(reused(models["video"], 0), "Video Upscale")
    for model in (reused(models["video"]), reused(models["video"]).clone()):
        with pytest.raises(VideoLDMError, match="Reuse Temporal Layers keeps what the layers add to every piece"):
            VideoUpscale.execute(model, text(), text(), 30, 8, 2, 0, 0.0, 0, 2, 1.0, "euler", "normal")


def test_the_report_says_what_is_kept(models):
    said = ReuseTemporalLayers.execute(models["motion"], 2, 0.0, 1.0).result[1]
    assert "the next 2 steps rest" in said
    unet = models["motion"].model.diffusion_model
    frame = 4 * numbers_per_image(unet, models["motion"].model_options["transformer_options"], (64, 64)) / 1e6
    assert f"{frame:.0f} MB" in said
    assert ReuseTemporalLayers.execute(models["motion"], 0, 0.0, 1.0).result[1].startswith("Off")
