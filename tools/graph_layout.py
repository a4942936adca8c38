"""Lays out the graphs of workflows/, so that what they make is seen on a screen of 1600x950 without panning.

    python tools/graph_layout.py                          all graphs
    python tools/graph_layout.py workflows/lora.json      some

The nodes of a group keep their order: they fill columns from the top to the bottom, and notes fill the gaps. Of all
heights of the columns the one is taken with which the graph is seen at the largest scale. Only positions, groups and
the saved view change. tests/test_workflow_screen.py holds every graph to it.

A page shows a graph in one of three ways (VIEWS): as it was saved; saved, but 1.2 times as large, where an older page
draws the nodes with Vue; and fitted by a newer page, which ignores the saved view of a template.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Graph = dict[str, Any]
Node = dict[str, Any]

WORKFLOWS = Path(__file__).resolve().parent.parent / "workflows"
NOTES = ("Note", "MarkdownNote")
RESULTS = ("VideoLDMSaveVideo", "PreviewAny")

# The screen, in pixels. Parts of the page lie over the graph: a bar on the left, two above, a map at the lower right.
WIDTH, HEIGHT = 1600, 950
LEFT, TOP, RIGHT, BOTTOM = 64, 136, 1595, 940
MAP_LEFT, MAP_TOP = 1338, 680
READABLE = 0.45         # the smallest scale of a graph
TEXT = 0.58             # the smallest scale at which the canvas writes the words of a node
NEARLY = 0.53          # the smallest scale that is raised to it
LARGEST = 0.8
LARGER, HIGHER = 1.2, 20        # what Vue's page 1.32 makes of a graph: by which factor larger, and how much higher
WORTH = 0.02            # by how much the scale must grow for results that stand above what makes them
NARROWER = ((340, 510), (320, 480), (300, 400), (280, 330))     # widths of the nodes and results of a large graph

# A node grows while it runs. Its height then, below its title, in the units of a graph: the largest of those measured
# in the pages 1.32 and 1.58, in both renderings, with a report, a preview and a player. Others keep their size.
TITLE = 30
TALLEST = {"CLIPTextEncode": 170, "Canny": 92, "ControlNetLoader": 86, "FreeU_V2": 148, "ImageFromBatch": 92,
           "KSampler": 625, "LatentBlend": 106, "LatentUpscaleBy": 92, "LoadImage": 438, "LoraLoader": 162,
           "LoraLoaderModelOnly": 114, "ModelSamplingDiscrete": 92, "PreviewImage": 370, "SamplerCustomAdvanced": 475,
           "VideoLDMContextFrames": 250, "VideoLDMConvert": 234, "VideoLDMExtend": 855, "VideoLDMFrameNoise": 294,
           "VideoLDMFrameWindows": 294, "VideoLDMFreeInit": 266, "VideoLDMInterpolate": 750,
           "VideoLDMLayerStrength": 242, "VideoLDMLoadDemo": 166, "VideoLDMLoadPVDM": 202,
           "VideoLDMLoadTemporalDecoder": 198, "VideoLDMLoadTemporalLayers": 302, "VideoLDMLoadVideo": 634,
           "VideoLDMLoadVideoModel": 226, "VideoLDMMotionLoRA": 206, "VideoLDMPVDMDecode": 174,
           "VideoLDMPVDMEncode": 146, "VideoLDMPVDMSampler": 633, "VideoLDMSampler": 815, "VideoLDMSaveVideo": 630,
           "VideoLDMSceneLayout": 624, "VideoLDMTemporalDecode": 306, "VideoLDMUpscale": 807,
           "VideoLDMReuseLayers": 270, "VideoLDMPictureMotion": 240, "VideoLDMLoadSparseCtrl": 370,
           "VideoLDMCameraMotion": 400}

HEAD = 50               # of a group, above the titles of its first nodes
PAD, GAP = 15, 20       # inside a group at its sides, and between nodes


@dataclass(frozen=True)
class Box:
    """Left, top, right and bottom; the title is inside."""
    left: float
    top: float
    right: float
    bottom: float

    @property
    def width(self) -> float:
        return self.right - self.left

    @property
    def height(self) -> float:
        return self.bottom - self.top


@dataclass(frozen=True)
class View:
    """Where a point of the graph is seen: `scale * (point + offset)` pixels from the corner of the screen."""
    scale: float
    x: float
    y: float

    def shows(self, box: Box) -> Box:
        return Box(*(round(self.scale * value, 1) for value in (box.left + self.x, box.top + self.y,
                                                                box.right + self.x, box.bottom + self.y)))


def box(node: Node, running: bool = True) -> Box:
    """A node as it is drawn when it has run, or as it was saved."""
    (left, top), (width, height) = node["pos"], node["size"]
    return Box(left, top - TITLE, left + width, top + (grown(node) if running else height))


def grown(node: Node) -> float:
    return max(node["size"][1], TALLEST.get(node["type"], 0))


def union(boxes: list[Box]) -> Box:
    return Box(min(box.left for box in boxes), min(box.top for box in boxes),
               max(box.right for box in boxes), max(box.bottom for box in boxes))


def results(graph: Graph) -> list[Node]:
    """The nodes that show what the graph makes."""
    return [node for node in graph["nodes"] if node["type"] in RESULTS]


# ---- views --------------------------------------------------------------------------------------------------------

def saved_view(graph: Graph) -> View:
    view = graph["extra"]["ds"]
    return View(view["scale"], *view["offset"])


def larger_view(graph: Graph) -> View:
    """The saved view of a page that makes a graph 1.2 times as large, from a corner of the nodes.

    How far it moves them was measured; it is true to two pixels.
    """
    view, whole = saved_view(graph), union([box(node, running=False) for node in graph["nodes"]])
    left, top = whole.left - 10, whole.top - 10
    return View(view.scale * LARGER, (view.x + left + 3) / LARGER - left, (view.y + top - HIGHER) / LARGER - top)


def fitted_view(graph: Graph) -> View:
    """The nodes in the middle of the screen, on three quarters of its width or height."""
    whole = union([box(node, running=False) for node in graph["nodes"]])
    width, height = whole.width + 20, whole.height + 20
    scale = min(0.75 * WIDTH / width, 0.75 * HEIGHT / height)
    return View(scale, WIDTH / scale / 2 - (whole.left + whole.right) / 2,
                HEIGHT / scale / 2 - (whole.top + whole.bottom) / 2)


VIEWS = {"saved": saved_view, "saved and 1.2 times as large": larger_view, "fitted": fitted_view}


def on_screen(seen: Box) -> bool:
    """Whether nothing of the page covers what is seen there, in pixels."""
    under_map = seen.right > MAP_LEFT and seen.bottom > MAP_TOP
    return LEFT <= seen.left and TOP <= seen.top and seen.right <= RIGHT and seen.bottom <= BOTTOM and not under_map


def results_seen(graph: Graph) -> bool:
    return all(on_screen(look(graph).shows(box(node))) for look in VIEWS.values() for node in results(graph))


# ---- placing ------------------------------------------------------------------------------------------------------

@dataclass
class Column:
    nodes: list[Node]
    bottom: float = 0.0

    @property
    def width(self) -> float:
        return max((node["size"][0] for node in self.nodes), default=0)

    def takes(self, node: Node, height: float) -> bool:
        return self.bottom + TITLE + grown(node) <= height

    def add(self, node: Node) -> None:
        self.nodes.append(node)
        self.bottom += TITLE + grown(node) + GAP


def columns(nodes: list[Node], height: float, results_first: bool) -> list[Column]:
    """The nodes of a group, in columns of this height. A node that is taller has one of its own."""
    made = [Column([])]
    for node in sorted(nodes, key=lambda node: (node["type"] in NOTES, results_first and node["type"] not in RESULTS)):
        if node["type"] in NOTES:
            free = [column for column in made if column.takes(node, height) and column.width >= node["size"][0]]
        else:
            free = [column for column in made[-2:] if column.takes(node, height)]
        if not free and made[-1].nodes:
            made.append(Column([]))
        (free or made[-1:])[0].add(node)
    return made


def members(graph: Graph) -> list[list[Node]]:
    """The nodes of each group, as they are read: from the left to the right, and in a column from the top down."""
    found = []
    for group in graph["groups"]:
        x, _, width, _ = group["bounding"]
        inside = [node for node in graph["nodes"] if x <= node["pos"][0] < x + width]
        found.append(sorted(inside, key=lambda node: tuple(node["pos"])))
    return found


def place(graph: Graph, height: float, results_first: bool = False) -> Graph:
    """The graph with columns of this height, and a view that shows it."""
    groups, places, left, lowest = [], {}, 0.0, 0.0
    for group, nodes in zip(graph["groups"], members(graph)):
        x = left + PAD
        for column in columns(nodes, height, results_first):
            y = float(HEAD)
            for node in column.nodes:
                places[node["id"]] = [round(x), round(y + TITLE)]
                y += TITLE + grown(node) + GAP
            lowest = max(lowest, y)
            x += column.width + GAP
        groups.append({**group, "bounding": [round(left), 0, round(x - GAP + PAD - left), 0]})
        left = x - GAP + 2 * PAD
    for group in groups:
        group["bounding"][3] = round(lowest)
    nodes = [{**node, "pos": places[node["id"]]} for node in graph["nodes"]]
    return with_view({**graph, "nodes": nodes, "groups": groups})


def with_view(graph: Graph) -> Graph:
    """The graph with the largest scale at which its results are seen.

    All of it is seen too where it is drawn as it is, and where it is drawn larger if its words stay readable then. A
    graph that is only a little too large for its words is cut at its end.
    """
    whole = union([box(node) for node in graph["nodes"]])
    fits = min((RIGHT - LEFT) / whole.width, (BOTTOM - TOP) / whole.height)
    start = next((scale for scale in (fits / LARGER, fits) if scale >= TEXT), TEXT if fits > NEARLY else fits)
    scales = [min(start, LARGEST) - 0.01 * step for step in range(40)]
    seen = [at_scale(graph, scale) for scale in scales if scale >= READABLE] or [at_scale(graph, READABLE)]
    return next((view for view in seen if results_seen(view)), seen[-1])


def at_scale(graph: Graph, scale: float) -> Graph:
    """The graph with a view of this scale, whose first node lies at the corner of what is free."""
    scale = int(scale * 1000) / 1000
    whole = union([box(node) for node in graph["nodes"]])
    offset = [round((LEFT + 4) / scale - whole.left), round((TOP + 4) / scale - whole.top + HIGHER / LARGER)]
    return {**graph, "extra": {**graph["extra"], "ds": {"scale": scale, "offset": offset}}}


def quality(graph: Graph) -> float:
    """The smallest scale of its views. Less where a result is not seen."""
    whole = union([box(node) for node in graph["nodes"]])
    fits = min((RIGHT - LEFT) / whole.width, (BOTTOM - TOP) / whole.height)
    smallest = min(saved_view(graph).scale, fitted_view(graph).scale, fits)
    return smallest + 0.1 * fits - (not results_seen(graph))


def lay_out(graph: Graph) -> Graph:
    """The best of all heights of the columns. A large graph gets narrower nodes."""
    made = best(graph)
    for widths in NARROWER:
        if min(fitted_view(made).scale, saved_view(made).scale) < READABLE or not results_seen(made):
            made = best({**graph, "nodes": [narrowed(node, *widths) for node in graph["nodes"]]})
    return made


def best(graph: Graph) -> Graph:
    tallest = max(TITLE + grown(node) for node in graph["nodes"])
    heights = range(round(tallest), 1700, 10)
    in_order, turned = (max((place(graph, height, first) for height in heights), key=quality)
                        for first in (False, True))
    return turned if quality(turned) > quality(in_order) + WORTH else in_order


def narrowed(node: Node, widest: int, widest_result: int) -> Node:
    """A node of at most this width. A note keeps its area."""
    width, height = node["size"]
    narrow = min(width, widest_result if node["type"] in RESULTS else widest)
    if node["type"] in NOTES:
        height = -(-height * width // narrow // 10) * 10
    return {**node, "size": [narrow, round(height)]}


def written(graph: Graph, before: str) -> str:
    """The file's text, in the form that it had."""
    form: dict[str, Any] = {"indent": 2} if before.startswith("{\n") else {"separators": (",", ":")}
    return json.dumps(graph, ensure_ascii=False, **form) + "\n"


def main(paths: list[Path]) -> None:
    for path in paths or sorted(WORKFLOWS.glob("*.json")):
        before = path.read_text(encoding="utf-8")
        graph = lay_out(json.loads(before))
        path.write_text(written(graph, before), encoding="utf-8")
        whole = union([box(node) for node in graph["nodes"]])
        print(f"{path.stem}: {whole.width:.0f}x{whole.height:.0f}, saved at {saved_view(graph).scale:.2f}, "
              f"fitted at {fitted_view(graph).scale:.2f}{'' if results_seen(graph) else ', results are not seen'}")


if __name__ == "__main__":
    main([Path(argument) for argument in sys.argv[1:]])
