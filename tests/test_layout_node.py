"""Scene Layout: lines of text become boxes, or a sentence. CONDITIONING carries them through core's samplers."""

from dataclasses import replace

import comfy.model_management
import folder_paths
import pytest
import torch

from video_ldm.nodes.box_colours import distance, nearest_colour, oklab, paints
from video_ldm.nodes.box_lines import parse_boxes
from video_ldm.nodes.scene_layout import EXAMPLE, SceneLayout, preview, report_of
from video_ldm.temporal.errors import VideoLDMError
from video_ldm.temporal.families import load_layout
from video_ldm.temporal.formats import scene_layout_file as layout_format
from video_ldm.temporal.formats.temporal_file import Base
from video_ldm.temporal.scene_layout import LayoutParams
from video_ldm.temporal.scene_layout import SceneLayout as Network
from video_ldm.tests import attach_help
from video_ldm.tests.attach_help import load_model, prediction, text, with_layers
from video_ldm.tests.small import randomise, relative_error

folder, state, image = attach_help.folder, attach_help.state, attach_help.image     # fixtures

PARAMS = LayoutParams(colours=("red", "blue"), labels=(("light", ("day", "night")),
                                                       ("crowdedness", ("empty", "quiet", "busy"))),
                      width=16, heads=2, layers=1, frequencies=3, sites=((0, 320),))


def write(path, network=None, params=PARAMS):
    network = network or randomise(Network(params), 5)
    layout_format.write(path, network.state_dict(), params, torch.randn(7, 768), base=Base("Stable Diffusion 1.x", 768),
                        licence="Apache-2.0")


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    place = tmp_path_factory.mktemp("layouts")
    folder_paths.add_model_folder_path("video_ldm", str(place))
    write(place / "scene.safetensors")
    write(place / "fresh.safetensors", Network(PARAMS))
    return place


def run(file="scene.safetensors", boxes=EXAMPLE, light="day", crowdedness="any", **texts):
    return SceneLayout.execute(file, boxes, light, crowdedness, 128, 64, **texts).result


@pytest.fixture(scope="module")
def content(scenes):
    return load_layout(scenes / "scene.safetensors")


# Lines

def test_lines_become_boxes_by_their_corners(content):
    assert parse_boxes("0.5 0.25 0.25 0.5 red # the first\n\n 0, 0, 1, 1, Blue", content) == [
        (0.5, 0.25, 0.75, 0.75, "red"), (0.0, 0.0, 1.0, 1.0, "blue")]
    assert len(parse_boxes(EXAMPLE, content)) == 2
    assert parse_boxes("none", content) == [] and parse_boxes("\n# nothing", content) is None


def test_a_colour_as_rrggbb_stands_for_the_nearest_and_the_report_says_so(content):
    lines = "# two cars\n0.5 0.25 0.25 0.5 #CD2024 # a note\n0,0,1,1,#2454dc#another\n0 0 1 1 red#ff0000"
    boxes = parse_boxes(lines, content)
    assert [colour for *_, colour in boxes] == ["red", "blue", "red"]
    assert report_of(boxes, lines, content).splitlines() == [
        "3 of at most 64 boxes: red, blue, red.",
        "Line 2: #CD2024 is taken as red, the nearest colour that scene.safetensors knows.",
        "Line 3: #2454dc is taken as blue, the nearest colour that scene.safetensors knows."]
    assert report_of([], "none", content) == "No cars."
    assert report_of(None, "", content) == "No boxes are given: cars stand anywhere."


def test_the_distance_of_two_colours_is_that_of_oklab_with_a_quarter_of_the_lightness():
    """Björn Ottosson's published values for red, white and black."""
    assert oklab((255, 0, 0)) == pytest.approx((0.62796, 0.22486, 0.12585), abs=1e-5)
    assert oklab((255, 255, 255)) == pytest.approx((1, 0, 0), abs=1e-4)
    assert oklab((0, 0, 0)) == (0, 0, 0)
    assert distance((1, 0, 0), (0, 0, 0)) == 0.25 and distance((0, 3, 0), (0, 0, 4)) == 5


