"""Makes the pictures of the help pages: each node as it stands wired in a graph, in ComfyUI's own page, after a run.

    python run.py ui --no-browser                   # prints the address
    COMFYUI_PATH=... python run.py _inside tests.host.help_pictures 127.0.0.1:8188 VideoLDMSampler ...

The Python needs tests/requirements.txt, and the machine a Chromium. Without names all pictures are made. Look at each
of them. Load Video Frames reads `drive.mp4` in ComfyUI's input folder: any short clip.
"""

import io
import json
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from video_ldm.tests.host.page import browser
from video_ldm.tools.paths import ROOT

PICTURES = ROOT / "web" / "docs" / "pictures"
WIDTH, QUALITY = 700, 80        # of the file
DRAWN = (2000, 1600)            # pixels of the page while a picture is taken: the file is made from more of them
LEFT, TOP = 300, 200            # of the picture on the page, away from the page's own bars
BORDER, GAP = 24, 50            # units of the graph: around the nodes, and between columns
PREVIEW = "preview"             # ("preview", 6): a Preview Image of the first output of node 6, for the picture alone
SHORT = 10                      # steps where the picture does not need more
RUN_WITHIN = 900                # seconds
HIDDEN = ("header, .comfyui-body-top, .side-tool-bar-container, .graph-canvas-menu, .minimap-main-container, .p-toast, "
          ".actionbar, .workflow-tabs-container, .bottom-panel { visibility: hidden !important }")


@dataclass(frozen=True)
class Graph:
    """A template and the pictures that are made of it.

    pages: {node id of the help page: columns of (node of the template, its width)}.
    """
    pages: dict[str, list[list[tuple]]]
    runs: bool = True                       # whether it runs on the bundled models
    left_out: tuple[int, ...] = ()          # nodes that are not needed, as they take long
    values: dict[str, object] = field(default_factory=dict)     # of widgets by name


P6 = (PREVIEW, 6)
GRAPHS = {
    "quickstart": Graph({
        "VideoLDMLoadDemo": [[(1, 260)], [(2, 300), (3, 300)], [(5, 270)]],
        "VideoLDMSampler": [[(2, 250), (3, 250), (4, 250)], [(5, 280)], [(6, 300), (P6, 300)]],
        "VideoLDMSaveVideo": [[(13, 280)], [(7, 420)]],
        "VideoLDMUpscale": [[(6, 260), (P6, 260), (14, 260)], [(13, 300)], [(7, 380)]]}),
    "windows": Graph({"VideoLDMFrameWindows": [[(2, 260), (12, 260)], [(5, 260), (6, 260)], [(7, 380)]]}),
    "layer_strength": Graph({"VideoLDMLayerStrength": [[(3, 270), (4, 270)], [(7, 250), (9, 250)], [(10, 400)]]}),
    "prompt_travel": Graph({"VideoLDMPromptTravel": [[(4, 320)], [(7, 250), (8, 250)], [(9, 400)]]}),
    "frame_noise": Graph({
        "VideoLDMFrameNoise": [[(6, 270), (8, 270)], [(10, 240), (14, 240), (15, 240)], [(16, 400)]],
        "VideoLDMFreeInit": [[(2, 270), (6, 270)], [(7, 290)], [(10, 230), (12, 230)]]}, values={"steps": SHORT}),
    "drive": Graph({
        "VideoLDMSceneLayout": [[(2, 230), (3, 230)], [(4, 340)], [(6, 230), ((PREVIEW, "start"), 300)]],
        "VideoLDMExtend": [[(7, 250), (6, 250)], [(8, 320)], [(12, 380)]],
        "VideoLDMInterpolate": [[(9, 250), (8, 250)], [(10, 320)], [(11, 250), (12, 380)]],
        "VideoLDMLoadTemporalDecoder": [[(1, 250)], [(19, 320)], [(11, 260)]],
        "VideoLDMTemporalDecode": [[(19, 260), (10, 260)], [(11, 300)], [(12, 380)]]},
        left_out=(20, 21, 22, 23, 24, 25), values={"steps": SHORT}),
    "pvdm": Graph({
        "VideoLDMLoadPVDM": [[(1, 380)], [(3, 290), (11, 290)]],
        "VideoLDMPVDMSampler": [[(1, 300)], [(3, 300)], [(4, 380)]],
        "VideoLDMPVDMEncode": [[(1, 260), (6, 260)], [(11, 250), (12, 250)], [(13, 230)]],
        "VideoLDMPVDMDecode": [[(1, 260), (13, 260)], [(14, 250)], [(15, 380)]]}),
    "upscale_video": Graph({"VideoLDMLoadVideo": [[(1, 330)], [((PREVIEW, 1), 330)]]},
                           left_out=tuple(range(2, 11)), values={"file": "drive.mp4", "frame_count": 8}),
    "seine_picture": Graph({"VideoLDMContextFrames": [[(2, 230)], [(6, 240), (3, 240)], [(7, 240)], [(8, 230)]]},
                           runs=False),
    "convert": Graph({"VideoLDMConvert": [[(1, 360)], [(4, 360)]]}, runs=False),
    "lora": Graph({"VideoLDMLoadTemporalLayers": [[(2, 270), (4, 270)], [(5, 320)], [(9, 280)]],
                   "VideoLDMMotionLoRA": [[(4, 320)], [(5, 320)]]}, runs=False),
    "faster_sampling": Graph({"VideoLDMReuseLayers": [[(2, 260), (3, 260)], [(5, 280), (7, 280)], [(9, 400)]]}),
    "camera_motion": Graph({"VideoLDMCameraMotion": [[(2, 290), (3, 290)], [(5, 330)], [(7, 270)]]}, runs=False),
    "picture_to_video_sparsectrl": Graph({"VideoLDMLoadSparseCtrl": [[(5, 290), (2, 290)], [(6, 300)], [(8, 260)]]},
                                         runs=False),
    "picture_to_video_pia": Graph({"VideoLDMPictureMotion": [[(6, 290), (3, 290)], [(14, 270)], [(7, 270)]]},
                                  runs=False),
    "zeroscope": Graph({"VideoLDMLoadVideoModel": [[(5, 300)], [(6, 290)]]}, runs=False),
}

