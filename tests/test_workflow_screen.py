"""Where the nodes of the workflows lie: apart from each other, and their results on a screen of 1600x950."""

import copy
import json
from pathlib import Path

import pytest

from video_ldm.tools import graph_layout
from video_ldm.tools.graph_layout import READABLE, VIEWS, box, fitted_view, on_screen, results, saved_view

WORKFLOWS = sorted((Path(__file__).resolve().parent.parent / "workflows").glob("*.json"))
each_workflow = pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)


def load(path):
    return json.loads(path.read_text(encoding="utf-8"))


def hidden(graph):
    """(view, node, its box in pixels) of the results that are not seen whole."""
    return [(name, node["id"], look(graph).shows(box(node))) for name, look in VIEWS.items() for node in results(graph)
            if not on_screen(look(graph).shows(box(node)))]


@each_workflow
def test_the_results_are_on_the_screen_however_a_page_shows_the_graph(path):
    graph = load(path)
    assert results(graph) and hidden(graph) == []


@each_workflow
def test_a_graph_is_shown_at_a_scale_that_is_readable(path):
    graph = load(path)
    assert saved_view(graph).scale >= READABLE and fitted_view(graph).scale >= READABLE


@each_workflow
def test_the_first_node_is_on_the_screen_too(path):
    graph = load(path)
    first = min(graph["nodes"], key=lambda node: tuple(node["pos"]))
    for look in (saved_view, graph_layout.larger_view):
        seen = look(graph).shows(box(first))
        assert seen.left >= graph_layout.LEFT and seen.top >= graph_layout.TOP


@each_workflow
def test_nodes_lie_apart_and_inside_a_group_also_when_they_have_grown(path):
    graph = load(path)
    boxes = {node["id"]: box(node) for node in graph["nodes"]}
    for key, one in boxes.items():
        assert any(x <= one.left and y <= one.top and one.right <= x + width and one.bottom <= y + height
                   for x, y, width, height in (group["bounding"] for group in graph["groups"])), key
        meets = [other for other, its in boxes.items() if other != key
                 and one.left < its.right and its.left < one.right and one.top < its.bottom and its.top < one.bottom]
        assert meets == [], key


def test_a_result_that_is_moved_away_is_missed_in_every_view():
    for by, axis in ((1500, 0), (1200, 1), (-1500, 0)):
        graph = load(WORKFLOWS[0])
        node, = results(graph)
        node["pos"][axis] += by
        assert {name for name, *_ in hidden(graph)} >= {"saved", "saved and 1.2 times as large"}


def test_laying_out_moves_nodes_and_changes_nothing_else(monkeypatch):
    before = load(next(path for path in WORKFLOWS if path.stem == "convert"))
    scattered = copy.deepcopy(before)
    for number, node in enumerate(scattered["nodes"]):
        node["pos"][1] += 900 * number          # each stays in the columns of its group
    after = graph_layout.lay_out(scattered)
    assert hidden(scattered) and hidden(after) == []
    assert without_places(after) == without_places(before)


def without_places(graph):
    kept = {key: value for key, value in graph.items() if key != "extra"}
    return {**kept, "nodes": [{**node, "pos": None} for node in graph["nodes"]],
            "groups": [{**group, "bounding": None} for group in graph["groups"]]}
