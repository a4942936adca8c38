"""What temporal layers take for a clip where other nodes interfere.

These nodes change the batch of a model call, or evaluate conditions of their own.
"""

import comfy.samplers
import pytest
import torch

from video_ldm.nodes.host.options import with_clip_options
from video_ldm.temporal.errors import VideoLDMError
from video_ldm.tests import windows_help
from video_ldm.tests.small import relative_error
from video_ldm.tests.windows_help import BOTH, LENGTH, LONG, Predictions, notes, prediction, text, windowed

models = windows_help.models        # fixture


def noise_of(frames=LENGTH, seed=0):
    """Latents of four tiles of 2x3."""
    return torch.randn(frames, 4, 4, 6, generator=torch.Generator().manual_seed(seed))


def tiled(model, at_once: bool):
    """A stand-in for the nodes of tiled diffusion: the network sees four tiles of the picture, in one call or four."""
    places = [(slice(None), slice(None), slice(top, top + 2), slice(left, left + 3))
              for top in (0, 2) for left in (0, 3)]

    def repeated(value, count):
        return value.repeat(count, *[1] * (value.ndim - 1)) if isinstance(value, torch.Tensor) else value

    def wrapper(apply_model, args):
        x, whole = args["input"], torch.zeros_like(args["input"])
        groups = [places] if at_once else [[place] for place in places]
        for group in groups:
            c = {name: repeated(value, len(group)) for name, value in args["c"].items()}
            tiles = apply_model(torch.cat([x[place] for place in group]), repeated(args["timestep"], len(group)), **c)
            for place, tile in zip(group, tiles.chunk(len(group))):
                whole[place] = tile
        return whole
    m = model.clone()
    m.set_model_unet_function_wrapper(wrapper)
    return m


@BOTH
@pytest.mark.parametrize("cfg", [1.0, 2.0])
def test_four_tiles_in_one_call_each_come_out_as_alone(models, file, cfg):
    model, sizes = notes(models[file], lambda x, options: len(x))
    together, alone = (prediction(tiled(model, at_once), noise_of(), cfg=cfg) for at_once in (True, False))
    conditions = 1 if cfg == 1 else 2
    assert sizes == [4 * conditions * LENGTH] + 4 * [conditions * LENGTH]
    assert relative_error(together, alone) < 1e-5


def test_four_tiles_of_two_clips_hear_the_temporal_prompt_of_their_condition(models):
    model = with_clip_options(models["video"], LENGTH, {0: text(13)[0][0]})
    together, alone = (prediction(tiled(model, at_once), noise_of(2 * LENGTH), cfg=2.0) for at_once in (True, False))
    assert relative_error(together, alone) < 1e-5


@BOTH
def test_four_tiles_in_windows_each_come_out_as_alone(models, file):
    together, alone = (prediction(tiled(windowed(models[file]), at_once), noise_of(LONG), cfg=2.0)
                       for at_once in (True, False))
    assert relative_error(together, alone) < 1e-5


def test_a_node_that_divides_a_clip_within_the_call_is_refused(models):
    def halves(apply_model, args):
        frames = len(args["input"]) // 2
        c = {name: value[:frames] if isinstance(value, torch.Tensor) else value for name, value in args["c"].items()}
        part = apply_model(args["input"][:frames], args["timestep"][:frames], **c)
        return torch.cat([part, part])
    m = models["video"].clone()
    m.set_model_unet_function_wrapper(halves)
    with pytest.raises(VideoLDMError, match="holds 2 images where the sampling has 4. Another node divides the batch"):
        prediction(m, noise_of())


def test_a_call_outside_a_sampling_is_refused_unless_the_frames_of_a_clip_are_said(models):
    x, heard = noise_of(), text()[0][0].repeat(LENGTH, 1, 1)

    def called(model):
        class Bare(Predictions):
            def predict_noise(self, x, timestep, model_options=None, seed=None):
                options = self.model_patcher.model_options["transformer_options"]
                wrappers = model_options["transformer_options"]["wrappers"]
                seen = self.inner_model.apply_model(x, timestep, c_crossattn=heard,
                                                    transformer_options={**options, "wrappers": wrappers})
                self.seen.append(seen)
                return seen
        guider = Bare(model)
        guider.seen = []
        guider.set_conds(text(), text(12))
        guider.sample(x, torch.zeros_like(x), comfy.samplers.ksampler("euler"), torch.tensor([2.0, 0.0]),
                      disable_pbar=True, seed=0)
        return guider.seen[0]
    with pytest.raises(VideoLDMError, match="outside ComfyUI's own sampling.*Set frames per clip"):
        called(models["video"])
    assert torch.equal(called(with_clip_options(models["video"], LENGTH)), prediction(models["video"], x))


def test_a_guidance_node_that_evaluates_the_negative_alone_does_not_give_it_the_positives_temporal_prompt(models):
    model = with_clip_options(models["video"], LENGTH, {0: text(13)[0][0]})
    seen = []

    def evaluate(args):
        seen.append(comfy.samplers.calc_cond_batch(args["model"], [args["uncond"]], args["input"], args["sigma"],
                                                   args["model_options"])[0])
        return args["denoised"]
    guided = model.clone()
    guided.set_model_sampler_post_cfg_function(evaluate)
    prediction(guided, noise_of(), cfg=2.0)
    assert relative_error(seen[0], prediction(models["video"], noise_of(), positive=text(12))) < 1e-5
    assert relative_error(seen[0], prediction(model, noise_of(), positive=text(12))) > 1e-4
