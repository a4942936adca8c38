"""Frame Windows beside other packs that keep something for each frame."""

import comfy.controlnet
import pytest
import torch
from comfy.ldm.modules.attention import optimized_attention

from video_ldm.nodes.host.options import with_clip_options
from video_ldm.nodes.host.windows import AD_PARAMS
from video_ldm.temporal.errors import VideoLDMError
from video_ldm.tests import windows_help
from video_ldm.tests.small import relative_error
from video_ldm.tests.windows_help import LENGTH, LONG, by_hand, noise_of, notes, prediction, steered, windowed
from video_ldm.tests.windows_help import pictures as hints

models, controlnets = windows_help.models, windows_help.controlnets     # fixtures


# A picture for each frame, as IPAdapter has them

def pictures(count=LONG, seed=21):
    """Keys and values of pictures, four tokens each."""
    return torch.randn(count, 4, 320, generator=torch.Generator().manual_seed(seed))


def spread_over(images, count):
    """As many as the batch has: the last is repeated."""
    return torch.cat([images, images[-1:].expand(max(count - len(images), 0), -1, -1)])[:count]


def adapted(model, images):
    """A clone whose middle block also attends to a picture for each image of the batch, as an IPAdapter makes it."""
    def attend(q, k, v, extra_options):
        conditions = len(extra_options["cond_or_uncond"])
        shown = extra_options.get("ad_params")
        if shown is not None and shown["sub_idxs"] is not None:
            mine = spread_over(images, shown["full_length"])[shown["sub_idxs"]]
        else:
            mine = spread_over(images, len(q) // conditions)
        mine = mine.repeat(conditions, 1, 1)
        heads = extra_options["n_heads"]
        return optimized_attention(q, k, v, heads) + optimized_attention(q, mine, mine, heads)
    m = model.clone()
    m.set_model_attn2_replace(attend, "middle", 0)
    return m


@pytest.mark.parametrize("count", [LONG, 5, LONG + 2])
def test_every_window_sees_the_pictures_of_its_own_frames(models, count):
    images = pictures(count)
    seen = prediction(adapted(windowed(models["video"]), images), cfg=2.0)
    whole = spread_over(images, LONG)
    reference = by_hand(lambda noise, places: prediction(adapted(models["video"], whole[places]), noise, cfg=2.0))
    assert relative_error(seen, reference) < 1e-5
    assert relative_error(seen, by_hand(lambda noise, _: prediction(adapted(models["video"], images), noise,
                                                                    cfg=2.0))) > 1e-2


def test_every_clip_of_a_batch_sees_the_pictures_of_its_own_images(models):
    images = pictures(2 * LONG)
    model = with_clip_options(windowed(models["video"]), LONG)
    together = prediction(adapted(model, images), noise_of(2 * LONG))
    for clip in range(2):
        mine = slice(clip * LONG, (clip + 1) * LONG)
        alone = prediction(adapted(windowed(models["video"]), images[mine]), noise_of(2 * LONG)[mine])
        assert relative_error(together[mine], alone) < 1e-5


def test_windows_name_their_images_under_the_keys_that_other_packs_read(models):
    model, seen = notes(with_clip_options(windowed(models["video"]), LONG), lambda x, options: options[AD_PARAMS])
    prediction(model, noise_of(2 * LONG))
    assert seen == [{"full_length": 12, "context_length": 8, "sub_idxs": [0, 1, 2, 3, 6, 7, 8, 9]},
                    {"full_length": 12, "context_length": 8, "sub_idxs": [2, 3, 4, 5, 8, 9, 10, 11]}]
    part = windowed(models["video"])        # of a longer video, which somebody else makes clip after clip
    part.model_options["transformer_options"][AD_PARAMS] = {"full_length": 20, "context_length": 6,
                                                        "sub_idxs": [9, 10, 11, 12, 13, 14]}
    model, seen = notes(part, lambda x, options: options[AD_PARAMS])
    prediction(model)
    assert seen == [{"full_length": 20, "context_length": 4, "sub_idxs": [9, 10, 11, 12]},
                    {"full_length": 20, "context_length": 4, "sub_idxs": [11, 12, 13, 14]}]
    model, seen = notes(windowed(models["video"]), lambda x, options: options.get(AD_PARAMS))
    prediction(model, noise_of(LENGTH))
    assert seen == [None]


# A strength for each frame, as the ControlNets of Advanced-ControlNet have it

class OwnPart(comfy.controlnet.ControlNet):
    """A ControlNet that takes the hints and strengths of the frames it is told."""

    def armed(self, strengths):
        self.hints, self.strengths, self.sub_idxs = self.cond_hint_original, strengths, None
        self.get_control = self.own_part        # bound to this object, so that a shallow copy still asks this one
        return self

    def own_part(self, x_noisy, t, cond, batched_number, transformer_options):
        if "ad_params" in transformer_options:
            self.sub_idxs = transformer_options["ad_params"]["sub_idxs"]
        chosen = slice(None) if self.sub_idxs is None else self.sub_idxs
        self.cond_hint_original, self.cond_hint = self.hints[chosen], None
        previous, self.previous_controlnet = self.previous_controlnet, None
        control = super().get_control(x_noisy, t, cond, batched_number, transformer_options)
        self.previous_controlnet = previous
        strengths = self.strengths[chosen].repeat(batched_number)[:, None, None, None]
        scaled = {name: [None if part is None else part * strengths for part in parts]
                  for name, parts in control.items()}
        before = previous and previous.get_control(x_noisy, t, cond, batched_number, transformer_options)
        return scaled if before is None else self.control_merge(scaled, before, torch.float32)


def with_strengths(controlnets, places=slice(None), before=None):
    """A positive and a negative CONDITIONING with such a ControlNet."""
    conds = steered(controlnets[:1], [hints(seed=3)[places]], 11, 12)
    plain = conds[0][0][1]["control"]
    control = OwnPart.__new__(OwnPart)
    control.__dict__.update(vars(plain))
    control.armed(torch.linspace(0.2, 1.4, LONG)[places])
    control.set_previous_controlnet(before)
    for cond in conds:
        cond[0][1]["control"] = control
    return {"positive": conds[0], "negative": conds[1], "cfg": 2.0}


def test_a_controlnet_that_takes_its_own_part_is_shown_the_frames_of_each_window(models, controlnets):
    seen = prediction(windowed(models["video"]), **with_strengths(controlnets))
    reference = by_hand(lambda noise, places: prediction(models["video"], noise, **with_strengths(controlnets, places)))
    assert relative_error(seen, reference) < 1e-5
    first = by_hand(lambda noise, _: prediction(models["video"], noise, **with_strengths(controlnets, slice(0, 4))))
    assert relative_error(seen, first) > 1e-3


def test_a_plain_controlnet_before_one_that_takes_its_own_part_is_refused_where_it_has_several_pictures(
        models, controlnets):
    def before(count):
        return steered(controlnets[1:], [hints(count, seed=4)], 11)[0][0][1]["control"]
    with pytest.raises(VideoLDMError, match="cannot come before one of Advanced-ControlNet. Apply it after"):
        prediction(windowed(models["video"]), **with_strengths(controlnets, before=before(LONG)))
    seen = prediction(windowed(models["video"]), **with_strengths(controlnets, before=before(1)))
    reference = by_hand(lambda noise, places: prediction(
        models["video"], noise, **with_strengths(controlnets, places, before=before(1))))
    assert relative_error(seen, reference) < 1e-5
