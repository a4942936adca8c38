"""The script behind Scene Layout's drawing reads and writes the text as the node does.

The script runs in node.js, without a page. tests/host has the drawing in a browser.
"""

import json
import re
import subprocess
from pathlib import Path

import pytest
import torch

from video_ldm.nodes.box_colours import FARTHEST, LIGHTNESS, nearest_colour, paints
from video_ldm.nodes.box_lines import colour_remarks, parse_boxes
from video_ldm.nodes.scene_layout import EXAMPLE, SceneLayout
from video_ldm.temporal.errors import VideoLDMError
from video_ldm.temporal.formats.scene_layout_file import LayoutFile
from video_ldm.temporal.formats.temporal_file import Base
from video_ldm.temporal.scene_layout import LayoutParams
from video_ldm.tests.page_scripts_help import evaluate as evaluate_page
from video_ldm.tests.page_scripts_help import in_node

SCRIPTS = Path(__file__).resolve().parent.parent / "web" / "js"
LINES = (SCRIPTS / "scene_layout_lines.js").read_text(encoding="utf-8")
COLOURS = ("red", "blue", "yellow", "white", "green")
CONTENT = LayoutFile("scene.safetensors", LayoutParams(COLOURS, (), 16, 2, 1, 3, ()), {}, torch.zeros(1, 1),
                     Base("Video LDM demo", 1), most_boxes=3)
LIMITS = {"most_boxes": 3, "colours": paints(COLOURS)}


def evaluate(expression, **values):
    """The value of a JavaScript expression that may use the script's functions and the given values."""
    given = "".join(f"const {name} = {json.dumps(value)};\n" for name, value in {"limits": LIMITS, **values}.items())
    program = f"{LINES}\n{given}console.log(JSON.stringify({expression}));"
    done = subprocess.run(["node", "--input-type=module"], input=program, text=True, capture_output=True, check=True)
    return json.loads(done.stdout)


@in_node
def test_the_page_sees_the_boxes_that_the_node_sees_and_a_fault_where_the_node_refuses():
    texts = [EXAMPLE, "", "# a comment", "none", "none # no cars", "0.1 0.2 0.3 0.4 red", " .1, .2,3e-1 ,0.4,BLUE # x",
             "0,0,1,1,#2454dc#another", "0 0 1 1 #CD2024 # note", "0.7 0.9 0.30000000000000004 0.1 red",
             "0.1 0.1 0.2 0.2", "0.1 0.1 0.2 0.2 red car", "0.1 wide 0.2 0.2 red", "0.1 0.1 0 0.2 red",
             "0.1 0.1 0.2 -0.2 red", "0.9 0.1 0.2 0.2 red", "-0.1 0.1 0.2 0.2 red", "64 16 32 16 red",
             "0.1 0.1 0.2 0.2 # red", "0.1 0.1 0.2 0.2 #ff00", "0.1 0.1 0.2 0.2 #800080", "0.1 0.1 0.2 0.2 pink",
             "0.1 nan 0.2 0.2 red", "0.1 0x1 0.2 0.2 red", "cars", "0 0 1 1 red\nnone",
             "\n".join(["0 0 1 1 red"] * 3), "\n".join(["0 0 1 1 red"] * 4)]
    seen = evaluate("texts.map((text) => [read(text, limits), say(read(text, limits), limits)])", texts=texts)
    refused = []
    for text, (found, words) in zip(texts, seen):
        try:
            wanted = parse_boxes(text, CONTENT)
        except VideoLDMError:
            refused.append(text)
            assert re.match(r"Line \d|none stands beside|4 boxes, and this file knows at most three", words), text
            continue
        boxes = [(*(box[key] for key in ("x", "y", "width", "height")), box["colour"]) for box in found["boxes"]]
        assert found["faults"] == [] and len(boxes) == len(wanted or [])
        for (x, y, width, height, colour), (x0, y0, x1, y1, named) in zip(boxes, wanted or []):
            assert (x, y, x + width, y + height) == pytest.approx((x0, y0, x1, y1), abs=2e-6) and colour == named
        assert found["none"] == (wanted == [])
    assert len(refused) == 17


@in_node
def test_the_page_finds_the_colours_that_the_node_finds():
    assert f"const FARTHEST = {FARTHEST};" in LINES and f"const LIGHTNESS = {LIGHTNESS};" in LINES
    levels = ("00", "40", "80", "c0", "ff")
    words = [f"#{r}{g}{b}" for r in levels for g in levels for b in levels]
    found = evaluate("words.map((word) => nearest(word, limits.colours))", words=words)
    assert found == [nearest_colour(word, COLOURS) for word in words]
    assert set(found) == {*COLOURS, None}


