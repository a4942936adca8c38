"""The pack in a real ComfyUI: it loads in silence, documents itself, and keeps what saved workflows rely on."""

import asyncio
import io
import json
import os
import re
import urllib.error
from pathlib import Path

import pytest
from PIL import Image

from video_ldm.tests.host.client import NodeError

ROOT = Path(__file__).resolve().parents[2]
SNAPSHOT = Path(__file__).with_name("nodes.json")
DEFAULTS = Path(__file__).with_name("defaults.json")
API_WORKFLOWS = sorted((ROOT / "workflows" / "api").glob("*.json"))
MODEL_FILES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")
NOTES = ("Note", "MarkdownNote")      # the page's own
UPLOAD = "IMAGEUPLOAD"      # the button of Load Image: a widget of the page alone
GRAPHS = sorted((ROOT / "workflows").glob("*.json"))


@pytest.fixture(scope="module")
def schemas():
    """The schema of every node that the pack's extension lists."""
    from video_ldm import comfy_entrypoint

    async def listed():
        return await (await comfy_entrypoint()).get_node_list()
    return [node.GET_SCHEMA() for node in asyncio.run(listed())]


@pytest.fixture(scope="module")
def object_info(server):
    return server.client.object_info()


@pytest.fixture(scope="module")
def own_nodes(schemas, object_info):
    """The pack's part of /object_info, by node id. Every node of the extension must be in it."""
    missing = [schema.node_id for schema in schemas if schema.node_id not in object_info]
    assert schemas and not missing, f"the server does not know {missing}"
    return {schema.node_id: object_info[schema.node_id] for schema in schemas}


def inputs_of(node):
    """{name: (type, options)} of a node in /object_info, required ones first, in the order of its widgets."""
    found = {}
    for kind in ("required", "optional"):
        for name in node["input_order"].get(kind, ()):
            spec = node["input"][kind][name]
            found[name] = (spec[0], spec[1] if len(spec) > 1 else {})
    return found


def test_the_server_loads_the_pack_without_a_complaint(server, own_nodes):
    assert server.complaints() == []


def test_the_page_gets_the_packs_script(server):
    names = [name for name in server.client.json("/extensions") if name.endswith("/js/save_video_file.js")]
    assert len(names) == 1 and "video-ldm" in names[0]


def test_every_node_id_carries_the_packs_prefix_and_a_plain_category(own_nodes):
    for node_id, node in own_nodes.items():
        assert node_id.startswith("VideoLDM"), node_id
        assert node["category"].split("/")[0] == "video ldm", node_id
        assert node["display_name"] and node["display_name"].isascii(), node_id


def test_every_input_has_a_tooltip_and_every_node_a_description(own_nodes):
    bare = [f"{node_id}.{name}" for node_id, node in own_nodes.items()
            for name, (_, options) in inputs_of(node).items() if not options.get("tooltip")]
    bare += [node_id for node_id, node in own_nodes.items() if not node["description"]]
    assert bare == []


def test_every_node_has_a_help_page_where_the_interface_looks_for_it(server, own_nodes):
    missing = []
    for node_id, node in own_nodes.items():
        folder = node["python_module"].split(".", 1)[1]
        try:
            page = server.client.request(f"/extensions/{folder}/docs/{node_id}.md").decode()
        except urllib.error.HTTPError:
            page = ""
        if len(page) < 100:
            missing.append(node_id)
    assert missing == []


def test_the_picture_of_every_help_page_is_served_where_the_interface_looks_for_it(server, own_nodes):
    """The interface puts the folder of the page before the address of a picture that is relative."""
    wrong = []
    for node_id, node in own_nodes.items():
        folder = f"/extensions/{node['python_module'].split('.', 1)[1]}/docs/"
        page = server.client.request(f"{folder}{node_id}.md").decode()
        for address in re.findall(r"!\[[^\]]*\]\(([^)\s]+)\)", page) or ["no picture"]:
            try:
                Image.open(io.BytesIO(server.client.request(folder + address))).load()
            except (urllib.error.HTTPError, OSError, ValueError) as error:
                wrong.append((node_id, address, str(error)))
    assert wrong == []


