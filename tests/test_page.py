"""What ComfyUI's page makes of the pack, as far as it can be told without a page."""

import re
from pathlib import Path

import pytest

from video_ldm.temporal.errors import VideoLDMError
from video_ldm.temporal.video.write import FORMATS

SCRIPT = Path(__file__).resolve().parent.parent / "web" / "js" / "save_video_file.js"
VIDEOS, PICTURES = ("mp4", "webm"), ("gif", "webp")


def full_name(kind: type) -> str:
    """What ComfyUI's server sends as an error's type (execution.py)."""
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"


def test_an_error_is_shown_under_the_packs_name():
    with pytest.raises(ValueError) as caught:
        raise VideoLDMError("The file is empty.")
    assert full_name(caught.type) == "Video LDM" and str(caught.value) == "The file is empty."


def test_the_page_plays_what_is_a_video_and_shows_the_rest_as_a_picture():
    script = SCRIPT.read_text(encoding="utf-8")
    assert re.search(r'const NODE = "(.*)";', script)[1] == "VideoLDMSaveVideo"
    video = re.compile(re.search(r"const VIDEO = /(.*)/i;", script)[1], re.I)
    assert {name for name, ending in FORMATS.items() if video.search(f"clip_00001_{ending}")} == set(VIDEOS)
    assert set(FORMATS) == {*VIDEOS, *PICTURES}
