"""What a MODEL carries about its layers survives what other nodes and core's hooks do with its options."""

import copy

import comfy.hooks
import pytest
import torch
from comfy.model_patcher import create_model_options_clone
from comfy.patcher_extension import WrappersMP

from video_ldm.nodes.host.options import clip_options, with_clip_options
from video_ldm.tests import attach_help
from video_ldm.tests.attach_help import motion_lora, with_layers
from video_ldm.tests.host import checkpoints
from video_ldm.tests.small import relative_error
from video_ldm.tests.windows_help import LENGTH, LONG, by_hand, noise_of, prediction, text, windowed

folder, state, image = attach_help.folder, attach_help.state, attach_help.image     # fixtures


def test_a_whole_copy_of_the_options_of_a_sampling_has_the_same_layers_with_their_motion_lora(image, folder):
    model = with_layers(image, "motion.safetensors", motion_lora=motion_lora(1.0))
    copied = model.clone()

    def copies(executor, *args, **kwargs):
        executor.class_obj.model_options = copy.deepcopy(executor.class_obj.model_options)
        return executor(*args, **kwargs)
    copied.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, "test", copies)
    seen = prediction(copied, noise_of(LENGTH))
    assert torch.equal(seen, prediction(model, noise_of(LENGTH)))
    assert relative_error(seen, prediction(with_layers(image, "motion.safetensors"), noise_of(LENGTH))) > 1e-4


@pytest.mark.parametrize("copied", [copy.deepcopy, create_model_options_clone])
def test_copies_of_a_models_options_carry_the_same_settings(image, folder, copied):
    model = with_clip_options(with_layers(image, "video.safetensors", 0.5), 3, {0: text(13)[0][0]}, 12.5)
    options = copied(model.model_options)["transformer_options"]
    ours = model.model_options["transformer_options"]
    assert {key: options[key] for key in ours if key.startswith("video_ldm/")} == {
        key: ours[key] for key in ours if key.startswith("video_ldm/")}
    clip = clip_options(options)
    assert (clip.frames, clip.fps) == (3, 12.5) and torch.equal(clip.texts[0], text(13)[0][0])


def test_a_lora_as_a_hook_on_the_positive_alone_acts_in_every_window(image, folder):
    model = with_layers(image, "video.safetensors")
    hooks = comfy.hooks.create_hook_lora(checkpoints.image_lora(), 1.0, 0.0)
    hooked = comfy.hooks.set_hooks_for_conditioning(text(), hooks)
    seen = prediction(windowed(model), positive=hooked, cfg=2.0)
    reference = by_hand(lambda noise, _: prediction(model, noise, positive=hooked, cfg=2.0))
    assert relative_error(seen, reference) < 1e-5
    assert relative_error(seen, prediction(windowed(model), cfg=2.0)) > 1e-3


def test_two_clones_with_other_windows_run_in_turn_in_one_guider_without_interacting(image, folder):
    model = with_layers(image, "video.safetensors")
    clones = [windowed(model), windowed(model, length=3, overlap=1, schedule="shifting"), model]
    noise = noise_of(LONG)
    alone = [attach_help.prediction(clone, noise=noise) for clone in clones]
    seen = attach_help.predictions(clones[0], others=clones[1:], noise=noise)
    assert [torch.equal(*pair) for pair in zip(seen, [*alone, alone[0]], strict=True)] == [True] * 4
    assert min(relative_error(alone[0], other) for other in alone[1:]) > 1e-4