# Adds the Preview Image of ("preview", source). The source "start" is the drive's first picture, decoded.
ADD_PREVIEW = """source => {
    const { graph } = app, made = LiteGraph.createNode("PreviewImage");
    graph.add(made);
    let from = graph.getNodeById(source);
    if (source === "start") {
        from = LiteGraph.createNode("VAEDecode");
        graph.add(from);
        graph.getNodeById(6).connect(0, from, 0);
        graph.getNodeById(1).connect(2, from, 1);
    }
    from.connect(0, made, 0);
    window.helpPreviews[source] = made.id;
}"""

# Puts the nodes of the columns beside each other and all others far away, and keeps the links between the former.
# Returns the width and height of the whole.
ARRANGE = """([columns, gap]) => {
    const { graph } = app, find = id => graph.getNodeById(Array.isArray(id) ? window.helpPreviews[id[1]] : id);
    const kept = new Set(columns.flat().map(([id]) => find(id)));
    window.helpLinks ??= graph._nodes
        .flatMap(node => (node.inputs ?? []).map((entry, slot) => [entry.link, node.id, slot]))
        .filter(([link]) => link != null).map(([link, target, slot]) => {
            const { origin_id, origin_slot } = graph.links.get?.(link) ?? graph.links[link];
            return [origin_id, origin_slot, target, slot];
        });
    for (const node of graph._nodes.filter(one => !kept.has(one))) {
        node.pos = [20000 + node.id * 700, 20000];
    }
    for (const [from, output, to, slot] of window.helpLinks) {
        const one = graph.getNodeById(from), other = graph.getNodeById(to), shown = kept.has(one) && kept.has(other);
        if (!shown && other.inputs[slot].link != null) {
            other.disconnectInput(slot);
        } else if (shown && other.inputs[slot].link == null) {
            one.connect(output, other, slot);
        }
    }
    let x = 0, bottom = 0;
    for (const column of columns) {
        let y = 0;
        for (const [id, width] of column) {
            const node = find(id), height = node.type === "PreviewImage" ? 270 : node.computeSize([width, 0])[1];
            node.setSize([width, height]);
            node.pos = [x, y + 30];
            y += height + 60;
        }
        bottom = Math.max(bottom, y - 30);
        x += Math.max(...column.map(([, width]) => width)) + gap;
    }
    return [x - gap, bottom];
}"""


