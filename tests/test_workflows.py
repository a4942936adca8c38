"""The workflows as they lie in the repository: both forms describe one graph, and an artist can open them."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
WORKFLOWS = sorted((ROOT / "workflows").glob("*.json"))
NOTES = ("Note", "MarkdownNote")
CORE = ("CheckpointLoaderSimple", "CLIPTextEncode", "EmptyLatentImage", "ImageBatch", "ImageFromBatch", "ImageScale",
        "KSampler", "LatentBlend", "LoadImage", "PreviewImage", "VAEDecode")
SAMPLERS = ("KSampler", "VideoLDMSampler", "VideoLDMExtend", "VideoLDMInterpolate", "VideoLDMUpscale",
            "VideoLDMPVDMSampler")
AFTER_GENERATE = ("fixed", "increment", "decrement", "randomize")      # a widget of the page, beside every seed
UPLOAD = "IMAGEUPLOAD"      # the button of Load Image: a widget of the page alone
BYPASSED, MUTED = 4, 2
# Measured in the pages of ComfyUI, in the units of a graph. Where nodes are drawn by Vue they are taller.
TITLE = 30              # of a node, above its position
PREVIEW = 260           # by which a sampler grows while it shows what it makes
ABOVE_PLAYER, BELOW_PLAYER = 265, 55        # of Save Video File: its widgets, and the line with the frames' size
TALLEST = {"CheckpointLoaderSimple": 126, "EmptyLatentImage": 118, "VAEDecode": 54, "CLIPTextEncode": 102,
           "KSampler": 270, "VideoLDMLoadTemporalLayers": 214, "VideoLDMSampler": 418, "VideoLDMExtend": 514,
           "VideoLDMMotionLoRA": 114, "LoadImage": 400}
PICTURE_LIMIT = 200 * 1024

each_workflow = pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)


def load(path):
    return json.loads(path.read_text(encoding="utf-8"))


def as_prompt(graph):
    """The API form of an interface workflow, as ComfyUI's page makes it when it queues one, without titles."""
    nodes = {node["id"]: node for node in graph["nodes"] if node["type"] not in NOTES}
    running = {key: node for key, node in nodes.items() if node["mode"] not in (BYPASSED, MUTED)}
    links = {link[0]: link for link in graph["links"]}
    return {str(key): {"inputs": inputs_of(node, nodes, links), "class_type": node["type"]}
            for key, node in running.items()}


def inputs_of(node, nodes, links):
    """Widget values by name (they are stored by position), then the links over them."""
    values = list(node.get("widgets_values", ()))
    inputs = {}
    for entry in node["inputs"]:
        if "widget" in entry:
            value = values.pop(0)
            if entry["type"] != UPLOAD:
                inputs[entry["name"]] = value
            if entry["name"] in ("seed", "noise_seed") and values and values[0] in AFTER_GENERATE:
                values.pop(0)
    assert values == [], f"node {node['id']} stores {len(values)} values more than it has widgets"
    for entry in node["inputs"]:
        source = source_of(entry["link"], nodes, links)
        if source is not None:
            inputs[entry["name"]] = source
    return inputs


def widget_values(node):
    """{name: value} of a node's widgets."""
    inputs = [entry for entry in node.get("inputs", ()) if "widget" in entry]
    return {entry["name"]: value for entry, value in zip(inputs, node.get("widgets_values", ()))}


def grown(node):
    """left, top, right, bottom of a node as the page draws it while it runs."""
    (left, top), (width, height) = node["pos"], node["size"]
    height = max(height, TALLEST.get(node["type"], 0)) + PREVIEW * (node["type"] in SAMPLERS)
    return left, top - TITLE, left + width, top + height


def source_of(link, nodes, links):
    """[node, slot] at the far end of a link. A bypassed node passes on its input of the same type."""
    if link is None:
        return None
    _, node_id, slot, _, _, kind = links[link]
    node = nodes[node_id]
    if node["mode"] == MUTED:
        return None
    if node["mode"] == BYPASSED:
        behind = next((entry["link"] for entry in node["inputs"] if entry["type"] == kind), None)
        return source_of(behind, nodes, links)
    return [str(node_id), slot]


