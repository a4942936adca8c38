"""ComfyUI's own page in a headless Chromium, used as an artist uses it: templates, widgets, the Run button.

    def test_something(page):                   # twice: nodes drawn on the canvas, and nodes drawn by Vue
        page.open_template("quickstart")
        page.set_widgets("steps", 2)
        run = page.run()                        # presses Run and watches until the end
        assert run.ended == "execution_success" and run.overlaps == [] and page.errors() == []
        assert page.players()[0].plays

A page and `server.client.run` do not go together in one test: both need the thread's event loop.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from video_ldm.tools import graph_layout
from video_ldm.tools.graph_layout import HEIGHT, WIDTH
from video_ldm.tools.paths import LINK_NAME, ROOT

BROWSERS = tuple(Path(__file__).with_name("browsers.txt").read_text(encoding="utf-8").split())  # .ci/run reads it too
REQUIRED = os.environ.get("VIDEO_LDM_BROWSER") == "required"    # then a missing browser is a failure
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
             "--disable-component-update", "--disable-sync"]
SCREENSHOTS = ROOT / "output" / "page"
OPENS_WITHIN = 180_000      # milliseconds; a busy machine draws a page without a GPU slowly
ACTS_WITHIN = 30_000        # milliseconds for each further action
TEST_WITHIN = 300           # seconds for a test, as the page's scripts have no limit of their own
TOUCH = 1.0                 # units of a graph by which boxes may meet: pages round
RUN_BUTTON = "button[data-testid=queue-button], [data-testid=queue-button] button"      # of newer pages, and of older
SCRIPT = Path(__file__).with_name("page.js")


@dataclass(frozen=True)
class Box:
    """A node as the page draws it, its title included, in the units of the graph."""
    node: int
    type: str
    left: float
    top: float
    right: float
    bottom: float

    def meets(self, other: Box) -> bool:
        return (self.left < other.right - TOUCH and other.left < self.right - TOUCH
                and self.top < other.bottom - TOUCH and other.top < self.bottom - TOUCH)


@dataclass(frozen=True)
class Player:
    """A video, or a picture, that a node shows."""
    node: int
    kind: str           # "video" or "img"
    file: str           # the name of the file that it shows
    width: int          # of its frames, in pixels; 0 where nothing could be read
    height: int
    duration: float     # seconds; 0 for a picture
    loops: bool
    by_itself: bool     # whether a video had begun before anybody pressed play; False for a picture
    moved: bool         # whether its time went on while it was watched; False for a picture
    error: str          # the browser's words where the file cannot be shown

    @property
    def plays(self) -> bool:
        shown = self.width > 0 and self.height > 0 and not self.error
        return shown and (self.kind == "img" or self.duration > 0 and self.moved)


@dataclass
class Run:
    """What was seen between the press of Run and the end."""
    ended: str                                          # the server's last event, or "refused" or "timeout"
    message: str = ""                                   # what the page was told where it failed
    seconds: float = 0.0
    previews: set[int] = field(default_factory=set)     # nodes that showed a picture on the way
    overlaps: list[str] = field(default_factory=list)   # at any moment of the run, and after it


class Page:
    """One tab with ComfyUI's page.

    Args:
        tab: of Playwright.
        address: of the server, "127.0.0.1:8188".
        vue: whether Vue draws the nodes ("Nodes 2.0"); else they are drawn on the canvas.
        name: goes in front of the names of its screenshots.
    """

    def __init__(self, tab, address: str, vue: bool, name: str):
        self.tab, self.address, self.vue, self.name = tab, address, vue, name
        self.faults: list[str] = []         # what broke in the page's scripts since the last graph was opened
        self.closed = ""                    # why the templates could not be opened; they are not tried again
        tab.set_default_timeout(ACTS_WITHIN)
        tab.on("pageerror", lambda error: self.faults.append(f"uncaught: {error}"))
        tab.on("console", self.listen)
        tab.goto(f"http://{address}/", wait_until="domcontentloaded", timeout=OPENS_WITHIN)
        tab.wait_for_function("() => window.app?.graph && window.app?.canvas && window.app?.extensionManager",
                              timeout=OPENS_WITHIN)
        tab.wait_for_selector("[data-testid=queue-button]")
        tab.evaluate(SCRIPT.read_text(encoding="utf-8"))
        tab.evaluate("vue => app.extensionManager.setting.set('Comfy.VueNodes.Enabled', vue)", vue)
        self.wait(0.5)

    def listen(self, message) -> None:
        """Note the page's complaints that name this pack. It has others, also that it may not ask core's registry."""
        of_pack = any(word in message.text for word in (LINK_NAME, "VideoLDM", "video_ldm"))
        if message.type == "error" and of_pack and "Content Security Policy" not in message.text:
            self.faults.append(f"console: {message.text}")

    def wait(self, seconds: float) -> None:
        self.tab.wait_for_timeout(1000 * seconds)

    def until(self, condition: Callable[[], object], seconds: float = 30.0):
        """Wait until the condition holds, but no longer than this. Returns its last value."""
        end = time.monotonic() + seconds
        while not (value := condition()) and time.monotonic() < end:
            self.wait(0.1)
        return value

    # ---- opening ----------------------------------------------------------------------------------------------

    def open_template(self, name: str) -> int:
        """Open a workflow of this pack as an artist does. Returns the number of clicks."""
        refuse_again(self.closed)
        self.close_dialogs()
        self.faults.clear()
        self.tab.evaluate("() => pageTest.forget()")
        clicks = [self.tab.locator(".templates-tab-button, [aria-label^=Templates]").first,
                  self.tab.get_by_role("dialog").get_by_text(LINK_NAME, exact=True).first,
                  self.tab.locator(f"[data-testid=template-workflow-{name}]")]
        for target in clicks[:-1]:
            try:
                target.click()
            except Exception as error:
                self.closed = f"The list of templates did not open: {error}"
                raise
        self.scroll_to(clicks[-1])
        clicks[-1].click()
        names = self.wanted(name)
        self.tab.wait_for_function("names => pageTest.holds(names)", arg=names)
        self.settle()
        return len(clicks)

    def scroll_to(self, target) -> None:
        """Scroll through the list of templates until it holds this one: newer pages show the first 24."""
        shown, before = self.tab.locator("[data-testid^=template-workflow-]"), 0
        shown.first.wait_for()
        while not target.count() and shown.count() > before:
            before = shown.count()
            shown.last.scroll_into_view_if_needed()
            self.wait(1)

    def open_graph(self, graph: dict) -> None:
        """Open a graph that is in no template, in the form that the page saves."""
        self.close_dialogs()
        self.faults.clear()
        self.tab.evaluate("async graph => { pageTest.forget(); await app.loadGraphData(graph); }", graph)
        self.settle()

    @staticmethod
    def wanted(name: str) -> list[int]:
        """The ids of the nodes of a template."""
        graph = json.loads((ROOT / "workflows" / f"{name}.json").read_text(encoding="utf-8"))
        return sorted(node["id"] for node in graph["nodes"])

    def settle(self) -> None:
        """Wait until the boxes of all nodes stand still."""
        self.wait(0.5)
        before = None
        for _ in range(20):
            now = self.boxes()
            if now == before:
                return
            before = now
            self.wait(0.4)

    def fit(self) -> None:
        """Show the whole graph."""
        self.tab.evaluate("() => app.extensionManager.command.execute('Comfy.Canvas.FitView')")
        self.wait(0.8)

    def close_dialogs(self) -> None:
        for _ in range(4):
            if not self.dialogs():
                return
            self.tab.keyboard.press("Escape")
            self.wait(0.5)

    # ---- running ----------------------------------------------------------------------------------------------

    def set_widgets(self, name: str, value, kind: str | None = None) -> int:
        """Set every widget of that name, of nodes of that kind where one is given. Returns how many were set."""
        return self.tab.evaluate("args => pageTest.setWidgets(...args)", [name, value, kind])

    def run(self, timeout: float = 900.0, during: Callable[[int], None] | None = None) -> Run:
        """Press Run and watch the page until the run has ended. `during` is called with the number of each look."""
        self.tab.evaluate("() => pageTest.listen()")
        began = time.monotonic()
        self.tab.locator(RUN_BUTTON).first.click()
        run, overlaps, before, looks = Run("timeout"), {}, set(), 0
        while time.monotonic() - began < timeout:
            state = self.tab.evaluate("() => pageTest.state()")
            run.previews.update(state["previews"])
            now = self.overlaps()       # twice in a row: a new player lies anywhere until the canvas is drawn again
            overlaps.update(dict.fromkeys(pair for pair in now if pair in before))
            before = set(now)
            if state["ended"]:
                run.ended, run.message = state["ended"], state["message"]
                break
            if during is not None:
                during(looks)
            looks += 1
            self.wait(0.7)
        run.seconds = time.monotonic() - began
        self.settle()
        overlaps.update(dict.fromkeys(self.overlaps()))
        run.overlaps = list(overlaps)
        return run

    # ---- looking ----------------------------------------------------------------------------------------------

    def boxes(self) -> list[Box]:
        return [Box(**box) for box in self.tab.evaluate("vue => pageTest.boxes(vue)", self.vue)]

    def overlaps(self) -> list[str]:
        """The pairs of nodes that lie over each other, in words."""
        boxes = self.boxes()
        return [f"{one.node} ({one.type}) and {other.node} ({other.type})"
                for number, one in enumerate(boxes) for other in boxes[:number] if one.meets(other)]

    def results_off_screen(self) -> list[Box]:
        """The nodes that show what the graph makes and are not wholly seen, in pixels: see tools/graph_layout.py."""
        seen = [Box(**box) for box in self.tab.evaluate("vue => pageTest.seen(vue)", self.vue)]
        return [box for box in seen if box.type in graph_layout.RESULTS and not graph_layout.on_screen(box)]

    def dialogs(self) -> list[str]:
        """The texts of the dialogs that stand open."""
        return self.tab.evaluate("() => pageTest.dialogs()")

    def errors(self, dialogs: bool = True) -> list[str]:
        """What is wrong on the page: failed scripts, red nodes, unknown nodes, error messages, dialogs."""
        found = [*self.faults, *self.tab.evaluate("() => pageTest.errors()")]
        return found + [f"dialog: {text[:300]}" for text in self.dialogs() if dialogs]

    def players(self, kind: str = "VideoLDMSaveVideo", watched: float = 0.8) -> list[Player]:
        """What the nodes of this kind show, watched for some seconds. A node that shows nothing has no player.

        Play is pressed on a video that stands still.
        """
        by_itself = self.tab.evaluate("kind => pageTest.play(kind)", kind)
        before = self.tab.evaluate("kind => pageTest.players(kind)", kind)
        self.wait(watched)
        after = self.tab.evaluate("kind => pageTest.players(kind)", kind)
        players = []
        for early, late, began in zip(before, after, by_itself):
            time_before, time_after = early.pop("time"), late.pop("time")
            players.append(Player(**late, by_itself=began, moved=time_before != time_after))
        return players

    def screenshot(self, name: str) -> Path:
        """A picture of the page in output/page/."""
        SCREENSHOTS.mkdir(parents=True, exist_ok=True)
        path = SCREENSHOTS / f"{self.name}_{name}.png"
        self.tab.screenshot(path=str(path))
        return path


# ---- opening the page once ----------------------------------------------------------------------------------------

def open_page(context, faults: list[str], address: str, vue: bool, name: str) -> Page:
    """A page in a new tab of the browser. `faults` keeps why a page did not open: then no other is tried."""
    refuse_again(*faults)
    try:
        return Page(context.new_page(), address, vue, name)
    except BaseException as error:          # also the end of the test's time
        faults.append(f"The page did not open: {error}")
        raise


def refuse_again(reason: str = "") -> None:
    """Fail at once where the same has failed before, and took its time."""
    if reason:
        pytest.fail(f"Not tried again. {reason}", pytrace=False)


# ---- the browser --------------------------------------------------------------------------------------------------

def find_browser() -> str:
    """The path of a Chromium. Where there is none the test is skipped, or fails if VIDEO_LDM_BROWSER is "required"."""
    for name in BROWSERS:
        path = shutil.which(name)
        if path:
            return path
    absent("There is no Chromium on this machine (Debian: apt-get install chromium), so the page was not tested.")


def absent(reason: str):
    if REQUIRED:
        pytest.fail(f"{reason} VIDEO_LDM_BROWSER says that it is required.")
    pytest.skip(reason)


@contextmanager
def browser() -> Iterator:
    """A headless Chromium with an empty profile of its own, as Playwright's context."""
    path = find_browser()
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        absent("The Python package playwright is not installed, so the page was not tested.")
    with sync_playwright() as driver, tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        context = driver.chromium.launch_persistent_context(
            profile, executable_path=path, headless=True, args=ARGUMENTS, timeout=OPENS_WITHIN,
            viewport={"width": WIDTH, "height": HEIGHT})
        try:
            yield context
        finally:
            context.close()
