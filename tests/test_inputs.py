"""What a node is given through a link.

Every input of every node takes what its widget takes, and nothing else.
"""

import inspect
from types import SimpleNamespace

import pytest
import torch

from video_ldm.nodes import extension, interpolate, longer, sample, upscale
from video_ldm.nodes.host import unfinished
from video_ldm.nodes.host.inputs import CHECKS, FILES, checked
from video_ldm.temporal.errors import VideoLDMError
from video_ldm.tests.attach_help import models_with_layers
from video_ldm.tests.host import checkpoints
from video_ldm.tests.longer_help import write_known_frame_layers

NODES = [node for file in extension.FILES for node in file.NODES]
NAMES = [node.define_schema().node_id for node in NODES]
NAN, INFINITE = float("nan"), float("inf")
SOCKETS = {
    "MODEL": SimpleNamespace(clone=None, model_options={}, get_model_object=None),
    "CLIP": SimpleNamespace(tokenize=None, encode_from_tokens_scheduled=None),
    "VAE": SimpleNamespace(encode=None, decode=None, first_stage_model=None),
    "CONDITIONING": [[torch.zeros(1, 77, 768), {}]],
    "LATENT": {"samples": torch.zeros(1, 4, 2, 2)},
    "IMAGE": torch.zeros(1, 16, 16, 3),
    "MASK": torch.ones(1, 16, 16),
    "VIDEO": SimpleNamespace(get_components=None),
    "VIDEO_LDM_MOTION_LORA": [],
    "VIDEO_LDM_PVDM": SimpleNamespace(autoencoder=None, unet=None, shape=None),
}


class Reached(Exception):
    """A node began to work."""


def kind_of(declared):
    return str(declared.get_io_type())


def inputs_of(*kinds, optional=False):
    """(node, input) of every input of these kinds, with names for the report. optional: of optional ones alone."""
    found = [(node, declared) for node in NODES for declared in node.define_schema().inputs
             if kind_of(declared) in kinds and (declared.optional or not optional)]
    return pytest.mark.parametrize("node, declared", found,
                                   ids=[f"{node.define_schema().node_id}-{declared.id}" for node, declared in found])


def run(node, **changes):
    """Runs a node's checks on right values for every input, except for the changes. Raises Reached after them."""
    given = {}
    for declared in node.define_schema().inputs:
        kind = kind_of(declared)
        value = SOCKETS.get(kind, getattr(declared, "default", None))
        given[declared.id] = (declared.options or ["file"])[0] if kind == "COMBO" and value is None else value
    inner = inspect.unwrap(node.execute.__func__)

    def reached(*args, **kwargs):
        raise Reached(inspect.signature(inner).bind(*args, **kwargs).arguments)
    reached.__signature__ = inspect.signature(inner)
    checked(reached)(node, **{**given, **changes})


def test_every_node_of_the_pack_checks_what_it_is_given():
    for node in NODES:
        assert getattr(node.execute.__func__, "checks_inputs", False), node
        assert {kind_of(declared) for declared in node.define_schema().inputs} <= {*CHECKS, "VIDEO_LDM_MOTION_LORA"}


@pytest.mark.parametrize("node", NODES, ids=NAMES)
def test_what_the_widgets_hold_is_accepted(node):
    with pytest.raises(Reached):
        run(node)


@inputs_of("INT")
def test_a_whole_number_is_whole_and_within_its_bounds(node, declared):
    title = node.define_schema().display_name
    takes = f"takes whole numbers from {declared.min} to {declared.max}"
    for value in (declared.min - 1, declared.max + 1, -5 if declared.min > -5 else -10 ** 30, 10 ** 400, None, True,
                  "3", NAN, INFINITE, declared.min + 0.5, [1], torch.tensor(declared.min)):
        if value is None and declared.optional:
            continue
        with pytest.raises(VideoLDMError) as refused:
            run(node, **{declared.id: value})
        assert str(refused.value).startswith(f"{title}: {declared.id} is ") and takes in str(refused.value)
    for value in (declared.min, declared.max, float(declared.min)):
        with pytest.raises(Reached) as reached:
            run(node, **{declared.id: value})
        accepted = reached.value.args[0][declared.id]
        assert accepted == value and type(accepted) is int