def test_node_ids_and_the_order_of_their_inputs_are_those_recorded(own_nodes):
    """Saved workflows store widget values by position: inputs are appended, never reordered, removed or retyped."""
    current = {node_id: {"inputs": [[name, kind if isinstance(kind, str) else "COMBO"]
                                    for name, (kind, _) in inputs_of(node).items()],
                         "outputs": node["output"]} for node_id, node in sorted(own_nodes.items())}
    recorded = json.loads(SNAPSHOT.read_text()) if SNAPSHOT.exists() else {}
    for node_id, old in recorded.items():
        assert node_id in current, f"{node_id} is gone, and every workflow that holds it breaks"
        for kind in ("inputs", "outputs"):
            kept = current[node_id][kind][:len(old[kind])]
            assert kept == old[kind], f"the {kind} of {node_id} changed for workflows that were saved with it"
    if os.environ.get("RECORD_NODES"):
        lines = [f" {json.dumps(node_id)}: {json.dumps(node)}" for node_id, node in current.items()]
        SNAPSHOT.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    else:
        assert current == recorded, "new nodes or inputs: run this test with RECORD_NODES=1 and commit nodes.json"


def test_inputs_keep_their_defaults_and_a_saved_prompt_lacks_none_that_is_required(own_nodes):
    """A prompt that was saved before an input came is run with that input's default: it has one, and it stays.

    A default that is a model or a video is left out: it depends on the files of the server.
    """
    current = {node_id: {"required": node["input_order"].get("required", []), "defaults": defaults_of(node)}
               for node_id, node in sorted(own_nodes.items())}
    recorded = json.loads(DEFAULTS.read_text()) if DEFAULTS.exists() else {}
    for node_id, old in recorded.items():
        new = current[node_id]
        assert new["required"] == old["required"], f"{node_id}: an input that is appended must be optional"
        changed = {name for name, value in old["defaults"].items() if new["defaults"].get(name, object()) != value}
        assert changed == set(), f"the defaults of {node_id} changed, and with them the frames of older graphs"
    if os.environ.get("RECORD_NODES"):
        lines = [f" {json.dumps(node_id)}: {json.dumps(node)}" for node_id, node in current.items()]
        DEFAULTS.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    else:
        assert current == recorded, "new nodes or inputs: run this test with RECORD_NODES=1 and commit defaults.json"


def defaults_of(node):
    """{widget: what the page shows in a new node}, without files and sockets."""
    found = {}
    for name, (kind, options) in inputs_of(node).items():
        choices = kind if isinstance(kind, list) else options.get("options") if kind == "COMBO" else None
        value = options.get("default", choices[0] if choices else None)
        is_file = choices is not None and any("." in str(choice) for choice in choices)
        if value is not None and not is_file:
            found[name] = value
    return found


@pytest.mark.parametrize("path", API_WORKFLOWS, ids=lambda path: path.stem)
def test_every_api_workflow_fits_the_nodes_it_names(path, object_info):
    assert misfits(json.loads(path.read_text(encoding="utf-8")), object_info) == []


def misfits(prompt, object_info):
    """What is wrong with a prompt for the nodes that a server has, in words."""
    wrong = []
    for node_id, entry in prompt.items():
        place, node = f"{node_id} ({entry['class_type']})", object_info.get(entry["class_type"])
        if node is None:
            wrong.append(f"{place}: no such node")
            continue
        known = inputs_of(node)
        absent = [name for name in node["input_order"].get("required", ()) if name not in entry["inputs"]]
        unknown = [name for name in entry["inputs"] if name.split(".")[0] not in known]
        wrong += [f"{place}: {name} is missing" for name in absent] + [f"{place}: no input {name}" for name in unknown]
        for name in set(entry["inputs"]) & set(known):
            problem = misfit(entry["inputs"][name], *known[name], prompt, object_info)
            wrong += [f"{place}: {name} {problem}"] if problem else []
    return wrong


