"""The graphs of workflows/ in a real browser, as an artist meets them: opened from the templates, run with the button.

Every graph is opened in both renderings of the page. Those that need nothing but the bundled models are run as well,
with few steps: the quickstart in both renderings, the others in one. test_quickstart.py runs it with all its steps.
"""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
GRAPHS = sorted(path.stem for path in (ROOT / "workflows").glob("*.json"))
FILE = re.compile(r"\.(safetensors|ckpt|pt|pth|bin|png|jpe?g|webp|gif|mp4|webm|mov|mkv)$", re.I)
BUNDLED = {path.name for path in (ROOT / "models").rglob("*") if path.is_file()}
SAMPLERS = ("KSampler", "VideoLDMSampler", "VideoLDMExtend", "VideoLDMInterpolate")     # those that show previews
FEW = {"steps": 2, "following_steps": 2}
RENDERINGS = ("classic", "vue")
CLICKS = 4              # from the page to a run: Templates, video-ldm, the graph, Run. The README says so.


def graph(name):
    return json.loads((ROOT / "workflows" / f"{name}.json").read_text(encoding="utf-8"))


def runs_on_the_demo(name):
    """Whether every file that the graph names comes with the pack."""
    prompt = json.loads((ROOT / "workflows" / "api" / f"{name}.json").read_text(encoding="utf-8"))
    values = [value for node in prompt.values() for value in node["inputs"].values() if isinstance(value, str)]
    return all(value in BUNDLED for value in values if FILE.search(value))


def missing_models(name):
    """The files that the graph offers as downloads. The pack has none of them, so the page says that they miss."""
    entries = [entry for node in graph(name)["nodes"] for entry in node.get("properties", {}).get("models", ())]
    return {entry["name"] for entry in entries + graph(name).get("models", [])}


def active(name, kind):
    """The ids of the nodes of this kind that run."""
    return {node["id"] for node in graph(name)["nodes"] if node["type"] == kind and node["mode"] == 0}


DEMO = [name for name in GRAPHS if runs_on_the_demo(name)]
OTHERS = [name for name in DEMO if name != "quickstart"]
RUNS = [("quickstart", rendering) for rendering in RENDERINGS]
RUNS += [(name, RENDERINGS[number % 2]) for number, name in enumerate(OTHERS)]


def test_the_graphs_of_the_demo_are_known_by_their_files():
    assert {"quickstart", "windows", "drive", "pvdm"} <= set(DEMO)
    assert not {"animatediff", "lavie", "seine_picture", "zeroscope"} & set(DEMO)


def open_without_a_fault(page, name):
    """Open a graph from the templates: no fault, nothing overlaps, results are on the screen."""
    assert page.open_template(name) + 1 == CLICKS
    dialogs = " ".join(page.dialogs())
    if missing_models(name):
        assert [file for file in missing_models(name) if file not in dialogs] == []
    else:
        assert dialogs == ""
    page.close_dialogs()
    assert page.results_off_screen() == [], page.screenshot(f"{name}_opened")
    assert page.errors() == []
    assert page.overlaps() == [], page.screenshot(f"{name}_opened")
    assert sorted(box.node for box in page.boxes()) == sorted(node["id"] for node in graph(name)["nodes"])


def fit(page, name):
    """Show the whole graph: its results are on the screen. Vue's page draws a fitted graph larger than the screen."""
    page.fit()
    if page.name == "classic":
        assert page.results_off_screen() == [], page.screenshot(f"{name}_fitted")


@pytest.mark.slow
@pytest.mark.parametrize("name", GRAPHS)
def test_a_graph_opens_from_the_templates_without_a_fault(page, name):
    if (name, page.name) in RUNS:
        pytest.skip("the test that runs it opens it as well")
    open_without_a_fault(page, name)
    fit(page, name)


@pytest.mark.slow
@pytest.mark.timeout(1200)          # longer than Page.run waits, which says more
@pytest.mark.parametrize("name", DEMO)
def test_a_graph_of_the_demo_runs_to_its_end_and_its_videos_play(page, name):
    if (name, page.name) not in RUNS:
        pytest.skip("it is run in the other rendering")
    open_without_a_fault(page, name)
    assert sum(page.set_widgets(widget, value) for widget, value in FEW.items()) > 0
    run = page.run()
    hidden = page.results_off_screen()
    fit(page, name)
    picture = page.screenshot(f"{name}_ran")
    assert run.ended == "execution_success", run.message
    assert page.errors() == []
    assert run.overlaps == [] and hidden == [], picture
    sampling = set().union(*(active(name, kind) for kind in SAMPLERS))
    assert sampling <= run.previews, f"no preview in {sampling - run.previews}: {picture}"
    players = page.players()
    assert {player.node for player in players} == active(name, "VideoLDMSaveVideo")
    assert [player for player in players if not player.plays] == []


# ---- the page's helper itself -----------------------------------------------------------------------------------

@pytest.mark.slow
def test_the_helper_sees_an_unknown_node_an_overlap_and_a_failed_run(page):
    broken = graph("quickstart")
    nodes = {node["type"]: node for node in broken["nodes"]}
    nodes["VAEDecode"]["type"] = "VideoLDMNoSuchNode"
    nodes["VideoLDMLoadDemo"]["pos"] = nodes["VideoLDMLoadTemporalLayers"]["pos"]
    page.open_graph(broken)
    assert any("VideoLDMNoSuchNode" in text for text in page.dialogs())
    page.close_dialogs()
    assert [error for error in page.errors() if error.startswith("unknown node: 6")]
    moved = nodes["VideoLDMLoadTemporalLayers"]["id"]
    assert page.overlaps() == [f"{moved} (VideoLDMLoadTemporalLayers) and 1 (VideoLDMLoadDemo)"]
    page.open_graph(graph("quickstart"))
    assert page.overlaps() == [] and page.errors() == [] and page.players() == []
    assert page.set_widgets("file", "none.safetensors", "VideoLDMLoadTemporalLayers") == 2
    run = page.run()
    assert run.ended == "execution_error" and "none.safetensors" in run.message
