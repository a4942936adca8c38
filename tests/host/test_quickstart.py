"""The first workflows that a newcomer runs, on the bundled models in a real server.

They are the quickstart, the same clip with more frames, and PVDM, which needs no image model.
"""

import json
import re
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_the_quickstart_leaves_a_playable_clip_that_carries_its_workflow(server, client):
    prompt = json.loads((ROOT / "workflows" / "api" / "quickstart.json").read_text(encoding="utf-8"))
    graph = json.loads((ROOT / "workflows" / "quickstart.json").read_text(encoding="utf-8"))
    sampler = next(node["inputs"] for node in prompt.values() if node["class_type"] == "VideoLDMSampler")
    result = client.run(prompt, extra_data={"extra_pnginfo": {"workflow": graph}})
    paths = [server.output_path(file) for file in result.files()]
    video, = [path for path in paths if path.suffix == ".mp4"]
    sheet, = [path for path in paths if path.suffix == ".png"]
    with av.open(str(video)) as container:
        assert json.loads(container.metadata["workflow"]) == graph
        assert container.streams.video[0].codec_context.name == "h264"
        assert container.streams.video[0].average_rate == 4         # that of the layers, through both samplers
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]).astype(float)
    assert frames.shape == (sampler["frames"], 4 * sampler["height"], 4 * sampler["width"], 3)
    assert frames.std() > 10                                             # a picture, not a flat colour
    assert 0 < abs(frames[1:] - frames[:-1]).mean() < frames.std()       # that moves, and is no slide show of noise
    assert Image.open(sheet).size[0] >= sampler["width"]


@pytest.mark.slow
def test_frame_windows_leave_one_clip_three_times_as_long(server, client):
    """Frame Windows' workflow: as much moves from frame to frame where windows meet as elsewhere."""
    prompt = json.loads((ROOT / "workflows" / "api" / "windows.json").read_text(encoding="utf-8"))
    sampler = next(node["inputs"] for node in prompt.values() if node["class_type"] == "VideoLDMSampler")
    sampler["steps"] = 8        # enough for pictures; the workflow has more
    result = client.run(prompt)
    video = next(path for path in map(server.output_path, result.files()) if path.suffix == ".mp4")
    with av.open(str(video)) as container:
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]).astype(float)
    assert len(frames) == sampler["frames"] == 24
    moves = abs(frames[1:] - frames[:-1]).mean((1, 2, 3))
    assert frames.std() > 10 and moves.min() > 0
    assert moves.max() < 3 * np.median(moves)           # no cut from one window to another drive


@pytest.mark.slow
def test_pvdm_drives_on_from_nothing_and_from_a_start_clip_and_mixes_planes(server, client):
    prompt = json.loads((ROOT / "workflows" / "api" / "pvdm.json").read_text(encoding="utf-8"))
    result = client.run(prompt)
    videos = {}
    for path in map(server.output_path, result.files()):
        if path.suffix == ".mp4":
            with av.open(str(path)) as container:
                assert container.streams.video[0].average_rate == 8
                videos[re.sub(r"_\d+.*", "", path.name)] = np.stack(
                    [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]).astype(float)
    assert {name: video.shape for name, video in videos.items()} == {
        "pvdm": (64, 64, 128, 3), "pvdm_goes_on": (48, 64, 128, 3), "pvdm_mixed": (16, 64, 128, 3)}
    for video in videos.values():
        moves = abs(video[1:] - video[:-1]).mean((1, 2, 3))
        assert video.std() > 10 and moves.min() > 0
        within = [move for number, move in enumerate(moves, 1) if number % 16]
        assert max(within) < 4 * np.median(within)      # no cut within a clip
        colours = video.mean((1, 2))
        assert abs(colours[1:] - colours[:-1]).max() < 12       # where a clip ends, the light and the road stay
    first, second = videos["pvdm"], videos["pvdm_goes_on"]
    assert abs(first[:16] - second[:16]).mean() < 4             # the start clip, twice through a video file
    assert abs(first[16:48] - second[16:]).mean() > 4           # another seed goes on in another way
