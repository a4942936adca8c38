"""What nodes tell the artist on the page: reports and warnings."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from video_ldm.nodes import load, sample
from video_ldm.nodes.host import clip_warnings, decoded_outputs, files, models, notes
from video_ldm.nodes.host.api import io
from video_ldm.nodes.host.options import LayerSet, layer_sets, set_clip_options
from video_ldm.temporal.errors import SHOWN_NAME

SCRIPT = Path(__file__).resolve().parent.parent / "web" / "js" / "notes.js"
SCHEMA = SimpleNamespace(outputs=[io.Float.Output("fps"), io.String.Output("text", display_name="report")])


@pytest.fixture(scope="module")
def demo():
    return models.load_demo(files.DEMO_FOLDER)


@pytest.fixture(scope="module")
def video(demo):
    return load.LoadTemporalLayers.execute(demo[0], load.DEMO_LAYERS, 1.0, load.AS_TRAINED)


def clip(video, frames=8, width=128, height=64):
    """What Video LDM Sampler shows for a clip of one step, and the kept log."""
    text = [[torch.zeros(1, 4, 128), {}]]
    output = sample.VideoLDMSampler.execute(video.result[0], text, text, frames, width, height, 1, 0, 1, 1.0, "euler",
                                            "normal", 1.0)
    return "\n".join((output.ui or {}).get("text", ()))


def told(report, warnings=(), ui=None):
    return notes.with_text(SCHEMA, io.NodeOutput(8.0, report, ui=ui), list(warnings)).ui


def test_a_nodes_report_is_shown_behind_its_warnings():
    assert told("One.\nTwo.") == {"text": ("One.\nTwo.",)}
    assert told("One.\nTwo.", ["Bad."])["text"] == ("Warning: Bad.\nOne.\nTwo.",)
    assert told("One.\nBad.", ["Bad."])["text"] == told("One.\nWarning: Bad.", ["Bad."])["text"]   # said once
    assert told("One.\nBad.", ["Bad."])["text"] == ("Warning: Bad.\nOne.",)
    assert told("", ui={"images": [1]}) == {"images": [1]} and told("") is None
    assert told("One.", ui={"images": [1]}) == {"images": [1], "text": ("One.",)}


def test_a_warning_is_collected_and_logged_once_for_a_node(caplog):
    with notes.collected() as found:
        notes.warn("Bad.")
        notes.warn("Bad.")
        notes.warn("Worse.")
    assert found == ["Bad.", "Worse."] and caplog.text.count("Bad.") == 1
    notes.warn("After.")
    assert found == ["Bad.", "Worse."] and "After." in caplog.text


def test_a_running_node_gets_its_text_as_an_event(monkeypatch):
    sent = []
    running = SimpleNamespace(client_id="me", send_sync=lambda *message: sent.append(message))
    monkeypatch.setattr(notes, "server", lambda: running)
    notes.warn("Nobody runs.")
    monkeypatch.setattr(notes, "get_executing_context", lambda: SimpleNamespace(prompt_id="p", node_id="3:5"))
    with notes.collected():
        notes.warn("Bad.")
        notes.warn("Worse.")
    assert sent == [(notes.EVENT, {"node": "3:5", "text": "Warning: Bad."}, "me"),
                    (notes.EVENT, {"node": "3:5", "text": "Warning: Bad.\nWarning: Worse."}, "me")]


def test_a_loader_shows_its_report(video):
    assert video.ui == {"text": (video.result[1],)} and "Trained on clips of 8 frames" in video.result[1]


def test_a_node_of_another_pack_that_samples_several_times_is_warned_once(monkeypatch, caplog):
    """FreeInit has core's KSampler sample several times within one node."""
    places = [("p", "1"), ("p", "1"), ("p", "2"), ("q", "2")]
    running = SimpleNamespace()
    monkeypatch.setattr(notes, "get_executing_context", lambda: running)
    for running.prompt_id, running.node_id in places:
        notes.warn("Bad.")
    assert caplog.text.count("Bad.") == len(set(places))


