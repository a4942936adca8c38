"""What the page's scripts do with a node's outputs. They run in node.js, with the least of a page around them."""

import re
from xml.etree import ElementTree

import pytest

from video_ldm.tests.page_scripts_help import evaluate, in_node

GRAPHS = """
    function made(id, kind, graph, more = {}) {
        return { id, comfyClass: kind, graph, widgets: [], size: [200, 100], setSize() {},
                 computeSize: () => [200, 100], setDirtyCanvas() {}, addWidget(type, name, value, callback) {
                     this.widgets.push({ name, callback });
                     return this.widgets.at(-1);
                 }, ...more };
    }
    function graphOf(id, ...nodes) {
        const getNodeById = (wanted) => nodes.find((one) => one.id === wanted);
        const graph = { id, isRootGraph: id === "root", getNodeById };
        nodes.forEach((node) => { node.graph = graph; });
        return graph;
    }
"""


@in_node
@pytest.mark.parametrize("name", ["3:5", "inner:5"])
@pytest.mark.parametrize("script, extension, kind, property", [
    ("notes.js", "VideoLDM.Notes", "VideoLDMLoadTemporalLayers", "widgets[0]?.value"),
    ("save_video_file.js", "VideoLDM.SaveVideoFile", "VideoLDMSaveVideo", "previewMediaType")])
def test_outputs_that_are_restored_reach_a_node_in_a_subgraph(tmp_path, name, script, extension, kind, property):
    program = GRAPHS + f"""
    const node = made(5, "{kind}"), inner = graphOf("inner", node);
    app.graph = app.rootGraph = graphOf("root", made(3, "", null, {{ subgraph: inner }}));
    app.rootGraph.subgraphs = new Map([["inner", inner]]);
    await load();
    app.extensions["{extension}"].onNodeOutputsUpdated(
        {{ "{name}": {{ text: ["8 frames"], images: [{{ filename: "a.gif" }}] }} }});
    show(node.{property} ?? null);
    """
    assert evaluate(tmp_path, script, program) == {"notes.js": "8 frames"}.get(script, "image")


@in_node
def test_the_contact_sheet_tells_its_node_alone_and_turns_back_after_the_workflow_was_opened_again(tmp_path):
    program = GRAPHS + """
    globalThis.window = { LiteGraph: { vueNodesMode: true } };
    const store = {}, output = { images: [{ filename: "a.mp4" }], animated: [true],
                                 contact_sheet: [{ filename: "sheet.png" }] };
    app.extensionManager._p = { state: { value: { nodeOutput: { nodeOutputs: store } } } };
    function open(seen) {
        const onExecuted = ({ images }) => seen.push(images[0].filename);
        const node = made(7, "VideoLDMSaveVideo", null, { onExecuted });
        app.graph = app.rootGraph = graphOf("root", node);
        return node;
    }
    const press = (node) => node.widgets.find((one) => one.name === "Contact sheet / video").callback();
    const first = [], second = [], shown = () => [store[7].images[0].filename, app.nodeOutputs[7].images[0].filename];
    await load();
    const node = open(first);
    api.dispatchCustomEvent("executed", { node: "7", output });
    press(node);
    const steps = [shown()], again = open(second);
    app.extensions["VideoLDM.ContactSheet"].onNodeOutputsUpdated(app.nodeOutputs);
    press(again);
    steps.push(shown());
    press(again);
    steps.push(shown());
    show([steps, first, second, api.told]);
    """
    sheet, video = ["sheet.png"] * 2, ["a.mp4"] * 2
    assert evaluate(tmp_path, "contact_sheet.js", program) == [
        [sheet, video, sheet], ["sheet.png"], ["a.mp4", "sheet.png"], ["executed"]]


# The moving preview

SHEET = "{ columns: 3, rows: 2, frames: 5, still: 1, fps: 4 }"


