"""`python run.py demo`, inside the host's Python: runs a workflow in a real ComfyUI and says where its files lie."""

import json
import sys
import time
from pathlib import Path

from . import hosts
from .client import Client, Interrupted, NodeError
from .console import NodeProgress
from .paths import HOST_FOLDER, ROOT
from .server import Server

TIMEOUT = 24 * 3600     # seconds


def main(argv: list[str]) -> int:
    """argv: the path of a workflow in API form. The exit status."""
    path, output, began = Path(argv[0]), ROOT / "output", time.monotonic()
    prompt = json.loads(path.read_text(encoding="utf-8"))
    print("Starting ComfyUI ...", flush=True)
    with Server(hosts.find(set_up=False), HOST_FOLDER / "base", output=output,
                arguments=["--disable-api-nodes"]) as server:
        print(f"Running {path.name} on http://{server.address}", flush=True)
        progress = NodeProgress(prompt)
        try:
            result = Client(server.address).run(prompt, progress, timeout=TIMEOUT, extra_data=graph_beside(path))
        except (NodeError, Interrupted) as error:
            progress.close()
            print(f"The workflow failed at {error}\nThe server's log: {server.log}", file=sys.stderr)
            return 1
        progress.close()
    print(f"Done in {time.monotonic() - began:.0f} s:")
    for file in result.files():
        if file.get("type") == "output":
            print(f"  {output / file.get('subfolder', '') / file['filename']}")
    return 0


def graph_beside(path: Path) -> dict:
    """The extra data that puts a workflow's graph into the video: dragged into ComfyUI, the video then opens it."""
    graph = path.parent.parent / path.name
    return {"extra_pnginfo": {"workflow": json.loads(graph.read_text(encoding="utf-8"))} if graph.is_file() else {}}