@pytest.mark.parametrize("changes, sentence", [
    ({}, ""),
    ({"frames": 9}, "Warning: 9 frames are sampled together, and video_ldm_driving.safetensors was trained on clips of "
                    "8: motion may be worse. Set frames to 8, or connect Frame Windows behind Load Temporal Layers."),
    ({"frames": 1}, "Warning: The clip has one frame, so nothing can move. Set frames to 8, or make the latent that "
                    "many frames long (batch_size)."),
    ({"height": 72}, "Warning: The demo was trained on pictures of 128x64 pixels, and these have 128x72: they will be "
                     "poor. Set width to 128 and height to 64.")])
def test_the_sampler_shows_what_the_demo_was_not_trained_on(video, changes, sentence):
    assert clip(video, **changes) == sentence


def test_a_clip_longer_than_trained_is_warned_of_unless_something_takes_care_of_it(video):
    model, (layers,) = video.result[0].clone(), layer_sets(video.result[0])

    def warning(frames=24, **changes):
        return clip_warnings.length_warning(LayerSet(**{**vars(layers), **changes}), frames)
    assert "clips of 8" in warning() and warning(8) is None
    assert warning(strength=0.0) is None and warning(max_distance=8) is None        # the image model; Frame Windows
    set_clip_options(model, frames=12)
    options = model.model_options
    assert clip_warnings.frames_of_call(options, 24) == 12
    for handler, frames in ((SimpleNamespace(context_length=8, dim=0), 8),          # core's windows over frames
                            (SimpleNamespace(context_length=8, dim=2), 12), (SimpleNamespace(), 12)):
        assert clip_warnings.frames_of_call({**options, "context_handler": handler}, 24) == frames


@pytest.mark.parametrize("images, frames, sentence", [
    (16, 16, "16 frames are sampled together, .* Set window to 8."), (16, 8, None), (1, 1, None),
    (16, 1, "The layers see one frame at a time, so they do nothing. Set window to 8.")])
def test_where_a_node_has_a_widget_for_windows_the_warning_names_it(video, images, frames, sentence):
    pieces = SimpleNamespace(context_length=frames, window_widget="window")
    model = video.result[0]
    with notes.collected() as found:
        clip_warnings.warn_of_clip(model, {**model.model_options, "context_handler": pieces},
                                   torch.zeros(images, 4, 8, 16))
    assert len(found) == (sentence is not None)
    assert all(re.match(sentence, text) for text in found)


def test_the_demo_warns_of_words_that_it_does_not_know(demo, caplog):
    tokenize = demo[1].tokenize
    for text in ("", "a busy road by day, driving slow, turning left, a blue car and a yellow car",
                 "(A Quiet Road:1.2) at night", "an empty road, going straight"):
        tokenize(text)
    assert caplog.text == ""
    tokenize("a purple dragon on a busy road")
    assert "The demo does not know purple, dragon, on. It knows roads with cars, by these words: " in caplog.text
    assert "blue, busy, by, car" in caplog.text


def test_an_unknown_frame_rate_is_assumed_with_a_warning():
    with notes.collected() as found:
        assert decoded_outputs.chosen_rate(0.0, None, 12.0) == 12.0 and found == []
        assert decoded_outputs.chosen_rate(0.0, None) == 8
    assert found == ["Nothing says the frame rate, so 8 frames per second are assumed. Set fps."]


def test_the_pages_script_listens_to_the_servers_event():
    script = SCRIPT.read_text(encoding="utf-8")
    assert re.search(r'const EVENT = "(.*)";', script)[1] == notes.EVENT
    assert re.search(r'const PREFIX = "(.*)";', script)[1] == "VideoLDM"
    assert re.search(r'const PACK = "(.*?)";', script)[1] == SHOWN_NAME