@inputs_of("FLOAT")
def test_a_number_is_finite_and_within_its_bounds(node, declared):
    missing = [] if declared.optional else [None]
    for value in (declared.min - 0.01, declared.max + 0.01, NAN, INFINITE, -INFINITE, 10 ** 400, True, "3", *missing):
        with pytest.raises(VideoLDMError, match=f": {declared.id} is .* takes numbers from {declared.min:g} to "):
            run(node, **{declared.id: value})
    for value in (declared.min, declared.max, int(declared.max)):
        with pytest.raises(Reached):
            run(node, **{declared.id: value})


@inputs_of("BOOLEAN")
def test_a_switch_is_true_or_false(node, declared):
    title = node.define_schema().display_name
    for value in ("true", 1, 0.0, [True], torch.tensor(True), *([] if declared.optional else [None])):
        with pytest.raises(VideoLDMError, match=f"^{title}: {declared.id} is .*, and it takes true or false"):
            run(node, **{declared.id: value})
    for value in (True, False):
        with pytest.raises(Reached) as reached:
            run(node, **{declared.id: value})
        assert reached.value.args[0][declared.id] is value


@inputs_of("COMBO", "STRING")
def test_a_choice_is_one_of_the_list_and_text_is_text(node, declared):
    free = declared.id in FILES or kind_of(declared) == "STRING"
    missing = [] if declared.optional else [None]
    for value in (*missing, 3, True, ["a"], *([] if free else ["no such thing"])):
        with pytest.raises(VideoLDMError, match=f": {declared.id} is "):
            run(node, **{declared.id: value})


@inputs_of("INT", "FLOAT", "BOOLEAN", "COMBO", "STRING", optional=True)
def test_an_optional_widget_that_was_given_nothing_has_its_default(node, declared):
    with pytest.raises(Reached) as reached:
        run(node, **{declared.id: None})
    assert reached.value.args[0][declared.id] == declared.default


WRONG = {
    "MODEL": [None, 3, {"samples": torch.zeros(1, 4, 2, 2)}],
    "CLIP": [None, 3, SOCKETS["MODEL"]],
    "VAE": [None, 3, SOCKETS["MODEL"]],
    "CONDITIONING": [None, [], 3, [[None, {"pooled_output": torch.zeros(1, 768)}]], [[torch.zeros(77, 768), {}]],
                     ["ab"], [[torch.zeros(0, 77, 768), {}]], [[torch.zeros(1, 77, 768)]]],
    "LATENT": [None, {}, {"samples": None}, {"samples": [1]}, {"samples": torch.zeros(0, 4, 2, 2)},
               {"samples": torch.zeros(1, 4, 0, 2)}, {"samples": torch.zeros(4, 2, 2)},
               {"samples": torch.full((1, 4, 2, 2), NAN)}, {"samples": torch.full((1, 4, 2, 2), INFINITE)},
               {**SOCKETS["LATENT"], "frame_rate": NAN}, {**SOCKETS["LATENT"], "frame_rate": -8.0},
               {**SOCKETS["LATENT"], "clip_frames": 0}, {**SOCKETS["LATENT"], "clip_frames": 2.5}],
    "IMAGE": [None, 3, torch.zeros(16, 16, 3), torch.zeros(0, 16, 16, 3), torch.zeros(1, 0, 16, 3),
              torch.zeros(1, 16, 16, 0)],
    "MASK": [None, 3, torch.zeros(1, 16, 16, 3), torch.zeros(0, 16, 16), torch.full((1, 16, 16), 2.0)],
    "VIDEO": [None, "clip.mp4"],
}


@inputs_of(*WRONG)
def test_a_connected_value_that_is_not_of_its_sockets_type_is_refused(node, declared):
    for value in WRONG[kind_of(declared)]:
        if value is None and declared.optional:
            continue
        with pytest.raises(VideoLDMError, match=f": {declared.id} "):
            run(node, **{declared.id: value})


# What belongs to another model, or is no picture to work on

@pytest.fixture(scope="module")
def models(tmp_path_factory):
    yield from models_with_layers(tmp_path_factory, write_known_frame_layers)


KEYS = {"samples": torch.ones(2, 4, 2, 3), "frame_rate": 2.0}


def sampled(models, node, **changes):
    """A run of a node that samples, right but for the changes."""
    widgets = {declared.id: declared.default for declared in node.define_schema().inputs
               if getattr(declared, "default", None) is not None}
    model = models["between" if node is interpolate.LatentInterpolate else "prediction"]
    given = dict(model=model, positive=checkpoints.conditioning(1), negative=checkpoints.conditioning(2), steps=1)
    if node is interpolate.LatentInterpolate:
        given |= {"latent": KEYS}
    else:
        given |= {"frames": 4, "width": 16, "height": 16}
    if node is longer.ExtendVideo:
        given |= {"on_cancel": longer.STOP, "length": 4}
    return node.execute(**{**widgets, **given, **changes}).result


