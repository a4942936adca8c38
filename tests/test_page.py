"""What ComfyUI's page makes of the pack, as far as it can be told without a page."""

import re
from pathlib import Path

import pytest

from video_ldm.temporal.errors import VideoLDMError
from video_ldm.temporal.video import KINDS
from video_ldm.tests.host.page import ACTS_WITHIN, OPENS_WITHIN, open_page

SCRIPT = Path(__file__).resolve().parent.parent / "web" / "js" / "save_video_file.js"
VIDEOS, PICTURES = ("mp4", "webm", "webm 10-bit"), ("gif", "webp")


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
    played = {name: f"clip_00001_{kind.ending}" for name, kind in KINDS.items() if kind.pages_play}
    assert {name for name, file in played.items() if video.search(file)} == set(VIDEOS)
    assert set(played) == {*VIDEOS, *PICTURES}
    assert video.search("video_ldm_0123_.mp4"), "what the others show in their place"


class DeadTab:
    """A tab in which nothing ever appears. It counts what is waited for."""

    def __init__(self):
        self.waits = []

    def goto(self, address, **how):
        self.waits.append(("goto", how["timeout"]))

    def wait_for_function(self, text, timeout=None, **how):
        self.waits.append(("wait", timeout))
        raise TimeoutError("nothing appeared")

    def set_default_timeout(self, timeout):
        self.waits.append(("default", timeout))

    def on(self, event, action):
        pass

    def new_page(self):
        return self


def test_a_page_that_did_not_open_is_not_tried_again():
    tab, faults = DeadTab(), []
    with pytest.raises(TimeoutError):
        open_page(tab, faults, "127.0.0.1:1", vue=False, name="classic")
    assert tab.waits == [("default", ACTS_WITHIN), ("goto", OPENS_WITHIN), ("wait", OPENS_WITHIN)]
    with pytest.raises(pytest.fail.Exception, match="Not tried again. The page did not open: nothing appeared"):
        open_page(tab, faults, "127.0.0.1:1", vue=True, name="vue")
    assert len(tab.waits) == 3
