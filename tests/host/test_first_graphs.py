"""The graphs as they were first published still load, and give the frames that they gave.

tests/fixtures/first_graphs.json holds the API form of every graph in its first version. first_frames.npz holds what
those of the bundled demo made with few steps on a CPU, with the pack of the day on which their weights were published:
the mean colours of squares of 8 x 8 pixels.
"""

import json
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from video_ldm.tests.host.test_server import inputs_of, misfits

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures"
FIRST = json.loads((FIXTURES / "first_graphs.json").read_text(encoding="utf-8"))
FRAMES = FIXTURES / "first_frames.npz"
DEMO = ("quickstart", "windows", "drive", "pvdm")
STEPS = 2
SQUARE = 8
ROUNDING = 1        # of 255: a frame is rounded to whole numbers, which may move a pixel, and so a mean, by one


def shortened(name):
    """The prompt with few steps, and the frames of each video beside it as PNG: {the node that saves them: node}."""
    prompt, saved = deepcopy(FIRST[name]), {}
    for key, node in list(prompt.items()):
        for widget in {"steps", "following_steps"} & node["inputs"].keys():
            node["inputs"][widget] = STEPS
        if node["class_type"] == "VideoLDMSaveVideo":
            source = node["inputs"].get("images") or [node["inputs"]["video"][0], 0]     # IMAGE lies before VIDEO
            prompt[f"frames {key}"] = {"class_type": "SaveImage", "inputs": {
                "images": source, "filename_prefix": f"first/{name}_{key}"}}
            saved[f"frames {key}"] = key
    return prompt, saved


def with_defaults(prompt, object_info):
    """The prompt with every widget that it does not name at the default that the page would show."""
    prompt, added = deepcopy(prompt), 0
    for node in prompt.values():
        for name, (_, options) in inputs_of(object_info[node["class_type"]]).items():
            if name not in node["inputs"] and "default" in options and node["class_type"].startswith("VideoLDM"):
                node["inputs"][name] = options["default"]
                added += 1
    return prompt, added


def frames_of(server, prompt, saved):
    """{node that saves a video: its frames (t h w 3)} of one run."""
    outputs = server.client.run(prompt).outputs
    return {key: np.stack([np.asarray(Image.open(server.output_path(file))) for file in outputs[node]["images"]])
            for node, key in saved.items()}


def means(frames):
    """The mean colours of the squares of each frame."""
    count, height, width, colours = frames.shape
    squares = frames.reshape(count, height // SQUARE, SQUARE, width // SQUARE, SQUARE, colours)
    return squares.mean((2, 4), dtype=np.float64)


@pytest.mark.parametrize("name", FIRST)
def test_a_graph_as_first_published_fits_the_nodes_of_today(server, name):
    assert misfits(FIRST[name], server.client.object_info()) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", DEMO)
def test_a_graph_as_first_published_gives_the_same_frames(server, client, name):
    prompt, saved = shortened(name)
    given = frames_of(server, prompt, saved)
    if not torch.cuda.is_available():       # a GPU computes with fewer bits
        with np.load(FRAMES) as recorded:
            for key, frames in given.items():
                then, now = recorded[f"{name} {key}"].astype(np.float64), means(frames)
                assert now.shape == then.shape and then.std() > 10       # pictures, not a flat colour
                assert abs(now - then).max() < ROUNDING, key
    complete, added = with_defaults(prompt, client.object_info())
    if added:
        client.free()
        again = frames_of(server, complete, saved)
        assert all(np.array_equal(frames, again[key]) for key, frames in given.items())