@pytest.mark.parametrize("word, nearest", [
    ("#cd2024", "red"), ("#2454dc", "blue"), ("#f0c418", "yellow"), ("#ececec", "white"), ("#18a04c", "green"),
    ("#800000", "red"), ("#000080", "blue"), ("#ffa500", "yellow"), ("#00ff00", "green"), ("#c0c0c0", "white"),
    ("#000000", None), ("#800080", None), ("#ff00ff", None), ("#404040", None)])
def test_the_demos_paints_and_their_dark_and_light_tones_are_found_and_others_are_not(word, nearest):
    """The first five are the paints of the demo's cars."""
    assert nearest_colour(word, ("red", "blue", "yellow", "white", "green")) == nearest


def test_a_name_without_a_paint_is_never_the_nearest(content):
    assert paints(("red", "zebra")) == {"red": "#ff0000", "zebra": "#a0a0a0"}
    assert nearest_colour("#a0a0a0", ("zebra", "green")) is None


def test_a_box_that_ends_at_the_edge_is_taken_in_spite_of_rounding(content):
    ((x0, y0, x1, y1, _),) = parse_boxes("0.7 0.9 0.30000000000000004 0.1 red", content)
    assert (x1, y1) == (1.0, 1.0)
    beyond, = parse_boxes("-0.0000005 -0.0000004 1.0000009 1.0000008 red", content)
    assert beyond == (0.0, 0.0, 1.0, 1.0, "red")        # cut off at the edge


@pytest.mark.parametrize("line, words", [
    ("0.1 0.1 0.2 0.2", "Line 2 .* has 4 words. A box has five"),
    ("0.1 0.1 0.2 0.2 red car", "has 6 words"),
    ("0.1 wide 0.2 0.2 red", "has 'wide' where a number is due"),
    ("0.1 nan 0.2 0.2 red", "has 'nan' where a number is due"),
    ("0.1 0.1 0 0.2 red", "a width of 0 and a height of 0.2. Both must be more than 0"),
    ("0.1 0.1 0.2 -0.2 red", "Both must be more than 0"),
    ("0.9 0.1 0.2 0.2 red", "reaches from 0.9, 0.1 to 1.1, 0.3, beyond the picture"),
    ("-0.1 0.1 0.2 0.2 red", "beyond the picture"),
    ("64 16 32 16 red", "Line 2 .* in pixels. .*by its height, which gives 0.5 0.25 0.25 0.25.$"),
    ("120 8 20 20 red", "in pixels. .* by its height.$"),
    ("0.1 0.1 0.2 0.2 #ff00", "Line 2 .* has the colour '#ff00'. Write a colour by its name or as #rrggbb, .*blue"),
    ("0.1 0.1 0.2 0.2 #gg0000", "colour '#gg0000'. Write a colour by its name or as #rrggbb"),
    ("0.1 0.1 0.2 0.2 #ff0000 car", "has 6 words"),
    ("0.1 0.1 0.2 0.2 # red", "has 4 words"),
    ("0.1 0.1 0.2 0.2 #008000", "colour '#008000', which is far from every colour that scene.safetensors knows. "
                                "Choose one of red, blue.$"),
    ("0.1 0.1 0.2 0.2 pink", "colour 'pink'. scene.safetensors knows red, blue"),
    ("none", "has 1 word\\."),
])
def test_a_line_that_is_no_box_is_named_with_what_is_wrong(content, line, words):
    with pytest.raises(VideoLDMError, match=words):
        parse_boxes(f"0.1 0.1 0.2 0.2 red\n{line}", content, (128, 64))


def test_more_boxes_than_the_file_was_trained_with_are_refused(scenes, content):
    crowd = "\n".join(["0.1 0.1 0.2 0.2 red"] * 65)
    with pytest.raises(VideoLDMError, match="There are 65 boxes, and scene.safetensors knows pictures of at most 64"):
        parse_boxes(crowd, content)
    assert len(parse_boxes(crowd.partition("\n")[2], content)) == 64
    network = randomise(Network(PARAMS), 5)
    layout_format.write(scenes / "two.safetensors", network.state_dict(), PARAMS, torch.randn(7, 768),
                        base=Base("Stable Diffusion 1.x", 768), licence="", metadata={"most_boxes": "2"})
    with pytest.raises(VideoLDMError, match="There are 3 boxes, and two.safetensors .* at most 2. Leave out 1 of"):
        run("two.safetensors", boxes=crowd[:3 * len("0.1 0.1 0.2 0.2 red\n")])


