"""Scene Layout's drawing in a real browser, in both renderings: the mouse draws, and the text and the run follow."""

import json
from pathlib import Path

import pytest

DRIVE = Path(__file__).resolve().parents[2] / "workflows" / "drive.json"
SCENE, PREVIEW = 4, 13          # of the drive graph: Scene Layout, and the Preview Image of its boxes
TWO = "# cars\n0.61 0.46 0.13 0.19 red # ours\n0.27 0.46 0.12 0.17 blue"
NODE = f"app.graph.getNodeById({SCENE})"
WIDGET = f"{NODE}.widgets.find(one => one.name === 'drawing')"


@pytest.fixture
def scene(page):
    """The page with Scene Layout and its Preview Image alone."""
    graph = json.loads(DRIVE.read_text(encoding="utf-8"))
    graph["nodes"] = [node for node in graph["nodes"] if node["id"] in (SCENE, PREVIEW)]
    graph["links"] = [link for link in graph["links"] if (link[1], link[3]) == (SCENE, PREVIEW)]
    kept = {link[0] for link in graph["links"]}
    for node in graph["nodes"]:
        for entry in node["inputs"]:
            entry["link"] = entry["link"] if entry["link"] in kept else None
        for output in node["outputs"]:
            output["links"] = [link for link in output["links"] or () if link in kept]
    page.open_graph(graph)
    page.set_widgets("boxes", TWO)
    page.fit()
    return page


def text_of(page):
    return page.tab.evaluate(f"() => {NODE}.widgets.find(one => one.name === 'boxes').value")


def becomes(page, text):
    """Wait until the boxes are this text. Undo opens the graph anew, which takes a moment."""
    page.tab.wait_for_function(f"text => {NODE}?.widgets.find(one => one.name === 'boxes').value === text", arg=text)


def says(page, text):
    """Whether the page says this below the picture, once the drawing has followed."""
    return page.until(lambda: page.tab.evaluate(f"() => {WIDGET}.element.lastChild.textContent") == text)


def place(page, x, y):
    """Where on the screen a point of the picture is, which fills the drawing's canvas."""
    left, top, width, height = page.tab.evaluate(
        f"() => (({{x, y, width, height}}) => [x, y, width, height])({WIDGET}.element.querySelector('canvas')"
        ".getBoundingClientRect())")
    assert width / height == pytest.approx(2, rel=0.03)
    return left + x * width, top + y * height


def drag(page, start, end):
    mouse = page.tab.mouse
    mouse.move(*place(page, *start))
    mouse.down()
    mouse.move(*place(page, *((a + b) / 2 for a, b in zip(start, end))))
    mouse.move(*place(page, *end))
    mouse.up()
    page.wait(0.3)


def numbers(page, line):
    return [float(word) for word in text_of(page).splitlines()[line].split()[:4]]


def press(page, title):
    page.tab.locator(f"[data-node-id='{SCENE}'] [title='{title}'], .dom-widget [title='{title}']").first.click()
    page.wait(0.3)


@pytest.mark.slow
def test_the_mouse_draws_moves_resizes_repaints_and_removes_boxes(scene):
    assert says(scene, "2 of at most three boxes, in fractions of the picture.")
    drag(scene, (0.06, 0.5), (0.2, 0.8))
    assert text_of(scene).startswith(TWO + "\n") and text_of(scene).endswith(" yellow")
    assert numbers(scene, 3) == pytest.approx([0.06, 0.5, 0.14, 0.3], abs=0.02)
    before = text_of(scene)
    drag(scene, (0.4, 0.6), (0.5, 0.8))             # a fourth box
    assert text_of(scene) == before
    drag(scene, (0.12, 0.65), (0.42, 0.75))
    size = numbers(scene, 3)[2:]
    assert size == pytest.approx([0.14, 0.3], abs=0.02)
    x, y, width, height = numbers(scene, 3)
    assert (x, y) == pytest.approx((0.36, 0.6), abs=0.03)
    drag(scene, (x + width, y + height), (x + width - 0.05, y + height + 0.05))
    assert numbers(scene, 3) == pytest.approx([x, y, width - 0.05, height + 0.05], abs=0.02)
    scene.tab.mouse.click(*place(scene, 0.67, 0.55))
    press(scene, "Make the box green")
    assert text_of(scene).splitlines()[1] == "0.61 0.46 0.13 0.19 green # ours"
    left = text_of(scene).splitlines()[2:]
    whole = text_of(scene)
    scene.tab.keyboard.press("Delete")
    becomes(scene, "\n".join(["# cars", *left]))
    scene.tab.keyboard.press("Control+z")
    becomes(scene, whole)
    scene.settle()
    scene.tab.mouse.click(*place(scene, 0.33, 0.54))        # the drawing of the node that undo has made anew
    press(scene, "Remove the box (Delete)")
    assert "blue" not in text_of(scene) and "yellow" in text_of(scene)
    assert scene.errors() == []


@pytest.mark.slow
def test_what_is_drawn_is_what_runs_and_the_drawing_is_no_value_of_the_node(scene):
    scene.set_widgets("boxes", "none")
    assert says(scene, "No cars. At most three boxes. Drag to draw.")
    drag(scene, (0.25, 0.5), (0.5, 0.9))
    assert text_of(scene).split()[-1] == "red"
    saved, prompt = scene.tab.evaluate("async () => { const made = await app.graphToPrompt(); "
                                       f"return [made.workflow.nodes.find(node => node.id === {SCENE}).widgets_values, "
                                       f"made.output[{SCENE}].inputs]; }}")
    assert len(saved) == 6 and saved[1] == text_of(scene) == prompt["boxes"] and "drawing" not in prompt
    run = scene.run(timeout=120)
    assert (run.ended, run.message, scene.errors()) == ("execution_success", "", [])
    inside, outside = scene.tab.evaluate("""async ids => {
        const node = app.graph.getNodeById(ids[1]);
        const shown = document.querySelector(`[data-node-id="${ids[1]}"] img`) ?? node.imgs[0];
        const picture = new Image();
        picture.src = shown.src;
        await picture.decode();
        const canvas = document.createElement("canvas");
        [canvas.width, canvas.height] = [picture.naturalWidth, picture.naturalHeight];
        const pen = canvas.getContext("2d");
        pen.drawImage(picture, 0, 0);
        return [0.375, 0.75].map(x => [...pen.getImageData(x * canvas.width, 0.7 * canvas.height, 1, 1).data]);
    }""", [SCENE, PREVIEW])
    assert inside[:3] == [255, 0, 0] and outside[:3] == [128, 132, 128]


@pytest.mark.slow
def test_the_drawing_follows_the_text_and_says_what_is_wrong_with_it(scene):
    for text, words in [("0.1 0.5 0.2 0.3 #2454dc", "Line 1: #2454dc is taken as blue."),
                        ("0.1 0.5 0.2 0.3 pink", "Line 1: pink is none of red, blue, yellow, white, green."),
                        ("12 8 20 20 red", "Line 1: write fractions of the picture, from 0 to 1, not pixels."),
                        ("", "Cars stand anywhere. At most three boxes. Drag to draw.")]:
        scene.set_widgets("boxes", text)
        assert says(scene, words)