@pytest.mark.parametrize("node", [sample.VideoLDMSampler, longer.ExtendVideo, interpolate.LatentInterpolate])
@pytest.mark.parametrize("name", ["positive", "negative", "temporal_prompt"])
def test_a_text_of_another_models_encoder_is_refused_with_both_widths(models, node, name):
    other = [[torch.zeros(1, 77, 1024), {}]]
    with pytest.raises(VideoLDMError, match=f"text of {name} has a width of 1024, .*Stable Diffusion 1.x. takes 768"):
        sampled(models, node, **{name: other})


@pytest.mark.parametrize("node", [sample.VideoLDMSampler, longer.ExtendVideo])
@pytest.mark.parametrize("side", ["width", "height"])
def test_a_size_that_is_no_whole_number_of_latents_is_refused(models, node, side):
    with pytest.raises(VideoLDMError, match=f"{side} is 20 pixels, .* Set {side} to 16 or 24"):
        sampled(models, node, **{side: 20})


def test_frames_of_another_models_vae_are_refused(models):
    with pytest.raises(VideoLDMError, match="connected frames have 16 latent channels, and this model's have 4"):
        sampled(models, sample.VideoLDMSampler, latent={"samples": torch.ones(4, 16, 2, 2)})


@pytest.mark.parametrize("picture, sentence", [
    (torch.zeros(1, 16, 20000, 3), "have 20000x16 pixels, and a side may have up to 8192"),
    (torch.zeros(1, 4, 16, 3), "have 16x4 pixels, and a side must have at least 8"),
    (torch.zeros(1, 16, 16, 1), "have 1 channel, and colour pictures have 3"),
    (torch.full((1, 16, 16, 3), NAN), "hold values that are no numbers"),
    (torch.zeros(0, 16, 16, 3), "image is an empty batch")])
def test_pictures_that_make_no_frames_are_refused_before_they_are_encoded(models, picture, sentence):
    vae = SOCKETS["VAE"]            # which would fail if it were asked
    with pytest.raises(VideoLDMError, match=sentence):
        longer.ContextFrames.execute(models["prediction"], "0", 1.0, image=picture, vae=vae)
    with pytest.raises(VideoLDMError, match=sentence):
        sampled(models, longer.ExtendVideo, image=picture, vae=vae)


def test_small_frames_that_would_grow_beyond_bounds_are_refused():
    with pytest.raises(VideoLDMError, match="have 20000x16 pixels, and a side may have up to 4096"):
        upscale.small_frames(torch.zeros(1, 16, 20000, 3), None)


def test_the_least_size_of_every_sampler_is_sampled(models):
    """The network takes sizes that it cannot halve, down to a latent of one pixel."""
    for height, width in ((2, 2), (1, 1), (3, 5)):
        kept = torch.zeros(4, 4, height, width)
        assert sampled(models, sample.VideoLDMSampler, latent={"samples": kept})[0]["samples"].shape == kept.shape


# An unfinished result is not the result of its inputs

def test_only_the_widgets_whose_result_was_cut_short_have_another_fingerprint():
    inputs = {"model": ["1", 0], "frames": 4, "seed": 123456789, "sampler": "euler"}
    other = {**inputs, "seed": 987654321}
    seen = {**inputs, "model": None}            # what a fingerprint is given: links are not known yet
    before = longer.ExtendVideo.fingerprint_inputs(**seen)
    prompt = SimpleNamespace(get_node={"7": {"inputs": inputs}}.get)
    unfinished.count_unfinished(SimpleNamespace(dynprompt=prompt, unique_id="7"))
    assert longer.ExtendVideo.fingerprint_inputs(**seen) == before + 1
    assert longer.ExtendVideo.fingerprint_inputs(**{**other, "model": None}) == before


def test_an_empty_latent_of_other_channels_is_left_to_core_which_fits_it_to_the_model():
    model = SimpleNamespace(get_model_object=lambda name: SimpleNamespace(latent_channels=16))
    empty, full = {"samples": torch.zeros(4, 4, 2, 2)}, {"samples": torch.ones(4, 4, 2, 2)}
    assert sample.clip_latent(model, empty, 4, 1, 16, 16, 1.0) is empty
    with pytest.raises(VideoLDMError, match="have 4 latent channels, and this model's have 16"):
        sample.clip_latent(model, full, 4, 1, 16, 16, 1.0)
