"""The preview of a clip in a real browser, in both renderings: it moves in the node while the node samples.

A sheet of six colours stands for the pictures of a clip: what the page shows can then be told by its colour.
"""

import pytest

SAMPLER = 7                                                                                     # of layer_strength
COLOURS = ["#ff0000", "#00ff00", "#0000ff", "#ffff00", "#ff00ff", "#00ffff"]
NAMES = {(255, 0, 0): 0, (0, 255, 0): 1, (0, 0, 255): 2, (255, 255, 0): 3, (255, 0, 255): 4, (0, 255, 255): 5}
CELL, COLUMNS, ROWS = (96, 48), 3, 2

# window.sheet(): the file of the sheet. window.arrives(told): the sheet comes, behind the server's word of it.
PREPARE = """([colours, [width, height], columns, id]) => {
    window.sheet = () => new Promise(resolve => {
        const canvas = document.createElement("canvas"), pen = canvas.getContext("2d");
        [canvas.width, canvas.height] = [columns * width, Math.ceil(colours.length / columns) * height];
        colours.forEach((colour, number) => {
            pen.fillStyle = colour;
            pen.fillRect(number % columns * width, Math.floor(number / columns) * height, width, height);
        });
        canvas.toBlob(resolve, "image/png");
    });
    window.arrives = async told => {
        const blob = await window.sheet();
        if (told) {
            app.api.dispatchCustomEvent("video_ldm.preview", { node: String(id), ...told });
        }
        app.api.dispatchCustomEvent("b_preview_with_metadata", { blob, nodeId: String(id), displayNodeId: String(id),
            parentNodeId: String(id), realNodeId: String(id), promptId: "none" });
        app.canvas.setDirty(true, true);            // as the progress of a run does
    };
}"""

# What the node shows: the file's kind, its size, and the colours at the given places of its width.
SHOWN = """async ([id, places]) => {
    const node = app.graph.getNodeById(id), inVue = LiteGraph.vueNodesMode;
    const source = inVue ? document.querySelector(`[data-node-id="${id}"] img`) : node.imgs?.[0];
    if (!source) {
        return null;
    }
    const canvas = document.createElement("canvas"), pen = canvas.getContext("2d");
    const [width, height] = [source.naturalWidth, source.naturalHeight];
    [canvas.width, canvas.height] = [width, height];
    pen.drawImage(source, 0, 0, width, height);
    const colours = places.map(x => [...pen.getImageData(x * width, height / 4, 1, 1).data].slice(0, 3));
    return { size: [width, height], colours };
}"""


def shown(page, *places):
    """(size, the numbers of the colours) that the node shows now, at fractions of its width."""
    found = page.tab.evaluate(SHOWN, [SAMPLER, list(places)])
    return found and (tuple(found["size"]), [NAMES.get(tuple(colour)) for colour in found["colours"]])


def looks(page, seconds, *places):
    """All that is seen in some seconds."""
    seen = []
    for _ in range(round(seconds / 0.15)):
        seen.append(shown(page, *places))
        page.wait(0.15)
    return [entry for entry in seen if entry]


@pytest.fixture
def sampler(page):
    page.open_template("layer_strength")
    page.fit()
    page.tab.evaluate(PREPARE, [COLOURS, CELL, COLUMNS, SAMPLER])
    yield page
    page.tab.evaluate("() => app.api.dispatchCustomEvent('executing', null)")
    page.tab.evaluate("() => app.extensionManager.setting.set('VideoLDM.MovingPreview', true)")


def arrives(page, **told):
    page.tab.evaluate("told => arrives(told)", told or None)


def whole_sheet(page):
    """Wait until the node shows the sheet as it came: three colours beside each other."""
    sheet = ((CELL[0] * COLUMNS, CELL[1] * ROWS), [0, 1, 2])
    return page.until(lambda: shown(page, 0.1, 0.5, 0.9) == sheet)


def moves(page, size):
    """Wait until the node shows the sheet's pictures, of this size."""
    return page.until(lambda: (now := shown(page, 0.5)) and now[0] == size)


@pytest.mark.slow
def test_the_pictures_of_the_sheet_take_turns_and_the_sheet_is_back_when_the_node_is_done(sampler):
    arrives(sampler, columns=COLUMNS, rows=ROWS, frames=6, still=0, fps=4.0)
    assert moves(sampler, (512, 256))
    overlaps = sampler.overlaps()
    seen = looks(sampler, 3, 0.05, 0.5, 0.95)
    assert {size for size, _ in seen} == {(512, 256)}
    assert {tuple(colours) for _, colours in seen} <= {(number,) * 3 for number in range(6)}
    if not sampler.vue:                     # Vue's picture moves by itself: what is drawn of it elsewhere stands still
        assert len({colours[0] for _, colours in seen}) >= 4
    assert len(screens(sampler, 2)) >= 3 and overlaps == []
    sampler.tab.evaluate("() => app.api.dispatchCustomEvent('executing', null)")
    assert whole_sheet(sampler) and sampler.errors() == []


def screens(page, seconds):
    """The different pictures that the screen shows of the node's preview."""
    box = page.tab.evaluate("""id => {
        const { scale, offset } = app.canvas.ds, canvas = app.canvas.canvas.getBoundingClientRect();
        const element = document.querySelector(`[data-node-id="${id}"] img`), node = app.graph.getNodeById(id);
        if (element && LiteGraph.vueNodesMode) {
            const { x, y, width, height } = element.getBoundingClientRect();
            return { x, y, width, height };
        }
        const [x, y] = [0, 1].map(axis => (node.pos[axis] + offset[axis]) * scale);
        return { x: canvas.left + x, y: canvas.top + y, width: node.size[0] * scale, height: node.size[1] * scale };
    }""", SAMPLER)
    seen = set()
    for _ in range(round(seconds / 0.2)):
        seen.add(page.tab.screenshot(clip=box))
        page.wait(0.2)
    return seen


@pytest.mark.slow
def test_a_clip_in_progress_stands_still_beside_the_finished_one(sampler):
    arrives(sampler, columns=COLUMNS, rows=ROWS, frames=5, still=1, fps=4.0)
    assert moves(sampler, (512, 128))
    seen = looks(sampler, 2, 0.25, 0.75)
    assert {size for size, _ in seen} == {(512, 128)}
    assert {colours[1] for _, colours in seen} == {5} and {colours[0] for _, colours in seen} <= set(range(5))
    assert len(screens(sampler, 2)) >= 3


@pytest.mark.slow
def test_a_sheet_that_the_server_says_nothing_of_and_a_page_that_is_set_so_show_the_sheet(sampler):
    arrives(sampler)
    assert whole_sheet(sampler)
    sampler.tab.evaluate("() => app.extensionManager.setting.set('VideoLDM.MovingPreview', false)")
    arrives(sampler, columns=COLUMNS, rows=ROWS, frames=6, still=0, fps=4.0)
    sampler.wait(1)
    assert whole_sheet(sampler) and sampler.errors() == []


@pytest.mark.slow
def test_a_run_shows_its_frames_one_after_another_and_in_the_end_side_by_side(sampler):
    """The sheet of the demo's eight frames is 1024x512, in three columns. One frame alone is drawn 512x256."""
    sampler.set_widgets("steps", 7 if sampler.vue else 6)       # else the server would have the result already
    seen = []
    run = sampler.run(200, during=lambda _: seen.append(shown(sampler, 0.5)))
    assert (run.ended, run.overlaps, sampler.errors()) == ("execution_success", [], [])
    assert (512, 256) in {size for size, _ in filter(None, seen)}
    assert shown(sampler, 0.5)[0] == (1024, 512)