@in_node
def test_a_sheet_is_cut_where_the_server_says_and_its_pictures_take_turns_at_their_speed(tmp_path):
    program = f"""
    const {{ cut, paint, sizeOf, turnAt }} = await load();
    const cells = cut({SHEET}, 288, 96), drawn = [];
    const pen = {{ drawImage: (sheet, ...numbers) => drawn.push(numbers) }};
    paint({{ width: 512, height: 128, getContext: () => pen }}, "sheet", cells, 1000);
    show([sizeOf(cells), sizeOf({{ ...cells, width: 640, height: 320 }}),
          [0, 249, 250, 1000, 1249, 1250].map((time) => turnAt(cells, time)), drawn]);
    """
    size, large, turns, drawn = evaluate(tmp_path, "moving_preview_picture.js", program)
    assert size == [512, 128] and large == [1280, 320]          # two beside each other, at least 512 wide
    assert turns == [0, 0, 1, 4, 4, 0]
    assert drawn == [[96, 48, 96, 48, 0, 0, 256, 128], [192, 48, 96, 48, 256, 0, 256, 128]]     # pictures 4 and 5


@in_node
def test_the_picture_that_moves_by_itself_shows_each_part_of_the_sheet_in_turn(tmp_path):
    program = f"""
    const {{ cut, drawing }} = await load();
    show(drawing("data:image/jpeg;base64,AAAA", cut({SHEET}, 288, 96), 1500));
    """
    text = evaluate(tmp_path, "moving_preview_picture.js", program)
    root = ElementTree.fromstring(text)
    assert (root.get("width"), root.get("height"), root.get("viewBox")) == ("512", "128", "0 0 192 48")
    assert re.findall(r"([\d.]+)%{transform:translate\((-?\d+)px,(-?\d+)px\)}", text) == [
        ("0", "0", "0"), ("20", "-96", "0"), ("40", "-192", "0"), ("60", "0", "-48"), ("80", "-96", "-48")]
    assert "animation:turns 1.25s step-end -0.25s infinite" in text         # 1.5 s is 0.25 s into the second round
    moving, still = root.findall("{*}svg/{*}image")
    assert [moving.get(name) for name in ("class", "x", "y", "width", "height")] == ["clip", "0", "0", "288", "96"]
    assert [still.get(name) for name in ("class", "x", "y")] == [None, "-192", "-48"]
    assert moving.get("href") == still.get("href") == "data:image/jpeg;base64,AAAA"


PLAYER = GRAPHS + """
    globalThis.window = { LiteGraph: { vueNodesMode: true } };
    const store = {};
    app.extensionManager._p = { state: { value: { nodeOutput: { nodePreviewImages: store } } } };
    app.extensionManager.setting = { get: () => switched };
    globalThis.createImageBitmap = async () => ({ width: 288, height: 96 });
    globalThis.FileReader = class { readAsDataURL() { this.result = "data:,"; this.onload(); } };
    let switched = true, count = 0;
    URL.createObjectURL = () => `moving ${++count}`;
    app.graph = app.rootGraph = graphOf("root", made(7, "VideoLDMSampler", null));
    const told = (more) => api.dispatchCustomEvent("video_ldm.preview", { node: "7", ...more });
    async function arrives(name) {
        store[7] = [name];                      // as the page itself does, before
        api.dispatchCustomEvent("b_preview_with_metadata", { blob: new Blob(["x"]), nodeId: "7", displayNodeId: "7" });
        const at_once = [...store[7]];
        await new Promise((done) => setTimeout(done, 20));
        return [at_once, [...store[7]]];
    }
"""


@in_node
def test_vue_gets_a_picture_that_moves_behind_each_sheet_and_the_sheet_alone_in_the_end(tmp_path):
    program = PLAYER + f"""
    await load();
    const seen = [await arrives("first")];
    told({SHEET});
    seen.push(await arrives("second"));
    told({SHEET});
    seen.push(await arrives("third"));
    api.dispatchCustomEvent("executing", null);
    seen.push([...store[7]]);
    switched = false;
    told({SHEET});
    seen.push(await arrives("fourth"));
    show(seen);
    setTimeout(() => process.exit(0), 10);
    """
    assert evaluate(tmp_path, "moving_preview.js", program) == [
        [["first"], ["first"]],
        [["second"], ["second", "moving 1"]],
        [["third", "moving 1"], ["third", "moving 2"]],         # the last one stays until the new one is there
        ["third"],
        [["fourth"], ["fourth"]]]
