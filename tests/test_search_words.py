"""What an artist types into the page's search finds the pack's nodes, where ComfyUI takes further words for a node."""

import dataclasses

import pytest

from video_ldm.nodes.extension import FILES
from video_ldm.nodes.host import api, compat

TYPED = {"animatediff": "VideoLDMLoadTemporalLayers", "gif": "VideoLDMSaveVideo", "camera": "VideoLDMMotionLoRA",
         "motion": "VideoLDMMotionLoRA", "longer": "VideoLDMExtend", "interpolat": "VideoLDMInterpolate",
         "svd": "VideoLDMLoadTemporalDecoder", "upscale": "VideoLDMUpscale", "image to video": "VideoLDMContextFrames",
         "video combine": "VideoLDMSaveVideo", "context options": "VideoLDMFrameWindows"}
NODES = [node for file in FILES for node in file.NODES]


@dataclasses.dataclass
class NewSchema(api.io.Schema):
    """The schema of a ComfyUI that takes the words."""
    search_aliases: list[str] = dataclasses.field(default_factory=list)


@pytest.fixture
def found(monkeypatch):
    """{node id: lower-case texts that the page searches} with a ComfyUI that takes the words."""
    monkeypatch.setattr(api.io, "Schema", NewSchema)
    schemas = [node.define_schema() for node in NODES]
    return {schema.node_id: [schema.display_name.lower(), *schema.search_aliases] for schema in schemas}


@pytest.mark.parametrize("typed, node", TYPED.items())
def test_what_is_typed_finds_the_node(found, typed, node):
    assert any(typed in text for text in found[node])


def test_every_node_has_words_of_its_own_in_lower_case(found):
    assert [node for node, texts in found.items() if len(texts) < 3] == []
    words = [word for texts in found.values() for word in texts[1:]]
    assert [word for word in words if word != word.lower().strip()] == []
    assert [node for node, texts in found.items() if len(set(texts)) < len(texts)] == []


def test_a_comfyui_is_given_the_words_only_if_it_takes_them(monkeypatch):
    monkeypatch.setattr(api.io, "Schema", lambda node_id, search_aliases=(): None)
    assert compat.search_words("gif", "mp4") == {"search_aliases": ["gif", "mp4"]}
    monkeypatch.setattr(api.io, "Schema", lambda node_id, display_name=None: None)
    assert compat.search_words("gif", "mp4") == {}