def test_the_demos_file_knows_as_many_boxes_as_its_world_draws_cars():
    from video_ldm.demo.scene_layout_stage import MOST_CARS
    from video_ldm.nodes.host.files import DEMO_FOLDER
    assert load_layout(DEMO_FOLDER / "video_ldm_driving_layout.safetensors").most_boxes == MOST_CARS == 3


def test_the_page_is_told_what_each_layout_file_knows(scenes):
    """The drawing reads it. A file that cannot be read is left out, and so are files of other kinds."""
    layout_format.write(scenes / "page.safetensors", randomise(Network(PARAMS), 5).state_dict(), PARAMS,
                        torch.randn(7, 768), base=Base("Stable Diffusion 1.x", 768), licence="",
                        metadata={"most_boxes": "2"})
    (scenes / "broken.safetensors").write_bytes(b"12345")
    boxes = SceneLayout.INPUT_TYPES()["required"]["boxes"]
    known = boxes[1]["layout_files"]
    assert boxes[0] == "STRING" and boxes[1]["multiline"] and boxes[1]["default"] == EXAMPLE
    assert known["page.safetensors"] == {"most_boxes": 2, "colours": {"red": "#ff0000", "blue": "#0000ff"}}
    assert known["video_ldm_driving_layout.safetensors"] == {"most_boxes": 3, "colours": {
        "red": "#ff0000", "blue": "#0000ff", "yellow": "#ffff00", "white": "#ffffff", "green": "#008000"}}
    assert not {"broken.safetensors", "video_ldm_driving.safetensors"} & known.keys()


def test_labels_that_a_file_does_not_know_are_refused(scenes):
    write(scenes / "daylight.safetensors", params=replace(PARAMS, labels=(("light", ("day",)),)))
    with pytest.raises(VideoLDMError, match="daylight.safetensors knows no light 'night', only day"):
        run("daylight.safetensors", light="night")


def scene_of(**widgets):
    """The layout that the positive output carries to core, and that of the negative one."""
    said, unsaid, *_ = run(**widgets)
    return said[0][1]["gligen"][2], unsaid[0][1]["gligen"]


def test_the_positive_says_what_the_widgets_say_and_the_negative_nothing(scenes):
    """Labels have numbers from 1, and 0 stands for one that is left open. Colours have numbers from 0."""
    scene, unsaid = scene_of(boxes="0.5 0.25 0.25 0.5 blue\n0 0 1 1 red", light="night", crowdedness="any")
    assert scene.boxes.tolist() == [[[0.5, 0.25, 0.75, 0.75], [0.0, 0.0, 1.0, 1.0]]]
    assert scene.colours.tolist() == [[1, 0]] and scene.present.tolist() == [[True, True]]
    assert scene.labels.tolist() == [[2, 0]] and scene.told.tolist() == [True]
    assert unsaid[0] == "empty"
    labels = [scene_of(light=light, crowdedness=crowd)[0].labels.tolist()[0]
              for light, crowd in (("day", "empty"), ("any", "quiet"), ("night", "busy"))]
    assert labels == [[1, 1], [0, 2], [2, 3]]


def test_a_scene_without_cars_differs_from_one_that_does_not_mention_cars(scenes):
    for boxes, told in (("none", [True]), ("", [False]), ("# a comment", [False])):
        scene, _ = scene_of(boxes=boxes)
        assert (scene.told.tolist(), tuple(scene.boxes.shape)) == (told, (1, 0, 4))