def test_the_workflows_that_the_readme_names_are_there():
    named = {"quickstart", "animatediff", "drive", "windows", "lavie", "animatediff_lavie", "seine_picture",
             "seine_transition", "zeroscope", "pvdm"}
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert named == {path.stem for path in WORKFLOWS} and all(f"*{name}*" in readme for name in named)


@each_workflow
def test_the_interface_form_and_the_api_form_describe_the_same_graph(path):
    graph, prompt = load(path), load(path.parent / "api" / path.name)
    titles = {key: entry.pop("_meta")["title"] for key, entry in prompt.items()}
    assert as_prompt(graph) == prompt
    renamed = {str(node["id"]): node["title"] for node in graph["nodes"] if "title" in node}    # the others keep theirs
    assert titles.items() >= {key: title for key, title in renamed.items() if key in prompt}.items()


@each_workflow
def test_a_workflow_uses_core_nodes_and_ours_alone(path):
    kinds = {node["type"] for node in load(path)["nodes"]}
    assert {kind for kind in kinds if not kind.startswith("VideoLDM")} <= {*CORE, *NOTES}


@each_workflow
def test_links_join_the_slots_that_they_name(path):
    graph = load(path)
    nodes = {node["id"]: node for node in graph["nodes"]}
    assert len(nodes) == len(graph["nodes"])
    for number, source, output, target, entry, kind in graph["links"]:
        given, taken = nodes[source]["outputs"][output], nodes[target]["inputs"][entry]
        assert number in given["links"] and taken["link"] == number
        assert given["type"] == taken["type"] == kind
    assert sum(entry["link"] is not None for node in nodes.values() for entry in node["inputs"]) == len(graph["links"])


@each_workflow
def test_nodes_lie_apart_and_inside_a_group_also_while_previews_show(path):
    graph = load(path)
    boxes = {node["id"]: grown(node) for node in graph["nodes"]}
    for key, (left, top, right, bottom) in boxes.items():
        assert any(x <= left and y <= top and right <= x + w and bottom <= y + h
                   for x, y, w, h in (group["bounding"] for group in graph["groups"])), key
        meets = [other for other, (x0, y0, x1, y1) in boxes.items()
                 if other != key and left < x1 and x0 < right and top < y1 and y0 < bottom]
        assert meets == [], key


@each_workflow
def test_a_player_has_room_for_the_frames_that_are_sampled(path):
    graph = load(path)
    sizes = [widget_values(node) for node in graph["nodes"]]
    shapes = {values["height"] / values["width"] for values in sizes if {"width", "height"} <= values.keys()}
    if any(node["type"] == "VideoLDMLoadPVDM" for node in graph["nodes"]):
        shapes.add(1 / 2)           # of the bundled PVDM's frames, which no widget says
    players = [node["size"] for node in graph["nodes"] if node["type"] == "VideoLDMSaveVideo"]
    assert len(shapes) == 1 and players
    for width, height in players:
        assert height >= ABOVE_PLAYER + width * next(iter(shapes)) + BELOW_PLAYER


@each_workflow
def test_a_workflow_has_notes_and_a_seed_that_stays(path):
    graph = load(path)
    assert any(node["type"] in NOTES and "**" in node["widgets_values"][0] for node in graph["nodes"])
    samplers = [node for node in graph["nodes"] if node["type"] in SAMPLERS]
    assert samplers and all("fixed" in node["widgets_values"] for node in samplers)


@each_workflow
def test_a_workflow_has_a_small_picture_of_the_same_name(path):
    from PIL import Image
    picture = path.with_suffix(".jpg")      # the only ending for which ComfyUI's templates look
    assert picture.stat().st_size <= PICTURE_LIMIT
    with Image.open(picture) as image:
        assert image.format == "JPEG" and image.width >= 400


@pytest.mark.parametrize("path", [*WORKFLOWS, *(ROOT / "web" / "docs").glob("*.md")], ids=lambda path: path.name)
def test_no_place_of_a_machine_is_in_what_artists_read(path):
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"/(?:home|root|tmp|work|Users)/|[A-Z]:\\|127\.0\.0\.1|localhost", text)
