"""The cascade workflow on the bundled models, in a real server: boxes, start frame, longer, smoother, video file."""

import json
from pathlib import Path

import av
import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
STEPS = 6       # enough for pictures; the workflow has more


def read(path):
    """Frames (t h w 3) and rate of a video file."""
    with av.open(str(path)) as container:
        rate = container.streams.video[0].average_rate
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]).astype(float), rate


@pytest.mark.slow
def test_the_drive_leaves_a_smooth_clip_that_begins_with_its_start_frame(server, client):
    prompt = json.loads((ROOT / "workflows" / "api" / "drive.json").read_text(encoding="utf-8"))
    widgets = {node["class_type"]: node["inputs"] for node in prompt.values()}
    for inputs in widgets.values():
        if "steps" in inputs:
            inputs["steps"] = STEPS
    prompt["start"] = {"class_type": "VAEDecode", "inputs": {"samples": ["6", 0], "vae": ["1", 2]}}
    prompt["save start"] = {"class_type": "SaveImage", "inputs": {"images": ["start", 0], "filename_prefix": "start"}}
    result = client.run(prompt)
    paths = [server.output_path(file) for file in result.files() if file.get("type") == "output"]
    frames, rate = read(next(path for path in paths if path.name.startswith("drive_0") and path.suffix == ".mp4"))
    keys = widgets["VideoLDMExtend"]["length"]
    assert frames.shape == (4 * (keys - 1) + 1, 64, 128, 3) and rate == 16
    from PIL import Image
    start = np.asarray(Image.open(next(path for path in paths if path.name.startswith("start")))).astype(float)
    assert abs(frames[0] - start).mean() < 4                # but for the video's compression
    assert frames.std() > 10
    neighbours, distant = abs(frames[1:] - frames[:-1]).mean(), abs(frames[4:] - frames[:-4]).mean()
    assert 0 < neighbours < distant                         # smooth: a quarter of the way is less than the whole
    large, rate = read(next(path for path in paths if path.name.startswith("drive_large") and path.suffix == ".mp4"))
    assert large.shape == (8, 4 * 64, 4 * 128, 3) and rate == 16
    averaged = large.reshape(8, 64, 4, 128, 4, 3).mean((2, 4))
    assert abs(averaged - frames[:8]).mean() < 12                   # the same video, larger
    shifts = abs(averaged.mean((1, 2)) - frames[:8].mean((1, 2)))   # of each frame's mean colour
    sky = abs(averaged[:, :16].mean((0, 1, 2)) - frames[:8, :16].mean((0, 1, 2)))
    assert shifts.max() < 2 and sky.max() < 2                       # of 255: Video Upscale keeps the colours