def misfit(value, kind, options, prompt, object_info):
    """What is wrong with a prompt's input value for the type that a node declares, or None."""
    if isinstance(value, list) and len(value) == 2 and isinstance(value[1], int) and str(value[0]) in prompt:
        source = object_info.get(prompt[value[0]]["class_type"], {"output": []})["output"]
        given = source[value[1]] if value[1] < len(source) else "nothing"
        wanted = kind.split(",") if isinstance(kind, str) else [given]
        return None if "*" in (given, *wanted) or given in wanted else f"takes {kind} and is given {given}"
    choices = kind if isinstance(kind, list) else options.get("options") if kind == "COMBO" else None
    if choices is not None:
        is_the_users = options.get("image_upload") or options.get("video_upload") or (
            str(value).endswith(MODEL_FILES) and not (ROOT / "models" / "demo" / str(value)).exists())
        return None if is_the_users or value in choices else f"has no choice {value!r}, only {choices}"
    if kind in ("INT", "FLOAT"):
        low, high = options.get("min", value), options.get("max", value)
        return None if low <= value <= high else f"{value} is outside {low}..{high}"
    return None if isinstance(value, {"STRING": str, "BOOLEAN": bool}.get(kind, object)) else f"is no {kind}"


@pytest.mark.parametrize("path", GRAPHS, ids=lambda path: path.stem)
def test_every_workflow_for_the_interface_stores_its_widgets_in_the_servers_order(path, object_info):
    for node in json.loads(path.read_text(encoding="utf-8"))["nodes"]:
        if node["type"] in NOTES:
            continue
        assert node["type"] in object_info, f"no node {node['type']}"
        stored = [entry["name"] for entry in node["inputs"] if "widget" in entry and entry["type"] != UPLOAD]
        known = list(inputs_of(object_info[node["type"]]))
        assert stored == [name for name in known if name in stored], f"node {node['id']} ({node['type']})"


def test_the_interface_lists_the_workflows_among_its_templates(server):
    listed = server.client.json("/workflow_templates").get("video-ldm", [])
    assert sorted(listed) == [path.stem for path in GRAPHS]


# ---- the harness itself, on core nodes --------------------------------------------------------------------------

EMPTY = {"1": {"class_type": "EmptyLatentImage", "inputs": {"width": 64, "height": 64, "batch_size": 3}}}


def test_a_latent_travels_to_the_server_and_back_bit_for_bit(server, client):
    import torch
    samples = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    name = server.put_input_latent("there.latent", samples)
    prompt = {"1": {"class_type": "LoadLatent", "inputs": {"latent": name}}}
    assert torch.equal(server.latent(prompt, "1"), samples)
    assert server.latent(EMPTY, "1").shape == (3, 4, 8, 8)


def test_a_refused_prompt_names_its_node_and_the_reason(client):
    prompt = {"7": {"class_type": "SaveLatent", "inputs": {"samples": ["1", 0], "filename_prefix": "x"}},
              "1": {"class_type": "EmptyLatentImage", "inputs": {"width": 64, "height": 1, "batch_size": 1}}}
    with pytest.raises(NodeError) as caught:
        client.run(prompt)
    assert caught.value.node_id == "1" and "height" in caught.value.message


def test_a_failing_node_is_reported_with_its_exception(server, client):
    server.input_path("broken.latent").write_bytes(b"no latent")
    prompt = {"1": {"class_type": "LoadLatent", "inputs": {"latent": "broken.latent"}}}
    with pytest.raises(NodeError) as caught:
        server.latent(prompt, "1")
    assert caught.value.node_id == "1" and caught.value.exception_type == "SafetensorError"
    assert caught.value.traceback


def test_an_image_is_uploaded_and_saved_unchanged(server, client):
    import numpy as np
    from PIL import Image
    image = np.random.default_rng(0).integers(0, 256, (40, 48, 3)) / 255
    prompt = {"1": {"class_type": "LoadImage", "inputs": {"image": server.put_input_image("there.png", image)}},
              "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "back"}}}
    result = client.run(prompt)
    saved = np.asarray(Image.open(server.output_path(result.files()[0])))
    assert np.array_equal(saved, np.rint(image * 255).astype("uint8"))
    assert result.executed() == ["1", "2"]