class Studio:
    """A tab of ComfyUI's page in which pictures are taken. Its nodes are drawn on the canvas."""

    def __init__(self, tab, address: str) -> None:
        self.tab = tab
        tab.goto(f"http://{address}/", wait_until="domcontentloaded", timeout=180_000)
        tab.wait_for_function("() => window.app?.graph && window.app?.canvas && window.app?.extensionManager",
                              timeout=180_000)
        tab.wait_for_timeout(4000)
        for setting, value in (("Comfy.VueNodes.Enabled", False), ("Comfy.Graph.CanvasInfo", False),
                               ("LiteGraph.Canvas.MinFontSizeForLOD", 0)):
            tab.evaluate("([name, value]) => app.extensionManager.setting.set(name, value)", [setting, value])
        tab.add_style_tag(content=HIDDEN)

    def open(self, name: str, graph: Graph) -> None:
        """Open the template and run it, if it runs."""
        data = json.loads((ROOT / "workflows" / f"{name}.json").read_text(encoding="utf-8"))
        self.tab.evaluate("async data => { await app.loadGraphData(data); window.helpPreviews = {}; "
                          "window.helpLinks = undefined; }", {**data, "groups": []})
        for _ in range(4):                  # a dialog of missing models comes late
            self.tab.wait_for_timeout(500)
            self.tab.keyboard.press("Escape")
        self.tab.evaluate("ids => ids.forEach(id => app.graph.remove(app.graph.getNodeById(id)))", list(graph.left_out))
        for widget, value in {**graph.values, "control_after_generate": "fixed"}.items():
            self.tab.evaluate("([name, value]) => app.graph._nodes.flatMap(node => node.widgets ?? [])"
                              ".filter(one => one.name === name).forEach(one => { one.value = value; })",
                              [widget, value])
        shown = {node for columns in graph.pages.values() for column in columns for node, _ in column}
        for _, source in sorted((node for node in shown if isinstance(node, tuple)), key=str):
            self.tab.evaluate(ADD_PREVIEW, source)
        if graph.runs:
            self.run()

    def run(self) -> None:
        """Run the graph, and show contact sheets in the place of videos."""
        self.tab.set_viewport_size({"width": 500, "height": 300})       # draws little meanwhile
        self.tab.evaluate("""() => {
            window.helpEnd = null;
            for (const kind of ["execution_success", "execution_error", "execution_interrupted"]) {
                app.api.addEventListener(kind, () => { window.helpEnd = kind; });
            }
            app.queuePrompt(0, 1);
        }""")
        self.tab.wait_for_function("() => window.helpEnd", timeout=1000 * RUN_WITHIN)
        assert self.tab.evaluate("() => window.helpEnd") == "execution_success"
        self.tab.wait_for_timeout(2500)
        self.tab.evaluate("() => app.graph._nodes.forEach(node => node.widgets?.find(one => "
                          "one.name === 'Contact sheet / video')?.callback())")

    def picture(self, columns: list[list[tuple]]) -> Image.Image:
        """A picture of these nodes of the graph."""
        self.tab.set_viewport_size({"width": DRAWN[0], "height": DRAWN[1]})
        sides = self.tab.evaluate(ARRANGE, [columns, GAP])
        width, height = (side + 2 * BORDER for side in sides)
        scale = min((DRAWN[0] - 2 * LEFT) / width, (DRAWN[1] - 2 * TOP) / height)
        self.tab.evaluate("""([scale, x, y]) => {
            const { ds } = app.canvas;
            ds.scale = scale;
            [ds.offset[0], ds.offset[1]] = [x / scale, y / scale];
            app.canvas.setDirty(true, true);
        }""", [scale, LEFT + BORDER * scale, TOP + BORDER * scale])
        self.tab.wait_for_timeout(2000)
        left, top = self.tab.evaluate("() => (({ left, top }) => [left, top])"
                                      "(app.canvas.canvas.getBoundingClientRect())")
        shot = self.tab.screenshot(clip={"x": left + LEFT, "y": top + TOP, "width": width * scale,
                                         "height": height * scale})
        drawn = Image.open(io.BytesIO(shot)).convert("RGB")
        return drawn.resize((WIDTH, round(WIDTH * drawn.height / drawn.width)), Image.Resampling.LANCZOS)


def main(arguments: list[str]) -> int:
    address, *names = arguments
    with browser() as context:
        studio = Studio(context.new_page(), address)
        for name, graph in GRAPHS.items():
            wanted = {page: columns for page, columns in graph.pages.items() if not names or page in names}
            if wanted:
                studio.open(name, graph)
            for page, columns in wanted.items():
                target: Path = PICTURES / f"{page}.webp"
                studio.picture(columns).save(target, quality=QUALITY, method=6)
                print(f"{target.relative_to(ROOT)}: {target.stat().st_size} bytes", flush=True)
    return 0
