"""Names and tooltips of the nodes in other languages, where ComfyUI looks for them: locales/LANGUAGE/nodeDefs.json."""

import json
from pathlib import Path

import pytest

from video_ldm.nodes.extension import FILES

FOLDER = Path(__file__).resolve().parent.parent / "locales"
LANGUAGES = ("ja", "ko", "zh")
SCHEMAS = {schema.node_id: schema for schema in (node.define_schema() for file in FILES for node in file.NODES)}


@pytest.fixture(scope="module", params=LANGUAGES)
def texts(request):
    return json.loads((FOLDER / request.param / "nodeDefs.json").read_text(encoding="utf-8"))


def test_the_folder_holds_these_languages():
    assert sorted(path.parent.name for path in FOLDER.glob("*/nodeDefs.json")) == list(LANGUAGES)


def test_every_node_and_input_has_texts_and_none_is_of_a_node_or_an_input_that_is_gone(texts):
    assert sorted(texts) == sorted(SCHEMAS)
    inputs = {node: sorted(entry.get("inputs", {})) for node, entry in texts.items()}
    assert inputs == {node: sorted(entry.id for entry in schema.inputs) for node, schema in SCHEMAS.items()}
    parts = [entry for node in texts.values() for entry in node.get("inputs", {}).values()]
    assert all(set(part) == {"name", "tooltip"} and all(part.values()) for part in parts)


def test_descriptions_and_tooltips_are_in_the_language(texts):
    """An English sentence that was left has nothing but ASCII."""
    sentences = [node["description"] for node in texts.values()]
    sentences += [entry["tooltip"] for node in texts.values() for entry in node.get("inputs", {}).values()]
    assert [text for text in sentences if text.isascii()] == []


def test_choices_of_a_list_are_named_as_the_list_has_them(texts):
    """The page does not translate what a list offers, so tooltips name the choices in English."""
    known = {"schedule": ("as trained", "the model's own"), "mode": ("linear", "hold"), "light": ("day", "night")}
    for node, names in (("VideoLDMLoadTemporalLayers", "schedule"), ("VideoLDMPromptTravel", "mode"),
                        ("VideoLDMSceneLayout", "light")):
        combo = next(entry for entry in SCHEMAS[node].inputs if entry.id == names)
        assert set(known[names]) <= set(combo.options)
        assert all(choice in texts[node]["inputs"][names]["tooltip"] for choice in known[names])
