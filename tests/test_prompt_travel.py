"""Prompt Travel: what its lines mean, the weights of every frame, and the texts that the CLIP gives."""

import comfy.hooks
import comfy.sd
import comfy.sdxl_clip
import comfy.supported_models_base
import pytest
import torch

from video_ldm.nodes.host import prompt_encoding
from video_ldm.nodes.host.files import DEMO_FOLDER
from video_ldm.nodes.host.models import load_text
from video_ldm.nodes.prompt_travel import PromptTravel
from video_ldm.temporal.errors import VideoLDMError
from video_ldm.temporal.prompt_travel import HOLD, LINEAR, FrameText, KeyFrame, key_frames, report_of, texts_of_frames
from video_ldm.tests.small import randomise

A, B, C = "a quiet road by day", "a busy road at night", "an empty road by day"
LONG = " ".join(["red car"] * 60)       # 120 tokens: two chunks of 77
ABC = f"0: {A}\n4: {B}\n6: {C}"


@pytest.fixture(scope="module")
def clip():
    return load_text(DEMO_FOLDER / "text.safetensors")


@pytest.fixture(scope="module")
def sdxl_clip():
    """Core's CLIP of SDXL with small random networks."""
    small = {"num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 16}
    options = {"clip_l_model_config": {**small, "hidden_size": 8}, "clip_g_model_config": {**small, "hidden_size": 12},
               "dtype": torch.float32}
    target = comfy.supported_models_base.ClipTarget(comfy.sdxl_clip.SDXLTokenizer, comfy.sdxl_clip.SDXLClipModel)
    made = comfy.sd.CLIP(target, model_options=options)
    randomise(made.cond_stage_model)
    return made


def travel(clip, lines, frames=8, mode=LINEAR, before="", after=""):
    """(text of all frames, options) that the node gives."""
    (entry,) = PromptTravel.execute(clip, lines, frames, mode, before, after).result[0]
    return entry


def plain(clip, prompt):
    """What core's CLIP Text Encode gives."""
    (entry,) = clip.encode_from_tokens_scheduled(clip.tokenize(prompt))
    return entry


def refused(lines, frames=8, **common):
    with pytest.raises(VideoLDMError) as caught:
        key_frames(lines, frames, **common)
    assert str(caught.value).endswith(".") and "\n" not in str(caught.value)
    return str(caught.value)


def pairs(lines, frames=30):
    return [(key.frame, key.prompt) for key in key_frames(lines, frames)]


# The lines

@pytest.mark.parametrize("lines", [
    "0: a car\n16: a bus",
    "  16 :a bus  \n\n0:   a car",
    '"0": "a car",\n"16": "a bus",',            # FizzNodes
    '"0" :"a car",\n\n"16" :"a bus"\n',
    '{\n"0": "a car",\n"16": "a bus"\n}',
    '"0": "a car", "16": "a bus"',
    '{"0": "a car", "16": "a bus"}',
    '0 = "a car",\n16 = "a bus"',               # AnimateDiff-Evolved
    '0: "a car",\n16: "a bus"',
    '"0": a car\n+16: a bus',
    "# spring\n0: a car\n   # autumn\n16: a bus",
    "0\uff1aa car\n16\uff1aa bus",              # a Chinese keyboard's colon
    "0: a car\n-14: a bus",
    "0: a car\r\n16: a bus\r\n",
])
def test_the_ways_to_write_two_key_frames(lines):
    assert pairs(lines) == [(0, "a car"), (16, "a bus")]


@pytest.mark.parametrize("prompt", [
    "(red:1.2) car, #1 of 3, 16:9", "a car <lora:style:0.8>, embedding:fog", 'a "quoted" word', '"first" and "last"',
    "a car,", r"a \(small\) car", "it = a car", '5" pipe', "", "a {red|blue} car", "a: b: c"])
def test_a_prompt_stays_as_it_is_typed(prompt):
    assert pairs(f"3: {prompt}") == [(3, prompt)]


def test_quotation_marks_and_backslashes_within_a_quoted_prompt_are_those_of_json():
    assert pairs(r'"0": "a \"red\" car \\(toy\\)",') == [(0, r'a "red" car \(toy\)')]
    assert pairs(r'"0": "a car \(toy\)"') == [(0, r"a car \(toy\)")]


def test_negative_numbers_count_from_the_end():
    assert pairs("-1: last\n-8: first\n2: third", frames=8) == [(0, "first"), (2, "third"), (7, "last")]


def test_common_texts_stand_around_every_prompt_with_spaces_alone():
    found = key_frames("0: a car\n4:", 8, " a photo of ", ", in fog\n")
    assert [key.prompt for key in found] == ["a photo of a car , in fog", "a photo of , in fog"]


@pytest.mark.parametrize("lines, words", [
    ("", "There are no prompts. Write lines such as 0: a red car."),
    (" \n# only this\n", "There are no prompts."),
    ("0: a car\na bus", "Line 2, 'a bus', does not begin with a frame number."),
    ("abc: a car", "Line 1, 'abc: a car', does not begin with a frame number."),
    ("(red:1.2) car", "does not begin with a frame number"),
    ("1.5: a car", "Line 1 of the prompts has '1.5' where a frame number is due."),
    ("0, 4: a car", "has '0, 4' where a frame number is due"),
    ("9999999999: a car", "has '9999999999' where a frame number is due"),
    ('"0:4": "a car"', "has '0:4' where a frame number is due"),
    ('0:4 = "a car"', "has '0:4' where a frame number is due"),
    ('4: = "a car"', "has '4:' where a frame number is due"),
    ('"max_f2": "a car"', "has 'max_f2' where a frame number is due"),
    ("3: a car\n0: a bus\n3: a tram", "Two lines of the prompts are for frame 3: 'a car' and 'a tram'."),
    ("7: a car\n-1: a bus", "Two lines of the prompts are for frame 7"),
    ("-9: a car", "is for frame -9, and there are 8 frames: -1 is the last, and -8 is the first."),
    ("-0: a car", "is for frame -0"),
    ('"0": "a car', "has quotation marks that do not pair"),
    ('"0": "a car" "4": "a bus"', "has quotation marks that do not pair"),
    ("0: a car --neg rain", "Line 1 of the prompts has a negative text behind --neg."),
    ('"0": "(car:`t/8`)"', "Line 1 of the prompts has a formula between ` signs"),
])
def test_bad_lines_are_refused_in_one_sentence_that_says_which(lines, words):
    assert words in refused(lines)


def test_what_other_packs_compute_is_refused_in_the_common_texts_too():
    assert "The text in before has a formula" in refused("0: a car", before="`t`")
    assert "The text in after has a negative text" in refused("0: a car", after="--neg rain")


def test_a_very_long_line_is_read_at_once_and_quoted_in_short():
    assert pairs("0: " + '\\"' * 200_000)[0][0] == 0
    assert len(refused("x" * 1_000_000)) < 200
    assert len(refused('"0": "' + "\\" * 300_001)) < 250


# The weights

def weights(mode=LINEAR, frames=8, lines=ABC):
    texts = texts_of_frames(key_frames(lines, frames), frames, mode)
    return [(text.prompt, text.following, text.weight) for text in texts]


def test_between_two_key_frames_the_weight_grows_in_equal_steps():
    assert weights() == [(A, A, 0), (A, B, 1 / 4), (A, B, 2 / 4), (A, B, 3 / 4), (B, B, 0), (B, C, 1 / 2), (C, C, 0),
                         (C, C, 0)]


def test_held_prompts_change_at_their_key_frames_alone():
    assert weights(HOLD) == [(prompt, prompt, 0) for prompt in (A, A, A, A, B, B, C, C)]


def test_before_the_first_key_frame_and_after_the_last_their_prompts_hold():
    for mode in (LINEAR, HOLD):
        assert weights(mode, 5, f"2: {A}\n3: {B}") == [(prompt, prompt, 0) for prompt in (A, A, A, B, B)]


def test_a_key_frame_beyond_the_clip_is_travelled_towards():
    assert weights(frames=3, lines=f"0: {A}\n8: {B}") == [(A, A, 0), (A, B, 1 / 8), (A, B, 2 / 8)]
    assert weights(HOLD, 3, f"0: {A}\n8: {B}") == [(A, A, 0)] * 3


def test_two_key_frames_with_one_prompt_have_nothing_to_mix():
    assert weights(frames=4, lines=f"0: {A}\n3: {A}") == [(A, A, 0)] * 4


# The report

def test_the_report_says_which_frames_have_which_prompts():
    keys = key_frames(ABC, 8)
    assert report_of(keys, texts_of_frames(keys, 8, LINEAR)).splitlines() == [
        f"Frame 0: {A}", f"Frames 1 to 3: from '{A}' to '{B}', 25% to 75% of the second", f"Frame 4: {B}",
        f"Frame 5: from '{B}' to '{C}', 50% of the second", f"Frames 6 to 7: {C}"]
    assert report_of(keys, texts_of_frames(keys, 8, HOLD)).splitlines() == [
        f"Frames 0 to 3: {A}", f"Frames 4 to 5: {B}", f"Frames 6 to 7: {C}"]


def test_the_report_warns_of_key_frames_beyond_the_last_frame():
    def warning(lines, frames=8):
        keys = key_frames(lines, frames)
        return report_of(keys, texts_of_frames(keys, frames, HOLD)).splitlines()[1:]
    assert warning("0: a\n7: a") == []
    assert warning("0: a\n8: b") == ["Warning: the key frame 8 lies beyond the last frame. Frames are counted from 0, "
                                     "so the last of 8 is 7."]
    assert warning("0:\n8: b\n12: c")[0].startswith("Warning: the key frames 8, 12 lie beyond the last frame.")
    assert report_of([KeyFrame(0, "")], [FrameText("", "", 0.0)]) == "Frame 0: the empty prompt"


# The texts

def test_each_key_frame_is_what_clip_text_encode_gives_bit_for_bit_and_between_them_is_the_mean(clip):
    text, options = travel(clip, ABC)
    a, b, c = (plain(clip, prompt) for prompt in (A, B, C))
    expected = [1.0, 0.75, 0.5, 0.25]
    assert text.shape == (8, 77, a[0].shape[-1]) and options["video_ldm_frames"] == 8
    for found, name in ((text, None), (options["pooled_output"], "pooled_output")):
        one, two, three = (entry[1][name] if name else entry[0] for entry in (a, b, c))
        assert not torch.equal(one, two) and not torch.equal(two, three)
        assert torch.equal(found[0], one[0]) and torch.equal(found[4], two[0])
        assert torch.equal(found[6], three[0]) and torch.equal(found[7], three[0])
        for frame, share in enumerate(expected):
            torch.testing.assert_close(found[frame], share * one[0] + (1 - share) * two[0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found[5], (two[0] + three[0]) / 2, rtol=1e-5, atol=1e-6)


def test_held_texts_are_those_of_their_key_frames_bit_for_bit(clip):
    text, options = travel(clip, ABC, mode=HOLD)
    for frame, prompt in enumerate((A, A, A, A, B, B, C, C)):
        alone = plain(clip, prompt)
        assert torch.equal(text[frame], alone[0][0])
        assert torch.equal(options["pooled_output"][frame], alone[1]["pooled_output"][0])


def test_weights_and_common_texts_reach_the_clip_as_in_clip_text_encode(clip):
    text, _ = travel(clip, "0: (red:1.4) car", before="one", after="by day")
    assert torch.equal(text[0], plain(clip, "one (red:1.4) car by day")[0][0])
    assert not torch.equal(text[0], plain(clip, "one red car by day")[0][0])


def test_each_prompt_is_encoded_once_and_one_that_no_frame_has_is_not(clip, monkeypatch):
    asked, tokenize = [], clip.tokenize
    monkeypatch.setattr(clip, "tokenize", lambda text: asked.append(text) or tokenize(text))
    travel(clip, f"0: {A}\n3: {B}\n6: {A}\n20: {C}", mode=HOLD)
    assert asked == [A, B]


def test_shorter_prompts_are_repeated_to_the_length_of_longer_ones(clip):
    text, _ = travel(clip, f"0: {A}\n4: {LONG}", frames=5)
    short, long = plain(clip, A)[0], plain(clip, LONG)[0]
    assert (short.shape[1], long.shape[1]) == (77, 154)
    assert torch.equal(text[0], torch.cat([short[0], short[0]])) and torch.equal(text[4], long[0])
    torch.testing.assert_close(text[1], 0.75 * short[0].repeat(2, 1) + 0.25 * long[0], rtol=1e-5, atol=1e-6)


def test_attention_to_a_repeated_text_is_attention_to_the_text():
    """Why shorter prompts are repeated: the picture of a held prompt does not depend on the other prompts."""
    query, text = torch.randn(1, 1, 5, 8), torch.randn(1, 1, 77, 8)
    alone, repeated = (torch.nn.functional.scaled_dot_product_attention(query, key, key)
                       for key in (text, text.repeat(1, 1, 2, 1)))
    torch.testing.assert_close(repeated, alone)


def test_lengths_whose_common_multiple_is_far_longer_are_refused():
    texts = {str(chunks): torch.zeros(1, 77 * chunks, 4) for chunks in (3, 4, 5)}
    with pytest.raises(VideoLDMError, match="The prompts have 231, 308, 385 tokens, .* each would have 4620."):
        prompt_encoding.same_length(texts)
    texts.pop("4")
    assert {text.shape[1] for text in prompt_encoding.same_length(texts).values()} == {77 * 15}


def test_the_pooled_text_of_sdxl_travels_with_the_tokens(sdxl_clip):
    text, options = travel(sdxl_clip, f"0: {A}\n4: {B}", frames=6)
    (a, of_a), (b, of_b) = plain(sdxl_clip, A), plain(sdxl_clip, B)
    assert text.shape == (6, 77, 20) and options["pooled_output"].shape == (6, 12)
    for found, one, two in ((text, a, b), (options["pooled_output"], of_a["pooled_output"], of_b["pooled_output"])):
        assert not torch.equal(one, two)
        assert torch.equal(found[0], one[0]) and torch.equal(found[4], two[0]) and torch.equal(found[5], two[0])
        torch.testing.assert_close(found[1], 0.75 * one[0] + 0.25 * two[0], rtol=1e-5, atol=1e-6)


def test_hooks_that_change_over_the_steps_give_an_entry_for_each_range_of_steps(clip):
    """Core's hooks on a CLIP: here a change of its weights, at half strength from the middle of the steps on."""
    weight, tensor = next(item for item in clip.patcher.model.state_dict().items() if item[0].endswith("fc1.weight"))
    hooks = comfy.hooks.create_hook_lora({}, strength_model=0.0, strength_clip=1.0)
    hooks.hooks[0].weights_clip = {weight: ("diff", (torch.ones_like(tensor),))}
    hooks.hooks[0].need_weight_init = False
    frames = comfy.hooks.HookKeyframeGroup()
    for strength, start in ((1.0, 0.0), (0.5, 0.5)):
        frames.add(comfy.hooks.HookKeyframe(strength=strength, start_percent=start))
    hooks.set_keyframes_on_hooks(frames)
    hooked = clip.clone()
    hooked.apply_hooks_to_conds = hooks
    hooked.patcher.forced_hooks = hooks.clone()
    hooked.use_clip_schedule = True
    hooked.patcher.register_all_hook_patches(hooks, comfy.hooks.create_target_dict(comfy.hooks.EnumWeightTarget.Clip))
    made = PromptTravel.execute(hooked, f"0: {A}\n3: {B}", 4, HOLD, "", "").result[0]
    alone = [hooked.encode_from_tokens_scheduled(hooked.tokenize(prompt)) for prompt in (A, B)]
    assert len(made) == len(alone[0]) == 2
    assert not torch.equal(made[0][0], made[1][0])
    for (text, options), (a, of_a), (b, _) in zip(made, *alone):
        assert torch.equal(text, torch.cat([a, a, a, b])) and options["hooks"] is of_a["hooks"]
        for name in ("clip_start_percent", "clip_end_percent"):
            assert options[name] == of_a[name]


def test_a_clip_of_another_kind_and_texts_beyond_the_memory_are_refused(clip, monkeypatch):
    masked = {"a": [torch.zeros(1, 4, 2), {"attention_mask": torch.ones(1, 4)}]}
    with pytest.raises(VideoLDMError, match="This CLIP gives attention_mask beside the text: it belongs to another "):
        prompt_encoding.entry_of_frames(masked, [FrameText("a", "a", 0.0)])
    monkeypatch.setattr("comfy.model_management.get_free_memory", lambda *args, **kwargs: 1000)
    with pytest.raises(VideoLDMError, match="The texts of 8 frames need .* Lower frames."):
        prompt_encoding.blended({"a": torch.zeros(1, 4, 100)}, [FrameText("a", "a", 0.0)] * 8)


def test_a_missing_clip_is_refused_with_what_to_do(clip):
    with pytest.raises(VideoLDMError, match="Prompt Travel: clip was given nothing, and it takes a CLIP. .*Load CLIP"):
        PromptTravel.execute(None, ABC, 8, LINEAR, "", "")
    with pytest.raises(VideoLDMError, match="Prompt Travel: clip was given something of the type dict"):
        PromptTravel.execute({}, ABC, 8, LINEAR, "", "")