def test_of_two_boxes_in_the_preview_the_nearer_stands_in_front():
    """The nearer car's box ends lower in the picture, whatever line it is on. The ground is that of the light."""
    near, far = (0.25, 0.25, 0.75, 0.75, "red"), (0.0, 0.0, 0.5, 0.5, "blue")
    for boxes in ([near, far], [far, near]):
        assert preview(boxes, "day", 64, 64)[0, 160, 160].tolist() == [1, 0, 0]
    grounds = [(preview([], light, 64, 64)[0, 5, 5] * 255).round().tolist() for light in ("day", "night", "any")]
    assert grounds == [[128, 132, 128], [32, 34, 44], [80, 83, 86]]


def test_the_preview_has_the_pictures_shape_and_the_boxes_colours():
    shown = preview([(0.5, 0.25, 0.75, 0.75, "red"), (0.0, 0.5, 0.2, 1.0, "blue")], "night", 128, 64)
    assert shown.shape == (1, 256, 512, 3)
    assert shown[0, 128, 320].tolist() == [1, 0, 0] and shown[0, 200, 50].tolist() == [0, 0, 1]
    assert preview([], "any", 64, 128).shape == (1, 512, 256, 3)


# In core's samplers

def test_a_layout_changes_the_result_and_the_plain_model_is_the_same_afterwards(image, scenes):
    plain = prediction(image)
    heard = prediction(image, positive=run(positive=text())[0])
    assert relative_error(heard, plain) > 1e-3
    assert torch.equal(prediction(image), plain)
    elsewhere = prediction(image, positive=run(boxes="0.1 0.1 0.2 0.2 red", positive=text())[0])
    assert relative_error(elsewhere, heard) > 1e-4
    assert torch.equal(prediction(image, positive=run(positive=text())[0]), heard)


def test_an_untrained_layout_is_the_image_model_to_the_bit(image, scenes):
    assert torch.equal(prediction(image, positive=run("fresh.safetensors", positive=text())[0]), prediction(image))


def test_guidance_starts_from_the_negative_output_whose_layout_says_nothing(image, scenes):
    said, unsaid, *_ = run(positive=text(11), negative=text(12))
    both = prediction(image, positive=said, negative=unsaid, cfg=3.0)
    positive, negative = prediction(image, positive=said), prediction(image, positive=unsaid)
    assert relative_error(both, negative + 3.0 * (positive - negative)) < 1e-5
    assert relative_error(negative, prediction(image, positive=text(12))) > 1e-4


def test_without_texts_the_files_own_empty_prompt_is_used(image, scenes, content):
    said, unsaid, *_ = run()
    assert torch.equal(said[0][0][0], content.null_text) and torch.equal(unsaid[0][0][0], content.null_text)
    empty = [[content.null_text[None], {}]]
    with_texts = run(positive=empty, negative=empty)
    pairs = (said, unsaid), with_texts[:2]
    seen, same = (prediction(image, positive=positive, negative=negative, cfg=2.0) for positive, negative in pairs)
    assert torch.equal(seen, same) and relative_error(seen, prediction(image, positive=run(positive=text())[0])) > 1e-4


def test_a_text_of_another_width_is_refused(scenes):
    with pytest.raises(VideoLDMError, match="a width of 64, and scene.safetensors was made for Stable Diffusion"):
        run(positive=[[torch.zeros(1, 7, 64), {}]])


def test_a_layout_acts_on_models_of_low_precision_and_with_temporal_layers_too(state, folder, scenes):
    half = load_model(state, torch.float16)
    said = run(positive=text())[0]
    rounded = load_model({key: value.half().float() for key, value in state.items()})
    heard = prediction(half, positive=said)
    assert relative_error(heard, prediction(rounded, positive=said)) < 1e-5
    assert relative_error(heard, prediction(half)) > 1e-3
    video = with_layers(rounded, "video.safetensors")
    assert relative_error(prediction(video, positive=said), prediction(video)) > 1e-3


def test_the_conditioners_weights_are_loaded_by_core_and_shared_while_the_file_is_unchanged(image, scenes):
    one, two = run(positive=text())[0], run(boxes="none", positive=text())[0]
    assert one[0][1]["gligen"][1] is two[0][1]["gligen"][1]
    prediction(image, positive=one)
    assert any(loaded.model is one[0][1]["gligen"][1] for loaded in comfy.model_management.current_loaded_models)
