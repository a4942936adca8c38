"""The workflows as they lie in the repository: both forms describe one graph, and an artist can open them."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
WORKFLOWS = sorted((ROOT / "workflows").glob("*.json"))
NOTES = ("Note", "MarkdownNote")
CORE = ("BasicScheduler", "CFGGuider", "CLIPTextEncode", "Canny", "CheckpointLoaderSimple", "ControlNetApplyAdvanced",
        "ControlNetLoader", "EmptyLatentImage", "FreeU_V2", "ImageBatch", "ImageFromBatch", "ImageScale",
        "KSampler", "KSamplerSelect", "LatentBlend", "LatentUpscaleBy", "LoadImage", "LoraLoader",
        "LoraLoaderModelOnly", "ModelSamplingDiscrete", "PreviewAny", "PreviewImage", "SamplerCustomAdvanced",
        "VAEDecode", "VAEEncode")
SAMPLERS = ("KSampler", "VideoLDMSampler", "VideoLDMExtend", "VideoLDMInterpolate", "VideoLDMUpscale",
            "VideoLDMPVDMSampler")
REFINERS = ("VideoLDMInterpolate", "VideoLDMUpscale")
SECOND_PASS = 0.5       # the denoise of a sampler that works on a clip of the same graph
SEEDED = (*SAMPLERS, "VideoLDMFrameNoise")
CONVERT = "convert"     # the one graph that makes no video
AFTER_GENERATE = ("fixed", "increment", "decrement", "randomize")      # a widget of the page, beside every seed
UPLOAD = "IMAGEUPLOAD"      # the button of Load Image: a widget of the page alone
BYPASSED, MUTED = 4, 2
ABOVE_PLAYER, BELOW_PLAYER = 335, 55        # of Save Video File: its widgets, and the line with the frames' size
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
             "seine_transition", "zeroscope", "pvdm", "lora", "dreambooth", "video_to_video", "second_pass",
             "few_steps", "lightning", "v3_adapter", "freeu", "interpolate_video", "upscale_video", "long_clip",
             "prompt_travel", "layer_strength", "frame_noise", "convert", "faster_sampling", "musev",
             "picture_to_video_sparsectrl", "between_pictures", "picture_to_video_pia",
             "picture_to_video_animatelcm", "camera_motion"}
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
        assert given["type"] == kind and taken["type"] in (kind, "*")
    assert sum(entry["link"] is not None for node in nodes.values() for entry in node["inputs"]) == len(graph["links"])


@each_workflow
def test_a_player_has_room_for_the_frames_that_are_sampled(path):
    graph = load(path)
    sizes = [widget_values(node) for node in graph["nodes"]]
    shapes = {values["height"] / values["width"] for values in sizes if {"width", "height"} <= values.keys()}
    if any(node["type"] == "VideoLDMLoadPVDM" for node in graph["nodes"]):
        shapes.add(1 / 2)           # of the bundled PVDM's frames, which no widget says
    if any(node["type"] == "VideoLDMLoadVideo" for node in graph["nodes"]) and not shapes:
        shapes.add(10 / 16)         # of an artist's own video
    players = [node["size"] for node in graph["nodes"] if node["type"] == "VideoLDMSaveVideo"]
    assert len(shapes) == 1 and players or path.stem == CONVERT
    for width, height in players:
        assert height >= ABOVE_PLAYER + width * next(iter(shapes)) + BELOW_PLAYER


@each_workflow
def test_a_workflow_has_notes(path):
    assert any(node["type"] in NOTES and "**" in node["widgets_values"][0] for node in load(path)["nodes"])


@each_workflow
def test_a_second_run_makes_another_clip_and_repeats_nothing_that_follows_from_it(path):
    """A new clip has a new seed. What only makes it smoother or larger keeps its seed."""
    graph = load(path)
    nodes, prompt = [node for node in graph["nodes"] if node["type"] in SEEDED], as_prompt(graph)
    for node in nodes:
        follows = node["type"] in REFINERS or prompt[str(node["id"])]["inputs"].get("denoise") == SECOND_PASS
        after, = set(node["widgets_values"]) & set(AFTER_GENERATE)
        assert after == ("fixed" if follows else "randomize"), node["id"]
    assert nodes or path.stem == CONVERT


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