@in_node
def test_an_edit_keeps_other_lines_comments_and_the_numbers_that_did_not_change():
    text = "# two\n0.610 0.46 0.13 0.19 red\n\n  0.27, .460, 0.12, 0.17, blue # mine"
    found = evaluate("read(text, limits).boxes", text=text)
    assert [box["line"] for box in found] == [1, 3]
    edits = evaluate("""[replace(text, {...box, x: 0.3333333}), replace(text, {...box, word: "green"}),
                         add(text, {x: 0.5, y: 0.25, width: 0.1, height: 0.2, word: "red"}), remove(text, box),
                         remove(remove(text, box), first), add("none # a\\n\\n", {...box, word: "red"})]""",
                     text=text, box=found[1], first=found[0])
    kept = "# two\n0.610 0.46 0.13 0.19 red\n\n"
    assert edits == [f"{kept}  0.333 .460 0.12 0.17 blue # mine", f"{kept}  0.27 .460 0.12 0.17 green # mine",
                     f"{text}\n0.5 0.25 0.1 0.2 red", kept.rstrip("\n"), "# two\nnone", "0.27 0.46 0.12 0.17 red"]
    for edit in edits:
        parse_boxes(edit, CONTENT)


@in_node
def test_what_the_mouse_makes_lies_in_the_picture_and_has_a_size():
    points = [-0.5, 0, 0.12345, 0.5, 0.9996, 1, 1.7]
    boxes = evaluate("points.flatMap((a) => points.map((b) => between(a, b, b, a)))", points=points)
    assert len(boxes) == 49
    for box in boxes:
        line = " ".join(str(box[key]) for key in ("x", "y", "width", "height"))
        ((x0, y0, x1, y1, _),) = parse_boxes(f"{line} red", CONTENT)
        assert x1 - x0 >= 0.0099 and y1 - y0 >= 0.0099 and all(len(word) <= 5 for word in line.split())
    moved = evaluate("[[2, 2], [-2, -2], [0, 0.1], [0.1234567, 0]].map(([x, y]) => moved(box, x, y))",
                     box={"x": 0.1, "y": 0.2, "width": 0.1234, "height": 0.25})
    assert [(box["x"], box["y"]) for box in moved] == [(0.876, 0.75), (0, 0), (0.1, 0.3), (0.223, 0.2)]


@in_node
def test_the_page_says_the_limits_and_what_a_colour_is_taken_as():
    texts = ["", "none", "0 0 1 1 red", "0 0 1 1 #2454dc\n0 0 1 1 #cd2024", "0 0 1 1 pink"]
    words = evaluate("texts.map((text) => say(read(text, limits), limits))", texts=texts)
    assert words == ["Cars stand anywhere. At most three boxes. Drag to draw.",
                     "No cars. At most three boxes. Drag to draw.",
                     "1 of at most three boxes, in fractions of the picture.",
                     "Line 1: #2454dc is taken as blue. Line 2: #cd2024 is taken as red.",
                     "Line 1: pink is none of red, blue, yellow, white, green."]
    assert all(remark.startswith(said) for remark, said in
               zip(colour_remarks(texts[3], CONTENT), words[3].removesuffix(".").split(". ")))
    unknown = evaluate("texts.map((text) => say(read(text), undefined))", texts=texts)
    assert unknown[2:] == ["Boxes are fractions of the picture."] * 3 and unknown[0] == (
        "Cars stand anywhere. Drag to draw.")


def test_the_drawing_belongs_to_the_node_and_stores_nothing():
    script = (SCRIPTS / "scene_layout.js").read_text(encoding="utf-8")
    assert f'const NODE = "{SceneLayout.define_schema().node_id}";' in script
    assert "widget.serialize = false" in script and re.search(r"^\s+serialize: false,", script, re.M)
    names = set(re.findall(r'widget\("(\w+)"\)', script)) | {"width", "height"}
    assert names <= {entry.id for entry in SceneLayout.define_schema().inputs}


@in_node
def test_only_a_node_in_a_graph_has_a_timer(tmp_path):
    program = """
    const running = new Set();
    let last = 0;
    globalThis.setInterval = () => { running.add(++last); return last; };
    globalThis.clearInterval = (timer) => running.delete(timer);
    const element = () => ({ style: {}, append() {}, addEventListener() {} });
    globalThis.document = { createElement: element };
    await load();
    const called = [];
    function made() {
        const node = { comfyClass: "VideoLDMSceneLayout", widgets: [{ name: "boxes" }], size: [200, 100],
                       addDOMWidget: () => ({}), setSize() {}, computeSize: () => [200, 100],
                       onAdded(graph) { called.push(graph); }, onRemoved() { called.push("removed"); } };
        app.extensions["VideoLDM.SceneLayout"].nodeCreated(node);
        return node;
    }
    const counts = [], node = made();
    made();                     // what the clipboard makes: it comes into no graph
    counts.push(running.size);
    node.onAdded("graph");
    counts.push(running.size);
    node.onAdded("subgraph");   // a node that is moved
    counts.push(running.size);
    node.onRemoved();
    counts.push(running.size);
    show([counts, called]);
    """
    assert evaluate_page(tmp_path, "scene_layout.js", program) == [[0, 1, 1, 0], ["graph", "subgraph", "removed"]]
